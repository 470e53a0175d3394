// A run: how it is doing, its curves, ranks, log, checkpoints, recipe and what happened.

import { ask, runs } from "./api.js";
import { axisControl, Chart, grid, Sheet } from "./chart.js";
import { add, bytes, date, duration, el, fill, number, short, throttled, write } from "./dom.js";
import { badge, progress } from "./list.js";
import { ranks } from "./ranks.js";

const PARTS = ["curves", "ranks", "log", "checkpoints", "recipe", "history"];
const TIMES = ["step_s", "data_s", "forward_backward_s", "optimizer_s", "agreement_s", "saving_s"];
const FIRST = ["loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "mfu", "time of a step (s)", "data_wait", "peak_memory_gib"];
const NOT_DRAWN = ["epoch", "samples", "seconds", "tokens"];

/** Return the charts of a run: [{title, names}], what belongs together in one. */
export function grouped(names) {
  const groups = new Map();
  for (const name of names) {
    if (name.startsWith("final/")) continue;
    const [split, ...rest] = name.split("/");
    const last = /^\d+$/.test(rest[rest.length - 1]) && rest.length > 1 ? rest.slice(0, -1).join("/") : rest.join("/");
    if (NOT_DRAWN.includes(last)) continue;
    const title = split === "train" && TIMES.includes(last) ? "time of a step (s)" : last;
    if (!groups.has(title)) groups.set(title, []);
    groups.get(title).push(name);
  }
  const place = (title) => {
    const at = FIRST.indexOf(title);
    if (title === "loss") return -2;
    const evaluated = groups.get(title).some((name) => !name.startsWith("train/"));
    return evaluated ? -1 : at < 0 ? FIRST.length : at;
  };
  return [...groups].map(([title, found]) => ({ title, names: found }))
    .sort((a, b) => place(a.title) - place(b.title) || a.title.localeCompare(b.title, "en", { numeric: true }));
}

function facts(rows) {
  return el("dl.facts", {}, rows.filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function table(heads, rows, caption) {
  return el("div.table", {}, el("table", {}, caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((head, at) => el(rows.length && rows.every((row) => typeof row[at] === "number") ? "th.right" : "th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el(typeof cell === "number" ? "td.right" : "td", {}, typeof cell === "number" ? number(cell) : cell ?? "")))))));
}

export function run(root, id, part) {
  const head = el("div.head");
  const tabs = el("div.tabs", { role: "tablist", "aria-label": "what is shown of the run" });
  const panel = el("section.panel", { role: "tabpanel", tabIndex: -1 });
  const problem = el("p.problem", { role: "status" });
  fill(root, head, tabs, problem, panel);
  let current = null; // {name, close, grown}
  let summary = null;
  let closed = false;
  const control = new AbortController();

  const buttons = PARTS.map((name) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, onclick: () => { location.hash = `#/run/${id}/${name}`; },
    onkeydown: (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = buttons[(PARTS.indexOf(name) + move + PARTS.length) % PARTS.length];
      next.focus();
      next.click();
    },
  }, name));
  add(tabs, buttons);

  function show(name) {
    const wanted = PARTS.includes(name) ? name : PARTS[0];
    if (current && current.name === wanted) return;
    if (current) current.close();
    for (const button of buttons) {
      const on = button.id === `tab-${wanted}`;
      button.setAttribute("aria-selected", String(on));
      button.tabIndex = on ? 0 : -1;
    }
    panel.setAttribute("aria-labelledby", `tab-${wanted}`);
    fill(panel, el("p.empty", {}, "reading…"));
    write(problem, "");
    current = { name: wanted, close() {}, grown() {} };
    const mine = current;
    const open = { curves, ranks: heat, log, checkpoints, recipe, history }[wanted];
    Promise.resolve(open(mine)).catch((error) => {
      if (error.name === "AbortError" || mine !== current || closed) return;
      fill(panel);
      write(problem, error.message);
    });
  }

  const get = (path, query = {}) => ask(path, { run: id, ...query }, control.signal);

  function top() {
    const found = runs.all.get(id);
    if (!found) {
      if (runs.known) fill(head, el("h1", {}, "There is no such run"), el("p", {}, el("a", { href: "#/" }, "list of runs")));
      return;
    }
    if (found === summary) return;
    summary = found;
    const result = found.score ? `${found.score.metric} ${number(found.score.value)} at step ${number(found.score.step)}` : "";
    fill(head,
      el("h1", {}, found.name, " ", badge(found)),
      el("div.wide", {}, progress(found)),
      found.message && el("p.message", {}, found.message),
      facts([
        ["result", result], ["loss", number(found.loss)], ["samples/s", found.samples_per_s ? short(Math.round(found.samples_per_s)) : ""],
        ["left", duration(found.eta_s)],
        ["useful time", found.goodput?.total_s ? `${Math.round((100 * found.goodput.useful_s) / found.goodput.total_s)}%` : ""], ["world", found.processes ? `${found.processes} × ${found.strategy}` : ""],
        ["newest checkpoint", found.checkpoint ? `step ${number(found.checkpoint)}` : ""], ["starts", found.starts > 1 ? String(found.starts) : ""],
        ["job", found.job ? `${found.job} ${found.job_state || ""}${found.reason ? ` (${found.reason})` : ""}` : ""],
        ["task", found.task], ["data", found.data], ["model", found.model], ["started", date(found.started)],
        ...Object.entries(found.values || {}),
      ]));
  }

  // --------------------------------------------------------------------------------------------------------------

  async function curves(mine) {
    const sheet = new Sheet();
    mine.close = () => sheet.close();
    let known = "";
    let about = null;
    const marks = (by) => {
      if (!about) return null;
      const again = about.attempts.slice(1);
      if (by === "hours") return { starts: again.map((each) => (each.time - about.start) / 3600) };
      return { starts: again.map((each) => each.step), saved: about.checkpoints, rollbacks: about.rollbacks };
    };
    const draw = async () => {
      about = await get("history");
      if (mine !== current || closed) return;
      const groups = grouped(about.names);
      const key = JSON.stringify(groups);
      if (key === known) return;
      known = key;
      for (const chart of [...sheet.charts]) chart.close();
      const charts = groups.map(({ title, names }) => new Chart(sheet, {
        title, marks,
        lines: names.map((name, index) => ({ run: id, name, index, dash: !name.startsWith("train/"), label: label(name, title) })),
      }));
      fill(panel, axisControl(sheet),
        el("p.hint", {}, el("span.mark.restart"), "restart ", el("span.mark.saved"), "checkpoint ", el("span.mark.bad"), "rollback"),
        charts.length ? grid(charts) : el("p.empty", {}, "no numbers yet"));
    };
    const later = throttled(5000, () => { if (mine === current && !closed) draw().catch(() => {}); });
    mine.grown = () => {
      sheet.grown(new Set([id]));
      later();
    };
    await draw();
  }

  function label(name, title) {
    const split = name.split("/")[0];
    return title === "time of a step (s)" ? name.split("/").pop() : name.startsWith(`${split}/${title}`) ? split + name.slice(split.length + 1 + title.length) : name;
  }

  async function heat(mine) {
    const view = ranks(panel);
    const draw = async () => {
      const found = await get("ranks");
      if (mine === current && !closed) view.show(found.ranks);
    };
    mine.grown = throttled(2000, () => { if (mine === current && !closed) draw().catch(() => {}); });
    const timer = setInterval(mine.grown, 5000);
    mine.close = () => clearInterval(timer);
    await draw();
  }

  async function log(mine) {
    const about = await get("run");
    if (mine !== current || closed) return;
    if (!about.logs.length) {
      fill(panel, el("p.empty", {}, "there is no log yet"));
      return;
    }
    const text = el("pre.log", { tabIndex: 0, "aria-label": "log" });
    const tail = el("input", { type: "checkbox", checked: true });
    const which = el("select", { onchange: () => begin() }, about.logs.map((name) => el("option", { value: name }, name === "job" ? "job" : `rank ${name}`)));
    const before = el("button.small", { type: "button", onclick: () => earlier() }, "earlier");
    const size = el("span.note");
    fill(panel, el("div.controls", {}, el("label", {}, "log of ", which), before, el("label", {}, tail, " follow"), size), text);
    let first = 0;
    let end = 0;
    const bottom = () => { if (tail.checked) text.scrollTop = text.scrollHeight; };
    const sized = (found) => {
      end = found.end;
      write(size, `${found.name}, ${bytes(found.size)}`);
      before.disabled = first === 0;
    };
    async function begin() {
      const found = await get("log", { which: which.value });
      first = found.begin;
      text.textContent = found.text;
      sized(found);
      bottom();
    }
    async function earlier() {
      const found = await get("log", { which: which.value, end: first });
      const height = text.scrollHeight;
      text.prepend(found.text);
      text.scrollTop += text.scrollHeight - height;
      first = found.begin;
      before.disabled = first === 0;
    }
    async function more() {
      const found = await get("log", { which: which.value, begin: end });
      if (found.begin !== end) {
        await begin();
        return;
      }
      if (found.text) text.append(found.text);
      while (text.childNodes.length > 200) text.firstChild.remove(); // what is far above is asked for again by "earlier"
      sized(found);
      bottom();
    }
    mine.grown = throttled(1000, () => { if (mine === current && !closed) more().catch(() => {}); });
    const timer = setInterval(() => { if (runs.all.get(id)?.alive) mine.grown(); }, 3000);
    mine.close = () => clearInterval(timer);
    await begin();
  }

  async function checkpoints(mine) {
    const draw = async () => {
      const found = await get("checkpoints");
      if (mine !== current || closed) return;
      fill(panel, found.checkpoints.length ? table(["name", "step", "size", "written by", "result", "when"], found.checkpoints.map((each) => each.problem
        ? [each.name, each.step, "", "", el("span.bad", {}, each.problem), ""]
        : [each.name, each.step, bytes(each.bytes), `${each.world} × ${each.strategy}`, each.value === null ? "" : `${each.metric || ""} ${number(each.value)}`, each.created]))
        : el("p.empty", {}, "no checkpoints yet"),
      found.before ? el("p.hint", {}, `${number(found.before)} older ones are not listed`) : null, found.problem);
    };
    mine.grown = throttled(5000, () => { if (mine === current && !closed) draw().catch(() => {}); });
    await draw();
  }

  async function recipe(mine) {
    const about = await get("run");
    if (mine !== current || closed) return;
    const launch = about.launch || {};
    fill(panel,
      el("h2", {}, "Recipe"), el("pre.recipe", { tabIndex: 0, "aria-label": "recipe" }, about.recipe),
      el("h2", {}, "Launched"), facts([
        ["command", (launch.argv || []).join(" ")], ["host", launch.host], ["commit", launch.commit],
        ...Object.entries(launch.versions || {}), ...Object.entries(about.effect || {}).map(([key, value]) => [key, number(value)]),
      ]));
  }

  async function history(mine) {
    const draw = async () => {
      const [about, happened] = await Promise.all([get("run"), get("history")]);
      if (mine !== current || closed) return;
      const parts = [];
      if (about.failed) parts.push(el("h2", {}, "Failed"), el("pre.log", { tabIndex: 0 }, Object.entries(about.failed).map(([key, value]) => `${key}: ${value}\n`)));
      if (about.finished) {
        const splits = Object.entries(about.finished.splits).flatMap(([split, values]) => Object.entries(values).map(([key, value]) => [`${split} ${key}`, number(value)]));
        parts.push(el("h2", {}, "Finished"), facts([...splits, ...Object.entries(about.finished.summary).filter(([key]) => key !== "best").map(([key, value]) => [key, number(value)])]));
      }
      parts.push(el("h2", {}, "Starts"), table(["when", "from step", "world", "host", "job"], about.attempts.map((each) =>
        [date(each.time), each.step, `${each.processes || "?"} × ${each.strategy || "?"}`, each.host, each.job ? String(each.job) : ""])));
      parts.push(el("h2", {}, "Events"));
      if (happened.events.length) {
        parts.push(table(["step", "event", "what"], [...happened.events].reverse().map((row) => [row.step, row.event,
          Object.entries(row).filter(([key]) => !["step", "event", "time"].includes(key)).map(([key, value]) => `${key} ${number(value)}`).join(", ")])));
        if (happened.events_before) parts.push(el("p.hint", {}, `${number(happened.events_before)} earlier ones are not listed`));
      } else parts.push(el("p.empty", {}, "nothing but steps, evaluations and checkpoints"));
      fill(panel, parts);
    };
    mine.grown = throttled(5000, () => { if (mine === current && !closed) draw().catch(() => {}); });
    await draw();
  }

  // --------------------------------------------------------------------------------------------------------------

  top();
  show(part);
  const quiet = runs.listen((change) => {
    top();
    if (change.grown.has(id) && current) current.grown();
  });
  const leave = () => {
    closed = true;
    quiet();
    control.abort();
    if (current) current.close();
  };
  leave.part = show;
  return leave;
}
