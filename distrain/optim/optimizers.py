"""Optimizers by name, and which parameters are decayed, scaled or frozen."""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from distrain.config import FreezeSection, Horizon, OptimSection, PartSection, UserError, close_names
from distrain.config.arguments import argument_problems, takes
from distrain.config.registry import optimizers
from distrain.networks.calling import unwrap_model
from distrain.optim.averages import canonical_name
from distrain.optim.depth import layer_depths
from distrain.optim.freezing import THAW, thaw_steps
from distrain.optim.matrices import matrix_names
from distrain.optim.muon import OTHERS, Muon
from distrain.optim.uncompiled import put_off_compiler

logger = logging.getLogger(__name__)

_OF_TORCH = {  # without torch.optim.Muon, which takes matrices alone: see muon.py
    "adadelta": (
        "Steps as large as the past ones of each parameter; needs no learning rate to be tuned.",
        torch.optim.Adadelta,
    ),
    "adafactor": ("Adam with one number for each row and column of a matrix, to save memory.", torch.optim.Adafactor),
    "adagrad": ("Divides by the root of all past squared gradients; for rare features.", torch.optim.Adagrad),
    "adam": ("Momentum, divided by the root of a moving mean of squared gradients.", torch.optim.Adam),
    "adamax": ("Adam with the largest past gradient in place of the mean of squares.", torch.optim.Adamax),
    "adamw": ("Adam whose weight decay is apart from the gradient; the usual choice.", torch.optim.AdamW),
    "asgd": ("Gradient descent that also keeps the average of its parameters.", torch.optim.ASGD),
    "nadam": ("Adam with Nesterov momentum.", torch.optim.NAdam),
    "radam": ("Adam whose first steps are smaller while the variance is not yet known.", torch.optim.RAdam),
    "rmsprop": ("Divides by the root of a moving mean of squared gradients.", torch.optim.RMSprop),
    "rprop": ("Steps by the sign of the gradient alone; for whole data sets as one batch.", torch.optim.Rprop),
    "sgd": ("Gradient descent, with `momentum` and `nesterov` if given.", torch.optim.SGD),
}
_REFUSED = {
    "lbfgs": "evaluates the loss several times in a step (a closure), and here a step reads its samples once; "
    "use 'adamw' or 'sgd'",
    "sparseadam": "takes sparse gradients only, which are neither clipped nor reduced over processes as others are; "
    "use 'adam', or 'adagrad' for rare features",
}
_ADAPTIVE_FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose fused step gives an element the same bits wherever it lies in a tensor or a shard. SGD's on CPUs
does not (it contracts multiply-adds in full vectors and not at a tensor's end) and is no faster than its loop."""

_STATED = {"fused", "foreach", "differentiable", "capturable"}
"""Arguments by which a recipe states how an optimizer steps."""

_NORM_CLASS = re.compile(r"norm(act)?(\d+d)?$", re.IGNORECASE)


# --------------------------------------------------------------------------------------------------------------------
# Names


def _find(name: str) -> Callable[..., Optimizer]:
    """Return the class, or the user's function, that `optim.name` names; raises UserError."""
    found: Any = optimizers.find(name).value
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, Optimizer)):
        raise UserError(
            f"optim.name: {name!r} is {found!r}; expected a subclass of torch.optim.Optimizer, or a function "
            "(param_groups, lr, ...) that returns one"
        )
    return found


for _name, (_about, _class) in _OF_TORCH.items():
    optimizers.register(_name, about=_about)(_class)
for _name, _why in _REFUSED.items():
    optimizers.register(_name, refused=_why)(None)


# --------------------------------------------------------------------------------------------------------------------
# Building


