"""Preferences: two answers to the same prompt, of which one is the better."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Batch, Data, DataMeta, DataRequest
from distrain.datasets.chat import (
    ChatReader,
    Documents,
    Limits,
    TooLong,
    WithoutTargets,
    split_files,
    split_rows,
)
from distrain.datasets.conversations import preferences
from distrain.datasets.ragged import Encoded, Ragged, Row

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
_COLUMNS = {f"{side}_{what}": dtype for side in SIDES for what, dtype in (("tokens", "uint32"), ("spans", "int32"))}


def encode_preferences(
    request: DataRequest, tokenizer: str, template: str | None = None, cache: str | None = None, **_: Any
) -> None:
    """Encode what `preference` maps."""
    reader = ChatReader(request, tokenizer, template, cache)
    for file in split_files(request).values():
        _encoded(reader, file)


@datasets.register("preference", tasks=["custom"], encode_ahead=encode_preferences)
def preference(
    request: DataRequest,
    tokenizer: str,
    seq_len: int,
    template: str | None = None,
    too_long: TooLong = "truncate",
    without_targets: WithoutTargets = "error",
    cache: str | None = None,
) -> Data:
    """Pairs of answers, chosen and rejected, by a tokenizer and its chat template; for the task `dpo`.

    Files, splits, `tokenizer`, `template` and `cache` are as in `chat`. A record is {"prompt", "chosen", "rejected"},
    each a text or messages; chosen and rejected may begin with the prompt, which may then be missing. Targets are what
    the assistant says after the prompt, or after what both begin with. A pair is cut, dropped or an error as a
    conversation is, where one of its answers is too long or without targets.

    `inputs` is {"chosen", "rejected"}, each {"input_ids" int64, "attention_mask" bool} (batch, longest of that side),
    and `targets` is {"chosen", "rejected"}, each (batch, longest) int64: the next token, or -100.
    """
    limits = Limits(seq_len, too_long, without_targets)
    reader = ChatReader(request, tokenizer, template, cache)
    files = split_files(request)
    made = {name: _encoded(reader, file) for name, file in files.items()}
    for name, file in files.items():
        logger.info(f"{file}: {len(made[name].columns['chosen_tokens']):,} pairs of a chosen and a rejected answer")
    facts = made["train"].facts
    splits: dict[str, AnySource] = {}
    for name, (each, numbers) in split_rows(request, made).items():
        sides = {side: Documents.of(each, f"{side}_tokens", f"{side}_spans", numbers, limits) for side in SIDES}
        kept, warnings = limits.keep([*sides.values()], numbers, f"the split {name!r}", "pairs")
        splits[name] = PreferencePairs(sides, kept, facts["pad_id"] or 0, warnings)
    meta = DataMeta(
        input_shape=(seq_len,),
        vocab_size=facts["vocab_size"],
        bos_id=facts["bos_id"],
        eos_id=facts["eos_id"],
        decode=reader.decode,
    )
    return Data(
        splits,
        meta,
        reader.state(facts),
        files=tuple(dict.fromkeys(files.values())),
        encode=reader.encode,
        chat=reader.prompt,
    )


def _encoded(reader: ChatReader, file: Path) -> Encoded:
    def encode(add: Callable[[Row], None]) -> dict[str, Any]:
        answers = (answer for pair in preferences(file) for answer in pair)
        made = reader.tokenizer.encode(answers, "assistant")
        for chosen, rejected in zip(made, made, strict=True):  # one after the other
            row: dict[str, Any] = {}
            for side, (tokens, spans) in zip(SIDES, (chosen, rejected), strict=True):
                row |= {f"{side}_tokens": tokens, f"{side}_spans": spans.reshape(-1)}
            add(row)
        return reader.facts()

    # the number changes with what is made of a record: what was encoded before is not taken
    return reader.encoded(file, {"kind": "preference", "version": 2}, _COLUMNS, encode)


class PreferencePairs:
    """Both answers of each pair, each padded to the longest of its side in a batch."""

    def __init__(self, sides: Mapping[str, Documents], kept: np.ndarray, pad_id: int, warnings: tuple[str, ...] = ()):
        """`kept`: the pairs (samples,) that are samples."""
        self.sides, self.warnings = sides, warnings
        self._kept, self._pad_id = kept, pad_id

    def __len__(self) -> int:
        return len(self._kept)

    def fetch(self, ids: np.ndarray) -> Batch:
        one_each = Ragged(self._kept[ids], np.arange(1, len(ids) + 1))
        made = {side: documents.rows(one_each, self._pad_id).padded() for side, documents in self.sides.items()}
        inputs, targets = ({side: both[at] for side, both in made.items()} for at in (0, 1))
        return {"inputs": inputs, "targets": targets, "ids": torch.from_numpy(ids)}
