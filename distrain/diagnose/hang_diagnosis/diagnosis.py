"""Which rank a run hangs on, from what all of them have written. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.run.heartbeat import HANG, Heartbeat
from distrain.run.stacks import Frame, Where


@dataclass(frozen=True)
class RankReport:
    """What is known of a rank when a run hangs."""

    rank: int
    beat: Heartbeat | None
    """What it last wrote; None where it has never begun."""
    silent_s: float | None = None
    """Seconds for which nothing came from it; None for a rank that answers."""
    state: str | None = None
    """The kernel's letter for its process, of a silent rank on the machine of who looks; '' where it has ended."""
    line: Frame | None = None
    """Where a silent rank was when its stack was last written without its help."""

    @property
    def where(self) -> Where | None:
        """Where it is, by its own words."""
        return Where.of(self.beat.stalled) if self.beat is not None else None

    @property
    def host(self) -> str:
        return self.beat.host if self.beat is not None else "an unknown machine"

    def evidence(self, name: str) -> Any:
        """Return something that the rank has noted beside where it is."""
        return (self.beat.stalled or {}).get(name) if self.beat is not None else None


@dataclass(frozen=True)
class Diagnosis:
    """Who hangs, and why it is that one."""

    ranks: tuple[int, ...]
    """The ranks that are the cause; none where all wait for each other."""
    reason: str
    """What sets them apart from the others."""
    waiting: tuple[int, ...] = field(default=())
    """The other ranks."""


def find_culprit(reports: Sequence[RankReport]) -> Diagnosis:
    """Return who is the cause of a hang.

    A rank that is silent, as its process is stopped, has ended, or cannot run Python. Else the one that is behind: who
    waits for it in a collective has entered more phases. Of those that are equally far the ones that do not wait for
    others; where their stacks leave it open, the one that has begun fewer collectives, or whose thread computes.
    """
    silent = [w.rank for w in reports if w.silent_s is not None]
    if silent:
        return _diagnosis(silent, "silent", reports)
    known = [w for w in reports if w.beat is not None]
    if len(known) == 1:
        return _diagnosis([known[0].rank], "alone", reports)
    place = min(w.beat.place for w in known if w.beat is not None)
    last = [w for w in known if w.beat is not None and w.beat.place == place]
    busy = [w for w in last if w.where is not None and w.where.waits is False]
    if busy:
        return _diagnosis([w.rank for w in busy], "busy", reports)
    if len(last) < len(known):
        ahead = [w for w in known if w not in last and w.where is not None and w.where.waits is False]
        surely_waiting = all(w.where is not None and w.where.waits for w in last)
        # it waits for others and is behind them, as where a rank that broadcasts has continued: look at that one
        if surely_waiting and ahead:
            return _diagnosis([w.rank for w in ahead], "busy", reports)
        unsure = [w for w in last if w.where is None or w.where.waits is None] or last
        return _diagnosis([w.rank for w in _fewest_collectives(unsure)], "behind", reports)
    unsure = [w for w in last if w.where is None or w.where.waits is None]
    for reason, some in (
        ("collectives", _fewest_collectives(last)),
        ("unsure", unsure),
        ("computes", _computing(unsure or last)),
    ):
        if 0 < len(some) < len(known):
            return _diagnosis([w.rank for w in some], reason, reports)
    return _diagnosis([], "together", reports)


_COMPUTES = 0.1
"""Of a core: who waits for a message takes nothing, who computes takes what it gets."""


def _diagnosis(ranks: Sequence[int], reason: str, reports: Sequence[RankReport]) -> Diagnosis:
    return Diagnosis(tuple(sorted(ranks)), reason, tuple(w.rank for w in reports if w.rank not in ranks))


def _fewest_collectives(reports: Sequence[RankReport]) -> list[RankReport]:
    """Return those that have begun fewer collectives than others in some group; all where none has."""
    counts = {w.rank: w.evidence("collectives") or {} for w in reports}
    behind: set[int] = set()
    for group in {name for each in counts.values() for name in each}:
        of_group = {rank: each[group] for rank, each in counts.items() if group in each}
        if len(of_group) == len(reports) and len(set(of_group.values())) > 1:
            least = min(of_group.values())
            behind |= {rank for rank, count in of_group.items() if count == least}
    return [w for w in reports if w.rank in behind] if behind else list(reports)


def _computing(reports: Sequence[RankReport]) -> list[RankReport]:
    return [w for w in reports if (w.evidence("cpu") or 0.0) > _COMPUTES]


# --------------------------------------------------------------------------------------------------------------------
# In words


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"ranks {', '.join(map(str, ranks[:8]))} and {len(ranks) - 8} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


