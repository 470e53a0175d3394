"""Items of the user's data sets as batches: what an item may be, its tensors, and the padding of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from distrain.config import Form, UserError
from distrain.datasets.arrays import for_torch
from distrain.datasets.base import Batch, DataMeta, DataRequest
from distrain.datasets.labels import IGNORED, NUMBERED, Labels
from distrain.datasets.nested import graph_batch, is_graph, map_tensors, tensors_in
from distrain.system.compiler import without_compiler
from distrain.system.numbers import a_kind

ITEM = "(inputs, targets), a dict with 'inputs' and 'targets', or several inputs with the targets last"
_TOKEN_KEYS = ("ids", "input_ids", "decoder_input_ids", "tokens", "source", "target")
_PLACE_KEYS = ("token_type_ids", "segment_ids", "position_ids", "decoder_position_ids")
"""Keys that describe tokens: the value at a padded token is ignored, so 0 is safe."""


def pair_of(item: Any, name: str) -> tuple[Any, Any]:
    """Return (inputs, targets or None) of an item; `name` identifies it in the error."""
    if isinstance(item, Mapping) and "inputs" in item and set(item) <= {"inputs", "targets"}:
        return item["inputs"], item.get("targets")
    if is_graph(item):
        targets = getattr(item, "y", None)  # one row for the graph, which a batch has for each
        return item, targets[0] if isinstance(targets, torch.Tensor) and targets.shape[:1] == (1,) else targets
    if isinstance(item, tuple | list) and item:
        if len(item) > 2:  # as arrays: a tuple of numbers would be a vector
            return tuple(np.asarray(each) if isinstance(each, int | float) else each for each in item[:-1]), item[-1]
        return item[0], item[1] if len(item) == 2 else None
    found = f"a dict of {', '.join(map(str, item))}" if isinstance(item, Mapping) else a_kind(item)
    raise UserError(f"{name} is {found}, expected {ITEM}")


@dataclass(frozen=True)
class ItemForm:
    """How the items of a split become batches."""

    name: str
    """The data set's, for errors."""
    task: Form
    pad_id: int | None
    padding: Mapping[str, float]
    dtype: torch.dtype
    labels: Labels
    own: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples as they are; None: `collate` does."""

    @classmethod
    def of(cls, request: DataRequest, meta: DataMeta, split: str, name: str) -> ItemForm:
        known = {
            "language_modeling": meta.vocab_size,
            "seq2seq": meta.target_vocab_size if meta.target_vocab_size is not None else meta.vocab_size,
        }.get(request.task, meta.num_classes)
        return cls(
            name,
            request.task,
            meta.pad_id,
            meta.padding or {},
            request.dtype,
            request.labels(split, known),
            request.collate,
        )

    def image(self, value: Any) -> torch.Tensor:
        """Return an input as a tensor, black-and-white images as bytes."""
        return self.tensor(value.convert("L") if isinstance(value, Image.Image) and value.mode == "1" else value)

    def tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, Image.Image):
            if value.mode.startswith("I;16"):  # astype converts to this machine's byte order
                return torch.from_numpy(np.asarray(value).astype(np.uint16))[None]
            with without_compiler():
                from torchvision.transforms.v2 import functional
            return functional.pil_to_tensor(value)
        try:
            tensor = torch.as_tensor(for_torch(value) if isinstance(value, np.ndarray) else value)
            if self.dtype == torch.float64 and tensor.dtype == torch.float32 and not hasattr(value, "dtype"):
                tensor = torch.as_tensor(value, dtype=self.dtype)  # Python's own numbers, which torch has rounded
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"{a_kind(value)} cannot become a tensor ({error}); expected numbers or arrays"
            of_text = ", of a label the number of its class" if isinstance(value, str) else ""
            raise UserError(f"{self.name}: {found}{of_text}") from error
        # float64 is NumPy's default and rarely intended; float32 weights cannot be multiplied with it
        return tensor.to(self.dtype) if tensor.dtype == torch.float64 else tensor

    def targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Return targets as int64 for classes and tokens, as floats otherwise."""
        if self.task in NUMBERED:
            if targets.is_floating_point():
                raise UserError(f"{self.name}: targets are {targets.dtype}; task {self.task} expects whole numbers")
            return targets.to(torch.int64)
        if self.task == "custom" and not targets.is_floating_point():
            return targets
        return targets.to(self.dtype)


def collate(samples: Sequence[tuple[Any, ...]], form: ItemForm, name: Callable[[int], str]) -> Batch:
    """Return samples as one batch, without `ids`; `name` describes the sample of a row in errors.

    Sequences (one or two dimensions, time first) of different lengths are padded at the end. Images of different sizes
    become a list, for a transform to resize.
    """
    if form.own is not None:
        return _of_own(form.own([sample[0] for sample in samples]), form)
    batch: Batch = {"inputs": _collated([sample[0] for sample in samples], "inputs", form, form.image)}
    if samples[0][1] is not None:
        batch["targets"] = _collated([sample[1] for sample in samples], "targets", form, form.tensor)
        if isinstance(batch["targets"], torch.Tensor):
            batch["targets"] = form.targets(batch["targets"])
            if found := form.labels.problem(batch["targets"]):
                raise UserError(f"{form.name}: {name(found[0])}: {found[1]}; correct or remove the item")
    return batch


