"""What the recipe's section `tune` comes to, once in a run: for the device, the precision, the strategy, the model.

A rule for each key says what `auto` is, why, and whether `true` is possible at all. To add one: a field in
`TuneSection`, a rule here, and `world.tuning["key"]` where it acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from distrain.config import TuneSection, UserError


class Choice(NamedTuple):
    """What a key comes to."""

    on: bool
    why: str
    possible: bool = True
    """Whether it works here; where not, `true` is refused."""


@dataclass(frozen=True)
class Facts:
    """What rules go by. The same on every rank."""

    device: str
    """cuda or cpu."""
    capability: tuple[int, int]
    """Of the GPU; (0, 0) for a CPU."""
    precision: str
    """The recipe's, with `auto` resolved."""
    autocast: bool
    """Whether the forward pass is cast to something narrower."""
    deterministic: bool
    strategy: str
    model: nn.Module
    """As it was built, before it is sharded; maybe on the meta device."""

    def has(self, *kinds: type[nn.Module]) -> bool:
        """Whether the model has a layer of these kinds."""
        return any(isinstance(module, kinds) for module in self.model.modules())


@dataclass(frozen=True)
class Tuning:
    """Which optimisations a run uses, and why."""

    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __getitem__(self, key: str) -> bool:
        """Whether `tune.key` is on; nothing is where no model has been built yet."""
        return key in self.choices and self.choices[key].on

    def record(self) -> dict[str, dict[str, object]]:
        """Return what effect.json holds: {key: {on, why}}."""
        return {key: {"on": each.on, "why": each.why} for key, each in self.choices.items()}

    def describe(self) -> str:
        """Return what is on and what is not, with the reasons, in a line."""
        on = ", ".join(f"{key} ({each.why})" for key, each in self.choices.items() if each.on)
        off = ", ".join(f"{key} ({each.why})" for key, each in self.choices.items() if not each.on)
        return "; ".join(filter(None, (on, off and f"off: {off}")))


def resolve_tuning(section: TuneSection, facts: Facts, *, lenient: bool = False) -> Tuning:
    """Return what a recipe's section `tune` comes to.

    Raises UserError naming each key that is true and cannot work here; with `lenient`, for a model that is only used
    and maybe elsewhere than it was trained, such a key is off.
    """
    choices, problems = {}, []
    for key, rule in RULES.items():
        asked, choice = getattr(section, key), rule(facts)
        if asked is False:
            choice = Choice(False, f"tune.{key} is false")
        elif asked is True and choice.possible:
            choice = Choice(True, choice.why if choice.on else f"tune.{key} is true")
        elif asked is True and not lenient:
            problems.append(f"tune.{key} is true, and cannot work here: {choice.why}; auto takes it where it can")
        choices[key] = choice
    if problems:
        raise UserError("\n".join(problems))
    return Tuning(choices)


def _no(why: str) -> Choice:
    return Choice(False, why, possible=False)


# --------------------------------------------------------------------------------------------------------------------
# The rules


def _tf32(facts: Facts) -> Choice:
    if facts.device != "cuda" or facts.capability < (8, 0):
        return _no("TF32 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or more")
    if facts.precision == "tf32":
        return Choice(True, "train.precision is tf32")
    if facts.precision == "fp64":
        return _no("under fp64 nothing is computed in fp32")
    if not facts.autocast:
        return Choice(False, f"train.precision is {facts.precision}")
    return Choice(True, f"for what stays fp32 under {facts.precision}")


RULES: dict[str, Callable[[Facts], Choice]] = {"tf32": _tf32}
"""By the keys of `TuneSection`, all of them."""
