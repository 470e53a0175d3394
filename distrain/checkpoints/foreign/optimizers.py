"""An optimizer's state as torch keeps it, by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distrain.checkpoints.export.pickles import View
from distrain.checkpoints.export.sources import Source, Stored
from distrain.checkpoints.foreign.common import Budget, TorchFile, plain_names, plain_value, some

_KEYS = {
    "SGD": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Adagrad": {"step", "sum"},
    "RMSprop": {"step", "square_avg", "momentum_buffer", "grad_avg"},
    "Adamax": {"step", "exp_avg", "exp_inf"},
    "Lion": {"exp_avg"},
}
"""What optimizers of torch keep for a parameter, from which the class is known where a format does not name it."""


def add_optimizer(source: Source, file: TorchFile, content: Any, where: str) -> None:
    """Add what `torch.optim.Optimizer.state_dict`, or FSDP's by name, keeps for each parameter."""
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        source.left.append(f"{where}: it is not the state of an optimizer as torch writes it")
        return
    state, groups = content["state"], content.get("param_groups")
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    names = _names(state, groups)
    if names is None:
        source.left.append(
            f"{where}: the optimizer's state goes by numbers, and which parameters they are is not in the file "
            "(torch writes the names where the optimizer is built from model.named_parameters())"
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
    plain = plain_names(source, dict.fromkeys(name for name, _ in [*tensors, *values]))
    for (name, key), stored in tensors.items():
        source.tensors[f"optimizer/{plain[name]}/{key}"] = stored
    odd, budget = [], Budget()
    for (name, key), value in values.items():
        try:
            source.optimizer_values.setdefault(plain[name], {})[key] = plain_value(value, budget)
        except TypeError:
            odd.append(f"{name}/{key}")
    if odd:
        source.left.append(f"values of the optimizer that are neither tensors nor numbers: {some(odd)}")
    for group in groups:
        settings = {}
        for key, value in group.items():
            try:
                settings[str(key)] = plain_value(value, budget)
            except TypeError:
                odd.append(str(key))
        source.optimizer_groups.append(settings)
    guess(source, {key for _, key in [*tensors, *values]}, groups)


def guess(source: Source, keys: Iterable[str], groups: Sequence[Mapping[str, Any]]) -> None:
    """Conclude from what is kept for each parameter which class keeps it."""
    found = set(keys)
    # exp_avg alone is what Lion keeps, and a part of what AdamW does: the class that keeps the least besides
    fitting = sorted((name for name, known in _KEYS.items() if found and found <= known), key=lambda n: len(_KEYS[n]))
    if "exp_avg_sq" in found and any(group.get("decoupled_weight_decay") is False for group in groups):
        fitting = ["Adam"]
    if source.optimizer is None and fitting:
        source.optimizer = fitting[0]
        source.notes.append(
            f"the optimizer is taken for {source.optimizer}, which keeps {some(sorted(found))}; --optimizer NAME says "
            "otherwise"
        )


def _names(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, str] | None:
    """Return {key in the state: name of the parameter}, or None where the file does not tell."""
    if all(isinstance(key, str) for key in state):
        return {key: key for key in state}
    names: dict[Any, str] = {}
    for group in groups:
        numbers, texts = group.get("params"), group.get("param_names")
        if not isinstance(numbers, list) or not isinstance(texts, list) or len(numbers) != len(texts):
            return None
        names |= {n: text for n, text in zip(numbers, texts, strict=True) if isinstance(text, str)}
    return names if all(key in names for key in state) else None
