"""A model without its weights, and its initial weights one at a time: to the bit those of an ordinary build.

`defer` runs the ordinary constructor, and PyTorch executes each of its operations as ever. What differs is where large
tensors live: Python sees one on the meta device that says it is on the CPU, its values are in a small working set, and
how they came to be is on record: the operations, with the state of the random numbers before each that draws. What
falls out of the working set is computed again from the record when it is asked for, in the constructor (a truncated
normal distribution looks at what it has drawn) or at the end, parameter by parameter, by `Deferred.values`.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from distrain.config import UserError
from distrain.networks.memory import views_of_parameters
from distrain.networks.recorder import Disguise, Recorder
from distrain.networks.replay import Diverged, Node, Ref, Slot, content_of, give_back, leading_to, tensors_in

logger = logging.getLogger(__name__)

SMALL = 2**14
"""Elements of a tensor up to which it is not worth deferring: biases, norms, and what constructors compute with."""


class _Recorded(NamedTuple):
    """A parameter to be computed from the record."""

    ref: Ref
    head: Node | None


class Deferred:
    """A model without its weights, and the weights, one at a time."""

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Tensor | _Recorded],
        build: Callable[[], nn.Module],
        full: dict[str, Tensor] | None = None,
    ):
        self.model = model
        """Its parameters are on the meta device, tied where they are tied; its buffers are real, on the CPU."""
        self.is_full = full is not None
        """Whether the model had to be built in full, so that all of its weights were in memory at once."""
        self._names = [name for name, _ in model.named_parameters()]
        self._sources = dict(sources)
        self._build, self._full = build, full
        self._instead: dict[str, Callable[[], Tensor]] = {}

    def replace(self, name: str, read: Callable[[], Tensor]) -> None:
        """Let `values` take the parameter `name` from `read`, which returns a new tensor of its shape and dtype."""
        self._instead[name] = read
        self._sources.pop(name, None)
        if self._full is not None:
            self._full.pop(name, None)

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, initial value on the CPU) of each parameter, in the order of `model.named_parameters()`.

        A value is the caller's own. Only one is in memory at a time, with what it is computed from; of a model that had
        to be built in full, those that were not yielded yet. May be called again, and gives the same. No random state
        outside changes.
        """
        full, self._full = self._full, None
        content: UntypedStorage | None = None
        for name, following in itertools.zip_longest(self._names, self._names[1:]):
            source = self._sources.get(name)
            if name in self._instead:
                value = [self._instead[name]()]
            elif isinstance(source, Tensor):
                value = [source.clone()]
            else:
                if isinstance(source, _Recorded) and not self.is_full:
                    try:
                        content = content_of(source.ref.slot, source.head) if content is None else content
                        value = [source.ref.on(content)]
                    except Diverged as error:
                        self.is_full = True
                        logger.info(_in_full(str(error)))
                if self.is_full:
                    full = self._parameters() if full is None else full
                    value = [full.pop(name)]
                after = self._sources.get(following)
                again = isinstance(source, _Recorded) and isinstance(after, _Recorded) and after[0][0] is source[0][0]
                content = content if again else None
                if again or value[0].numel() * value[0].itemsize < value[0].untyped_storage().nbytes():
                    value = [value[0].clone()]
            size = value[0].untyped_storage().nbytes()
            # out of a list, so that nothing here holds the value while the next one is computed
            yield name, value.pop()
            give_back(size)

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._build().named_parameters()}


_NOTABLE = 64 * 2**20
"""Bytes that are worth a line."""


def _in_full(reason: str) -> str:
    return f"model: built in full on the CPU, because {reason}"


def _again(build: Callable[[], nn.Module]) -> nn.Module:
    """Build once more what was built before, without what is logged then."""
    rooms = logging.getLogger(__package__)
    level = rooms.level
    rooms.setLevel(logging.WARNING)
    try:
        return build()
    finally:
        rooms.setLevel(level)


