// Several runs: what differs in their recipes, what came out, and one curve of all in each chart.

import { ask, runs } from "./api.js";
import { axisControl, Chart, colour, grid, Sheet } from "./chart.js";
import { el, fill, number, write } from "./dom.js";
import { badge, progress } from "./list.js";
import { grouped } from "./run.js";

const ALWAYS = ["loss", "samples_per_s"];
const FIRST = "train/loss";

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
    offer([FIRST], [FIRST]);
    recipes = await ask("compare", { run: ids });
    if (closed) return;
    const problems = Object.entries(recipes.problems).map(([id, message]) => `${name(id)}: ${message}`);
    write(problem, problems.join("\n"));
    table();
    // a file is read to its end for the names of all curves: until then there is the one that every run has
    const names = new Set([FIRST]);
    for (const id of ids.filter((each) => runs.all.has(each)).slice(0, 3)) {
      try {
        (await ask("history", { run: id })).names.forEach((each) => names.add(each));
      } catch (error) {
        write(problem, `${name(id)}: ${error.message}`);
      }
      if (closed) return;
      const groups = grouped([...names]);
      offer(groups.flatMap((group) => group.names), groups
        .filter((group) => ALWAYS.includes(group.title) || group.names.some((each) => !each.startsWith("train/")))
        .flatMap((group) => group.names.filter((each) => each !== "train/samples_per_s" || groups.length < 8)).slice(0, 4));
    }
  }

  const wanted = new Set();
  const known = new Map();
  const boxes = new Map(); // name of a curve: its checkbox
  const choices = el("div");
  const area = el("div");

  /** Let these curves be chosen; those that are `shown` are, at first. */
  function offer(options, shown) {
    const before = new Set(boxes.keys());
    for (const option of options) {
      if (boxes.has(option)) continue;
      const box = el("input", { type: "checkbox", onchange: () => {
        if (box.checked) wanted.add(option);
        else wanted.delete(option);
        place();
      } });
      boxes.set(option, box);
    }
    for (const option of shown) {
      if (before.has(option) || wanted.size >= 4) continue;
      wanted.add(option);
      boxes.get(option).checked = true;
    }
    if (boxes.size !== before.size) {
      fill(choices, [...boxes].map(([option, box]) => el("label", {}, box, ` ${option}`)));
    }
    if (!drawn) {
      const control = axisControl(sheet);
      control.append(el("details.choices", {}, el("summary", {}, "curves"), choices));
      fill(charts, control, area);
      drawn = true;
    }
    place();
  }

  function place() {
    for (const option of boxes.keys()) {
      if (wanted.has(option) && !known.has(option)) {
        known.set(option, new Chart(sheet, {
          title: option, height: 280, every: ids.length > 20 ? 4000 : 2000,
          lines: ids.map((id, index) => ({ run: id, name: option, index, label: name(id) })),
        }));
      } else if (!wanted.has(option) && known.has(option)) {
        known.get(option).close();
        known.delete(option);
      }
    }
    const shown = [...known.values()].map((chart) => chart.element);
    const there = area.firstChild ? [...area.firstChild.children] : [];
    if (shown.length !== there.length || shown.some((element, index) => element !== there[index])) {
      fill(area, grid([...known.values()]));
    }
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
