"""How the optimizer's settings in the recipe differ from those of the trainer that a checkpoint was imported from.

A run takes those of its recipe, as ever: where these differ, its next step is not the one that the other trainer would
have taken, and only the two together show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distrain.system.errors import some

_WITHOUT_EFFECT = {"params", "initial_lr", "lr_scale", "foreach", "fused", "capturable", "differentiable"}
"""Settings that change no result. Where weight decay applies is noted with the optimizer's class."""
_OF_CLASS = {"decoupled_weight_decay"}


def changed_settings(
    stored: Sequence[Mapping[str, Any]], groups: Iterable[tuple[Sequence[str], Mapping[str, Any]]]
) -> list[str]:
    """Return a note for each setting that differs.

    `stored` are the imported groups, `groups` the optimizer's own with the names of their parameters; both have the
    learning rate of the next step.
    """
    before = {name: group for group in stored for name in group.get("params", ()) if isinstance(name, str)}
    found: dict[tuple[str, str, str], list[str]] = {}
    known: set[str] = set()
    for names, group in groups:
        for name in before.keys() & set(names):
            known.add(name)
            for key in sorted((before[name].keys() & group.keys()) - _WITHOUT_EFFECT - _OF_CLASS):
                was, now = before[name][key], group[key]
                if not _same(was, now):
                    found.setdefault((key, _shown(was), _shown(now)), []).append(name)
    return [
        f"optim: {key} is {now}, and was {was} in the imported optimizer"
        + (f", for {some(sorted(names))}" if len(names) < len(known) else "")
        for (key, was, now), names in sorted(found.items())
    ]


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, list | tuple) and isinstance(now, list | tuple):
        return len(was) == len(now) and all(map(_same, was, now))
    try:
        return math.isclose(float(was), float(now), rel_tol=1e-6)
    except (TypeError, ValueError):
        return bool(was == now)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
