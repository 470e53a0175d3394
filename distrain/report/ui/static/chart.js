// Curves on a canvas, by uPlot: as many points as there are pixels, from the server, which keeps the extremes.

import { ask } from "./api.js";
import { el, fill, number, short, throttled, write } from "./dom.js";

const LEGEND = 8; // with more lines only the one under the pointer is named
const scheme = matchMedia("(prefers-color-scheme: dark)");

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The colour of a line by its place. */
export function colour(index) {
  return css(`--line-${index % 10}`);
}

/** What the charts of a page share: the range of x that is looked at, how x is counted, and the pointer. */
export class Sheet {
  constructor() {
    this.range = null;
    this.by = "step";
    this.means = false;
    this.charts = new Set();
    this.key = `sheet-${Math.random()}`;
    this.visible = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.target.chart.seen(entry.isIntersecting);
    }, { rootMargin: "200px" });
    this.again = () => this.charts.forEach((chart) => chart.rebuild());
    scheme.addEventListener("change", this.again);
  }

  zoom(range) {
    this.range = range;
    for (const chart of this.charts) {
      if (range && chart.plot) chart.scale(); // at once, with the points that are there
      chart.stale();
    }
  }

  count(by) {
    this.by = by;
    this.zoom(null);
  }

  /** Ask again for what shows one of these runs. */
  grown(runs) {
    for (const chart of this.charts) {
      if (chart.lines.some((line) => runs.has(line.run))) chart.later();
    }
  }

  close() {
    scheme.removeEventListener("change", this.again);
    this.visible.disconnect();
    for (const chart of [...this.charts]) chart.close();
  }
}

export class Chart {
  /** `lines`: {run, name, label, index, dash}; `marks()`: {starts, saved, rollbacks}, each a list of x. */
  constructor(sheet, { title, lines, marks = null, height = 220, log = false, every = 2000 }) {
    Object.assign(this, { sheet, title, lines, marks, height, log, found: null, plot: null, isStale: true });
    this.isSeen = false;
    this.at = null;
    this.later = throttled(every, () => this.stale());
    this.readout = el("output.readout", { "aria-live": "polite" });
    this.note = el("span.note");
    this.logs = el("button.small", {
      type: "button", "aria-pressed": String(log), title: "Logarithmic scale",
      onclick: () => {
        this.log = !this.log;
        this.logs.setAttribute("aria-pressed", String(this.log));
        this.rebuild();
      },
    }, "log");
    this.canvas = el("div.plot", {
      tabIndex: 0, role: "group",
      "aria-label": `${title}: left and right move, plus and minus zoom, 0 shows all`,
      onkeydown: (event) => this.key(event),
    });
    this.canvas.style.minHeight = `${height}px`;
    this.element = el("figure.chart", {},
      el("figcaption", {}, el("h3", { title }, title), this.note, this.logs), this.canvas, this.readout);
    this.element.chart = this;
    this.size = new ResizeObserver(() => {
      if (this.plot && this.canvas.clientWidth) this.plot.setSize({ width: this.canvas.clientWidth, height });
    });
    this.size.observe(this.canvas);
    sheet.charts.add(this);
    sheet.visible.observe(this.element);
  }

  close() {
    this.sheet.charts.delete(this);
    this.size.disconnect();
    this.closed = true;
    if (this.request) this.request.abort();
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }

  seen(isSeen) {
    this.isSeen = isSeen;
    if (isSeen && this.isStale) this.load();
  }

  stale() {
    this.isStale = true;
    if (this.isSeen) this.load();
  }

  async load() {
    if (this.closed) return;
    if (this.loading) {
      this.again = true;
      return;
    }
    this.loading = true;
    this.isStale = false;
    const { range, by } = this.sheet;
    const width = this.canvas.clientWidth || 400;
    this.request = new AbortController();
    try {
      const found = await ask("curves", {
        line: this.lines.map((line) => `${line.run}:${line.name}`),
        points: Math.min(1200, Math.max(200, Math.round(width * (this.lines.length > 50 ? 0.4 : this.lines.length > 20 ? 0.7 : 1.5)))),
        by, means: this.sheet.means ? 1 : null, from: range && range[0], to: range && range[1],
      }, this.request.signal);
      if (this.closed) return;
      const ahead = found.pending.length > 0;
      const problems = Object.values(found.problems);
      write(this.note, ahead ? `reading ${found.pending.length} of ${new Set(this.lines.map((line) => line.run)).size}…`
        : problems.length ? problems[0] : "");
      if (ahead) setTimeout(() => this.stale(), this.lines.length > 20 ? 1500 : 150);
      if (range === this.sheet.range && by === this.sheet.by) this.show(found);
      else this.isStale = true;
    } catch (error) {
      if (error.name !== "AbortError") write(this.note, error.message);
    } finally {
      this.loading = false;
      if (this.again || (this.isStale && this.isSeen)) {
        this.again = false;
        this.load();
      }
    }
  }

