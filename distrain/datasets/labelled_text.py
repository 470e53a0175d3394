"""Texts, or pairs of texts, with classes or numbers: columns of a table, by a tokenizer of transformers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.config import UserError, close_names
from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Batch, Data, DataMeta, DataRequest
from distrain.datasets.chat import TooLong
from distrain.datasets.chat_template import (
    check_tokenizer,
    load_tokenizer_folder,
    padding_warnings,
    tokenizer_digest,
    vocabulary_facts,
)
from distrain.datasets.nested import padded
from distrain.datasets.ragged import Encoded, Ragged, Row, encoded
from distrain.datasets.table_columns import Options, fit_target, spelled_alike
from distrain.datasets.table_files import Frame, TableReader, listed, split_frames
from distrain.datasets.tables import Encoder, target_facts
from distrain.datasets.tokens import text_lines

logger = logging.getLogger(__name__)

EXPECTED = "a .csv, .tsv, .jsonl or .parquet file of texts with labels"
_COLUMNS = {"input_ids": "uint32", "token_type_ids": "uint8", "length": "int32"}
_BATCH = 1024
"""Texts that are tokenized at once."""


def encode_texts(
    request: DataRequest,
    tokenizer: str,
    text: str | list[str],
    max_len: int = 512,
    delimiter: str | None = None,
    cache: str | None = None,
    **_: Any,
) -> None:
    """Encode what `text_classification` maps."""
    reader = TextReader(request, tokenizer, text, max_len, delimiter, cache)
    for file in dict.fromkeys((request.split_paths() or {"train": request.path(EXPECTED)}).values()):
        reader.encoded(file)


@datasets.register(
    "text_classification", tasks=["classification", "binary", "multilabel", "regression"], encode_ahead=encode_texts
)
def text_classification(
    request: DataRequest,
    tokenizer: str,
    text: str | list[str],
    label: str | list[str],
    max_len: int = 512,
    too_long: TooLong = "truncate",
    positive: str | int | float | bool | None = None,
    standardize_target: bool = False,
    id: str | None = None,
    delimiter: str | None = None,
    cache: str | None = None,
) -> Data:
    """Texts of a CSV, JSON Lines or Parquet file with classes or numbers, by a tokenizer of transformers.

    `data.path` is a file, or `data.split` names that of each split. `text` is a column, or two whose texts are a pair.
    `label` is a column, or with multilabel and regression a list of them; targets are as in `table`, with `positive`
    and `standardize_target`. `tokenizer` is the folder of a tokenizer, which adds its own special tokens. A text of
    more than `max_len` tokens is cut, the longer of a pair first, or dropped, or an error, by `too_long`. The column
    `id` identifies the rows in predictions. Texts are encoded once; `cache`: the folder for that, by default
    `.distrain` beside the file.

    `inputs` is (batch, longest) int64, padded with `meta.pad_id`, or for pairs of a tokenizer that tells them apart
    {"input_ids", "token_type_ids"}, each of that shape.
    """
    reader = TextReader(request, tokenizer, text, max_len, delimiter, cache)
    targets = [label] if isinstance(label, str) else label
    rows, frames = split_frames(request, reader.tables, targets)
    for frame in frames.values():
        reader.check(frame, targets)
    dtype = np.dtype(np.float64 if request.dtype == torch.float64 else np.float32)
    if request.state is None:
        options = Options("error", False, "index", 1, standardize_target)
        state = {
            "targets": targets,
            "several_targets": isinstance(label, list),
            **fit_target(frames["train"], targets, options, request.task, positive),
            **reader.state(),
        }
    else:
        state = request.state
        reader.check_state(state)
    encoder = Encoder(state, request.task, dtype)
    made = {path: reader.encoded(path) for frame in frames.values() for path, _ in frame.files}
    facts = next(iter(made.values())).facts
    splits: dict[str, AnySource] = {}
    for name, frame in frames.items():
        ((path, _),) = frame.files
        keep, warnings = reader.keep(made[path], frame, too_long, f"the split {name!r}")
        kept = frame.take(keep)
        names = {id: kept.table.column(id).to_pylist()} if id is not None and id in kept.names else {}
        encoded_targets, folder = encoder.targets(kept), request.base / tokenizer
        splits[name] = LabelledTexts(made[path], kept.rows, encoded_targets, facts["pad_id"], names, warnings, folder)
    if id is not None and id not in rows.names:
        raise UserError(f"data.id: {rows.title} has no column {id!r}{close_names(id, rows.names)}")

    def read(path: Path) -> LabelledTexts:
        return reader.read(path, encoder, facts["pad_id"], id)

    meta = DataMeta(vocab_size=facts["vocab_size"], pad_id=facts["pad_id"], **target_facts(state, request.task))
    alike = spelled_alike({"categorical": [], **state}) if request.state is None else []
    warnings = (*alike, *padding_warnings(facts, request.base / tokenizer))
    return Data(splits, meta, state, read, tuple(made), warnings)


class TextReader:
    """Reads columns of text by one tokenizer; what is encoded once is not encoded again."""

    def __init__(
        self,
        request: DataRequest,
        tokenizer: str,
        text: str | list[str],
        max_len: int,
        delimiter: str | None,
        cache: str | None,
    ):
        self.texts = [text] if isinstance(text, str) else text
        if len(self.texts) not in (1, 2):
            raise UserError(f"data.text: found {len(self.texts)} columns, expected one, or two whose texts are a pair")
        if max_len < 1:
            raise UserError(f"data.max_len {max_len} should be at least 1")
        self._folder = request.base / tokenizer
        self._max_len = max_len
        self._cache = request.base / cache if cache is not None else None
        self._digest = tokenizer_digest(self._folder)
        self._delimiter = delimiter
        # "NA" and "None" are words
        self.tables = TableReader(delimiter, ("",))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which takes a second to import: only where something is to be encoded."""
        return load_tokenizer_folder(self._folder)

    def check(self, frame: Frame, targets: Sequence[str]) -> None:
        """Raise UserError for a folder, and for columns that are not there."""
        problems = [
            f"data.{key}: {frame.title} has no column {name!r}"
            + (close_names(name, frame.names) or f"; it has {listed(frame.names)}")
            for key, names in (("text", self.texts), ("label", targets))
            for name in names
            if name not in frame.names
        ]
        problems += [f"data.label: {name!r} is also in data.text" for name in targets if name in self.texts]
        if len(frame.files) != 1:
            problems.append(f"data.path: {frame.title} holds several files; expected {EXPECTED}")
        if problems:
            raise UserError("\n".join(problems))

    def state(self) -> dict[str, Any]:
        return {"tokenizer": str(self._folder), "tokenizer_digest": self._digest}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise UserError where the model was trained with another tokenizer."""
        check_tokenizer(state, self._digest, self._folder)

    def encoded(self, file: Path) -> Encoded:
        """Return what is encoded of a file, row by row: `length` (1,) is that of the whole text, in tokens."""

        def encode(add: Callable[[Row], None]) -> dict[str, Any]:
            for row in self._rows(self.tables.read(file)):
                add(row)
            return vocabulary_facts(self.tokenizer, self._folder)

        made_from = {
            "kind": "text_classification",
            "tokenizer": self._digest,
            "text": self.texts,
            "max_len": self._max_len,
            "delimiter": self._delimiter,
        }
        return encoded(file, self._cache, made_from, _COLUMNS, encode)

    def _rows(self, frame: Frame) -> Sequence[Row]:
        """Return what is encoded of each row; raises UserError for rows without text."""
        if lacking := [name for name in self.texts if name not in frame.names]:
            raise UserError(f"data.text: {frame.title} has no column {lacking[0]!r}; it has {listed(frame.names)}")
        columns = [frame.labels(name) for name in self.texts]
        for name, column in zip(self.texts, columns, strict=True):
            absent = np.array([value is None for value in column], dtype=bool)
            if absent.any():
                raise UserError(f"column {name!r} has no text at {frame.places(absent)}; correct or remove these rows")
        rows: list[Row] = []
        for start in range(0, len(frame), _BATCH):
            rows += self._encode([column[start : start + _BATCH].tolist() for column in columns])
        return rows

    def _encode(self, columns: list[list[str]]) -> list[Row]:
        pairs = len(columns) == 2
        types = pairs and "token_type_ids" in self.tokenizer.model_input_names
        options = {"return_attention_mask": False, "return_token_type_ids": types, "verbose": False}
        made = self.tokenizer(*columns, **options)
        found: list[Row] = []
        for row, ids in enumerate(made["input_ids"]):
            length, kinds = len(ids), made["token_type_ids"][row] if types else []
            if length > self._max_len:
                texts = [column[row] for column in columns]
                cut = self.tokenizer(*texts, truncation="longest_first", max_length=self._max_len, **options)
                ids, kinds = cut["input_ids"], cut["token_type_ids"] if types else []
            found.append(
                {
                    "input_ids": np.asarray(ids, dtype=np.uint32),
                    "token_type_ids": np.asarray(kinds, dtype=np.uint8),
                    "length": np.array([length]),
                }
            )
        return found

    def keep(self, made: Encoded, frame: Frame, too_long: TooLong, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the rows (kept,) of a frame that become samples, and warnings; raises UserError."""
        lengths = made.columns["length"].values[frame.rows].astype(np.int64)
        long = lengths > self._max_len
        every = np.arange(len(frame))
        if not long.any():
            return every, ()
        found = f"{long.sum():,} of {len(frame):,} texts of {what} have more than data.max_len {self._max_len:,} tokens"
        if too_long == "error":
            raise UserError(
                f"{found}, the longest {lengths.max():,} ({frame.places(long)}); raise it, or set data.too_long to "
                "truncate or drop"
            )
        if too_long == "truncate":
            cut = int((lengths - self._max_len)[long].sum())
            return every, (f"{found} and are cut, by {cut:,} tokens together",)
        if long.all():
            raise UserError(f"{found}, and none is left; raise it, or set data.too_long to truncate")
        return every[~long], (f"{found} and are dropped",)

    def read(self, path: Path, encoder: Encoder, pad_id: int, id: str | None) -> LabelledTexts:
        """Return the texts of a file for prediction: of its columns, or of the lines of a .txt file; all are kept."""
        if path.suffix == ".txt" and len(self.texts) == 1:
            lines = text_lines(path)
            rows = [
                row for start in range(0, len(lines), _BATCH) for row in self._encode([lines[start : start + _BATCH]])
            ]
            targets, names = None, {}
        else:
            frame = self.tables.read(path)
            rows = [*self._rows(frame)]
            targets = encoder.targets(frame) if encoder.has_targets(frame) else None
            names = {id: frame.table.column(id).to_pylist()} if id is not None and id in frame.names else {}
        columns = {name: Ragged.of([row[name] for row in rows]) for name in _COLUMNS}
        long = int((columns["length"].values > self._max_len).sum())
        found = f"{long:,} of {len(rows):,} texts of {path} have more than data.max_len {self._max_len:,} tokens"
        warnings = (f"{found} and are cut",) if long else ()
        made = Encoded({}, columns)
        return LabelledTexts(made, np.arange(len(rows)), targets, pad_id, names, warnings, self._folder)


