"""Copy tensors, wherever they lie, into one new file.

The layout is computed first, and each run of bytes is then copied to its offset, several at a time and within the
kernel where the dtype is kept: memory is bounded by a few small buffers, whatever the model.
"""

from __future__ import annotations

import errno
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoints.dtypes import ITEM_SIZES, in_safetensors
from distrain.checkpoints.export.sources import THREADS, Tensors
from distrain.checkpoints.floats import convert
from distrain.checkpoints.format import TensorSpec, pack_header
from distrain.config import UserError
from distrain.run.heartbeat import progress

BUFFER = 1 << 18  # bytes that a thread converts, or copies where the kernel cannot, at a time: stays in its cache
JOB = 64 << 20  # bytes that a thread copies before it takes the next job
_GATHERED = 1 << 20  # elements of a strided tensor put together at a time, at most
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written."""

    source: str
    """Its name where it comes from."""
    spec: TensorSpec
    stored: str
    """The dtype that its elements have there."""
    dtype: str
    """The dtype that they get."""

    @property
    def nbytes(self) -> int:
        """Bytes in the new file."""
        return self.spec.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes that lie together in a file, and where they go."""

    offset: int
    nbytes: int
    target: int
    output: Output


@dataclass(frozen=True, slots=True)
class _Range:
    """Elements that are to be gathered, and where they go."""

    start: int
    numel: int
    target: int
    output: Output


def write_safetensors(
    tensors: Tensors, outputs: dict[str, Output], path: Path, *, metadata: dict[str, str] | None, as_flat: bool = False
) -> None:
    """Write a new file of the outputs in their order, which must put wide elements first; `as_flat`: without shapes."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    reached = 0
    for name, output in outputs.items():
        dtype, shape = in_safetensors(output.dtype, output.spec.shape)
        shape = (math.prod(shape),) if as_flat else shape
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [reached, reached + output.nbytes]}
        reached += output.nbytes
    head = pack_header(entries)
    starts = accumulate((output.nbytes for output in outputs.values()), initial=len(head))
    with new_file(path, len(head) + reached) as descriptor:
        os.pwrite(descriptor, head, 0)
        copy_tensors(tensors, zip(outputs.values(), starts, strict=False), descriptor)


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[int]:
    """Open a file that must not be there yet, of that size."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, nbytes)
        yield descriptor
    finally:
        os.close(descriptor)


def copy_tensors(tensors: Tensors, placed: Iterable[tuple[Output, int]], descriptor: int) -> None:
    """Write each output's elements, in row-major order, from its offset in the file on."""
    spans: dict[int, list[_Span]] = defaultdict(list)
    ranges: list[_Range] = []
    for output, target in placed:
        size, new_size = ITEM_SIZES[output.stored], ITEM_SIZES[output.dtype]
        runs = tensors.runs(output.source)
        if runs is None:
            for start in range(0, output.spec.numel, _GATHERED):
                count = min(_GATHERED, output.spec.numel - start)
                ranges.append(_Range(start, count, target + start * new_size, output))
            continue
        for file, offset, nbytes in runs:
            for start in range(0, nbytes, JOB):  # a multiple of every element's size
                count = min(JOB, nbytes - start)
                spans[file].append(_Span(offset + start, count, target, output))
                target += count // size * new_size
    jobs = [
        (file, job) for file, found in sorted(spans.items()) for job in _jobs(sorted(found, key=lambda s: s.offset))
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda job: _copy_job(tensors, job[0], job[1], descriptor), jobs))
        list(pool.map(lambda job: _gather_job(tensors, job, descriptor), ranges))


def _jobs(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    job: list[_Span] = []
    filled = 0
    for span in spans:
        if job and filled + span.nbytes > JOB:
            yield job
            job, filled = [], 0
        job.append(span)
        filled += span.nbytes
    if job:
        yield job


def _copy_job(tensors: Tensors, file: int, spans: list[_Span], target: int) -> None:
    source = tensors.open(file)  # its own: jobs of one file run side by side
    buffer = np.empty(BUFFER, np.uint8)
    try:
        for span in spans:
            if span.output.dtype == span.output.stored:
                _copy(source, target, span, buffer)
            else:
                _copy_converted(source, target, span, buffer)
            progress()
    finally:
        os.close(source)


def _gather_job(tensors: Tensors, part: _Range, target: int) -> None:
    step = max(1, BUFFER // ITEM_SIZES[part.output.stored])
    for start in range(0, part.numel, step):
        raw = tensors.gather(part.output.source, part.start + start, min(step, part.numel - start))
        _write(target, converted(raw, part.output), part.target + start * ITEM_SIZES[part.output.dtype])
        progress()


def _copy(source: int, target: int, span: _Span, buffer: np.ndarray) -> None:
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < span.nbytes:
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, span.nbytes - done, span.offset + done, span.target + done)
            except OSError as error:
                if error.errno not in _NO_COPY_IN_KERNEL:
                    raise
                count = 0
            in_kernel = count > 0
        else:
            view = buffer[: min(BUFFER, span.nbytes - done)]
            _read(source, view, span.offset + done)
            _write(target, view, span.target + done)
            count = view.nbytes
        done += count


def _copy_converted(source: int, target: int, span: _Span, buffer: np.ndarray) -> None:
    place = span.target
    for start in range(0, span.nbytes, BUFFER):
        view = buffer[: min(BUFFER, span.nbytes - start)]
        _read(source, view, span.offset + start)
        raw = converted(view, span.output)
        _write(target, raw, place)
        place += raw.nbytes


def converted(raw: np.ndarray, output: Output) -> np.ndarray:
    """Return stored bytes as bytes of the output's dtype; raises UserError for finite values that become infinite."""
    if output.stored == output.dtype:
        return raw
    rounded, overflowed = convert(raw, output.stored, output.dtype)
    if overflowed:
        raise UserError(
            f"{output.source} has values that are too large for {output.dtype} (at least {overflowed}); "
            "export it as bf16 or fp32"
        )
    return rounded


def _read(descriptor: int, view: np.ndarray, offset: int) -> None:
    while view.nbytes:
        count = os.preadv(descriptor, [view.data], offset)
        if count == 0:
            raise UserError(f"a file of the checkpoint ended before byte {offset} while it was being read")
        view, offset = view[count:], offset + count


def _write(descriptor: int, view: np.ndarray, offset: int) -> None:
    while view.nbytes:
        count = os.pwrite(descriptor, view.data, offset)
        view, offset = view[count:], offset + count
