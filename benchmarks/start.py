"""How long a command takes to start: `--help`, and a training of a few seconds in one and two processes.

    python benchmarks/start.py [--rounds 5] [--quick] [--save FILE]

What cannot be avoided stands beside it: importing typer for `--help`, importing PyTorch and Accelerate for a training.
Besides these, torch itself imports its compiler (`torch._dynamo`) with the first optimizer and with DDP.
recipes/iris.yaml is trained from its start to its last checkpoint and export, in a run folder of its own. Everything is
a fresh process whose files the machine has read before. Wall seconds count what a person waits; CPU seconds, of all
processes together, hold on a machine that others use. The first line on the screen is timed by reading standard error
of a terminal.
"""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from turns import Table, in_turns, options_of

RECIPE = Path(__file__).parent.parent / "recipes" / "iris.yaml"
LIMITS = {
    "import typer": "import typer",
    "import torch, accelerate": "import torch, accelerate",
    "and torch._dynamo": "import torch, accelerate, torch._dynamo",
}


def timed(arguments: list[str]) -> tuple[float, float]:
    """Run Python in a fresh process; returns the wall and CPU seconds, those of its own processes with it."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"python {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def trained(processes: int) -> tuple[float, float]:
    """Train the recipe; returns the wall and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = ["--run-dir", str(Path(folder) / "run"), "--processes", str(processes)]
        return timed(["-m", "distrain", "train", str(RECIPE), *run_dir])


def first_line() -> float:
    """Start a training on a terminal; returns the seconds until there is something on it."""
    with tempfile.TemporaryDirectory() as folder:
        terminal, end = pty.openpty()
        command = [sys.executable, "-m", "distrain", "train", str(RECIPE), "--run-dir", str(Path(folder) / "run")]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=end, stderr=end)
        os.close(end)
        try:
            os.read(terminal, 1)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def main() -> None:
    """Measure and print the tables."""
    a = options_of(__doc__).parse_args()
    rounds = 1 if a.quick else a.rounds
    subjects: dict[str, Callable[[], tuple[float, float]]] = {
        name: (lambda code=code: timed(["-c", code])) for name, code in LIMITS.items()
    }
    subjects["distrain --help"] = lambda: timed(["-m", "distrain", "--help"])
    subjects["distrain train iris, 1 process"] = lambda: trained(1)
    subjects["distrain train iris, 2 processes"] = lambda: trained(2)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}

    def wall(name: str) -> Callable[[], float]:
        def measure() -> float:
            pairs[name].append(subjects[name]())
            return pairs[name][-1][0]

        return measure

    found = in_turns({name: wall(name) for name in subjects} | {"the first line on the screen": first_line}, rounds)
    table = Table("Starting a command", "s", digits=2)
    table.add(found, base="import torch, accelerate", title="Wall seconds")
    cpu = {name: [each[1] for each in values] for name, values in pairs.items()}
    table.add(cpu, base="import torch, accelerate", title="CPU seconds of all processes")
    table.note(
        "Goals on a quiet machine: `--help` ≤ 0.35 s; the first line ≤ 0.5 s; a training ≤ the import + 2 s, and in 2 "
        "processes ≤ 1 s more."
    )
    table.save(a.save)


if __name__ == "__main__":
    main()
