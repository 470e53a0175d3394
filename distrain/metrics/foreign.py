"""Metrics of torchmetrics, and users' metrics."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torchmetrics
import torchmetrics.classification
import torchmetrics.regression
import torchmetrics.text
from torch import Tensor

from distrain.config import UserError
from distrain.config.arguments import argument_problems
from distrain.metrics.catalogue import Metric, to_value
from distrain.metrics.parts import Part, Seen, Setting, TextPart, Value
from distrain.system.numbers import a_kind

logger = logging.getLogger(__name__)

_MODULES = (torchmetrics.text, torchmetrics.classification, torchmetrics.regression, torchmetrics)
_TASKS = {
    **dict.fromkeys(("classification", "segmentation", "token_classification"), "multiclass"),
    "binary": "binary",
    "multilabel": "multilabel",
}
_SEVERAL_REFERENCES = ("BLEUScore", "SacreBLEUScore", "CHRFScore", "TranslationEditRate")
"""Text metrics that take a list of references for each hypothesis."""


def torchmetrics_names() -> list[str]:
    """Return the names of the metrics of torchmetrics that take predictions and targets, or texts."""
    names = {name for module in _MODULES for name in module.__all__ if _is_metric(getattr(module, name, None))}
    return sorted(names - {"Metric", "MetricCollection", "MetricTracker"})


def find_torchmetrics(name: str) -> type[torchmetrics.Metric] | None:
    """Return the metric class of that name, or None."""
    found = next((getattr(module, name) for module in _MODULES if hasattr(module, name)), None)
    return found if _is_metric(found) and name in torchmetrics_names() else None


def _is_metric(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, torchmetrics.Metric)


def torchmetric(
    found: Callable[..., torchmetrics.Metric], name: str, args: Mapping[str, Any], setting: Setting
) -> Metric:
    """Return a metric of torchmetrics: from sums if all its state is summed, otherwise from all rows.

    The task, the number of classes, labels or outputs, and ignore_index are filled in if it takes them.
    """
    parameters = inspect.signature(found).parameters
    known = _known_arguments(setting)
    filled = {key: value for key, value in known.items() if key in parameters and key not in args and value is not None}
    # its **kwargs are for synchronising, which distrain does
    problems = argument_problems(found, args, "eval.metrics", name, filled=known, takes_any=False)
    if problems:
        raise UserError("\n".join(problems))

    def make() -> torchmetrics.Metric:
        try:
            made = found(**args, **filled)
        except (TypeError, ValueError, RuntimeError, ModuleNotFoundError) as error:
            raise UserError(f"eval.metrics: {name} refuses its arguments or cannot be used here: {error}") from error
        for each in made.modules():
            vars(each)["sync_on_compute"] = False  # not an argument: a class of the user's own may take none
        # sums in fp32 would depend on how the data is cut into batches
        return made.set_dtype(torch.float64)

    if setting.meta is None:  # a check without data, where the number of classes is not known
        filled |= {key: 3 for key in ("num_classes", "num_labels") if key in parameters and key not in args}
    metric = make()
    higher = metric.higher_is_better
    holds_others = sum(isinstance(each, torchmetrics.Metric) for each in metric.modules()) > 1
    is_summed = bool(metric._defaults and not holds_others) and all(
        metric._reductions[state] is torchmetrics.utilities.dim_zero_sum and isinstance(default, Tensor)
        for state, default in metric._defaults.items()
    )
    is_text = type(metric).__module__.startswith("torchmetrics.text") and not isinstance(
        metric, torchmetrics.text.Perplexity
    )
    if is_text and not setting.is_tokens:
        raise UserError(f"eval.metrics: {name} compares texts, and the task is {setting.task}; remove it")
    if is_summed:
        part = TextStates(metric, name) if is_text else States(metric, name)
        return Metric(partial(_from_states, make, part), higher, (part,))
    if is_text or setting.has_places:
        raise UserError(
            f"eval.metrics: {name} needs all predictions at once, which are too many for tokens or pixels; use one "
            "whose state is summed, such as Perplexity or WordErrorRate"
        )

    def finish(seen: Seen) -> Value | dict[str, Value]:
        metric = make()
        metric.update(*_inputs(seen, metric))
        return to_value(metric.compute())

    return Metric(finish, higher, rows=True)


def _known_arguments(setting: Setting) -> dict[str, Any]:
    meta = setting.meta
    classes = labels = outputs = None
    if meta is not None:
        classes = {"language_modeling": meta.vocab_size, "seq2seq": meta.target_vocab_size}.get(
            setting.task, meta.num_classes
        )
        labels, outputs = meta.num_targets, meta.num_targets if setting.task == "regression" else None
    return {
        "task": "multiclass" if setting.is_tokens else _TASKS.get(setting.task),
        "num_classes": classes,
        "num_labels": labels,
        "num_outputs": outputs,
        "ignore_index": setting.ignore_index if setting.has_places else None,
    }


def _inputs(seen: Seen, metric: torchmetrics.Metric) -> tuple[Tensor, Tensor]:
    """Return predictions and targets as torchmetrics takes them.

    Probabilities and never logits: it would guess from each batch which of the two they are. Of a classification no
    targets that are ignored: not every metric takes an ignore_index, and the others count such a target as an error.
    """
    task = seen.setting.task
    if task == "regression":
        output, target = seen.values
        return (output[:, 0], target[:, 0]) if output.shape[1] == 1 else (output, target)
    scores = seen.scores.double()
    if task in ("binary", "multilabel"):
        return (scores if seen.setting.is_probability else scores.sigmoid()), seen.labels
    if isinstance(metric, torchmetrics.text.Perplexity):
        return scores[None], seen.labels[None]
    probabilities = scores.softmax(-1)
    if task == "classification":
        return probabilities[seen.mask], seen.labels[seen.mask]
    return probabilities, seen.labels


class _Bare(torchmetrics.Metric):
    update = compute = lambda self: None


_BARE = frozenset(vars(_Bare()))
"""What torchmetrics itself notes on a metric."""
_KEPT = (int, float, complex, Tensor, np.ndarray, list, dict, set)


class States(Part):
    """The states of a torchmetrics metric, flat, one after the other."""

    def __init__(self, metric: torchmetrics.Metric, name: str):
        self.metric, self._name = metric, name
        self.shapes: dict[str, torch.Size] = {}
        self._tries = 0 if type(metric).__module__.startswith("torchmetrics.") else 3
        """Batches with which one of the user's own is still to be tried: whether its states are all that it keeps, and
        add up."""

    def batch(self, seen: Seen) -> Tensor:
        kept, is_class = seen.kept(), seen.setting.task == "classification"
        self.metric.to(seen.targets.device)
        if len(kept.targets) and (not is_class or bool(kept.mask.any())):
            return self._tried(*_inputs(kept, self.metric)) if self._tries else self._of(*_inputs(kept, self.metric))
        # only an update shows the states' shapes, so what does not count is counted and the count discarded
        targets = seen.targets
        if is_class and not targets.is_floating_point():
            targets = torch.full_like(targets, int(seen.setting.ignore_index == 0))
        return torch.zeros_like(self._of(*_inputs(Seen(seen.outputs, targets, None, seen.setting), self.metric)))

    def _of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        self.metric.reset()
        self.metric.update(predictions, targets)
        return self.flat()

    def _tried(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return what `_of` does; raises UserError where more is kept, and warns where two halves do not add up."""
        before = {name: copy.deepcopy(value) for name, value in self._besides().items()}
        found = self._of(predictions, targets)
        now = self._besides()
        if changed := [name for name, value in now.items() if not _is_same(before.get(name), value)]:
            raise UserError(
                f"eval.metrics: update() of {self._name} changes {', '.join(changed)}, and the states that are summed "
                f"over batches and processes are {', '.join(self.metric._defaults)}; make it a state too: "
                f"self.add_state({changed[0]!r}, default=torch.tensor(0.0), dist_reduce_fx='sum')"
            )
        self._tries -= 1
        if (samples := len(targets)) > 1:
            half = samples // 2
            halves = self._of(predictions[:half], targets[:half]) + self._of(predictions[half:], targets[half:])
            if not _adds_up(halves, found):
                self._tries = 0
                logger.warning(_no_mean(self._name, samples, "Keep sums and counts of samples in its states"))
        return found

    def _besides(self) -> dict[str, Any]:
        """Return the numbers, tensors and containers that the user's class has on it besides states."""
        own = {key: each for key, each in vars(self.metric).items() if key not in {*_BARE, *self.metric._defaults}}
        return {key: each for key, each in own.items() if isinstance(each, _KEPT) and not isinstance(each, bool)}

    def flat(self) -> Tensor:
        """Return the states as one float64 vector."""
        states = cast("dict[str, Tensor]", self.metric.metric_state)
        self.shapes = {name: state.shape for name, state in states.items()}
        return torch.cat([state.double().flatten() for state in states.values()])


