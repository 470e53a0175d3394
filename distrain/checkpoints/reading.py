"""Find, verify and read checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.files import hash_file, open_descriptor
from distrain.checkpoints.format import (
    MANIFEST,
    MAX_MANIFEST,
    CheckpointError,
    CheckpointInfo,
    Criterion,
    Manifest,
    Tensor,
    TensorSpec,
    best_metric,
    error_reason,
    parse_manifest,
)
from distrain.checkpoints.rank_files import Part, RankFiles, open_rank_file
from distrain.run.folder import RunDir
from distrain.run.heartbeat import progress
from distrain.system import bounded_json as bounded
from distrain.system.collector import no_collection
from distrain.system.errors import UserError, close_names

if TYPE_CHECKING:
    import numpy as np

OTHER_BYTES = "its bytes are not those that were written: its hash does not match"
_PUBLISHED = re.compile(r"step-([0-9]{8,18})")


def read_manifest(path: Path | str) -> Manifest:
    """Read and check the manifest of the checkpoint in folder `path`; raises CheckpointError."""
    path = Path(path)
    try:
        with open(open_descriptor(path / MANIFEST), "rb") as file:
            manifest = parse_manifest(bounded.read_open(file, MAX_MANIFEST))
        match = _PUBLISHED.fullmatch(path.name)
        if match is not None and int(match[1]) != manifest.step:
            raise CheckpointError(
                f"it is of step {manifest.step}, and its folder has the name of step {int(match[1])}: it was copied or "
                "renamed; give a copy another name than step-…"
            )
        return manifest
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{path}: {MANIFEST}: {str(error).removeprefix(f'{MANIFEST}: ')}") from error


class Reader:
    """Reads ranges of the full tensors of one checkpoint. Not to be shared between threads.

    Raises CheckpointError, naming the file, if `verify` finds a problem or a file differs from the manifest; without
    `contents` it looks at which files there are and at their sizes, and not at their bytes. Close it, or use it in a
    `with` statement.
    """

    _MAX_OPEN = 256  # files; well below the usual limit of 1024

    def __init__(self, path: Path | str, verify: bool = True, *, contents: bool = True):
        self.path = Path(path)
        with no_collection():
            manifest, problems = _examine(self.path, contents) if verify else (read_manifest(self.path), [])
        if problems or manifest is None:
            raise not_verified(self.path, problems)
        self.manifest = manifest
        self._rank_files = RankFiles(manifest)
        self._offsets: dict[int, dict[tuple[str, int], int]] = {}
        self._open: dict[int, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def spec(self, name: str) -> TensorSpec:
        """Return the spec of tensor `name`, which may be an alias; raises CheckpointError for an unknown name."""
        return self._tensor(name).spec

    def _tensor(self, name: str) -> Tensor:
        stored = self.manifest.aliases.get(name, name)
        if stored not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}{close_names(name, self.manifest.tensors)}")
        return self.manifest.tensors[stored]

    def _file(self, index: int) -> int:
        if index not in self._open:
            if len(self._open) >= self._MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            info = self.manifest.files[index]
            if index in self._offsets:
                self._open[index] = open_descriptor(self.path / info.name, info.size)
            else:
                self._open[index], listed = open_rank_file(self.path, info, self._rank_files[index])
                self._offsets[index] = {(name, start): offset for offset, _, name, start in listed()}
        return self._open[index]

    def ranges(self, name: str, start: int, numel: int) -> Iterator[tuple[int, int, int]]:
        """Yield where elements [start, start + numel) of `name` lie, in order: (file, offset in bytes, bytes).

        `name` may be an alias. Raises CheckpointError for an unknown name; a range outside the tensor is our mistake.
        """
        tensor = self._tensor(name)
        stored = self.manifest.aliases.get(name, name)
        size, stop = ITEM_SIZES[tensor.spec.dtype], start + numel
        assert 0 <= start <= stop <= tensor.spec.numel, f"{name}: [{start}, {stop}) of {tensor.spec.numel}"
        for file, begin, count in tensor.pieces_from(start):
            low, high = max(start, begin), min(stop, begin + count)
            if low >= high:
                break
            if file not in self._offsets:
                self._file(file)
            offset = self._offsets[file][stored, begin]
            yield file, offset + (low - begin) * size, (high - low) * size

    def listed(self, file: int) -> list[Part]:
        """Return what a file holds, in its order. Threads may call it."""
        descriptor, listed = open_rank_file(self.path, self.manifest.files[file], self._rank_files[file])
        os.close(descriptor)
        return listed()

    def read(self, name: str, start: int, numel: int, out: Any = None) -> np.ndarray:
        """Return the bytes (uint8) of elements [start, start + numel) of `name`, in `out` when a buffer is given."""
        import numpy as np  # looking at a checkpoint needs no array

        nbytes = numel * ITEM_SIZES[self.spec(name).dtype]
        target = np.empty(nbytes, np.uint8) if out is None or not nbytes else np.frombuffer(out, np.uint8)
        assert target.nbytes == nbytes, f"{name}: a buffer of {target.nbytes} bytes for {nbytes}"
        reached = 0
        for file, offset, count in self.ranges(name, start, numel):
            self._fill(file, target.data[reached : reached + count], offset)
            reached += count
        return target

    def _fill(self, file: int, view: memoryview, offset: int) -> None:
        descriptor = self._file(file)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path / self.manifest.files[file].name} ends before byte {offset}")
            view, offset = view[count:], offset + count
            progress()


def not_verified(path: Path, problems: Iterable[str]) -> CheckpointError:
    """Return the error for a checkpoint that has these problems."""
    return CheckpointError(f"{path} does not verify:\n" + "\n".join(f"  - {line}" for line in problems))


def _file_problem(folder: Path, manifest: Manifest, contents: RankFiles | None, file: int) -> str | None:
    """Return what is wrong with a file, or without `contents` with its size alone."""
    info = manifest.files[file]
    try:
        if contents is None:
            os.close(open_descriptor(folder / info.name, info.size))
            return None
        descriptor, _ = open_rank_file(folder, info, contents[file])
        try:
            same = hash_file(descriptor) == info.xxh3_128
        finally:
            os.close(descriptor)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{info.name}: {error_reason(error)}"
    return None if same else f"{info.name}: {OTHER_BYTES}"


def _examine(path: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> tuple[Manifest | None, list[str]]:
    if not path.is_dir():
        return None, [f"{path} is not a folder" if path.exists() else f"{path} does not exist"]
    try:
        manifest, present = read_manifest(path), set(os.listdir(path))
    except CheckpointError as error:
        return None, [str(error).removeprefix(f"{path}: ")]
    except OSError as error:
        return None, [error_reason(error)]
    expected = {MANIFEST, *(info.name for info in manifest.files)}
    problems = [f"{name}: it is not part of this checkpoint" for name in sorted(present - expected)]
    files = range(share[0], manifest.world_size, share[1])
    problem_of = partial(_file_problem, path, manifest, RankFiles(manifest) if contents else None)
    if not contents:
        return manifest, problems + [problem for problem in map(problem_of, files) if problem]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading both release the GIL
        return manifest, problems + [problem for problem in pool.map(problem_of, files) if problem]


def verify(path: Path | str, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Read the whole checkpoint in folder `path`; return its problems, none if it is as it was written.

    `share` (index, of so many): read only these of its files, in turn, for callers that divide them.
    """
    with no_collection():
        return _examine(Path(path), share=share)[1]


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder is named as published checkpoints are: `step-` and 8 to 18 digits."""
    return _PUBLISHED.fullmatch(name) is not None


def list_checkpoints(folder: Path | str) -> list[CheckpointInfo]:
    """Return the published checkpoints in `folder`, the highest step first; none if there is no folder."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: {error_reason(error)}") from error
    found = [(entry, match) for entry in entries if (match := _PUBLISHED.fullmatch(entry.name))]
    infos = [CheckpointInfo(Path(entry.path), int(m[1])) for entry, m in found if entry.is_dir(follow_symlinks=False)]
    return sorted(infos, key=lambda info: -info.step)


