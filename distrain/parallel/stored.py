"""From the tensors of a checkpoint to those of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import Reader, TensorSpec, explain_difference
from distrain.config import UserError
from distrain.networks.weights import torch_dtype
from distrain.parallel.contents import Contents, contents, hand_back, modules_with_extra_state
from distrain.parallel.nested import Unstorable, decode, encode, stored_dtype, why_unstorable
from distrain.parallel.shards import LocalTensor


def specs_of(held: dict[str, LocalTensor]) -> dict[str, TensorSpec]:
    specs = {}
    for name, each in held.items():
        if (dtype := stored_dtype(each.values)) is None:
            raise UserError(f"{name.partition('/')[2]} {why_unstorable(each.values)}")
        specs[name] = TensorSpec(each.shape, dtype, each.role)
    return specs


def encoded_values(found: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what of a state dict is not a tensor, encoded, and the tensors in it. Raises UserError by name."""
    tensors: dict[str, Tensor] = {}
    try:
        return {name: encode(value, name, tensors) for name, value in found.values.items()}, tensors
    except Unstorable as error:
        raise UserError(f"the model's state {error}, which a checkpoint cannot hold") from error


def check_fit(reader: Reader, specs: dict[str, TensorSpec], roles: Sequence[str]) -> None:
    """Raise UserError unless the checkpoint's tensors of these roles are exactly those of `specs`."""
    manifest = reader.manifest
    # the extra state of modules may have any shape, and was once listed among the buffers
    other = {name for name, spec in specs.items() if spec.role == "state"}
    stored = replace(
        manifest, tensors={n: t for n, t in manifest.tensors.items() if t.spec.role in roles and n not in other}
    )
    own = {name: spec for name, spec in specs.items() if spec.role in roles}
    if problems := explain_difference(stored, own):
        raise UserError(
            f"{reader.path} holds another model than the recipe's:\n  "
            + "\n  ".join(problems)
            + "\nUse the recipe that wrote it, or another --run-dir to start anew."
        )


def without_frozen(reader: Reader, held: dict[str, LocalTensor]) -> dict[str, LocalTensor]:
    """Return what is filled from the checkpoint: all but the frozen parameters that it refers to."""
    frozen = reader.manifest.frozen
    return held if frozen is None else {name: each for name, each in held.items() if name not in frozen.tensors}


def read_tensor(reader: Reader, name: str) -> Tensor:
    """Return a stored tensor, on the host."""
    spec = reader.spec(name)
    flat = torch.empty(spec.numel, dtype=torch_dtype(spec.dtype))
    reader.read(name, 0, spec.numel, flat.view(torch.uint8).numpy())
    return flat.reshape(spec.shape)


def fill(tensor: Tensor, reader: Reader, name: str, start: int = 0) -> None:
    """Copy elements of the stored tensor `name`, from `start` on, into `tensor`, on any device."""
    flat = torch.empty(tensor.numel(), dtype=torch_dtype(reader.spec(name).dtype))
    reader.read(name, start, tensor.numel(), flat.view(torch.uint8).numpy())
    with torch.no_grad():
        tensor.copy_(flat.reshape(tensor.shape))


def fill_all(model: nn.Module, reader: Reader, wanted: Mapping[str, tuple[LocalTensor, str]]) -> None:
    """Fill what a model holds, each from the stored tensor that is named, and give it its state besides."""

    def fill_own() -> None:
        for each, stored in wanted.values():
            fill(each.values, reader, stored, each.start)

    state = _stored_state(model, reader)
    fill_own()
    if state:
        hand_back(model, state)
        if state.keys() - modules_with_extra_state(model).keys():
            fill_own()  # a load_state_dict of the user's own has written into them


def _stored_state(model: nn.Module, reader: Reader) -> dict[str, Any]:
    """Return what is stored of a model besides its own tensors. Raises UserError where it is not what the model has."""
    found, extra = contents(model), modules_with_extra_state(model)
    specs = reader.manifest.specs
    encoded = reader.manifest.scalars.get("model_state", {})
    tensors = [
        name.removeprefix("model/")
        for name, spec in specs.items()
        if name.startswith("model/") and (spec.role == "state" or name.removeprefix("model/") in extra)
    ]
    needed = {name for name, value in {**found.tensors, **found.values}.items() if value is not None}
    stored = {*tensors, *encoded}
    if missing := sorted(needed - stored):
        raise UserError(
            f"{reader.path} holds no {', '.join(missing[:3])}, which the model keeps besides its parameters and "
            "buffers; use the model's code that wrote it"
        )
    if left := sorted(stored - found.tensors.keys() - found.values.keys() - extra.keys()):
        raise UserError(
            f"{reader.path} holds {', '.join(left[:3])}, which the model does not take back; use the model's code that "
            "wrote it"
        )

    def placed(name: str) -> Tensor:
        value, now = read_tensor(reader, f"model/{name}"), found.tensors.get(name)
        return value if now is None else value.to(now.device)

    state: dict[str, Any] = {name: placed(name) for name in tensors}
    return state | {
        name: decode(held, lambda flat, on_host: read_tensor(reader, f"state/{flat}")) for name, held in encoded.items()
    }
