"""Runs the benchmarks one after the other and keeps their tables: `make bench` and `make bench-gpu`.

    python benchmarks/run.py [--gpu] [--quick] [--only loop export …] [--results FOLDER]

Each script has a share of the time: some 30 minutes in all on 2 cores, 8 on a GPU. One that runs past its share is
ended and said to be, and the others go on. Tables are written to benchmarks/results/NAME.md, and to NAME-gpu.md with
--gpu. What a script measures stands at its head; `python benchmarks/NAME.py --help` prints it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

ON_CPU = {
    "loop": 300,
    "start": 90,
    "input": 90,
    "evaluation": 100,
    "saving": 120,
    "consolidate": 420,
    "compile": 100,
    "traffic": 150,
    "images": 60,
    "scale": 40,
    "ui": 240,
    "plan": 300,
}
"""Seconds that each script may take on 2 cores."""

ON_GPU = {"compile": 170, "images": 100, "loop": 60, "saving": 150}
"""The same on one CUDA GPU."""


def main() -> int:
    """Run them; returns how many failed or ran past their time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="those for one CUDA GPU")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that the scripts run")
    parser.add_argument("--only", nargs="+", choices=sorted(ON_CPU), help="these scripts alone")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the tables are written")
    options = parser.parse_args()
    missed = 0
    for name, limit_s in (ON_GPU if options.gpu else ON_CPU).items():
        if options.only and name not in options.only:
            continue
        table = options.results / f"{name}{'-gpu' * options.gpu}.md"
        more = ["--gpu"] * options.gpu + ["--quick"] * options.quick
        print(f"--- {name}, at most {limit_s} s", flush=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), "--save", str(table), *more]
        script = subprocess.Popen(command, start_new_session=True)
        try:
            status = script.wait(limit_s)
            how = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGKILL)  # with the processes that it has started
            status, how = script.wait(), "ended: it ran past its time"
        missed += status != 0
        print(f"--- {name}: {how} after {time.monotonic() - began:.0f} s\n", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
