// What the server knows: answers as JSON, and the runs as they change.

/** Return an answer; throws an Error with what the server says. */
export async function ask(path, query = {}, signal = undefined) {
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined) search.append(key, each);
    }
  }
  const response = await fetch(`/api/${path}?${search}`, { signal, credentials: "same-origin" });
  const text = await response.text();
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error(text.slice(0, 300) || `the server answers ${response.status}`);
  }
  if (!response.ok) throw new Error(found.error || `the server answers ${response.status}`);
  return found;
}

/** The runs by id, in their order, kept up to date. `listen` is called with what changed. */
export const runs = {
  all: new Map(),
  problem: null,
  folder: "",
  known: false,
  listeners: new Set(),
  listen(action) {
    this.listeners.add(action);
    return () => this.listeners.delete(action);
  },
};

function take(change) {
  const found = new Map(change.runs.map((run) => [run.id, run]));
  const all = new Map();
  for (const name of change.names) {
    const run = found.get(name) || runs.all.get(name);
    if (run) all.set(name, run);
  }
  const gone = [...runs.all.keys()].filter((name) => !all.has(name));
  const begun = [...all.keys()].some((name) => !runs.all.has(name));
  runs.all = all;
  runs.problem = change.problem;
  runs.folder = change.folder;
  runs.known = true;
  for (const listener of [...runs.listeners]) {
    listener({ changed: new Set(found.keys()), grown: new Set(change.grown || []), gone, begun });
  }
}

/** Follow the runs for as long as the page is open; `state` is told "live" or why not. */
export function follow(state) {
  let source = null;
  const close = () => {
    if (source) source.close();
    source = null;
  };
  const open = () => {
    close();
    source = new EventSource("/events");
    let first = true;
    source.onopen = () => state("live");
    source.onmessage = (event) => {
      state("live");
      const change = JSON.parse(event.data);
      if (first) change.grown = change.names; // whatever was missed
      first = false;
      take(change);
    };
    source.onerror = () => {
      first = true;
      state(source.readyState === EventSource.CLOSED ? "ended" : "connecting");
    };
  };
  // a browser has six connections to a server: pages that nobody looks at hold none
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  open();
}
