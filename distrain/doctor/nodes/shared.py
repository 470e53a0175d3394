"""What a folder that nodes share does: files seen by others, renamed, grown, made by one alone, and locked."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from distrain.doctor.nodes.meeting import Meeting

SEEN_S = 10.0
"""How long a change may take to be seen by another node. A run waits as long before it gives up."""
_NAMES = 8
"""Files that all nodes try to make."""


def examine_folder(team: Meeting, folder: Path, seen_s: float = SEEN_S) -> dict[str, Any]:
    """Return how the folder behaves for this node; one rank of each node calls.

    `problem` says why this node cannot write there, else None. For each other rank of the team that has no problem,
    `seen`, `renamed` and `grown` hold the seconds after which its change was seen here, None: not within `seen_s`.
    `made` are the numbers of the files that this node has made and that should not have been there, `locked` whether
    this node could take a lock that another held.
    """
    token = team.share("token", secrets.token_hex(4))[team.members[0]]
    base = folder / f".distrain-doctor-{token}"
    own, moved = base / f"written-{team.rank}", base / f"moved-{team.rank}"
    found: dict[str, Any] = {"problem": None, "seen": {}, "renamed": {}, "grown": {}, "made": [], "locked": None}
    try:
        found["problem"] = _attempt(lambda: _write(base, own, f"{token} {team.rank}"))
        problems = team.share("written", found["problem"])
        others = [rank for rank in team.members if rank != team.rank and problems[rank] is None]
        found["seen"] = _wait(others, lambda rank: _content(base / f"written-{rank}") == f"{token} {rank}", seen_s)
        seen = [rank for rank, seconds in found["seen"].items() if seconds is not None]

        team.share("seen")
        if found["problem"] is None:
            found["problem"] = _attempt(lambda: own.rename(moved))
        team.share("renamed")
        found["renamed"] = _wait(
            seen, lambda rank: (base / f"moved-{rank}").exists() and not (base / f"written-{rank}").exists(), seen_s
        )

        team.share("looked")
        if found["problem"] is None:
            found["problem"] = _attempt(lambda: _grow(moved))
        sizes = team.share("grown", _size(moved))
        found["grown"] = _wait(seen, lambda rank: _size(base / f"moved-{rank}") == sizes[rank], seen_s)

        team.share("measured")
        if found["problem"] is None:
            found["made"] = [number for number in range(_NAMES) if _make(base / f"made-{number}")]
        team.share("made")

        lock, first = base / "lock", team.rank == team.members[0]
        if found["problem"] is None:
            with lock.open("a+b") as file:
                if first:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                team.share("locked")
                if not first:
                    found["locked"] = _attempt(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None
                team.share("tried")
        else:
            team.share("locked")
            team.share("tried")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return found


def _attempt(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _write(base: Path, file: Path, text: str) -> None:
    base.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _grow(file: Path) -> None:
    with file.open("ab") as out:
        out.write(bytes(1 << 16))
        out.flush()
        os.fsync(out.fileno())


def _make(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:
        return False
    return True


def _content(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _wait(ranks: Collection[int], there: Callable[[int], bool], limit_s: float) -> dict[int, float | None]:
    """Return after how many seconds `there` was true of each rank, None where it was not within the limit."""
    began, left = time.monotonic(), list(ranks)
    found: dict[int, float | None] = dict.fromkeys(ranks)
    while left:
        for rank in [rank for rank in left if there(rank)]:
            found[rank] = time.monotonic() - began
            left.remove(rank)
        if time.monotonic() - began > limit_s:
            break
        if left:
            time.sleep(0.02)
    return found
