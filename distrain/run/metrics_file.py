"""metrics.jsonl as it is written: each row once, however often the run is killed and resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distrain.run.json_files import BLOCK, end_of_rows, fsync, lines_backwards, metrics_row, parse_row, row_line
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError

EVALUATION_KEYS = frozenset(
    (
        "event",
        "step",
        "split",
        "loss",
        "samples",
        "seconds",
        "time",
        "corrupt_samples",
        "undecodable",  # as it was called
        "nonfinite",
        "checkpoint",
        "media",
        "processes",
        "changed_data",
    )
)
"""What an evaluation's row in metrics.jsonl and its summary hold besides metrics, which must have other names."""


class MetricsFile:
    """Appends rows to metrics.jsonl, each `(event, step)` once however often a run is killed and resumed.

    Rows are in the order of their steps, so what a resume has to look at is at the end: it reads backwards until all
    rows are of steps before the one that it resumes from, however many there are.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int | None = None,
        finals: Sequence[int] = (),
        counted: object = None,
        fence: Callable[[], None] = lambda: None,
    ):
        """`resume_step`: rows of later steps are taken out, as these are trained again, maybe by a changed recipe.

        `finals`: steps of which a `final` row is known to be there; such a row may be of any step. `counted`: the
        `rows` of what `settled` returned when the state of `resume_step` was saved. `fence` is called before anything
        is written, and raises when this process may write no more.
        """
        self._path, self._fence = path, fence
        self.step = self._floor = 0 if resume_step is None else resume_step
        self._seen = {("final", step) for step in finals}
        self._count: int | None = None
        self.recent: list[dict[str, Any]] = []
        """The last rows: all of `resume_step` and later ones, and some of before."""
        self._take_over()
        self._cut(resume_step)
        self._latest = max((row["step"] for row in self.recent), default=0)
        self._file = path.open("ab")
        self._counted = self._still_there(counted)

    def _still_there(self, counted: object) -> tuple[int, int] | None:
        """Return (rows, their bytes) of those that were there when the state was saved, or None."""
        size = self._path.stat().st_size
        if not size:
            return 0, 0
        if not isinstance(counted, dict):
            return None
        count, end = counted.get("count"), counted.get("bytes")
        if type(count) is not int or type(end) is not int or not 0 < count <= end <= size:
            return None
        with self._path.open("rb") as file:
            return (count, end) if os.pread(file.fileno(), 1, end - 1) == b"\n" else None

    @property
    def kept(self) -> int:
        """How many rows are the same, and in the same order, as when the state was saved; 0 where that is unknown."""
        return self._counted[0] if self._counted is not None else 0

    @property
    def count(self) -> int:
        """The number of rows; counting them reads the file once, of counted rows only what follows."""
        if self._count is None:
            self._count, end = self._counted or (0, 0)
            with self._path.open("rb") as file:
                file.seek(end)
                self._count += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return self._count

    def last(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield the last `number` rows, the oldest first; reads no others."""
        if number <= 0:
            return
        offsets = (offset for offset, _ in islice(lines_backwards(self._path), number))
        with self._path.open("rb") as file:
            file.seek(0 if number >= self.count else min(offsets))
            while (line := file.readline(bounded.ROW + 1)).endswith(b"\n"):
                yield metrics_row(parse_row(line, f"{self._path} before byte {file.tell()}"), self._path)

    @property
    def finals(self) -> list[int]:
        """Steps of `final` rows, as far as they are known."""
        return sorted(step for event, step in self._seen if event == "final")

    def _cut(self, resume_step: int | None) -> None:
        """Take out what a crash left of a last line and rows of later steps, and note which rows are there."""
        kept: list[tuple[int, bytes]] = []
        first: int | None = None
        older = 0
        end = end_of_rows(self._path)
        for offset, line in lines_backwards(self._path):
            row = metrics_row(parse_row(line, f"{self._path} at byte {offset}"), self._path)
            if resume_step is not None and row["step"] > resume_step:
                first, older = offset, 0
                continue
            if row["step"] >= self._floor or row["event"] == "final":
                self._seen.add((row["event"], row["step"]))
            older = 0 if row["step"] >= self._floor else older + len(line)
            self.recent.append(row)
            kept.append((offset, line))
            # a row may come a little later than others of its step
            if older > BLOCK:
                break
        self.recent.reverse()
        if not self._path.exists():
            return
        self._fence()
        if first is None:
            os.truncate(self._path, end)
            return
        behind = b"".join(line for offset, line in reversed(kept) if offset > first)
        if behind:  # between the two steps a crash must lose neither
            self._beside.write_bytes(b"%d\n" % first + behind)
            fsync(self._beside)
            self._beside.replace(self._moved)
            self._take_over()
        else:
            os.truncate(self._path, first)

    @property
    def _beside(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tail.new")

    @property
    def _moved(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tail")

    def _take_over(self) -> None:
        """Put rows that are to follow others in their place; again where a crash came between."""
        if not self._moved.exists():
            return
        self._fence()
        where, _, rows = self._moved.read_bytes().partition(b"\n")
        with self._path.open("r+b") as file:
            file.truncate(int(where))
            file.seek(0, os.SEEK_END)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self._moved.unlink()

    def append(self, row: dict[str, Any]) -> bool:
        """Write one row, durable against a crash of the process; returns False when it is already there."""
        event, step = key = (row["event"], row["step"])
        if event not in _EACH_TIME and (key in self._seen or (step < self._floor and event in _IN_ORDER)):
            return False
        line = row_line(row)
        if len(line) > bounded.ROW:
            raise UserError(
                f"the row {event!r} of step {step} has {len(line):,} bytes, and a line may have {bounded.ROW:,}; take "
                "the metric that returns so much out of eval.metrics"
            )
        count = self.count if self._count is not None else None
        self._fence()
        self._file.write(line)
        self._file.flush()
        self._seen.add(key)
        self._latest = max(self._latest, step)
        if count is not None:
            self._count = count + 1
        return True

    def settled(self, step: int) -> dict[str, Any]:
        """Note that the run saves its state after `step`, and return what an attempt that resumes there must know.

        Rows of earlier steps are forgotten.
        """
        self._floor = step
        self._seen = {key for key in self._seen if key[1] >= step or key[0] == "final"}
        found: dict[str, Any] = {
            "finals": self.finals,
            "events": sorted(event for event, at in self._seen if at == step),
        }
        # of a run that has gone back, rows of later steps lie before what follows
        if self._latest <= step and not (self._count is None and self._counted is None):
            found["rows"] = {"count": self.count, "bytes": os.fstat(self._file.fileno()).st_size}
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_EACH_TIME = ("update",)
"""Events of an attempt; several attempts may resume from one step."""
_IN_ORDER = ("train", "eval", "checkpoint", "anomaly", "corrupt_samples", "undecodable")
"""Events that a run writes once for a step, and again only where it has gone back."""
