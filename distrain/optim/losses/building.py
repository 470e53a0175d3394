"""Losses by name, built from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config import Form, Recipe, UserError
from distrain.config.arguments import argument_problems
from distrain.config.registry import losses
from distrain.datasets.base import DataMeta
from distrain.datasets.class_counts import BALANCED, balanced_pos_weights, balanced_weights
from distrain.optim.losses.classes import ClassLoss, is_of_tokens
from distrain.optim.losses.elements import CtcLoss, ElementLoss, Rule
from distrain.optim.losses.interface import Loss
from distrain.optim.losses.user import user_loss

_RULES: dict[str, Rule] = {
    "cross_entropy": Rule(
        "Log-softmax and negative log-likelihood of the target class.", nn.CrossEntropyLoss, "classes", 1, True
    ),
    "nll": Rule("Negative log-likelihood, of log-probabilities.", nn.NLLLoss, "classes", 1, True),
    "l1": Rule("Mean absolute error.", nn.L1Loss, "elements"),
    "mse": Rule("Mean squared error.", nn.MSELoss, "elements"),
    "smooth_l1": Rule("Squared below `beta`, absolute above.", nn.SmoothL1Loss, "elements"),
    "huber": Rule("Squared below `delta`, linear above.", nn.HuberLoss, "elements"),
    "bce": Rule("Binary cross entropy of probabilities.", nn.BCELoss, "elements"),
    "bce_with_logits": Rule("Binary cross entropy of logits.", nn.BCEWithLogitsLoss, "elements"),
    "poisson_nll": Rule("Negative log-likelihood of counts.", nn.PoissonNLLLoss, "elements"),
    "gaussian_nll": Rule(
        "Negative log-likelihood of normals; the model returns (mean, variance).", nn.GaussianNLLLoss, "elements", 2
    ),
    "kl_div": Rule(
        "Kullback-Leibler divergence of log-probabilities; see `reduction: batchmean`.", nn.KLDivLoss, "elements"
    ),
    "soft_margin": Rule("Logistic loss of targets 1 and -1.", nn.SoftMarginLoss, "elements"),
    "hinge_embedding": Rule("Hinge on distances, of targets 1 and -1.", nn.HingeEmbeddingLoss, "elements"),
    "margin_ranking": Rule(
        "Which of two is larger, of targets 1 and -1; the model returns both.", nn.MarginRankingLoss, "elements", 2
    ),
    "multi_margin": Rule("Hinge over classes.", nn.MultiMarginLoss, "rows", 1, True),
    "multi_label_margin": Rule(
        "Hinge over lists of classes, filled up with -1.", nn.MultiLabelMarginLoss, "rows", 1, True
    ),
    "multi_label_soft_margin": Rule("Mean over labels of the logistic loss.", nn.MultiLabelSoftMarginLoss, "rows"),
    "cosine_embedding": Rule(
        "Cosine of two embeddings, of targets 1 and -1; the model returns both.", nn.CosineEmbeddingLoss, "rows", 2
    ),
    "triplet_margin": Rule(
        "Distances; the model returns (anchor, positive, negative).", nn.TripletMarginLoss, "rows", 3
    ),
    "ctc": Rule(
        "Alignment-free sequences; outputs (batch, time, classes), targets filled up with -100.", nn.CTCLoss, "rows"
    ),
}
_REFUSED = {
    "linear_cross_entropy": "has weights, which belong in the model; use 'cross_entropy'",
    "adaptive_log_softmax_with": "has weights, which belong in the model; use 'cross_entropy'",
    "triplet_margin_with_distance": "takes a function, which a recipe cannot hold; use 'triplet_margin', or wrap it "
    "in a loss of your own",
}
_ALIASES = {"binarycrossentropy": "bce", "binarycrossentropywithlogits": "bcewithlogits"}
_REDUCTIONS = ("size_average", "reduce", "reduction")
_DEFAULTS: dict[Form, str] = {
    "classification": "cross_entropy",
    "segmentation": "cross_entropy",
    "token_classification": "cross_entropy",
    "language_modeling": "cross_entropy",
    "seq2seq": "cross_entropy",
    "binary": "bce_with_logits",
    "multilabel": "bce_with_logits",
    "regression": "mse",
}


for _name, _rule in _RULES.items():
    losses.register(_name, about=_rule.about, rule=_rule)(_rule.build)
for _name, _why in _REFUSED.items():
    losses.register(_name, refused=_why)(None)


def check_loss(recipe: Recipe) -> list[str]:
    """Return one line for each problem of the recipe's loss that can be found without data."""
    try:
        build_loss(recipe, DataMeta())
    except UserError as error:
        return str(error).split("\n")
    return []


