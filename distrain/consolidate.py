"""Turn a checkpoint into the file that others read: one safetensors file, several with an index, or a `.pt`.

The header is computed first, and each piece is then copied to its offset, several at a time and within the kernel where
the dtype is kept: memory is bounded by a few small buffers, whatever the model. Imports no torch, but to write
a `.pt`, which holds the whole model in memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoint.floats import FLOATS, convert
from distrain.checkpoint.format import ITEM_SIZES, TensorSpec, explain, pack_header
from distrain.checkpoint.reading import Reader, open_plain
from distrain.checkpoint.writing import hidden, is_leftover, sync_folder
from distrain.config import UserError, close_names

_DTYPES = {
    "float64": "F64", "fp64": "F64", "f64": "F64", "float32": "F32", "fp32": "F32", "f32": "F32",
    "float16": "F16", "fp16": "F16", "f16": "F16", "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_BUFFER = 1 << 18  # bytes that a thread converts, or copies where the kernel cannot, at a time: stays in its cache
_JOB = 64 << 20  # bytes that a thread copies before it takes the next job
_THREADS = min(8, os.cpu_count() or 1)
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    paths: tuple[Path, ...]
    """The file, or the shards and their index."""
    nbytes: int
    """Bytes of all the tensors."""
    tensors: int
    """Number of tensors, aliases included."""


@dataclass(frozen=True)
class _Output:
    """A tensor to be written: `source` is its name in the checkpoint, `dtype` what it has in the export."""

    source: str
    spec: TensorSpec
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.spec.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class _Span:
    """Bytes that lie together in a file of the checkpoint, and where they go."""

    offset: int
    nbytes: int
    target: int
    output: _Output


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    shards: str | int | None = None,
    ema: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    sync: bool = True,
) -> Exported:
    """Write the model of the checkpoint in folder `checkpoint` to `out`.

    `out` is a `.safetensors` file, a `.pt` or `.pth` file, or a folder, which gets a `model.safetensors`. `shards` is
    the most bytes of one file (a number, or "5GB"): a larger model goes to `model-00001-of-00003.safetensors` and so
    on, beside a `model.safetensors.index.json`, as Hugging Face lays them out. Parameters and buffers have their
    plain names. Tied tensors are written under each of their names, because `load_state_dict(strict=True)` asks for
    all of them. `dtype` (bf16, fp16, fp32, fp64) changes floating-point tensors only, and refuses finite values that
    would become infinite. `ema` takes the moving average instead of the weights. `verify=False` does not hash the
    checkpoint first. `sync=False` does not wait for the disk: safe from a crash of the program, not from one of the
    machine.

    Everything is written under hidden names and renamed at the end, the index last. Raises UserError: a file that is
    there already (unless `overwrite`), a symbolic link, a checkpoint that does not verify, a full disk.
    """
    out = _resolve(Path(out))
    limit = None if shards is None else _parse_size(shards)
    target = None if dtype is None else _parse_dtype(dtype)
    with Reader(checkpoint, verify) as reader:
        outputs = _choose(reader, target, ema)
        groups = _cut(outputs, limit)
        if out.suffix != ".safetensors" and len(groups) > 1:
            raise UserError(f"{out}: only safetensors files come in shards; name it .safetensors or leave shards out")
        paths = _shard_paths(out, len(groups))
        index = [_index_path(out)] if len(groups) > 1 else []
        nbytes = sum(item.nbytes for item in outputs.values())
        present = _make_room(out, overwrite, nbytes)
        write = _write_safetensors if out.suffix == ".safetensors" else _write_pt
        writes = [(path, partial(write, reader, group)) for path, group in zip(paths, groups, strict=True)]
        writes += [(path, partial(_write_index, dict(zip(paths, groups, strict=True)), nbytes)) for path in index]
        # shards of another number would be taken for a part of this export
        _publish(writes, present - {*paths, *index}, sync)
    return Exported((*paths, *index), nbytes, len(outputs))


# --------------------------------------------------------------------------------------------------------------------
# What is written, and where to


def _resolve(out: Path) -> Path:
    if out.suffix in (".safetensors", ".pt", ".pth"):
        return out
    if out.suffix and not out.is_dir():
        raise UserError(
            f"{out}: {out.suffix!r} is not a format of exports; name a .safetensors or .pt file, or a folder"
        )
    return out / "model.safetensors"


def _parse_size(size: str | int) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"shards {size!r} is not a size; write a number of bytes, or '5GB', '500MB', '2GiB'")
    return int(float(match[1]) * unit)


def _parse_dtype(dtype: str) -> str:
    if dtype.lower() not in _DTYPES:
        raise UserError(f"no dtype {dtype!r}; it is one of bf16, fp16, fp32, fp64{close_names(dtype, _DTYPES)}")
    return _DTYPES[dtype.lower()]


def _choose(reader: Reader, dtype: str | None, ema: bool) -> dict[str, _Output]:
    """Return the tensors of the export by their plain names, aliases included."""
    tensors, aliases = reader.manifest.tensors, reader.manifest.aliases
    averaged = {name.removeprefix("ema/") for name in tensors if name.startswith("ema/")}
    if ema and not averaged:
        raise UserError(f"{reader.path} has no moving average of the weights: train.ema was off; leave ema out")
    outputs = {}
    for full in [*tensors, *aliases]:
        if full.startswith("model/"):
            plain, stored = full.removeprefix("model/"), aliases.get(full, full)
            source = f"ema/{stored.removeprefix('model/')}"
            source = source if ema and source in tensors else stored
            spec = tensors[source].spec
            outputs[plain] = _Output(source, spec, dtype if dtype and spec.dtype in FLOATS else spec.dtype)
    if not outputs:
        raise UserError(f"{reader.path} holds no model: none of its tensors is named model/…")
    # wide elements first: each tensor is then aligned to its element
    return dict(sorted(outputs.items(), key=lambda item: (-ITEM_SIZES[item[1].dtype], item[0])))


def _cut(outputs: dict[str, _Output], limit: int | None) -> list[dict[str, _Output]]:
    """Divide the tensors into files of at most `limit` bytes; a larger tensor has a file of its own."""
    groups: list[dict[str, _Output]] = [{}]
    filled = 0
    for name, output in outputs.items():
        if limit is not None and groups[-1] and filled + output.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = output
        filled += output.nbytes
    return groups


def _shard_paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]


def _index_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.safetensors.index.json")


def _make_room(out: Path, overwrite: bool, nbytes: int) -> set[Path]:
    """Make the folder and see that the export can go there; return the files of an earlier export of this name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        entries = list(out.parent.iterdir())
        free = shutil.disk_usage(out.parent).free
        for entry in entries:
            if entry.name.startswith(f".tmp-{out.stem}") and is_leftover(entry):
                entry.unlink()
    except OSError as error:
        raise UserError(f"{out.parent}: {explain(error)}") from error
    shard = re.compile(re.escape(out.stem) + r"-[0-9]{5}-of-[0-9]{5}\.safetensors")
    family = {out, _index_path(out)} if out.suffix == ".safetensors" else {out}
    found = {e for e in entries if e in family or (out.suffix == ".safetensors" and shard.fullmatch(e.name))}
    if odd := sorted(entry for entry in found if entry.is_symlink() or not entry.is_file()):
        raise UserError(
            f"{odd[0]} is a symbolic link or no regular file, and is not written over; remove it or choose another name"
        )
    if found and not overwrite:
        raise UserError(f"{min(found)} exists already; choose another name, or --overwrite it")
    if free < nbytes:
        raise UserError(
            f"{out.parent}: the export has {nbytes:,} bytes, and the disk has {free:,} left; free some space"
        )
    return found