class LabelledTexts:
    """Texts with their targets, padded to the longest of a batch; without targets for prediction."""

    def __init__(
        self,
        made: Encoded,
        rows: np.ndarray,
        targets: torch.Tensor | None,
        pad_id: int,
        names: Mapping[str, Sequence[Any]],
        warnings: tuple[str, ...] = (),
        tokenizer: Path | None = None,
    ):
        """`rows` (samples,): where each sample is among what was encoded. `names`: the columns of `keys_of`.

        `tokenizer`: its folder, for `texts`.
        """
        self.warnings, self.targets, self._tokenizer = warnings, targets, tokenizer
        self._tokens, self._types = made.columns["input_ids"], made.columns["token_type_ids"]
        self._rows, self._pad_id, self._names = rows, pad_id, names

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, ids: np.ndarray) -> Batch:
        rows = self._rows[ids].tolist()
        inputs: Any = padded(map(self._tokens.row, rows), self._pad_id)
        if len(self._types.values):
            inputs = {"input_ids": inputs, "token_type_ids": padded(map(self._types.row, rows), 0)}
        batch: Batch = {"inputs": inputs, "ids": torch.from_numpy(ids)}
        if self.targets is not None:
            batch["targets"] = self.targets.index_select(0, batch["ids"])
        return batch

    def texts(self, ids: np.ndarray) -> list[str]:
        """Return what the tokens of samples say, for people."""
        assert self._tokenizer is not None
        tokenizer = load_tokenizer_folder(self._tokenizer)
        rows = [self._tokens.row(row).tolist() for row in self._rows[ids].tolist()]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        return {column: [values[index] for index in ids.tolist()] for column, values in self._names.items()}
