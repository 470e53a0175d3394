"""Where the tensors of a checkpoint lie, whatever its format: the one view that exporting and importing have of it.

A room for a format reads listings alone and says in which files, and how, the elements of each full tensor lie: as
`Block`s. Most tensors are runs of bytes in files, which can be copied as they are; what is strided or cut along another
dimension than the first is gathered, a bounded part at a time.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.floats import FLOATS, convert
from distrain.checkpoints.format import TensorSpec, explain
from distrain.checkpoints.reading import Reader, open_plain
from distrain.config import UserError

THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 1 << 20
_BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""What copies elements of so many bytes."""


class Tensors(Protocol):
    """Full tensors by name, and where their bytes are."""

    path: Path

    @property
    def aliases(self) -> dict[str, str]: ...
    @property
    def names(self) -> Sequence[str]: ...
    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor is."""
        ...

    def stored_dtype(self, name: str) -> str:
        """Return what its elements have in the files; the spec's dtype may be wider."""
        ...

    def runs(self, name: str) -> Iterator[tuple[int, int, int]] | None:
        """Yield (file, offset in bytes, bytes) in the order of the elements; None where they must be gathered."""
        ...

    def gather(self, name: str, start: int, numel: int) -> np.ndarray:
        """Return the bytes (uint8) of elements [start, start + numel), as stored; threads may share it."""
        ...

    def open(self, file: int) -> int:
        """Return a descriptor of its own for a file that `runs` names."""
        ...


class NativeTensors:
    """The tensors of a checkpoint in distrain's own format."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.path = reader.path
        self.aliases = reader.manifest.aliases
        self.names = list(reader.manifest.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor is."""
        return self.reader.manifest.tensors[name].spec

    def stored_dtype(self, name: str) -> str:
        """Return the dtype."""
        return self.spec(name).dtype

    def runs(self, name: str) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces."""
        return self.reader.ranges(name, 0, self.spec(name).numel)

    def gather(self, name: str, start: int, numel: int) -> np.ndarray:
        """Read the range; not by several threads at once."""
        return self.reader.read(name, start, numel)

    def open(self, file: int) -> int:
        """Open a rank's file."""
        info = self.reader.manifest.files[file]
        return open_plain(self.path / info.name, info.size)


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor's grid, strided in one file."""

    file: int
    offset: int
    """Of its first element in the file, in bytes."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In the file, in elements."""
    place: tuple[int, ...]
    """Of its first element in the grid."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A full tensor as it lies in files."""

    spec: TensorSpec
    dtype: str
    """Of its elements in the files."""
    grid: tuple[int, ...]
    """What blocks are boxes of: the tensor's shape, or (elements,) where it is cut as a flat one."""
    blocks: tuple[Block, ...]
    data: bytes | None = None
    """The elements themselves, of a small tensor that lies in no file."""


def whole(spec: TensorSpec, dtype: str, file: int, offset: int, strides: tuple[int, ...] | None = None) -> Stored:
    """Return a tensor that lies in one file, row by row where no strides are given."""
    grid = spec.shape or (1,)
    steps = row_major(grid) if strides is None else strides or (1,)
    blocks = (Block(file, offset, grid, steps, (0,) * len(grid)),) if spec.numel else ()
    return Stored(spec, dtype, grid, blocks)


def flat(spec: TensorSpec, dtype: str, runs: Sequence[tuple[int, int, int]]) -> Stored:
    """Return a tensor that lies in runs (file, offset in bytes, elements), one behind the other."""
    blocks, reached = [], 0
    for file, offset, numel in runs:
        if numel:
            blocks.append(Block(file, offset, (numel,), (1,), (reached,)))
        reached += numel
    return Stored(spec, dtype, (spec.numel,), tuple(blocks))


def small(spec: TensorSpec, value: np.ndarray) -> Stored:
    """Return a tensor that lies in no file."""
    return Stored(spec, spec.dtype, (spec.numel,), (), value.tobytes())


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    strides = [1]
    for size in list(shape)[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[::-1])


