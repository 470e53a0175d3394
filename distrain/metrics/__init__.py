"""Metrics over sums and counts: the same on any number of processes and for any cut into batches.

    parts.py      one batch as metrics use it, and the sums that they are computed from
    catalogue.py  the built-in metrics; entities.py has those of entities
    foreign.py    metrics of torchmetrics, and users' metrics

`MetricSet.update` adds a batch on the device without waiting for it. `sums` is one vector that is summed over ranks,
`gather` merges what cannot be summed, and `compute` divides, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from distrain.config import Component, Recipe, UserError, close_names
from distrain.config.arguments import argument_problems
from distrain.config.registry import Entry, tasks
from distrain.config.registry import metrics as registry
from distrain.config.tasks import FORMS
from distrain.datasets.base import DataMeta
from distrain.metrics.catalogue import Metric, default_metrics, find_entry
from distrain.metrics.parts import Moments, Part, Seen, Setting, TextPart, Value, merged
from distrain.optim.losses import NO_TARGET, Outputs, build_loss
from distrain.optim.losses.shapes import wide
from distrain.run.metrics_file import EVALUATION_KEYS

__all__ = [
    "Metric",
    "MetricSet",
    "Value",
    "build_metrics",
    "check_metrics",
    "decides_best",
    "higher_is_better",
]

_PREFIX = "torchmetrics:"


class MetricSet:
    """The metrics of an evaluation, accumulated batch by batch."""

    def __init__(self, metrics: Mapping[str, Metric], setting: Setting):
        self.metrics = dict(metrics)
        self.setting = setting
        parts = dict.fromkeys(part for metric in metrics.values() for part in metric.parts)
        self._text_parts = [part for part in parts if isinstance(part, TextPart)]
        self._batch_parts = [part for part in parts if isinstance(part, Part) and not isinstance(part, TextPart)]
        self._parts: list[Part | TextPart] = [*self._batch_parts, *self._text_parts]
        self._keeps_rows = any(metric.rows for metric in metrics.values())
        self._keeps_moments = any(metric.moments for metric in metrics.values())
        self.caveats: dict[str, str] = {}
        """Why values of the last `compute` are meaningless: they are NaN, or the same for any model."""
        self.reset()

    @property
    def names(self) -> list[str]:
        """The keys of `compute` (a metric of several values adds suffixes to its own)."""
        return list(self.metrics)

    @property
    def needs_text(self) -> bool:
        """Whether a metric compares texts, which `update_text` takes."""
        return bool(self._text_parts)

    def reset(self, bytes_per_token: float | None = None) -> None:
        """Start a new evaluation, of a split that has so many bytes of text for each token; None: as the training."""
        self._bytes_per_token = bytes_per_token
        self._sums: dict[Part | TextPart, Tensor] = {}
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._moments = Moments()

    @torch.no_grad()
    def update(
        self,
        outputs: Outputs,
        targets: Tensor,
        keep: Tensor | None = None,
        loss: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add a batch. Rows where `keep` (batch,) bool is False are padding and are ignored.

        `loss` is the sum and count of the recipe's loss over the batch, which perplexity uses if it is the same. Waits
        for the device only for metrics of torchmetrics and users' metrics, if `keep` is given.
        """
        seen = Seen(outputs, targets, keep, self.setting, loss)
        for part in self._batch_parts:
            self._add(part, part.batch(seen))
        if self._keeps_rows:
            self._rows.append((seen.outputs, seen.targets, seen.rows))
        if self._keeps_moments:
            self._moments.add(seen)

    def update_text(
        self, hypotheses: Sequence[str], references: Sequence[str], keep: Sequence[bool] | Tensor | None = None
    ) -> None:
        """Add generated texts and their references, one pair for each row of the batch."""
        kept = [True] * len(hypotheses) if keep is None else [bool(each) for each in keep]
        pairs = [pair for *pair, keeps in zip(hypotheses, references, kept, strict=True) if keeps]
        for part in self._text_parts:
            self._add(part, part.texts([pair[0] for pair in pairs], [pair[1] for pair in pairs]))

    def _add(self, part: Part | TextPart, sums: Tensor) -> None:
        self._sums[part] = self._sums[part] + sums if part in self._sums else sums

    def sums(self) -> Tensor:
        """Return this rank's sums, 1-D float64 on the outputs' device, to be summed over ranks."""
        for text in self._text_parts:
            self._sums.setdefault(text, torch.zeros(text.size, dtype=torch.float64))
        if not self._parts:
            return torch.zeros(0, dtype=torch.float64)
        assert all(part in self._sums for part in self._parts), "no batch was added"
        device = self._sums[self._parts[0]].device
        return torch.cat([self._sums[part].to(device) for part in self._parts])

    def gathered(self) -> dict[str, Tensor]:
        """Return what this rank has that cannot be summed, on the CPU, empty for most metrics.

        It is concatenated over ranks along dimension 0: `outputs` and `targets` (samples, ...) without padding,
        `moments` (1, 4, k).
        """
        found: dict[str, Tensor] = {}
        if self._rows:
            outputs, targets, rows = (torch.cat(column) for column in zip(*self._rows, strict=True))
            found |= {"outputs": wide(outputs)[rows].cpu(), "targets": targets[rows].cpu()}
        if self._moments.state is not None:
            found["moments"] = self._moments.state.cpu()
        return found

    def gather(self, gather: Callable[[Any], list[Any]]) -> dict[str, Tensor]:
        """Return `gathered` of all ranks together; `gather` returns a value's counterparts on all ranks, in order.

        All ranks call. Sends nothing if there is nothing to gather.
        """
        if not (self._keeps_rows or self._keeps_moments):
            return {}
        ranks = gather(self.gathered())
        return {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}

    def undefined(self, why: str) -> dict[str, Value]:
        """Return NaN for each metric of one number, in place of what `compute` makes of outputs that are NaN.

        The highest of scores that are NaN is the first of them, so an accuracy would be a number like any other.
        """
        self.caveats = dict.fromkeys(self.metrics, why)
        return {name: math.nan for name, metric in self.metrics.items() if metric.scalar}

    def compute(self, sums: Tensor, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Value]:
        """Return each metric's value from the sums over all ranks and the result of `gather`."""
        sizes = [len(self._sums[part]) for part in self._parts]
        pieces = dict(zip(self._parts, (each.numpy() for each in sums.double().cpu().split(sizes)), strict=True))
        gathered = gathered or {}
        all_rows = moments = None
        if self._keeps_rows:
            all_rows = Seen(gathered["outputs"], gathered["targets"], None, self.setting)
        if self._keeps_moments:
            moments = reduce(merged, gathered["moments"]).numpy()
        values: dict[str, Value] = {}
        self.caveats = {}
        for name, metric in self.metrics.items():
            extra: list[Any] = [all_rows] if metric.rows else [moments] if metric.moments else []
            extra += [self._bytes_per_token] if metric.bytes else []
            given = [*(pieces[part] for part in metric.parts), *extra]
            value = metric.finish(*given)
            why = metric.caveat(*given) if metric.caveat is not None else None
            if why is not None:
                self.caveats[name] = why
            elif not _finite(value):
                self.caveats[name] = "it is undefined there, or the model's outputs are NaN or infinite"
            if isinstance(value, dict):
                for key, each in value.items():
                    values[_free(f"{name}_{key}", EVALUATION_KEYS | self.metrics.keys() | values.keys())] = each
            else:
                values[name] = value
        return values


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _free(key: str, taken: Set[str]) -> str:
    """Return the key, with underscores appended until it is free."""
    while key in taken:
        key += "_"
    return key


