"""Open a checkpoint that others wrote: which format it is in, and what its tensors are called here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from distrain.checkpoints.export.sources import Source
from distrain.checkpoints.floats import FLOATS
from distrain.checkpoints.foreign.common import some
from distrain.checkpoints.format import CheckpointError, explain
from distrain.config import UserError, close_names
from distrain.config.registry import formats

COUNTED = "is the optimizer's own count"
BUFFERS = "taken for buffers"
MOST_STEPS = 10**18
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

    `format` is a name in the registry of formats, or `path/to/file.py:NAME` or `package.module:NAME` of a function
    (source, path, *, trust) that adds to the source; None finds it out. `trust` lets a process of its own run what is
    in pickles that hold more than tensors. `tied` {alias: name}: a tensor that is the same as another one, which
    formats that store both
    do not say. `buffers`: patterns of names that are buffers, for formats that do not tell them from parameters.
    `optimizer=False` does not look at an optimizer's state, where the model does not lie in it.
    Raises UserError: what is there is in no known format, damaged, incomplete, or holds what may run.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    path = path.resolve()  # the user named it; what it contains may not lead elsewhere
    entry = formats.find(format or detect(path))
    expected = entry.about or f"what {entry.name} opens"
    if not callable(entry.value):
        raise UserError(f"--format: {entry.name!r} is {entry.value!r}; expected a function (source, path, *, trust)")
    if trust and not entry.metadata.get("pickles", True):
        raise UserError(f"{path}: --trust changes nothing for {expected}: nothing in it is run; leave it out")
    if entry.registered and entry.metadata.get("folder", True) and not path.is_dir():
        raise UserError(f"{path} is a file; expected {expected}")
    source = Source(path, expected.partition(",")[0], wants_optimizer=optimizer)
    try:
        with _in_words(path, expected):
            entry.value(source, path, trust=trust)
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
    # the more particular formats first: a folder of DeepSpeed's may hold a safetensors file besides
    known = sorted(formats.entries(), key=lambda entry: entry.metadata.get("order", math.inf))
    for entry in known:
        if (found := entry.metadata.get("found")) is not None and found(path):
            return entry.name
    expected = "; ".join(entry.about for entry in formats.entries())
    if path.is_file():
        raise UserError(f"{path} is neither a safetensors file nor one of torch.save; expected {expected}")
    inside = sorted(entry.name for entry in path.iterdir())
    shown = f"it holds {', '.join(inside[:5])}" if inside else "it is empty"
    raise UserError(f"{path} is no checkpoint that is known here: {shown}; expected {expected}")


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
