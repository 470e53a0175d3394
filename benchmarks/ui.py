"""`distrain ui` in headless Chromium: 100 runs of 100,000 steps, 4 of which train.

    python benchmarks/ui.py [--quick] [--save FILE] [--runs 100] [--steps 100000]

The server runs in a process of its own, another writes 20 rows a second into each of the 4 runs, and the page is
measured from within: when it was first painted and when it showed what was asked for (both from the navigation), the
bytes that came (as sent, compressed), and the time between frames while the runs train, while the pointer moves over a
chart, and while a chart is looked at closer. Nothing is read before: the first comparison includes the reading of all
files, and is painted with sketches of the curves until then. Chromium draws without a GPU here, on the same cores as
everything else. It is installed by scripts/install-chromium.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from turns import Table, options_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from browser import Browser, Page, find_chromium
from made_runs import MadeRun

LIVE = 4
DISTINCT = 5
"""So many files of numbers are made; further runs have copies of them."""

FRAMES = """
(seconds) => new Promise((done) => {
  const found = [];
  let last = performance.now();
  const until = last + 1000 * seconds;
  const frame = (now) => {
    found.push(now - last);
    last = now;
    if (now < until) requestAnimationFrame(frame);
    else done(found.slice(1));
  };
  requestAnimationFrame(frame);
})
"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
START = "import sys; sys.argv = ['distrain', *sys.argv[1:]]; from distrain.cli.main import main; main()"
WRITE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from made_runs import MadeRun
runs = []
for index, folder in enumerate(sys.argv[3:]):
    run = MadeRun(Path(folder), steps=2 * int(sys.argv[2]), seed=index)
    run.step = int(sys.argv[2])
    run.attempt()
    runs.append(run)
turn = 0
while True:
    for run in runs:
        run.train(10)
        if turn % 4 == 0:
            run.beat()
    turn += 1
    time.sleep(0.5)
