"""Reports of indices out of range, and of operations without a deterministic form.

On a CPU the operation raises. On a GPU its kernel asserts: the error comes with some later call, and nothing can be
computed or read on that device any more, nor freed without ending the process by SIGABRT. So what went into the last
steps is kept on the host, integers alone, and is looked through when such an error comes; until then it costs nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.datasets.base import Batch
from distrain.networks.calling import unwrap_model
from distrain.optim import Loss, canonical_name
from distrain.parallel.determinism import refused_operation
from distrain.system.errors import some

_ON_DEVICE = ("device-side assert", "an illegal memory access", "an illegal instruction", "misaligned address")
"""What CUDA reports of kernels that have failed; the device is of no use to this process then."""
_OUT_OF_RANGE = ("out of range", "out of bounds", "Target ", "device-side assert")
_INTEGERS = (torch.int64, torch.int32, torch.int16)
_SHOWN = 5  # samples in a message


class DeviceLost(UserError):
    """A kernel failed, and this process can use its device no more: it can only report, and end."""


class _Given(NamedTuple):
    """What went into the model, on the host."""

    where: str
    batches: Sequence[Batch]


_given: deque[_Given] = deque(maxlen=2)
"""Of the step that is under way and the one before, whose error may come only now."""


def given(where: str, batches: Sequence[Batch]) -> None:
    """Note what goes into the model now: in which step or evaluation, and the batches as they came to the host."""
    _given.append(_Given(where, [_integers(batch) for batch in batches]))


def _integers(batch: Batch) -> Batch:
    inputs = batch.get("inputs")
    named = {**inputs} if isinstance(inputs, dict) else {"inputs": inputs}
    named["targets"], named["ids"] = batch.get("targets"), batch.get("ids")
    return {key: value for key, value in named.items() if isinstance(value, Tensor) and value.dtype in _INTEGERS}


# --------------------------------------------------------------------------------------------------------------------
# When it has happened


@contextmanager
def explaining_errors(
    parts: Callable[[], tuple[nn.Module | None, Loss | None]], lost: Callable[[UserError], None] | None = None
) -> Iterator[None]:
    """Raise UserError in place of errors about an index in the data, or an operation without a deterministic form.

    `parts` returns the model and the loss, None before they are there. Where a device is lost, `lost` is called, and
    the process ends at once with exit status 1; without `lost` DeviceLost is raised.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "of_another_rank", False):
            raise
        if (operation := refused_operation(error)) is not None:
            raise UserError(
                f"{operation} has no deterministic form in PyTorch {torch.__version__}, and train.deterministic asks "
                "for such alone. Take another operation in its place, or train.deterministic: false; what is trained "
                "may then differ in its last bits from start to start"
            ) from error
        text = str(error)
        is_lost = any(words in text for words in _ON_DEVICE)
        found = out_of_range(error, *parts()) if is_lost or _about_an_index(error) else None
        if is_lost:
            failure = DeviceLost(found or _unknown(text))
            failure.__cause__ = error
            _end(failure, lost)
        if found is None:
            raise
        raise UserError(found) from error


def _about_an_index(error: BaseException) -> bool:
    if isinstance(error, UserError):  # of a loss, which knows no samples
        return isinstance(error.__cause__, IndexError)
    return isinstance(error, IndexError | RuntimeError) and any(words in str(error) for words in _OUT_OF_RANGE)


def _unknown(text: str) -> str:
    line = next((line for line in text.splitlines() if any(words in line for words in _ON_DEVICE)), text[:200])
    ids = [each for given in _given for batch in given.batches for each in batch["ids"].tolist()]
    where = " or ".join(given.where for given in _given) or "before the first step"
    samples = f", with the samples {some(ids, 2 * _SHOWN)}" if ids else ""
    return (
        f"a kernel failed on the GPU in {where}{samples}: {line.strip()}. No target and no token of them is out of "
        "range; the usual reason is an index (of an embedding, gather, scatter or indexing) that the model computes. "
        "On a CPU (CUDA_VISIBLE_DEVICES= distrain train ...) the same step names the line"
    )


