"""Metrics over sums and counts: every one the same on any number of processes and any cut into batches.

    parts.py      one batch as metrics see it, and the sums that they are finished from
    catalogue.py  the metrics that are known by name
    foreign.py    metrics of torchmetrics, and the user's own

`MetricSet.update` adds a batch on the device without waiting for it. `sums` is one vector that ranks add up, `gather`
merges what cannot be added, and `compute` divides, once.
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
from distrain.config.registry import Entry
from distrain.config.registry import metrics as registry
from distrain.datasets.base import DataMeta
from distrain.metrics.catalogue import Metric, default_metrics, find_entry
from distrain.metrics.parts import Moments, Part, Seen, Setting, TextPart, Value, merged
from distrain.optim.losses import NO_TARGET, Outputs, build_loss
from distrain.run.metrics_file import EVALUATION_KEYS

__all__ = [
    "Metric",
    "MetricSet",
    "Value",
    "build_metrics",
    "check_metrics",
    "higher_is_better",
]

_PREFIX = "torchmetrics:"


class MetricSet:
    """The metrics of an evaluation, gathered batch by batch."""

    def __init__(self, metrics: Mapping[str, Metric], setting: Setting):
        self.metrics = dict(metrics)
        self.setting = setting
        parts = dict.fromkeys(part for metric in metrics.values() for part in metric.parts)
        self._parts = [part for part in parts if isinstance(part, Part) and not isinstance(part, TextPart)]
        self._text_parts = [part for part in parts if isinstance(part, TextPart)]
        self._keeps_rows = any(metric.rows for metric in metrics.values())
        self._keeps_moments = any(metric.moments for metric in metrics.values())
        self.caveats: dict[str, str] = {}
        """Why values of the last `compute` say nothing: they are NaN, or would be the same for any model."""
        self.reset()

    @property
    def names(self) -> list[str]:
        """The keys of what `compute` returns (a metric that gives several values adds theirs to its own)."""
        return list(self.metrics)

    @property
    def needs_text(self) -> bool:
        """Whether some metric compares texts, which `update_text` takes."""
        return bool(self._text_parts)

    def reset(self) -> None:
        """Begin a new evaluation."""
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
        """Add a batch. Rows where `keep` (batch,) bool is False are padding and change nothing, whatever they hold.

        `loss` is the sum and count of the recipe's loss over the batch; given, perplexity takes it over where it is the
        same. Does not wait for the device, but for metrics of torchmetrics and the user's own, where `keep` is given.
        """
        seen = Seen(outputs, targets, keep, self.setting, loss)
        for part in self._parts:
            self._add(part, part.batch(seen))
        if self._keeps_rows:
            self._rows.append((seen.outputs, seen.targets, seen.rows))
        if self._keeps_moments:
            self._moments.add(seen)

    def update_text(
        self, hypotheses: Sequence[str], references: Sequence[str], keep: Sequence[bool] | Tensor | None = None
    ) -> None:
        """Add generated texts and what they should be, one pair for each row of the batch."""
        kept = [True] * len(hypotheses) if keep is None else [bool(each) for each in keep]
        pairs = [pair for *pair, keeps in zip(hypotheses, references, kept, strict=True) if keeps]
        for part in self._text_parts:
            self._add(part, part.texts([pair[0] for pair in pairs], [pair[1] for pair in pairs]))

    def _add(self, part: Part | TextPart, sums: Tensor) -> None:
        self._sums[part] = self._sums[part] + sums if part in self._sums else sums

    def sums(self) -> Tensor:
        """Return this rank's sums, 1-D float64 on the outputs' device; ranks add theirs up, element by element."""
        for text in self._text_parts:
            self._sums.setdefault(text, torch.zeros(text.size, dtype=torch.float64))
        parts: list[Part | TextPart] = [*self._parts, *self._text_parts]
        if not parts:
            return torch.zeros(0, dtype=torch.float64)
        assert all(part in self._sums for part in parts), "no batch was added"
        device = self._sums[parts[0]].device
        return torch.cat([self._sums[part].to(device) for part in parts])

    def gathered(self) -> dict[str, Tensor]:
        """Return what this rank has that cannot be added up, on the CPU, empty for most metrics.

        Over ranks each is concatenated along dimension 0: `outputs` and `targets` (samples, ...) without padding,
        `moments` (1, 4, k).
        """
        found: dict[str, Tensor] = {}
        if self._rows:
            outputs, targets, rows = (torch.cat(column) for column in zip(*self._rows, strict=True))
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            found |= {"outputs": outputs[rows].cpu(), "targets": targets[rows].cpu()}
        if self._moments.state is not None:
            found["moments"] = self._moments.state.cpu()
        return found

    def gather(self, gather: Callable[[Any], list[Any]]) -> dict[str, Tensor]:
        """Return what `gathered` gives on all ranks, together; `gather` returns a value of every rank, in their order.

        All ranks call. Where there is nothing to gather, nothing is sent.
        """
        if not (self._keeps_rows or self._keeps_moments):
            return {}
        ranks = gather(self.gathered())
        return {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}

    def compute(self, sums: Tensor, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Value]:
        """Return each metric's value from the sums over all ranks and what was gathered from them."""
        flat = sums.double().cpu().numpy()
        pieces: dict[Part | TextPart, Any] = {}
        start = 0
        parts: list[Part | TextPart] = [*self._parts, *self._text_parts]
        for part in parts:
            size = len(self._sums[part])
            pieces[part] = flat[start : start + size]
            start += size
        assert start == len(flat), f"expected {start} sums, found {len(flat)}"
        gathered = gathered or {}
        all_rows = moments = None
        if self._keeps_rows:
            all_rows = Seen(gathered["outputs"], gathered["targets"], None, self.setting)
        if self._keeps_moments:
            moments = reduce(merged, gathered["moments"]).numpy()
        values: dict[str, Value] = {}
        self.caveats = {}
        for name, metric in self.metrics.items():
            extra = [all_rows] if metric.rows else [moments] if metric.moments else []
            given = [*(pieces[part] for part in metric.parts), *extra]
            value = metric.finish(*given)
            why = metric.caveat(*given) if metric.caveat is not None else None
            if why is not None:
                self.caveats[name] = why
            elif not _finite(value):
                self.caveats[name] = "it is undefined there, or the model's outputs are not finite"
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
    """Return the key, with underscores behind it where it is that of something else."""
    while key in taken:
        key += "_"
    return key


