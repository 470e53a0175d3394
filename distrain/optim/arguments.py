"""Arguments of a recipe, checked against the signature of what they go to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distrain.config import close_names

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def argument_names(build: Callable[..., Any]) -> list[str] | None:
    """Return the names of the arguments that `build` takes, or None where it takes any."""
    parameters = inspect.signature(build).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.kind in NAMED]


def argument_problems(
    build: Callable[..., Any],
    args: Mapping[str, Any],
    where: str,
    what: str,
    *,
    given: Iterable[str] = (),
    section_keys: Iterable[str] = (),
) -> list[str]:
    """Return one line for each of `args` that `build` does not take and for each that it needs and was not given.

    `where` is the recipe's key ("optim"), `what` names `build`; `given` are arguments that the caller passes itself;
    `section_keys` are further keys of the section that a misspelt one may have meant.
    """
    given = set(given)
    names = argument_names(build)
    own = [name for name in names or [] if name not in given]
    takes = f"; it takes {', '.join(own)}" if own else "; it takes none"
    problems = [
        f"{where}.{key}: {what} has no argument {key!r}{close_names(key, [*own, *section_keys]) or takes}"
        for key in args
        if names is not None and key not in own
    ]
    problems += [
        f"{where}.{parameter.name}: {what} needs it, and it was not given"
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind in NAMED
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in given
        and parameter.name not in args
    ]
    return problems


def squeezed(name: str) -> str:
    """Return a name without what spellings differ in: 'BCEWithLogits' and 'bce_with_logits' become equal."""
    return name.lower().replace("_", "").replace("-", "")


def snake(name: str) -> str:
    """Return a class name in snake case: 'CrossEntropy' -> 'cross_entropy', 'KLDiv' -> 'kl_div', 'L1' -> 'l1'."""
    parts = ""
    for index, letter in enumerate(name):
        starts = letter.isupper() and index > 0
        after_lower = starts and (name[index - 1].islower() or name[index - 1].isdigit())
        before_lower = starts and index + 1 < len(name) and name[index + 1].islower()
        parts += ("_" if after_lower or (before_lower and name[index - 1].isupper()) else "") + letter.lower()
    return parts