def find_newest(folder: Path | str, verify: bool = True) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint in `folder` that verifies, and the newer ones that do not, each with the reason.

    `verify=False` reads manifests only. Rank 0 calls and broadcasts the choice.
    """
    skipped: list[tuple[Path, str]] = []
    for info in list_checkpoints(folder):
        with no_collection():
            problems = _examine(info.path)[1] if verify else _manifest_problems(info.path)
        if not problems:
            return info.path, skipped
        skipped.append((info.path, "; ".join(problems)))
    return None, skipped


def _manifest_problems(path: Path) -> list[str]:
    try:
        read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def newest_step(folder: Path | str) -> int | None:
    """Return the step of the newest checkpoint in `folder` by its manifest alone; None if there is none."""
    newest, _ = find_newest(folder, verify=False)
    return read_manifest(newest).step if newest is not None else None


def find_best(folder: Path | str) -> Path | None:
    """Return the best checkpoint by the run's current metric, the earliest of equals; None if none has a value."""
    best = best_first(list_checkpoints(folder), {}, criterion_of(folder))
    return best[0].path if best else None


_LOWER = ("loss", "mae", "mse", "rmse", "perplexity", "bits_per_byte")
"""Metrics of which lower is better, where no checkpoint says so; asking the metrics themselves would import torch."""