def higher_is_better(name: str, metrics: MetricSet) -> bool:
    """Return which way `eval.best` goes; `-NAME` says that lower is better. Raises UserError where it cannot decide."""
    return _direction(name, metrics.metrics)


def _direction(name: str, metrics: Mapping[str, Metric]) -> bool:
    key = name.removeprefix("-")
    choices = ["loss", *(each for each, metric in metrics.items() if metric.scalar)]
    if key not in choices:
        reason = "is not one number" if key in metrics else "is not computed: it is not in eval.metrics"
        raise UserError(f"eval.best: {key!r} {reason}{close_names(key, choices) or '; take ' + ' or '.join(choices)}")
    known = False if key == "loss" else metrics[key].higher_is_better
    if name.startswith("-") and known:
        raise UserError(f"eval.best: {name!r} asks for the lowest {key}, and the highest is the best; write {key!r}")
    return known if known is not None else not name.startswith("-")


# --------------------------------------------------------------------------------------------------------------------
# Building


def check_metrics(recipe: Recipe) -> list[str]:
    """Return one line for each problem of eval.metrics and eval.best that can be found without data."""
    return _build(recipe, None)[1]


def build_metrics(recipe: Recipe, meta: DataMeta) -> MetricSet:
    """Return the recipe's metrics, or the task's usual ones. Raises UserError with every problem."""
    metrics, problems, setting = _build(recipe, meta)
    if problems:
        raise UserError("\n".join(problems))
    return MetricSet(metrics, setting)


def _build(recipe: Recipe, meta: DataMeta | None) -> tuple[dict[str, Metric], list[str], Setting]:
    ignore_index = recipe.loss.args.get("ignore_index", NO_TARGET) if recipe.loss else NO_TARGET
    loss = build_loss(recipe, meta) if meta is not None else None
    setting = Setting(
        recipe.task,
        meta,
        ignore_index,
        loss_is_entropy=loss is not None and loss.is_token_entropy,
        is_probability=loss is not None and loss.takes_probabilities,
    )
    wanted = recipe.eval.metrics
    components = [Component(name=name) for name in default_metrics(setting)] if wanted is None else wanted
    metrics: dict[str, Metric] = {}
    problems: list[str] = []
    for component in components:
        key = _key(component)
        if key in metrics or key == "loss":
            problems.append(f"eval.metrics: {key!r} is there twice (the loss always is); remove one")
            continue
        if key in EVALUATION_KEYS:
            problems.append(
                f"eval.metrics: {key!r} is what a row of metrics.jsonl calls something else; rename the metric"
            )
            continue
        try:
            metrics[key] = _metric(component, key, setting)
        except UserError as error:
            problems.extend(str(error).split("\n"))
    if recipe.eval.best is not None and not problems:
        try:
            _direction(recipe.eval.best, metrics)
        except UserError as error:
            problems.append(str(error))
    return metrics, problems, setting


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
    # torchmetrics takes a second to import, and most runs do without it.
    from distrain.metrics.foreign import own_metric

    return own_metric(entry.value, key, args, setting)


def _torchmetrics_names() -> list[str]:
    from distrain.metrics.foreign import torchmetrics_names

    return torchmetrics_names()


def _of_torchmetrics(name: str) -> Entry[Callable[..., Any]] | None:
    from distrain.metrics.foreign import find_torchmetrics

    found = find_torchmetrics(name)
    return None if found is None else Entry(name, found, metadata={"library": "torchmetrics"})


registry.add_library(_torchmetrics_names, _of_torchmetrics)