class TextStates(States, TextPart):
    """The states of a torchmetrics metric of texts."""

    def __init__(self, metric: torchmetrics.Metric, name: str):
        super().__init__(metric, name)
        self.size = len(self.flat())
        self._nested = type(metric).__name__ in _SEVERAL_REFERENCES

    def texts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
        self.metric.reset()
        if hypotheses:
            wanted = [[each] for each in references] if self._nested else list(references)
            self.metric.update(list(hypotheses), wanted)
        return self.flat()


def _from_states(make: Callable[[], torchmetrics.Metric], part: States, sums: np.ndarray) -> Value | dict[str, Value]:
    metric, start = make(), 0
    for name, shape in part.shapes.items():
        dtype = cast("Tensor", metric._defaults[name]).dtype
        state = torch.from_numpy(sums[start : start + shape.numel()].copy()).reshape(shape)
        setattr(metric, name, state if dtype.is_floating_point else state.to(dtype))
        start += shape.numel()
    metric._update_count = 1
    return to_value(metric.compute())


# --------------------------------------------------------------------------------------------------------------------
# Users' metrics


def user_metric(found: Any, name: str, args: Mapping[str, Any], setting: Setting) -> Metric:
    """Return a user's metric: a class of torchmetrics, or a function `(outputs, targets)`.

    The function gets the outputs and targets of a batch without padding and returns a value for each sample (batch,) or
    the mean over the batch, either averaged over samples, or a pair (sum, count). Its attribute `higher_is_better` is
    optional.
    """
    if _is_metric(found):
        return torchmetric(found, name, args, setting)
    if not callable(found) or inspect.isclass(found):
        raise UserError(
            f"eval.metrics: {name} is {found!r}; expected a function (outputs, targets), or a class of torchmetrics"
        )
    first_two = list(inspect.signature(found).parameters)[:2]
    if problems := argument_problems(found, args, "eval.metrics", name, given=first_two):
        raise UserError("\n".join(problems))
    part = UserSums(partial(found, **args), name)
    return Metric(
        lambda sums: float(sums[0] / sums[1]) if sums[1] else float("nan"),
        getattr(found, "higher_is_better", None),
        (part,),
    )