  show(found) {
    const same = this.found && this.plot && this.shownBy === this.sheet.by &&
      this.shape(found) === this.shape(this.found) && !this.log;
    this.found = found;
    if (!same) {
      this.rebuild();
      return;
    }
    this.plot.setData(this.data(), false);
    this.scale();
  }

  shape(found) {
    return found.lines.map((line) => `${line.run}:${line.name}:${line.y.length < 40}`).join(",");
  }

  data() {
    const size = this.found.x.length;
    const columns = this.found.lines.map((line) => {
      const values = this.log ? line.y.map((value) => (value > 0 ? value : null)) : line.y;
      if (line.i === null) return values;
      const column = new Array(size); // what a line does not have is undefined, and no gap; a NaN of it is null
      line.i.forEach((place, index) => { column[place] = values[index]; });
      return column;
    });
    return [this.found.x, ...columns];
  }

  scale() {
    const { x } = this.found;
    const [min, max] = this.sheet.range || [x[0], x[x.length - 1]];
    if (x.length) this.plot.setScale("x", { min, max: max > min ? max : min + 1 });
  }

  rebuild() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
    if (!this.found || this.closed) return;
    this.shownBy = this.sheet.by;
    const many = this.found.lines.length > LEGEND;
    const about = this.found.lines.map((line) =>
      this.lines.find((each) => each.run === line.run && each.name === line.name));
    const text = css("--muted");
    const axis = (size, values) => ({
      stroke: text, size, values, font: "11px system-ui, sans-serif", gap: 4,
      grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1, size: 4 },
    });
    const series = this.found.lines.map((line, place) => ({
      label: about[place].label,
      stroke: colour(about[place].index),
      width: many ? 1 : 1.5,
      dash: about[place].dash ? [5, 3] : undefined,
      points: { show: line.y.length < 40, size: 5, fill: css("--page") },
      value: (plot, value) => (value === null || value === undefined ? "–" : number(value)),
    }));
    const unit = this.sheet.by === "hours" ? "hours" : "step";
    this.plot = new uPlot({
      width: this.canvas.clientWidth || 400,
      height: this.height,
      scales: {
        x: { time: false, auto: false },
        y: this.log ? { distr: 3 } : { range: (plot, min, max) => (min === null ? [0, 1] : uPlot.rangeNum(min, max, 0.06, true)) },
      },
      series: [{ label: unit, value: (plot, value) => (value === null || value === undefined ? "–" : short(unit === "step" ? Math.round(value) : value)) }, ...series],
      axes: [axis(26, (plot, values) => values.map(short)), axis(56, (plot, values) => values.map((value) => (value === null ? "" : short(value))))],
      legend: { show: !many },
      focus: { alpha: many ? 1 : 0.35 }, // of many lines one is lifted: drawing all others again is slow
      cursor: {
        sync: { key: this.sheet.key, setSeries: false },
        drag: { x: true, y: false, setScale: false, dist: 4 },
        focus: { prox: many ? 24 : 12 },
        points: { one: true },
        y: false,
        dataIdx: (plot, line, place) => (line === 0 ? place : nearest(plot.data[line], place)),
        bind: { dblclick: () => () => this.sheet.zoom(null) },
      },
      hooks: {
        setSelect: [(plot) => {
          const { left, width } = plot.select;
          if (width > 4) this.sheet.zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        setCursor: [(plot) => { if (many) this.say(plot); }],
        setSeries: [(plot, place) => {
          this.focused = place;
          if (many) {
            this.lift(plot);
            this.say(plot);
          }
        }],
        draw: [(plot) => { if (many) this.lift(plot); }],
        drawClear: [(plot) => this.mark(plot)],
      },
    }, this.data(), this.canvas);
    this.scale();
    const lost = this.found.lines.reduce((sum, line) => sum + line.nonfinite, 0);
    if (lost && !this.note.textContent) write(this.note, `${number(lost)} NaN or infinite`);
    if (many && !this.pointed) write(this.readout, `${this.found.lines.length} lines; point at one`);
  }

  say(plot) {
    const place = plot.cursor.idx;
    const line = this.focused;
    if (place === null || place === undefined || !line) return;
    const at = nearest(plot.data[line], place);
    const x = this.found.x[at];
    this.pointed = true;
    write(this.readout, `${plot.series[line].label}: ${number(plot.data[line][at])} at ${this.sheet.by === "hours" ? `${number(x)} h` : short(Math.round(x))}`);
  }

  /** Draw the line under the pointer once more, above the others, which fade. */
  lift(plot) {
    if (!this.above || this.above.parentNode !== plot.over) {
      this.above = el("canvas.above");
      plot.over.append(this.above);
    }
    const { left, top, width, height } = plot.bbox;
    const path = this.focused ? plot.series[this.focused]._paths : null;
    plot.ctx.canvas.style.opacity = path ? "0.3" : "";
    this.above.width = width; // which clears it
    this.above.height = height;
    if (!path) return;
    const ctx = this.above.getContext("2d");
    ctx.translate(-left, -top);
    ctx.strokeStyle = colour(this.lines.find((line) => line.label === plot.series[this.focused].label).index);
    ctx.lineWidth = 1.8 * (devicePixelRatio || 1);
    ctx.stroke(path.stroke);
  }

  mark(plot) {
    const marks = this.marks && this.marks(this.sheet.by);
    if (!marks) return;
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    const vertical = (values, stroke, dash, from) => {
      ctx.strokeStyle = stroke;
      ctx.lineWidth = ratio;
      ctx.setLineDash(dash.map((each) => each * ratio));
      ctx.beginPath();
      for (const value of values) {
        const left = Math.round(plot.valToPos(value, "x", true)) + 0.5;
        ctx.moveTo(left, bbox.top + from);
        ctx.lineTo(left, bbox.top + bbox.height);
      }
      ctx.stroke();
    };
    vertical(marks.saved || [], css("--saved"), [], bbox.height - 6 * ratio);
    vertical(marks.starts || [], css("--restart"), [4, 4], 0);
    vertical(marks.rollbacks || [], css("--bad"), [2, 3], 0);
    ctx.restore();
  }

  key(event) {
    if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const { x } = this.found;
    const plot = this.plot;
    const [min, max] = this.sheet.range || [plot.scales.x.min, plot.scales.x.max];
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      const from = this.at === null ? (move > 0 ? -1 : x.length) : this.at;
      this.at = Math.min(x.length - 1, Math.max(0, from + move * (event.shiftKey ? 20 : 1)));
      plot.setCursor({ left: plot.valToPos(x[this.at], "x"), top: this.height / 3 });
      const values = plot.series.slice(1, 1 + LEGEND).map((line, index) => {
        const column = plot.data[index + 1];
        return `${line.label} ${number(column[nearest(column, this.at)])}`;
      });
      write(this.readout, `${this.sheet.by === "hours" ? `${number(x[this.at])} h` : `step ${short(Math.round(x[this.at]))}`}: ${values.join(", ")}`);
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const middle = this.at === null ? (min + max) / 2 : x[this.at];
      const half = ((max - min) / 2) * (event.key === "-" ? 2 : 0.5);
      this.sheet.zoom([middle - half, middle + half]);
    } else if (event.key === "0" || event.key === "Escape") {
      this.sheet.zoom(null);
    } else {
      return;
    }
    event.preventDefault();
  }
}

/** Return the place at or nearest to `place` where a line has a value. */
function nearest(column, place) {
  if (column[place] !== undefined && column[place] !== null) return place;
  for (let far = 1; far < column.length; far += 1) {
    for (const at of [place - far, place + far]) {
      if (column[at] !== undefined && column[at] !== null) return at;
    }
  }
  return place;
}

/** Return the figures of charts in a grid. */
export function grid(charts) {
  return el("div.charts", {}, charts.map((chart) => chart.element));
}

/** Return the control of how x is counted. */
export function axisControl(sheet) {
  const select = el("select", { onchange: () => sheet.count(select.value) },
    el("option", { value: "step" }, "steps"), el("option", { value: "hours" }, "hours since the start"));
  const means = el("select", { onchange: () => { sheet.means = means.value === "means"; sheet.zoom(sheet.range); } },
    el("option", { value: "extremes" }, "least and greatest values"), el("option", { value: "means" }, "means"));
  const all = el("button.small", { type: "button", onclick: () => sheet.zoom(null) }, "show all");
  return el("div.controls", {}, el("label", {}, "over ", select), el("label", {}, "drawn by ", means), all,
    el("span.hint", {}, "drag to zoom, double click to show all"));
}

export { fill };
