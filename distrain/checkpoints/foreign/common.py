"""What the rooms of all formats share: files of torch.save, names, and plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export.archive import NoArchive, read_archive
from distrain.checkpoints.export.pickles import Made, PickleRefused, View
from distrain.checkpoints.export.sources import Source, Stored, small, whole
from distrain.checkpoints.foreign.trusted import TRUST, open_in_process
from distrain.checkpoints.format import CheckpointError, TensorSpec, explain, parse_json
from distrain.checkpoints.reading import open_plain
from distrain.config import UserError
from distrain.system.bounded_json import read_open

AVERAGE_COUNT = "n_averaged"
"""What torch's AveragedModel counts beside the averages themselves, which have `module.` in their names."""
NO_TENSORS = "entries of the state dict that are no tensors"
_MAX_TEXT = 64 << 20  # bytes of an index or a configuration
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class TorchFile:
    """A file of torch.save, or a part of a file, in a source."""

    def __init__(self, source: Source, path: Path, *, part: tuple[int, int] | None = None, trust: bool = False):
        """Open `path`, or of it the `part` (offset, bytes); raises UserError naming the file.

        `trust`: where it holds more than tensors, or is older than torch's archives, a process of its own may run what
        is in it; without it that process runs nothing.
        """
        self.source = source
        self.path = path
        self.file = source.add_file(path)
        self._checked: set[str] = set()
        offset, nbytes = part or (0, source.files[self.file][1])
        descriptor = source.open(self.file)
        try:
            if offset < 0 or nbytes < 0 or offset + nbytes > source.files[self.file][1]:
                raise UserError("a part of it is said to reach beyond its end")
            self.archive = read_archive(descriptor, offset, nbytes)
        except PickleRefused as error:
            if part or not trust:
                advice = "" if part else f". {TRUST}"
                raise UserError(f"{path}: {error}{advice}") from error
            self._open_elsewhere(trust=True)
        except NoArchive as error:
            if part or os.pread(descriptor, 1, 0) != b"\x80":
                raise UserError(f"{path}: {error}; expected a file of torch.save") from error
            self._open_elsewhere(trust=trust)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        finally:
            os.close(descriptor)
        if listing := self.archive.listing:
            source.listings.append((self.file, listing.offset, listing.nbytes, listing.crc32))

    def _open_elsewhere(self, *, trust: bool) -> None:
        tensors, self.archive = open_in_process(self.path, self.source.scratch(), trust=trust)
        self.file = self.source.add_file(tensors)
        self.source.notes.append(f"{self.path.name} was opened by torch itself, in a process of its own")

    @property
    def root(self) -> Any:
        """What was saved."""
        return self.archive.root

    def at(self, view: View) -> int:
        """Return where a tensor's first element lies in the file; its bytes will be verified."""
        try:
            record = self.archive.record(view)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        if view.storage.key not in self._checked and record.crc32 >= 0:
            self._checked.add(view.storage.key)
            self.source.checksums.append((self.file, record.offset, record.nbytes, record.crc32))
        return record.offset + view.offset * ITEM_SIZES[view.dtype]

    def stored(self, view: View, role: str, dtype: str | None = None) -> Stored:
        """Return the tensor as it lies in the file; `dtype`: what it is to become."""
        return whole(
            TensorSpec(view.shape, dtype or view.dtype, role), view.dtype, self.file, self.at(view), view.strides
        )


