"""What of a model a checkpoint holds, and whether all of it can come back: found before the first step.

Parameters and persistent buffers are taken from the modules themselves, under their own names, whatever hooks make of
them in a state dict. What a state dict has besides is held as well: the extra state of modules, which goes back through
`set_extra_state`, and what hooks and overrides add, which goes back through `load_state_dict`. So is the state of the
task that trains the model, wherever that of a module is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.memory import may_overlap, own_tensors, views_of_parameters
from distrain.optim import canonical_name
from distrain.parallel.nested import Unstorable, encode, equal, stored_dtype, why_unstorable

logger = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"


OF_TASK = "the task's state"
"""Its name among the extra state of modules."""


class TaskState(nn.Module):
    """What a task keeps from step to step, in the manner of a module."""

    def __init__(self, task: Any):
        super().__init__()
        self._task = task

    def get_extra_state(self) -> Any:
        """Return what the task says that it keeps."""
        return self._task.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Give it back."""
        self._task.load_state_dict(state)


_tasks: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()
"""Neither is held by this: a task may hold its model."""


def keep_with(model: nn.Module, task: Any) -> None:
    """Have whatever holds, restores or remembers a model's state do so with that of the task that trains it.

    `task` has state_dict() and load_state_dict(state), and is held by whoever trains with it. It is no part of the
    model, nor of its exports.
    """
    _tasks[model] = ref(task)


def state_of_task(model: nn.Module) -> dict[str, nn.Module]:
    """Return what keeps the state of the task that trains a model, by its name; empty where none does."""
    task = _tasks[model]() if model in _tasks else None
    return {OF_TASK: TaskState(task)} if task is not None else {}


def keeps_task(model: nn.Module) -> bool:
    """Whether checkpoints of a model hold the state of its task."""
    return bool(state_of_task(model))


def modules_with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that keep state of their own kind, by the name that it has in a state dict."""
    own = nn.Module.get_extra_state
    return {
        f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE: module
        for prefix, module in model.named_modules(remove_duplicate=False)
        if getattr(type(module), "get_extra_state", own) is not own
    } | state_of_task(model)


@dataclass(frozen=True)
class Contents:
    """What a model's state dict holds, held against its own tensors."""

    own: dict[str, Tensor]
    """Parameters and persistent buffers under all of their names."""
    renamed: dict[str, str]
    """Own tensors under other names: the own name by the other one."""
    changed: dict[str, Tensor]
    """What has the name of an own tensor, and is another one: a transposed copy."""
    tensors: dict[str, Tensor]
    """Further tensors."""
    values: dict[str, Any]
    """What is not a tensor."""


def contents(model: nn.Module) -> Contents:
    """Return what the model's state dict holds, and its task. Raises UserError where one of them cannot make it."""
    found = _of_model(model)
    for name, task in state_of_task(model).items():
        try:
            found.values[name] = task.get_extra_state()
        except Exception as error:  # the user's code
            raise UserError(f"the task's state_dict() failed: {type(error).__name__}: {error}") from error
    return found


def _of_model(model: nn.Module) -> Contents:
    own = own_tensors(model)
    try:
        # the parameters themselves: what is the same tensor needs no look at its elements
        state = model.state_dict(keep_vars=True)
    except Exception as error:  # hooks are the user's code
        raise UserError(f"the model's state_dict() failed: {type(error).__name__}: {error}") from error
    if state.keys() == own.keys() and all(state[name] is tensor for name, tensor in own.items()):
        return Contents(own, {}, {}, {}, {})
    places = {_place(tensor): name for name, tensor in reversed(own.items())}
    found = Contents(own, {}, {}, {}, {})
    for name, value in state.items():
        if not isinstance(value, Tensor):
            found.values[name] = value
        elif name in own and _place(value) == _place(own[name]):
            continue
        elif name not in own and _place(value) in places:
            found.renamed[name] = places[_place(value)]
        else:
            (found.changed if name in own else found.tensors)[name] = value
    return found


