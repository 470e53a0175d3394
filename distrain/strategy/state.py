"""The state of training as flat ranges of named tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.checkpoint import Piece, Reader, TensorSpec, explain_difference
from distrain.config import UserError
from distrain.optim import Ema

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that is not computed from the recipe and the step."""

    model: nn.Module
    """Unwrapped: its names are the plain ones."""
    optimizer: torch.optim.Optimizer | None
    """Unwrapped; None for a model that is only used."""
    ema: Ema | None

    def __post_init__(self) -> None:
        self._built = [_plain_values(group) for group in self.optimizer.param_groups] if self.optimizer else []

    def tensors(self) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
        """Return {name: (role, tensor)} in a fixed order, and {alias: name} for tensors that have several names."""
        tensors: dict[str, tuple[str, Tensor]] = {}
        aliases: dict[str, str] = {}
        first_name: dict[int, str] = {}
        parameters = {id(parameter) for parameter in self.model.parameters()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"the model's state '{name}' is {type(tensor).__name__}, not a tensor; it cannot be saved"
                )
            if id(tensor) in first_name:
                aliases[f"model/{name}"] = first_name[id(tensor)]
                continue
            first_name[id(tensor)] = f"model/{name}"
            role = "parameter" if id(tensor) in parameters else "buffer"
            tensors[f"model/{name}"] = (role, tensor.detach())
        if self.optimizer is not None:
            for name, parameter in self.model.named_parameters():
                # sorted: a fresh optimizer and a restored one hold them in different orders
                for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{name}/{key}"] = ("optimizer", value)
        if self.ema is not None:
            for name, tensor in self.ema.tensors().items():
                tensors[f"ema/{name}"] = ("ema", tensor)
        return tensors, aliases

    def scalars(self) -> dict[str, Any]:
        """Return the optimizer's values that are not tensors, and the settings of its groups (for the record)."""
        assert self.optimizer is not None, "scalars are those of training"
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        values = {
            names[id(parameter)]: plain
            for parameter, state in self.optimizer.state.items()
            if (plain := {key: value for key, value in state.items() if not isinstance(value, Tensor)})
        }
        groups = [
            _plain_values(group) | {"params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        # what an optimizer itself has changed in its groups is state (some count steps there); the rest is the recipe's
        changed = [
            {key: value for key, value in _plain_values(group).items() if value != built.get(key, ...) and key != "lr"}
            for group, built in zip(self.optimizer.param_groups, self._built, strict=True)
        ]
        return {
            "optimizer": type(self.optimizer).__name__,
            "optimizer_values": values,
            "optimizer_groups": groups,
            "optimizer_group_values": changed,
        }

    def specs(self) -> dict[str, TensorSpec]:
        """Return shape, dtype and role of every full tensor."""
        return {
            name: TensorSpec(tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype], role)
            for name, (role, tensor) in self.tensors()[0].items()
        }

    def pieces(self, rank: int, world_size: int) -> Iterator[Piece]:
        """Yield the flat ranges that `rank` writes: an equal share, in bytes, of the state laid end to end."""
        tensors, _ = self.tensors()
        total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
        low, high = (total * r // world_size for r in (rank, rank + 1))
        offset = 0
        for name, (_, tensor) in tensors.items():
            size = tensor.element_size()
            # both neighbours round a cut inside this tensor up to the same element
            start, stop = (min(max(-(-(cut - offset) // size), 0), tensor.numel()) for cut in (low, high))
            offset += tensor.numel() * size
            if stop > start:
                flat = tensor.reshape(-1)[start:stop]
                yield Piece(name, start, _bytes_of(flat.cpu()), copied=flat.device.type != "cpu")

    def restore(self, reader: Reader) -> None:
        """Fill model, optimizer and average from a checkpoint. Raises UserError naming all that does not fit."""
        tensors = {name: tensor for name, (role, tensor) in self.tensors()[0].items() if role != "optimizer"}
        check_fit(reader, self.specs(), ("parameter", "buffer") if self.ema is None else ("parameter", "buffer", "ema"))
        for name, tensor in tensors.items():
            fill(tensor, reader, name)
        self._restore_optimizer(reader)

    def _restore_optimizer(self, reader: Reader) -> None:
        manifest = reader.manifest
        assert self.optimizer is not None, "only training is restored"
        was, now = manifest.scalars["optimizer"], type(self.optimizer).__name__
        if was != now:
            raise UserError(
                f"{reader.path} holds the state of {was}, the recipe asks for {now}; "
                "use the same optimizer, or start a new run with model.weights set to the exported model"
            )
        states: dict[str, dict[str, Any]] = {}
        for name, spec in manifest.specs.items():
            if spec.role == "optimizer":
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                value = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
                fill(value, reader, name)
                states.setdefault(parameter, {})[key] = value
        for parameter, values in manifest.scalars["optimizer_values"].items():
            states.setdefault(parameter, {}).update(values)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trained = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]
        if lost := sorted(set(states) - set(trained)):
            raise UserError(
                f"{reader.path} holds optimizer state for {len(lost)} parameters that this recipe does not train, "
                f"such as {', '.join(lost[:3])}; set optim.freeze as it was"
            )
        # torch's own loader knows which values belong on the device and which stay on the host
        self.optimizer.load_state_dict(
            {
                "state": {index: states[name] for index, name in enumerate(trained) if name in states},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        for group, changed in zip(self.optimizer.param_groups, manifest.scalars["optimizer_group_values"], strict=True):
            group.update(changed)


def _plain_values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | None)}


def check_fit(reader: Reader, specs: dict[str, TensorSpec], roles: Sequence[str]) -> None:
    """Raise UserError unless the checkpoint's tensors of these roles are exactly those of `specs`."""
    manifest = reader.manifest
    stored = replace(manifest, tensors={name: t for name, t in manifest.tensors.items() if t.spec.role in roles})
    own = {name: spec for name, spec in specs.items() if spec.role in roles}
    if problems := explain_difference(stored, own):
        raise UserError(
            f"{reader.path} holds another model than the recipe's:\n  "
            + "\n  ".join(problems)
            + "\nUse the recipe that wrote it, or another --run-dir to start anew."
        )


def fill(tensor: Tensor, reader: Reader, name: str) -> None:
    """Copy the stored tensor `name` into `tensor`, which has its shape and dtype, on any device."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    reader.read(name, 0, tensor.numel(), _bytes_of(flat))
    with torch.no_grad():
        tensor.copy_(flat.reshape(tensor.shape))


def load_weights(model: nn.Module, reader: Reader, *, averaged: bool) -> None:
    """Fill a model from a checkpoint, with its averaged weights where `averaged`. Raises UserError as `restore`."""
    state = TrainingState(model, None, None)
    check_fit(reader, state.specs(), ("parameter", "buffer"))
    for name, (_, tensor) in state.tensors()[0].items():
        average = name.replace("model/", "ema/", 1)
        fill(tensor, reader, average if averaged and average in reader.manifest.tensors else name)


def _bytes_of(flat: Tensor) -> np.ndarray:
    """Return the memory of a contiguous 1-D host tensor as bytes, without copying."""
    return flat.view(torch.uint8).numpy()