def _publish(writes: Sequence[tuple[Path, Callable[[Path], None]]], stale: set[Path], sync: bool) -> None:
    """Write each file under a hidden name, rename them all once they are complete, and remove the stale ones."""
    hidden_paths = {path: path.with_name(hidden("tmp", path.name)) for path, _ in writes}
    folder = writes[0][0].parent
    try:
        for path, write in writes:
            write(hidden_paths[path])
            if sync:
                with open(hidden_paths[path], "rb") as file:
                    os.fsync(file.fileno())
        for path, _ in writes:
            os.rename(hidden_paths[path], path)
        for path in stale:
            path.unlink()
        if sync:
            sync_folder(folder)
    except OSError as error:
        raise UserError(f"the export to {folder} failed: {explain(error)}") from error
    finally:
        for path in hidden_paths.values():
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Writing


def _write_index(shards: dict[Path, dict[str, _Output]], nbytes: int, path: Path) -> None:
    weight_map = {name: shard.name for shard, group in shards.items() for name in group}
    content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_safetensors(reader: Reader, outputs: dict[str, _Output], path: Path) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, output in outputs.items():
        entries[name] = {
            "dtype": output.dtype, "shape": output.spec.shape, "data_offsets": [reached, reached + output.nbytes]
        }  # fmt: skip
        reached += output.nbytes
    head = pack_header(entries)
    spans: dict[int, list[_Span]] = defaultdict(list)
    target = len(head)
    for output in outputs.values():
        for file, offset, nbytes in reader.ranges(output.source, 0, output.spec.numel):
            size, new_size = ITEM_SIZES[output.spec.dtype], ITEM_SIZES[output.dtype]
            for start in range(0, nbytes, _JOB):  # a multiple of every element's size
                count = min(_JOB, nbytes - start)
                spans[file].append(_Span(offset + start, count, target, output))
                target += count // size * new_size
    jobs = [
        (file, job) for file, found in sorted(spans.items()) for job in _jobs(sorted(found, key=lambda s: s.offset))
    ]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, len(head) + reached)
        os.pwrite(descriptor, head, 0)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda job: _copy_job(reader, job[0], job[1], descriptor), jobs))
    finally:
        os.close(descriptor)


