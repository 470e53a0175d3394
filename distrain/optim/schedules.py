"""A recipe's schedule as a function of the step: durations in steps, arguments checked.

The shapes are in `distrain.config.schedules`. A user's function is called as f(s, T, **arguments) and returns the share
at step s: a number of 0 or more that depends on nothing else, because a resumed run asks for any step again. If the
recipe has a warm-up, its result is multiplied by min(1, (s + 1) / W).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distrain.config import Duration, Horizon, OwnScheduleSection, ScheduleSection, UserError
from distrain.config.arguments import argument_problems, named_parameters
from distrain.config.registry import schedules
from distrain.system.numbers import a_kind
from distrain.system.output import error_line

_ENDLESS = 2**62 + 1
"""Steps of a run of unknown length."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule whose durations are in optimizer steps; calling it returns the share of the peak learning rate."""

    name: str
    function: Callable[[int, int], Any]
    """Called with the step and the number of steps."""
    total: int
    """Steps of the run."""
    warmup: int = 0
    """Steps of a linear warm-up before the function's own."""

    def __call__(self, step: int) -> float:
        """Return the share of the peak at `step` (0-based), 0 or more; beyond the last step, that of the last.

        Raises UserError, naming the step, if the function fails or returns anything else.
        """
        step = min(step, self.total - 1)
        try:
            returned = self.function(step, self.total)
        except Exception as error:
            where = f"at step {step} of {self.total}"
            raise UserError(f"schedule: {self.name} failed {where}: {error_line(error)}") from error
        try:
            share = float(returned)
        except Exception:
            share = math.nan
        if not 0 <= share < math.inf:
            raise UserError(
                f"schedule: {self.name} returned {returned!r} at step {step} of {self.total}, counted from 0; expected "
                "the share of optim.lr, a finite number of 0 or more"
            )
        return share * min(1.0, (step + 1) / self.warmup) if self.warmup else share


def check_schedule(section: ScheduleSection | OwnScheduleSection) -> list[str]:
    """Return one line for each key that this schedule does not take, and for each that its function lacks."""
    if isinstance(section, OwnScheduleSection):
        try:
            _user_function(section)
        except UserError as error:
            return str(error).splitlines()
        return []
    fields, takes = ScheduleSection.model_fields, _keys(section.name)
    return [
        f"schedule.{key}: {section.name!r} does not take it (only "
        f"{' and '.join(repr(name) for name in schedules.names() if key in _keys(name))}); remove it"
        for key in fields
        if key != "name" and key not in takes and getattr(section, key) != fields[key].default
    ]


def _keys(name: str) -> list[str]:
    """Return the keys that a built-in schedule takes."""
    return list(named_parameters(schedules.find(name).value)[0])[2:]


def _user_function(section: OwnScheduleSection) -> Callable[[int, int], Any]:
    """Return the user's function with the recipe's arguments, which are checked; raises UserError."""
    found = schedules.find(section.name).value
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else a_kind(found)
        raise UserError(f"schedule.name: {section.name!r} is {kind}; expected a function (step, total_steps, ...)")
    given = list(inspect.signature(found).parameters)[:2]
    if problems := argument_problems(found, section.args, "schedule", repr(section.name), given=given):
        raise UserError("\n".join(problems))
    try:
        inspect.signature(found).bind(0, 1, **section.args)
    except TypeError as error:
        call = f"f(step, total_steps{', ...' if section.args else ''})"
        raise UserError(f"schedule.name: {section.name!r} cannot be called as {call}: {error}") from error
    return lambda step, total: found(step, total, **section.args)


def resolve_schedule(section: ScheduleSection | OwnScheduleSection, horizon: Horizon) -> Schedule:
    """Return the schedule with its durations in steps.

    Raises UserError with every problem: keys that it does not take, phases longer than the run, durations that
    `horizon` cannot convert to steps, and a user's function that at the first or last step returns no
    share, or another one when it is called again.
    """
    problems = check_schedule(section)

    def steps(key: str) -> int:
        duration: Duration | None = getattr(section, key)
        try:
            return horizon.steps(duration, f"schedule.{key}") if duration is not None else 0
        except UserError as error:
            problems.append(str(error))
            return 0

    name = section.name
    total = horizon.total_steps
    keys = ["warmup"] if isinstance(section, OwnScheduleSection) else _keys(name)
    length = {key: steps(key) for key in ("warmup", "decay", "every") if key in keys}
    if total is None and name not in ("constant", "step"):
        problems.append(f"schedule.name: {name!r} needs to know the length of the run; take 'constant' or 'step'")
    warmup, decay = length["warmup"], length.get("decay", 0)
    if total is not None and warmup + decay > total:
        phases = f"schedule.warmup is {warmup}" + (f" and schedule.decay {decay}" if decay else "")
        problems.append(f"{phases} steps and the whole run only {total}; shorten the phases or train for longer")
    if problems:
        raise UserError("\n".join(problems))
    if isinstance(section, OwnScheduleSection):
        assert total is not None
        schedule = Schedule(name, _user_function(section), total, warmup)
        ends = (0, total - 1)
        first, again = ([schedule(step) for step in ends] for _ in range(2))  # a failure shows before the first step
        for step, share, other in zip(ends, first, again, strict=True):
            if share != other:
                raise UserError(
                    f"schedule: {name} returned {share:g} and then {other:g} at step {step} of {total}; expected a "
                    "function of the step alone, without counters and random numbers: a resumed run calls it anew"
                )
        return schedule
    numbers = {key: getattr(section, key) for key in ("final", "gamma") if key in keys}
    shape = functools.partial(schedules.find(name).value, **length, **numbers)
    return Schedule(name, shape, total if total is not None else _ENDLESS)


def lr_at(schedule: ScheduleSection | OwnScheduleSection, step: int, horizon: Horizon) -> float:
    """Return the share of the peak learning rate, 0..1, at the optimizer step `step` (0-based): both in one call."""
    return resolve_schedule(schedule, horizon)(step)
