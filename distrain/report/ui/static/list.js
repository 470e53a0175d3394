// The list of runs: filters, sorting, and what each is doing, as it changes.

import { runs } from "./api.js";
import { date, duration, el, fill, number, short, throttled, write } from "./dom.js";

const KEPT = { text: "", states: new Set(), sort: null, falling: false, chosen: new Set() }; // while the page is open

const COLUMNS = [
  { key: "name", title: "run", value: (run) => run.name },
  { key: "state", title: "state", value: (run) => run.state },
  { key: "progress", title: "progress", value: (run) => (run.total_steps ? run.step / run.total_steps : 0) },
  { key: "score", title: "result", right: true, value: (run) => (run.score ? run.score.value : null) },
  { key: "loss", title: "loss", right: true, low: 1, value: (run) => run.loss },
  { key: "rate", title: "samples/s", right: true, low: 2, value: (run) => run.samples_per_s },
  { key: "left", title: "left", right: true, low: 2, value: (run) => run.eta_s },
  { key: "world", title: "world", low: 3, value: (run) => `${run.processes || ""} ${run.strategy || ""}` },
  { key: "model", title: "model", low: 3, value: (run) => run.model },
  { key: "starts", title: "starts", right: true, low: 3, value: (run) => run.starts },
  { key: "started", title: "started", right: true, low: 2, value: (run) => run.started },
];

function matches(run) {
  if (KEPT.states.size && !KEPT.states.has(run.state)) return false;
  const about = [run.name, run.state, run.recipe, run.task, run.data, run.model, run.strategy, run.job, run.message,
    ...Object.entries(run.values || {}).map(([key, value]) => `${key}=${value}`)].join(" ").toLowerCase();
  return KEPT.text.toLowerCase().split(/\s+/).every((word) => about.includes(word));
}