def higher_is_better(name: str, metrics: MetricSet) -> bool:
    """Return whether higher is better by `eval.best`; `-NAME` states that lower is. Raises UserError."""
    return _direction(name, metrics.metrics, metrics.setting)


def decides_best(recipe: Recipe) -> tuple[str, bool]:
    """Return the metric that decides which evaluation of a recipe is best, and whether higher is better.

    Needs no data. Raises UserError where `eval.best` names what is not computed.
    """
    wanted = recipe.eval.best or "loss"
    metrics, _, setting = _build(recipe, None)
    return wanted.removeprefix("-"), _direction(wanted, metrics, setting)


def _direction(name: str, metrics: Mapping[str, Metric], setting: Setting) -> bool:
    key = name.removeprefix("-")
    choices = ["loss", *(each for each, metric in metrics.items() if metric.scalar)]
    if key not in choices and key not in metrics and setting.own_means:
        return not name.startswith("-")
    if key not in choices:
        reason = "is not one number" if key in metrics else "is not computed: it is not in eval.metrics"
        raise UserError(f"eval.best: {key!r} {reason}{close_names(key, choices) or '; use ' + ' or '.join(choices)}")
    known = False if key == "loss" else metrics[key].higher_is_better
    if name.startswith("-") and known:
        raise UserError(f"eval.best: {name!r} asks for the lowest {key}, and higher is better; write {key!r}")
    return known if known is not None else not name.startswith("-")


