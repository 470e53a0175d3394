"""Where the tensors of a checkpoint lie, whatever its format: what exporting and importing work with.

The module of a format reads listings only, and records in which files, and how, the elements of each full tensor lie:
as `Block`s. Most tensors are runs of bytes in files, which are copied as they are. Strided tensors, and those that are
cut along another dimension than the first, are gathered, a bounded part at a time.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distrain.checkpoints.dtypes import FLOATS, ITEM_SIZES
from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.format import TensorSpec, error_reason
from distrain.checkpoints.rank_files import Part
from distrain.run.heartbeat import progress
from distrain.system.errors import UserError

try:
    from zlib_ng.zlib_ng import crc32  # the extra `fast`: some 20 times as fast as the zlib of most systems
except ImportError:
    from zlib import crc32

if TYPE_CHECKING:
    import tempfile

    import numpy as np

NO_TENSORS = "entries of the state dict that are not tensors"
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_CHUNK = 1 << 20
_BITS: dict[int, Any] = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""The NumPy dtype that copies elements of so many bytes."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor's grid, strided within one file."""

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
class Check:
    """Bytes of a file, and what they hash to."""

    file: int
    offset: int
    nbytes: int
    digest: int | str
    """Their CRC-32, or their XXH3-128 in hexadecimal digits."""

    @property
    def end(self) -> int:
        """Offset behind the last byte."""
        return self.offset + self.nbytes

    def covers(self, size: int) -> bool:
        """Whether these are all the bytes of a file of that size."""
        return (self.offset, self.nbytes) == (0, size)

    def begin(self) -> Hash:
        """Return what hashes such bytes: its `update` takes them in order."""
        return Crc32() if isinstance(self.digest, int) else xxhash.xxh3_128()

    def holds(self, hashed: Hash) -> bool:
        """Whether the bytes that were hashed are those that were written."""
        return self.digest == (hashed.value if isinstance(hashed, Crc32) else hashed.hexdigest())


class Crc32:
    """A running CRC-32."""

    value = 0

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        self.value = crc32(data, self.value)


Hash = Crc32 | xxhash.xxh3_128


@dataclass(frozen=True, slots=True)
class Stored:
    """A full tensor as it lies in files."""

    spec: TensorSpec
    dtype: str
    """Of its elements in the files."""
    grid: tuple[int, ...]
    """What blocks are boxes of: the tensor's shape, or (elements,) if it is cut as a flat one."""
    blocks: tuple[Block, ...]
    data: bytes | None = None
    """The elements of a small tensor that lies in no file."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements as they lie there."""
        return self.spec.numel * ITEM_SIZES[self.dtype]


def in_one_file(spec: TensorSpec, dtype: str, file: int, offset: int, strides: tuple[int, ...] | None = None) -> Stored:
    """Return a tensor that lies in one file, row by row if no strides are given."""
    grid = spec.shape or (1,)
    steps = row_major(grid) if strides is None else strides or (1,)
    blocks = (Block(file, offset, grid, steps, (0,) * len(grid)),) if spec.numel else ()
    return Stored(spec, dtype, grid, blocks)


def flat(spec: TensorSpec, dtype: str, runs: Sequence[tuple[int, int, int]]) -> Stored:
    """Return a tensor that lies in consecutive runs (file, offset in bytes, elements)."""
    blocks, reached = [], 0
    for file, offset, numel in runs:
        if numel:
            blocks.append(Block(file, offset, (numel,), (1,), (reached,)))
        reached += numel
    return Stored(spec, dtype, (spec.numel,), tuple(blocks))


def small(spec: TensorSpec, data: bytes) -> Stored:
    """Return a tensor that lies in no file, of the bytes of its elements."""
    return Stored(spec, spec.dtype, (spec.numel,), (), data)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    strides = [1]
    for size in list(shape)[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[::-1])


