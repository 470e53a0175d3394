"""The built-in metrics.

To add one, decorate a function of the `Setting` (and of the arguments that a recipe may give) that returns a `Metric`
with `metrics.register(NAME, tasks=...)`. Values are those of scikit-learn, with zero for divisions by zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distrain.config import Form, UserError
from distrain.config.registry import Entry, metrics
from distrain.datasets.tags import mark_entities
from distrain.metrics.parts import (
    ClassCounts,
    Confusion,
    Correct,
    Errors,
    Part,
    Seen,
    Setting,
    Spread,
    TextPart,
    TokenEntropy,
    Value,
)

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

CLASSES: tuple[Form, ...] = ("classification", "binary")
PLACES: tuple[Form, ...] = ("segmentation", "token_classification")
"""Several classes, of which each place of a sample has one."""
LABELS: tuple[Form, ...] = (*CLASSES, "multilabel")
REGRESSION: tuple[Form, ...] = ("regression",)
TOKENS: tuple[Form, ...] = ("language_modeling", "seq2seq")


@dataclass(frozen=True)
class Metric:
    """What a metric needs, and how its value is computed from that."""

    finish: Callable[..., Value | dict[str, Value]]
    """Takes the parts' sums (1-D float64 arrays) in their order; then `Seen` for `rows`, (4, k) for `moments`, or a
    number for `bytes`."""
    higher_is_better: bool | None
    parts: tuple[Part | TextPart, ...] = ()
    rows: bool = False
    """Whether it needs the outputs and targets of all samples at once."""
    moments: bool = False
    """Whether it needs the moments of the targets."""
    bytes: bool = False
    """Whether it needs the bytes of text for each token of the split, None where the split does not state them."""
    scalar: bool = True
    """Whether its value is one number, which can rank checkpoints."""
    caveat: Callable[..., str | None] | None = None
    """Takes what `finish` takes; returns why the value is meaningless on this data, or None."""


_TOP_K = re.compile(r"top_?(\d+)(?:_accuracy)?")


def find_entry(name: str, task: Form) -> tuple[Entry[Callable[..., Any]], list[str]]:
    """Return the metric of that name, and the arguments that the name includes; raises UserError.

    `top_5`, `top5` and `top5_accuracy` are `top_k` with k: 5.
    """
    if match := _TOP_K.fullmatch(name):
        entry = metrics.find("top_k", task)
        return replace(entry, name=name, value=partial(entry.value, k=int(match[1]))), ["k"]
    entry = metrics.find(name, task)
    return entry, list(getattr(entry.value, "keywords", ()))


def default_metrics(setting: Setting) -> list[str]:
    """Return the default metrics of a task."""
    tokens = ["perplexity", "token_accuracy"]
    if setting.meta is not None and setting.meta.bytes_per_token is not None and setting.task == "language_modeling":
        tokens.append("bits_per_byte")
    places = ["token_accuracy", "f1_macro"]
    if setting.meta is not None and mark_entities(setting.meta.class_names or ()):
        places.append("entity_f1")
    return {
        "classification": ["accuracy", "f1_macro"],
        "binary": ["accuracy", "f1"],
        "multilabel": ["f1_micro", "f1_macro"],
        "regression": ["mae", "rmse", "r2"],
        "segmentation": ["mean_iou", "pixel_accuracy"],
        "token_classification": places,
        "custom": [],
    }.get(setting.task, tokens)


# --------------------------------------------------------------------------------------------------------------------
# Classes


def _share(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@metrics.register("accuracy", tasks=LABELS)
def accuracy(setting: Setting) -> Metric:
    """Share of samples predicted correctly (for multilabel: with every label correct)."""
    return Metric(_share, True, (Correct(),))


@metrics.register("token_accuracy", tasks=("token_classification", *TOKENS))
def token_accuracy(setting: Setting) -> Metric:
    """Share of tokens predicted correctly."""
    return Metric(_share, True, (Correct(),))


@metrics.register("pixel_accuracy", tasks=("segmentation",))
def pixel_accuracy(setting: Setting) -> Metric:
    """Share of pixels predicted correctly."""
    return Metric(_share, True, (Correct(),))


@metrics.register("top_k", tasks=("classification", *PLACES, *TOKENS))
def top_k(setting: Setting, k: int) -> Metric:
    """Share of samples whose class is among the k highest scores; also written top_5."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"eval.metrics: top_k with k: {k!r}; k is a whole number from 1")
    return Metric(_share, True, (Correct(k),))


@metrics.register("balanced_accuracy", tasks=(*CLASSES, *PLACES))
def balanced_accuracy(setting: Setting) -> Metric:
    """Mean over the classes that occur of the share of their samples predicted correctly."""

    def finish(sums: np.ndarray) -> float:
        right, _, there = sums.reshape(3, -1)
        return float((right[there > 0] / there[there > 0]).mean()) if there.any() else math.nan

    return Metric(finish, True, (ClassCounts(),))


