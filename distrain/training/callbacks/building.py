"""The callbacks that a recipe names: checked before anything is built, and made."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from distrain.config import Component, Duration, Recipe, UserError, close_names
from distrain.config.arguments import argument_problems
from distrain.config.registry import callbacks
from distrain.system.numbers import a_kind
from distrain.system.output import error_line
from distrain.training.callbacks.base import HOOKS, Callback


def check_callbacks(recipe: Recipe) -> list[str]:
    """Return one line for each callback that is none, and for each of its arguments that it does not take or lacks."""
    problems: list[str] = []
    for place, item in enumerate(recipe.callbacks):
        try:
            _factory(item, place)
        except UserError as error:
            problems += str(error).splitlines()
    return problems


def build_callbacks(recipe: Recipe, more: Sequence[Callback] = ()) -> dict[str, Callback]:
    """Return the recipe's callbacks and then `more`, in order, by name: the class's, or the function's that made it.

    Raises UserError for what is none, and for what its class refuses.
    """
    found: list[tuple[str, Callback]] = []
    for place, item in enumerate(recipe.callbacks):
        build, args = _factory(item, place)
        try:
            made = build(**args)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"callbacks.{place}: {item.name!r} failed to be built: {error_line(error)}") from error
        found.append((item.name.rpartition(":")[2], _checked(made, f"callbacks.{place}: {item.name!r}")))
    for each in more:
        found.append((type(each).__name__, _checked(each, repr(each))))
    named: dict[str, Callback] = {}
    for name, each in found:
        same = sum(other.partition("#")[0] == name for other in named)
        named[f"{name}#{same + 1}" if same else name] = each
    return named


def _factory(item: Component, place: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what makes the callback, and its arguments, with durations parsed."""
    where, what = f"callbacks.{place}", repr(item.name)
    found = callbacks.find(item.name).value
    if not callable(found):
        raise UserError(f"{where}.name: {what} is {found!r}; expected a subclass of distrain.Callback")
    if inspect.isclass(found):
        if not issubclass(found, Callback):
            raise UserError(f"{where}.name: {what} is no subclass of distrain.Callback; make it one")
        _check_methods(found, f"{where}: {what}")
    problems = argument_problems(found, item.args, where, what)
    args = dict(item.args)
    for name, parameter in inspect.signature(found).parameters.items():
        if name in args and args[name] is not None and _is_duration(parameter.annotation, found):
            try:
                args[name] = Duration.parse(args[name])
            except ValueError as error:
                problems.append(f"{where}.{name}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return found, args


def _is_duration(annotation: Any, owner: Any) -> bool:
    # as text where the file has `from __future__ import annotations`
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return "Duration" in re.findall(r"\w+", text)


def _checked(made: Any, what: str) -> Callback:
    if not isinstance(made, Callback):
        raise UserError(f"{what} made {a_kind(made)}; expected an object of a subclass of distrain.Callback")
    _check_methods(type(made), what)
    return made


def _check_methods(kind: type[Callback], what: str) -> None:
    for name in dir(kind):
        if name.startswith("on_") and name not in HOOKS and callable(getattr(kind, name)):
            hint = close_names(name, HOOKS) or f"; expected one of {', '.join(HOOKS)}"
            raise UserError(f"{what} has a method {name!r}, which nothing calls{hint}")
    both = [name for name in ("state_dict", "load_state_dict") if hasattr(kind, name)]
    if len(both) == 1:
        raise UserError(f"{what} has {both[0]} alone; expected state_dict and load_state_dict, or neither")
