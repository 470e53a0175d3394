"""Losses by name, as sums and counts.

A loss here returns the sum of what it measured and the count that the sum is over. One division of the global sum by
the global count gives exactly what the torch class gives with reduction="mean" on all the data at once, however the
data is cut into batches, micro-batches and ranks. The count is known from the targets alone, so a training step can add
it up over ranks before it goes backward.

What the count is over, after torch's own means:
    classes   cross entropy, NLL: the targets that are not `ignore_index`, each with the weight of its class
    elements  the numbers in the targets (MSE, BCE, ...)
    rows      the samples (margins over classes, triplets, CTC, a loss of your own)
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from distrain.config import Recipe, Task, UserError, close_names, is_object_spec, resolve_object
from distrain.datasets import DataMeta
from distrain.models import ModelOutput
from distrain.optim.arguments import argument_problems, snake, squeezed

Outputs = Tensor | Sequence[Tensor]
"""What a model returns: one tensor, or several for losses that take several."""

NO_TARGET = -100
"""Where a token is not to be predicted (torch's default ignore_index)."""
_NEVER = -(2**31)
"""An ignore_index that no target has: without `ignore_index` in the recipe, a label outside the classes is an error."""


@dataclass(frozen=True)
class _Rule:
    over: Literal["classes", "elements", "rows"]
    summary: str
    outputs: int = 1
    """How many tensors the model returns for it."""
    class_targets: bool = False
    """Whether targets are integers."""


_RULES: dict[str, _Rule] = {
    "CrossEntropyLoss": _Rule("classes", "Log-softmax and negative log-likelihood of the target class.", 1, True),
    "NLLLoss": _Rule("classes", "Negative log-likelihood, of log-probabilities.", 1, True),
    "L1Loss": _Rule("elements", "Mean absolute error."),
    "MSELoss": _Rule("elements", "Mean squared error."),
    "SmoothL1Loss": _Rule("elements", "Squared below `beta`, absolute above."),
    "HuberLoss": _Rule("elements", "Squared below `delta`, linear above."),
    "BCELoss": _Rule("elements", "Binary cross entropy of probabilities."),
    "BCEWithLogitsLoss": _Rule("elements", "Binary cross entropy of logits."),
    "PoissonNLLLoss": _Rule("elements", "Negative log-likelihood of counts."),
    "GaussianNLLLoss": _Rule("elements", "Negative log-likelihood of normals; the model returns (mean, variance).", 2),
    "KLDivLoss": _Rule("elements", "Kullback-Leibler divergence of log-probabilities; see `reduction: batchmean`."),
    "SoftMarginLoss": _Rule("elements", "Logistic loss of targets 1 and -1."),
    "HingeEmbeddingLoss": _Rule("elements", "Hinge on distances, of targets 1 and -1."),
    "MarginRankingLoss": _Rule("elements", "Which of two is larger, of targets 1 and -1; the model returns both.", 2),
    "MultiMarginLoss": _Rule("rows", "Hinge over classes.", 1, True),
    "MultiLabelMarginLoss": _Rule("rows", "Hinge over lists of classes, filled up with -1.", 1, True),
    "MultiLabelSoftMarginLoss": _Rule("rows", "Mean over labels of the logistic loss."),
    "CosineEmbeddingLoss": _Rule("rows", "Cosine of two embeddings, of targets 1 and -1; the model returns both.", 2),
    "TripletMarginLoss": _Rule("rows", "Distances; the model returns (anchor, positive, negative).", 3),
    "CTCLoss": _Rule("rows", "Alignment-free sequences; outputs (batch, time, classes), targets filled up with -100."),
}
_REFUSED = {
    "LinearCrossEntropyLoss": "has weights of its own, and weights belong into the model; take 'cross_entropy'",
    "AdaptiveLogSoftmaxWithLoss": "has weights of its own, and weights belong into the model; take 'cross_entropy'",
    "TripletMarginWithDistanceLoss": "takes a function, which a recipe cannot hold; take 'triplet_margin', or wrap it "
    "in a loss of your own",
}
_ALIASES = {"binarycrossentropy": "bce", "binarycrossentropywithlogits": "bcewithlogits"}
_SIGNED = (nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MarginRankingLoss, nn.CosineEmbeddingLoss)
"""Losses of targets 1 and -1, which the targets of binary and multilabel, 1 and 0, are turned into."""
_REDUCTIONS = ("size_average", "reduce", "reduction")
_DEFAULTS: dict[Task, str] = {
    "classification": "cross_entropy",
    "language_modeling": "cross_entropy",
    "seq2seq": "cross_entropy",
    "binary": "bce_with_logits",
    "multilabel": "bce_with_logits",
    "regression": "mse",
}


# --------------------------------------------------------------------------------------------------------------------
# The interface


class Loss(ABC):
    """A loss as a sum and a count."""

    name: str
    """As in the recipe."""
    count_is_fixed: bool = True
    """Whether `fixed_count` knows the count from the number of samples; otherwise counts must be summed over ranks."""
    ignore_index: int = _NEVER
    """Integer targets of this value are not counted."""
    is_token_entropy: bool = False
    """Whether the mean is the plain cross entropy, whose exponential is the perplexity."""
    takes_probabilities: bool = False
    """Whether outputs are probabilities, as of a model that ends in a sigmoid, and not logits."""
    takes_several: bool = False
    """Whether it takes all that a model returns, where that is a tuple of tensors, or only the first."""

    def taken(self, output: ModelOutput) -> Outputs:
        """Return what of a model's output this loss takes."""
        return (output.logits, *output.others) if self.takes_several and output.others else output.logits

    @abstractmethod
    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses (0-d, fp32, or fp64 for fp64 outputs) and the count they are over (0-d fp64).

        Rows where `keep` (batch,) bool is False count as if they were not there. Sums are over fp32 or fp64 values even
        where outputs are bf16. Raises UserError where outputs do not fit the targets; nothing is broadcast.
        """

    @abstractmethod
    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the count of `sum_and_count` from the targets alone (0-d fp64)."""

    def fixed_count(self, samples: int, targets: Tensor) -> int:
        """Return the count of `samples` samples whose targets have the shape of those of the batch `targets`."""
        assert self.count_is_fixed, f"the count of {self.name} depends on the targets"
        return samples * self._per_sample(targets)

    def _per_sample(self, targets: Tensor) -> int:
        return 1

    def _number(self, targets: Tensor, keep: Tensor | None) -> Tensor:
        per_sample = self._per_sample(targets)
        if keep is None:
            return torch.full((), len(targets) * per_sample, dtype=torch.float64, device=targets.device)
        return keep.sum(dtype=torch.float64) * per_sample


class _TorchLoss(Loss):
    """What losses of torch.nn share: the module, on the outputs' device and in their precision."""

    def __init__(self, name: str, build: Callable[..., nn.Module]):
        self.name = name
        self._modules = {reduction: build(reduction=reduction) for reduction in ("sum", "none")}
        self._place = (torch.device("cpu"), torch.float32)

    def _module(self, keep: Tensor | None, like: Tensor) -> nn.Module:
        if self._place != (like.device, like.dtype):
            self._place = (like.device, like.dtype)
            for module in self._modules.values():
                module.to(*self._place)
        return self._modules["sum" if keep is None else "none"]


# --------------------------------------------------------------------------------------------------------------------
# Losses of torch.nn


class _ClassLoss(_TorchLoss):
    """CrossEntropyLoss and NLLLoss: of class numbers, or of a probability for each class.

    Outputs are (batch, ..., classes) with targets (batch, ...), read as one row for each target without moving
    anything, or torch's own (batch, classes, ...); see `class_dim`.
    """

    def __init__(self, name: str, build: Callable[..., nn.Module], task: Task, args: Mapping[str, Any]):
        tokens = task in ("language_modeling", "seq2seq")
        self.ignore_index = args.get("ignore_index", NO_TARGET if tokens else _NEVER)
        super().__init__(name, partial(build, ignore_index=self.ignore_index))
        self._task = task
        self._weight = cast("Tensor | None", args.get("weight"))
        self.count_is_fixed = self.ignore_index == _NEVER and self._weight is None
        self.is_token_entropy = (
            self._weight is None
            and not args.get("label_smoothing")
            and isinstance(self._modules["sum"], nn.CrossEntropyLoss)
        )

    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = _wide(_single(outputs, self.name))
        dim = class_dim(logits, targets, self._task)
        count = self.count(targets, keep)
        soft = targets.is_floating_point() and targets.shape == logits.shape
        targets = targets.to(logits.dtype) if soft else self._numbers(targets, keep)
        if dim == logits.dim() - 1 > 1:
            logits = logits.flatten(0, -2)
            targets = targets.flatten(0, -2) if soft else targets.flatten()
            keep = _per_row(keep, targets) if soft else None
        try:
            if soft and keep is not None:
                losses = self._module(keep, logits)(logits, targets)
                return _kept_sum(losses, keep), count
            return self._module(None, logits)(logits, targets), count
        except IndexError as error:
            raise UserError(
                f"loss: a target is not one of the classes 0 to {outputs_classes(logits, dim) - 1} that the model has "
                f"outputs for ({error}); give the model more classes, or mark what is not to be predicted with "
                "loss.ignore_index"
            ) from error

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        if self.count_is_fixed or _is_soft(targets):
            return self._number(targets, keep)
        targets = self._numbers(targets, keep)
        counted = targets != self.ignore_index
        if self._weight is None:
            return counted.sum(dtype=torch.float64)
        if self._weight.device != targets.device:
            self._weight = self._weight.to(targets.device)
        return (self._weight.double()[targets.where(counted, 0)] * counted).sum()

    def _numbers(self, targets: Tensor, keep: Tensor | None) -> Tensor:
        targets = _class_numbers(targets, self._task)
        return targets if keep is None else targets.where(_along(keep, targets), self.ignore_index)

    def _per_sample(self, targets: Tensor) -> int:
        per_sample = targets.shape[1:].numel()
        if not _is_soft(targets):
            return per_sample
        # A probability for each class: one target for each place that is not along the classes.
        return per_sample // targets.shape[_soft_class_dim(targets.dim(), self._task)]


def class_dim(outputs: Tensor, targets: Tensor, task: Task) -> int:
    """Return the dimension of `outputs` that runs over classes; raises UserError where outputs do not fit targets.

    The last for (batch, ..., classes), 1 for torch's (batch, classes, ...). Where a shape can be read both ways, tokens
    (language_modeling, seq2seq) take the last and everything else torch's.
    """
    last = outputs.dim() - 1
    if outputs.dim() >= 2:
        if targets.is_floating_point() and targets.shape == outputs.shape:
            return _soft_class_dim(outputs.dim(), task)
        fits_last = outputs.shape[:-1] == targets.shape
        fits_second = outputs.shape[:1] + outputs.shape[2:] == targets.shape
        if fits_last and (not fits_second or _tokens(task)):
            return last
        if fits_second and not _tokens(task):
            return 1
    raise UserError(
        f"loss: outputs of shape {tuple(outputs.shape)} do not fit targets of shape {tuple(targets.shape)}; expected "
        f"outputs {(*targets.shape, 'classes')}".replace("'", "")
    )


def outputs_classes(outputs: Tensor, dim: int) -> int:
    """Return how many classes `outputs` has, flattened or not."""
    return outputs.shape[min(dim, outputs.dim() - 1)]


def _tokens(task: Task) -> bool:
    return task in ("language_modeling", "seq2seq")


def _soft_class_dim(dims: int, task: Task) -> int:
    return dims - 1 if _tokens(task) else 1


def _is_soft(targets: Tensor) -> bool:
    return targets.is_floating_point() and targets.dim() > 1


def _class_numbers(targets: Tensor, task: Task) -> Tensor:
    # Binary targets are floats, and class numbers all the same where the model has two outputs.
    if targets.is_floating_point() and not (task == "binary" and targets.dim() == 1):
        raise UserError(
            f"loss: targets are {targets.dtype} of shape {tuple(targets.shape)}; expected the numbers of classes "
            "(int64), or a probability for each class in the shape of the outputs"
        )
    return targets.long()


_OF_PROBABILITIES = (nn.BCELoss, nn.BCEWithLogitsLoss)


class _ElementLoss(_TorchLoss):
    """Losses whose mean is over elements or over rows."""

    def __init__(self, name: str, build: Callable[..., nn.Module], rule: _Rule, per_row: bool, task: Task):
        super().__init__(name, build)
        self._rule = rule
        self.takes_several = rule.outputs > 1
        self._per_row = per_row
        self._kind = type(self._modules["sum"])
        self._signed = self._kind in _SIGNED and task in ("binary", "multilabel")
        self.takes_probabilities = self._kind is nn.BCELoss

    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = [_wide(output) for output in _several(outputs, self._rule.outputs, self.name)]
        count = self._number(targets, keep)
        if not self._rule.class_targets:
            targets = targets.to(inputs[0].dtype)
        if (
            self._kind in _OF_PROBABILITIES
            and targets.device.type == "cpu"
            and bool(((targets < 0) | (targets > 1)).any())
        ):
            # not on a GPU, where looking would make every step wait for the device
            raise UserError(
                f"loss: {self.name} takes targets from 0 to 1, and these are from {targets.min():g} to "
                f"{targets.max():g}; encode the two classes as 0 and 1"
            )
        if self._signed:
            targets = (targets > 0.5).to(inputs[0].dtype) * 2 - 1
        module = self._module(keep, inputs[0])
        if self._kind is nn.TripletMarginLoss:
            losses = module(*_equal_shapes(inputs, self.name))
        elif self._kind is nn.CosineEmbeddingLoss:
            losses = module(*_equal_shapes(inputs, self.name), _of_rows(targets, inputs[0], self.name))
        elif self._kind is nn.MultiMarginLoss:
            losses = module(inputs[0], _of_rows(targets, inputs[0], self.name))
        elif self._kind is nn.GaussianNLLLoss:
            mean, variance = (fitted(each, targets, self.name) for each in inputs)
            losses = module(mean, targets, variance)
        else:
            losses = module(*(fitted(each, targets, self.name) for each in inputs), targets)
        return (losses if keep is None else _kept_sum(losses, keep)), count

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._number(targets, keep)

    def _per_sample(self, targets: Tensor) -> int:
        return 1 if self._per_row else targets.shape[1:].numel()


class _CtcLoss(_TorchLoss):
    """CTCLoss: the mean over samples of the loss divided by the length of the target.

    Outputs are (batch, time, classes), logits or log-probabilities, or a pair of them and the lengths (batch,) of each
    in time. Targets are (batch, length) int64, filled up with -100.
    """

    takes_several = True

    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, *rest = [outputs] if isinstance(outputs, Tensor) else outputs
        if len(rest) > 1 or logits.dim() != 3 or targets.dim() != 2 or len(logits) != len(targets):
            raise UserError(
                f"loss: {self.name} takes outputs (batch, time, classes), or a pair of them and their lengths "
                f"(batch,), and targets (batch, length); found {_shapes(outputs)} and {tuple(targets.shape)}"
            )
        real = targets != NO_TARGET
        lengths = real.sum(1)
        times = rest[0] if rest else torch.full_like(lengths, logits.shape[1])
        rows = torch.ones_like(lengths, dtype=torch.bool) if keep is None else keep
        # Taking log-probabilities once more changes nothing.
        log_probabilities = _wide(logits).log_softmax(-1).transpose(0, 1)
        losses = self._module(rows, log_probabilities)(log_probabilities, targets.where(real, 0), times.long(), lengths)
        return _kept_sum(losses / lengths.clamp(min=1), rows), self._number(targets, keep)

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._number(targets, keep)


# --------------------------------------------------------------------------------------------------------------------
# The user's own


class _OwnLoss(Loss):
    """A function `(outputs, targets)`, or an object that is called so.

    It returns a loss for each sample or for each element (a sample's loss is then the mean of its own), or the mean
    over the batch; either is averaged over samples. Or it returns (sum, count), and has an attribute `count`, a
    function of the targets that returns the same count.
    """

    takes_several = True

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self._function = function
        self._count = getattr(function.func if isinstance(function, partial) else function, "count", None)
        self.count_is_fixed = self._count is None

    def sum_and_count(self, outputs: Outputs, targets: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if keep is not None:
            # The function may mix rows, so those that are padding must not reach it.
            outputs = outputs[keep] if isinstance(outputs, Tensor) else tuple(each[keep] for each in outputs)
            targets = targets[keep]
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        count = self.count(targets)
        if not len(targets):
            return first.sum() * 0, count
        if isinstance(self._function, nn.Module):
            self._function.to(first.device)
        result = self._function(outputs, targets)
        if isinstance(result, tuple):
            if self._count is None:
                raise UserError(
                    f"loss: {self.name} returned (sum, count), so it needs a function of the targets that returns the "
                    "same count: give it an attribute `count`, as in `my_loss.count = lambda targets: ...`"
                )
            return _wide(result[0]), count
        if not isinstance(result, Tensor) or (result.dim() and len(result) != len(targets)) or self._count is not None:
            found = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            expected = "(sum, count), as it has a `count`" if self._count else "a tensor () or (batch, ...)"
            raise UserError(f"loss: {self.name} returned {found}; expected {expected}")
        return _wide(result).mean() * len(targets), count

    def count(self, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        if self._count is None:
            return self._number(targets, keep)
        return torch.as_tensor(
            self._count(targets if keep is None else targets[keep]), dtype=torch.float64, device=targets.device
        )


# --------------------------------------------------------------------------------------------------------------------
# Shapes


def fitted(outputs: Tensor, targets: Tensor, what: str) -> Tensor:
    """Return outputs in the shape of the targets: as they are, or (..., 1) without its last dimension. Or UserError.

    Anything else would be broadcast: (n, 1) against (n,) is n * n differences.
    """
    if outputs.shape == targets.shape:
        return outputs
    if outputs.shape == (*targets.shape, 1):
        return outputs.squeeze(-1)
    raise UserError(
        f"{what} compares outputs and targets one by one, and outputs have shape {tuple(outputs.shape)}, targets "
        f"{tuple(targets.shape)}; make the model's last layer fit, or take a loss or metric for such outputs"
    )


def _single(outputs: Outputs, name: str) -> Tensor:
    return _several(outputs, 1, name)[0]


def _several(outputs: Outputs, expected: int, name: str) -> Sequence[Tensor]:
    found = [outputs] if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, (list, tuple)) or len(found) != expected:
        tensors = "one tensor" if expected == 1 else f"{expected} tensors"
        raise UserError(f"loss: {name} takes {tensors} from the model, which returned {_shapes(outputs)}")
    return found


def _shapes(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"{tuple(outputs.shape)}"
    if isinstance(outputs, (list, tuple)):
        return f"{len(outputs)}: {', '.join(_shapes(each) for each in outputs)}"
    return type(outputs).__name__


def _equal_shapes(inputs: Sequence[Tensor], name: str) -> Sequence[Tensor]:
    if any(each.shape != inputs[0].shape for each in inputs):
        raise UserError(f"loss: {name} compares outputs of one shape; the model returned {_shapes(inputs)}")
    return inputs


def _of_rows(targets: Tensor, outputs: Tensor, name: str) -> Tensor:
    if targets.shape != outputs.shape[:1]:
        raise UserError(
            f"loss: {name} takes one target for each row, and targets have shape {tuple(targets.shape)}, outputs "
            f"{tuple(outputs.shape)}"
        )
    return targets


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _along(keep: Tensor, like: Tensor) -> Tensor:
    return keep.view(-1, *[1] * (like.dim() - 1))


def _per_row(keep: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if keep is None else keep.repeat_interleave(len(rows) // len(keep), output_size=len(rows))


def _kept_sum(losses: Tensor, keep: Tensor) -> Tensor:
    # Not a product: what a padding row has may be infinite.
    return losses.where(_along(keep, losses), 0.0).sum()


# --------------------------------------------------------------------------------------------------------------------
# Building


def loss_names() -> dict[str, str]:
    """Return the losses of torch.nn by snake-case name, each with one line."""
    return {snake(name.removesuffix("Loss")): rule.summary for name, rule in sorted(_RULES.items())}


def check_loss(recipe: Recipe) -> list[str]:
    """Return one line for each problem of the recipe's loss that can be found without data."""
    try:
        build_loss(recipe, DataMeta())
    except UserError as error:
        return str(error).split("\n")
    return []


def build_loss(recipe: Recipe, meta: DataMeta) -> Loss:
    """Return the recipe's loss, or the task's usual one. Raises UserError with every problem of its arguments."""
    name = recipe.loss.name if recipe.loss else _DEFAULTS[recipe.task]
    args = recipe.loss.args if recipe.loss else {}
    if is_object_spec(name):
        return _own_loss(name, args)
    class_name = _class_name(name)
    build: type[nn.Module] = getattr(nn, class_name)
    rule = _RULES[class_name]
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
        if args.get(key) is not None:
            try:
                args[key] = _weights(key, args[key], None if rule.over == "elements" else _classes(recipe.task, meta))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    try:
        if class_name == "CTCLoss":
            return _CtcLoss(name, partial(build, **args))
        if rule.over == "classes":
            loss: Loss = _ClassLoss(name, partial(build, **_without(args, "ignore_index")), recipe.task, args)
        else:
            loss = _ElementLoss(name, partial(build, **args), rule, per_row, recipe.task)
        _try(loss, class_name, rule, recipe.task, args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"loss: {name!r} refuses its arguments: {error}") from error
    return loss


def _try(loss: Loss, class_name: str, rule: _Rule, task: Task, args: Mapping[str, Any]) -> None:
    """Compute the loss of one made-up sample: torch looks at most arguments only then."""
    width = max([len(value) for value in args.values() if isinstance(value, Tensor)], default=2)
    shape = (1, 1, width) if _tokens(task) and rule.over == "classes" else (1, width)
    outputs = [torch.full(shape, 0.5)] * rule.outputs
    if class_name == "MultiLabelMarginLoss":
        targets = torch.full(shape, -1)
    elif rule.over == "elements" or class_name == "MultiLabelSoftMarginLoss":
        targets = torch.full(shape, 0.5)
    else:
        targets = torch.zeros(shape[:-1], dtype=torch.long)
    loss.sum_and_count(outputs, targets)


def _class_name(name: str) -> str:
    known = {squeezed(key).removesuffix("loss"): key for key in (*_RULES, *_REFUSED)}
    wanted = squeezed(name).removesuffix("loss")
    found = known.get(_ALIASES.get(wanted, wanted))
    if found is None:
        names = loss_names()
        raise UserError(
            f"loss.name: torch.nn has no loss {name!r}"
            + (close_names(name, names) or f"; there are {', '.join(names)}; your own is 'path/to/file.py:name'")
        )
    if found in _REFUSED:
        raise UserError(f"loss.name: {found} {_REFUSED[found]}")
    return found


def _own_loss(name: str, args: Mapping[str, Any]) -> Loss:
    found = resolve_object(name)
    if not callable(found):
        raise UserError(f"loss.name: {name!r} is {found!r}; expected a function (outputs, targets), or a class of such")
    is_class = inspect.isclass(found)
    first_two = () if is_class else tuple(list(inspect.signature(found).parameters)[:2])
    if problems := argument_problems(found, args, "loss", repr(name), given=first_two):
        raise UserError("\n".join(problems))
    if not is_class:
        return _OwnLoss(name, partial(found, **args) if args else found)
    try:
        made = found(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss: {name!r} refuses its arguments: {error}") from error
    if not callable(made):
        raise UserError(f"loss.name: objects of {name!r} cannot be called with (outputs, targets)")
    return _OwnLoss(name, made)


def _weights(key: str, value: Any, expected: int | None) -> Tensor:
    numbers = [value] if isinstance(value, (int, float)) else value
    if not isinstance(numbers, list) or not all(isinstance(each, (int, float)) and each >= 0 for each in numbers):
        raise UserError(f"loss.{key}: {value!r} should be a list of numbers, zero or more, one for each class")
    if expected is not None and len(numbers) != expected:
        raise UserError(f"loss.{key}: {len(numbers)} numbers for {expected} classes; give one for each")
    return torch.tensor(numbers, dtype=torch.float32)


def _classes(task: Task, meta: DataMeta) -> int | None:
    if task == "multilabel":
        return meta.num_targets
    return {"language_modeling": meta.vocab_size, "seq2seq": meta.target_vocab_size}.get(task, meta.num_classes)


def _without(args: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name != key}
