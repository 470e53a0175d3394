"""The state of a torch optimizer, by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distrain.checkpoints.foreign.common import Budget, TorchFile, canonical_names, json_value, without_wrappers
from distrain.checkpoints.foreign.pickles import View
from distrain.checkpoints.sources import Source, Stored
from distrain.system.errors import UserError, some

_KEYS = {
    "SGD": ({"momentum_buffer"}, {"momentum", "dampening"}),
    "Muon": ({"momentum_buffer"}, {"momentum", "ns_steps"}),
    "AdamW": ({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"betas", "amsgrad"}),
    "RAdam": ({"step", "exp_avg", "exp_avg_sq"}, {"betas", "decoupled_weight_decay"}),
    "Adagrad": ({"step", "sum"}, {"lr_decay"}),
    "RMSprop": ({"step", "square_avg", "momentum_buffer", "grad_avg"}, {"alpha"}),
    "Adamax": ({"step", "exp_avg", "exp_inf"}, {"betas"}),
    "Lion": ({"exp_avg"}, {"betas"}),
}
"""What torch's optimizers keep for a parameter, and settings that their groups have: which class it is, if a format
does not name it. Others keep the same for a parameter and compute something else."""
_FUSED = {"betas", "bias_correction"}
"""The settings of DeepSpeed's and Apex's Adam in place of torch's."""
_LAMB = {"max_grad_norm", "max_coeff", "grad_averaging", "trust_clip"}
_NO_SETTINGS = {"params", "param_names", "lr", "initial_lr"}


def add_optimizer(source: Source, file: TorchFile, content: Any, where: str) -> None:
    """Add each parameter's state from `torch.optim.Optimizer.state_dict`, nested or flat, or from FSDP's by name."""
    content = _nested(content)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        source.skipped.append(f"{where}: it is not a torch optimizer's state dict")
        return
    state, groups = content["state"], content.get("param_groups")
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    names = names_of(state, groups)
    if names is None:
        source.skipped.append(f"{where}: {UNNAMED}")
        return
    tensors: dict[tuple[str, str], Stored] = {}
    values: dict[tuple[str, str], Any] = {}
    seen: dict[View, str] = {}
    for index, entries in state.items():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, View):
                other = seen.setdefault(value, full := f"{names[index]}/{key}")
                if other != full and math.prod(value.shape) > 1:  # counts of steps may be one
                    source.optimizer_problem = source.optimizer_problem or (
                        f"the optimizer's {other} and {full} are one tensor, so one of them was written over the other "
                        "(FSDP1 does so where it gathers whole state on CPUs)"
                    )
                tensors[names[index], key] = file.stored(value, "optimizer")
            else:
                values[names[index], key] = value
    add_by_name(source, tensors, values, named_groups(groups, names))


def _nested(content: Any) -> Any:
    """Return an optimizer's state with one flat name for each value as torch nests it; any other as it is."""
    if not isinstance(content, dict) or not content or "state" in content:
        return content
    found: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for name, value in content.items():
        kind, _, rest = str(name).partition(".")
        parameter, _, key = rest.rpartition(".")
        if kind not in found or not parameter:
            return content
        found[kind].setdefault(parameter, {})[key] = value
    groups = [{**settings, "params": [name]} for name, settings in found["param_groups"].items()]
    return {"state": found["state"], "param_groups": groups}


UNNAMED = (
    "the optimizer's state has numbers instead of the parameters' names (torch writes names if the optimizer is built "
    "from model.named_parameters())"
)