def per_class(kind: str, counts: np.ndarray) -> np.ndarray:
    """Return precision, recall or f1 of each class, from how often (3, classes) it is right, predicted and there."""
    right, predicted, there = counts
    if kind == "precision":
        return _over(right, predicted)
    return _over(right, there) if kind == "recall" else _over(2 * right, predicted + there)


def _averaged(kind: str, average: str, is_multilabel: bool, sums: np.ndarray) -> Value:
    counts = sums.reshape(3, -1)
    if average == "per_class":
        return per_class(kind, counts).tolist()
    if average == "binary":
        return float(per_class(kind, counts)[1])
    if average == "micro":
        return float(per_class(kind, counts.sum(1, keepdims=True))[0])
    if average == "weighted":
        there = counts[2]
        return float((per_class(kind, counts) * there).sum() / there.sum()) if there.any() else 0.0
    # as in scikit-learn, the mean skips a class that neither occurs nor is predicted, but never a label
    counts = counts if is_multilabel else counts[:, (counts[1] + counts[2]) > 0]
    return float(per_class(kind, counts).mean()) if counts.shape[1] else math.nan


_CLASS_SCORES = {
    "precision": "Share of what was predicted as a class that is of it: "
    "of the positive class (binary), otherwise the mean over classes.",
    "precision_micro": "Share of what was predicted as a class that is of it: over all decisions.",
    "precision_macro": "Share of what was predicted as a class that is of it: the mean over classes.",
    "precision_weighted": "Share of what was predicted as a class that is of it: the mean over classes by their size.",
    "precision_per_class": "Share of what was predicted as a class that is of it: for each class.",
    "recall": "Share of what is of a class that was predicted as it: "
    "of the positive class (binary), otherwise the mean over classes.",
    "recall_micro": "Share of what is of a class that was predicted as it: over all decisions.",
    "recall_macro": "Share of what is of a class that was predicted as it: the mean over classes.",
    "recall_weighted": "Share of what is of a class that was predicted as it: the mean over classes by their size.",
    "recall_per_class": "Share of what is of a class that was predicted as it: for each class.",
    "f1": "Harmonic mean of precision and recall: of the positive class (binary), otherwise the mean over classes.",
    "f1_micro": "Harmonic mean of precision and recall: over all decisions.",
    "f1_macro": "Harmonic mean of precision and recall: the mean over classes.",
    "f1_weighted": "Harmonic mean of precision and recall: the mean over classes by their size.",
    "f1_per_class": "Harmonic mean of precision and recall: for each class.",
}


def _class_score(setting: Setting, kind: str, average: str | None) -> Metric:
    average = average or ("binary" if setting.task == "binary" else "macro")
    finish = partial(_averaged, kind, average, setting.task == "multilabel")
    caveat = None  # with several classes, those that do not occur are skipped, or are one of many
    if average == "binary" or setting.task == "multilabel":
        caveat = partial(_no_positive, average == "binary")
    return Metric(finish, True, (ClassCounts(),), scalar=average != "per_class", caveat=caveat)


def _no_positive(is_binary: bool, sums: np.ndarray) -> str | None:
    there = sums.reshape(3, -1)[2]
    return None if (there[1] if is_binary else there.sum()) else "no sample of it is positive"


for _name, _about in _CLASS_SCORES.items():
    _kind, _, _average = _name.partition("_")
    _build = partial(_class_score, kind=_kind, average=_average or None)
    metrics.register(_name, tasks=(*LABELS, *PLACES), about=_about)(_build)


def _overlap(kind: str, average: str, ignored: int, sums: np.ndarray) -> Value:
    right, predicted, there = sums.reshape(3, -1)
    both = predicted + there
    each = _over(right, both - right) if kind == "iou" else _over(2 * right, both)
    if average == "per_class":
        return each.tolist()
    counted = (both > 0) & (np.arange(len(both)) != ignored)
    return float(each[counted].mean()) if counted.any() else math.nan


@metrics.register("mean_iou", tasks=("segmentation",))
def mean_iou(setting: Setting) -> Metric:
    """Intersection over union of all pixels of a class; the mean over the classes that occur or are predicted."""
    return Metric(partial(_overlap, "iou", "mean", setting.ignore_index), True, (ClassCounts(),))


@metrics.register("iou_per_class", tasks=("segmentation",))
def iouper_class(setting: Setting) -> Metric:
    """Intersection over union for each class; 0 for one that neither occurs nor is predicted."""
    return Metric(partial(_overlap, "iou", "per_class", setting.ignore_index), True, (ClassCounts(),), scalar=False)