def check_optimizer(section: OptimSection) -> list[str]:
    """Return one line for each problem of the section that can be found without a model."""
    try:
        build = _find(section.name)
    except UserError as error:
        return [str(error)]
    what = f"{section.name!r}"
    problems = argument_problems(
        build,
        section.args,
        "optim",
        what,
        given=("params", "param_groups", "lr", "weight_decay"),
        section_keys=type(section).model_fields,
    )
    if not takes(build, "lr"):
        problems.append(f"optim.name: {what} takes no argument 'lr', which the schedule sets")
    if not takes(build, "weight_decay"):
        decays = {"optim.weight_decay": section.weight_decay}
        decays |= {
            f"optim.groups[{at}].weight_decay": group.weight_decay or 0 for at, group in enumerate(section.groups)
        }
        problems += [f"{key}: {what} has no weight decay; remove it" for key, decay in decays.items() if decay]
    if problems:
        return problems
    try:
        _construct(build, section, [{"params": [nn.Parameter(torch.zeros(1, 1))], "lr_scale": 1.0}], {})
    except UserError as error:
        return [str(error)]
    return []


def fused_kernel(section: OptimSection, model: nn.Module) -> Literal["exact", "gpu", "own"] | None:
    """Return what the section's class has for a fused kernel over a model's parameters.

    `exact`: one that gives the same bits at any sharding, on each device. `gpu`: that on a GPU alone. `own`: the
    section states itself how the optimizer steps. Raises UserError as `parameter_plan` does.
    """
    if _STATED & section.args.keys():
        return "own"
    build, aliases = _find(section.name), {each.names[0]: each.parameter for each in _aliases(model)}
    trained = [aliases[name] for plan in parameter_plan(model, section) for name in plan.names]
    if not all(parameter.is_floating_point() for parameter in trained):
        return None
    if build in _ADAPTIVE_FUSED:
        return "exact"
    # its fused kernel takes no sparse gradients
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    return "gpu" if build is torch.optim.SGD and not sparse else None


def build_optimizer(
    model: nn.Module, section: OptimSection, *, fused: bool | None = None, horizon: Horizon | None = None
) -> Optimizer:
    """Freeze the parameters in `optim.freeze`, and return the optimizer of a model.

    Each of its groups has `lr_scale` beside the keys of its class; `set_lr` uses it. Those of parameters that are
    frozen `until` a step have that step under `THAW`; the `horizon` says which it is. `fused`: whether one kernel steps
    all parameters; None: where it gives the same bits at any sharding, as that of Adam and AdamW does. Raises UserError
    with every problem of the section.
    """
    if problems := check_optimizer(section):
        raise UserError("\n".join(problems))
    plans, frozen = _plan(model, section)
    thaw = thaw_steps(section, horizon)
    aliases = _aliases(model)
    by_name = {alias.names[0]: alias.parameter for alias in aliases}
    for name in frozen:
        by_name[name].requires_grad_(False)

    build = _find(section.name)
    takes_decay = takes(build, "weight_decay")
    groups: list[dict[str, Any]] = [
        {"params": [by_name[name] for name in plan.names], "lr_scale": plan.lr_scale}
        | ({"weight_decay": plan.weight_decay} if takes_decay else {})
        | ({THAW: thaw[plan.freeze]} if plan.freeze is not None else {})
        | ({OTHERS: True} if plan.others else {})
        for plan in plans
    ]
    if fused is None:
        fused = fused_kernel(section, model) == "exact"
    # without it torch takes its foreach kernels on a GPU; `fused=False` would turn those off as well
    return _construct(build, section, groups, {"fused": True} if fused else {})


