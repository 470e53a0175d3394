"""What an optimizer keeps, as a checkpoint holds it, and as it is put together again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.memory import local
from distrain.parallel.nested import Unstorable, decode, encode, equal, is_plain
from distrain.parallel.parameter_writes import replaced
from distrain.parallel.shards import LocalTensor, Shard, range_of, replicated
from distrain.system.numbers import a_kind


@dataclass
class Kept:
    """What an optimizer keeps, as a checkpoint holds it."""

    held: dict[str, LocalTensor] = field(default_factory=dict)
    """All of its tensors."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Numbers, texts and None of each parameter."""
    nested: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Lists, dicts and whatever else there is of each parameter, encoded."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Numbers, texts and None of each group that are not as they were built."""
    nested_groups: list[dict[str, Any]] = field(default_factory=list)
    """The same of other values, encoded."""
    others: dict[str, Any] = field(default_factory=dict)
    """What is kept under keys that are no parameters, encoded."""

    def add(self, name: str, shard: Shard, state: Mapping[Any, Any]) -> None:
        """Add the state of a parameter; raises Unstorable."""
        assert shard.entry is not None
        found: dict[str, Tensor] = {}
        values, nested = {}, {}
        # sorted: a fresh optimizer and a restored one hold them in different orders
        for key, value in sorted(state.items(), key=lambda item: str(item[0])):
            if type(key) is not str:
                raise Unstorable(f"the key {str(key)[:60]} is {a_kind(key)}, where text is expected")
            if is_plain(value):
                values[key] = value
            elif isinstance(value, Tensor) and "/" not in key:
                encode(value, key, found)
            else:
                nested[key] = encode(value, key, found, shard.entry.device)
        for key, value in found.items():
            self.held[f"optimizer/{name}/{key}"] = _of_state(key, value, shard)
        if values:
            self.values[name] = values
        if nested:
            self.nested[name] = nested

    def encode(self, into: dict[str, Any], key: str, value: Any, prefix: str, problems: list[str]) -> None:
        """Encode a value that belongs to no single parameter."""
        found: dict[str, Tensor] = {}
        try:
            encoded = encode(value, key, found)
            if sharded := [name for name, tensor in found.items() if hasattr(tensor, "to_local")]:
                raise Unstorable(f"{sharded[0]} is sharded, and belongs to no parameter; use ddp")
        except Unstorable as error:
            problems.append(f"{error}, in {prefix.replace('optimizer-group/', 'group ').replace('optimizer-', '')}")
            return
        into[key] = encoded
        self.held |= {f"{prefix}/{name}": replicated("optimizer", tensor) for name, tensor in found.items()}


def _of_state(key: str, value: Tensor, shard: Shard) -> LocalTensor:
    """Return what this rank holds of a tensor that the optimizer keeps for a parameter; raises Unstorable."""
    assert shard.entry is not None
    placements = getattr(value, "placements", None)
    if value.shape != shard.entry.shape:
        if placements is not None and not all(each.is_replicate() for each in placements):
            raise Unstorable(f"{key} is sharded otherwise than its parameter")
        return replicated("optimizer", local(value))
    if placements != getattr(shard.entry, "placements", None):
        raise Unstorable(f"{key} has its parameter's shape and is not sharded as it is")
    return LocalTensor("optimizer", shard.shape, shard.start, range_of(local(value), shard), shard.replicated)


@dataclass
class Entry:
    """The optimizer's state of one of the tensors that it was handed, which may hold several parameters."""

    key: Tensor
    state: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    """The tensors within lists, dicts and the like."""
    nested: dict[str, Any] = field(default_factory=dict)
    """These, encoded."""
    by: dict[tuple[int, str], str] = field(default_factory=dict)
    """For each value that is one for all parameters here, one that has it."""

    def take(self, into: dict[str, Any], key: str, value: Any, parameter: str) -> None:
        """Set a value that holds for the whole tensor; raises UserError where its parameters disagree."""
        known = (id(into), key)
        if known in self.by and not equal(into[key], value):
            raise UserError(
                f"the optimizer's '{key}' is {_shown(into[key])} for {self.by[known]} and {_shown(value)} for "
                f"{parameter}, and this strategy keeps one for both; resume with ddp or fsdp2"
            )
        into[key], self.by[known] = value, parameter

    def put_together(self) -> None:
        """Make lists, dicts and the like of what was stored."""

        def inner(name: str, on_host: bool) -> Tensor:
            value: Tensor = self.inner[name]
            return value if on_host else value.to(self.key.device)

        self.state |= {key: decode(held, inner) for key, held in self.nested.items()}

    def make_exact(self, loaded: dict[Any, Any]) -> None:
        """Undo what torch's loader does besides: it casts what is kept in another dtype than the parameter's."""
        for key in self.state.keys() & loaded.keys():
            value = self.state[key]
            if not isinstance(value, Tensor):
                # torch's own make a tensor of a number of steps, as those before 1.12 kept it
                if not (key == "step" and isinstance(loaded[key], Tensor)):
                    loaded[key] = value
            elif isinstance(loaded[key], Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _shown(value: Any) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)


