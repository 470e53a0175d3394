"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  if (button) {
    const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    const label = () => { button.textContent = dark() ? "light" : "dark"; };
    button.hidden = false;
    button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
    label();
  }
  // what is folded is printed
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => { folded.forEach((each) => { each.open = false; }); });

  const shown = (value) => {
    if (value === null) return "NaN or infinite";
    const size = Math.abs(value);
    return size >= 1e3 && size < 1e15 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const plot = figure.querySelector(".plot");
    let chart = null, tip = null, cross = null;
    const leave = () => { if (tip) { tip.remove(); cross.remove(); tip = cross = null; } };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      chart = chart || JSON.parse(figure.querySelector("script").textContent);
      if (chart.over !== "step") return;
      const box = plot.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const at = chart.x[0] + share * (chart.x[1] - chart.x[0]);
      if (!tip) {
        tip = plot.appendChild(document.createElement("div"));
        tip.className = "tip";
        cross = plot.appendChild(document.createElement("div"));
        cross.className = "cross";
      }
      const lines = chart.curves.filter(([, steps]) => steps.length).map(([name, steps, values]) => {
        const place = nearest(steps, at);
        return `${chart.curves.length > 1 ? name + "  " : ""}${shown(values[place])}  at step ${steps[place].toLocaleString("en")}`;
      });
      tip.textContent = lines.join("\n");
      cross.style.left = `${100 * share}%`;
      tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
      tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 10px)`;
    });
  }
})();
