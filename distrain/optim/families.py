"""What an optimizer can take over from the state that another has left.

Two optimizers are of one family where tensors of the same name mean the same: the moments of Adam are those of AdamW.
What a new optimizer needs is found by trying it on small parameters. What cannot be taken over is said, and what would
be missing is an error; nothing is dropped or made up without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.optim import Optimizer

from distrain.config import OptimSection, UserError
from distrain.optim.sharding import toy_optimizer, toy_shapes, toy_steps

_ADAMS = ("Adam", "AdamW", "NAdam", "RAdam")
"""All keep `exp_avg` and `exp_avg_sq`, the moments of the gradient, and `step`, which corrects their start."""

_WITHOUT = {
    "max_exp_avg_sq": "amsgrad",
    "momentum_buffer": "momentum",
    "grad_avg": "centered",
}
"""What only some settings of an optimizer keep, and the setting: without it the tensor has no meaning."""

_MEANING = {
    "mu_product": "the product of all its momenta so far",
    "max_exp_avg_sq": "the largest second moments since the start",
    "grad_avg": "the mean of the gradients",
}
"""What a tensor holds that cannot be made up for in the middle of a run."""


@dataclass(frozen=True)
class CarryOver:
    """How stored state becomes that of the recipe's optimizer."""

    keys: dict[str, str]
    """The name in the new optimizer's state for each stored name that is taken over."""
    said: tuple[str, ...]
    """What a person should know: what is left behind, what starts anew, what means something else."""


def carry_over(stored_class: str, stored_keys: Collection[str], section: OptimSection) -> CarryOver:
    """Return what the recipe's optimizer takes over from a state with `stored_keys` that `stored_class` has left.

    `stored_class` is the name of a class, as a checkpoint holds it; `stored_keys` are the names of all that it kept for
    any parameter, tensors and numbers. Raises UserError where the state is of another family, or lacks what the new
    optimizer cannot do without.
    """
    stored = set(stored_keys)
    new = _tried(section)
    name = new.kind.__name__
    same = name == stored_class
    if not same and not (new.torchs_own and {stored_class, name} <= set(_ADAMS)):
        others = ", ".join(each for each in _ADAMS if each != stored_class)
        raise UserError(
            f"the stored state is that of {stored_class}, the recipe asks for {name}, which cannot go on from it; take "
            f"{stored_class}{f' or one of its family ({others})' if stored_class in _ADAMS else ''}, or start a new "
            "run with model.weights set to the exported model"
        )
    missing = sorted(new.keeps - stored)
    # where nothing is stored, as by SGD without momentum, an optimizer starts as it always does
    if stored and (lost := [key for key in missing if key not in new.makes]):
        shown = "; ".join(f"{key}, {_MEANING[key]}" if key in _MEANING else key for key in lost)
        raise UserError(
            f"the stored state of {stored_class} has no {shown}, and {_described(name, lost)} cannot start without in "
            f"the middle of a run; go on with the settings of the run so far, or start a new run with model.weights "
            "set to the exported model"
        )
    # of a class of the user's own only its author knows when it keeps what
    dropped = sorted(key for key in stored - new.keeps if new.torchs_own and (not same or key in _WITHOUT))
    said = []
    if not same:
        said.append(f"optim: {name} goes on from the state of {stored_class}")
    for key in missing:
        why = f": the run so far was without {_WITHOUT[key]}" if key in _WITHOUT else ""
        said.append(f"optim: {key} starts from nothing{why}")
    for key in dropped:
        setting = f" without {_WITHOUT[key]}" if same else ""
        said.append(f"optim: the stored {key} is left behind: {name} keeps none{setting}")
    was_decoupled = {"Adam": False, "AdamW": True}.get(stored_class)
    if not same and section.weight_decay and was_decoupled not in (None, new.decoupled):
        moments = "without it, and will hold it from now on" if was_decoupled else "with it, and will be rid of it soon"
        said.append(
            f"optim: {stored_class} and {name} apply weight_decay in different places; the moments are {moments}"
        )
    return CarryOver({key: key for key in sorted(stored - set(dropped))}, tuple(said))


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
    """Those of them that it makes anew where they are missing in the middle of a run."""
    decoupled: bool
    """Whether weight decay goes to the weights and not through the gradients."""


def _tried(section: OptimSection) -> _Tried:
    shapes = toy_shapes(section)
    optimizer, parameters = toy_optimizer(section, shapes)
    toy_steps(optimizer, parameters, 2)
    keeps = set(optimizer.state[parameters[0]])
    makes = set()
    for key in keeps:
        probe, parameters = toy_optimizer(section, shapes)
        toy_steps(probe, parameters)
        for parameter in parameters:
            probe.state[parameter].pop(key, None)
        try:
            toy_steps(probe, parameters)
        except (KeyError, AttributeError, TypeError, AssertionError, IndexError, RuntimeError):
            continue
        makes.add(key)
    kind = type(optimizer)
    decoupled = bool(optimizer.param_groups[0].get("decoupled_weight_decay"))
    return _Tried(kind, kind.__module__.startswith("torch.optim"), keeps, makes, decoupled)
