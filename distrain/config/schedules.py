"""The shapes of the learning rate: each a pure function of the optimizer step.

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

To add one, write here a function f(step, total_steps, ...) decorated with `schedules.register(NAME)`; its further
parameters are keys of the recipe's `schedule`. Durations in the six above are given in steps.
"""

from __future__ import annotations

import inspect
import math

from distrain.config.registry import schedules

_RISE_START = 1 / 25
"""Where one_cycle starts (torch's div_factor)."""
_RISE_SHARE = 0.3
"""The share of the run that one_cycle rises for where no warm-up is given (torch's pct_start)."""


def _cosine_fall(progress: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2 if progress < 1 else final


def _linear_fall(progress: float, final: float) -> float:
    return 1 - (1 - final) * progress if progress < 1 else final


@schedules.register("constant")
def constant(step: int, total_steps: int, *, warmup: int) -> float:
    """The peak."""
    return (step + 1) / warmup if step < warmup else 1.0


@schedules.register("linear")
def linear(step: int, total_steps: int, *, warmup: int, final: float) -> float:
    """A straight line to `final`."""
    return warmup_stable_decay(step, total_steps, warmup=warmup, decay=total_steps, final=final)


@schedules.register("cosine")
def cosine(step: int, total_steps: int, *, warmup: int, final: float) -> float:
    """Half a cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup - 1, 0)
    return _cosine_fall((step - start) / (total_steps - 1 - start), final) if step > start else 1.0


@schedules.register("step")
def stairs(step: int, total_steps: int, *, warmup: int, every: int, gamma: float) -> float:
    """Multiplied by `gamma` each `every` steps."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return float(rise * gamma ** (step // every))


@schedules.register("one_cycle")
def one_cycle(step: int, total_steps: int, *, warmup: int, final: float) -> float:
    """A cosine up to the peak, which takes 30 % of the run without a warm-up, and one down to `final`."""
    # where torch's OneCycleLR has its peak, which need not be a whole step
    start = max(warmup - 1 if warmup else _RISE_SHARE * total_steps - 1, 0)
    if step > start:
        return _cosine_fall((step - start) / (total_steps - 1 - start), final)
    return 1 - (1 - _RISE_START) * (1 + math.cos(math.pi * step / start)) / 2 if start else 1.0


@schedules.register("warmup_stable_decay")
def warmup_stable_decay(step: int, total_steps: int, *, warmup: int, decay: int, final: float) -> float:
    """The peak, and a straight line to `final` over the last `decay` steps."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup - 1, total_steps - 1 - decay, 0)
    return _linear_fall((step - start) / (total_steps - 1 - start), final) if step > start else 1.0


SCHEDULES_WITH = {
    key: tuple(entry.name for entry in schedules.entries() if key in inspect.signature(entry.value).parameters)
    for key in ("final", "decay", "every", "gamma")
}
"""The schedules that take a key of the recipe's section, by key. All take `warmup`."""
