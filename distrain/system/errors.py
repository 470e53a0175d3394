"""Errors of users: what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct. The message says what was found, what was expected and what to do."""


class RecipeError(UserError):
    """An invalid recipe; `problems` holds one line for each problem."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, list[str]]]:
        # an exception is pickled with its message, which is no argument of this one
        return type(self), (self.source, self.problems)


def close_names(name: str, choices: Iterable[str], then: str = "") -> str:
    """Return "; did you mean 'a' or 'b'?" for the choices nearest to `name`, or an empty string.

    `then`: a clause that follows with either, as a sentence of its own after the question.
    """
    by_lower = {choice.lower(): choice for choice in reversed(list(choices))}  # of equals the first holds
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if not found:
        return f"; {then}" if then else ""
    question = f"; did you mean {' or '.join(repr(by_lower[match]) for match in found)}?"
    return f"{question} {then[0].upper()}{then[1:]}" if then else question


def some(names: Iterable[object], limit: int = 5) -> str:
    """Return the first few names or numbers, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more