_SEQUENCES = 8
"""Of a batch, with which it is tried whether a metric counts padding."""


class UserSums(Part):
    """(sum, count) of a user's function."""

    def __init__(self, function: Callable[..., Any], name: str):
        self._function = function
        self._name = name
        self._tries = 3
        """Batches with which it is still to be tried whether samples are taken together."""
        self._padded_tries = 16
        """Batches with which it is still to be tried whether padding is counted."""

    def batch(self, seen: Seen) -> Tensor:
        seen = seen.kept()
        samples = len(seen.targets)
        device = seen.targets.device
        if not samples:
            return torch.zeros(2, dtype=torch.float64, device=device)
        outputs, targets = seen.outputs, seen.targets
        found, is_whole = self._pair(outputs, targets, device)
        if is_whole and self._tries and samples > 1 and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            self._try_halves(outputs, targets, found)
        if self._padded_tries and seen.setting.has_places and isinstance(targets, Tensor) and targets.dim() == 2:
            self._try_padding(outputs, targets, seen.setting.ignore_index)
        return found

    def _try_padding(self, outputs: Tensor, targets: Tensor, ignore_index: int) -> None:
        """Warn where a sequence (seq, classes) has another value without the targets at its end that are ignored."""
        places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        lengths = ((targets != ignore_index) * places).amax(1)
        short = [(row, end) for row, end in enumerate(lengths.tolist()) if 0 < end < targets.shape[1]][:_SEQUENCES]
        self._padded_tries -= 1  # looking takes the host a wait for the device
        try:
            differ = [self._differs_without_end(outputs[row], targets[row], end) for row, end in short]
        except Exception as error:  # the user's code, which may take several sequences alone
            logger.debug(f"metric {self._name} of one sequence: {error}")
            return
        if any(differ):
            self._padded_tries = 0
            logger.warning(
                f"metric {self._name} counts padding: a sequence has another value without the targets {ignore_index} "
                "at its end, so it depends on eval.batch and the number of processes. Do not count these targets, and "
                "return a pair (sum, count)"
            )

    def _try_halves(self, outputs: Tensor, targets: Tensor, whole: Tensor) -> None:
        """Warn where the sums of two halves of a batch are not those of the `whole`."""
        self._tries -= 1
        half = len(targets) // 2
        try:
            first, second = (
                self._pair(outputs[part], targets[part], whole.device)[0] for part in (slice(half), slice(half, None))
            )
        except Exception as error:  # the user's code, of samples that it may not be meant for: all of one class
            logger.debug(f"metric {self._name} of half a batch: {error}")
            return
        if not _adds_up(first + second, whole):
            self._tries = 0
            cure = "Return a value per sample, or a pair (sum, count) of what adds up"
            logger.warning(_no_mean(self._name, len(targets), cure))

    def _differs_without_end(self, outputs: Tensor, targets: Tensor, length: int) -> bool:
        """Whether a sequence (seq, classes) has another value as its first `length` places."""
        whole = self._pair(outputs[None], targets[None], targets.device)[0]
        begin = self._pair(outputs[None, :length], targets[None, :length], targets.device)[0]
        return not torch.allclose(whole, begin, rtol=1e-3, atol=1e-6, equal_nan=True)

    def _pair(self, outputs: Any, targets: Any, device: torch.device) -> tuple[Tensor, bool]:
        """Return (sum, count) (2,) float64 of a batch, and whether the function gave one result for all of it."""
        samples = len(targets)
        result = self._function(outputs, targets)
        try:
            if isinstance(result, tuple):
                pair = [torch.as_tensor(each, dtype=torch.float64, device=device) for each in result]
                if [each.numel() for each in pair] == [1, 1]:
                    return torch.stack([each.reshape(()) for each in pair]), True
            else:
                values = torch.as_tensor(result, device=device).double()
                if not values.dim() or len(values) == samples:
                    mean = values.mean()
                    return torch.stack([mean * samples, torch.full_like(mean, samples)]), not values.dim()
        except (TypeError, ValueError, RuntimeError):
            pass  # it is no number
        raise UserError(
            f"eval.metrics: {self._name} returned {_described(result)} for {samples} samples; expected one value "
            "for each, their mean, or a tuple (sum, count)"
        )


def _described(result: Any) -> str:
    if isinstance(result, Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(result, Tensor) else 'an array'} {tuple(result.shape)}"
    return f"{len(result)} values" if isinstance(result, tuple | list) else a_kind(result)


def _adds_up(halves: Tensor, whole: Tensor) -> bool:
    return torch.allclose(halves, whole, rtol=1e-3, atol=1e-6, equal_nan=True)


def _no_mean(name: str, samples: int, cure: str) -> str:
    return (
        f"metric {name} is no mean over samples: its value for {samples} samples is not that of their halves, so it "
        f"depends on eval.batch and the number of processes. {cure}; torchmetrics has metrics of all samples together"
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    try:
        return bool(one == other)
    except Exception:  # whatever a class of the user's compares
        return True