def names_of(state: Iterable[Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, str] | None:
    """Return {key in the state or a group: name of the parameter}, or None if these do not hold the names."""
    if all(isinstance(key, str) for key in state) and all(isinstance(k, str) for k in state or _params(groups)):
        return {key: key for key in [*state, *_params(groups)] if isinstance(key, str)}
    names: dict[Any, str] = {}
    for group in groups:
        numbers, texts = group.get("params"), group.get("param_names")
        if not isinstance(numbers, list) or not isinstance(texts, list) or len(numbers) != len(texts):
            return None
        names |= {
            n: text for n, text in zip(numbers, texts, strict=True) if isinstance(text, str) and isinstance(n, int)
        }
    return names if all(key in names for key in state) else None


def _params(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    lists = [group.get("params") for group in groups]
    return [each for params in lists if isinstance(params, list) for each in params]


def named_groups(groups: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Return the groups with the names of their parameters."""
    return [
        {key: value for key, value in group.items() if key != "param_names"}
        | {"params": [names[each] for each in _params([group]) if isinstance(each, str | int) and each in names]}
        for group in groups
    ]


def add_by_name(
    source: Source,
    tensors: Mapping[tuple[str, str], Stored],
    values: Mapping[tuple[str, str], Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Add an optimizer's tensors and values by (name of the parameter, key), and the settings of its groups.

    What does not fit the model, or an optimizer that was added before, becomes the source's `optimizer_problem`.
    """
    canonical = _models_names(source, dict.fromkeys(name for name, _ in [*tensors, *values]))
    kind = _infer_class(source, {key for _, key in [*tensors, *values]}, groups)
    if canonical is None or not _joins(source, set(canonical.values()), kind):
        return
    source.optimizer = kind
    for (name, key), stored in tensors.items():
        source.tensors[f"optimizer/{canonical[name]}/{key}"] = stored
    odd, budget = [], Budget()
    for (name, key), value in values.items():
        try:
            source.optimizer_values.setdefault(canonical[name], {})[key] = json_value(value, budget)
        except TypeError:
            odd.append(f"{name}/{key}")
    if odd:
        source.skipped.append(f"values of the optimizer that are neither tensors nor numbers: {some(odd)}")
    for group in groups:
        settings = {}
        for key, value in group.items():
            try:
                settings[str(key)] = json_value(value, budget)
            except TypeError:
                continue
        params = settings.get("params")
        params = [canonical.get(name) for name in params if isinstance(name, str)] if isinstance(params, list) else []
        source.optimizer_groups.append(settings | {"params": [name for name in params if name is not None]})


def _models_names(source: Source, names: Iterable[str]) -> dict[str, str] | None:
    """Return {name: the model's name}; None where they are not the model's, which is noted as a problem.

    The names of an optimizer may have more or fewer parts before them than those of the state dict.
    """
    names = list(names)
    known = {full.removeprefix("model/") for full in [*source.tensors, *source.aliases] if full.startswith("model/")}
    plain = {name: without_wrappers(name) for name in names}
    if not known or not names:
        return canonical_names(source, names)
    found = plain
    if not known >= set(plain.values()) and all(name.startswith("module.") for name in plain.values()):
        found = {name: short.removeprefix("module.") for name, short in plain.items()}
    if not known >= set(found.values()):
        first = next(iter(found.values()))
        prefixes = [name.removesuffix(first) for name in known if name.endswith(f".{first}")]
        fitting = [prefix for prefix in prefixes if known >= {prefix + short for short in found.values()}]
        if len(fitting) != 1:
            lacking = sorted(set(found.values()) - known)
            source.optimizer_problem = (
                f"the optimizer's state is of {some(lacking)}, and the model's tensors are {some(sorted(known))}"
            )
            return None
        source.notes.append(f"the optimizer's names lack {fitting[0]!r}, which those of the model begin with")
        found = {name: fitting[0] + short for name, short in found.items()}
    if len(set(found.values())) != len(names):
        raise UserError(f"{source.path}: names differ only by the parts that wrappers add, such as {names[0]!r}")
    # a tied weight has one state, by whichever of its names
    return {
        name: other.removeprefix("model/")
        if (other := source.aliases.get(f"model/{short}")) and other.removeprefix("model/") not in set(found.values())
        else short
        for name, short in found.items()
    }


def _joins(source: Source, names: set[str], kind: str | None) -> bool:
    """Whether the state of another optimizer can stand beside what was added: of one class, for other parameters."""
    added = {name.removeprefix("optimizer/").rpartition("/")[0] for name in source.names if name.startswith("opt")}
    first = not added and not source.optimizer_groups
    if first or (kind == source.optimizer and not names & added):
        return True
    source.optimizer_problem = (
        f"it holds several optimizers, of {source.optimizer} and {kind}"
        if kind != source.optimizer
        else f"it holds several optimizers that have state for the same parameters ({some(sorted(names & added))})"
    )
    return False


def _infer_class(source: Source, found: set[str], groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Infer the optimizer's class from the keys of its state and the settings of its groups."""
    stated = [set(group) for group in groups if set(group) - _NO_SETTINGS]
    # exp_avg alone is Lion's state, and a part of AdamW's: the class with the fewest other keys
    fitting = sorted(
        (name for name, (kept, settings) in _KEYS.items() if found <= kept and _has(name, settings, stated)),
        key=lambda name: len(_KEYS[name][0]),
    )
    if not found:  # SGD without momentum keeps none
        plain = stated and all(group.get("momentum") == 0 for group in groups)
        fitting = ["SGD"] if "SGD" in fitting and plain else []
    if not fitting or any(group.get("bias_correction") in (False, 0) for group in groups):
        return None
    kind = "AdamW" if "AdamW" in fitting and "exp_avg_sq" in found else fitting[0]
    which = f", which keeps {some(sorted(found))}" if found else " without momentum"
    if kind == "AdamW":
        decoupled = {group.get("decoupled_weight_decay") for group in groups}
        kind = "Adam" if False in decoupled else kind
        if decoupled <= {None} and any(group.get("weight_decay") for group in groups):
            which += " (as Adam does; nothing in it tells which of them decayed the weights)"
    note = f"the optimizer is taken for {kind}{which}; --optimizer sets it"
    source.notes += [note] if note not in source.notes else []
    return kind


def _has(name: str, settings: set[str], stated: Sequence[set[str]]) -> bool:
    """Whether all groups have the settings of a class; where no settings are there, any class has."""
    fused = name == "AdamW" and all(group >= _FUSED for group in stated)
    return all(
        (group >= settings or fused) and not group & _LAMB and not (name == "RAdam" and "amsgrad" in group)
        for group in stated
    )
