"""What all benchmarks share: subjects that take turns, ratios within a round, and the table that is kept.

A machine is never quiet, so no figure here stands alone: all subjects of a table are measured one after the other in
each round, the order turning by one from round to round, and a ratio is that of two subjects within one round. What is
printed is the median over the rounds, with the least and the most beside it.

    table = Table("loop", "Time of a step, µs", lower_is_better=True)
    table.measure({"raw": lambda: ..., "distrain": lambda: ...}, base="raw", rounds=5, goals={"distrain": 1.2})
    table.save(options.save)

A subject that needs a fresh process, or several that find each other, is run by `in_processes`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "lightning", "timm", "torchmetrics")


def options_of(description: str | None, *, rounds: int = ROUNDS) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has: --rounds, --quick, --save, --gpu."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each subject takes its turn")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that the script runs")
    parser.add_argument(
        "--gpu", action="store_true", help="on a CUDA GPU, with the sizes for one; otherwise on the CPU"
    )
    parser.add_argument("--save", type=Path, help="also write the tables here (Markdown)")
    return parser


def hardware() -> str:
    """Return one line: date, the card or the cores, and the versions of what is installed."""
    cores = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    try:
        import torch

        card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except ImportError:
        card = None
    found = [f"{name} {version}" for name in PACKAGES if (version := _version(name)) is not None]
    return ", ".join([time.strftime("%Y-%m-%d"), card or cores, f"Python {platform.python_version()}", *found])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_turns(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each subject measured in each round; each round begins with another subject."""
    names, found = list(subjects), {name: [] for name in subjects}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(subjects[name]())
    return found


def in_processes(
    script: str | Path,
    arguments: Sequence[str],
    *,
    world_size: int = 1,
    gpu: bool = False,
    timeout_s: float = 900,
    **variables: str,
) -> list[dict[str, Any]]:
    """Run `python script arguments…` in fresh processes that find each other; returns the last line of each, as JSON.

    Each process has one thread, and sees no GPU unless `gpu`. Raises SystemExit with its last lines where one fails.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    workers = []
    for rank in range(world_size):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | variables
        if not gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if world_size > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, str(script), *arguments]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [worker.communicate(timeout=timeout_s) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        if worker.returncode != 0:
            raise SystemExit(f"{Path(script).name} {' '.join(arguments)} failed:\n{errors[-3000:]}")
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]


@dataclass
class Table:
    """A table of subjects beside a base that is a peer or a limit, with the goal that a ratio has to reach."""

    name: str
    what: str
    """What is measured, with its unit."""
    lower_is_better: bool = True
    digits: int = 0
    lines: list[str] = field(default_factory=list)

    def measure(
        self,
        subjects: Mapping[str, Callable[[], float]],
        *,
        base: str,
        rounds: int,
        title: str = "",
        goals: Mapping[str, float] | None = None,
    ) -> dict[str, list[float]]:
        """Let the subjects take turns and add their rows; returns what each measured in each round."""
        found = in_turns(subjects, rounds)
        self.add(found, base=base, title=title, goals=goals)
        return found

    def add(
        self,
        found: Mapping[str, Sequence[float]],
        *,
        base: str,
        title: str = "",
        goals: Mapping[str, float] | None = None,
    ) -> None:
        """Add the rows of what was measured: as many values for each subject as there were rounds."""
        rounds = len(found[base])
        self.lines += ["", f"### {title}" if title else "", ""] if self.lines or title else []
        self.lines += [
            f"{self.what}: median (least to most) of {rounds} rounds; × {base} within a round.",
            "",
            f"| | {self.what} | × {base} | goal |",
            "|---|---|---|---|",
        ]
        for name, values in found.items():
            ratio = statistics.median(one / other for one, other in zip(values, found[base], strict=True))
            goal = (goals or {}).get(name)
            self.lines.append(
                f"| {name} | {self._number(statistics.median(values))} ({self._number(min(values))} to "
                f"{self._number(max(values))}) | {ratio:.2f} | {self._goal(goal, ratio)} |"
            )

    def note(self, line: str) -> None:
        """Add a line below the table."""
        self.lines += ["", line]

    def save(self, path: Path | None) -> None:
        """Print the tables, and write them where a path is given."""
        text = "\n".join([f"# {self.name}", "", hardware() + ".", *self.lines]) + "\n"
        print(text)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def _number(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"

    def _goal(self, goal: float | None, ratio: float) -> str:
        if goal is None:
            return ""
        held = ratio <= goal if self.lower_is_better else ratio >= goal
        return f"{'≤' if self.lower_is_better else '≥'} {goal:g}: {'holds' if held else '**does not hold**'}"
