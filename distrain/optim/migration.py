"""Optimizer-state migration: what an optimizer can use of the state that another has stored.

Optimizers of one family have tensors of the same name and meaning: the moments of Adam are those of AdamW. The state
that the new optimizer needs is found by trying it on small parameters. What cannot be used is noted, and what would be
missing is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.optim import Optimizer

from distrain.config import OptimSection, UserError
from distrain.optim.sharding import ATTEMPT_ERRORS, toy_optimizer, toy_shapes, toy_steps

_ADAMS = ("Adam", "AdamW", "NAdam", "RAdam")
"""All have `exp_avg` and `exp_avg_sq`, the moments of the gradient, and `step`, which corrects their bias."""

_WITHOUT = {
    "max_exp_avg_sq": "amsgrad",
    "momentum_buffer": "momentum",
    "grad_avg": "centered",
}
"""Tensors that an optimizer has only with a setting, and the setting."""

_MEANING = {
    "mu_product": "the product of all its momenta so far",
    "max_exp_avg_sq": "the largest second moments since the start",
    "grad_avg": "the mean of the gradients",
}
"""The meaning of tensors that cannot start in the middle of a run."""


@dataclass(frozen=True)
class StateMigration:
    """How stored state becomes that of the recipe's optimizer."""

    keys: frozenset[str]
    """The names in the state that are kept."""
    notes: tuple[str, ...]
    """For the user: what is dropped, what starts anew, what changes its meaning."""


def plan_migration(stored_class: str, stored_keys: Collection[str], section: OptimSection) -> StateMigration:
    """Return what the recipe's optimizer keeps of a state with `stored_keys` that `stored_class` has stored.

    `stored_class` is the name of a class, as a checkpoint holds it; `stored_keys` are the names of its state of any
    parameter, tensors and numbers. Raises UserError if the state is of another family, or lacks what the new optimizer
    needs in the middle of a run.
    """
    stored = set(stored_keys)
    new = _tried(section)
    name = new.kind.__name__
    same = name == stored_class
    if not stored_class.isidentifier():  # the words for none
        raise UserError(
            f"the checkpoint holds {stored_class}, and {name} cannot start in the middle of a run; start a new run "
            "with model.weights set to the model that `distrain export` makes of it"
        )
    if not same and not (new.torchs_own and {stored_class, name} <= set(_ADAMS)):
        others = ", ".join(each for each in _ADAMS if each != stored_class)
        raise UserError(
            f"the stored state is that of {stored_class}, the recipe asks for {name}, which cannot use it; take "
            f"{stored_class}{f' or one of its family ({others})' if stored_class in _ADAMS else ''}, or start a new "
            "run with model.weights set to the exported model"
        )
    missing = sorted(new.keeps - stored)
    # if nothing is stored, as by SGD without momentum, an optimizer starts as in a new run
    if stored and (lost := [key for key in missing if key not in new.makes]):
        shown = "; ".join(f"{key}, {_MEANING[key]}" if key in _MEANING else key for key in lost)
        raise UserError(
            f"the stored state of {stored_class} has no {shown}, and {_described(name, lost)} cannot start without it "
            "in the middle of a run; keep the settings of the run so far, or start a new run with model.weights set to "
            "the exported model"
        )
    # only the author of a user's class knows when it has which state
    dropped = sorted(key for key in stored - new.keeps if new.torchs_own and (not same or key in _WITHOUT))
    notes = []
    if not same:
        notes.append(f"optim: {name} resumes from the state of {stored_class}")
    for key in missing:
        why = f": the run so far was without {_WITHOUT[key]}" if key in _WITHOUT else ""
        notes.append(f"optim: {key} starts anew{why}")
    for key in dropped:
        setting = f" without {_WITHOUT[key]}" if same else ""
        notes.append(f"optim: the stored {key} is dropped: {name} has none{setting}")
    was_decoupled = {"Adam": False, "AdamW": True}.get(stored_class)
    if not same and section.weight_decay and was_decoupled not in (None, new.decoupled):
        moments = "do not include it yet, and soon will" if was_decoupled else "still include it, and soon will not"
        notes.append(
            f"optim: {stored_class} and {name} apply weight_decay in different places; the stored moments {moments}"
        )
    return StateMigration(frozenset(stored - set(dropped)), tuple(notes))


def _described(name: str, lost: list[str]) -> str:
    settings = [_WITHOUT[key] for key in lost if key in _WITHOUT]
    return f"{name} with {', '.join(settings)}" if settings else name


@dataclass(frozen=True)
class _Tried:
    kind: type[Optimizer]
    torchs_own: bool
    keeps: set[str]
    """The names in its state of a parameter."""
    makes: set[str]
    """Those that it makes anew if they are missing in the middle of a run."""
    decoupled: bool
    """Whether weight decay applies to the weights and not through the gradients."""


def _tried(section: OptimSection) -> _Tried:
    shapes = toy_shapes(section)
    optimizer, parameters = toy_optimizer(section, shapes)
    toy_steps(optimizer, parameters, 2)
    # all of them: one may keep other things for matrices than for vectors
    keeps = {key for parameter in parameters for key in optimizer.state[parameter]}
    makes = set()
    for key in keeps:
        probe, parameters = toy_optimizer(section, shapes)
        toy_steps(probe, parameters)
        for parameter in parameters:
            probe.state[parameter].pop(key, None)
        try:
            toy_steps(probe, parameters)
        except ATTEMPT_ERRORS:
            continue
        makes.add(key)
    kind = type(optimizer)
    decoupled = bool(optimizer.param_groups[0].get("decoupled_weight_decay"))
    return _Tried(kind, kind.__module__.startswith("torch.optim"), keeps, makes, decoupled)
