"""Tasks by name, and the form of a batch of each. Imports no torch; a task of one's own is imported when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from distrain.config.registry import tasks
from distrain.config.user_files import is_object_spec
from distrain.system.errors import UserError, close_names

Form = Literal[
    "classification",
    "binary",
    "multilabel",
    "regression",
    "segmentation",
    "token_classification",
    "language_modeling",
    "seq2seq",
    "custom",
]
"""What targets are, for losses, metrics and models by name; `custom` where a task alone knows that."""

FORMS: dict[str, Form] = {form: form for form in get_args(Form) if form != "custom"} | {"dpo": "custom"}
"""Of the built-in tasks."""


def form_of(name: str) -> Form:
    """Return the form of a task's batches. Imports one's own; raises UserError for what is no task."""
    if name in FORMS:
        return FORMS[name]
    form: Any = getattr(tasks.find(name).value, "form", None)
    if form not in get_args(Form):
        raise UserError(
            f"task: {name!r} is no task: its `form` is {form!r}, expected one of {', '.join(get_args(Form))}; let its "
            "class inherit from distrain.Task"
        )
    known: Form = form
    return known


def unknown_task(name: str) -> str | None:
    """Return what is wrong with a task's name, or None; imports nothing of the task."""
    if name in FORMS or is_object_spec(name) or name in tasks.installed():
        return None
    known: Iterable[str] = [*FORMS, *tasks.installed()]
    return (
        f"found {name!r}, expected one of {', '.join(map(repr, known))}, or your own as 'path/to/file.py:NAME'"
        f"{close_names(name, known)}"
    )