def _jobs(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    job: list[_Span] = []
    filled = 0
    for span in spans:
        if job and filled + span.nbytes > _JOB:
            yield job
            job, filled = [], 0
        job.append(span)
        filled += span.nbytes
    if job:
        yield job


def _copy_job(reader: Reader, file: int, spans: list[_Span], target: int) -> None:
    info = reader.manifest.files[file]
    source = open_plain(reader.path / info.name, info.size)  # its own: jobs of one file run side by side
    buffer = np.empty(_BUFFER, np.uint8)
    try:
        for span in spans:
            if span.output.dtype == span.output.spec.dtype:
                _copy(source, target, span, buffer)
            else:
                _copy_converted(source, target, span, buffer)
    finally:
        os.close(source)


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
            view = buffer[: min(_BUFFER, span.nbytes - done)]
            _read(source, view, span.offset + done)
            _write(target, view, span.target + done)
            count = view.nbytes
        done += count


def _copy_converted(source: int, target: int, span: _Span, buffer: np.ndarray) -> None:
    output, place = span.output, span.target
    for start in range(0, span.nbytes, _BUFFER):
        view = buffer[: min(_BUFFER, span.nbytes - start)]
        _read(source, view, span.offset + start)
        converted = _convert(view, output)
        _write(target, converted, place)
        place += converted.nbytes


def _convert(raw: np.ndarray, output: _Output) -> np.ndarray:
    converted, overflowed = convert(raw, output.spec.dtype, output.dtype)
    if overflowed:
        raise UserError(
            f"{output.source} has values that are too large for {output.dtype} (at least {overflowed}); "
            "export it as bf16 or fp32"
        )
    return converted


def _read(descriptor: int, view: np.ndarray, offset: int) -> None:
    while view.nbytes:
        count = os.preadv(descriptor, [view.data], offset)
        if count == 0:
            raise UserError(f"a file of the checkpoint ended before byte {offset} while it was being exported")
        view, offset = view[count:], offset + count


def _write(descriptor: int, view: np.ndarray, offset: int) -> None:
    while view.nbytes:
        count = os.pwrite(descriptor, view.data, offset)
        view, offset = view[count:], offset + count


def _write_pt(reader: Reader, outputs: dict[str, _Output], path: Path) -> None:
    """Write a state dict for `torch.load`; tied tensors share their memory in it."""
    import torch

    loaded: dict[str, torch.Tensor] = {}
    state = {}
    for name, output in outputs.items():
        if output.source not in loaded:
            raw = reader.read(output.source, 0, output.spec.numel)
            raw = raw if output.dtype == output.spec.dtype else _convert(raw, output)
            dtype = getattr(torch, _TORCH_NAMES[output.dtype])
            flat = torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)
            loaded[output.source] = flat.reshape(output.spec.shape)
        state[name] = loaded[output.source]
    torch.save(state, path)