# --------------------------------------------------------------------------------------------------------------------
# Building


def check_metrics(recipe: Recipe) -> list[str]:
    """Return one line for each problem of eval.metrics and eval.best that can be found without data."""
    return _build(recipe, None)[1]


def build_metrics(recipe: Recipe, meta: DataMeta) -> MetricSet:
    """Return the recipe's metrics, or the task's defaults. Raises UserError with every problem."""
    metrics, problems, setting = _build(recipe, meta)
    if problems:
        raise UserError("\n".join(problems))
    return MetricSet(metrics, setting)


def _build(recipe: Recipe, meta: DataMeta | None) -> tuple[dict[str, Metric], list[str], Setting]:
    ignore_index = recipe.loss.args.get("ignore_index", NO_TARGET) if recipe.loss else NO_TARGET
    loss = None if meta is None or recipe.form == "custom" else build_loss(recipe, meta)
    setting = Setting(
        recipe.form,
        meta,
        ignore_index,
        loss_is_entropy=loss is not None and loss.is_token_entropy,
        is_probability=loss is not None and loss.takes_probabilities,
        own_means=recipe.task.name not in FORMS,
    )
    wanted = recipe.eval.metrics
    components = [Component(name=name) for name in _usual(recipe, setting)] if wanted is None else wanted
    metrics: dict[str, Metric] = {}
    problems: list[str] = []
    for component in components:
        key = _key(component)
        if key in metrics or key == "loss":
            problems.append(f"eval.metrics: {key!r} is there twice (the loss always is); remove one")
            continue
        if key in EVALUATION_KEYS:
            problems.append(f"eval.metrics: {key!r} is another column of metrics.jsonl; rename the metric")
            continue
        try:
            metrics[key] = _metric(component, key, setting)
        except UserError as error:
            problems.extend(str(error).split("\n"))
    if recipe.eval.best is not None and not problems:
        try:
            _direction(recipe.eval.best, metrics, setting)
        except UserError as error:
            problems.append(str(error))
    return metrics, problems, setting


def _usual(recipe: Recipe, setting: Setting) -> Sequence[str]:
    """Return the metrics of a recipe that names none."""
    if recipe.task.name in FORMS:
        return default_metrics(setting)
    found: Sequence[str] | None = getattr(tasks.find(recipe.task.name).value, "metrics", None)
    return default_metrics(setting) if found is None else found


def _key(component: Component) -> str:
    if component.name == "top_k" and "k" in component.args:
        return f"top_{component.args['k']}"
    return component.name.rpartition(":")[2]


def _metric(component: Component, key: str, setting: Setting) -> Metric:
    name, args = component.name, component.args
    if name.startswith(_PREFIX):
        found = _of_torchmetrics(key)
        if found is None:
            raise registry.unknown(name)
        entry, given = found, list[str]()
    else:
        entry, given = find_entry(name, setting.task)
    if entry.registered and "library" not in entry.metadata:
        if problems := argument_problems(entry.value, args, "eval.metrics", repr(name), given=("setting", *given)):
            raise UserError("\n".join(problems))
        metric: Metric = entry.value(setting, **args)
        return metric
    from distrain.metrics.foreign import user_metric  # torchmetrics takes a second to import

    return user_metric(entry.value, key, args, setting)


def _torchmetrics_names() -> list[str]:
    from distrain.metrics.foreign import torchmetrics_names

    return torchmetrics_names()


def _of_torchmetrics(name: str) -> Entry[Callable[..., Any]] | None:
    from distrain.metrics.foreign import find_torchmetrics

    found = find_torchmetrics(name)
    return None if found is None else Entry(name, found, metadata={"library": "torchmetrics"})


registry.add_library(_torchmetrics_names, _of_torchmetrics)
