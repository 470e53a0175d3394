"""The state of training as flat ranges of named tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.checkpoint import Piece, Reader, TensorSpec, explain_difference
from distrain.config import UserError
from distrain.optim import CarryOver, Ema, plain_name

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

Carry = Callable[[str, Collection[str]], CarryOver]
"""From the class that left an optimizer's state, and the names in it: what is taken over."""


@dataclass(frozen=True)
class Shard:
    """What a rank holds of one parameter: a range of its elements in row-major order, maybe empty, maybe all."""

    shape: tuple[int, ...]
    """Of the full parameter."""
    start: int
    """Of the range."""
    values: Tensor
    """The range, in the precision that is trained; writing into it is writing the weight."""
    replicated: bool
    """Whether every rank holds all of it."""
    entry: Tensor | None
    """What the optimizer's state is kept under; None for a parameter that is not trained."""
    offset: int = 0
    """Where the range begins in the (flattened, local) tensors of that state."""


def whole(parameter: nn.Parameter) -> Shard:
    """Return the shard of a parameter that every rank holds."""
    entry = parameter if parameter.requires_grad else None
    return Shard(tuple(parameter.shape), 0, parameter.detach(), replicated=True, entry=entry)


@dataclass(frozen=True)
class Held:
    """What this rank holds of one tensor of the state."""

    role: str
    """parameter, buffer, optimizer or ema."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    start: int
    """Of the range that is held, in elements."""
    values: Tensor
    """The range."""
    replicated: bool
    """Whether every rank holds all of it; the ranks then share the writing."""

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self.values.numel() * self.values.element_size()


@dataclass
class TrainingState:
    """What a checkpoint holds: everything that is not computed from the recipe and the step."""

    model: nn.Module
    """Unwrapped: its names are the plain ones."""
    optimizer: torch.optim.Optimizer | None
    """Of torch, unwrapped; None for a model that is only used."""
    ema: Ema | None
    shard: Callable[[nn.Parameter], Shard] = whole
    """Tells what this rank holds of a parameter."""
    groups: list[list[str]] | None = None
    """The names of the parameters in the optimizer's groups, where those hold something else in their place."""
    carry: Carry | None = None
    """Tells what the optimizer takes over from the state of another; None takes over that of its own class alone."""
    stepping: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Gives the context in which the optimizer's groups hold what it trains."""

    def __post_init__(self) -> None:
        self._built = [_plain_values(group) for group in self.optimizer.param_groups] if self.optimizer else []

    def _groups(self) -> list[list[str]]:
        assert self.optimizer is not None
        return self.groups if self.groups is not None else group_names(self.model, self.optimizer)

    # ----------------------------------------------------------------------------------------------------------------
    # What there is

    def held(self) -> dict[str, Held]:
        """Return what this rank holds of every tensor, in a fixed order: the same names on every rank."""
        held: dict[str, Held] = {}
        shards: dict[str, Shard] = {}
        tensors = self.model.state_dict(keep_vars=True)
        parameters = {id(parameter) for parameter in self.model.parameters()}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise UserError(
                    f"the model's state '{name}' is {type(tensor).__name__}, not a tensor; it cannot be saved"
                )
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if id(tensor) in parameters:
                shards[name] = shard = self.shard(tensor)  # type: ignore[arg-type]
                held[f"model/{name}"] = Held("parameter", shard.shape, shard.start, shard.values, shard.replicated)
            else:
                held[f"model/{name}"] = _replicated("buffer", tensor.detach())
        if self.optimizer is not None:
            for name, shard in shards.items():
                held |= {f"optimizer/{name}/{key}": each for key, each in self._kept(shard)}
        if self.ema is not None:
            by_plain_name = {plain_name(name): shard for name, shard in shards.items()}
            for name, average in self.ema.tensors().items():
                of = by_plain_name.get(name)
                held[f"ema/{name}"] = (
                    Held("ema", of.shape, of.start, local(average), of.replicated)
                    if of is not None
                    else _replicated("ema", average)
                )
        return held

    def _kept(self, shard: Shard) -> Iterator[tuple[str, Held]]:
        """Yield what the optimizer keeps of a parameter."""
        assert self.optimizer is not None
        if shard.entry is None:
            return
        # sorted: a fresh optimizer and a restored one hold them in different orders
        for key, value in sorted(self.optimizer.state.get(shard.entry, {}).items()):
            if not isinstance(value, Tensor):
                continue
            if value.shape != shard.entry.shape:
                yield key, _replicated("optimizer", value)
            else:
                own = _range(local(value), shard)
                yield key, Held("optimizer", shard.shape, shard.start, own, shard.replicated)

    def aliases(self) -> dict[str, str]:
        """Return {alias: name} for tensors of the model that have several names."""
        aliases: dict[str, str] = {}
        first_name: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) in first_name:
                aliases[f"model/{name}"] = first_name[id(tensor)]
            else:
                first_name[id(tensor)] = f"model/{name}"
        return aliases

    def specs(self) -> dict[str, TensorSpec]:
        """Return shape, dtype and role of every full tensor."""
        return _specs(self.held())

    def scalars(self) -> dict[str, Any]:
        """Return the optimizer's values that are not tensors, and the settings of its groups (for the record)."""
        assert self.optimizer is not None, "scalars are those of training"
        values: dict[str, Any] = {}
        for name, shard in self._trained().items():
            assert shard.entry is not None
            state = self.optimizer.state.get(shard.entry, {})
            if plain := {key: value for key, value in state.items() if not isinstance(value, Tensor)}:
                values[name] = plain
        groups = [
            _plain_values(group) | {"params": names}
            for group, names in zip(self.optimizer.param_groups, self._groups(), strict=True)
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

    def _trained(self) -> dict[str, Shard]:
        """Return the shards of the parameters that are trained, in the model's order."""
        trained = {name for names in self._groups() for name in names}
        shards = {name: self.shard(p) for name, p in self.model.named_parameters() if name in trained}
        return {name: shard for name, shard in shards.items() if shard.entry is not None}

    # ----------------------------------------------------------------------------------------------------------------
    # To a checkpoint

    def pieces(self, rank: int, world_size: int) -> Iterator[Piece]:
        """Yield the flat ranges that `rank` writes.

        They are its own of what is sharded, and of what every rank holds an equal share, in bytes, of all that laid
        end to end.
        """
        held = self.held()
        total = sum(each.nbytes for each in held.values() if each.replicated)
        low, high = (total * r // world_size for r in (rank, rank + 1))
        offset = 0
        for name, each in held.items():
            start, stop = 0, each.values.numel()
            if each.replicated:
                size = each.values.element_size()
                # both neighbours round a cut inside this tensor up to the same element
                start, stop = (min(max(-(-(cut - offset) // size), 0), stop) for cut in (low, high))
                offset += each.nbytes
            if stop > start:
                flat = each.values.reshape(-1)[start:stop]
                host = flat.cpu().contiguous()
                yield Piece(name, each.start + start, _bytes_of(host), copied=host is not flat)

    # ----------------------------------------------------------------------------------------------------------------
    # From a checkpoint

    def restore(self, reader: Reader) -> list[str]:
        """Fill this rank's part of model, optimizer and average from a checkpoint; returns what is to be said.

        Raises UserError naming all that does not fit. Speaks to no other rank.
        """
        held = {name: each for name, each in self.held().items() if each.role != "optimizer"}
        roles = ("parameter", "buffer") if self.ema is None else ("parameter", "buffer", "ema")
        check_fit(reader, _specs(held), roles)
        for name, each in held.items():
            fill(each.values, reader, name, each.start)
        said = self._restore_optimizer(reader)
        if self.ema is None and any(spec.role == "ema" for spec in reader.manifest.specs.values()):
            said.append("the stored average of the weights is left behind: train.ema is null")
        return said

    def _restore_optimizer(self, reader: Reader) -> list[str]:
        manifest, optimizer = reader.manifest, self.optimizer
        assert optimizer is not None, "only training is restored"
        trained = self._trained()
        stored: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in manifest.specs.items():
            if spec.role == "optimizer":
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                stored.setdefault(parameter, {})[key] = spec
        values: dict[str, dict[str, Any]] = manifest.scalars["optimizer_values"]
        names = {key for kept in (*stored.values(), *values.values()) for key in kept}
        taken, said = self._taken(manifest.scalars["optimizer"], names, reader)
        if lost := sorted((stored.keys() | values.keys()) - trained.keys()):
            raise UserError(
                f"{reader.path} holds optimizer state for {len(lost)} parameters that this recipe does not train, "
                f"such as {', '.join(lost[:3])}; set optim.freeze as it was"
            )
        # a state that has its parameter's shape everywhere is one number for each weight, and is cut as the weights are
        elementwise = {key for specs in stored.values() for key in specs}
        elementwise -= {
            key for name, specs in stored.items() for key, s in specs.items() if s.shape != trained[name].shape
        }
        entries: dict[int, _Entry] = {}
        for name, shard in trained.items():
            assert shard.entry is not None, name
            entry = entries.setdefault(id(shard.entry), _Entry(shard.entry, {}, {}))
            for old, spec in stored.get(name, {}).items():
                if old not in taken:
                    continue
                where, key = f"optimizer/{name}/{old}", taken[old]
                if old in elementwise:
                    if key not in entry.state:
                        entry.state[key] = torch.zeros_like(
                            entry.key.detach(), dtype=_DTYPES[spec.dtype], memory_format=torch.preserve_format
                        )
                    fill(_range(local(entry.state[key]), shard), reader, where, shard.start)
                    continue
                value = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
                fill(value, reader, where)
                entry.take(key, value, name)
            for old, plain in values.get(name, {}).items():
                if old in taken:
                    entry.take(taken[old], plain, name)
        with self.stepping():
            index_of = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
            # torch's own loader knows which values belong on the device and which stay on the host
            optimizer.load_state_dict(
                {
                    "state": {index_of[key]: entry.state for key, entry in entries.items() if entry.state},
                    "param_groups": optimizer.state_dict()["param_groups"],
                }
            )
            # an import from another trainer, whose groups may be others, has none
            if values_of_groups := manifest.scalars["optimizer_group_values"]:
                for group, built, changed in zip(optimizer.param_groups, self._built, values_of_groups, strict=True):
                    # those of later steps are there where a run goes back
                    for key in _plain_values(group).keys() - built.keys() - changed.keys():
                        del group[key]
                    group.update({key: value for key, value in built.items() if key != "lr"} | changed)
        return said

    def _taken(self, was: str, stored: set[str], reader: Reader) -> tuple[dict[str, str], list[str]]:
        """Return the new name of each stored one that is taken over, and what is to be said."""
        if self.carry is not None:
            try:
                carried = self.carry(was, stored)
            except UserError as error:
                raise UserError(f"{reader.path}: {error}") from error
            return carried.keys, list(carried.said)
        if was != (now := type(self.optimizer).__name__):
            raise UserError(
                f"{reader.path} holds the state of {was}, the recipe asks for {now}; "
                "use the same optimizer, or start a new run with model.weights set to the exported model"
            )
        return {key: key for key in stored}, []


@dataclass
class _Entry:
    """The optimizer's state of one of the tensors that it was handed, which may hold several parameters."""

    key: Tensor
    state: dict[str, Any]
    by: dict[str, str]
    """For each value that is one for all parameters here, one that has it."""

    def take(self, key: str, value: Any, parameter: str) -> None:
        """Set a value that holds for the whole tensor; raises UserError where its parameters disagree."""
        if key in self.by and not _same(self.state[key], value):
            raise UserError(
                f"the optimizer's '{key}' is {_shown(self.state[key])} for {self.by[key]} and {_shown(value)} for "
                f"{parameter}, and this strategy keeps one for both; resume with ddp or fsdp2"
            )
        self.state[key], self.by[key] = value, parameter


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _shown(value: Any) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)


def group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _range(values: Tensor, shard: Shard) -> Tensor:
    """Return a view of the elements of `values` that belong to the shard."""
    numel = shard.values.numel()
    if values.numel() == numel:
        return values
    return values.view(-1)[shard.offset : shard.offset + numel]


def _replicated(role: str, tensor: Tensor) -> Held:
    return Held(role, tuple(tensor.shape), 0, tensor, replicated=True)


def _specs(held: dict[str, Held]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(each.shape, _DTYPE_NAMES[each.values.dtype], each.role) for name, each in held.items()}


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


def fill(tensor: Tensor, reader: Reader, name: str, start: int = 0) -> None:
    """Copy elements of the stored tensor `name`, from `start` on, into `tensor` of its dtype, on any device."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    reader.read(name, start, tensor.numel(), _bytes_of(flat))
    with torch.no_grad():
        tensor.copy_(flat.reshape(tensor.shape))


def load_weights(model: nn.Module, reader: Reader, *, averaged: bool) -> None:
    """Fill a model from a checkpoint, with its averaged weights where `averaged`. Raises UserError as `restore`."""
    held = TrainingState(model, None, None).held()
    check_fit(reader, _specs(held), ("parameter", "buffer"))
    for name, each in held.items():
        average = name.replace("model/", "ema/", 1)
        fill(each.values, reader, average if averaged and average in reader.manifest.tensors else name)


def _bytes_of(flat: Tensor) -> np.ndarray:
    """Return the memory of a contiguous 1-D host tensor as bytes, without copying."""
    return flat.view(torch.uint8).numpy()
