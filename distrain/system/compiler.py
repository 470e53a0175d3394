"""torch's compiler, kept out of what only marks functions for it. Imports no torch.

To import it takes half as long as to import torch and Accelerate. Of a process that compiles nothing, some libraries
import it all the same: to mark functions that it should leave alone, or to ask whether it could compile here.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

COMPILER = "torch._dynamo"
_UTILS = f"{COMPILER}.utils"


def compiler_imported() -> bool:
    """Whether something in this process has imported torch's compiler."""
    return not isinstance(sys.modules.get(COMPILER), _StandIn | None)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Have a stand-in for torch's compiler in its place within, until more is asked of it than marks and settings.

    What is asked for besides, by attribute or import, imports the compiler.
    """
    if COMPILER in sys.modules:
        yield
        return
    # DDP asks whether compiled code reduces gradients, a setting that nobody changes without the import
    utils = _StandIn(_UTILS, get_optimize_ddp_mode=lambda: "ddp_optimizer", is_compile_supported=_is_compile_supported)
    stand_ins: dict[str, ModuleType] = {COMPILER: _StandIn(COMPILER, utils=utils, disable=_disable), _UTILS: utils}
    finder = _Finder()
    sys.modules.update(stand_ins)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _leave()


class _StandIn(ModuleType):
    """Some names of a module that is not imported."""

    __path__ = []

    def __init__(self, name: str, **names: Any):
        super().__init__(name)
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what looks through all modules asks for these
            raise AttributeError(name)
        _leave()
        return getattr(importlib.import_module(self.__name__), name)


class _Finder:
    """Finds the modules of the compiler that have no stand-in, by importing it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{COMPILER}.") or compiler_imported():
            return None
        from importlib.machinery import ModuleSpec

        _leave()
        importlib.import_module(name)
        return ModuleSpec(name, self)  # type: ignore[arg-type]  # it has what a loader has

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]  # it has been imported
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _leave() -> None:
    for name in (COMPILER, _UTILS):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _disable(fn: Any = None, recursive: bool = True, **how: Any) -> Any:
    """Return a function with a mark that holds from the import of the compiler on."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **how)

    def mark() -> Callable[..., Any]:
        _leave()
        return importlib.import_module(COMPILER).disable(fn, recursive, **how)

    if not isinstance(fn, FunctionType):
        return mark()
    marked = functools.cache(mark)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return marked()(*args, **kwargs) if compiler_imported() else fn(*args, **kwargs)

    return call


def _is_compile_supported(device: Any) -> Any:
    _leave()
    return importlib.import_module(_UTILS).is_compile_supported(device)


_is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as the function itself has