def describe_groups(model: nn.Module, section: OptimSection, horizon: Horizon) -> None:
    """Log how the depth of a parameter was found, and when what is frozen until a step is trained."""
    if section.layer_decay is not None:
        logger.info("%s", layer_depths(model, section.layer_decay))
    counts: Counter[int] = Counter()
    for plan in parameter_plan(model, section):
        if plan.freeze is not None:
            counts[plan.freeze] += plan.numel
    if _matrices(model, _aliases(model), section) is not None:
        plans = parameter_plan(model, section)
        matrices = [plan for plan in plans if not plan.others]
        rest = [name for plan in plans if plan.others for name in plan.names if not name.endswith("bias")]
        logger.info(
            f"optim: {section.name} trains {sum(len(plan.names) for plan in matrices)} matrices of "
            f"{sum(plan.numel for plan in matrices):,} parameters, and by AdamW the "
            f"{sum(plan.numel for plan in plans if plan.others):,} others ({', '.join(rest[:5]) or 'biases'}"
            f"{', …' if len(rest) > 5 else ''}); optim.others.params names others"
        )
    for place, step in thaw_steps(section, horizon).items():
        entry = section.freeze[place]
        assert isinstance(entry, FreezeSection)
        logger.info(
            f"{entry.params}: {counts[place]:,} parameters are not trained in steps 1 to {step:,} ({entry.until})"
        )


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of the optimizer's groups, each times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _construct(
    build: Callable[..., Optimizer], section: OptimSection, groups: list[dict[str, Any]], extra: dict[str, Any]
) -> Optimizer:
    args = {key: _as_tuple(value) for key, value in section.args.items()} | extra
    if takes(build, "weight_decay"):
        args["weight_decay"] = section.weight_decay
    put_off_compiler()
    try:
        optimizer = build(groups, lr=section.lr, **args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optim: {section.name!r} refuses its parameters or arguments: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"optim.name: {section.name!r} returned {type(optimizer).__name__}, not a torch.optim.Optimizer"
        )
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        raise UserError(
            f"optim.name: {type(optimizer).__name__} has methods train() and eval(), by which it exchanges the weights "
            "that it trains for those to evaluate and keep (schedule-free optimizers do); a run calls neither, and "
            "would evaluate, average and export the wrong ones. Take 'adamw' with train.ema"
        )
    return optimizer


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------------------------
# Which parameters


@dataclass(frozen=True)
class GroupPlan:
    """Parameters with the same settings."""

    names: tuple[str, ...]
    """Canonical names, in the model's order."""
    lr_scale: float
    """Factor of the learning rate."""
    weight_decay: float
    numel: int
    """Elements of all of them."""
    freeze: int | None = None
    """The place in `optim.freeze` of what freezes them until a step; None: they are trained from the start."""
    others: bool = False
    """Whether they are no matrices, to an optimizer that treats those otherwise."""


@dataclass(frozen=True)
class _Alias:
    parameter: nn.Parameter
    names: tuple[str, ...]
    """Canonical names: several if weights are tied."""
    kinds: frozenset[str]
    """Those of norm, bias and embedding that it is."""


def parameter_plan(model: nn.Module, section: OptimSection) -> list[GroupPlan]:
    """Return the groups that `build_optimizer` makes, changing nothing. Frozen parameters are in none.

    The kinds in `optim.no_decay` are never decayed, whatever `optim.groups` states: `norm`, the parameters of
    normalisation layers (torch's, and any class named like one, such as RMSNorm or LayerNorm2d); `bias`, any parameter
    whose own name contains "bias"; `embedding`, the weight of nn.Embedding or nn.EmbeddingBag, and of a head that is
    tied to one. A pattern matches a tied parameter by any of its names; the first match in `optim.groups`, and in
    `optim.freeze`, applies. `optim.layer_decay` multiplies what `optim.groups` states; see `layer_depths`.
    Groups are in the order of their first parameters. Raises UserError for patterns that match nothing, naming close
    ones, for patterns whose matches are all in earlier groups, and if no parameter is left to train.
    """
    return _plan(model, section)[0]


def frozen_names(model: nn.Module, *sections: OptimSection) -> list[str]:
    """Return the names of the frozen parameters: by `optim.freeze`, or by the model itself."""
    frozen = {alias.names[0] for alias in _aliases(model) if not alias.parameter.requires_grad}
    return sorted(frozen.union(*(_plan(model, section)[1] for section in sections)))


def trained_names(model: nn.Module) -> list[str]:
    """Return the first name of each parameter that the model itself has not frozen."""
    return [alias.names[0] for alias in _aliases(model) if alias.parameter.requires_grad]


