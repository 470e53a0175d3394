"""The logs of a run: where they are, and their last lines as they grow. No torch."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from distrain.launchers import launcher_of
from distrain.launchers.slurm.tracking import task_of
from distrain.launchers.sweeps import read_sweep
from distrain.run.folder import RunDir
from distrain.system.errors import UserError


def log_file(folder: Path, rank: int | None = None) -> Path:
    """Return the log of a run: one rank's, or that of its latest job; raises UserError where there is none yet."""
    run = RunDir(folder)
    if rank is not None:
        path = run.log_path(rank)
        if not path.exists():
            there = sorted(int(file.stem.removeprefix("log-rank-")) for file in run.path.glob("log-rank-*.txt"))
            has = f"there are ranks {there[0]} to {there[-1]}" if there else "no rank has begun"
            raise UserError(f"{run.path} has no log of rank {rank}; {has}")
        return path
    task = task_of(run.path)
    found = [*(run.path / "submit").glob("slurm-*.log")]
    if task is not None:
        found += (run.path.parent / "submit").glob(f"slurm-*_{task}.log")
    elif read_sweep(run.path) is not None:
        raise UserError(f"{run.path} is a sweep; name one of its runs, which `distrain status {run.path}` lists")
    if found:
        return max(found, key=lambda path: path.stat().st_mtime)
    if run.log_path(0).exists():
        return run.log_path(0)
    if launcher_of(run.path).name != "local":
        raise UserError(f"the job of {run.path} has printed nothing yet; `distrain status {run.path}` shows its state")
    raise UserError(f"{run.path} has no log; it was not started yet")


def follow(path: Path, lines: int, ended: Callable[[], bool] | None) -> Iterator[str]:
    """Yield the last `lines` lines of a file (0: all), then what is added until `ended` returns True.

    Without `ended` what is there is all.
    """
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    with path.open("rb") as file:
        file.seek(_start_of_last(file, lines))
        looked = time.monotonic()
        while True:
            if chunk := file.read(1 << 16):
                yield decode(chunk)
                continue
            if ended is None:
                return
            if time.monotonic() - looked > 2:
                if ended() and not file.peek(1):
                    return
                looked = time.monotonic()
            time.sleep(0.2)


def _start_of_last(file: BufferedReader, lines: int) -> int:
    size = file.seek(0, 2)
    if lines == 0:
        return 0
    block, place, count = 1 << 16, size, 0
    while place > 0:
        begin = max(0, place - block)
        file.seek(begin)
        content = file.read(place - begin)
        if place == size and content.endswith(b"\n"):
            count -= 1  # the end of the last line begins none
        for index in range(len(content) - 1, -1, -1):
            if content[index] == 10:
                count += 1
                if count == lines:
                    return begin + index + 1
        place = begin
    return 0