def group_names(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def check_trained(model: nn.Module, optimizer: Any, entries: Mapping[int, str]) -> None:
    """Raise UserError where the optimizer was handed Parameters that are no longer the model's.

    `entries`: the names of the model's parameters by the ids of what the optimizer is to hold of them.
    """
    handed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    new = [name for key, name in entries.items() if key not in handed and parameters[name].requires_grad]
    if handed <= entries.keys() or not new:
        return
    raise replaced(new)


def state_of(optimizer: Any) -> dict[Any, Any]:
    """Return its state: by the tensors that it was handed, and by keys of its own."""
    state: dict[Any, Any] = optimizer.state
    return state


def stated_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the groups as its `load_state_dict` takes them."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return groups
    for group in groups:
        indices = group["params"]
        # torch looks each parameter's index up in each group: in a list that takes time that grows with its square
        if indices and indices == list(range(indices[0], indices[0] + len(indices))):
            group["params"] = range(indices[0], indices[0] + len(indices))
    return groups


def of_part(name: str, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one of several optimizers keeps under keys of its own, of all that they keep so."""
    prefix = f"{name}/" if name else ""
    return {key.removeprefix(prefix): value for key, value in others.items() if key.startswith(prefix)}


def load_state(optimizer: torch.optim.Optimizer, entries: Mapping[int, Entry], others: Mapping[str, Any]) -> None:
    """Have an optimizer load its part of `entries`, by the ids of its tensors, and what it keeps under other keys."""
    index_of = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    # torch's own loader knows which values belong on the device and which stay on the host
    state: dict[Any, Any] = {index_of[key]: entry.state for key, entry in entries.items() if key in index_of}
    with warnings.catch_warnings():
        # it casts to the parameters' dtype, which `make_exact` undoes
        warnings.filterwarnings("ignore", message="Casting complex values to real")
        optimizer.load_state_dict({"state": state | dict(others), "param_groups": stated_groups(optimizer)})


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings, as they will be while training changes them."""
    return {
        key: copy.deepcopy(value.detach() if isinstance(value, Tensor) else value)
        for key, value in group.items()
        if key != "params"
    }


def unlike_stated(
    optimizer: torch.optim.Optimizer, stepping: Callable[[], AbstractContextManager[Any]]
) -> Iterator[str]:
    """Yield how the optimizer's own state_dict differs from the state that it keeps."""
    cure = "a checkpoint holds optimizer.state and param_groups: keep it there, under the same names"
    with stepping():
        try:
            stated = optimizer.state_dict()
        except Exception as error:  # the user's code
            yield f"its state_dict() failed: {type(error).__name__}: {error}"
            return
        index_of = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    if not {"state", "param_groups"} <= stated.keys():
        yield f"its state_dict() has {', '.join(map(str, stated))}, and not state and param_groups; {cure}"
        return
    if further := stated.keys() - {"state", "param_groups"}:
        yield f"its state_dict() has {', '.join(sorted(map(str, further)))} besides state and param_groups; {cure}"
    for key, value in state_of(optimizer).items():
        place = index_of.get(id(key)) if isinstance(key, Tensor) else key
        other = stated["state"].get(place, {})
        if other is value or place is None or not isinstance(value, Mapping):
            continue
        names = value.keys() ^ other.keys()
        names |= {k for k in value.keys() & other.keys() if other[k] is not value[k] and not equal(other[k], value[k])}
        if names:
            yield f"its state_dict() has {', '.join(sorted(map(str, names)))} otherwise than its state; {cure}"
            return


def shared_memory(optimizer: Any, shards: Mapping[str, Shard]) -> Iterator[str]:
    """Yield the tensors of the optimizer's state that are views of each other or of a parameter."""
    named: list[tuple[str, Tensor]] = []
    of_entry = {id(shard.entry): name for name, shard in shards.items() if shard.entry is not None}
    for key, value in state_of(optimizer).items():
        where = of_entry.get(id(key), "a group's parameters") if isinstance(key, Tensor) else str(key)
        if isinstance(key, Tensor):
            named.append((f"the parameter {where}", key))
        _add_tensors(value, f"the state of {where}: ", named)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "lr"):
                _add_tensors(value, f"group {index}: {key}", named)
    spans: list[tuple[int, int, str]] = []
    for name, tensor in named:
        tensor = local(tensor).detach()
        if tensor.numel() and not tensor.is_meta and tensor.layout is torch.strided:
            reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), name))
    for (_, stop, one), (start, _, other) in pairwise(sorted(spans)):
        if start < stop:
            yield (
                f"{one} and {other} are in the same memory, which they would not be in a resumed run; .clone() one "
                "of them"
            )


def _add_tensors(value: Any, name: str, named: list[tuple[str, Tensor]]) -> None:
    if isinstance(value, Tensor):
        named.append((name, value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add_tensors(item, f"{name}[{key}]" if name.endswith("]") else f"{name}{key}", named)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _add_tensors(item, f"{name}[{index}]", named)
