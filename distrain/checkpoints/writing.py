"""Writes checkpoints: complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distrain.checkpoints.dtypes import DTYPES, ITEM_SIZES
from distrain.checkpoints.format import (
    LISTED_RUN,
    MANIFEST,
    MAX_MANIFEST,
    VERSION,
    CheckpointError,
    Communicator,
    Criterion,
    Evaluation,
    FileInfo,
    Piece,
    Run,
    Saved,
    Tensor,
    TensorSpec,
    add_piece,
    canonical_json,
    check_json,
    check_tiling,
    error_reason,
    fingerprint,
    parse_manifest,
    piece_key,
    rank_file_name,
)
from distrain.checkpoints.headers import flat_entry, pack_header, read_header
from distrain.checkpoints.hiding import HOST, hidden, is_leftover, sync_folder
from distrain.checkpoints.reading import best_first, hash_file, list_checkpoints, open_descriptor
from distrain.run.heartbeat import enter_phase, progress

_CHUNK = 16 << 20  # bytes hashed and written at a time: large enough that the loop's thread rarely waits for the GIL


class _Cancelled(Exception):
    """The save was cancelled."""


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
    thread: threading.Thread | None = None
    file: FileInfo | None = None
    error: Exception | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


def _lay_out(specs: dict[str, TensorSpec], pieces: Iterable[Piece]) -> tuple[bytes, list[tuple[memoryview, bool]]]:
    """Return a file's header and, in the order of the file, each piece's bytes and whether it is `copied`."""
    laid = []
    for piece in pieces:
        data = piece.data.data if isinstance(piece.data, np.ndarray) else piece.data
        if not data.nbytes:
            continue
        spec = specs[piece.name]
        numel, rest = divmod(data.nbytes, ITEM_SIZES[spec.dtype])
        assert not rest, f"{piece.name}: {data.nbytes} bytes of {spec.dtype}"
        assert 0 <= piece.start <= spec.numel - numel, f"{piece.name}: {numel} from {piece.start} of {spec.numel}"
        laid.append((-ITEM_SIZES[spec.dtype], piece.name, piece.start, numel, data.cast("B"), piece.copied))
    laid.sort(key=lambda entry: entry[:3])  # wide elements first: each tensor is then aligned to its element
    entries = {piece_key(name, start): flat_entry(specs[name].dtype, numel) for _, name, start, numel, *_ in laid}
    assert len(entries) == len(laid), "two pieces of a tensor begin at the same element"
    return pack_header(entries), [(data, copied) for *_, data, copied in laid]


def _write_file(path: Path, parts: Sequence[memoryview | bytes], cancelled: threading.Event) -> FileInfo:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "xb", buffering=1 << 20) as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                if cancelled.is_set():
                    raise _Cancelled
                chunk = memoryview(part)[start : start + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                progress()
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(path.name, size, digest.hexdigest())


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if the system cannot (Linux on most local file systems can)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


class Saver:
    """Saves the state of a run into `folder`, one checkpoint at a time, and retires old ones.

    The newest `keep` up to the step just saved stay, and the `keep_best` with the highest scores besides. `fence`,
    called by rank 0 just before the publishing rename, raises when this run must not publish any more. All ranks make
    the same calls in the same order, from the thread that may use `comm`; `dry_run`, `begin` and `finish` raise the
    same CheckpointError on every rank, and whatever fails, the checkpoints that were there stay as they were.
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
    ):
        self.folder = Path(folder)
        self.comm = comm
        self.keep = keep
        self.keep_best = keep_best
        self.asynchronous = asynchronous
        self.fence = fence
        self._flight: _Flight | None = None
        self._buffer: mmap.mmap | None = None
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
        """Whether this rank has written everything, so that `finish` waits for other ranks only. Costs nothing."""
        return self._flight is None or self._flight.thread is None or not self._flight.thread.is_alive()

    def dry_run(self) -> None:
        """Check before training that every rank can write into the folder and rank 0 sees what they write."""
        assert self._flight is None
        folder = self._stage("step-00000000")
        error: Exception | None = None
        try:
            _write_file(folder / rank_file_name(self.comm.rank, self.comm.world_size), [bytes(8)], threading.Event())
        except OSError as caught:
            error = caught
        _, errors = self._gather(None, error)
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
    ) -> Saved | None:
        """Finish the previous save and return it (None: there was none), then start this one.

        `specs` lists all full tensors, the same on every rank; `pieces` are this rank's, and over all ranks they hold
        each element once. They are iterated after the previous save is finished, so a generator may reuse its buffers,
        and held until `begin` returns. An asynchronous save then writes on a thread, from a copy of its own and from
        pieces that are `copied`. A fault of one rank (a full disk, an error in `pieces`) is raised by `finish` on all
        ranks. `score`: higher is better, NaN counts as none; `evaluation` replaces it and names its metric. `history`:
        rank 0's JSON values.
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
        counts = evaluation.score(self.criterion) if evaluation and self.criterion else described["score"]
        flight = self._flight = _Flight(step, folder, described, specs, time.monotonic(), counts)
        try:
            check_json(scalars, "scalars")
            check_json(history, "history")
            head, parts = _lay_out(specs, pieces)
            held: list[memoryview | bytes] = [head]
            held += self._copy(parts) if self.asynchronous else [data for data, _ in parts]
        except Exception as error:  # one rank's fault must reach the others, which wait in finish
            flight.error = error
            return before
        if self.asynchronous:
            flight.thread = threading.Thread(target=self._write, args=(flight, held), name=f"checkpoint-{step}")
            flight.thread.start()
        else:
            self._write(flight, held)
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
            return self._publish(flight, [info])
        except OSError as error:
            raise CheckpointError(f"step {step} was not saved to {self.folder}: {error_reason(error)}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # nothing is left of it once it is published

    def _write(self, flight: _Flight, held: list[memoryview | bytes]) -> None:
        path = flight.folder / rank_file_name(self.comm.rank, self.comm.world_size)
        try:
            flight.file = _write_file(path, held, flight.cancelled)
        except Exception as error:  # carried to finish, where every rank learns of it
            flight.error = error

    def _copy(self, parts: list[tuple[memoryview, bool]]) -> list[memoryview]:
        """Copy the parts that may change into one page-aligned buffer, which is kept for the next save."""
        needed = sum(data.nbytes for data, copied in parts if not copied)
        if self._buffer is None or len(self._buffer) < needed:
            self._buffer = mmap.mmap(-1, max(needed, mmap.PAGESIZE))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a hint, which a kernel without huge pages refuses
                    self._buffer.madvise(mmap.MADV_HUGEPAGE)
        room, reached = np.frombuffer(self._buffer, np.uint8), 0
        held = []
        for data, copied in parts:
            if not copied:
                stay = room[reached : reached + data.nbytes]
                np.copyto(stay, np.frombuffer(data, np.uint8))
                reached, data = reached + data.nbytes, stay.data
            held.append(data)
        return held

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

    def _gather(self, file: FileInfo | None, error: Exception | None) -> tuple[list[FileInfo | None], list[str]]:
        """Return every rank's file, and the faults of all ranks as text."""
        reason = error and f"rank {self.comm.rank} on {HOST}: {error_reason(error)}"
        if isinstance(error, FileNotFoundError):
            reason = f"{reason}; all ranks must see the same run folder, on a file system that the nodes share"
        files, reasons = zip(*self.comm.gather((file, reason)), strict=True)
        return list(files), [reason for reason in reasons if reason]

    def finish(self) -> Saved | None:
        """Wait until every rank has written, publish, retire old ones; return None if no save was begun."""
        flight = self._flight
        if flight is None:
            return None
        enter_phase("save")
        if flight.thread:
            flight.thread.join()
        files, problems = self._gather(flight.file, flight.error)
        saved: Saved | None = None
        error = flight.error
        if self.comm.rank == 0:
            try:
                if not problems:
                    saved = self._publish(flight, [info for info in files if info])
            except Exception as caught:  # whatever it is, the other ranks wait for the outcome
                error = caught
                problems = [f"rank 0 on {HOST}: {error_reason(caught)}"]
            if problems:
                shutil.rmtree(flight.folder, ignore_errors=True)
        self._flight = None
        saved, problems = self.comm.broadcast((saved, problems))
        if problems:
            found = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"step {flight.step} was not saved to {self.folder}:\n{found}") from error
        return saved

    def close(self) -> None:
        """Cancel an unfinished save without the other ranks, when a run ends by an error."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.cancelled.set()
        if flight.thread:
            flight.thread.join()
        if self.comm.rank == 0:  # what other ranks still write into it, a later save removes
            shutil.rmtree(flight.folder, ignore_errors=True)

    def _publish(self, flight: _Flight, files: list[FileInfo]) -> Saved:
        tensors = _place_pieces(flight.folder, flight.specs, files)
        content = flight.described | {
            "format": "distrain",
            "version": VERSION if any(run[3] >= LISTED_RUN for t in tensors.values() for run in t.runs) else 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": len(files),
            "fingerprint": fingerprint(flight.specs),
            "files": [asdict(info) for info in files],
            "tensors": {
                name: {"shape": t.spec.shape, "dtype": t.spec.dtype, "role": t.spec.role, "pieces": t.listed()}
                for name, t in tensors.items()
            },
        }
        text = canonical_json(content)
        text = b'{"xxh3_128":"%s",' % xxhash.xxh3_128_hexdigest(text).encode() + text[1:]
        if len(text) > MAX_MANIFEST:
            raise CheckpointError(
                f"its {MANIFEST} would have {len(text):,} bytes, and at most {MAX_MANIFEST:,} are read"
            )
        parse_manifest(text)  # what cannot be read back is not published
        _write_file(flight.folder / MANIFEST, [text], flight.cancelled)
        sync_folder(flight.folder)
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
        sync_folder(self.folder)
        self.scores[path.name] = flight.score
        retired, warnings = self._retire(flight.step)
        nbytes = sum(info.size for info in files)
        return Saved(path, flight.step, nbytes, time.monotonic() - flight.began, tuple(retired), tuple(warnings))

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


def _place_pieces(folder: Path, specs: dict[str, TensorSpec], files: list[FileInfo]) -> dict[str, Tensor]:
    """Return every tensor with its pieces, from the headers that the ranks wrote, as rank 0 sees them on disk."""
    placed: dict[str, list[Run]] = {name: [] for name in specs}
    for index, info in enumerate(files):
        descriptor = open_descriptor(folder / info.name, info.size)
        try:
            for key, (_, (numel,), _, _) in read_header(descriptor, info.size)[0].items():
                name, _, start = key.rpartition("@")
                is_pair = DTYPES[specs[name].dtype].pair is not None
                add_piece(placed[name], index, int(start), numel // 2 if is_pair else numel)
        finally:
            os.close(descriptor)
    tensors = {
        name: Tensor(specs[name], tuple(sorted(found, key=lambda run: run[1]))) for name, found in placed.items()
    }
    for name, tensor in tensors.items():
        check_tiling(name, tensor, len(files))
    return tensors
