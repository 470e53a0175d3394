// What each rank does: a cell for each, by host, coloured by a quantity that is chosen.

import { duration, el, fill, number, write } from "./dom.js";

const QUANTITIES = {
  work: { title: "own work in a step", unit: "s", value: (rank) => Object.values(rank.work).reduce((sum, each) => sum + each, 0) },
  step: { title: "finished steps", value: (rank) => rank.step },
  idle: { title: "seconds without progress", unit: "s", value: (rank) => rank.idle },
  age: { title: "seconds since it wrote", unit: "s", value: (rank) => rank.age },
};

function format(value, quantity) {
  return quantity.unit === "s" ? duration(value) : number(value);
}

export function ranks(panel) {
  let found = [];
  let chosen = null;
  let key = "work";
  const select = el("select", { onchange: () => { key = select.value; draw(); } });
  const range = el("span.note");
  const map = el("div.hosts");
  const about = el("div.about", { "aria-live": "polite" });
  fill(panel, el("div.controls", {}, el("label", {}, "colour by ", select), range), map, about);
  const cells = new Map();
  let layout = "";

  function quantities() {
    const phases = [...new Set(found.flatMap((rank) => Object.keys(rank.work)))];
    return { ...QUANTITIES, ...Object.fromEntries(phases.map((phase) => [`work ${phase}`,
      { title: `own work in a step: ${phase}`, unit: "s", value: (rank) => rank.work[phase] }])) };
  }

  function draw() {
    const known = quantities();
    const names = Object.keys(known).join();
    if (select.dataset.names !== names) {
      select.dataset.names = names;
      fill(select, Object.entries(known).map(([name, each]) => el("option", { value: name }, each.title)));
      select.value = key in known ? key : "work";
      key = select.value;
    }
    if (!found.length) {
      fill(map, el("p.empty", {}, "no rank has written what it does"));
      layout = "";
      write(range, "");
      return;
    }
    const wanted = found.map((rank) => `${rank.host}:${rank.rank}`).join();
    if (wanted !== layout) {
      layout = wanted;
      cells.clear();
      const hosts = Map.groupBy ? Map.groupBy(found, (rank) => rank.host) : byHost(found);
      fill(map, [...hosts].map(([host, ranks]) => el("div.host", {}, el("h3", {}, host),
        el("div.cells", { role: "list" }, ranks.map((rank) => {
          const cell = el("button.cell", { type: "button", onclick: () => { chosen = rank.rank; draw(); } },
            el("b", {}, String(rank.rank)), el("span"));
          cells.set(rank.rank, cell);
          return el("span", { role: "listitem" }, cell);
        })))));
    }
    const quantity = known[key];
    const values = found.map((rank) => quantity.value(rank)).filter((value) => Number.isFinite(value));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    write(range, values.length ? `${format(low, quantity)} to ${format(high, quantity)}` : "");
    for (const rank of found) {
      const cell = cells.get(rank.rank);
      const value = quantity.value(rank);
      const part = high > low && Number.isFinite(value) ? (value - low) / (high - low) : 0;
      cell.style.setProperty("--part", String(Math.round(100 * part)));
      cell.classList.toggle("middle", part > 0.68); // so that its text is read in light and in dark
      cell.classList.toggle("strong", part > 0.85);
      cell.classList.toggle("stalled", rank.stalled);
      cell.classList.toggle("old", rank.age > 6 * rank.interval + 10 && rank.phase !== "ended");
      cell.setAttribute("aria-pressed", String(rank.rank === chosen));
      write(cell.lastChild, format(value, quantity));
      cell.setAttribute("aria-label", `rank ${rank.rank} on ${rank.host}: ${format(value, quantity)}, in ${rank.where}${rank.stalled ? ", hangs" : ""}`);
      cell.title = cell.getAttribute("aria-label");
    }
    const rank = found.find((each) => each.rank === chosen) || found.find((each) => each.stalled) || slowest();
    fill(about, el("h3", {}, `rank ${rank.rank} on ${rank.host}`), el("dl.facts", {},
      [["doing", rank.where], ["for", duration(rank.seconds)], ["step", number(rank.step)], ["wrote", `${duration(rank.age)} ago`],
        ["process", String(rank.pid)], ...Object.entries(rank.work).map(([phase, seconds]) => [phase, `${duration(seconds)} a step`])]
        .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  }

  function slowest() {
    return found.reduce((most, rank) => (QUANTITIES.work.value(rank) > QUANTITIES.work.value(most) ? rank : most), found[0]);
  }

  return { show(list) { found = list; draw(); } };
}

function byHost(found) {
  const hosts = new Map();
  for (const rank of found) {
    if (!hosts.has(rank.host)) hosts.set(rank.host, []);
    hosts.get(rank.host).push(rank);
  }
  return hosts;
}
