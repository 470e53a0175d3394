"""The record of how large tensors came to be, and computing them again from it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef


class Diverged(RuntimeError):
    """An operation of the record gave another layout than it was expected to."""


class Slot:
    """A large storage: who wrote it last, and its content while it is in the working set."""

    __slots__ = ("alive", "head", "nbytes", "real")

    def __init__(self, facade: UntypedStorage, nbytes: int):
        self.alive = StorageWeakRef(facade)
        self.nbytes = nbytes
        self.head: Node | None = None
        self.real: UntypedStorage | None = None


class Ref(NamedTuple):
    """A tensor within a slot."""

    slot: Slot
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, slot: Slot, t: Tensor) -> Ref:
        return cls(slot, t.dtype, t.size(), t.stride(), int(t.storage_offset()), t.is_conj(), t.is_neg())

    def on(self, storage: UntypedStorage) -> Tensor:
        """Return this tensor over the slot's content, or over its stand-in on the meta device."""
        view = torch.empty(0, dtype=self.dtype, device=storage.device)
        view.set_(storage, self.offset, self.size, self.stride)
        if self.conj:
            view = torch._conj(view)
        return torch._neg_view(view) if self.neg else view

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the slot."""
        return self.size.numel() * self.dtype.itemsize == self.slot.nbytes and _is_dense(self.size, self.stride)

    def fits(self, t: Tensor) -> bool:
        """Whether `t` is laid out so."""
        if (t.dtype, t.size(), t.storage_offset()) != (self.dtype, self.size, self.offset):
            return False
        steps = zip(t.stride(), self.stride, self.size, strict=True)
        return all(step == expected for step, expected, length in steps if length > 1)


def _is_dense(size: Iterable[int], stride: Iterable[int]) -> bool:
    expected = 1
    for step, length in sorted(zip(stride, size, strict=True)):
        if length != 1:
            if step != expected:
                return False
            expected *= length
    return True


class State(NamedTuple):
    """A generator that an operation was given, as it was."""

    state: Tensor


class Node:
    """An operation that wrote large storages."""

    __slots__ = ("args", "deps", "dtype", "func", "index", "kwargs", "outs", "state", "touches")

    def __init__(self, index: int, func: Any, args: Any, kwargs: Any, state: Tensor | None):
        self.index, self.func, self.args, self.kwargs, self.state = index, func, args, kwargs, state
        self.dtype = torch.get_default_dtype()
        self.deps: tuple[Node, ...] = ()
        """Those whose results it read."""
        self.outs: tuple[tuple[int, Ref], ...] = ()
        """Which of its results are large, and where they are kept."""
        self.touches: tuple[Slot, ...] = ()

    def run(self, contents: dict[Slot, UntypedStorage]) -> None:
        """Do it again, over `contents`."""

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                if leaf.slot not in contents:  # it is overwritten, so nobody needed what was there
                    contents[leaf.slot] = storage_of(leaf.slot.nbytes)
                return leaf.on(contents[leaf.slot])
            return torch.Generator().set_state(leaf.state) if isinstance(leaf, State) else leaf

        if self.state is not None:
            torch.default_generator.set_state(self.state)
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        results = list(tensors_in(self.func(*map_leaves(real, self.args), **map_leaves(real, self.kwargs))))
        for place, ref in self.outs:
            if not ref.fits(results[place]):
                raise Diverged(f"{self.func} gave {tuple(results[place].shape)} in another layout when it was repeated")
            contents[ref.slot] = results[place].untyped_storage()


def storage_of(nbytes: int) -> UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()


_FREED = 32 * 2**20
"""Bytes that are freed before they are given back."""

_freed = 0


def give_back(nbytes: int) -> None:
    """Note that so much was freed, and now and then give what is free back to the operating system.

    The C library does not do that by itself: it cannot use the room of an aligned block for the next one of that size
    (glibc before 2.38), so a constructor that draws again and again would take that much more memory each time.
    """
    global _freed
    _freed += nbytes
    if _freed >= _FREED and (trim := _malloc_trim()) is not None:
        trim(0)
        _freed = 0


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def leading_to(heads: Iterable[Node]) -> set[Node]:
    """Return the operations `heads`, and all whose results they depend on."""
    stack = list(heads)
    found = set(stack)
    while stack:
        for node in stack.pop().deps:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def content_of(slot: Slot, head: Node | None) -> UntypedStorage:
    """Return what `slot` held after `head`, computed again; no random state outside changes."""
    assert head is not None
    nodes = sorted(leading_to([head]), key=lambda node: node.index)
    last = {each: node for node in nodes for each in node.touches}
    contents: dict[Slot, UntypedStorage] = {}
    state, dtype = torch.default_generator.get_state(), torch.get_default_dtype()
    try:
        with torch.no_grad():
            for node in nodes:
                node.run(contents)
                for each in node.touches:
                    if last[each] is node and each is not slot and each in contents:
                        del contents[each]
                        give_back(each.nbytes)
    finally:
        torch.default_generator.set_state(state)
        torch.set_default_dtype(dtype)
    return contents[slot]


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the arguments of an operation with `change` applied to all that is no container."""
    if isinstance(value, Ref | State):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(change, each) for each in value)
    if isinstance(value, dict):
        return {key: map_leaves(change, each) for key, each in value.items()}
    return change(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def copied(t: Tensor) -> Tensor:
    """Return a copy of a small tensor, laid out as it is."""
    storage = t.untyped_storage()
    if t.layout is not torch.strided or t.device.type != "cpu" or storage.nbytes() > t.numel() * t.dtype.itemsize:
        return t.clone()
    return Ref.of(Slot(storage, 0), t).on(storage.clone())
