"""Writes checkpoints: complete or absent."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from distrain.checkpoints.arena import Arena
from distrain.checkpoints.dtypes import DTYPES
from distrain.checkpoints.files import hash_file, open_descriptor
from distrain.checkpoints.format import (
    LISTED_RUN,
    MANIFEST,
    MAX_MANIFEST,
    RUNS_VERSION,
    VERSION,
    CheckpointError,
    Communicator,
    Criterion,
    Evaluation,
    FileInfo,
    Frozen,
    Piece,
    Run,
    Saved,
    Tensor,
    TensorSpec,
    add_piece,
    check_json,
    check_tiling,
    error_reason,
    fingerprint,
    manifest_text,
    parse_manifest,
    rank_file_name,
)
from distrain.checkpoints.headers import read_header
from distrain.checkpoints.hiding import HOST, hidden, is_leftover
from distrain.checkpoints.layout import find_not_finite, lay_out, write_file
from distrain.checkpoints.reading import best_first, list_checkpoints
from distrain.run.heartbeat import enter_phase, progress
from distrain.run.json_files import fsync
from distrain.system.collector import no_collection
from distrain.system.errors import UserError, some


class NotFiniteError(UserError):
    """The weights of a step are not saved, as they are not finite; the message names some."""


@dataclass
class _Flight:
    """A save between `begin` and `finish`."""

    step: int
    folder: Path
    described: dict[str, Any]
    """The manifest besides files and pieces."""
    specs: dict[str, TensorSpec]
    began: float
    score: float | None = None
    """By `Saver.criterion`."""
    background: bool = True
    """Whether threads write and publish it."""
    thread: threading.Thread | None = None
    """Writes this rank's file; on rank 0 another one publishes, once every rank has written."""
    file: FileInfo | None = None
    header: str | None = None
    """The hash of the header of this rank's file; None: unknown."""
    not_finite: str | None = None
    """A weight of this rank's file that is not finite; the file is not written then."""
    error: Exception | None = None
    exchanged: bool = False
    """Whether the ranks know that every one of them has written."""
    saved: Saved | None = None
    """On rank 0, once it is published."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def busy(self) -> bool:
        """Whether its thread is at work."""
        return self.thread is not None and self.thread.is_alive()

    def run(self, work: Callable[[], None]) -> None:
        """Do some work, which keeps its errors to itself, in the background if that is wanted."""
        if self.background:
            self.thread = threading.Thread(target=work, name=f"checkpoint-{self.step}")
            self.thread.start()
        else:
            work()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()


@dataclass(frozen=True)
class _Placed:
    """Where the pieces of a checkpoint lie."""

    headers: list[str | None]
    """The hash of each rank's header."""
    specs: dict[str, TensorSpec]
    tensors: dict[str, Tensor]


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if the system cannot (Linux on most local file systems can)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


