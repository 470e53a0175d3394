"""Open a checkpoint that others wrote: which format it is in, and what its tensors are called here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from distrain.checkpoints.export.sources import Source
from distrain.checkpoints.floats import FLOATS
from distrain.checkpoints.foreign import (
    from_accelerate,
    from_deepspeed,
    from_distributed,
    from_safetensors,
    from_torch,
)
from distrain.checkpoints.foreign.common import some
from distrain.checkpoints.format import CheckpointError, explain
from distrain.checkpoints.reading import open_plain
from distrain.config import UserError, close_names

FORMATS = {
    "accelerate": "a folder of Accelerate's save_state, or of Hugging Face's save_pretrained",
    "deepspeed": "a folder of DeepSpeed's save_checkpoint, ZeRO-1, 2 or 3",
    "distributed": "a folder of torch.distributed.checkpoint",
    "safetensors": "a safetensors file, or a folder of such with an index",
    "torch": "a file of torch.save, as Lightning's .ckpt is",
}
COUNTED = "is the optimizer's own count"
BUFFERS = "taken for buffers"
MOST_STEPS = 10**18
_INDEX = ".index.json"
_CHUNK = 1 << 18  # elements compared at a time
_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


@contextmanager
def open_foreign(
    path: Path | str,
    *,
    format: str | None = None,
    trust: bool = False,
    tied: Mapping[str, str] | None = None,
    buffers: Sequence[str] = (),
    optimizer: bool = True,
) -> Iterator[Source]:
    """Open a foreign checkpoint, a file or a folder; reads its listings and none of its tensors.

    `format` is one of `FORMATS`; None finds it out. `trust` lets a process of its own run what is in pickles that hold
    more than tensors. `tied` {alias: name}: a tensor that is the same as another one, which formats that store both
    do not say. `buffers`: patterns of names that are buffers, for formats that do not tell them from parameters.
    `optimizer=False` does not look at an optimizer's state, where the model does not lie in it.
    Raises UserError: what is there is in no known format, damaged, incomplete, or holds what may run.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    path = path.resolve()  # the user named it; what it contains may not lead elsewhere
    found = format or detect(path)
    if found not in FORMATS:
        raise UserError(f"no format {found!r}; it is one of {', '.join(FORMATS)}{close_names(found, FORMATS)}")
    if trust and found in ("safetensors", "distributed"):
        raise UserError(f"{path}: --trust changes nothing for {FORMATS[found]}: nothing in it is run; leave it out")
    source = Source(path, FORMATS[found].partition(",")[0], wants_optimizer=optimizer)
    try:
        with _in_words(path, FORMATS[found]):
            _fill(source, found, trust)
            _tie(source, tied or {})
            _name_buffers(source, buffers)
            source.check()
            if source.step is None:
                _count_steps(source)
        yield source
    except (CheckpointError, OSError) as error:
        raise UserError(f"{path}: {explain(error)}") from error
    finally:
        source.close()


def detect(path: Path) -> str:
    """Return the format of what is at `path`, from what it contains; raises UserError."""
    try:
        with _in_words(path, "a checkpoint that is known here"):
            return _detect(path)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{path}: {explain(error)}") from error


