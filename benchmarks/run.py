"""Runs the benchmarks one after the other and keeps their tables: `make bench` and `make bench-gpu`.

    python benchmarks/run.py [--all] [--gpu] [--quick] [--only loop consolidate …] [--results FOLDER]

Each script has a share of the time: some 20 minutes in all on 2 cores, twice that with --all, 8 on a GPU. One that runs
past its share is ended and said to be, and the others go on. Tables are written to benchmarks/results/NAME.md, and to
NAME-gpu.md with --gpu; those of --quick, which mean nothing, only where --results says. What a script measures stands
at its head; `python benchmarks/NAME.py --help` prints it.
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
    "loop": 540,
    "start": 150,
    "input": 120,
    "evaluation": 90,
    "saving": 180,
    "consolidate": 400,
    "compile": 120,
    "images": 60,
}
"""Seconds that each script may take on 2 cores; a quiet machine needs two thirds of them."""

FURTHER = {"weak_scaling": 240, "scale": 120, "traffic": 400, "ui": 300, "plan": 400}
"""The same of those that only --all runs, or --only by name."""

ON_GPU = {"compile": 170, "images": 100, "loop": 60, "saving": 150}
"""The same on one CUDA GPU."""


def main() -> int:
    """Run them; returns how many failed or ran past their time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="those for one CUDA GPU")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that the scripts run")
    parser.add_argument("--all", action="store_true", help="also what is simulated, counted, predicted and drawn")
    parser.add_argument("--only", nargs="+", choices=sorted(ON_CPU | FURTHER), help="these scripts alone")
    parser.add_argument("--results", type=Path, help="where the tables are written")
    options = parser.parse_args()
    results = options.results or (None if options.quick else HERE / "results")
    missed = 0
    scripts = ON_GPU if options.gpu else ON_CPU | (FURTHER if options.all or options.only else {})
    for name, limit_s in scripts.items():
        if options.only and name not in options.only:
            continue
        more = ["--gpu"] * options.gpu + ["--quick"] * options.quick
        if results is not None:
            more += ["--save", str(results / f"{name}{'-gpu' * options.gpu}.md")]
        print(f"--- {name}, at most {limit_s} s", flush=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), *more]
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