@dataclass
class Source:
    """A foreign checkpoint: what is in it, what becomes of that, and where each tensor lies."""

    path: Path
    what: str
    """In words: 'DeepSpeed ZeRO-2 of 4 ranks'."""
    files: list[tuple[Path, int]] = field(default_factory=list)
    """Each file and its size in bytes."""
    tensors: dict[str, Stored] = field(default_factory=dict)
    """By the names of our checkpoints: `model/NAME`, `optimizer/NAME/KEY`, `ema/NAME`."""
    aliases: dict[str, str] = field(default_factory=dict)
    checksums: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(file, offset, bytes, CRC-32) of what was read, where the format has one."""
    listings: list[tuple[int, int, int, int]] = field(default_factory=list)
    """The same of pickles that say what there is."""
    step: int | None = None
    """Optimizer steps done; None where the format does not say."""
    optimizer: str | None = None
    """Class of the optimizer, as far as can be known."""
    optimizer_values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the optimizer keeps for each parameter that is not a tensor."""
    optimizer_groups: list[dict[str, Any]] = field(default_factory=list)
    buffers: set[str] | None = None
    """Plain names of the model's buffers; None where the format does not tell them from parameters."""
    config: str | None = None
    """The text of the config.json of transformers that lies beside."""
    notes: list[str] = field(default_factory=list)
    """How things were understood, for the user."""
    left: list[str] = field(default_factory=list)
    """What is not imported, and why."""
    wants_optimizer: bool = True
    """Whether an optimizer's state is looked at that lies beside the model."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}
        self._places: dict[Path, int] = {}
        self._owner: Any = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, owner: Any) -> None:
        """Keep what closes this source when it is let go."""
        self._owner = owner

    def scratch(self) -> Path:
        """Return a folder that is removed when the source is closed."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="distrain-")
        return Path(self._scratch.name)

    def add_file(self, path: Path) -> int:
        """Return the index of a regular file (no symbolic link); raises UserError."""
        if path not in self._places:
            descriptor = open_plain(path)
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            self._places[path] = len(self.files)
            self.files.append((path, size))
        return self._places[path]

    def open(self, file: int) -> int:
        """Return a descriptor for the file, which must have the size that it had."""
        return open_plain(*self.files[file])

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors, without aliases."""
        return list(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor is."""
        return self.tensors[name].spec

    def stored_dtype(self, name: str) -> str:
        """Return what its elements have in the files."""
        return self.tensors[name].dtype

    def runs(self, name: str) -> Iterator[tuple[int, int, int]] | None:
        """Yield where the elements lie, in order; None where they are not whole runs of bytes in files."""
        stored = self.tensors[name]
        found = None if stored.data is not None else _in_runs(stored)
        if found is None:
            return None
        size = ITEM_SIZES[stored.dtype]
        return ((block.file, block.offset, block.numel * size) for block in found)

    def gather(self, name: str, start: int, numel: int) -> np.ndarray:
        """Return the bytes of elements [start, start + numel), wherever they lie."""
        stored = self.tensors[name]
        size = ITEM_SIZES[stored.dtype]
        if stored.data is not None:
            return np.frombuffer(stored.data, np.uint8)[start * size : (start + numel) * size]
        out = np.empty(numel, _BITS[size])
        reached = 0
        if not numel:
            return out.view(np.uint8)
        for low, high in _boxes(stored.grid, start, start + numel):
            shape = [stop - begin for begin, stop in zip(low, high, strict=True)]
            part = out[reached : reached + math.prod(shape)].reshape(shape)
            reached += part.size
            for block in stored.blocks:
                self._paste(block, part, low, high, size)
        return out.view(np.uint8)

    def _paste(self, block: Block, part: np.ndarray, low: Sequence[int], high: Sequence[int], size: int) -> None:
        """Copy into `part`, the box [low, high) of the grid, what of it lies in the block."""
        ends = [place + count for place, count in zip(block.place, block.shape, strict=True)]
        begin = [max(a, b) for a, b in zip(low, block.place, strict=True)]
        stop = [min(a, b) for a, b in zip(high, ends, strict=True)]
        if any(a >= b for a, b in zip(begin, stop, strict=True)):
            return
        skipped = sum((a - p) * s for a, p, s in zip(begin, block.place, block.strides, strict=True))
        source = np.ndarray(
            [b - a for a, b in zip(begin, stop, strict=True)],
            _BITS[size],
            self._map(block.file),
            block.offset + skipped * size,
            [s * size for s in block.strides],
        )
        part[tuple(slice(a - b, c - b) for a, b, c in zip(begin, low, stop, strict=True))] = source

    def _map(self, file: int) -> mmap.mmap:
        # pages of a mapped file are the kernel's to drop: they are no memory of this process's own
        with self._lock:
            if file not in self._maps:
                descriptor = self.open(file)
                try:
                    self._maps[file] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                finally:
                    os.close(descriptor)
            return self._maps[file]

    def number(self, name: str) -> float | int | None:
        """Return the value of a tensor of one element; None where it is none."""
        stored = self.tensors[name]
        if stored.spec.numel != 1:
            return None
        raw = self.gather(name, 0, 1)
        if stored.dtype in FLOATS:
            return float(convert(raw, stored.dtype, "F64")[0].view(np.float64)[0])
        return int.from_bytes(raw.tobytes(), "little", signed=stored.dtype.startswith("I"))

    def check(self) -> None:
        """Raise UserError unless every tensor's elements are there, each once, within their files."""
        for name, stored in self.tensors.items():
            size = ITEM_SIZES[stored.dtype]
            for block in stored.blocks:
                last = sum((n - 1) * s for n, s in zip(block.shape, block.strides, strict=True))
                path, file_size = self.files[block.file]
                if block.offset < 0 or block.offset + (last + 1) * size > file_size:
                    raise UserError(f"{path}: tensor {name!r} reaches beyond the end of the file")
            if stored.data is None and (problem := _tiling_problem(stored)):
                raise UserError(f"{self.path}: tensor {name!r} is not whole: {problem}")
        for alias, name in self.aliases.items():
            assert alias not in self.tensors, alias
            assert name in self.tensors, name

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read what these tensors (None: all) lie in and compare it to the format's own checksums.

        Raises UserError naming the files.
        """
        known: dict[int, list[tuple[int, int, int]]] = {}
        for file, offset, nbytes, crc in self.checksums:
            known.setdefault(file, []).append((offset, nbytes, crc))
        jobs: dict[int, set[tuple[int, int, int]]] = {}
        for spans in known.values():
            spans.sort()
        for file, offset, nbytes, crc in self.listings:
            jobs.setdefault(file, set()).add((offset, nbytes, crc))
        for block in (
            block for name in (self.names if names is None else names) for block in self.tensors[name].blocks
        ):
            spans = known.get(block.file, [])
            place = bisect_right(spans, block.offset, key=lambda span: span[0]) - 1
            if place >= 0 and block.offset < spans[place][0] + spans[place][1]:
                jobs.setdefault(block.file, set()).add(spans[place])
        halves = [(file, sorted(spans)[part::THREADS]) for file, spans in jobs.items() for part in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            bad = {path for path in pool.map(lambda job: self._checked(*job), halves) if path}
        if bad:
            raise UserError(
                "\n".join(f"{path}: its bytes are not those that were written: a checksum differs" for path in bad)
            )

    def _checked(self, file: int, spans: list[tuple[int, int, int]]) -> Path | None:
        descriptor, buffer = self.open(file), memoryview(bytearray(_CHUNK))
        try:
            for offset, nbytes, expected in spans:
                crc, stop = 0, offset + nbytes
                while offset < stop:
                    count = os.preadv(descriptor, [buffer[: min(_CHUNK, stop - offset)]], offset)
                    if not count:
                        return self.files[file][0]
                    crc, offset = zlib.crc32(buffer[:count], crc), offset + count
                if crc != expected:
                    return self.files[file][0]
        except OSError as error:
            raise UserError(f"{self.files[file][0]}: {explain(error)}") from error
        finally:
            os.close(descriptor)
        return None

    def close(self) -> None:
        """Let go of the files."""
        while self._maps:
            self._maps.popitem()[1].close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_runs(stored: Stored) -> list[Block] | None:
    """Return the blocks in the order of the elements if each is one run of them, in the file and in the tensor."""
    for block in stored.blocks:
        expected = 1
        for size, stride in zip(block.shape[::-1], block.strides[::-1], strict=True):
            if size != 1 and stride != expected:
                return None
            expected *= size
        cut = next((axis for axis, size in enumerate(block.shape) if size != 1), 0)
        if block.shape[cut + 1 :] != stored.grid[cut + 1 :]:
            return None
    return sorted(stored.blocks, key=lambda block: block.place)


def _boxes(
    grid: tuple[int, ...], start: int, stop: int, prefix: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements [start, stop) of a grid into boxes [low, high), in their order."""
    after = tuple(index + 1 for index in prefix)
    if len(grid) == 1:
        if start < stop:
            yield (*prefix, start), (*after, stop)
        return
    row = math.prod(grid[1:])
    if start % row:
        inside, first = min(stop, start - start % row + row), start // row
        yield from _boxes(grid[1:], start % row, inside - first * row, (*prefix, first))
        start = inside
    if stop - start >= row:
        yield (*prefix, start // row, *(0 for _ in grid[1:])), (*after, stop // row, *grid[1:])
        start = stop // row * row
    if start < stop:
        yield from _boxes(grid[1:], 0, stop - start, (*prefix, start // row))


def _tiling_problem(stored: Stored) -> str | None:
    """Say how the blocks fail to cover the grid, each element once."""
    blocks = stored.blocks
    for block in blocks:
        if any(p + n > g or n < 1 for p, n, g in zip(block.place, block.shape, stored.grid, strict=True)):
            return f"a part of {list(block.shape)} at {list(block.place)} is outside of {list(stored.grid)}"
    held, numel = sum(block.numel for block in blocks), stored.spec.numel
    if math.prod(stored.grid) != numel:
        return f"{list(stored.grid)} is not its shape"
    if held != numel:
        return f"it has {numel} elements, and its parts hold {held}"
    ordered = sorted(blocks, key=lambda block: block.place)
    if all(block.shape[1:] == stored.grid[1:] for block in blocks):
        if any(one.place[0] + one.shape[0] > other.place[0] for one, other in pairwise(ordered)):
            return "parts of it lie over each other"
        return None
    low = np.array([block.place for block in ordered])
    high = low + np.array([block.shape for block in ordered])
    for index in range(len(ordered) - 1):
        apart = (low[index + 1 :] >= high[index]) | (high[index + 1 :] <= low[index])
        if not apart.any(1).all():
            return "parts of it lie over each other"
    return None
