"""Weights to start from, out of a local file or a folder."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distrain.checkpoint.dtypes import DTYPES
from distrain.config import UserError
from distrain.consolidate import open_tensors
from distrain.networks.deferred import Deferred


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded from a file of weights, and what was not."""

    path: Path
    loaded: tuple[str, ...]
    """The model's tensors that were found, without tied aliases."""
    missing: tuple[str, ...]
    """The model's tensors that the file does not hold."""
    unexpected: tuple[str, ...]
    """The file's tensors that the model does not have."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors of another shape: (found, expected)."""

    @property
    def problems(self) -> list[str]:
        """Return one line for each way in which the file and the model differ."""
        lines = []
        if self.missing:
            lines.append(f"not in the file: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"not in the model: {_some(self.unexpected)}")
        if self.mismatched:
            shapes = (f"{name} (found {found}, expected {want})" for name, (found, want) in self.mismatched.items())
            lines.append(f"of another shape: {_some(shapes)}")
        return lines

    def __str__(self) -> str:
        count = len(self.loaded)
        return "; ".join([f"loaded {count} tensor{'s' * (count != 1)} from {self.path}", *self.problems])


def _some(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} ({len(names)})"


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
    """Copy the tensors of a .safetensors, .pt or .pth file into the model, by name.

    `module.` and `_orig_mod.`, which wrappers put into names, are taken off. `strict`: the file must hold exactly the
    model's tensors (one name of tied ones is enough), otherwise UserError; not strict: what agrees in name and shape is
    loaded and the rest is in the report, and only a file of which nothing fits is an error.
    """
    expected, found, report = _compare(model, path, strict)
    for name in _fitting(expected, found):
        expected[name].copy_(found[name].read())
    return report


@torch.no_grad()
def defer_weights(deferred: Deferred, path: Path, *, strict: bool = True) -> WeightsReport:
    """Do the same as `load_weights` for a model without its weights: they are read one by one, when they are asked for.

    The file must stay as it is until then. Buffers are loaded at once.
    """
    expected, found, report = _compare(deferred.model, path, strict)
    names = {id(parameter): name for name, parameter in deferred.model.named_parameters()}
    for name in _fitting(expected, found):
        tensor = expected[name]
        if id(tensor) in names:
            deferred.replace(names[id(tensor)], _reader(found[name], tensor))
        else:
            tensor.copy_(found[name].read())
    return report


def _reader(stored: _Stored, parameter: Tensor) -> Callable[[], Tensor]:
    size, stride, dtype = parameter.size(), parameter.stride(), parameter.dtype

    def read() -> Tensor:
        with torch.no_grad():
            return torch.empty_strided(size, stride, dtype=dtype, device="cpu").copy_(stored.read())

    return read


def _fitting(expected: Mapping[str, Tensor], found: Mapping[str, _Stored]) -> list[str]:
    return [name for name, stored in found.items() if name in expected and stored.shape == tuple(expected[name].shape)]


def _compare(model: nn.Module, path: Path, strict: bool) -> tuple[dict[str, Tensor], dict[str, _Stored], WeightsReport]:
    """Return the model's tensors, the file's by the model's names, and how they differ; raises UserError."""
    expected = model.state_dict(keep_vars=True)
    found: dict[str, _Stored] = {}
    for name, stored in stored_tensors(path).items():
        plain = _plain(name, expected)
        if plain in found:
            raise UserError(
                f"model.weights: {path} has two tensors that are {plain!r} without what wrappers put into names, one "
                f"of them {name!r}; expected one of each"
            )
        found[plain] = stored
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
    )
    if strict and report.problems:
        raise UserError(
            f"model.weights: {path} does not fit the model\n  "
            + "\n  ".join(report.problems)
            + "\n  weights_strict: false loads what fits"
        )
    if not fitting:
        raise UserError(f"model.weights: no tensor of {path} fits the model\n  " + "\n  ".join(report.problems))
    return expected, found, report


def _plain(name: str, expected: Mapping[str, Any]) -> str:
    while name not in expected:
        shorter = name.replace("_orig_mod.", "").removeprefix("module.")
        if shorter == name:
            break
        name = shorter
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a stored one; raises UserError where the installed torch has none."""
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
    read: Callable[[], Tensor]
    """Returns it; to be copied from, not to be written to."""


def stored_tensors(path: Path) -> dict[str, _Stored]:
    """Return the tensors of a .safetensors file, or of a .pt or .pth state dict, by name; runs no code from it.

    A folder is a run, a checkpoint, or anything that `distrain checkpoint import` reads. Nothing is read yet but what
    there is; only a .pt file in the format before PyTorch 1.6 is held in memory.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt", device="cpu")
            return {
                name: _Stored(tuple(file.get_slice(name).get_shape()), functools.partial(file.get_tensor, name))
                for name in file.keys()  # noqa: SIM118 (it is no mapping)
            }
        except SafetensorError as error:
            raise UserError(f"model.weights: {path} is not a sound safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"model.weights: {path} is neither .safetensors nor .pt or .pth")
    try:
        # a file that was written as a zip archive is mapped into memory, so that a tensor is read when it is used;
        # torch does not look at the sums that such a file has of its parts
        if is_zip := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"the sum of {bad} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can end in any
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.weights: {path} was not opened: it is damaged, or it holds Python objects besides tensors, and "
            "opening those would run code. Where you trust it, write its tensors alone to a new file: "
            f"torch.save(model.state_dict(), ...). What was found: {reason}"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    others = (
        [name for name, value in content.items() if not isinstance(value, Tensor)]
        if isinstance(content, Mapping)
        else [type(content).__name__]
    )
    if others:
        raise UserError(
            f"model.weights: {path} is not a state dict: found {_some(map(str, others))}; expected names and tensors, "
            "or such a mapping under 'state_dict', 'model_state_dict' or 'model'"
        )
    return {name: _Stored(tuple(tensor.shape), functools.partial(_same, tensor)) for name, tensor in content.items()}


def _in_folder(path: Path) -> dict[str, _Stored]:
    try:
        tensors = open_tensors(path)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from error
    plain = {name: name for name in tensors.names} | tensors.aliases

    def read(name: str) -> Tensor:
        spec = tensors.spec(name)
        raw = torch.from_numpy(tensors.gather(name, 0, spec.numel).copy())
        return raw.view(torch_dtype(tensors.stored_dtype(name))).reshape(spec.shape)

    return {
        full.removeprefix("model/"): _Stored(tensors.spec(name).shape, functools.partial(read, name))
        for full, name in plain.items()
        if full.startswith("model/")
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor
