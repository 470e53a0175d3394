// Several runs: what differs in their recipes, what came out, and one curve of all in each chart.

import { ask, runs } from "./api.js";
import { axisControl, Chart, colour, grid, Sheet } from "./chart.js";
import { el, fill, number, write } from "./dom.js";
import { badge, progress } from "./list.js";
import { grouped } from "./run.js";

const ALWAYS = ["loss", "samples_per_s"];

export function compare(root, ids) {
  const problem = el("p.problem", { role: "status" });
  const charts = el("div");
  const differ = el("div");
  const sheet = new Sheet();
  let closed = false;
  let drawn = false;
  fill(root, el("h1", {}, `${ids.length} runs`), problem, charts, el("h2", {}, "What differs, and what came out"), differ);

  const name = (id) => runs.all.get(id)?.name || id;
  let recipes = { runs: [], differ: [], problems: {} };
  let order = { key: null, falling: false };

  async function read() {
    recipes = await ask("compare", { run: ids });
    if (closed) return;
    const problems = Object.entries(recipes.problems).map(([id, message]) => `${name(id)}: ${message}`);
    write(problem, problems.join("\n"));
    table();
    const some = ids.filter((id) => runs.all.has(id)).slice(0, 3);
    const names = new Set();
    for (const id of some) {
      try {
        (await ask("history", { run: id })).names.forEach((each) => names.add(each));
      } catch (error) {
        write(problem, `${name(id)}: ${error.message}`);
      }
      if (closed) return;
    }
    const groups = grouped([...names]);
    const options = groups.flatMap((group) => group.names.map((each) => ({ title: each, names: [each] })));
    const first = groups.filter((group) => ALWAYS.includes(group.title) || group.names.some((each) => !each.startsWith("train/")))
      .flatMap((group) => group.names.filter((each) => each !== "train/samples_per_s" || groups.length < 8)).slice(0, 4);
    draw(options, first.length ? first : options.slice(0, 1).map((each) => each.title));
  }

  function draw(options, shown) {
    const wanted = new Set(shown);
    const choices = el("details.choices", {}, el("summary", {}, "curves"), el("div", {}, options.map((option) => {
      const box = el("input", { type: "checkbox", checked: wanted.has(option.title), onchange: () => {
        if (box.checked) wanted.add(option.title);
        else wanted.delete(option.title);
        place();
      } });
      return el("label", {}, box, ` ${option.title}`);
    })));
    const known = new Map();
    const area = el("div");
    const control = axisControl(sheet);
    control.append(choices);
    fill(charts, control, area);
    function place() {
      for (const option of options) {
        if (wanted.has(option.title) && !known.has(option.title)) {
          known.set(option.title, new Chart(sheet, {
            title: option.title, height: 280, every: ids.length > 20 ? 4000 : 2000,
            lines: ids.map((id, index) => ({ run: id, name: option.names[0], index, label: name(id) })),
          }));
        } else if (!wanted.has(option.title) && known.has(option.title)) {
          known.get(option.title).close();
          known.delete(option.title);
        }
      }
      fill(area, grid(options.filter((option) => known.has(option.title)).map((option) => known.get(option.title))));
    }
    place();
    drawn = true;
  }

  function table() {
    const place = new Map(recipes.runs.map((id, index) => [id, index]));
    const rows = ids.map((id, index) => ({ id, index, run: runs.all.get(id) })).filter((row) => row.run);
    const columns = [
      { key: "run", value: (row) => row.run.name, show: (row) => [swatch(row.index), el("a", { href: `#/run/${row.id}` }, row.run.name)] },
      ...recipes.differ.map((each) => ({ key: each.key, value: (row) => each.values[place.get(row.id)], show: (row) => each.values[place.get(row.id)] ?? "–" })),
      { key: "state", value: (row) => row.run.state, show: (row) => badge(row.run) },
      { key: "progress", value: (row) => row.run.step, show: (row) => progress(row.run) },
      { key: "result", right: true, value: (row) => row.run.score?.value, show: (row) => (row.run.score ? `${row.run.score.metric} ${number(row.run.score.value)}` : "") },
      { key: "loss", right: true, value: (row) => row.run.loss, show: (row) => number(row.run.loss) },
    ];
    const column = columns.find((each) => each.key === order.key);
    if (column) {
      const plain = (value) => (typeof value === "number" ? value : value !== "" && Number.isFinite(Number(value)) ? Number(value) : String(value ?? ""));
      rows.sort((a, b) => {
        const [x, y] = [plain(column.value(a)), plain(column.value(b))];
        return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true })) * (order.falling ? -1 : 1);
      });
    }
    const focus = document.activeElement?.dataset?.column;
    fill(differ, recipes.differ.length ? null : el("p.hint", {}, "their recipes do not differ"),
      el("div.table", {}, el("table", {}, el("thead", {}, el("tr", {}, columns.map((each) => el("th", {
        scope: "col", className: each.right ? "right" : "", "aria-sort": each.key === order.key ? (order.falling ? "descending" : "ascending") : "none",
      }, el("button", { type: "button", "data-column": each.key, onclick: () => {
        order = { key: each.key, falling: order.key === each.key && !order.falling };
        table();
      } }, each.key))))),
      el("tbody", {}, rows.map((row) => el("tr", { "data-state": row.run.state }, columns.map((each) =>
        el("td", { className: `${each.right ? "right" : ""} is-${each.key === "run" || each.key === "progress" ? each.key : "value"}` }, each.show(row)))))))));
    if (focus) [...differ.querySelectorAll("button")].find((button) => button.dataset.column === focus)?.focus();
  }

  function swatch(index) {
    const found = el("span.swatch");
    found.style.background = colour(index);
    return found;
  }

  if (!ids.length) {
    write(problem, "choose runs in the list to compare them");
    return () => sheet.close();
  }
  const start = () => read().catch((error) => write(problem, error.message));
  if (runs.known) start();
  let started = runs.known;
  const quiet = runs.listen((change) => {
    if (!started) {
      started = true;
      start();
      return;
    }
    if (ids.some((id) => change.changed.has(id))) table();
    if (drawn) sheet.grown(change.grown);
  });
  return () => {
    closed = true;
    quiet();
    sheet.close();
  };
}