def _place(tensor: Tensor) -> Any:
    """Return what two tensors share that are views of the same elements in the same order."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    own = getattr(tensor, "_local_tensor", tensor)  # of a DTensor: to_local() would make another view
    where = own.untyped_storage()._cdata, own.storage_offset()
    return *where, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()


def prepare_to_save(model: nn.Module, *, sharded: bool) -> None:
    """Make a model one whose checkpoints can be taken back, before anything is trained; what changes in it is logged.

    Buffers whose elements share memory get memory of their own. `sharded`: parameters will be cut, or live outside of
    the module. Raises UserError naming all that a checkpoint could not hold or give back, each with what to do.
    """
    separate_buffers(model)
    problems: list[str] = []
    own = own_tensors(model)
    first = {id(tensor): name for name, tensor in reversed(own.items())}
    for name, tensor in own.items():
        if first[id(tensor)] != name:
            continue
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if (why := why_unstorable(tensor)) is not None:
            problems.append(f"{kind} {name} {why}; {_cure(tensor, kind)}")
        elif may_overlap(tensor):
            problems.append(
                f"{kind} {name} has elements that share memory (expand, as_strided or unfold made it), which no "
                "optimizer can train one by one; give it memory of its own: .clone()"
            )
        elif sharded and tensor.is_complex() and tensor.requires_grad:
            problems.append(
                f"{kind} {name} is of dtype {str(tensor.dtype).removeprefix('torch.')}, and zero and fsdp2 lay out all "
                "that is trained in memory of one dtype; use ddp"
            )
    problems += views_of_parameters(model)
    known: dict[str, str] = {}
    for name, tensor in own.items():
        other = known.setdefault(canonical_name(name), name)
        if own[other] is not tensor:
            problems.append(
                f"{name} and {other} are both called {canonical_name(name)} without what wrappers such as "
                "torch.compile add; rename one of the submodules"
            )
    found = contents(model)
    extra = modules_with_extra_state(model)
    problems += _problems_of_extra_state(found, extra)
    problems += _problems_of_hooks(found, extra, sharded)
    if not problems and (found.tensors or found.values or extra):
        problems += _try_loading(model, found, extra)
    if problems:
        raise UserError("the model has state that a checkpoint could not give back:\n  - " + "\n  - ".join(problems))
    if not sharded and found.changed:
        _try_export(model, found)


def separate_buffers(model: nn.Module) -> None:
    """Give buffers whose elements share memory, as after `expand`, memory of their own; large ones are logged.

    And those whose elements are in memory the conjugate or the negative of what they stand for.
    """
    new: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and (may_overlap(buffer) or buffer.is_conj() or buffer.is_neg()):
                if id(buffer) not in new:
                    plain = buffer.detach().resolve_conj().resolve_neg()
                    new[id(buffer)] = plain.clone(memory_format=torch.contiguous_format)
                    mib = buffer.numel() * buffer.element_size() / 2**20
                    if mib >= 1:
                        logger.info(
                            f"model: buffer {prefix}{'.' * bool(prefix)}{key} was an expanded view and has {mib:,.0f} "
                            "MiB of its own now"
                        )
                module._buffers[key] = new[id(buffer)]


def _cure(tensor: Tensor, kind: str) -> str:
    if stored_dtype(tensor) is None and tensor.is_quantized:
        return "keep its int_repr() in a buffer, and scale and zero point beside it"
    return f"convert it to another dtype{', or register it with persistent=False' if kind == 'buffer' else ''}"


def _problems_of_extra_state(found: Contents, extra: Mapping[str, nn.Module]) -> Iterator[str]:
    for name, module in extra.items():
        kind = type(module).__name__
        if name == OF_TASK:
            try:
                encode(found.values[name], name, {})
            except Unstorable as error:
                yield f"{error}; have state_dict() return tensors, numbers, text, or lists, tuples and dicts of such"
            continue
        if type(module).set_extra_state is nn.Module.set_extra_state:
            yield f"{name}: {kind} has get_extra_state and no set_extra_state; write it, to take that state back"
            continue
        value = found.tensors.get(name, found.values.get(name))
        if value is None:
            continue  # nothing to keep now, or a hook has taken it out
        try:
            encode(value, name, {})
        except Unstorable as error:
            yield (
                f"{error}, which {kind}.get_extra_state gives; have it give tensors, numbers, text, or lists, tuples "
                "and dicts of such, or register buffers instead"
            )


def _problems_of_hooks(found: Contents, extra: Mapping[str, nn.Module], sharded: bool) -> Iterator[str]:
    others = {name: v for name, v in {**found.changed, **found.tensors, **found.values}.items() if name not in extra}
    for name, value in others.items():
        if sharded:
            yield (
                f"{name} is made by a hook of state_dict or an override of _save_to_state_dict, which cannot be called "
                "on a sharded model; use ddp, or keep it as a parameter or a buffer"
            )
            continue
        try:
            encode(value.detach() if isinstance(value, Tensor) else value, name, {})
        except Unstorable as error:
            yield f"{error}, which a hook or an override puts into the state dict; keep it as a buffer, or leave it out"


def _try_loading(model: nn.Module, found: Contents, extra: Mapping[str, nn.Module]) -> list[str]:
    """Give what is no parameter and no buffer back as it is, and see whether it is then there."""
    given = {**found.tensors, **found.values}
    before = copy.deepcopy({name: v.detach() if isinstance(v, Tensor) else v for name, v in given.items()})
    try:
        hand_back(model, before)
    except Exception as error:  # the user's code
        names = ", ".join(given)
        return [
            f"{names}: taking back what state_dict gave failed: {type(error).__name__}: {error}; set_extra_state and "
            "load_state_dict must take what get_extra_state and state_dict give"
        ]
    after = contents(model)
    now, own = {**after.tensors, **after.values}, extra.keys() - {OF_TASK}
    return [
        f"{name} is {_shown(now.get(name))} after it was given back, and was {_shown(value)}; "
        f"{'set_extra_state' if name in own else 'load_state_dict'} must take what "
        f"{'get_extra_state' if name in own else 'state_dict'} gives"
        for name, value in before.items()
        if not equal(now.get(name), value)
    ]


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


@torch.no_grad()
def _try_export(model: nn.Module, found: Contents) -> None:
    """See whether `load_state_dict` makes of an export the weights that were exported; logged where it does not."""
    own = {name: tensor for name, tensor in found.own.items() if not isinstance(tensor, nn.UninitializedParameter)}
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    state = {**before, **copy.deepcopy({k: v.detach() for k, v in {**found.changed, **found.tensors}.items()})}
    state |= {name: before[other] for name, other in found.renamed.items()} | copy.deepcopy(found.values)
    state.pop(OF_TASK, None)
    try:
        for tensor in own.values():
            tensor.zero_()
        model.load_state_dict(state)
        lost = [name for name, tensor in own.items() if not equal(tensor.detach(), before[name])]
        why = f"{', '.join(lost[:3])} would be other weights" if lost else ""
    except Exception as error:  # hooks are the user's code
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        for name, tensor in own.items():
            tensor.copy_(before[name])
    if why:
        logger.info(f"model: its own load_state_dict does not take back its state_dict ({why})")


def hand_back(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Give a model what its state dict held besides its own tensors: these are in place already."""
    extra = modules_with_extra_state(model)
    if any(name not in extra for name in values):
        state = model.state_dict()
        model.load_state_dict({**state, **{name: value for name, value in values.items() if name != OF_TASK}})
        values = {name: value for name, value in values.items() if name == OF_TASK}
    for name, value in values.items():
        extra[name].set_extra_state(value)


def remember_extra_state(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Return what gives modules the extra state back that they have now."""
    kept = [(module, copy.deepcopy(module.get_extra_state())) for module in modules.values()]

    def put_back() -> None:
        for module, before in kept:
            module.set_extra_state(before)

    return put_back


@contextmanager
def task_unchanged(model: nn.Module) -> Iterator[None]:
    """Leave the task with the state that it had: that of training, in which an evaluation has no part."""
    put_back = remember_extra_state(state_of_task(model))
    try:
        yield
    finally:
        put_back()