"""


def make(folder: Path, runs: int, steps: int) -> list[Path]:
    """Make the runs; returns the folders of those that are to train."""
    texts = []
    live = []
    for index in range(runs):
        trains = index >= runs - LIVE
        lr = 1e-3 * (1 + index % DISTINCT)
        run = MadeRun(folder / f"run-{index:03d}", steps=2 * steps if trains else steps, seed=index, lr=lr)
        run.attempt()
        if index < DISTINCT:
            run.train()
            texts.append((run.run.metrics_path.read_bytes(), run.best))
        else:
            text, run.best = texts[index % DISTINCT]
            run.run.metrics_path.write_bytes(text)
            run.step = steps
        if trains:
            run.beat()
            live.append(run.run.path)
        else:
            run.finish()
    return live


class Measured:
    """A view of the page: when it was there, and what it took."""

    def __init__(self, page: Page):
        self.page, self.requests = page, len(page.requests)
        self.began = time.perf_counter()

    def until(self, expression: str) -> float:
        """Return the seconds until an expression holds."""
        self.page.wait_for(expression, timeout_s=600)
        return time.perf_counter() - self.began

    @property
    def nbytes(self) -> int:
        """What has come since."""
        return sum(request.get("bytes", 0) for request in self.page.requests[self.requests :])


def frames(page: Page, seconds: float, meanwhile: str = "") -> str:
    """Return the time between frames, in words: the median, the 95th percentile, the worst, and how many are slow."""
    found: list[float] = page.evaluate(f"(() => {{ {meanwhile}; return ({FRAMES})({seconds}) }})()")
    ordered = sorted(found)
    slow = sum(each > 50 for each in found) / len(found)
    late = ordered[int(0.95 * (len(found) - 1))]
    return f"{statistics.median(found):.1f} | {late:.1f} | {ordered[-1]:.0f} | {slow:.1%} |"


MOVE = """
{
  const over = document.querySelector('.u-over');
  const box = over.getBoundingClientRect();
  let turn = 0;
  const timer = setInterval(() => {
    turn += 1;
    const where = { bubbles: true, clientX: box.x + (turn * 7) % box.width, clientY: box.y + (turn * 3) % box.height };
    over.dispatchEvent(new MouseEvent('mousemove', where));
    if (turn > 600) clearInterval(timer);
  }, 16);
}
"""
ZOOM = """
{
  let turn = 0;
  const chart = document.querySelector('.chart').chart;
  const timer = setInterval(() => {
    turn += 1;
    const last = chart.found.x[chart.found.x.length - 1];
    chart.sheet.zoom(turn % 5 === 4 ? null : [last * 0.3, last * (0.4 + 0.1 * (turn % 5))]);
    if (turn > 20) clearInterval(timer);
  }, 500);
}
"""


def main() -> None:
    """Measure, print the table, and write it where `--save` says."""
    if find_chromium() is None:
        sys.exit("there is no Chromium to measure in; run: sh scripts/install-chromium.sh")
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    count, steps, seconds = (8, 2_000, 1.0) if options.quick else (options.runs, options.steps, 8.0)
    folder = Path(tempfile.mkdtemp(prefix="ui-runs-"))
    table = Table("ui", "ms")
    ours = Path(__file__).parents[1] / "tests" / "support"
    processes: list[subprocess.Popen[str]] = []
    try:
        live = make(folder, count, steps)
        server = subprocess.Popen([sys.executable, "-c", START, "ui", str(folder)], stdout=subprocess.PIPE, text=True)
        processes.append(server)
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address is not None
        command = [sys.executable, "-c", WRITE, str(ours), str(steps), *map(str, live)]
        processes.append(subprocess.Popen(command, text=True))
        with Browser(timeout_s=600) as browser:
            measure(browser, address[0], psutil.Process(server.pid), table, count, steps, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder)
    table.save(options.save)


def measure(
    browser: Browser, address: str, server: psutil.Process, table: Table, count: int, steps: int, seconds: float
) -> None:
    """Go through the views, and add what was measured."""
    page = browser.open(address, timeout_s=120)
    drawn: list[str] = []

    def row(title: str, first: float | None, whole: float, nbytes: int, *, title_of: str) -> None:
        at = "" if first is None else f"{first:.2f}"
        drawn.append(f"| {title} | {at} | {whole:.2f} | {title_of} | {nbytes / 1e6:.2f} |")

    found = Measured(page)
    found.requests = 0
    page.wait_for(f"document.querySelectorAll('tbody tr').length === {count}", timeout_s=120)
    at: dict[str, Any] = {
        "paint": page.evaluate(PAINT) / 1000,
        "rows": page.evaluate("performance.now()") / 1000,
    }
    row("list", at["paint"], at["rows"], found.nbytes, title_of=f"{count} runs")
    smooth = [f"| list | {frames(page, seconds)}"]

    name = page.evaluate("[...document.querySelectorAll('tbody a')].pop().hash.split('/')[2]")
    found = Measured(page)
    page.evaluate(f"location.hash = '#/run/{name}'")
    first = found.until("document.querySelectorAll('.chart canvas').length >= 1")
    undrawn = "[...document.querySelectorAll('.chart')].filter(each => each.chart.isSeen && !each.chart.plot)"
    whole = found.until(f"{undrawn}.length === 0")
    row("a run that trains", first, whole, found.nbytes, title_of="its charts")
    smooth.append(f"| a run that trains | {frames(page, seconds)}")
    smooth.append(f"| …, the pointer moving | {frames(page, seconds, MOVE)}")

    ids = page.evaluate("import('/static/api.js').then(found => [...found.runs.all.keys()].join(','))")
    found = Measured(page)
    page.evaluate(f"location.hash = '#/compare/{ids}'")
    chart = "document.querySelector('.chart')?.chart"
    first = found.until(f"Boolean({chart}?.plot) && {chart}.found.lines.length >= {count - LIVE}")
    whole = found.until(f"{chart}.found.lines.length === {count} && {chart}.found.pending.length === 0")
    row(
        f"{count} runs compared, their files not read yet", first, whole, found.nbytes, title_of="sketches, then curves"
    )
    page.evaluate("location.hash = '#/'")
    page.wait_for("Boolean(document.querySelector('.runs'))")
    found = Measured(page)
    page.evaluate(f"location.hash = '#/compare/{ids}'")
    first = found.until(f"Boolean({chart}?.plot)")
    whole = found.until(f"{chart}.found.lines.length === {count}")
    row("…, again", first, whole, found.nbytes, title_of=f"{count} curves")
    points = page.evaluate(f"{chart}.found.lines.reduce((sum, line) => sum + line.y.length, 0)")
    smooth.append(f"| {count} runs compared | {frames(page, seconds)}")
    smooth.append(f"| …, the pointer moving | {frames(page, seconds, MOVE)}")
    smooth.append(f"| …, looked at closer twice a second | {frames(page, seconds, ZOOM)}")

    before = server.cpu_times()
    requests = len(page.requests)
    began = time.perf_counter()
    frames(page, seconds)
    took = time.perf_counter() - began
    after = server.cpu_times()
    used = (after.user + after.system - before.user - before.system) / took
    nbytes = sum(request.get("bytes", 0) for request in page.requests[requests:])
    here = ("http://127.0.0.1:", "data:")
    outside = [request["url"] for request in page.requests if not request["url"].startswith(here)]
    table.lines += [
        "",
        f"{count} runs of {steps:,} steps, {LIVE} of which train, 20 rows a second each. {browser.version}, "
        f"{os.cpu_count()} cores without a GPU; the load of the machine was {os.getloadavg()[0]:.0f}.",
        "",
        "| | first painted, s | shown, s | of | MB |",
        "|---|---|---|---|---|",
        *drawn,
        "",
        "Time between frames, ms:",
        "",
        "| | median | 95 of 100 | worst | more than 50 ms |",
        "|---|---|---|---|---|",
        *smooth,
        "",
        f"The comparison draws {points:,} points in its first chart. While it is open the server takes {used:.0%} of a "
        f"core and sends {nbytes / took / 1e3:,.0f} kB a second; it holds {server.memory_info().rss / 2**20:,.0f} MiB.",
        "",
        f"Requests that left the machine: {len(outside)}. What the page complained of: {len(page.said)}.",
    ]


if __name__ == "__main__":
    main()