def _end(failure: DeviceLost, lost: Callable[[UserError], None] | None) -> NoReturn:
    if lost is None:
        raise failure
    # no frame is left before this: what lies in them would be freed on a device that is lost
    try:
        lost(failure)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)


# --------------------------------------------------------------------------------------------------------------------
# What it was


def out_of_range(error: BaseException, model: nn.Module | None, loss: Loss | None) -> str | None:
    """Return what of the batches given last does not fit the model, as text; None where all does."""
    rows, name, taken = _table(error, model)
    for given in reversed(_given):
        # targets first: those of the data are known for what they are
        if loss is not None and loss.classes is not None:
            said = _said(given, ["targets"], loss.classes, loss.ignore_index)
            if said is not None:
                return (
                    f"{given.where}: the targets hold {said}, and the model has outputs for the classes 0 to "
                    f"{loss.classes - 1}; correct the data, give the model more classes, or mark what is not to be "
                    "predicted with loss.ignore_index"
                )
        if rows is not None:
            keys = sorted({key for batch in given.batches for key in batch} - {"targets", "ids"})
            if taken is not None and (same := _keys_of(taken, given)):
                keys = same
            for key in keys:
                if (said := _said(given, [key], rows, None)) is not None:
                    what = "inputs" if key == "inputs" else f"inputs {key!r}"
                    return (
                        f"{given.where}: the {what} hold {said}, and the embedding {name} has rows for 0 to "
                        f"{rows - 1}; correct the data, or give the model a larger vocabulary"
                    )
    return None


def _table(error: BaseException | None, model: nn.Module | None) -> tuple[int | None, str, Tensor | None]:
    """Return the rows of the embedding that an error came through, its name, and what it was given.

    Where no frame shows one, as on a GPU, that is the largest: what does not fit there fits nowhere.
    """
    modules = dict(unwrap_model(model).named_modules()) if model is not None else {}
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module, taken = frame.f_locals.get("self"), frame.f_locals.get("input")
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and taken is not None:  # its `forward`
                names = [canonical_name(name) for name, each in modules.items() if each is module]
                return module.num_embeddings, repr(names[0]) if names else "", taken
        error = error.__cause__
    tables = [
        (each.num_embeddings, repr(canonical_name(name)))
        for name, each in modules.items()
        if isinstance(each, nn.Embedding | nn.EmbeddingBag)
    ]
    return (*max(tables), None) if tables else (None, "", None)


def _keys_of(taken: Any, given: _Given) -> list[str]:
    """Return the keys of the batches whose tensors lie where `taken` does, on a CPU."""
    if not isinstance(taken, Tensor) or taken.device.type != "cpu":
        return []
    place = taken.untyped_storage().data_ptr()
    found = {
        key for batch in given.batches for key, value in batch.items() if value.untyped_storage().data_ptr() == place
    }
    return sorted(found - {"ids", "targets"})


def _said(given: _Given, keys: Sequence[str], rows: int, ignored: int | None) -> str | None:
    """Return "12, in sample 7", for the first value that is not in range(rows), and how many more there are."""
    found: list[tuple[int, int]] = []  # sample, value
    for batch in given.batches:
        for key in keys:
            if (values := batch.get(key)) is None or not values.numel():
                continue
            values = values.reshape(len(values), -1)
            wrong = (values < 0) | (values >= rows)
            if ignored is not None:
                wrong &= values != ignored
            ids = batch["ids"].tolist()
            # a row that fills up a batch has no id
            found += [(ids[row], int(values[row, at])) for row, at in wrong.nonzero().tolist() if ids[row] >= 0]
    if not found:
        return None
    sample, value = found[0]
    more = ""
    if len(found) > 1:
        others = [*dict.fromkeys(each for each, _ in found if each != sample)]
        shown = ", ".join(map(str, others[:_SHOWN])) + ", ..." * (len(others) > _SHOWN)
        low, high = min(each for _, each in found), max(each for _, each in found)
        more = f" ({len(found) - 1} more such, from {low} to {high}" + f", also in {shown}" * bool(others) + ")"
    return f"{value}, in sample {sample}{more}"