class FlatParts:
    """One flat tensor whose parts, 1-D each, lie in several files."""

    def __init__(self, what: str, parts: Iterable[tuple[TorchFile, View]]):
        self.what = what
        self.parts: list[tuple[TorchFile, View]] = []
        for file, view in parts:
            numel = view.shape[0] if len(view.shape) == 1 else None
            if numel is None or (numel > 1 and view.strides != (1,)):
                raise UserError(f"{file.path}: {what} is not flat, as DeepSpeed writes it")
            self.parts.append((file, view))

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(view.shape[0] for _, view in self.parts)

    @property
    def dtype(self) -> str:
        """Their dtype."""
        found = {view.dtype for _, view in self.parts}
        if len(found) != 1:
            raise UserError(f"{self.what}: the ranks hold it in several dtypes")
        return found.pop()

    def cut(self, start: int, numel: int) -> list[tuple[int, int, int]]:
        """Return the runs (file, offset in bytes, elements) of [start, start + numel); raises UserError."""
        size, runs, reached = ITEM_SIZES[self.dtype], [], 0
        for file, view in self.parts:
            low, high = max(start, reached), min(start + numel, reached + view.shape[0])
            if low < high:
                runs.append((file.file, file.at(view) + (low - reached) * size, high - low))
            reached += view.shape[0]
        if start + numel > reached:
            raise UserError(f"{self.what} has {reached:,} elements, and {start + numel:,} are needed: it was cut off")
        return runs


def number(value: float | int, role: str = "optimizer") -> Stored:
    """Return a 0-d F32 tensor, as torch's optimizers count steps."""
    return small(TensorSpec((), "F32", role), np.array(value, np.float32))


def basename(name: Any, path: Path, what: str) -> str:
    """Return a file's name that a foreign file gives, if it is a mere name; raises UserError."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@+=-]*", name):
        # what is no text may be a tuple of tuples that takes for ever to be written out
        found = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise UserError(f"{path}: {what} is {found}, which is not the name of a file beside it")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError naming it."""
    try:
        with open(open_plain(path), "rb") as file:
            return parse_json(read_open(file, _MAX_TEXT))
    except (CheckpointError, ValueError) as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from error
    except OSError as error:
        raise UserError(f"{path}: {explain(error)}") from error


def plain_names(source: Source, names: Iterable[str]) -> dict[str, str]:
    """Return {name: plain name} without what wrappers put into names, which is said in the notes."""
    names = list(names)
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    wrapped = any(plain[name] != name for name in names)
    prefixed = bool(names) and all(name.startswith("module.") for name in plain.values())
    if prefixed:
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    if len(set(plain.values())) != len(names):
        raise UserError(f"{source.path}: names differ only by what wrappers put into them, such as {names[0]!r}")
    taken = [*(["module."] if prefixed else []), *(["those of torch.compile and FSDP wrappers"] if wrapped else [])]
    note = f"taken off the names: {' and '.join(taken)}"
    if taken and note not in source.notes:
        source.notes.append(note)
    return plain


def add_state_dict(source: Source, file: TorchFile, state: Mapping[Any, Any], prefix: str = "model") -> None:
    """Add the tensors of a state dict; those that are the same memory become aliases of the first."""
    if prefix == "ema":
        state = {name: value for name, value in state.items() if name != AVERAGE_COUNT}
    tensors = {name: value for name, value in state.items() if isinstance(value, View)}
    odd = [str(name) for name, value in state.items() if not isinstance(value, View)]
    if not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{file.path}: its tensors go by numbers, not by names; expected a state dict")
    if odd:
        source.left.append(f"{len(odd)} {NO_TENSORS}: {some(odd)}")
    plain = plain_names(source, tensors)
    first: dict[View, str] = {}
    for name, view in tensors.items():
        full = f"{prefix}/{plain[name]}"
        # tensors without elements share nothing
        if all(view.shape) and first.setdefault(view, full) != full:
            source.aliases[full] = first[view]
        else:
            source.tensors[full] = file.stored(view, "parameter" if prefix == "model" else prefix)


class Budget:
    """How many values lists may still have: one that a pickle names again and again is written out each time."""

    def __init__(self, values: int = 100_000):
        self.left = values


def plain_value(value: Any, budget: Budget) -> Any:
    """Return a value that JSON keeps, with lists for tuples; raises TypeError for any other.

    Raises UserError where its lists take more than what the budget has left.
    """
    if isinstance(value, tuple | list):
        budget.left -= len(value)
        if budget.left < 0:
            raise UserError("the optimizer's values unfold to more numbers than any optimizer keeps")
        return [plain_value(item, budget) for item in value]
    if isinstance(value, str | bool | int | None) or (isinstance(value, float) and value - value == 0):
        return value
    raise TypeError(value.kind if isinstance(value, Made) else type(value).__name__)


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
