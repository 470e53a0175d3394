"""Callback objects that are given to several runs of one process: what one keeps from a run decides the next.

Counts, texts and the lengths of lists are looked at after `on_start` and at the end of a run. What a run has changed,
and the next one begins with as it was left, is named; what `on_start` sets anew is not.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

from distrain.training.callbacks.base import Callback

logger = logging.getLogger(__name__)

_CHANGED: dict[int, tuple[weakref.ref[Callback], dict[str, Any]]] = {}
"""By the id of an object: what the last run has changed on it, as it was left."""


class Reuse:
    """The users' callbacks of a run."""

    def __init__(self, named: Mapping[str, Callback]):
        self._named = named
        self._began: dict[str, dict[str, Any]] = {}

    def began(self, *, resumes: bool) -> None:
        """Take up what each has after `on_start`; warns of what is another run's."""
        for name, callback in self._named.items():
            self._began[name] = now = _plain(callback)
            known, left = _CHANGED.get(id(callback), (None, {}))
            carried = [key for key, value in left.items() if key in now and now[key] == value]
            if known is not None and known() is callback and carried and not resumes:
                logger.warning(
                    f"callback {name} was given to a run before, and begins with what that has left in "
                    f"{', '.join(carried)}; give each run an object of its own, or set it in on_start"
                )

    def ended(self) -> None:
        """Note what the run has changed."""
        for name, began in self._began.items():
            callback = self._named[name]
            changed = {key: value for key, value in _plain(callback).items() if began.get(key, _NONE) != value}
            _CHANGED[id(callback)] = weakref.ref(callback), changed


_NONE = object()


def _plain(callback: Callback) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in getattr(callback, "__dict__", {}).items():
        if isinstance(value, bool | int | float | str):
            found[key] = value
        elif isinstance(value, list | dict | set):
            found[key] = type(value).__name__, len(value)
    return found