def names_by_pattern(model: nn.Module, pattern: str) -> tuple[list[str], str | None]:
    """Return the first names of the parameters that a shell pattern matches, and what to say where that is none."""
    aliases = _aliases(model)
    found = [alias.names[0] for alias in _matching(aliases, pattern)]
    return found, None if found else _nothing(aliases, pattern)


def _plan(model: nn.Module, section: OptimSection) -> tuple[list[GroupPlan], set[str]]:
    aliases = _aliases(model)
    if not aliases:
        raise UserError(_without_parameters(model))
    if isinstance(section, PartSection):
        own = {alias.names[0] for pattern in section.patterns for alias in _matching(aliases, pattern)}
        aliases = [alias for alias in aliases if alias.names[0] in own]
    problems = []
    frozen = {alias.names[0] for alias in aliases if not alias.parameter.requires_grad}
    entry_of: dict[str, int] = {}
    for at, entry in enumerate(section.freeze):
        pattern = entry if isinstance(entry, str) else entry.params
        matching = {alias.names[0] for alias in _matching(aliases, pattern)}
        unclaimed = matching - entry_of.keys()
        if not matching:
            problems.append(f"optim.freeze[{at}]: {_nothing(aliases, pattern)}")
        elif not unclaimed and any(isinstance(each, FreezeSection) for each in section.freeze):
            problems.append(
                f"optim.freeze[{at}]: every match of {pattern!r} is in an earlier entry; put narrower patterns first, "
                "or remove it"
            )
        elif isinstance(entry, FreezeSection) and matching <= frozen:
            problems.append(
                f"optim.freeze[{at}]: every match of {pattern!r} is frozen by the model itself (requires_grad is "
                "False), so it cannot be trained later; remove it"
            )
        entry_of |= dict.fromkeys(unclaimed, at)
    until = {name: at for name, at in entry_of.items() if isinstance(section.freeze[at], FreezeSection)}
    frozen |= entry_of.keys() - until.keys()

    trained = [alias for alias in aliases if alias.names[0] not in frozen]
    rule_of: dict[str, int] = {}
    for at, group in enumerate(section.groups):
        where = f"optim.groups[{at}].params"
        found = _matching(aliases, group.params)
        free = [alias for alias in _matching(trained, group.params) if alias.names[0] not in rule_of]
        if not found:
            problems.append(f"{where}: {_nothing(aliases, group.params)}")
        elif not free:
            problems.append(
                f"{where}: every match of {group.params!r} is frozen or in an earlier group; "
                "put narrower patterns first, or remove it"
            )
        elif group.weight_decay and all(alias.kinds & set(section.no_decay) for alias in free):
            kinds = sorted(frozenset[str]().union(*(alias.kinds for alias in free)) & set(section.no_decay))
            problems.append(
                f"optim.groups[{at}].weight_decay: what {group.params!r} matches is never decayed, by optim.no_decay "
                f"({', '.join(kinds)}); take that out of it, or remove this"
            )
        rule_of |= {alias.names[0]: at for alias in free}
    if not trained and not problems:
        problems.append(_nothing_to_train(model, aliases))
    if problems:
        raise UserError("\n".join(problems))

    depths = layer_depths(model, section.layer_decay) if section.layer_decay is not None else None
    matrices = _matrices(model, aliases, section)
    members: dict[tuple[float, float, int | None, bool], list[_Alias]] = {}
    for alias in trained:
        rule = section.groups[rule_of[alias.names[0]]] if alias.names[0] in rule_of else None
        others = matrices is not None and alias.names[0] not in matrices
        of_others = (section.args.get("others") or {}).get("weight_decay") if others else None
        decay = section.weight_decay if of_others is None else of_others
        decay = decay if rule is None or rule.weight_decay is None else rule.weight_decay
        if alias.kinds & set(section.no_decay):
            decay = 0.0
        scale = (rule.lr_scale if rule else 1.0) * (depths.scale(alias.names) if depths else 1.0)
        members.setdefault((scale, decay, until.get(alias.names[0]), others), []).append(alias)
    plans = [
        GroupPlan(
            tuple(each.names[0] for each in group),
            scale,
            decay,
            sum(each.parameter.numel() for each in group),
            freeze,
            others,
        )
        for (scale, decay, freeze, others), group in members.items()
    ]
    return plans, frozen


