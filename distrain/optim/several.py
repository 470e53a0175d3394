"""Several optimizers, each with parameters of its own: which trains which, and how all of them are saved as one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.config import Horizon, OptimSection, PartSection, UserError
from distrain.optim.optimizers import build_optimizer, check_optimizer, names_by_pattern, trained_names

OPTIMIZER = "optimizer"
"""The key of an optimizer's group: the name in the recipe of the one of several that it belongs to."""


class Optimizers:
    """Several optimizers by name. No two of them train the same parameter."""

    def __init__(self, parts: Mapping[str, Optimizer]):
        self.parts = dict(parts)
        """In the recipe's order."""
        for name, part in self.parts.items():
            for group in part.param_groups:
                group[OPTIMIZER] = name

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, as they are now."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """What all keep: by the tensors that they were handed, and by keys of their own after the optimizer's name."""
        return {
            f"{name}/{key}" if isinstance(key, str) else key: value
            for name, part in self.parts.items()
            for key, value in part.state.items()
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)


def parts_of(optimizer: Any) -> dict[str, Any]:
    """Return optimizers by name: several, or the only one under an empty name."""
    return optimizer.parts if isinstance(optimizer, Optimizers) else {"": optimizer}


def classes_of(optimizer: Any) -> str:
    """Return the names of the optimizers' classes, each once, in words."""
    return " and ".join(dict.fromkeys(type(part).__name__ for part in parts_of(optimizer).values()))


# --------------------------------------------------------------------------------------------------------------------
# From a recipe


def in_part(name: str, text: str) -> str:
    """Return a message about a section `optim` or `schedule` with the full keys of one of several optimizers."""
    if not name:
        return text
    text = re.sub(r"(?<![\w.])schedule(?=[.:])", f"optim.{name}.schedule", text)
    return re.sub(r"(?<![\w.])optim(?=[.:])(?!\.\w+\.schedule)", f"optim.{name}", text)


def check_optimizers(sections: Mapping[str, OptimSection]) -> list[str]:
    """Return one line for each problem of the sections that can be found without a model."""
    return [in_part(name, problem) for name, section in sections.items() for problem in check_optimizer(section)]


def check_parts(model: nn.Module, sections: Mapping[str, OptimSection]) -> None:
    """Raise UserError unless each parameter that the model trains is matched by exactly one of several optimizers."""
    parts = {name: section for name, section in sections.items() if isinstance(section, PartSection)}
    if not parts:
        return
    problems = []
    owners: dict[str, list[str]] = {name: [] for name in trained_names(model)}
    for part, section in parts.items():
        for pattern in section.patterns:
            names, problem = names_by_pattern(model, pattern)
            if problem is not None:
                problems.append(f"optim.{part}.params: {problem}")
            for name in names:
                if name in owners and part not in owners[name]:
                    owners[name].append(part)
    if unowned := [name for name, of in owners.items() if not of]:
        problems.append(
            f"optim: {_listed(unowned)} {'is' if len(unowned) == 1 else 'are'} trained by no optimizer: no "
            f"{' and no '.join(f'optim.{part}.params' for part in parts)} matches; add a pattern, or freeze them in "
            "the model (requires_grad_(False))"
        )
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, of in owners.items():
        if len(of) > 1:
            shared.setdefault(tuple(of), []).append(name)
    for pair, names in shared.items():
        problems.append(
            f"optim: {_listed(names)} {'is' if len(names) == 1 else 'are'} matched by the params of "
            f"{' and '.join(pair)}; each parameter has one optimizer: make the patterns narrower"
        )
    if problems:
        raise UserError("\n".join(problems))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


@contextmanager
def full_keys(name: str) -> Iterator[None]:
    """Have errors about a section `optim` or `schedule` name the full keys of one of several optimizers."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(in_part(name, str(error))) from error


def build_optimizers(
    model: nn.Module, sections: Mapping[str, OptimSection], *, fused: Mapping[str, bool], horizon: Horizon
) -> Any:
    """Freeze what the sections freeze, and return a torch optimizer, or `Optimizers` where they are several.

    `fused`: for each whether one kernel steps all its parameters. Raises UserError with every problem of a section.
    """
    built = {}
    for name, section in sections.items():
        with full_keys(name):
            built[name] = build_optimizer(model, section, fused=fused[name], horizon=horizon)
    return built[""] if "" in built else Optimizers(built)
