"""The learning rate as a pure function of the optimizer step.

Steps are counted from 0, and step s uses the rate `optim.lr * share(s)`. With T the steps of the run and W those of
the warm-up, the warm-up is (s + 1) / W for s < W (as in nanoGPT and torchtitan: the first step already moves, and step
W - 1 has the peak). What follows starts from the peak at step a = max(W - 1, 0) and has exactly `final` at the last
step, T - 1, with p = (s - a) / (T - 1 - a):

    constant             1
    linear               1 - (1 - final) p
    cosine               final + (1 - final) (1 + cos(pi p)) / 2                       Loshchilov & Hutter 2017
    step                 gamma ^ floor(s / every), counted from step 0 and not from the end of the warm-up
    warmup_stable_decay  1, and from step T - 1 - decay on linear to `final`           Hu et al. 2024
    one_cycle            its own rise: from 1/25 along a cosine to the peak at step R - 1, then along a cosine to
                         `final`; R is the warm-up where one is given, otherwise 30 % of T   Smith & Topin 2018

These are torch's CosineAnnealingLR(T_max=T-1), LinearLR(total_iters=T-1), StepLR and OneCycleLR. With `final: 0` the
last step changes nothing, as there. A run that ends with its warm-up stays at the peak.

A function of the user's own is called as f(s, T, **arguments) and gives the share at step s: a number of 0 or more that
depends on nothing else, as a resumed run asks for any step anew. Where the recipe gives a warm-up, what it gives is
multiplied by min(1, (s + 1) / W).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distrain.config import Duration, Horizon, OwnScheduleSection, ScheduleSection, UserError, resolve_object
from distrain.config.arguments import argument_problems
from distrain.system.output import error_line

_KEYS = {
    "constant": {"warmup"},
    "linear": {"warmup", "final"},
    "cosine": {"warmup", "final"},
    "step": {"warmup", "every", "gamma"},
    "one_cycle": {"warmup", "final"},
    "warmup_stable_decay": {"warmup", "final", "decay"},
}
_RISE_START = 1 / 25
"""Where one_cycle starts (torch's div_factor)."""
_RISE_SHARE = 0.3
"""The share of the run that one_cycle rises for where no warm-up is given (torch's pct_start)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule whose durations are in optimizer steps. Called with a step, it returns the share of the peak rate."""

    name: str
    warmup: int
    """Steps of the linear warm-up (the cosine rise, for one_cycle)."""
    last: int
    """The last step of the run, T - 1."""
    start: float
    """The step from which the rate falls from its peak."""
    final: float
    gamma: float
    every: int

    def __call__(self, step: int) -> float:
        """Return the share of the peak, 0..1, at `step` (0-based); beyond the last step, that of the last."""
        name = self.name
        step = min(step, self.last)
        if name == "step":
            return min(1.0, (step + 1) / self.warmup if self.warmup else 1.0) * self.gamma ** (step // self.every)
        if step < self.warmup and name != "one_cycle":
            return (step + 1) / self.warmup
        if step <= self.start:
            if name != "one_cycle" or self.start <= 0:
                return 1.0
            return 1 - (1 - _RISE_START) * (1 + math.cos(math.pi * step / self.start)) / 2
        if name == "constant":
            return 1.0
        progress = (step - self.start) / (self.last - self.start)
        if progress >= 1:
            return self.final
        if name in ("cosine", "one_cycle"):
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.final) * progress


@dataclass(frozen=True, slots=True)
class OwnSchedule:
    """A function of the user's own. Called with a step, it returns the share of the peak rate."""

    name: str
    function: Callable[[int, int], Any]
    """Called with the step and the number of steps."""
    warmup: int
    """Steps of the linear warm-up."""
    total: int
    """Steps of the run."""

    def __call__(self, step: int) -> float:
        """Return the share of the peak at `step` (0-based), 0 or more; beyond the last step, that of the last.

        Raises UserError, naming the step, where the function fails or gives anything else.
        """
        step = min(step, self.total - 1)
        try:
            given = self.function(step, self.total)
        except Exception as error:
            where = f"schedule: {self.name} failed at step {step} of {self.total}"
            raise UserError(f"{where}: {error_line(error)}") from error
        try:
            share = float(given)
        except Exception:
            share = math.nan
        if not 0 <= share < math.inf:
            raise UserError(
                f"schedule: {self.name} gave {given!r} at step {step} of {self.total}, counted from 0; expected the "
                "share of optim.lr, a finite number of 0 or more"
            )
        return share * min(1.0, (step + 1) / self.warmup) if self.warmup else share


AnySchedule = Schedule | OwnSchedule


def check_schedule(section: ScheduleSection | OwnScheduleSection) -> list[str]:
    """Return one line for each key that means nothing to this schedule, and for each that its function lacks."""
    if isinstance(section, OwnScheduleSection):
        try:
            _own_function(section)
        except UserError as error:
            return str(error).splitlines()
        return []
    fields = ScheduleSection.model_fields
    return [
        f"schedule.{key}: {section.name!r} has no use for it (only "
        f"{' and '.join(repr(name) for name, keys in _KEYS.items() if key in keys)}); remove it"
        for key in fields
        if key != "name" and key not in _KEYS[section.name] and getattr(section, key) != fields[key].default
    ]


def _own_function(section: OwnScheduleSection) -> Callable[[int, int], Any]:
    """Return the user's function with the recipe's arguments, which are checked; raises UserError."""
    found = resolve_object(section.name)
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else f"a {type(found).__name__}"
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


def resolve_schedule(section: ScheduleSection | OwnScheduleSection, horizon: Horizon) -> AnySchedule:
    """Return the schedule with its durations in steps.

    Raises UserError with every problem: keys without a meaning, phases longer than the run, durations that
    `horizon` cannot turn into steps; and where a function of the user's own gives no share at the first or last step.
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
    warmup = steps("warmup")
    decay = steps("decay") if name == "warmup_stable_decay" else 0
    every = steps("every") if name == "step" else 1
    if total is None and name not in ("constant", "step"):
        problems.append(f"schedule.name: {name!r} needs to know the length of the run; take 'constant' or 'step'")
    if total is not None and warmup + decay > total:
        phases = f"schedule.warmup is {warmup}" + (f" and schedule.decay {decay}" if decay else "")
        problems.append(f"{phases} steps and the whole run only {total}; shorten the phases or train for longer")
    if problems:
        raise UserError("\n".join(problems))
    if isinstance(section, OwnScheduleSection):
        assert total is not None
        own = OwnSchedule(name, _own_function(section), warmup, total)
        own(0), own(total - 1)  # what it cannot give is found before the first step
        return own

    last = total - 1 if total is not None else 2**62
    start: float = max(warmup - 1, 0)
    if name == "one_cycle":
        # Where torch's OneCycleLR has its peak, which need not be a whole step.
        start = max(warmup - 1 if warmup else _RISE_SHARE * (last + 1) - 1, 0)
    elif name == "warmup_stable_decay":
        start = max(start, last - decay)
    return Schedule(name, warmup, last, start, section.final, section.gamma, every)


def lr_at(schedule: ScheduleSection | OwnScheduleSection, step: int, horizon: Horizon) -> float:
    """Return the share of the peak learning rate, 0..1, at the optimizer step `step` (0-based).

    A loop resolves the schedule once with `resolve_schedule` and calls the result; this is the same in one call.
    """
    return resolve_schedule(schedule, horizon)(step)