def build_loss(recipe: Recipe, meta: DataMeta) -> Loss:
    """Return the recipe's loss, or the task's default. Raises UserError with every problem of its arguments."""
    name = recipe.loss.name if recipe.loss else _DEFAULTS[recipe.form]
    args = recipe.loss.args if recipe.loss else {}
    dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
    entry = losses.find(_ALIASES.get(losses.fold(name), name))
    if "rule" not in entry.metadata:
        return user_loss(name, entry.value, args, dtype)
    build, rule = entry.value, entry.metadata["rule"]
    class_name = build.__name__
    per_row = rule.over == "rows"
    if class_name == "KLDivLoss" and args.get("reduction") in ("batchmean", "mean"):
        per_row = args.pop("reduction") == "batchmean"

    problems = [
        f"loss.{key}: the mean is always over all samples of the step, and taken once; remove it"
        for key in _REDUCTIONS
        if key in args
    ]
    args = {key: value for key, value in args.items() if key not in _REDUCTIONS}
    problems += argument_problems(build, args, "loss", repr(name), given=_REDUCTIONS)
    for key in ("weight", "pos_weight"):
        if args.get(key) == BALANCED:
            try:
                args[key] = _balanced(key, class_name, recipe.form, meta)
            except UserError as error:
                problems.append(str(error))
                args[key] = None
        if args.get(key) is not None:
            try:
                expected = None if rule.over == "elements" else _classes(recipe.form, meta)
                args[key] = _weights(key, args[key], expected, dtype)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    try:
        if class_name == "CTCLoss":
            return CtcLoss(name, partial(build, **args))
        if rule.over == "classes":
            without_index = {key: value for key, value in args.items() if key != "ignore_index"}
            loss: Loss = ClassLoss(name, partial(build, **without_index), recipe.form, args)
        else:
            loss = ElementLoss(name, partial(build, **args), rule, per_row, recipe.form)
        _try(loss, class_name, rule, recipe.form, args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"loss: {name!r} refuses its arguments: {error}") from error
    return loss


def _try(loss: Loss, class_name: str, rule: Rule, task: Form, args: Mapping[str, Any]) -> None:
    """Compute the loss of one artificial sample: torch checks most arguments only then."""
    width = max([len(value) for value in args.values() if isinstance(value, Tensor)], default=2)
    shape = (1, 1, width) if is_of_tokens(task) and rule.over == "classes" else (1, width)
    outputs = [torch.full(shape, 0.5)] * rule.outputs
    if class_name == "MultiLabelMarginLoss":
        targets = torch.full(shape, -1)
    elif rule.over == "elements" or class_name == "MultiLabelSoftMarginLoss":
        targets = torch.full(shape, 0.5)
    else:
        targets = torch.zeros(shape[:-1], dtype=torch.long)
    copy(loss).sum_and_count(outputs, targets)  # the loss itself records the number of a model's outputs


def _weights(key: str, value: Any, expected: int | None, dtype: torch.dtype) -> Tensor:
    numbers = [value] if isinstance(value, (int, float)) else value
    if not isinstance(numbers, list) or not all(isinstance(each, (int, float)) and each >= 0 for each in numbers):
        raise UserError(f"loss.{key}: found {value!r}, expected a list of numbers of 0 or more, one for each class")
    if expected is not None and len(numbers) != expected:
        raise UserError(f"loss.{key}: {len(numbers)} numbers for {expected} classes; give one for each")
    return torch.tensor(numbers, dtype=dtype)


def _balanced(key: str, class_name: str, task: Form, meta: DataMeta) -> list[float] | None:
    """Return the weights that are computed from the labels; None where those are not known."""
    if key == "weight" and (task != "classification" or class_name not in ("CrossEntropyLoss", "NLLLoss")):
        positive = "; set pos_weight: balanced" if task in ("binary", "multilabel") else ""
        raise UserError(
            f"loss.weight: {BALANCED} is for the classes of cross_entropy and nll (classification){positive}"
        )
    if key == "pos_weight" and task not in ("binary", "multilabel"):
        raise UserError(f"loss.pos_weight: {BALANCED} is for the labels of tasks binary and multilabel, not of {task}")
    if meta.class_counts is None or meta.counted_samples is None:
        return None
    counts = list(meta.class_counts)
    if key == "weight":
        return balanced_weights(counts, meta.class_names)
    return balanced_pos_weights(counts[1:] if task == "binary" else counts, meta.counted_samples, None)


def _classes(task: Form, meta: DataMeta) -> int | None:
    if task == "multilabel":
        return meta.num_targets
    return {"language_modeling": meta.vocab_size, "seq2seq": meta.target_vocab_size}.get(task, meta.num_classes)
