"""torch's optimizers without an import of its compiler, for as long as nothing else imports it.

torch marks some methods of its optimizers for its compiler, and imports that with the first call of one: on a CPU this
takes half as long as importing torch and Accelerate, and 400 modules. What is not compiled has no use for the marks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer

_KEEPS_OUT: CodeType | None
_SETS_GRAD: CodeType | None
"""The two wrappers that import it, by their code."""
try:
    from torch.optim.optimizer import _use_grad_for_differentiable

    _KEEPS_OUT = torch._disable_dynamo(lambda: None).__code__
    _SETS_GRAD = _use_grad_for_differentiable(lambda: None).__code__
except (ImportError, AttributeError):  # a release of torch that marks them in another way, and may import it
    _KEEPS_OUT = _SETS_GRAD = None


def put_off_compiler() -> None:
    """Have torch's optimizers take their methods without the marks until something imports the compiler."""
    if "torch._dynamo" in sys.modules:
        return
    for kind in _kinds(Optimizer):
        for name, method in list(vars(kind).items()):
            code = getattr(method, "__code__", None)
            if code is not None and (code is _KEEPS_OUT or code is _SETS_GRAD):
                setattr(kind, name, _unmarked(method, sets_grad=code is _SETS_GRAD))


def _kinds(kind: type[Optimizer]) -> Iterator[type[Optimizer]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


def _unmarked(marked: Callable[..., Any], *, sets_grad: bool) -> Callable[..., Any]:
    plain = marked.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(marked)
    def call(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return marked(self, *args, **kwargs)
        if not sets_grad:
            return plain(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return call