class Saver:
    """Saves the state of a run into `folder`, one checkpoint at a time, and retires old ones.

    The newest `keep` up to the step just saved stay, and the `keep_best` with the highest scores besides. `fence`,
    called by rank 0 just before the publishing rename, from any thread, raises when this run must not publish any more.
    All ranks make
    the same calls in the same order, from the thread that may use `comm`; `dry_run`, `begin`, `exchange` and `finish`
    raise the same CheckpointError or NotFiniteError on every rank, and whatever fails, the checkpoints that were there
    stay as they were.
    """

    def __init__(
        self,
        folder: Path | str,
        comm: Communicator,
        *,
        keep: int = 3,
        keep_best: int = 1,
        asynchronous: bool = True,
        fence: Callable[[], None] | None = None,
        arena: Arena | None = None,
    ):
        self.folder = Path(folder)
        self.comm = comm
        self.keep = keep
        self.keep_best = keep_best
        self.asynchronous = asynchronous
        self.fence = fence
        self.arena = arena or Arena()
        """What asynchronous saves are copied into."""
        self._flight: _Flight | None = None
        self._placed: _Placed | None = None
        self.criterion: Criterion | None = None
        """What ranks checkpoints for `keep_best`; None: their stored scores."""
        self.scores: dict[str, float | None] = {}
        """Known scores by that criterion, by folder name."""

    @property
    def in_flight(self) -> int | None:
        """The step of the unfinished save."""
        return self._flight.step if self._flight else None

    @property
    def written(self) -> bool:
        """Whether this rank has written everything, so that `exchange` waits for other ranks only. Costs nothing."""
        return self._flight is None or self._flight.exchanged or not self._flight.busy

    @property
    def exchanged(self) -> bool:
        """Whether the ranks know that each has written everything."""
        return self._flight is None or self._flight.exchanged

    @property
    def published(self) -> bool:
        """Whether the ranks know that, and rank 0 has published: `finish` waits for no disk. Costs nothing."""
        return self._flight is None or (self._flight.exchanged and not self._flight.busy)

    def dry_run(self) -> None:
        """Check before training that every rank can write into the folder and rank 0 sees what they write."""
        assert self._flight is None
        folder = self._stage("step-00000000")
        error: Exception | None = None
        try:
            write_file(folder / rank_file_name(self.comm.rank, self.comm.world_size), [bytes(8)], threading.Event())
        except OSError as caught:
            error = caught
        *_, errors = self._gather(None, None, None, error)
        if self.comm.rank == 0:
            seen = len(list(folder.glob("rank-*")))
            if not errors and seen != self.comm.world_size:
                errors.append(f"rank 0 sees {seen} of the {self.comm.world_size} files that the ranks wrote")
            shutil.rmtree(folder, ignore_errors=True)
        if errors := self.comm.broadcast(errors):
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}:\n" + "\n".join(errors)) from error

    def save(self, step: int, specs: dict[str, TensorSpec], pieces: Iterable[Piece], **described: Any) -> Saved:
        """`begin` and `finish` at once."""
        self.begin(step, specs, pieces, **described)
        saved = self.finish()
        assert saved is not None
        return saved

    def begin(
        self,
        step: int,
        specs: dict[str, TensorSpec],
        pieces: Iterable[Piece],
        *,
        scalars: dict[str, Any],
        aliases: dict[str, str],
        recipe: str,
        strategy: str,
        score: float | None = None,
        evaluation: Evaluation | None = None,
        history: dict[str, Any] | None = None,
        frozen: Frozen | None = None,
        finite: Collection[str] = (),
        background: bool | None = None,
    ) -> Saved | None:
        """Finish the previous save and return it (None: there was none), then start this one.

        `specs` lists all full tensors, the same on every rank; `pieces` are this rank's, and over all ranks they hold
        each element once. They are iterated after the previous save is finished, so a generator may reuse its buffers,
        and held until `begin` returns. A save in the `background` (None: as `asynchronous` says) is then written by a
        thread, from a copy of its own and from pieces that are `copied`; others are written here. A fault of one rank
        (a full disk, an error in `pieces`) is raised by `exchange` or `finish` on all ranks. `score`: higher is better,
        NaN counts as none; `evaluation` replaces it and names its metric. `history`: rank 0's JSON values.
        `frozen`: tensors of the model besides, which are not stored. Unless all elements of the tensors named in
        `finite` are so, `exchange` or `finish` raises NotFiniteError: where the copy is, what looks delays nobody.
        """
        before = self.finish()
        folder = self._stage(f"step-{step:08d}")
        described: dict[str, Any] = {
            "step": step, "strategy": strategy, "recipe": recipe, "scalars": scalars, "aliases": aliases,
            "score": float(score) if score is not None and math.isfinite(score) else None,
        }  # fmt: skip
        if evaluation is not None:
            described |= {"score": evaluation.score(evaluation.criterion), "evaluation": evaluation.to_json()}
        if history is not None:
            described["history"] = history
        if frozen is not None:
            described["frozen"] = frozen.to_json()
        counts = evaluation.score(self.criterion) if evaluation and self.criterion else described["score"]
        flight = self._flight = _Flight(step, folder, described, specs, time.monotonic(), counts)
        flight.background = self.asynchronous if background is None else background
        try:
            with no_collection():
                check_json(scalars, "scalars")
                check_json(history, "history")
                layout = lay_out(specs, pieces)
                stay = layout.copied if flight.background else [True] * len(layout.copied)
                views, wait = self.arena.hold(layout.sources, stay, keep=flight.background)
        except Exception as error:  # one rank's fault must reach the others, which wait in finish
            flight.error = error
            return before
        parts: list[memoryview | bytes] = [layout.header, *views]
        flight.header = xxhash.xxh3_128_hexdigest(layout.header)
        judged = [place for place in layout.places if place.name in finite]
        del layout

        def write() -> None:
            try:
                wait()
                flight.not_finite = find_not_finite(judged, views)
                if flight.not_finite is not None:
                    return
                path = folder / rank_file_name(self.comm.rank, self.comm.world_size)
                flight.file = write_file(path, parts, flight.cancelled)
            except Exception as error:  # carried to where every rank learns of it
                flight.error = error

        flight.run(write)
        return before

    def save_written(
        self, step: int, specs: dict[str, TensorSpec], write: Callable[[Path], None], **described: Any
    ) -> Saved:
        """Publish a checkpoint whose only file `write(path)` writes, in a world of one.

        The file holds each tensor of `specs` that has elements as one piece, wide elements first.
        """
        assert self._flight is None
        assert self.comm.world_size == 1
        folder = self._stage(f"step-{step:08d}")
        try:
            check_json(described["scalars"], "scalars")
            path = folder / rank_file_name(0, 1)
            write(path)
            with open(path, "rb") as file:
                info = FileInfo(path.name, os.fstat(file.fileno()).st_size, hash_file(file.fileno()))
                os.fsync(file.fileno())
            flight = _Flight(step, folder, {"step": step, "score": None} | described, specs, time.monotonic())
            flight.background = False
            return self._publish(flight, [info], [None])
        except OSError as error:
            raise CheckpointError(f"step {step} was not saved to {self.folder}: {error_reason(error)}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # nothing is left of it once it is published

    def _stage(self, step_name: str) -> Path:
        """Return the hidden folder that a save is written into; rank 0 makes it."""
        made: tuple[str, str | None] = ("", None)
        if self.comm.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                made = (hidden("tmp", step_name), None)
                (self.folder / made[0]).mkdir()
            except OSError as error:
                made = ("", f"rank 0 on {HOST} cannot write there: {error_reason(error)}")
        name, problem = self.comm.broadcast(made)
        if problem:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {problem}")
        return self.folder / name

    def _gather(
        self, file: FileInfo | None, header: str | None, not_finite: str | None, error: Exception | None
    ) -> tuple[list[FileInfo | None], list[str | None], list[str], list[str]]:
        """Return every rank's file, the hash of its header, weights that are not finite, and the faults as text."""
        reason = error and f"rank {self.comm.rank} on {HOST}: {error_reason(error)}"
        if isinstance(error, FileNotFoundError):
            reason = f"{reason}; all ranks must see the same run folder, on a file system that the nodes share"
        files, headers, names, reasons = zip(*self.comm.gather((file, header, not_finite, reason)), strict=True)
        return list(files), list(headers), [name for name in names if name], [reason for reason in reasons if reason]

    def exchange(self) -> None:
        """Wait until every rank has written, and have rank 0 publish, in the background as the save is.

        Does nothing where that was done before. Call it once every rank has `written`, and `finish` once each has
        `published`: neither then waits for a disk.
        """
        flight = self._flight
        if flight is None or flight.exchanged:
            return
        enter_phase("save")
        flight.join()
        files, headers, not_finite, problems = self._gather(flight.file, flight.header, flight.not_finite, flight.error)
        if problems or not_finite:
            self._flight = None
            if self.comm.rank == 0:
                shutil.rmtree(flight.folder, ignore_errors=True)
            raise _not_finite(flight.step, not_finite) if not_finite else self._not_saved(flight, problems)
        flight.exchanged = True
        if self.comm.rank == 0:

            def publish() -> None:
                try:
                    flight.saved = self._publish(flight, [info for info in files if info], headers)
                except Exception as error:  # whatever it is, the other ranks wait for the outcome
                    flight.error = error
                    shutil.rmtree(flight.folder, ignore_errors=True)

            flight.run(publish)

    def finish(self) -> Saved | None:
        """Wait until every rank has written and rank 0 has published and retired old ones.

        Returns None if no save was begun.
        """
        flight = self._flight
        if flight is None:
            return None
        self.exchange()
        enter_phase("save")
        flight.join()
        self._flight = None
        problem = flight.error and f"rank 0 on {HOST}: {error_reason(flight.error)}"
        saved, problem = self.comm.broadcast((flight.saved, problem))
        if problem:
            raise self._not_saved(flight, [problem])
        return saved

    def _not_saved(self, flight: _Flight, problems: list[str]) -> CheckpointError:
        found = "\n".join(f"  - {problem}" for problem in problems)
        error = CheckpointError(f"step {flight.step} was not saved to {self.folder}:\n{found}")
        error.__cause__ = flight.error
        return error

    def close(self) -> None:
        """Cancel an unfinished save without the other ranks, when a run ends by an error; free the memory of saves."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.cancelled.set()
            flight.join()
            if self.comm.rank == 0:  # what other ranks still write into it, a later save removes
                shutil.rmtree(flight.folder, ignore_errors=True)
        self.arena.close()

    def _publish(self, flight: _Flight, files: list[FileInfo], headers: list[str | None]) -> Saved:
        with no_collection():
            text = self._manifest(flight, files, headers)
        write_file(flight.folder / MANIFEST, [text], flight.cancelled)
        fsync(flight.folder)
        path = self.folder / f"step-{flight.step:08d}"
        if self.fence:
            self.fence()
        trash = self.folder / hidden("trash", path.name)
        if not os.path.lexists(path):
            os.rename(flight.folder, path)
        elif _exchange(flight.folder, path):
            os.rename(flight.folder, trash)
        else:
            os.rename(path, trash)
            try:
                os.rename(flight.folder, path)
            except OSError:
                os.rename(trash, path)
                raise
        fsync(self.folder)
        self.scores[path.name] = flight.score
        retired, warnings = self._retire(flight.step)
        nbytes = sum(info.size for info in files)
        return Saved(path, flight.step, nbytes, time.monotonic() - flight.began, tuple(retired), tuple(warnings))

    def _manifest(self, flight: _Flight, files: list[FileInfo], headers: list[str | None]) -> bytes:
        """Return the manifest's text, by the files as they are on disk; raises CheckpointError.

        The headers say where pieces lie. Where they are those of the save before, by the hashes that their ranks took
        of them, nothing of that has changed, and only the files' sizes are looked at.
        """
        before = self._placed
        if before is not None and None not in headers and (before.headers, before.specs) == (headers, flight.specs):
            tensors = before.tensors
            for info in files:
                os.close(open_descriptor(flight.folder / info.name, info.size))
        else:
            tensors = _place_pieces(flight.folder, flight.specs, files)
            self._placed = _Placed(headers, flight.specs, tensors)
        in_runs = any(run[3] >= LISTED_RUN for t in tensors.values() for run in t.runs)
        content = flight.described | {
            "format": "distrain",
            "version": VERSION if "frozen" in flight.described else RUNS_VERSION if in_runs else 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": len(files),
            "fingerprint": fingerprint(flight.specs),
            "files": [asdict(info) for info in files],
        }
        text = manifest_text(content, tensors)
        if len(text) > MAX_MANIFEST:
            raise CheckpointError(
                f"its {MANIFEST} would have {len(text):,} bytes, and at most {MAX_MANIFEST:,} are read"
            )
        parse_manifest(text)  # what cannot be read back is not published
        return text

    def _retire(self, step: int) -> tuple[list[str], list[str]]:
        """Delete old checkpoints and leftovers; return the names of the retired ones, and what could not be deleted.

        Later steps than the one just saved stay: a run that rolled back has not made them worthless.
        """
        infos = [info for info in list_checkpoints(self.folder) if info.step <= step]
        kept = {
            info.step
            for info in [*infos[: self.keep], *best_first(infos, self.scores, self.criterion)[: self.keep_best]]
        }
        retired, warnings = [], []
        for info in infos:
            if info.step not in kept:
                try:
                    os.rename(info.path, self.folder / hidden("trash", info.path.name))
                    retired.append(info.path.name)
                    self.scores.pop(info.path.name, None)
                except OSError as error:
                    warnings.append(f"{info.path} could not be retired: {error_reason(error)}")
        own_trash = f"-{HOST}-{os.getpid()}-"
        for entry in self.folder.iterdir():
            try:
                if (entry.name.startswith(".trash-") and own_trash in entry.name) or is_leftover(entry):
                    shutil.rmtree(entry)
                progress()
            except OSError as error:
                warnings.append(f"{entry} could not be removed: {error_reason(error)}")
        return retired, warnings


def _not_finite(step: int, tensors: Collection[str]) -> NotFiniteError:
    names = sorted({name.removeprefix("model/") for name in tensors})
    return NotFiniteError(
        f"after step {step} the model has weights that are not finite, in {some(names)}; they are not "
        "saved, and the run stops with its last checkpoint as it was. Lower optim.lr, or set optim.clip_norm"
    )


def _place_pieces(folder: Path, specs: dict[str, TensorSpec], files: list[FileInfo]) -> dict[str, Tensor]:
    """Return every tensor with its pieces, from the headers that the ranks wrote, as rank 0 sees them on disk."""
    placed: dict[str, list[Run]] = {name: [] for name in specs}
    pairs = {name for name, dtype in DTYPES.items() if dtype.pair is not None}
    for index, info in enumerate(files):
        descriptor = open_descriptor(folder / info.name, info.size)
        try:
            for key, (_, (numel,), _, _) in read_header(descriptor, info.size)[0].items():
                name, _, start = key.rpartition("@")
                add_piece(placed[name], index, int(start), numel // 2 if specs[name].dtype in pairs else numel)
        finally:
            os.close(descriptor)
    tensors = {
        name: Tensor(specs[name], tuple(sorted(found, key=lambda run: run[1]))) for name, found in placed.items()
    }
    for name, tensor in tensors.items():
        check_tiling(name, tensor, len(files))
    return tensors