@metrics.register("dice", tasks=("segmentation",))
def dice(setting: Setting) -> Metric:
    """Twice the intersection over the sizes of both, for all pixels of a class; the mean as in mean_iou."""
    return Metric(partial(_overlap, "dice", "mean", setting.ignore_index), True, (ClassCounts(),))


@metrics.register("confusion_matrix", tasks=(*LABELS, *PLACES))
def confusion_matrix(setting: Setting) -> Metric:
    """How often each class (row) was predicted as each (column); [[tn, fp], [fn, tp]] for each label."""

    def of_labels(sums: np.ndarray, correct: np.ndarray) -> Value:
        right, predicted, there = sums.reshape(3, -1)
        rest = correct[1] - predicted - there + right
        cells = np.stack([rest, predicted - right, there - right, right], axis=1)
        return cells.astype(np.int64).reshape(-1, 2, 2).tolist()

    def of_classes(sums: np.ndarray) -> Value:
        side = math.isqrt(len(sums))
        return sums.astype(np.int64).reshape(side, side).tolist()

    if setting.task == "multilabel":
        return Metric(of_labels, None, (ClassCounts(), Correct()), scalar=False)
    return Metric(of_classes, None, (Confusion(),), scalar=False)


# --------------------------------------------------------------------------------------------------------------------
# Rankings, which need every score


def _one_against_rest(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, columns) truths and scores: one column for each class or label, one for binary."""
    scores, labels = seen.scores[seen.mask].double(), seen.labels[seen.mask]
    if seen.setting.task == "classification":
        scores, labels = scores.softmax(-1), torch.nn.functional.one_hot(labels, seen.classes)
    return labels.reshape(len(labels), -1).numpy(), scores.reshape(len(scores), -1).numpy()


def _ranked(score: Callable[..., float], needs_negatives: bool, absent: float | None, seen: Seen) -> float:
    truths, scores = _one_against_rest(seen)
    if np.isnan(scores).any():
        return math.nan
    scores = np.nan_to_num(scores)  # which refuse the infinite, though its rank is known
    values = []
    for truth, column in zip(truths.T, scores.T, strict=True):
        if truth.any() and not (needs_negatives and truth.all()):
            values.append(float(score(truth, column)))
        elif absent is not None:
            values.append(absent)
    return float(np.mean(values)) if values else math.nan


@metrics.register("auroc", tasks=LABELS)
def auroc(setting: Setting) -> Metric:
    """Area under the ROC curve; the mean of one class against the rest, over the classes that have both."""

    def finish(seen: Seen) -> float:
        from sklearn.metrics import roc_auc_score

        return _ranked(roc_auc_score, True, None, seen)

    def caveat(seen: Seen) -> str | None:
        truths, _ = _one_against_rest(seen)
        both = any(truth.any() and not truth.all() for truth in truths.T)
        return None if both else "there are not both positive and negative samples in it"

    return Metric(finish, True, rows=True, caveat=caveat)


@metrics.register("average_precision", tasks=LABELS)
def average_precision(setting: Setting) -> Metric:
    """Area under the precision-recall curve; the mean over the classes that occur, or over all labels."""

    def finish(seen: Seen) -> float:
        from sklearn.metrics import average_precision_score

        return _ranked(average_precision_score, False, None if setting.task == "classification" else 0.0, seen)

    def caveat(seen: Seen) -> str | None:
        return None if _one_against_rest(seen)[0].any() else "no sample of it is positive"

    return Metric(finish, True, rows=True, caveat=caveat)


# --------------------------------------------------------------------------------------------------------------------
# Regression, in the targets' own units; the mean over targets where there are several


def _errors(sums: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    absolute, squared = sums[1:].reshape(2, -1)
    return sums[0], absolute, squared


def _mean_error(kind: str, sums: np.ndarray) -> float:
    count, absolute, squared = _errors(sums)
    if not count:
        return math.nan
    each = {"mae": absolute / count, "mse": squared / count, "rmse": np.sqrt(squared / count)}[kind]
    return float(each.mean())


def _error(setting: Setting, kind: str) -> Metric:
    return Metric(partial(_mean_error, kind), False, (Errors(),))


_ERRORS = {
    "mae": "Mean absolute error.",
    "mse": "Mean squared error.",
    "rmse": "Root of the mean squared error of each target, and the mean of these.",
}
for _kind, _what in _ERRORS.items():
    metrics.register(_kind, tasks=REGRESSION, about=_what)(partial(_error, kind=_kind))


@metrics.register("r2", tasks=REGRESSION)
def r2(setting: Setting) -> Metric:
    """Share of the targets' variance that is explained."""

    def score(count: float, squared: np.ndarray, deviations: np.ndarray) -> float:
        if count < 2:
            return math.nan
        # scikit-learn's convention for targets that do not vary: 1 for a perfect prediction, else 0.
        ratio = np.divide(squared, deviations, out=(squared > 0).astype(float), where=deviations > 0)
        return float((1 - ratio).mean())

    def deviations_of(count: float, spread: np.ndarray) -> np.ndarray:
        first, second = spread.reshape(2, -1)
        deviations = second - first**2 / max(count, 1)
        # of targets that do not vary, only rounding is left
        return np.where(deviations > 1e-13 * second, deviations, 0.0)

    def constant(deviations: np.ndarray) -> str | None:
        return None if (deviations > 0).any() else "its targets do not vary"

    def standardised(sums: np.ndarray, spread: np.ndarray) -> float:
        count, _, squared = _errors(sums)
        std = np.array(setting.meta.target_std if setting.meta is not None else 1.0)
        return score(count, squared, deviations_of(count, spread) * std**2)

    def gathered(sums: np.ndarray, moments: np.ndarray) -> float:
        count, _, squared = _errors(sums)
        return score(count, squared, moments[3])

    if setting.is_standardised:
        caveat = lambda sums, spread: constant(deviations_of(sums[0], spread))  # noqa: E731
        return Metric(standardised, True, (Errors(), Spread()), caveat=caveat)
    return Metric(gathered, True, (Errors(),), moments=True, caveat=lambda sums, moments: constant(moments[3]))


