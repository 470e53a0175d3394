"""Initial weights from a local file or folder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distrain.checkpoints.dtypes import DTYPES
from distrain.checkpoints.export import made_by_hooks, open_tensors
from distrain.checkpoints.foreign.common import AVERAGE_COUNT
from distrain.config import UserError
from distrain.networks.memory import own_tensors
from distrain.system.errors import some

_SCALES = ("_scale", "_scale_inv", ".scale", "_absmax", ".absmax")
"""Ends of the names that trainers give to the scale of a quantised weight, behind that of the weight."""


@dataclass(frozen=True)
class WeightsReport:
    """The loaded, missing and unexpected tensors of a file of weights."""

    path: Path
    loaded: tuple[str, ...]
    """The model's tensors that were found, without tied aliases."""
    missing: tuple[str, ...]
    """The model's tensors that the file does not hold."""
    unexpected: tuple[str, ...]
    """The file's tensors that the model does not have."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors of another shape: (found, expected)."""
    notes: tuple[str, ...] = ()
    """How the file was read, such as the prefix removed from all names."""

    @property
    def problems(self) -> list[str]:
        """Return one line for each way in which the file and the model differ."""
        lines = []
        if self.missing:
            lines.append(f"not in the file: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"not in the model: {_some(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{name} (found {found}, expected {want})" for name, (found, want) in self.mismatched.items()]
            lines.append(f"of another shape: {_some(shapes)}")
        return lines

    def __str__(self) -> str:
        count = len(self.loaded)
        return "; ".join([f"loaded {count} tensor{'s' * (count != 1)} from {self.path}", *self.notes, *self.problems])


def _some(names: Sequence[str]) -> str:
    return f"{some(names, 10)} ({len(names)})"


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return alias -> name for the parameters and buffers that are the same tensor; the name is the first of them."""
    first: dict[int, str] = {}
    aliases = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
    return aliases


@torch.no_grad()
def load_weights(model: nn.Module, path: Path, *, strict: bool = True) -> WeightsReport:
    """Copy the tensors of a file or a folder into the model, by name; see `stored_tensors` for what these may be.

    The prefixes of wrappers (`module.`, `_orig_mod.`) are removed, and any other common prefix (`model.`) if all names
    are the model's without it. `strict`: the file must hold exactly the model's tensors (one name of tied ones is
    enough), otherwise UserError; not strict: tensors that agree in name and shape are loaded, the report lists the
    rest, and only a file without any is an error. Parameters on the meta device stay there.
    """
    expected, found, report = _compare(model, path, strict)
    own, made = _own_first(model, expected, _fitting(expected, found))
    for name in own:
        if not expected[name].is_meta:
            expected[name].copy_(found[name].read())
    _give(model, {name: found[name].read() for name in made})
    return report


def _own_first(model: nn.Module, expected: Mapping[str, Tensor], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of the model's own tensors, and those of what its state dict holds besides."""
    own = {id(tensor) for tensor in own_tensors(model).values()}
    names = list(names)
    return [n for n in names if id(expected[n]) in own], [n for n in names if id(expected[n]) not in own]


def _give(model: nn.Module, made: dict[str, Tensor]) -> None:
    """Load tensors made by hooks and get_extra_state through the model: copying into them has no effect."""
    if made:
        model.load_state_dict({**model.state_dict(), **made})


def _fitting(expected: Mapping[str, Tensor], found: Mapping[str, _Stored]) -> list[str]:
    return [name for name, stored in found.items() if name in expected and stored.shape == tuple(expected[name].shape)]


def _compare(model: nn.Module, path: Path, strict: bool) -> tuple[dict[str, Tensor], dict[str, _Stored], WeightsReport]:
    """Return the model's tensors, the file's by the model's names, and how they differ; raises UserError."""
    state = model.state_dict(keep_vars=True)
    # a hook may omit tensors that a checkpoint holds
    known = {**own_tensors(model), **{name: value for name, value in state.items() if isinstance(value, Tensor)}}
    stored, notes = stored_tensors(path)
    if AVERAGE_COUNT in stored and AVERAGE_COUNT not in known:
        stored = {name: tensor for name, tensor in stored.items() if name != AVERAGE_COUNT}
        notes = [*notes, f"the weights are an average, without its counter {AVERAGE_COUNT}"]
    if known and all(name.startswith("module.") for name in known):  # a wrapper's name, and here the model's own
        stored = {name if name in known else f"module.{name}": tensor for name, tensor in stored.items()}
    prefix = _prefix(stored, known)
    found: dict[str, _Stored] = {}
    for name, tensor in stored.items():
        canonical = _canonical(name.removeprefix(prefix), known)
        if canonical in found:
            raise UserError(
                f"model.weights: {path} has two tensors {canonical!r} without the prefixes of wrappers, one of them "
                f"{name!r}; expected one of each"
            )
        found[canonical] = tensor
    if prefix:
        notes = [*notes, f"removed from the names: {prefix}"]
    expected = {name: each for name, each in known.items() if name in state or name in found}
    fitting = _fitting(expected, found)
    aliases = tied_names(model)
    present = {aliases.get(name, name) for name in found}
    report = WeightsReport(
        path,
        loaded=tuple(name for name in fitting if aliases.get(name) not in fitting),
        missing=tuple(name for name in expected if aliases.get(name, name) not in present),
        unexpected=tuple(name for name in found if name not in expected),
        mismatched={
            name: (stored.shape, tuple(expected[name].shape))
            for name, stored in found.items()
            if name in expected and name not in fitting
        },
        notes=tuple(notes),
    )
    if (strict and report.problems) or not fitting:
        what = f"{path} does not fit the model" if fitting else f"no tensor of {path} fits the model"
        raise UserError("\n  ".join([f"model.weights: {what}", *report.problems, *_advice(report, stored, expected)]))
    if others := _other_numbers(found, expected, fitting, aliases):
        raise UserError("\n  ".join([f"model.weights: {path} holds other numbers than the model's", *others]))
    return expected, found, report


def _other_numbers(
    found: Mapping[str, _Stored], expected: Mapping[str, Tensor], names: Sequence[str], aliases: Mapping[str, str]
) -> list[str]:
    """Return one line for each tensor whose numbers, copied into the model's, would not be those that were meant."""
    lines = []
    for name in names:
        stored, own = found[name], expected[name]
        dtype, first = torch_dtype(stored.dtype), aliases.get(name, name)
        kinds = f"{stored.dtype}, expected {str(own.dtype).removeprefix('torch.')}"
        scales = [f"{name}{end}" for end in _SCALES if f"{name}{end}" in found and f"{name}{end}" not in expected]
        if scales and dtype != own.dtype:
            lines.append(f"{name}: found {kinds}, with its scale in {scales[0]}: it is quantised; write it in 16 bits")
        elif dtype.is_complex and not own.is_complex():
            lines.append(f"{name}: found {kinds}: the imaginary part would be lost")
        elif (
            isinstance(own, nn.Parameter)
            and own.is_floating_point()
            and not (dtype.is_floating_point or dtype.is_complex)
        ):
            lines.append(f"{name}: found {kinds}: whole numbers, as quantised weights are; write it in 16 or 32 bits")
        elif dtype != own.dtype and not (own.is_floating_point() or own.is_complex()):
            values = stored.read()
            if not torch.equal(values.to(own.dtype).to(dtype), values):
                lines.append(f"{name}: found {kinds}: it has numbers that are not of that type")
        elif own.is_floating_point() and dtype.is_floating_point and _largest(dtype) > _largest(own.dtype):
            values = stored.read()
            # torch 2.11 does not ask it of numbers of 8 bits
            if not torch.equal(values.to(own.dtype).float().isfinite(), values.double().isfinite()):
                lines.append(f"{name}: found {kinds}: it has numbers that would be infinite in that type")
        if first != name and first in names and not stored.equals(found[first]):
            lines.append(
                f"{name} and {first} are one tensor in the model and differ in the file: build the model without "
                "tying them, or remove one of them from the file"
            )
    return lines


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def _advice(report: WeightsReport, stored: Mapping[str, _Stored], expected: Mapping[str, Tensor]) -> list[str]:
    """Return advice for a file that does not fit: a line, or none."""
    if report.loaded:
        return ["model.weights_strict: false loads what fits"]
    heads = {head for name in stored for head in itertools.accumulate(name.split(".")[:-1], "{}.{}".format)}
    fitting = {
        f"{head}.": [name for name, tensor in stored.items() if _fits(name, tensor, f"{head}.", expected)]
        for head in sorted(heads)
    }
    prefix, names = max(fitting.items(), key=lambda each: len(each[1]), default=("", []))
    if not names:
        return []
    return [
        f"{len(names)} of its {len(stored)} tensors fit without the prefix {prefix!r}, which is removed only if all "
        "do: write these to a separate file"
    ]


def _fits(name: str, stored: _Stored, prefix: str, expected: Mapping[str, Tensor]) -> bool:
    found = _canonical(name.removeprefix(prefix), expected) if name.startswith(prefix) else ""
    return found in expected and stored.shape == tuple(expected[found].shape)


def _prefix(names: Iterable[str], expected: Mapping[str, Any]) -> str:
    """Return the prefix to remove so that all names are the model's; empty if they are already, or there is none."""
    names, prefix = list(names), ""
    while any(_canonical(name.removeprefix(prefix), expected) not in expected for name in names):
        heads = {name.removeprefix(prefix).partition(".")[::2] for name in names}
        if len({head for head, _ in heads}) != 1 or not all(rest for _, rest in heads):
            return ""
        prefix += f"{next(iter(heads))[0]}."
    return prefix


def _canonical(name: str, expected: Mapping[str, Any]) -> str:
    while name not in expected:
        shorter = name.replace("_orig_mod.", "").removeprefix("module.")
        if shorter == name:
            break
        name = shorter
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a stored one; raises UserError if the installed torch has none."""
    known = DTYPES.get(name)
    found = getattr(torch, known.torch, None) if known is not None else None
    if not isinstance(found, torch.dtype):
        raise UserError(
            f"a tensor is stored as {name}, for which PyTorch {torch.__version__} has no dtype; use a newer PyTorch"
        )
    return found


class _Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    """Returns it, read-only."""

    def equals(self, other: _Stored) -> bool:
        """Whether the numbers are the same."""
        return self is other or (self.dtype == other.dtype and torch.equal(self.read(), other.read()))


def stored_tensors(path: Path) -> tuple[dict[str, _Stored], list[str]]:
    """Return the tensors of a file or a folder by name, and notes on how it was read; runs no code from it.

    It is a run, a checkpoint, or any source of `distrain checkpoint import`: safetensors files, files of torch.save, an
    index of several, folders of other trainers. Does not read the tensors yet. Raises UserError.
    """
    if not path.exists():
        raise UserError(f"model.weights: there is no {'file ' if path.suffix else ''}{path}")
    try:
        tensors, notes = open_tensors(path)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from error
    stored_names = {name: name for name in tensors.names} | tensors.aliases
    stored_names = {name: stored for name, stored in stored_names.items() if name not in tensors.renamed}
    stored_names |= {f"model/{name}": stored for name, stored in made_by_hooks(tensors, ema=False).items()}

    def read(name: str) -> Tensor:
        spec = tensors.spec(name)
        raw = tensors.gather(name, 0, spec.numel)
        raw = raw if raw.flags.writeable else raw.copy()  # torch warns about read-only arrays
        return torch.from_numpy(raw).view(torch_dtype(tensors.tensors[name].dtype)).reshape(spec.shape)

    each = {
        name: _Stored(tensors.spec(name).shape, tensors.tensors[name].dtype, functools.partial(read, name))
        for name in {*stored_names.values()}
    }
    found = {
        full.removeprefix("model/"): each[name] for full, name in stored_names.items() if full.startswith("model/")
    }
    if not found:
        raise UserError(f"model.weights: {path} holds no tensors of a model")
    return found, notes