def criterion_of(folder: Path | str) -> Criterion | None:
    """Return what ranks a run's checkpoints; None if neither they nor a recipe state it.

    The metric is that of the run's recipe, which may have changed since the newest checkpoint was saved.
    """
    newest = next((each.evaluation for each in _manifests(list_checkpoints(folder)) if each.evaluation), None)
    run = RunDir(Path(folder).parent)
    if not run.exists:
        return newest.criterion if newest is not None else None
    from distrain.config.yaml.document import read_text  # with the whole recipe: opening a checkpoint needs none

    best = best_metric(read_text(run.recipe_path))
    metric = best.removeprefix("-")
    higher = metric == best and metric not in _LOWER
    if newest is None:
        return Criterion(metric, higher)
    stored = newest.criterion
    if metric == stored.metric:
        return stored
    return Criterion(metric, newest.higher.get(metric, higher), stored.split, stored.data)


def _manifests(infos: Iterable[CheckpointInfo]) -> Iterator[Manifest]:
    """Yield the readable manifests."""
    for info in infos:
        with suppress(CheckpointError):
            yield read_manifest(info.path)


def best_first(
    infos: Iterable[CheckpointInfo], known: dict[str, float | None], criterion: Criterion | None = None
) -> list[CheckpointInfo]:
    """Sort the checkpoints that have a value of the metric by the criterion; `known` remembers them by folder name."""
    for info in infos:
        if info.path.name not in known:
            # a damaged one is nobody's best; resuming reports what is wrong with it
            known[info.path.name] = next((each.score_by(criterion) for each in _manifests([info])), None)
    scored = [(score, info) for info in infos if (score := known[info.path.name]) is not None]
    return [info for _, info in sorted(scored, key=lambda item: (-item[0], item[1].step))]


def checkpoint_folder(run: Path | str) -> Path:
    """Return the folder of a run's checkpoints; raises UserError if `run` is not a run folder."""
    folder = RunDir(run).checkpoints
    if folder.is_dir():
        return folder
    siblings = [info.path.name for info in list_checkpoints(Path(run).parent)] if Path(run).parent.is_dir() else []
    if siblings:
        raise UserError(f"there is no checkpoint {run}; there are {', '.join(siblings)} (older ones are retired)")
    raise UserError(f"{run} is not a run folder: it has no checkpoints/")


def find_checkpoint(target: Path | str, *, best: bool = False) -> Path:
    """Return the checkpoint that `target` names: itself, or of a run the one it exported, its best, or its newest.

    Raises UserError if there is no usable one.
    """
    path = Path(target)
    if (path / MANIFEST).exists():
        if best:
            raise UserError(f"{path} is one checkpoint; --best goes with a run folder")
        return path
    folder = checkpoint_folder(path)
    if best:
        found = find_best(folder)
        if found is None:
            criterion = criterion_of(folder)
            by = f" by {criterion.metric}" if criterion is not None else ""
            raise UserError(f"{path} has no checkpoint with an evaluation{by}; without --best the newest is taken")
        return found
    finished = RunDir(path).summary() or {}
    exported = folder / Path(finished.get("checkpoint", ".")).name
    if finished and exported != folder and exported.is_dir():
        return exported
    newest, skipped = find_newest(folder)
    if newest is None:
        reasons = "".join(f"\n  {bad.name}: {reason}" for bad, reason in skipped)
        raise UserError(
            f"{path} has no checkpoint that can be used{reasons}"
            + ("" if skipped else f", as it has saved none yet; `distrain train {path}` trains it")
        )
    return newest
