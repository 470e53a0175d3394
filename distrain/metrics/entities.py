"""Metrics of entities, which tags mark: one is right where its type, its first and its last token are.

They are those of seqeval in its default mode (Nakayama, "seqeval", 2018; after conlleval of CoNLL-2000): an I- that
continues nothing begins an entity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from distrain.config import UserError
from distrain.config.registry import metrics
from distrain.datasets.tags import mark_entities, parted
from distrain.metrics.catalogue import Metric, per_class
from distrain.metrics.parts import Part, Seen, Setting, Value, tally

_O, _B, _I, _E, _S = range(5)
_BEGINS = {(_E, _E), (_E, _I), (_S, _E), (_S, _I)}
"""(tag before, tag): such a tag begins an entity, as do all B and S, and all of another type (or none) than before."""
_ENDS = {(_B, _B), (_B, _S), (_I, _B), (_I, _S)}
"""(tag, tag after): such a tag ends its entity, as do all E and S, and all of another type (or none) than after."""


@dataclass(frozen=True)
class EntityCounts(Part):
    """(3 * types): for each type, how many entities are found rightly, are found, and are there."""

    classes: tuple[str, ...]

    @property
    def types(self) -> list[str]:
        """The types of entities, sorted."""
        return sorted({kind for prefix, kind in map(_parted, self.classes) if prefix != "O"})

    def batch(self, seen: Seen) -> Tensor:
        if seen.classes < len(self.classes) or seen.targets.dim() != 2:
            raise UserError(
                f"eval.metrics: entities are counted in targets (batch, seq) of {len(self.classes)} classes; found "
                f"{tuple(seen.targets.shape)} and {seen.classes} classes of the model"
            )
        shape, size = seen.targets.shape, len(self.types)
        mask = seen.mask.reshape(shape)
        there, found = (_Entities(each.reshape(shape), mask, self.classes) for each in (seen.labels, seen.predicted))
        same = there.begins & found.begins & (there.kinds == found.kinds) & (there.ends == found.ends)
        counted = [
            (entities.kinds + number * size).where(which, 3 * size)
            for number, (entities, which) in enumerate(((there, same), (found, found.begins), (there, there.begins)))
        ]
        return tally(torch.cat([each.flatten() for each in counted]), 3 * size)


class _Entities:
    """The entities of tags (batch, seq)."""

    def __init__(self, tags: Tensor, mask: Tensor, classes: tuple[str, ...]):
        prefix_of, kind_of, begins, ends = _tables(classes, tags.device)
        seq = tags.shape[1]
        places = torch.arange(seq, device=tags.device)
        tags = tags.where(mask, 0).clamp(0, len(classes))  # an output that is no class is outside
        prefix, kind = prefix_of[tags], kind_of[tags]
        # what comes before and after among the tokens that count, of which pieces of words are none
        counted = places.where(mask, -1)
        before = torch.nn.functional.pad(counted.cummax(1).values[:, :-1], (1, 0), value=-1)
        after = torch.nn.functional.pad(
            places.where(mask, seq).flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=seq
        )
        prefix_before, kind_before = _at(prefix, before, _O), _at(kind, before, -1)
        prefix_after, kind_after = _at(prefix, after, _O), _at(kind, after, -1)
        inside = mask & (prefix != _O)
        self.kinds = kind
        self.begins = inside & (begins[prefix_before, prefix] | (kind != kind_before))
        last = inside & (ends[prefix, prefix_after] | (kind != kind_after))
        self.ends = places.where(last, seq).flip(1).cummin(1).values.flip(1)
        """(batch, seq): where the entity that holds or follows a token ends."""


def _at(values: Tensor, places: Tensor, otherwise: int) -> Tensor:
    """Return the values (batch, seq) at places of the same row, or something else where there is no such place."""
    within = (places >= 0) & (places < values.shape[1])
    return values.gather(1, places.clamp(0, values.shape[1] - 1)).where(within, otherwise)


@lru_cache(maxsize=8)
def _tables(classes: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return prefix and type of each class (and of what is none), and which pairs of prefixes begin and end.

    Kept, because copying from the host at every batch would wait for the device.
    """
    both = [*map(_parted, classes), ("O", "")]
    kinds = sorted({kind for prefix, kind in both if prefix != "O"})
    prefixes = torch.tensor(["OBIES".index(prefix) for prefix, _ in both])
    numbers = torch.tensor([-1 if prefix == "O" else kinds.index(kind) for prefix, kind in both])
    begins, ends = torch.zeros(2, 5, 5, dtype=torch.bool)
    begins[:, [_B, _S]] = True
    ends[[_E, _S]] = True
    for pairs, table in ((_BEGINS, begins), (_ENDS, ends)):
        table[tuple(zip(*pairs, strict=True))] = True
    return prefixes.to(device), numbers.to(device), begins.to(device), ends.to(device)


def _parted(tag: str) -> tuple[str, str]:
    found = parted(tag)
    assert found is not None, "the metric has checked them"
    return found


def _part(setting: Setting, name: str) -> EntityCounts:
    names = setting.meta.class_names if setting.meta is not None else ("O", "B")
    if names is None or not mark_entities(names):
        shown = "no names" if names is None else ", ".join(names[:8])
        raise UserError(
            f"eval.metrics: {name} counts entities, whose tags are O, B-TYPE, I-TYPE, E-TYPE and S-TYPE, and classes "
            f"have {shown}; use token_accuracy and f1_macro"
        )
    return EntityCounts(tuple(names))


def _share(kind: str, average: str, types: list[str], sums: np.ndarray) -> Value | dict[str, Value]:
    counts = sums.reshape(3, -1)
    if average == "micro":
        return float(per_class(kind, counts.sum(1, keepdims=True))[0])
    each = per_class(kind, counts)
    if average == "per_type":
        return dict(zip(types, each.tolist(), strict=True))
    occurring = (counts[1] + counts[2]) > 0
    return float(each[occurring].mean()) if occurring.any() else math.nan


def _none(sums: np.ndarray) -> str | None:
    return None if sums.reshape(3, -1)[2].any() else "there is no entity in it"


def _entity_score(setting: Setting, kind: str, average: str, name: str) -> Metric:
    part = _part(setting, name)
    finish = partial(_share, kind, average, part.types)
    return Metric(finish, True, (part,), scalar=average != "per_type", caveat=_none)


_SCORES = {
    "entity_precision": "Share of the entities found that are there: over all entities.",
    "entity_precision_macro": "Share of the entities found that are there: "
    "the mean over the types that occur or are found.",
    "entity_precision_per_type": "Share of the entities found that are there: for each type.",
    "entity_recall": "Share of the entities there that are found: over all entities.",
    "entity_recall_macro": "Share of the entities there that are found: "
    "the mean over the types that occur or are found.",
    "entity_recall_per_type": "Share of the entities there that are found: for each type.",
    "entity_f1": "Harmonic mean of precision and recall of entities: over all entities.",
    "entity_f1_macro": "Harmonic mean of precision and recall of entities: "
    "the mean over the types that occur or are found.",
    "entity_f1_per_type": "Harmonic mean of precision and recall of entities: for each type.",
}
for _name, _about in _SCORES.items():
    _, _kind, *_average = _name.split("_", 2)
    _build = partial(_entity_score, kind=_kind, average=_average[0] if _average else "micro", name=_name)
    metrics.register(_name, tasks=("token_classification",), about=_about)(_build)
