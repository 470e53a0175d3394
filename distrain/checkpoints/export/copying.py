"""Copies tensors, wherever they lie, into one new file.

The layout is computed first. Each run of bytes is then copied to its offset, several at a time and within the kernel if
the dtype stays: memory is bounded by a few small buffers, whatever the model.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from distrain.checkpoints.dtypes import ITEM_SIZES, in_safetensors
from distrain.checkpoints.floats import convert
from distrain.checkpoints.headers import pack_header
from distrain.checkpoints.sources import THREADS, Source, Stored
from distrain.run.heartbeat import progress
from distrain.system.errors import UserError

BUFFER = 1 << 18  # bytes that a thread converts, or copies without the kernel, at a time: stays in its cache
JOB = 64 << 20  # bytes that a thread copies before it takes the next job
_GATHERED = 1 << 20  # elements of a strided tensor in one job, at most
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written."""

    name: str
    """In the source."""
    stored: Stored
    dtype: str
    """In the new file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the new file."""
        return self.stored.spec.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of an output that is copied at once."""

    output: Output
    file: int | None
    """None: the elements are gathered."""
    offset: int
    """In the file, or where elements are gathered in the tensor, in bytes as stored."""
    nbytes: int
    target: int
    """Offset in the new file."""


def write_safetensors(
    source: Source, outputs: dict[str, Output], path: Path, *, metadata: dict[str, str] | None, flat: bool = False
) -> None:
    """Write a new file of the outputs in their order, which must put wide elements first; `flat`: as 1-D tensors."""
    entries = {name: in_safetensors(output.dtype, output.stored.spec.shape) for name, output in outputs.items()}
    if flat:
        entries = {name: (dtype, (math.prod(shape),)) for name, (dtype, shape) in entries.items()}
    header = pack_header(entries, metadata)
    *starts, end = accumulate((output.nbytes for output in outputs.values()), initial=len(header))
    with new_file(path, end) as descriptor:
        os.pwrite(descriptor, header, 0)
        copy_tensors(source, zip(outputs.values(), starts, strict=True), descriptor)


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[int]:
    """Open a file of that size that must not exist yet."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, nbytes)
        yield descriptor
    finally:
        os.close(descriptor)


def copy_tensors(source: Source, placed: Iterable[tuple[Output, int]], descriptor: int) -> None:
    """Write each output's elements, in row-major order, from its offset in the file on."""
    spans = [span for output, target in placed for span in _spans(source, output, target)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda job: _copy_job(source, job, descriptor), _jobs(spans)))


def _spans(source: Source, output: Output, target: int) -> Iterator[_Span]:
    size, new_size = ITEM_SIZES[output.stored.dtype], ITEM_SIZES[output.dtype]
    runs = source.runs(output.name)
    length = JOB  # a multiple of every element's size
    if runs is None:
        runs, length = [(None, 0, output.stored.spec.numel * size)], _GATHERED * size
    for file, offset, nbytes in runs:
        for start in range(0, nbytes, length):
            count = min(length, nbytes - start)
            yield _Span(output, file, offset + start, count, target)
            target += count // size * new_size


def _jobs(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Group what lies in one file, in its order."""
    yield from ([span] for span in spans if span.file is None)
    job: list[_Span] = []
    filled = 0
    for span in sorted((s for s in spans if s.file is not None), key=lambda s: (s.file, s.offset)):
        if job and (job[0].file != span.file or filled + span.nbytes > JOB):
            yield job
            job, filled = [], 0
        job.append(span)
        filled += span.nbytes
    if job:
        yield job


def _copy_job(source: Source, spans: list[_Span], target: int) -> None:
    file = spans[0].file
    descriptor = source.open(file) if file is not None else -1  # its own: jobs of one file run side by side
    buffer = np.empty(BUFFER, np.uint8)
    try:
        for span in spans:
            _copy(source, descriptor, target, span, buffer)
            progress()
    finally:
        if file is not None:
            os.close(descriptor)


def _copy(source: Source, descriptor: int, target: int, span: _Span, buffer: np.ndarray) -> None:
    output = span.output
    size, new_size = ITEM_SIZES[output.stored.dtype], ITEM_SIZES[output.dtype]
    in_kernel = span.file is not None and output.stored.dtype == output.dtype
    done = _copy_in_kernel(descriptor, target, span) if in_kernel else 0
    while done < span.nbytes:
        count, offset = min(BUFFER, span.nbytes - done), span.offset + done
        if span.file is None:
            raw = source.gather(output.name, offset // size, count // size)
        else:
            raw = buffer[:count]
            _read(descriptor, raw, offset)
        _write(target, _converted(raw, output), span.target + done // size * new_size)
        done += count


def _copy_in_kernel(descriptor: int, target: int, span: _Span) -> int:
    """Return how many bytes were copied: fewer than all if the kernel or the file systems cannot."""
    done = 0
    while done < span.nbytes and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(descriptor, target, span.nbytes - done, span.offset + done, span.target + done)
        except OSError as error:
            if error.errno not in _NO_COPY_IN_KERNEL:
                raise
            break
        if not count:
            break
        done += count
    return done


def _converted(raw: np.ndarray, output: Output) -> np.ndarray:
    """Return stored bytes in the output's dtype; raises UserError for finite values that become infinite."""
    if output.stored.dtype == output.dtype:
        return raw
    rounded, overflowed = convert(raw, output.stored.dtype, output.dtype)
    if overflowed:
        raise UserError(
            f"{output.name} has values that are too large for {output.dtype} (at least {overflowed}); "
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
