// Which view is shown: #/ the list, #/run/ID a run, #/compare/ID,ID several.

import { follow, runs } from "./api.js";
import { fill, write, el } from "./dom.js";
import { list } from "./list.js";
import { run } from "./run.js";
import { compare } from "./compare.js";

const main = document.getElementById("main");
let leave = null;
let shown = "";

function route() {
  const [, view = "", argument = "", part = ""] = location.hash.split("/");
  const key = `${view}/${argument}`;
  if (view === "run" && key === shown && leave && leave.part) {
    leave.part(part);
    return;
  }
  shown = key;
  if (leave) leave();
  scrollTo(0, 0);
  const root = el("div");
  fill(main, root);
  if (view === "run") leave = run(root, argument, part);
  else if (view === "compare") leave = compare(root, argument.split(",").filter(Boolean));
  else leave = list(root);
}

const live = document.getElementById("live");
follow((state) => {
  write(live, { live: "live", ended: "the server has ended", connecting: "connecting" }[state]);
  live.dataset.state = state;
});

runs.listen(() => {
  write(document.getElementById("folder"), runs.folder);
  document.title = `${runs.folder.split("/").filter(Boolean).pop() || "/"} · distrain`;
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", route);
route();
