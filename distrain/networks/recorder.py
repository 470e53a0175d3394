"""Running a constructor so that large tensors are a record, and look to it as they ever do."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from distrain.networks.replay import (
    Diverged,
    Node,
    Ref,
    Slot,
    State,
    content_of,
    copied,
    give_back,
    map_leaves,
    storage_of,
    tensors_in,
)

WORKING_SET = 32 * 2**20
"""Bytes of large tensors that are kept in memory at least; three times the largest tensor, if that is more."""


class NotFollowed(RuntimeError):
    """Something was done with a large tensor that no record of operations can repeat."""


# --------------------------------------------------------------------------------------------------------------------
# What there is to know of an operation

_OVERWRITES = {
    "aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_", "aten::copy_", "aten::random_",
    "aten::exponential_", "aten::log_normal_", "aten::cauchy_", "aten::geometric_", "aten::bernoulli_",
}  # fmt: skip
"""What replaces all of its first argument, whatever was there."""

_BY_SHAPE = {
    "aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::rand_like", "aten::randn_like",
    "aten::randint_like", "aten::new_empty", "aten::new_empty_strided", "aten::new_zeros", "aten::new_ones",
    "aten::new_full",
}  # fmt: skip
"""What reads nothing of its tensor but the shape and dtype."""

_MOVES = {"aten::_to_copy", "aten::scalar_tensor"}
"""What PyTorch itself does to bring something to the device of a tensor that is indexed."""

_OTHER_STORAGE = {"aten::resize_", "aten::resize_as_", "aten::set_"}


class _Traits(NamedTuple):
    written: tuple[int | str, ...]
    """The positions and names of the arguments that it writes."""
    returned: tuple[int | str | None, ...]
    """Which argument each of its results is; None: none of them."""
    is_view: bool
    is_random: bool
    is_lazy: bool
    """Whether the layout of its results is known without doing it."""


@functools.cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    by_alias: dict[str, int | str] = {}
    written: list[int | str] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            key = argument.name if argument.kwarg_only else place
            written.append(key)
            by_alias |= dict.fromkeys(argument.alias_info.before_set, key)
    returned: list[int | str | None] = []
    for result in schema.returns:
        alias = result.alias_info
        names = alias.before_set if alias is not None and alias.is_write else ()
        returned.append(next((by_alias[name] for name in names if name in by_alias), None))
    by_element = torch.Tag.pointwise in func.tags and torch.Tag.data_dependent_output not in func.tags
    return _Traits(
        tuple(written),
        tuple(returned),
        is_view=not written and any(result.alias_info is not None for result in schema.returns),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_lazy=by_element or schema.name in ("aten::clone", "aten::_to_copy"),
    )


# --------------------------------------------------------------------------------------------------------------------
# Recording


class Recorder(TorchDispatchMode):
    """Executes operations as ever, and keeps large results as a record."""

    def __init__(self, small: int):
        super().__init__()
        self.small = small
        self.reason: str | None = None
        """Why what was recorded cannot be used."""
        self.leaves = False
        """Whether the constructor itself sends a tensor to the meta device."""
        self._slots: dict[int, Slot] = {}
        self._swept = 1000
        self._working: OrderedDict[Slot, None] = OrderedDict()
        self._largest = 0
        self._count = 0

    @staticmethod
    def active() -> Recorder | None:
        """Return the one that is recording now."""
        modes = _get_current_dispatch_mode_stack()
        return next((mode for mode in reversed(modes) if isinstance(mode, Recorder)), None)

    def lost(self, what: str) -> NotFollowed:
        """Note, and return as an error, that something was done which the record cannot repeat."""
        self.reason = self.reason or what
        return NotFollowed(what)

    def slot(self, t: Tensor) -> Slot | None:
        """Return the storage behind a tensor on the meta device, or None: it is not one of ours."""
        if not t.is_meta or not self._slots:
            return None
        return self._slots.get(t.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            try:
                return self._handle(func, args, kwargs or {})
            finally:
                self._trim()

    def _handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        traits = _traits(func)
        slots = {id(t): slot for t in tensors_in((args, kwargs)) if (slot := self.slot(t)) is not None}
        to_meta = func._schema.name in _MOVES and torch.device(kwargs.get("device") or "cpu").type == "meta"
        if to_meta and not self.leaves:
            # PyTorch's own, to stay where a large tensor is, or to bring an index or a value to where it is
            kwargs = kwargs | {"device": torch.device("cpu")}
            if not slots and not any(t.is_meta for t in tensors_in(args)):
                return self._adopt(func(*args, **kwargs), self._node(func, args, kwargs, {}), {}, small=-1)
        if slots and any(t.is_meta and id(t) not in slots for t in tensors_in((args, kwargs))):
            raise self.lost(f"{func} was called on a large tensor and one on the meta device")
        if not slots:
            if traits.written or traits.is_view or any(map(self._is_large, tensors_in((args, kwargs)))):
                return func(*args, **kwargs)
            return self._do(func, args, kwargs, traits)
        if traits.written:
            return self._write(func, args, kwargs, traits, slots)
        if traits.is_view:
            return func(*args, **kwargs)
        if func._schema.name in _BY_SHAPE:
            return self._do(func, *self._shapes_only(args, kwargs, slots), traits)
        node = self._node(func, args, kwargs, slots)
        uncached = any(slot.real is None for slot in slots.values())
        if uncached and traits.is_lazy and not traits.is_random and self._is_to_cpu(kwargs):
            return self._infer(func, args, kwargs, node)
        return self._repeatable(func, args, kwargs, slots, node)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function without side effects gives, and note it as one operation."""
        slots = {id(t): slot for t in tensors_in((args, kwargs)) if (slot := self.slot(t)) is not None}
        if not slots:
            return func(*args, **kwargs)
        with torch.no_grad(), _disable_current_modes():
            return self._repeatable(func, args, kwargs, slots, self._node(func, args, kwargs, slots))

    def later(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> Tensor:
        """Return a stand-in for what `read` gives, a new tensor of this shape on the CPU, the same at every call.

        It is called when the values are asked for; a small tensor is read at once.
        """
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            if math.prod(shape) <= self.small:
                return read()
            facade = torch.empty(shape, dtype=dtype, device="meta")
            self._count += 1
            node = Node(self._count, read, (), {}, None)
            slot = self._new(facade.untyped_storage(), node)
            node.outs, node.touches = ((0, Ref.of(slot, facade)),), (slot,)
            return facade

    def _repeatable(self, func: Any, args: Any, kwargs: Any, slots: dict[int, Slot], node: Node) -> Any:
        for slot in slots.values():
            self.materialise(slot)
        results = func(*self._real(args, slots), **self._real(kwargs, slots))
        return self._adopt(results, node, self._facades(args, kwargs, slots))

    def _do(self, func: Any, args: Any, kwargs: Any, traits: _Traits) -> Any:
        """Do what reads no large tensor; note it if its result is large."""
        # what draws is noted first, with the state that it starts from
        node = self._node(func, args, kwargs, {}) if traits.is_random else None
        results = func(*args, **kwargs)
        if not any(t.numel() > self.small for t in tensors_in(results)):
            return results
        return self._adopt(results, node or self._node(func, args, kwargs, {}), {})

    def _write(self, func: Any, args: Any, kwargs: Any, traits: _Traits, slots: dict[int, Slot]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            # a view of another kind, or of another storage that is known as well, is all the same
            is_view = func is torch.ops.aten.set_.source_Tensor and all(id(t) in slots for t in args)
            if func._schema.name == "aten::resize_":
                is_view = math.prod(args[1]) + args[0].storage_offset() <= slots[id(args[0])].nbytes // args[0].itemsize
            if func._schema.name in _OTHER_STORAGE and not is_view:
                raise self.lost(f"{func} was called on a large tensor")
            return func(*args, **kwargs)
        arguments = {key: kwargs.get(key) if isinstance(key, str) else args[key] for key in traits.written}
        written = list(tensors_in(arguments))
        touched = list(dict.fromkeys(slots[id(t)] for t in written if id(t) in slots))
        fresh = self._overwritten(func, args, kwargs, slots)
        node = self._node(func, args, kwargs, slots, without=fresh)
        sources = [slot for slot in dict.fromkeys(slots.values()) if slot is not fresh]
        writes_real = any(id(t) not in slots for t in written)
        results: Any = None
        if (
            traits.is_random
            or writes_real
            or None in traits.returned
            or all(slot.real is not None for slot in slots.values())
        ):
            for slot in sources:
                self.materialise(slot)
            if fresh is not None:
                self._keep(fresh, storage_of(fresh.nbytes) if fresh.real is None else fresh.real)
            results = func(*self._real(args, slots), **self._real(kwargs, slots))
            if any(slot.real is None or slot.real.nbytes() != slot.nbytes for slot in touched):
                raise self.lost(f"{func} resized a large tensor")
            results = self._adopt(results, node, self._facades(args, kwargs, slots))
        else:
            for slot in touched:
                slot.real = None
        for slot in touched:
            slot.head = node
        values = tuple(
            (results if len(traits.returned) == 1 else results[place]) if key is None else arguments[key]
            for place, key in enumerate(traits.returned)
        )
        return values[0] if len(values) == 1 else values or None

    @staticmethod
    def _overwritten(func: Any, args: Any, kwargs: Any, slots: dict[int, Slot]) -> Slot | None:
        """Return the slot of which all is replaced, whatever was there."""
        if func._schema.name not in _OVERWRITES or id(args[0]) not in slots:
            return None
        slot = slots[id(args[0])]
        if any(slots.get(id(t)) is slot for t in tensors_in((args[1:], kwargs))):
            return None
        return slot if Ref.of(slot, args[0]).is_whole else None

    def _is_large(self, t: Tensor) -> bool:
        if t.layout is not torch.strided:
            return True
        return t.untyped_storage().nbytes() > self.small * t.dtype.itemsize

    @staticmethod
    def _is_to_cpu(kwargs: Any) -> bool:
        return torch.device(kwargs.get("device") or "cpu").type == "cpu"

    def _real(self, value: Any, slots: dict[int, Slot]) -> Any:
        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) not in slots:
                return leaf
            slot = slots[id(leaf)]
            assert slot.real is not None
            return Ref.of(slot, leaf).on(slot.real)

        return map_leaves(real, value)

    @staticmethod
    def _facades(args: Any, kwargs: Any, slots: dict[int, Slot]) -> dict[int, UntypedStorage]:
        """Return the stand-ins of the arguments' storages, by the storages themselves."""
        mine = [(slots[id(t)].real, t.untyped_storage()) for t in tensors_in((args, kwargs)) if id(t) in slots]
        return {real._cdata: facade for real, facade in mine if real is not None}

    @staticmethod
    def _shapes_only(args: Any, kwargs: Any, slots: dict[int, Slot]) -> tuple[Any, Any]:
        def shape(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) not in slots:
                return leaf
            return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")

        return map_leaves(shape, args), map_leaves(shape, kwargs) | {
            "device": kwargs.get("device") or torch.device("cpu")
        }

    def _node(self, func: Any, args: Any, kwargs: Any, slots: dict[int, Slot], without: Slot | None = None) -> Node:
        """Return the operation as it is now, before it is done. `without`: what it need not read."""

        def note(leaf: Any) -> Any:
            if isinstance(leaf, torch.Generator):
                return State(leaf.get_state()) if leaf.device.type == "cpu" else leaf
            if not isinstance(leaf, Tensor) or (leaf.is_meta and id(leaf) not in slots):
                return leaf
            return Ref.of(slots[id(leaf)], leaf) if id(leaf) in slots else copied(leaf)

        is_random = not isinstance(func, torch._ops.OpOverload) or _traits(func).is_random
        state = torch.default_generator.get_state() if is_random else None
        self._count += 1
        node = Node(self._count, func, map_leaves(note, args), map_leaves(note, kwargs), state)
        node.touches = tuple(dict.fromkeys(slots.values()))
        node.deps = tuple(slot.head for slot in node.touches if slot is not without and slot.head is not None)
        return node

    def _adopt(self, results: Any, node: Node, facades: dict[int, UntypedStorage], small: int | None = None) -> Any:
        """Return results with a stand-in for each that is large. `facades`: of the storages of the arguments."""
        known, outs, places = dict(facades), list[tuple[int, Ref]](), itertools.count()

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            at = next(places)
            if leaf.layout is not torch.strided or leaf.device.type != "cpu":
                return leaf
            storage = leaf.untyped_storage()
            if storage._cdata not in known:
                if leaf.numel() <= (self.small if small is None else small):
                    return leaf
                facade = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
                slot = self._new(facade, node)
                self._keep(slot, storage)
                outs.append((at, Ref.of(slot, leaf)))
                known[storage._cdata] = facade
            facade = known[storage._cdata]
            return Ref.of(Slot(facade, 0), leaf).on(facade)

        results = map_leaves(stand_in, results)
        node.outs = tuple(outs)
        node.touches = tuple(dict.fromkeys((*node.touches, *(ref.slot for _, ref in outs))))
        return results

    def _infer(self, func: Any, args: Any, kwargs: Any, node: Node) -> Any:
        """Return what the operation would give, without doing it."""

        def meta(leaf: Any) -> Any:
            return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.dim() else leaf

        at_meta = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
        result = func(*map_leaves(meta, args), **(map_leaves(meta, kwargs) | at_meta))
        if not isinstance(result, Tensor) or result.untyped_storage()._cdata in self._slots:
            raise self.lost(f"{func} gave no new tensor")
        slot = self._new(result.untyped_storage(), node)
        node.outs = ((0, Ref.of(slot, result)),)
        node.touches = (*node.touches, slot)
        return result

    def _new(self, facade: UntypedStorage, node: Node) -> Slot:
        if len(self._slots) > self._swept:
            self._slots = {key: slot for key, slot in self._slots.items() if not slot.alive.expired()}
            self._swept = max(1000, 2 * len(self._slots))
        slot = self._slots[facade._cdata] = Slot(facade, facade.nbytes())
        slot.head = node
        return slot

    # ---- the working set

    def _keep(self, slot: Slot, real: UntypedStorage) -> None:
        slot.real = real
        self._working[slot] = None
        self._working.move_to_end(slot)
        self._largest = max(self._largest, slot.nbytes)

    def materialise(self, slot: Slot) -> UntypedStorage:
        try:
            real = content_of(slot, slot.head) if slot.real is None else slot.real
        except Diverged as error:
            raise self.lost(str(error)) from error
        self._keep(slot, real)
        return real

    def _trim(self) -> None:
        """Let go of what nobody holds, and then of what was used longest ago."""
        for slot in [slot for slot in self._working if slot.real is None or slot.alive.expired()]:
            slot.real = None
            del self._working[slot]
            give_back(slot.nbytes)
        size = sum(slot.nbytes for slot in self._working)
        while size > max(WORKING_SET, 3 * self._largest):
            slot, _ = self._working.popitem(last=False)
            slot.real = None
            size -= slot.nbytes
            give_back(slot.nbytes)


# --------------------------------------------------------------------------------------------------------------------
# What Python sees


class Disguise(TorchFunctionMode):
    """Lets a large tensor, which is on the meta device, answer Python as one on the CPU does."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self._trace: Any = None

    def __enter__(self) -> Any:
        # what another thread does is not seen; it is told of with its first step
        self._trace = threading.gettrace()
        threading.settrace(self._in_a_thread)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        threading.settrace(self._trace)

    def _in_a_thread(self, *event: Any) -> None:
        sys.settrace(None)
        self.recorder.lost("a thread was started")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is None or not args or not any(isinstance(each, Tensor) for each in args):
            return func(*args, **kwargs)
        return answer(self.recorder, func, args, kwargs)


def _set_data(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    target, value = args
    if (recorder.slot(target) is None) == (recorder.slot(value) is None):
        return func(*args)
    # PyTorch refuses this between devices; both are on the CPU in an ordinary build
    torch._C._swap_tensor_impl(target, value.detach().requires_grad_(target.requires_grad))
    return None


def _to(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    def stay(value: Any) -> Any:
        if isinstance(value, Tensor) and recorder.slot(value) is not None:
            return torch.empty(0, dtype=value.dtype, device="cpu")
        return value

    def at_meta(value: Any) -> Any:
        if isinstance(value, torch.device | str):
            return torch.device("meta") if torch.device(value).type == "cpu" else value
        if isinstance(value, Tensor) and value.device.type == "cpu":
            return torch.empty(0, dtype=value.dtype, device="meta")
        return value

    first, *rest = args
    rest, kwargs = map_leaves(stay, rest), map_leaves(stay, kwargs)
    devices = [each for each in (*rest, *kwargs.values()) if isinstance(each, torch.device | str)]
    if any(torch.device(each).type == "meta" for each in devices):
        recorder.leaves = True
        try:
            return func(first, *rest, **kwargs)
        finally:
            recorder.leaves = False
    if recorder.slot(first) is not None:
        rest, kwargs = map_leaves(at_meta, rest), map_leaves(at_meta, kwargs)
    return func(first, *rest, **kwargs)


def _new_tensor(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if recorder.slot(args[0]) is None:
        return func(*args, **kwargs)
    return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs))


def _indexed(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    def tensor(index: Any) -> Any:
        # PyTorch makes a tensor of a list where the tensor is that is indexed
        is_plain = isinstance(index, list) and index and all(isinstance(each, int) for each in index)
        return torch.tensor(index, device="cpu") if is_plain else index

    first, index, *rest = args
    if recorder.slot(first) is not None:
        index = tuple(map(tensor, index)) if isinstance(index, tuple) else tensor(index)
    return func(first, index, *rest)


def _type(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and recorder.slot(args[0]) is not None:
        return torch.empty(0, dtype=args[0].dtype, device="cpu").type()
    return func(*args, **kwargs)


def _by_device(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Do what is computed in another way on another device, or where a gradient is to follow."""
    tensors = list(tensors_in((args, kwargs)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and any(map(recorder.slot, tensors)):
        raise recorder.lost(f"{func.__name__} was called on a large tensor, with gradients")
    return recorder.call(func, args, kwargs)


def _tolist(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    slot = recorder.slot(args[0])
    if slot is None:
        return func(args[0])
    with _disable_current_modes():
        return func(Ref.of(slot, args[0]).on(recorder.materialise(slot)))


def _own(answer: Callable[[Tensor], Any]) -> Callable[[Recorder, Any, Any, Any], Any]:
    def call(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs) if recorder.slot(args[0]) is None else answer(args[0])

    return call


def _refuse(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if any(isinstance(each, Tensor) and recorder.slot(each) is not None for each in args):
        raise recorder.lost(f"Tensor.{func.__name__} was called on a large tensor")
    return func(*args, **kwargs)


_BASE = torch._C.TensorBase
_ANSWERS: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    Tensor.device.__get__: _own(lambda t: torch.device("cpu")),
    Tensor.is_meta.__get__: _own(lambda t: False),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _own(lambda t: True),  # type: ignore[attr-defined]
    Tensor.cpu: _own(lambda t: t),
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.to: _to,
    Tensor.type_as: _to,
    Tensor.new_tensor: _new_tensor,
    Tensor.tolist: _tolist,
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _indexed,
    torch._weight_norm: lambda recorder, func, args, kwargs: recorder.call(func, args, kwargs),  # compares devices
    **dict.fromkeys(
        (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.nn.functional.scaled_dot_product_attention),
        _by_device,
    ),
    Tensor.type: _type,
    **dict.fromkeys(
        (
            Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage,
            Tensor._typed_storage, Tensor.new, Tensor.__reduce_ex__, Tensor.__dlpack__, Tensor.share_memory_,
            torch.from_dlpack, Tensor.apply_, Tensor.map_, Tensor.map2_,
        ),
        _refuse,
    ),
}  # fmt: skip
