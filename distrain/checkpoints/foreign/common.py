"""What the modules of all formats share: files of torch.save, names, and JSON values."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.archive import NoArchive, read_archive
from distrain.checkpoints.foreign.pickles import Made, PickleRefused, View
from distrain.checkpoints.foreign.trusted import TRUST, open_in_process
from distrain.checkpoints.format import CheckpointError, TensorSpec, error_reason, parse_json
from distrain.checkpoints.sources import NO_TENSORS, Source, Stored, in_one_file, small
from distrain.system.bounded_json import read_open
from distrain.system.errors import UserError, some
from distrain.system.numbers import a_kind

AVERAGE_COUNT = "n_averaged"
"""The counter of torch's AveragedModel, beside the averages, which have `module.` in their names."""
_MAX_TEXT = 64 << 20  # bytes of an index or a configuration
_TRAINER = "trainer_state.json"
_SCALER = "scaler.pt"
_STATE = re.compile(
    r"random_states_\d+\.pkl|scheduler(_\d+)?\.bin|sampler(_\d+)?\.bin"
    r"|rng_state(_\d+)?\.pth|scheduler\.pt|training_args\.bin"
)
_HARMLESS = re.compile(r".*\.(json|txt|model|md|jinja)|\.gitattributes")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class TorchFile:
    """A file of torch.save, or a part of a file, in a source."""

    def __init__(self, source: Source, path: Path, *, part: tuple[int, int] | None = None, trust: bool = False):
        """Open `path`, or of it the `part` (offset, bytes); raises UserError naming the file.

        A file that holds more than tensors, or is older than torch's archives, is opened in a process of its own, which
        runs the file's code only with `trust`.
        """
        self.source = source
        self.path = path
        self.file = source.add_file(path)
        self._checked: set[str] = set()
        offset, nbytes = part or (0, source.files[self.file][1])
        descriptor = source.open(self.file)
        try:
            if offset < 0 or nbytes < 0 or offset + nbytes > source.files[self.file][1]:
                raise UserError("a part of it would reach beyond its end")
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
        """The saved object."""
        return self.archive.root

    def at(self, view: View) -> int:
        """Return the offset of a tensor's first element in the file, and have its bytes verified."""
        try:
            record = self.archive.record(view)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        if view.storage.key not in self._checked and record.crc32 >= 0:
            self._checked.add(view.storage.key)
            self.source.checksums.append((self.file, record.offset, record.nbytes, record.crc32))
        return record.offset + view.offset * ITEM_SIZES[view.dtype]

    def stored(self, view: View, role: str, dtype: str | None = None) -> Stored:
        """Return the tensor as it lies in the file; `dtype`: the one it is converted to."""
        return in_one_file(
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
    return small(TensorSpec((), "F32", role), struct.pack("<f", value))


def basename(name: Any, path: Path, what: str) -> str:
    """Return the name of a file that a foreign file gives; raises UserError if it may lead elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@+=-]*", name):
        # what is not text may be tuples of tuples that take forever to print
        found = repr(name[:80]) if isinstance(name, str) else a_kind(name)
        raise UserError(f"{path}: {what} is {found}, which is not the name of a file beside it")
    return name


def add_rest(source: Source, folder: Path, used: Iterable[str]) -> None:
    """Add the step that Hugging Face's Trainer records in a folder, and name the files that are not `used`."""
    names = {entry.name for entry in folder.iterdir()} - {*used}
    step = read_json(folder / _TRAINER).get("global_step") if _TRAINER in names else None
    if type(step) is int and 0 <= step < 10**18:
        source.steps["global_step"] = step
    if state := sorted(name for name in names if _STATE.fullmatch(name)):
        source.skipped.append(
            f"random states, schedules and the like, which distrain computes from the step: {some(state)}"
        )
    if _SCALER in names:
        source.skipped.append(f"{_SCALER}: the loss scale of fp16 starts anew")
    if others := sorted(n for n in names - {_SCALER} - {*state} if not _HARMLESS.fullmatch(n)):
        source.skipped.append(f"other files: {some(others)}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises UserError naming it."""
    try:
        with open(open_descriptor(path), "rb") as file:
            return parse_json(read_open(file, _MAX_TEXT))
    except (CheckpointError, ValueError) as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from error
    except OSError as error:
        raise UserError(f"{path}: {error_reason(error)}") from error


def without_wrappers(name: str) -> str:
    """Return a name without the parts that torch.compile and FSDP add."""
    return _WRAPPERS.sub("", name)


def canonical_names(source: Source, names: Iterable[str]) -> dict[str, str]:
    """Return {name: canonical name} without the parts that wrappers add, which are noted."""
    names = list(names)
    found = {name: without_wrappers(name) for name in names}
    removed = ["those of torch.compile and FSDP wrappers"] if any(found[name] != name for name in names) else []
    if names and all(name.startswith("module.") for name in found.values()):
        found = {name: short.removeprefix("module.") for name, short in found.items()}
        removed.insert(0, "module.")
    if len(set(found.values())) != len(names):
        raise UserError(f"{source.path}: names differ only by the parts that wrappers add, such as {names[0]!r}")
    note = f"removed from the names: {' and '.join(removed)}"
    if removed and note not in source.notes:
        source.notes.append(note)
    return found


def add_state_dict(source: Source, file: TorchFile, state: Mapping[Any, Any], prefix: str = "model") -> None:
    """Add the tensors of a state dict; those that share their memory become aliases of the first."""
    if prefix == "ema":
        state = {name: value for name, value in state.items() if name != AVERAGE_COUNT}
    tensors = {name: value for name, value in state.items() if isinstance(value, View)}
    odd = [str(name) for name, value in state.items() if not isinstance(value, View)]
    if not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{file.path}: its tensors go by numbers, not by names; expected a state dict")
    if odd:
        source.skipped.append(f"{len(odd)} {NO_TENSORS}: {some(odd)}")
    canonical = canonical_names(source, tensors)
    first: dict[View, str] = {}
    for name, view in tensors.items():
        full = f"{prefix}/{canonical[name]}"
        # tensors without elements share nothing
        if all(view.shape) and first.setdefault(view, full) != full:
            source.aliases[full] = first[view]
        else:
            source.tensors[full] = file.stored(view, "parameter" if prefix == "model" else prefix)


class Budget:
    """How many list items may still be read: a list that a pickle refers to repeatedly is read each time."""

    def __init__(self, values: int = 100_000):
        self.left = values


def json_value(value: Any, budget: Budget) -> Any:
    """Return a value as JSON keeps it, with lists for tuples; raises TypeError for any other type.

    Raises UserError if its lists exceed the budget.
    """
    if isinstance(value, tuple | list):
        budget.left -= len(value)
        if budget.left < 0:
            raise UserError("the optimizer's values unfold to more numbers than any optimizer keeps")
        return [json_value(item, budget) for item in value]
    if isinstance(value, str | bool | int | None) or (isinstance(value, float) and value - value == 0):
        return value
    raise TypeError(value.kind if isinstance(value, Made) else type(value).__name__)