def _matrices(model: nn.Module, aliases: Sequence[_Alias], section: OptimSection) -> set[str] | None:
    """Return the names of what the optimizer trains as matrices; None where it treats all parameters alike."""
    if optimizers.find(section.name).value is not Muon:
        return None
    skipped = [alias.names[0] for alias in aliases if alias.kinds]
    patterns = (section.args.get("others") or {}).get("params")
    found = matrix_names(model, skipped, with_head=patterns is not None)
    for pattern in patterns or ():
        if not (matching := _matching(aliases, pattern)):
            raise UserError(f"optim.others.params: {_nothing(aliases, pattern)}")
        found -= {alias.names[0] for alias in matching}
    return found


def _without_parameters(model: nn.Module) -> str:
    advice = "layers in a plain list need nn.ModuleList, and tensors to be trained nn.Parameter"
    if lost := unregistered_layers(model):
        advice = f"{', '.join(lost)}: put layers in a plain list or dict into nn.ModuleList or nn.ModuleDict"
    return f"model: {type(unwrap_model(model)).__name__} has no parameters, so there is nothing to train. {advice}"


def _nothing_to_train(model: nn.Module, aliases: Sequence[_Alias]) -> str:
    frozen = sum(not alias.parameter.requires_grad for alias in aliases)
    if frozen == len(aliases):
        return (
            f"model: all {frozen} parameters of {type(unwrap_model(model)).__name__} are frozen by the model itself "
            "(requires_grad is False), so nothing is left to train"
        )
    rest = f", with {frozen} that the model itself has frozen" if frozen else ""
    return f"optim.freeze: all {len(aliases)} parameters are frozen{rest}, so nothing is left to train"


def unregistered_layers(model: nn.Module) -> list[str]:
    """Return where a model has layers in plain lists and dicts: it does not register them, so nothing trains them."""
    model = unwrap_model(model)
    known = {id(parameter) for parameter in model.parameters()}
    found = []
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            layers = [each for each in held if isinstance(each, nn.Module)]
            if not attribute.startswith("_") and any(
                id(parameter) not in known for layer in layers for parameter in layer.parameters()
            ):
                found.append(canonical_name(f"{prefix}.{attribute}".lstrip(".")))
    return found


def _aliases(model: nn.Module) -> list[_Alias]:
    """Return every parameter once, in the model's order, with all its names and kinds."""
    model = unwrap_model(model)
    kinds: dict[int, set[str]] = {}
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for module in model.modules():
        is_norm = isinstance(module, norms) or _NORM_CLASS.search(type(module).__name__)
        for name, parameter in module.named_parameters(recurse=False):
            found = kinds.setdefault(id(parameter), set())
            if is_norm:
                found.add("norm")
            if "bias" in name:
                found.add("bias")
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                found.add("embedding")
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(canonical_name(name))
    return [_Alias(each, tuple(found), frozenset(kinds[id(each)])) for each, found in names.items()]


def _matching(aliases: Sequence[_Alias], pattern: str) -> list[_Alias]:
    return [alias for alias in aliases if any(fnmatchcase(name, pattern) for name in alias.names)]


def _nothing(aliases: Sequence[_Alias], pattern: str) -> str:
    names = [name for alias in aliases for name in alias.names]
    prefixes = {".".join(name.split(".")[:end]) + ".*" for name in names for end in range(1, name.count(".") + 1)}
    hint = close_names(pattern, [*names, *sorted(prefixes)])
    return f"no parameter matches {pattern!r}{hint or f'; the names are like {names[0]!r}' if names else ''}"