# --------------------------------------------------------------------------------------------------------------------
# Language


@metrics.register("perplexity", tasks=TOKENS)
def perplexity(setting: Setting) -> Metric:
    """Exponential of the mean cross entropy of a token, without label smoothing or weights."""

    def finish(sums: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(_share(sums)))

    return Metric(finish, False, (TokenEntropy(),))


@metrics.register("bits_per_byte", tasks=TOKENS)
def bits_per_byte(setting: Setting) -> Metric:
    """Cross entropy in bits for each byte of the split's text; comparable between tokenizers."""
    bytes_per_token = setting.meta.bytes_per_token if setting.meta is not None else 1.0
    if bytes_per_token is None:
        raise UserError("eval.metrics: bits_per_byte needs the bytes of a token, which this data set does not state")

    def finish(sums: np.ndarray, of_split: float | None) -> float:
        return _share(sums) / math.log(2) / (of_split or bytes_per_token)

    return Metric(finish, False, (TokenEntropy(),), bytes=True)


class BleuCounts(TextPart):
    """(2 + 2 * orders): lengths of hypotheses and references, n-grams matched, n-grams in all."""

    def __init__(self, scorer: BLEU):
        self.scorer = scorer
        self.size = 2 + 2 * scorer.max_ngram_order

    def texts(self, hypotheses: Sequence[str], references: Sequence[str]) -> torch.Tensor:
        sums = np.zeros(self.size)
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            score = self.scorer.sentence_score(hypothesis, [reference])
            sums += [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return torch.from_numpy(sums)


@metrics.register("bleu", tasks=TOKENS)
def bleu(
    setting: Setting,
    lowercase: bool = False,
    tokenize: str | None = None,
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    max_ngram_order: int = 4,
    effective_order: bool = False,
) -> Metric:
    """Corpus BLEU (0 to 100) of what is generated, as sacrebleu has it."""
    from sacrebleu.metrics.bleu import BLEU

    if smooth_method not in BLEU.SMOOTH_DEFAULTS:
        choices = ", ".join(BLEU.SMOOTH_DEFAULTS)
        raise UserError(f"eval.metrics: bleu has no smooth_method {smooth_method!r}; it has {choices}")
    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"eval.metrics: bleu has no tokenize {tokenize!r}; it has {', '.join(BLEU.TOKENIZERS)}")
    # smoothing may change a sentence's counts, so it is applied once, at the end
    scorer = BLEU(lowercase, False, tokenize, "none", None, max_ngram_order, effective_order=True)

    def finish(sums: np.ndarray) -> float:
        numbers = [int(number) for number in sums]
        counts = numbers[2:]
        return BLEU.compute_bleu(
            counts[:max_ngram_order],
            counts[max_ngram_order:],
            numbers[0],
            numbers[1],
            smooth_method,
            smooth_value,
            effective_order,
            max_ngram_order,
        ).score

    return Metric(finish, True, (BleuCounts(scorer),))


def to_value(value: Any) -> Value | dict[str, Value]:
    """Return the result of another library's metric as numbers and lists."""
    if isinstance(value, dict):
        return {str(key): to_value(item) for key, item in value.items()}  # type: ignore[misc]
    if isinstance(value, (tuple, list)):
        return [to_value(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else float(value)
