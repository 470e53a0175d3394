"""The state of a torch optimizer, by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distrain.checkpoints.foreign.common import Budget, TorchFile, canonical_names, json_value
from distrain.checkpoints.foreign.pickles import View
from distrain.checkpoints.sources import Source, Stored
from distrain.system.errors import some

_KEYS = {
    "SGD": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Adagrad": {"step", "sum"},
    "RMSprop": {"step", "square_avg", "momentum_buffer", "grad_avg"},
    "Adamax": {"step", "exp_avg", "exp_inf"},
    "Lion": {"exp_avg"},
}
"""The state that torch's optimizers keep for a parameter, which shows the class if a format does not name it."""


def add_optimizer(source: Source, file: TorchFile, content: Any, where: str) -> None:
    """Add each parameter's state from `torch.optim.Optimizer.state_dict`, or from FSDP's by name."""
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        source.skipped.append(f"{where}: it is not a torch optimizer's state dict")
        return
    state, groups = content["state"], content.get("param_groups")
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    names = _names(state, groups)
    if names is None:
        source.skipped.append(
            f"{where}: the optimizer's state has numbers instead of the parameters' names (torch writes names if the "
            "optimizer is built from model.named_parameters())"
        )
        return
    tensors: dict[tuple[str, str], Stored] = {}
    values: dict[tuple[str, str], Any] = {}
    for index, entries in state.items():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, View):
                tensors[names[index], key] = file.stored(value, "optimizer")
            else:
                values[names[index], key] = value
    add_by_name(source, tensors, values, groups)


def add_by_name(
    source: Source,
    tensors: Mapping[tuple[str, str], Stored],
    values: Mapping[tuple[str, str], Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Add an optimizer's tensors and values by (name of the parameter, key), and the settings of its groups."""
    canonical = canonical_names(source, dict.fromkeys(name for name, _ in [*tensors, *values]))
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
        source.optimizer_groups.append(settings)
    _infer_class(source, {key for _, key in [*tensors, *values]}, groups)


def _infer_class(source: Source, found: set[str], groups: Sequence[Mapping[str, Any]]) -> None:
    """Infer the optimizer's class from the keys of its state."""
    # exp_avg alone is Lion's state, and a part of AdamW's: the class with the fewest other keys
    fitting = sorted((name for name, known in _KEYS.items() if found and found <= known), key=lambda n: len(_KEYS[n]))
    if "exp_avg_sq" in found and any(group.get("decoupled_weight_decay") is False for group in groups):
        fitting = ["Adam"]
    if source.optimizer is None and fitting:
        source.optimizer = fitting[0]
        source.notes.append(
            f"the optimizer is taken for {source.optimizer}, which keeps {some(sorted(found))}; --optimizer sets it"
        )


def _names(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, str] | None:
    """Return {key in the state: name of the parameter}, or None if the file does not hold them."""
    if all(isinstance(key, str) for key in state):
        return {key: key for key in state}
    names: dict[Any, str] = {}
    for group in groups:
        numbers, texts = group.get("params"), group.get("param_names")
        if not isinstance(numbers, list) or not isinstance(texts, list) or len(numbers) != len(texts):
            return None
        names |= {n: text for n, text in zip(numbers, texts, strict=True) if isinstance(text, str)}
    return names if all(key in names for key in state) else None