_STATES = {
    "": "its process has ended",
    "T": "its process is stopped, by SIGSTOP or a debugger",
    "t": "its process is stopped by a debugger",
    "Z": "its process has ended",
    "X": "its process has ended",
    "D": "its process is stuck in the kernel, as where a disk, a network file system or a driver does not answer",
}


def _silence(report: RankReport) -> str:
    why = _STATES.get(report.state) if report.state is not None else None
    since = f"nothing has come from it for {seconds(report.silent_s or 0)}"
    if why is not None:
        return f"{why}; {since}"
    if report.line is not None:
        return f"no other thread gets to run Python there (the GIL is held); {since}"
    return f"its process is stopped or has ended, its machine is gone, or its thread holds the GIL; {since}"


def seconds(value: float) -> str:
    """Return a time as people say it: 3 s, 10 min, 1 h 5 min."""
    if value < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def sentence(diagnosis: Diagnosis, reports: Sequence[RankReport], folder: Path) -> str:
    """Return one sentence: what hangs, where, and for how long."""
    by_rank = {w.rank: w for w in reports}
    tail = f"; the stacks of all threads are in {folder}"
    if not diagnosis.ranks:
        first = reports[0]
        assert first.beat is not None, "a rank that is not there is silent"
        line = first.where.line if first.where is not None else None
        hosts = sorted({w.host for w in reports})
        return (
            f"all ranks ({', '.join(hosts)}) wait for each other in {first.beat.where()}"
            + (f", at {line}" if line is not None else "")
            + f", with no progress for {seconds(first.beat.idle)}, and none is behind: look at the network between "
            f"them, at GPU drivers, or for ranks that call different collectives{tail}"
        )
    said = [_of_one(by_rank[rank]) for rank in diagnosis.ranks[:3]]
    if len(diagnosis.ranks) > 3:
        said.append(f"so do {_ranks(diagnosis.ranks[3:])}")
    others = (
        f", and {_ranks(diagnosis.waiting)} wait{'s' * (len(diagnosis.waiting) == 1)} for it"
        if diagnosis.waiting
        else ""
    )
    if len(diagnosis.ranks) > 1:
        others = others.removesuffix("it") + "them" if others else ""
    return "; ".join(said) + others + tail


def _of_one(report: RankReport) -> str:
    who, beat = f"rank {report.rank} on {report.host}", report.beat
    if beat is None:
        return f"{who} has not begun: nothing has come from it since the others did"
    if report.silent_s is not None:
        line = f", at {report.line}" if report.line is not None else ""
        return f"{who} hangs in {beat.where()}{line}: {_silence(report)}"
    where = report.where
    line = f", at {where.line}" if where is not None and where.line is not None else ""
    thread = f" ({where.thread})" if where is not None and where.thread else ""
    device = ""
    if where is not None and where.device:
        device = (
            f"; it is in a call to the GPU, which has not ended what was launched last, in {beat.where()} or before "
            "(with CUDA_LAUNCH_BLOCKING=1 the line is that of the kernel)"
        )
    return f"{who} hangs in {beat.where()}{line}{thread}, with no progress for {seconds(beat.idle)}{device}"


def record(
    diagnosis: Diagnosis, reports: Sequence[RankReport], folder: Path, gpu_faults: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the content of FAILED.json for a hang. `gpu_faults`: lines of each machine."""
    by_rank = {w.rank: w for w in reports}
    message = sentence(diagnosis, reports, folder)
    # a machine with other ranks may be what a wait among all comes from
    hosts = {by_rank[rank].host for rank in diagnosis.ranks} or set(gpu_faults)
    faults = [f"{host}: {fault}" for host in sorted(hosts) for fault in gpu_faults.get(host, ())]
    if faults:
        message += ". The driver reports: " + "; ".join(faults)
    culprit = by_rank[diagnosis.ranks[0]] if diagnosis.ranks else reports[0]
    line = culprit.line or (culprit.where.line if culprit.where is not None else None)
    beat = culprit.beat
    return {
        "error": HANG,
        "message": message,
        "rank": culprit.rank if diagnosis.ranks else None,
        "ranks": list(diagnosis.ranks),
        "host": culprit.host,
        "step": beat.step if beat is not None else None,
        "phase": beat.phase if beat is not None else None,
        "file": line.file if line is not None else None,
        "line": line.line if line is not None else None,
        "function": line.function if line is not None else None,
        "reason": diagnosis.reason,
        "traceback": "\n".join(culprit.where.stack) if culprit.where is not None else None,
        "gpu_faults": faults,
        "waiting": list(diagnosis.waiting),
        "silent": [
            {"rank": w.rank, "host": w.host, "pid": w.beat.pid, "started": w.beat.started}
            for w in reports
            if w.silent_s is not None and w.beat is not None
        ],
        "time": max((w.beat.time for w in reports if w.beat is not None), default=None),
        "restart": True,
    }
