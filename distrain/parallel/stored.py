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
from distrain.parallel.contents import OF_TASK, Contents, contents, hand_back, modules_with_extra_state
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
        return {
            name: encode(value, name, tensors, _device(found) if name == OF_TASK else None)
            for name, value in found.values.items()
        }, tensors
    except Unstorable as error:
        raise UserError(f"the model's state {error}, which a checkpoint cannot hold") from error


def _device(found: Contents) -> torch.device | None:
    """Return where the model is, beside which a task keeps tensors there or on the host."""
    return next((tensor.device for tensor in found.own.values()), None)


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
        advice = "Use the recipe that wrote it, or another --run-dir to start anew."
        if "imported_from" in manifest.scalars:
            advice = (
                "Use a recipe that builds the imported model, or begin a new run from its weights alone, with "
                f"model.weights={reader.path} (which fits their names and types to the model)."
            )
        raise UserError(
            f"{reader.path} holds another model than the recipe's:\n  " + "\n  ".join(problems) + f"\n{advice}"
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
    # a model is used without its task, and a task may begin to keep something, or cease to: see `task_notes`
    needed = {name for name, value in {**found.tensors, **found.values}.items() if value is not None} - {OF_TASK}
    if OF_TASK not in extra:
        encoded = {name: held for name, held in encoded.items() if name != OF_TASK}
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

    def of_task(flat: str, on_host: bool) -> Tensor:
        return read_tensor(reader, f"state/{flat}").to(None if on_host else _device(found))

    def of_module(flat: str, on_host: bool) -> Tensor:
        return read_tensor(reader, f"state/{flat}")

    state: dict[str, Any] = {name: placed(name) for name in tensors}
    return state | {name: decode(held, of_task if name == OF_TASK else of_module) for name, held in encoded.items()}


def task_notes(model: nn.Module, reader: Reader) -> list[str]:
    """Return a note where a checkpoint has a state for the task and this one keeps none, or the reverse."""
    stored = OF_TASK in reader.manifest.scalars.get("model_state", {})
    keeps = OF_TASK in modules_with_extra_state(model)
    if stored and not keeps:
        return ["the stored state of the task is not loaded: it has no load_state_dict"]
    return ["the checkpoint has no state of the task, which keeps the one it has"] if keeps and not stored else []


def load_task_state(model: nn.Module, reader: Reader) -> None:
    """Give the task of a model that is used, not trained, the state that it had; where it keeps one."""
    if OF_TASK in modules_with_extra_state(model):
        hand_back(model, {name: held for name, held in _stored_state(model, reader).items() if name == OF_TASK})
