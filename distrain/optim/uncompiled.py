"""torch's optimizers without an import of its compiler, for as long as nothing else imports it.

torch marks some methods of its optimizers for its compiler, and imports that with the first call of one: on a CPU this
takes half as long as importing torch and Accelerate, and 400 modules. What is not compiled has no use for the marks.
What wraps models is in distrain/parallel/uncompiled.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer

from distrain.system.compiler import compiler_imported

KEEPS_OUT: CodeType | None
_SETS_GRAD: CodeType | None
"""The two wrappers that import it, by their code."""
try:
    from torch.optim.optimizer import _use_grad_for_differentiable

    KEEPS_OUT = torch._disable_dynamo(lambda: None).__code__
    _SETS_GRAD = _use_grad_for_differentiable(lambda: None).__code__
except (ImportError, AttributeError):  # a release of torch that marks them in another way, and may import it
    KEEPS_OUT = _SETS_GRAD = None


def put_off_compiler() -> None:
    """Have torch's optimizers take their methods without the marks until something imports the compiler."""
    if compiler_imported():
        return
    for kind in _kinds(Optimizer):
        for name, method in list(vars(kind).items()):
            code = getattr(method, "__code__", None)
            if code is not None and (code is KEEPS_OUT or code is _SETS_GRAD):
                setattr(kind, name, unmarked(method, sets_grad=code is _SETS_GRAD))


def _kinds(kind: type[Optimizer]) -> Iterator[type[Optimizer]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


def unmarked(marked: Callable[..., Any], *, sets_grad: bool = False) -> Callable[..., Any]:
    """Return a method without its mark, which it has back as soon as something imports the compiler.

    `sets_grad`: whether the mark also has gradients recorded as an optimizer's `differentiable` says.
    """
    plain = marked.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(marked)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if compiler_imported():
            return marked(self, *args, **kwargs)
        if not sets_grad:
            return plain(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return call
