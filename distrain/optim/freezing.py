"""Parameters that are not trained before a step, which is computed from the recipe: nothing of it is stored.

They are in the optimizer from the start, in groups of their own, and their gradient is computed and dropped: it counts
in no norm, and the optimizer passes them over, without weight decay and without a state. So until then a run computes
what it would if they were frozen for good, and from then on what it would if it were resumed without the freezing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from distrain.config import FreezeSection, Horizon, OptimSection, UserError
from distrain.system.numbers import counted

THAW = "thaw"
"""The key of an optimizer's group: the step, from 0, that is the first to train its parameters."""


def thaw_steps(section: OptimSection, horizon: Horizon | None) -> dict[int, int]:
    """Return {place in optim.freeze: the first step, from 0, that trains what matches}; raises UserError."""
    found, problems = {}, []
    for place, entry in enumerate(section.freeze):
        if not isinstance(entry, FreezeSection):
            continue
        assert horizon is not None, "what a duration means is known where a run is"
        where = f"optim.freeze[{place}].until"
        try:
            found[place] = horizon.steps(entry.until, where)
        except UserError as error:
            problems.append(str(error))
            continue
        if horizon.total_steps is not None and found[place] >= horizon.total_steps:
            problems.append(
                f"{where}: '{entry.until}' is {counted(found[place], 'step')}, and the whole run has "
                f"{horizon.total_steps:,}, so it never ends; write {entry.params!r} alone to freeze it for good"
            )
    if problems:
        raise UserError("\n".join(problems))
    return found


def is_frozen(group: Mapping[str, Any], step: int) -> bool:
    """Whether a group's parameters are not trained in `step`, from 0."""
    return bool(group.get(THAW, 0) > step)


def thaws(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the steps, from 0 and ascending, that are the first to train some parameters."""
    return sorted({group[THAW] for group in groups if THAW in group})


def drop_frozen(optimizer: Optimizer, step: int) -> bool:
    """Drop the gradients of what is not trained in `step`, from 0; returns whether there is such."""
    frozen = [group for group in optimizer.param_groups if is_frozen(group, step)]
    for group in frozen:
        for parameter in group["params"]:
            parameter.grad = None
    return bool(frozen)