function compared(a, b) {
  if (a === b) return 0;
  const missing = (value) => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return missing(a) ? (KEPT.falling ? -1 : 1) : (KEPT.falling ? 1 : -1); // always last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

export function badge(run) {
  return el("span.state", { "data-state": run.state }, run.state);
}

export function progress(run) {
  const part = run.total_steps ? Math.min(1, run.step / run.total_steps) : 0;
  const bar = el("span.bar", { "data-state": run.state, role: "progressbar", "aria-valuenow": Math.round(100 * part), "aria-valuemin": 0,
    "aria-valuemax": 100, "aria-label": "finished steps" }, el("span"));
  bar.firstChild.style.width = `${100 * part}%`;
  return [bar, el("span.steps", {}, `${short(run.step)}${run.total_steps ? ` / ${short(run.total_steps)}` : ""}`)];
}

export function score(run) {
  return run.score ? `${run.score.metric} ${number(run.score.value)}` : "";
}

class Row {
  constructor(choose) {
    this.box = el("input", { type: "checkbox", onchange: () => choose(this.run.id, this.box.checked) });
    this.link = el("a");
    this.cells = COLUMNS.map((column) => el("td", { className: `${column.right ? "right" : ""} ${column.low ? `low-${column.low}` : ""} is-${column.key}` }));
    this.element = el("tr", {}, el("td.choose", {}, this.box), this.cells);
  }

  show(run) {
    if (this.run === run) return;
    this.run = run;
    this.box.checked = KEPT.chosen.has(run.id);
    this.box.setAttribute("aria-label", `compare ${run.name}`);
    this.element.dataset.state = run.state;
    const cell = Object.fromEntries(COLUMNS.map((column, index) => [column.key, this.cells[index]]));
    write(this.link, run.name);
    this.link.href = `#/run/${run.id}`;
    const values = Object.entries(run.values || {}).map(([key, value]) => `${key}=${value}`).join("  ");
    fill(cell.name, this.link, values && el("span.values", {}, values), run.message && el("span.message", { title: run.message }, run.message));
    fill(cell.state, badge(run));
    fill(cell.progress, progress(run));
    fill(cell.score, run.score ? [el("b", {}, number(run.score.value)), " ", el("span.metric", {}, run.score.metric), run.rank ? el("span.rank", {}, `#${run.rank}`) : null] : "");
    write(cell.loss, number(run.loss));
    write(cell.rate, run.samples_per_s ? short(Math.round(run.samples_per_s)) : "");
    write(cell.left, duration(run.eta_s));
    write(cell.world, run.processes ? `${run.processes} × ${run.strategy || "?"}` : "");
    write(cell.model, run.model || "");
    write(cell.starts, run.starts ? String(run.starts) : "");
    write(cell.started, date(run.started));
  }
}

export function list(root) {
  const rows = new Map();
  const body = el("tbody");
  const empty = el("p.empty");
  const problem = el("p.problem", { role: "status" });
  const counts = el("div.states", { role: "group", "aria-label": "show only these states" });
  const shown = el("span.count", { role: "status" });
  const search = el("input", {
    type: "search", placeholder: "filter: words of name, state, model, values…", value: KEPT.text,
    "aria-label": "filter runs", oninput: () => { KEPT.text = search.value; draw(); },
  });
  const comparing = el("a.button", { href: "#/" }, "compare");
  const all = el("input", {
    type: "checkbox", "aria-label": "choose all that are shown",
    onchange: () => {
      for (const run of visible()) choose(run.id, all.checked, false);
      for (const row of rows.values()) row.box.checked = KEPT.chosen.has(row.run.id);
      chosen();
    },
  });
  const heads = COLUMNS.map((column) => {
    const button = el("button", { type: "button", onclick: () => {
      KEPT.falling = KEPT.sort === column.key ? !KEPT.falling : Boolean(column.right);
      KEPT.sort = column.key;
      draw();
    } }, column.title);
    return el("th", { className: `${column.right ? "right" : ""} ${column.low ? `low-${column.low}` : ""} is-${column.key}`, scope: "col" }, button);
  });
  fill(root,
    el("h1.hidden", {}, "Runs"),
    el("div.toolbar", {}, search, counts, shown, comparing),
    problem,
    el("div.table", {}, el("table.runs", {}, el("thead", {}, el("tr", {}, el("th.choose", {}, all), heads)), body)), empty);

  function visible() {
    const found = [...runs.all.values()].filter(matches);
    const column = COLUMNS.find((each) => each.key === KEPT.sort);
    if (column) {
      found.sort((a, b) => compared(column.value(a), column.value(b)));
      if (KEPT.falling) found.reverse();
    }
    return found;
  }

  function choose(id, on, say = true) {
    if (on) KEPT.chosen.add(id);
    else KEPT.chosen.delete(id);
    if (say) chosen();
  }

  function chosen() {
    const ids = [...runs.all.keys()].filter((id) => KEPT.chosen.has(id));
    write(comparing, ids.length ? `compare ${ids.length}` : "compare");
    comparing.href = ids.length ? `#/compare/${ids.join(",")}` : "#/";
    comparing.toggleAttribute("inert", !ids.length);
    comparing.classList.toggle("off", !ids.length);
  }

  function states() {
    const found = new Map();
    for (const run of runs.all.values()) found.set(run.state, (found.get(run.state) || 0) + 1);
    const key = [...found].join(";") + [...KEPT.states].join(",");
    if (counts.dataset.key === key) return;
    counts.dataset.key = key;
    const had = counts.contains(document.activeElement) ? document.activeElement.dataset.state : null;
    fill(counts, [...found].map(([state, count]) => el("button.chip", {
      type: "button", "aria-pressed": String(KEPT.states.has(state)), "data-state": state,
      onclick: () => {
        if (!KEPT.states.delete(state)) KEPT.states.add(state);
        draw();
      },
    }, `${state} ${count}`)));
    if (had) [...counts.children].find((chip) => chip.dataset.state === had)?.focus();
  }

  function draw() {
    states();
    for (const id of rows.keys()) if (!runs.all.has(id)) rows.delete(id);
    const found = visible();
    const wanted = found.map((run) => {
      if (!rows.has(run.id)) rows.set(run.id, new Row(choose));
      const row = rows.get(run.id);
      row.show(run);
      return row.element;
    });
    if (wanted.length !== body.children.length || wanted.some((element, index) => body.children[index] !== element)) {
      const focus = document.activeElement;
      body.replaceChildren(...wanted);
      if (focus && body.contains(focus)) focus.focus();
    }
    heads.forEach((head, index) => {
      const sorted = COLUMNS[index].key === KEPT.sort;
      head.setAttribute("aria-sort", sorted ? (KEPT.falling ? "descending" : "ascending") : "none");
    });
    write(shown, runs.known ? `${found.length} of ${runs.all.size}` : "");
    write(problem, runs.problem || "");
    write(empty, !runs.known ? "reading…" : runs.all.size ? (found.length ? "" : "no run matches") : "there are no runs here");
    chosen();
  }

  draw();
  return runs.listen(throttled(250, draw));
}