@dataclass
class Source:
    """The tensors of a checkpoint, and whatever else is exported or imported. Use it in a `with` statement."""

    path: Path
    description: str
    """Of the format: 'DeepSpeed ZeRO-2 of 4 ranks'."""
    files: list[tuple[Path, int]] = field(default_factory=list)
    """Each file and its size in bytes."""
    tensors: dict[str, Stored] = field(default_factory=dict)
    """By their names in a checkpoint of distrain: `model/NAME`, `optimizer/NAME/KEY`, `ema/NAME`."""
    aliases: dict[str, str] = field(default_factory=dict)
    checksums: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(file, offset, bytes, CRC-32) of tensors, if the format has them."""
    listings: list[tuple[int, int, int, int]] = field(default_factory=list)
    """The same of pickles that list tensors."""
    step: int | None = None
    """Optimizer steps taken; None if unknown."""
    steps: dict[str, int] = field(default_factory=dict)
    """What it records under the usual keys of steps, which may be a count of something else."""
    doubt: str = ""
    """How what is recorded of the step differs; empty if it does not."""
    optimizer: str | None = None
    """Class of the optimizer; None if unknown."""
    optimizer_values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The optimizer's state of each parameter that is not a tensor."""
    optimizer_groups: list[dict[str, Any]] = field(default_factory=list)
    """The settings of its groups, with the names of their parameters as `params`, as far as they are known."""
    optimizer_problem: str = ""
    """Why its state cannot be imported, as it would be that of other parameters; empty if it can."""
    buffers: set[str] | None = None
    """Canonical names of the model's buffers; None if the format does not tell them from parameters."""
    renamed: set[str] = field(default_factory=set)
    """Full names that hooks of the model's state dict take out; those tensors have other names as well."""
    config: str | None = None
    """The text of a transformers model's config.json."""
    companions: dict[str, Path] = field(default_factory=dict)
    """{name: file} of the other files that a transformers model needs."""
    notes: list[str] = field(default_factory=list)
    """How the checkpoint was understood, for the user."""
    skipped: list[str] = field(default_factory=list)
    """What is not imported, and why."""
    wants_optimizer: bool = True
    """Whether to read an optimizer's state that lies beside the model."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}
        self._places: dict[Path, int] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def scratch(self) -> Path:
        """Return a folder that is removed when the source is closed."""
        if self._scratch is None:
            import tempfile

            self._scratch = tempfile.TemporaryDirectory(prefix="distrain-")
        return Path(self._scratch.name)

    def add_file(self, path: Path) -> int:
        """Return the index of a regular file (no symbolic link); raises UserError."""
        if path not in self._places:
            descriptor = open_descriptor(path)
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            self._places[path] = len(self.files)
            self.files.append((path, size))
        return self._places[path]

    def open(self, file: int) -> int:
        """Return a descriptor of the file, whose size must not have changed."""
        return open_descriptor(*self.files[file])

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors, without aliases."""
        return list(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor's spec, whose dtype may be wider than that in the files."""
        return self.tensors[name].spec

    def in_runs(self, name: str) -> bool:
        """Whether the tensor lies in runs of bytes, so that its elements need not be gathered."""
        stored = self.tensors[name]
        return stored.data is None and all(_is_run(block, stored.grid) for block in stored.blocks)

    def parts(self, names: Collection[str]) -> dict[int, Callable[[], list[Part]]]:
        """Return, for each file that these tensors lie in, what lists their parts in the order of the file."""
        found: dict[int, list[Part]] = defaultdict(list)
        for name in names:
            stored, start = self.tensors[name], 0
            size = ITEM_SIZES[stored.dtype]
            for block in sorted(stored.blocks, key=lambda block: block.place):
                found[block.file].append((block.offset, block.numel * size, name, start))
                start += block.numel
        return {file: partial(sorted, parts) for file, parts in found.items()}

    def count_parts(self, names: Iterable[str]) -> int:
        """Return how many there are in all files."""
        return sum(len(self.tensors[name].blocks) for name in names)

    def gather(self, name: str, start: int, numel: int) -> np.ndarray:
        """Return the bytes (uint8) of elements [start, start + numel), as stored; threads may share the source."""
        import numpy as np  # most exports gather nothing

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
        """Copy the block's elements in the box [low, high) of the grid into `part`, which is that box."""
        import numpy as np

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
        # the kernel may drop the pages of a mapped file at any time: they are no memory of this process
        with self._lock:
            if file not in self._maps:
                descriptor = self.open(file)
                try:
                    self._maps[file] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                finally:
                    os.close(descriptor)
            return self._maps[file]

    def number(self, name: str) -> float | int | None:
        """Return the value of a tensor of one element; None for any other tensor."""
        stored = self.tensors[name]
        if stored.spec.numel != 1:
            return None
        raw, size = stored.data, ITEM_SIZES[stored.dtype]
        if raw is None:
            (block,) = stored.blocks
            raw = self._map(block.file)[block.offset : block.offset + size]
        if len(raw) != size:
            raise UserError(f"{self.path}: tensor {name!r} is not whole")
        if stored.dtype == "BF16":  # the upper half of an F32
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        if stored.dtype in FLOATS:  # without NumPy, which most exports need for nothing else
            return float(struct.unpack({"F64": "<d", "F32": "<f", "F16": "<e"}[stored.dtype], raw)[0])
        return int.from_bytes(raw, "little", signed=stored.dtype.startswith("I"))

    def check(self) -> None:
        """Raise UserError unless each element of every tensor is there once, within its file."""
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

    def checks(self, names: Iterable[str] | None = None) -> list[Check]:
        """Return the format's own checksums of what these tensors (None: all) lie in, and of its listings."""
        spans: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for file, *span in sorted(self.checksums):
            spans[file].append((span[0], span[1], span[2]))
        found = set(self.listings)
        for block in (
            block for name in (self.names if names is None else names) for block in self.tensors[name].blocks
        ):
            place = bisect_right(spans[block.file], block.offset, key=lambda span: span[0]) - 1
            if place >= 0 and block.offset < sum(spans[block.file][place][:2]):
                found.add((block.file, *spans[block.file][place]))
        return [Check(*each) for each in sorted(found)]

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare what these tensors (None: all) lie in to the checkpoint's own hashes.

        Raises UserError naming the files.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            checks = self.checks(names)
            if bad := [check for check, same in zip(checks, pool.map(self._holds, checks), strict=True) if not same]:
                raise self.damage(bad)

    def damage(self, bad: Iterable[Check]) -> UserError:
        """Return the error for checks that do not hold."""
        files = sorted({self.files[check.file][0] for check in bad})
        return UserError(
            "\n".join(f"{path}: its bytes are not those that were written: a checksum differs" for path in files)
        )

    def _holds(self, check: Check) -> bool:
        try:
            descriptor = self.open(check.file)
            try:
                hashed = check.begin()
                update_from(hashed, descriptor, check.offset, check.nbytes)
                return check.holds(hashed)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.files[check.file][0]}: {error_reason(error)}") from error

    def close(self) -> None:
        """Close all files, and remove the scratch folder."""
        while self._maps:
            self._maps.popitem()[1].close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def update_from(hashed: Hash, descriptor: int, offset: int, nbytes: int) -> None:
    """Hash bytes of an open file, as many as there are."""
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    while nbytes and (count := os.preadv(descriptor, [buffer[:nbytes]], offset)):
        hashed.update(buffer[:count])
        offset, nbytes = offset + count, nbytes - count
        progress()


def _is_run(block: Block, grid: tuple[int, ...]) -> bool:
    """Whether a block is one run of elements, in its file and in the tensor."""
    expected = 1
    for size, stride in zip(block.shape[::-1], block.strides[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    cut = next((axis for axis, size in enumerate(block.shape) if size != 1), 0)
    return block.shape[cut + 1 :] == grid[cut + 1 :]


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
    """Return how the blocks fail to cover each element of the grid once, or None."""
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
    import numpy as np

    low = np.array([block.place for block in ordered])
    high = low + np.array([block.shape for block in ordered])
    for index in range(len(ordered) - 1):
        apart = (low[index + 1 :] >= high[index]) | (high[index + 1 :] <= low[index])
        if not apart.any(1).all():
            return "parts of it lie over each other"
    return None