def defer(build: Callable[[], nn.Module], *, small: int = SMALL) -> Deferred:
    """Return the model that `build` returns, on the CPU, without its weights; see `Deferred`.

    `build` must give the same each time: it is called again, and the model is built in full, when something is done in
    it that no record of operations can repeat, such as writing to a large tensor through NumPy; the reason is logged.
    `small`: elements up to which a tensor is computed with as
    ever; smaller than the largest parameters by far, larger than what constructors compute with.
    """
    recorder = Recorder(small)
    failure: str | None = None
    try:
        with recorder, Disguise(recorder):
            model = build()
        sources = _without_weights(model, recorder)
    except Exception as error:
        # an error of the constructor itself comes again, in its own words
        failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    reason = recorder.reason or failure
    if reason is not None:
        return defer_full(build, reason)
    if (held := _held_bytes(sources)) > _NOTABLE:
        logger.info(
            f"model: {held / 2**20:,.0f} MiB of values that its constructor takes from outside PyTorch stay in memory"
        )
    return Deferred(model, sources, lambda: _again(build))


def defer_full(build: Callable[[], nn.Module], reason: str) -> Deferred:
    """Return the same as `defer` for a model that has to be built in full, for a `reason`, which is logged."""
    model = build()
    logger.info(_in_full(reason))
    if problems := list(views_of_parameters(model)):
        raise UserError("the model cannot be built without its weights:\n  - " + "\n  - ".join(problems))
    full = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        _to_meta(parameter)
    return Deferred(model, {}, lambda: _again(build), full)


@torch.no_grad()
def _without_weights(model: nn.Module, recorder: Recorder) -> dict[str, Tensor | _Recorded]:
    """Put all parameters on the meta device and all else on the CPU; return where the parameters come from."""
    sources: dict[str, Tensor | _Recorded] = {}
    slots = set()
    for name, parameter in model.named_parameters():
        slot = recorder.slot(parameter)
        if slot is not None:
            sources[name] = _Recorded(Ref.of(slot, parameter), slot.head)
            slots.add(slot)
        elif parameter.is_meta:
            raise recorder.lost(f"{name} is on the meta device, or what was done with it was not seen")
        else:
            sources[name] = parameter.detach()
    buffers = {id(buffer) for buffer in model.buffers()}
    slots_of_buffers = {slot for buffer in model.buffers() if (slot := recorder.slot(buffer)) is not None}
    if slots & slots_of_buffers or any(views_of_parameters(model)):
        raise recorder.lost("a buffer shares memory with a parameter")
    for source, parameter in zip(sources.values(), model.parameters(), strict=True):
        if isinstance(source, Tensor):
            _to_meta(parameter)
    contents: dict[Slot, UntypedStorage] = {}
    for t in _held(model):
        slot = recorder.slot(t)
        if slot is not None and slot not in slots:
            if slot not in contents:
                contents[slot] = recorder.materialise(slot)
            real = Ref.of(slot, t).on(contents[slot])
            torch._C._swap_tensor_impl(t, real.requires_grad_(t.requires_grad))
        elif id(t) in buffers and t.is_meta:
            raise recorder.lost("a buffer is on the meta device, or what was done with it was not seen")
    return sources


def _held_bytes(sources: Mapping[str, Tensor | _Recorded]) -> int:
    """Return the size of what cannot be computed again, because it came from NumPy or from a file."""
    heads = [source.head for source in sources.values() if isinstance(source, _Recorded) and source.head is not None]
    captured = [t for node in leading_to(heads) for t in tensors_in((node.args, node.kwargs))]
    kept = [source for source in sources.values() if isinstance(source, Tensor)]
    return sum(t.numel() * t.itemsize for t in (*captured, *kept) if not t.is_meta)


def _to_meta(parameter: nn.Parameter) -> None:
    size, stride = parameter.size(), parameter.stride()
    stand_in = torch.empty_strided(size, stride, dtype=parameter.dtype, device="meta")
    torch._C._swap_tensor_impl(parameter, stand_in.requires_grad_(parameter.requires_grad))


def _held(model: nn.Module) -> list[Tensor]:
    """Return the tensors that the modules hold, but for parameters: buffers, and plain attributes."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                found[id(value)] = value
        elif isinstance(value, dict | list | tuple | set | OrderedDict) and id(value) not in seen:
            seen.add(id(value))
            for each in value.values() if isinstance(value, dict) else value:
                look(each)

    for module in model.modules():
        look(vars(module))
    return list(found.values())
