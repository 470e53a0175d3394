"""Small runs for tests: a recipe, training it in a world, and how two runs compare."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from warm import warm_children
from worlds import in_world

from distrain import Callback
from distrain.checkpoint import Reader, difference, list_checkpoints
from distrain.run.folder import RunDir

TINY = """
name: tiny
task: classification
data: {name: digits, split: [0.7, 0.15, 0.15]}
model: {name: mlp, hidden: [16]}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
schedule: {name: cosine, warmup: 3 steps}
batch: {global: 12}
train: {steps: 12, precision: fp64, ema: 0.9}
eval: {every: 4 steps, batch: 48, metrics: [accuracy]}
checkpoint: {every: 4 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
"""Twelve steps on the digits: warm-up, clipping, an average of the weights, in float64."""

TIMED = (
    "time", "seconds", "samples_per_s", "data_wait", "step_s", "data_s", "forward_backward_s", "optimizer_s",
    "agreement_s", "saving_s", "peak_memory_gib", "tokens_per_s", "mfu",
)  # fmt: skip
"""What differs between two runs that are the same."""


def write_recipe(folder: Path, text: str = TINY, name: str = "recipe.yaml") -> Path:
    """Write a recipe file and return its path."""
    path = folder / name
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def captured(action: Callable[[], int]) -> Ended:
    """Run `action` in this process with its standard streams, also those of what it starts, in files."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = action()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Ended(status, *texts)


def train_rank(
    recipe: str,
    overrides: list[str],
    run_dir: str | None,
    stop_after: int | None,
    update: bool,
    strategy: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> Ended:
    """Train as `distrain train` does in each process; rank 0 gets SIGTERM after step `stop_after`."""
    from distrain.launchers import work

    class Stop(Callback):
        def on_start(self, run: Any) -> None:
            self.rank = run.rank

        def on_step_end(self, step: int, metrics: Any) -> None:
            if step == stop_after and self.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    more = [*callbacks, *([Stop()] if stop_after is not None else [])]
    return captured(lambda: work(recipe, overrides, run_dir=run_dir, update=update, strategy=strategy, callbacks=more))


def train(
    world_size: int,
    recipe: Path,
    run_dir: Path | None,
    *overrides: str,
    stop_after: int | None = None,
    update: bool = False,
    status: int = 0,
    strategy: str = "auto",
    timeout_s: float = 120,
) -> list[Ended]:
    """Train in a world; returns how each rank ended, all of them with `status`."""
    directory = str(run_dir) if run_dir is not None else None
    asked = (str(recipe), list(overrides), directory, stop_after, update, strategy)
    ended = in_world(world_size, train_rank, *asked, timeout_s=timeout_s)
    assert [rank.status for rank in ended] == [status] * world_size, "\n".join(rank.out + rank.err for rank in ended)
    return ended


def cli_rank(arguments: list[str]) -> Ended:
    """Run the command `distrain` in this process, and what it starts without the time that imports take."""
    from distrain.cli.main import main

    def run() -> int:
        sys.argv = ["distrain", *arguments]
        try:
            main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return 0

    if arguments[0] not in ("train", "sweep", "prove", "evaluate", "predict"):  # the others start none
        return captured(run)
    with warm_children():
        return captured(run)


def cli(*arguments: object) -> Ended:
    """Run the command `distrain` in a process of its own, without the time that imports take."""
    return in_world(1, cli_rank, [str(argument) for argument in arguments], launched=False)[0]


def script_rank(path: str, arguments: list[str]) -> Ended:
    """Run a script in this process as Python does, and what it starts without the time that imports take."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).absolute().parent))

    def run() -> int:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    with warm_children():
        return captured(run)


def script(path: object, *arguments: object) -> Ended:
    """Run a Python script in a process of its own, without the time that imports take."""
    return in_world(1, script_rank, str(path), [str(argument) for argument in arguments], launched=False)[0]


def tool(name: str, *arguments: object) -> Ended:
    """Run a command that is a Python script beside the interpreter, as `torchrun`, as `script` runs one."""
    return script(Path(sys.executable).parent / name, *arguments)


# --------------------------------------------------------------------------------------------------------------------
# What a run left


def rows(run_dir: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl by step and event, without what time decides unless `timed`."""
    found = list(RunDir(run_dir).rows())
    if not timed:
        found = [{key: value for key, value in row.items() if key not in TIMED} for row in found]
    return sorted(found, key=lambda row: (row["step"], row["event"]))


def losses(run_dir: Path) -> list[float]:
    """Return the training loss of every step."""
    return [row["loss"] for row in rows(run_dir) if row["event"] == "train"]


def checkpoint(run_dir: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def state(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a checkpoint, flat, in float64."""
    kinds = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
    with Reader(path) as reader:
        return {
            name: reader.read(name, 0, spec.numel).view(kinds[spec.dtype]).astype(np.float64)
            for name, spec in reader.manifest.specs.items()
        }


def last(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return list_checkpoints(run_dir / "checkpoints")[0].path


def assert_same_run(one: Path, other: Path) -> None:
    """Both runs ended in the same state and wrote the same rows, to the bit."""
    found = difference(last(one), last(other))
    assert found.identical, "\n".join(found.lines())
    assert json.dumps(rows(one)) == json.dumps(rows(other))


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """Every tensor of the two runs' last checkpoints agrees to `tolerance`."""
    a, b = state(last(one)), state(last(other))
    assert a.keys() == b.keys()
    worst = {name: float(np.abs(a[name] - b[name]).max()) for name in a}
    assert max(worst.values()) <= tolerance, {name: gap for name, gap in worst.items() if gap > tolerance}


def typed(*arguments: object, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in fresh interpreters, with the tools of this one's folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"PATH": path} | variables,
        timeout=180,
    )