def _of_own(found: Any, form: ItemForm) -> Batch:
    """Return what a task's own collate has made; raises UserError where it is no batch."""
    if isinstance(found, tuple) and len(found) == 2:
        return {"inputs": found[0], "targets": found[1]}
    if not isinstance(found, Mapping) or "inputs" not in found:
        what = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else a_kind(found)
        raise UserError(
            f"{form.name}: the task's collate returned {what}; expected a dict with 'inputs' and, where there are any, "
            "'targets'"
        )
    return {key: value for key, value in found.items() if key != "ids"}


def _collated(values: list[Any], key: str, form: ItemForm, tensor: Callable[[Any], torch.Tensor]) -> Any:
    """Return the values of one place in each sample as one, nested as they are; `key` is their innermost."""
    first = values[0]
    if isinstance(first, Mapping):
        if odd := next((each for each in values if not isinstance(each, Mapping) or set(each) != set(first)), None):
            found = ", ".join(map(str, odd)) if isinstance(odd, Mapping) else a_kind(odd)
            raise UserError(f"{form.name}: {key} of one batch are dicts of {', '.join(map(str, first))} and {found}")
        return {inner: _collated([each[inner] for each in values], str(inner), form, tensor) for inner in first}
    if isinstance(first, tuple) and not all(isinstance(each, int | float) for each in first):
        if any(not isinstance(each, tuple) or len(each) != len(first) for each in values):
            raise UserError(f"{form.name}: {key} of one batch are tuples of {len(first)} and of another length")
        return tuple(_collated(list(part), key, form, tensor) for part in zip(*values, strict=True))
    if is_graph(first):
        return graph_batch(values)
    tensors = [tensor(each) for each in values]
    ragged = key == "inputs" and tensors[0].ndim == 3 and len({each.shape for each in tensors}) > 1
    return tensors if ragged else _joined(tensors, key, form)


def _joined(tensors: list[torch.Tensor], key: str, form: ItemForm) -> torch.Tensor:
    """Stack tensors, after padding their first dimension to the longest."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    what = f"{form.name}: {key}" if key in ("inputs", "targets") else f"{form.name}: inputs {key!r}"
    if len({shape[1:] for shape in shapes}) > 1 or not all(len(shape) in (1, 2) for shape in shapes):
        raise UserError(
            f"{what} of one batch have the shapes {', '.join(map(str, sorted(shapes)))}; expected equal ones"
        )
    value = _padding(tensors, key, what, form)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _padding(tensors: list[torch.Tensor], key: str, what: str, form: ItemForm) -> float:
    """Return the padding value for sequences of different lengths.

    It is `meta.padding` of the key; otherwise `pad_id` for tokens (0, if no token is 0), 0 for masks, positions, types
    and floats, and the target that the loss ignores for targets. All else is refused: padding must never pass for data.
    """
    if key in form.padding:
        return form.padding[key]
    give = f"give it a padding of its own, as in meta = {{'padding': {{{key!r}: 0}}}}"
    if key == "targets":
        if form.labels.ignored is not None:
            return form.labels.ignored
        raise UserError(
            f"{what} of one batch have different lengths, and the loss has no ignore_index; give targets of one "
            f"length, set loss.ignore_index if the loss has one, or {give}"
        )
    first = tensors[0]
    if first.is_floating_point():
        if key.endswith("mask") and any(bool((each < 0).any()) for each in tensors):
            raise UserError(
                f"{what} have different lengths and values below 0, like an additive mask, where 0 keeps a token; "
                f"{give.replace(': 0', ': -10000')}"
            )
        return 0
    if key == "special_tokens_mask":
        return 1
    if (key.endswith("mask") and "padding" not in key) or key in _PLACE_KEYS:
        return 0
    if key.endswith("labels"):
        return IGNORED
    if key in ("inputs", *_TOKEN_KEYS) and first.dtype != torch.bool:
        if form.pad_id is not None:
            return form.pad_id
        if any(bool((each == 0).any()) for each in tensors):
            raise UserError(
                f"{what} of one batch have different lengths, and their values include 0, the padding; set a padding "
                "id in meta, as {'pad_id': 0}, that no token has"
            )
        return 0
    raise UserError(
        f"{what} of one batch have different lengths, and their padding is unknown ({first.dtype}); {give}, with a "
        "number that no item holds"
    )


# --------------------------------------------------------------------------------------------------------------------
# Items that share their memory


_ARRAYS = (torch.Tensor, np.ndarray)


FILLED_ANEW = 4
"""Items that are compared: data sets that fill memory anew for each item have one, or two or three in turns."""


def share_memory(items: Iterable[Any]) -> bool:
    """Whether any two items, all held, have an array in the same place: one that is filled anew for each item."""
    seen: set[int] = set()
    for item in items:
        places = {_place(each) for each in tensors_in(item, _ARRAYS)} - {0}
        if not seen.isdisjoint(places):
            return True
        seen |= places
    return False


def _place(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() if value.layout == torch.strided else 0
    return int(value.ctypes.data) if value.size else 0


def with_own_memory(item: Any) -> Any:
    """Return an item with copies of its tensors and arrays."""
    return map_tensors(lambda each: each.clone() if isinstance(each, torch.Tensor) else each.copy(), item, _ARRAYS)
