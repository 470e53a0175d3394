"""The arguments that a recipe gives, held against the signature of what they go to."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distrain.system.errors import close_names

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def named_parameters(build: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of `build` that can be given by name, and whether it takes any others."""
    try:
        every = inspect.signature(build).parameters.values()
    except ValueError:  # written in C without a signature
        return {}, True
    return {p.name: p for p in every if p.kind in _NAMED}, any(p.kind is p.VAR_KEYWORD for p in every)


def takes(build: Callable[..., Any], argument: str) -> bool:
    """Whether an argument of that name can be given."""
    parameters, takes_any = named_parameters(build)
    return takes_any or argument in parameters


def argument_problems(
    build: Callable[..., Any],
    args: Mapping[str, Any],
    where: str,
    what: str,
    *,
    given: Collection[str] = (),
    filled: Collection[str] = (),
    section_keys: Iterable[str] = (),
    parameters: Mapping[str, inspect.Parameter] | None = None,
    takes_any: bool | None = None,
    refused: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> list[str]:
    """Return one line for each thing that is wrong with `args`; empty where `build` can be called with them.

    That is: an argument that it does not take, with the close ones; one that the caller passes itself, which are
    `given`; a value of another type than its annotation says, where that is one of plain values; one that it needs.
    `where` is the recipe's key ("optim"), `what` names `build`. `filled`: what the caller passes where the recipe does
    not. `section_keys`: further keys of the section, that a
    misspelt one may have meant. `parameters` and `takes_any` hold in place of the signature. `refused` {argument: why}
    is not passed on. `missing` {argument: why it must be in the recipe}.
    """
    signature, any_of_them = named_parameters(build)
    parameters = signature if parameters is None else parameters
    takes_any = any_of_them if takes_any is None else takes_any
    refused, missing = refused or {}, missing or {}
    own = [name for name in parameters if name not in given and name not in refused]
    problems = []
    hints = _type_hints(build) if args else {}
    for key, value in args.items():
        if key in refused:
            problems.append(f"{where}.{key}: {refused[key]}")
        elif key in given:
            problems.append(f"{where}.{key}: {what} is given {key!r} by distrain itself; remove it, or rename yours")
        elif key not in parameters:
            if not takes_any:
                hint = (
                    close_names(key, [*own, *section_keys])
                    or f"; it takes {shown_parameters({name: parameters[name] for name in own})}"
                )
                problems.append(f"{where}.{key}: {what} has no argument {key!r}{hint}")
        elif key in hints and (reason := _misfit(value, hints[key], parameters[key].default)):
            problems.append(f"{where}.{key}: {value!r} does not fit: {reason}")
    problems += [
        f"{where}.{name}: {what} needs it, and {missing.get(name, 'it was not given')}"
        for name in own
        if parameters[name].default is inspect.Parameter.empty and name not in args and name not in filled
    ]
    return problems


def shown_parameters(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return parameters as a signature has them, in words where there are none."""
    empty = inspect.Parameter.empty
    parts = [name if each.default is empty else f"{name}={each.default!r}" for name, each in parameters.items()]
    return ", ".join(parts) or "none"


def _type_hints(build: Callable[..., Any]) -> dict[str, Any]:
    target = build.__init__ if isinstance(build, type) else build  # type: ignore[misc]
    try:
        return typing.get_type_hints(target, include_extras=True)
    except Exception:  # names that exist for type checkers alone, a partial, an object
        return {}


def _misfit(value: Any, hint: Any, default: Any) -> str | None:
    """Return why a value of a recipe is not what an annotation says; None where it is, or that cannot be decided."""
    if value is None and default is None:
        return None
    try:
        adapter, text = TypeAdapter(hint), json.dumps(value)
    except Exception:  # an annotation of tensors or modules; a value that was put into a recipe in Python
        return None
    try:
        adapter.validate_json(text, strict=True)  # as in a file: a list is what a tuple is written as
    except ValidationError as error:
        return "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
    return None