@contextmanager
def _in_words(path: Path, expected: str) -> Iterator[None]:
    """Say of a file that it is damaged where what is in it is of other kinds than its format knows."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
        raise UserError(f"{path} is damaged, or not {expected} ({reason})") from error


def _detect(path: Path) -> str:
    if path.is_file():
        descriptor = open_plain(path)
        start = os.pread(descriptor, 9, 0)
        os.close(descriptor)
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            return "torch"
        if start[8:] == b"{":
            return "safetensors"
        if path.name.endswith(_INDEX):
            files = from_safetensors.weight_map(path)
            return "safetensors" if all(name.endswith(".safetensors") for name in files) else "torch"
        raise UserError(f"{path} is neither a safetensors file nor one of torch.save; expected {_expected()}")
    if (path / from_distributed.METADATA).exists():
        return "distributed"
    if from_deepspeed.is_folder(path):
        return "deepspeed"
    if from_accelerate.is_folder(path):
        return "accelerate"
    inside = sorted(entry.name for entry in path.iterdir())
    if sum(name.endswith(".safetensors") for name in inside) == 1:
        return "safetensors"
    if len(_torch_files(path)) == 1:
        return "torch"
    shown = f"it holds {', '.join(inside[:5])}" if inside else "it is empty"
    raise UserError(f"{path} is no checkpoint that is known here: {shown}; expected {_expected()}")


def _torch_files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.suffix in (".ckpt", ".pt", ".pth", ".bin"))


def _expected() -> str:
    return "; ".join(FORMATS.values())


def _fill(source: Source, format: str, trust: bool) -> None:
    path = source.path
    if format in ("accelerate", "deepspeed", "distributed") and not path.is_dir():
        raise UserError(f"{path} is a file; expected {FORMATS[format]}")
    match format:
        case "accelerate":
            from_accelerate.open_folder(source, path, trust=trust)
        case "deepspeed":
            from_deepspeed.open_folder(source, path, trust=trust)
        case "distributed":
            source.what = "torch.distributed.checkpoint"
            from_distributed.open_folder(source, path)
        case "torch":
            files = _torch_files(path) if path.is_dir() else [path]
            if len(files) != 1:
                raise UserError(f"{path} is a folder with {len(files)} of them; name one, {FORMATS[format]}")
            if path.name.endswith(_INDEX):
                from_torch.open_indexed(source, path, trust=trust)
            else:
                from_torch.open_file(source, files[0], trust=trust)
        case "safetensors" if path.name.endswith(_INDEX):
            from_safetensors.open_indexed(source, path)
            source.config = from_safetensors.read_config(path.parent)
        case "safetensors" if path.is_file():
            from_safetensors.open_file(source, path)
        case "safetensors":
            index = path / from_safetensors.INDEX
            if index.exists():
                from_safetensors.open_indexed(source, index)
            else:
                files = sorted(path.glob("*.safetensors"))
                if len(files) != 1:
                    raise UserError(f"{path}: {len(files)} safetensors files and no {index.name}; name one of them")
                from_safetensors.open_file(source, files[0])
            source.config = from_safetensors.read_config(path)


def _tie(source: Source, tied: Mapping[str, str]) -> None:
    for alias, name in tied.items():
        one, other = f"model/{alias}", f"model/{name}"
        for full in (one, other):
            if full not in source.tensors:
                plain = full.removeprefix("model/")
                names = [n.removeprefix("model/") for n in source.names if n.startswith("model/")]
                raise UserError(f"{source.path} has no tensor {plain!r}{close_names(plain, names)}")
        if not _equal(source, one, other):
            raise UserError(f"{alias} and {name} are not tied: their elements differ")
        del source.tensors[one]
        source.aliases[one] = other
        for full in [n for n in source.names if n == f"ema/{alias}" or n.rpartition("/")[0] == f"optimizer/{alias}"]:
            del source.tensors[full]


def _equal(source: Source, one: str, other: str) -> bool:
    spec = source.spec(one)
    if source.spec(other) != spec or source.stored_dtype(one) != source.stored_dtype(other):
        return False
    return all(
        np.array_equal(source.gather(one, start, count), source.gather(other, start, count))
        for start in range(0, spec.numel, _CHUNK)
        if (count := min(_CHUNK, spec.numel - start))
    )


def _name_buffers(source: Source, patterns: Sequence[str]) -> None:
    """Give buffers their role: by what the format says, by the patterns, or else by what is usually one."""
    usual, found = [], set(source.buffers or ())
    trained = {name.removeprefix("optimizer/").rpartition("/")[0] for name in source.names if name.startswith("opt")}
    for full in source.names:
        plain = full.removeprefix("model/")
        if not full.startswith("model/") or plain in trained:
            continue
        if any(fnmatchcase(plain, pattern) for pattern in patterns):
            found.add(plain)
        elif source.buffers is None:
            floating = source.spec(full).dtype in FLOATS
            if not floating or any(fnmatchcase(plain, pattern) for pattern in _BUFFERS):
                usual.append(plain)
    for pattern in patterns:
        if not any(fnmatchcase(name.removeprefix("model/"), pattern) for name in source.names):
            raise UserError(f"--buffers {pattern!r} matches no tensor of {source.path}")
    for plain in [*found, *usual]:
        stored = source.tensors[f"model/{plain}"]
        source.tensors[f"model/{plain}"] = replace(stored, spec=replace(stored.spec, role="buffer"))
    if usual:
        source.notes.append(f"{BUFFERS}, by name or dtype: {some(sorted(usual))}; --buffers names others")


def _count_steps(source: Source) -> None:
    """Take the step from the optimizer's own count, where all parameters agree on it."""
    counts = {source.number(name) for name in source.names if name.startswith("optimizer/") and name.endswith("/step")}
    kept = [values["step"] for values in source.optimizer_values.values() if "step" in values]
    if all(isinstance(value, int | float) for value in kept):
        counts |= set(kept)
    else:
        counts.add(None)
    count = counts.pop() if len(counts) == 1 else None
    if count is not None and 0 <= count < MOST_STEPS and count == int(count):  # NaN and infinity are below nothing
        source.step = int(count)
        source.notes.append(f"step {source.step} {COUNTED}")
