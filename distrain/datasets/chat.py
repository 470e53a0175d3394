"""Conversations for language models: rows of tokens of which what the assistant says is learned, several in a row."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distrain.config import UserError
from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Batch, Data, DataMeta, DataRequest, Source, split_indices
from distrain.datasets.chat_template import (
    BUILT_IN,
    ChatTokenizer,
    TrainOn,
    load_tokenizer_folder,
    tokenizer_digest,
)
from distrain.datasets.conversations import (
    EXPECTED,
    SUFFIXES,
    Conversation,
    conversations,
    form_of,
    messages_of,
    prompts,
)
from distrain.datasets.labels import IGNORED
from distrain.datasets.packing import pack as packed
from distrain.datasets.ragged import Encoded, Ragged, Row, encoded
from distrain.datasets.text import Prompts

logger = logging.getLogger(__name__)

TooLong = Literal["truncate", "drop", "error"]
WithoutTargets = Literal["error", "drop"]
DEFAULT_SPLIT = (0.9, 0.1)
_COLUMNS = {"tokens": "uint32", "spans": "int32"}


def encode_chat(
    request: DataRequest,
    tokenizer: str,
    template: str | None = None,
    train_on: TrainOn = "assistant",
    cache: str | None = None,
    **_: Any,
) -> None:
    """Encode what `chat` maps."""
    reader = ChatReader(request, tokenizer, template, cache)
    for file in split_files(request).values():
        reader.conversations(file, train_on)


@datasets.register("chat", tasks=["language_modeling"], encode_ahead=encode_chat)
def chat(
    request: DataRequest,
    tokenizer: str,
    seq_len: int,
    template: str | None = None,
    train_on: TrainOn = "assistant",
    pack: bool = True,
    too_long: TooLong = "truncate",
    without_targets: WithoutTargets = "error",
    cache: str | None = None,
) -> Data:
    """Conversations (JSON Lines, Parquet) by a tokenizer and its chat template; answers are learned, prompts masked.

    `data.path` is a file, or a folder with files named train, valid and test; or `data.split` names the file of each
    split. A record is {"messages": [{"role", "content"}, …]}, ShareGPT's {"conversations": [{"from", "value"}, …]},
    {"prompt", "completion"}, or Alpaca's {"instruction", "input", "output"}. `tokenizer` is the folder of a
    tokenizer of transformers, `template` the path of a Jinja file, `plain` or `chatml`, by default the tokenizer's own.

    `train_on`: the turns of the assistant with the tokens that end them, its `last` one, or `all` tokens. A
    conversation longer than `seq_len` + 1 tokens is cut at its end, dropped, or an error, by `too_long`; one that has
    no targets is an error or dropped, by `without_targets`. With `pack`, a sample is as many whole conversations as fit
    into `seq_len`: `inputs` is {"input_ids", "position_ids"}, each (batch, seq_len) int64, with positions that begin at
    0 in each conversation, beyond which a model may not attend. Without, a sample is a conversation: {"input_ids"
    int64, "attention_mask" bool}, each (batch, longest). `targets` is (batch, seq) int64, the next token or -100.
    `cache`: the folder for the tokens, by default `.distrain` beside the file.
    """
    limits = Limits(seq_len, too_long, without_targets)
    reader = ChatReader(request, tokenizer, template, cache)
    files = split_files(request)
    made = {name: reader.conversations(file, train_on) for name, file in files.items()}
    for name, file in files.items():
        count, form = len(made[name].columns["tokens"]), made[name].facts["form"]
        logger.info(f"{file}: {count:,} conversations, read as {form}")
    facts = made["train"].facts
    state = reader.state(facts)
    splits: dict[str, AnySource] = {}
    for name, (encoded_file, numbers) in split_rows(request, made).items():
        documents = Documents.of(encoded_file, "tokens", "spans", numbers, limits)
        kept, warnings = limits.keep([documents], numbers, f"the split {name!r}", "conversations")
        if pack:
            packs = packed(documents.lengths[kept], seq_len, request.seed)
            packs = Ragged(kept[packs.values], packs.ends)
            filled = documents.lengths[kept].sum() / (len(packs) * seq_len)
            logger.info(
                f"split {name}: {len(kept):,} conversations in {len(packs):,} rows of {seq_len:,} tokens, "
                f"{filled:.0%} full"
            )
        else:
            packs = Ragged(kept, np.arange(1, len(kept) + 1, dtype=np.int64))
        splits[name] = ChatRows(documents, packs, seq_len if pack else None, facts["pad_id"] or 0, warnings)
    meta = DataMeta(
        input_shape=(seq_len,),
        vocab_size=facts["vocab_size"],
        bos_id=facts["bos_id"],
        eos_id=facts["eos_id"],
        tokens_per_sample=seq_len if pack else None,
        decode=reader.decode,
    )
    names = tuple(dict.fromkeys(files.values()))
    return Data(
        splits,
        meta,
        state,
        lambda path: reader.prompts(path, facts),
        names,
        packed=pack,
        encode=reader.encode,
        chat=reader.prompt,
    )


# --------------------------------------------------------------------------------------------------------------------
# Files


class ChatReader:
    """Reads files by one tokenizer and template; what is encoded once is not encoded again."""

    def __init__(self, request: DataRequest, tokenizer: str, template: str | None, cache: str | None):
        self._request = request
        self._folder = request.base / tokenizer
        self._template = template
        self._cache = request.base / cache if cache is not None else None
        self._digest = tokenizer_digest(self._folder)

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer, which takes a second to import: only where something is to be encoded."""
        return ChatTokenizer(self._folder, self._template, self._request.base)

    def conversations(self, file: Path, train_on: TrainOn) -> Encoded:
        """Return `tokens` and `spans` of targets of each conversation of a file."""

        def encode(add: Callable[[Row], None]) -> dict[str, Any]:
            form = form_of(file)
            for tokens, spans in self.tokenizer.encode(conversations(file, form), train_on):
                add({"tokens": tokens, "spans": spans.reshape(-1)})
            return {"form": form.name, **self.facts()}

        return self.encoded(file, {"kind": "chat", "train_on": train_on}, _COLUMNS, encode)

    def encoded(
        self,
        file: Path,
        options: Mapping[str, Any],
        columns: Mapping[str, str],
        encode: Callable[[Callable[[Row], None]], dict[str, Any]],
    ) -> Encoded:
        """Return what is encoded of a file by this tokenizer and template; see `distrain.datasets.ragged`."""
        template = self._template
        if template is not None:
            file_of = self._request.base / template
            text = BUILT_IN.get(template) or (file_of.read_text(encoding="utf-8") if file_of.is_file() else template)
            template = text
        made_from = {"tokenizer": self._digest, "template": template, **options}
        return encoded(file, self._cache, made_from, columns, encode)

    def facts(self) -> dict[str, Any]:
        """Return the numbers of special tokens, the size of the vocabulary and the text of the template."""
        tokenizer = self.tokenizer.tokenizer
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "pad_id": tokenizer.pad_token_id,
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "template": self.tokenizer.template,
        }

    def state(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of the data; raises UserError where the model was trained with another one."""
        state = {
            "tokenizer": str(self._folder),
            "tokenizer_digest": self._digest,
            "vocab_size": facts["vocab_size"],
            "template": facts["template"],
        }
        before = self._request.state
        for key, what in (("tokenizer_digest", "tokenizer"), ("template", "chat template")):
            if before is not None and before.get(key) != state[key]:
                raise UserError(
                    f"the model was trained with another {what} than that of {self._folder}; use the {what} of the "
                    "training"
                )
        return state if before is None else dict(before)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens have none."""
        numbers = [int(number) for number in ids if number >= 0]
        return str(_loaded(self._folder).decode(numbers, skip_special_tokens=True))

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text to continue, as it is."""
        return [int(number) for number in _loaded(self._folder)(text, add_special_tokens=False)["input_ids"]]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """Return the tokens of messages after which the model is to answer; raises UserError."""
        return self.tokenizer.prompt(Conversation(messages_of([*messages], "messages"), "the prompt")).tolist()

    def prompts(self, path: Path, facts: Mapping[str, Any]) -> Source:
        """Return the prompts of a file of conversations, or of lines of text, each up to where the model answers."""
        pad_id = facts["pad_id"] if facts["pad_id"] is not None else facts["eos_id"]
        return Prompts([self.tokenizer.prompt(each) for each in prompts(path)], pad_id or 0)


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path) -> Any:
    return load_tokenizer_folder(folder)


def split_files(request: DataRequest) -> dict[str, Path]:
    """Return the file of each split, or of all together as `train`."""
    if paths := request.split_paths():
        return paths
    path = request.path(f"{EXPECTED}, or a folder with such files named train, valid and test")
    if path.is_file():
        return {"train": path}
    there = {
        name: file
        for name in ("train", "valid", "test")
        for file in sorted(path.iterdir())
        if file.name.removesuffix(".gz") in {f"{name}{suffix}" for suffix in SUFFIXES}
    }
    if "train" not in there:
        raise UserError(f"data.path: there is no train.jsonl in {path}; expected {EXPECTED}, or a folder of such files")
    if request.section.split is not None:
        raise UserError(f"data.split: {path} holds the splits {', '.join(there)} already; remove data.split")
    return there


def split_rows(request: DataRequest, made: Mapping[str, Encoded]) -> dict[str, tuple[Encoded, np.ndarray]]:
    """Return for each split what holds its rows, and their numbers there."""
    if len(made) > 1 or isinstance(request.section.split, dict):
        return {name: (each, np.arange(len(_first(each)), dtype=np.int64)) for name, each in made.items()}
    train = made["train"]
    if request.path(EXPECTED).is_dir():
        return {"train": (train, np.arange(len(_first(train)), dtype=np.int64))}
    indices = split_indices(len(_first(train)), request.section, request.seed, default=DEFAULT_SPLIT)
    return {name: (train, each) for name, each in indices.items()}


def _first(each: Encoded) -> Ragged:
    return next(iter(each.columns.values()))


# --------------------------------------------------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Documents:
    """Token sequences, each cut to what a row holds: inputs are all tokens but the last, targets all but the first."""

    tokens: Ragged
    spans: Ragged
    numbers: np.ndarray
    """(documents,) the row of each document there."""
    lengths: np.ndarray
    """(documents,) int64: of its inputs."""
    full: np.ndarray
    """(documents,) int64: of its inputs, uncut."""
    targets: np.ndarray
    """(documents,) int64: how many targets it has."""
    cut_targets: int
    """Targets that the cut loses, of all documents together."""

    @classmethod
    def of(cls, made: Encoded, tokens: str, spans: str, numbers: np.ndarray, limits: Limits) -> Documents:
        """Return the rows `numbers` of these columns."""
        full = np.maximum(made.columns[tokens].lengths[numbers] - 1, 0)
        lengths = np.minimum(full, limits.seq_len)
        edges = made.columns[spans]
        every = made.columns[tokens].lengths
        limit = np.minimum(every, limits.seq_len + 1)
        there, uncut = (_count(edges, each)[numbers] for each in (limit, every))
        return cls(made.columns[tokens], edges, numbers, lengths, full, there, int((uncut - there).sum()))

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, groups: Ragged, pad_id: int, width: int | None = None) -> Rows:
        """Return rows with the documents of each group one after the other, padded to `width`, by default the longest.

        All at once in NumPy: document by document would take as long as a step of a small model.
        """
        numbers = self.numbers[groups.values]
        sizes = self.lengths[groups.values] + 1
        tokens = self.tokens.values[_places(self.tokens.starts[numbers], sizes)].astype(np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        wanted = self._wanted(numbers, starts, sizes, len(tokens))
        is_input, is_target = np.ones((2, len(tokens)), dtype=bool)
        is_input[ends - 1] = is_target[starts] = False
        filled = np.add.reduceat(sizes - 1, groups.starts)
        width = int(filled.max()) if width is None else width
        shape = (len(groups), width)
        places = _places(np.arange(len(groups)) * width, filled)
        found = Rows(np.full(shape, pad_id), np.full(shape, IGNORED), np.empty(shape, np.int64), filled)
        found.positions[:] = np.arange(width) - filled[:, None]  # padding is a document of its own
        found.inputs.reshape(-1)[places] = tokens[is_input]
        found.targets.reshape(-1)[places] = np.where(wanted, tokens, IGNORED)[is_target]
        found.positions.reshape(-1)[places] = _places(np.zeros_like(sizes), sizes - 1)
        return found

    def _wanted(self, numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
        """Return which tokens (total,) bool of these rows, one after the other, are targets."""
        counts = self.spans.lengths[numbers]
        edges = self.spans.values[_places(self.spans.starts[numbers], counts)].astype(np.int64)
        edges = np.minimum(edges, np.repeat(sizes, counts)) + np.repeat(starts, counts)
        change = np.zeros(total + 1, dtype=np.int32)
        np.add.at(change, edges[::2], 1)
        np.add.at(change, edges[1::2], -1)
        wanted: np.ndarray = np.cumsum(change[:-1]) > 0
        return wanted


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, each (rows, width) int64."""

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    filled: np.ndarray
    """(rows,) int64: inputs of each before its padding."""

    def padded(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return ({"input_ids", "attention_mask"}, targets) of rows of one document each."""
        mask = np.arange(self.inputs.shape[1]) < self.filled[:, None]
        inputs = {"input_ids": torch.from_numpy(self.inputs), "attention_mask": torch.from_numpy(mask)}
        return inputs, torch.from_numpy(self.targets)


def _places(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the numbers from each of `begins`, as many as in `sizes`, one after the other."""
    ends = np.cumsum(sizes)
    places: np.ndarray = np.repeat(begins - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
    return places


def _count(spans: Ragged, limits: np.ndarray) -> np.ndarray:
    """Return how many targets each row of `spans` has among the first `limits` (rows,) tokens."""
    counts = spans.lengths // 2
    edges = np.minimum(spans.values.astype(np.int64).reshape(-1, 2), np.repeat(limits, counts)[:, None])
    sizes = np.maximum(edges[:, 1] - np.maximum(edges[:, 0], 1), 0)
    return Ragged(sizes, np.cumsum(counts)).sums()


@dataclass(frozen=True)
class Limits:
    """What becomes of documents that are too long, or have nothing to learn."""

    seq_len: int
    too_long: TooLong
    without_targets: WithoutTargets

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"data.seq_len {self.seq_len} should be at least 1")

    def keep(
        self, parts: Sequence[Documents], numbers: np.ndarray, where: str, what: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the documents (kept,) that become samples, and warnings; raises UserError.

        `parts` are the documents of each part of a sample: one is dropped with the others. `numbers`: their places in
        the file, from 0.
        """
        warnings = []
        long = np.any([each.full > self.seq_len for each in parts], axis=0)
        keep = np.ones(len(numbers), dtype=bool)
        found = f"{long.sum():,} of {len(numbers):,} {what} of {where}"
        if long.any() and self.too_long == "error":
            longest = max(int(each.full.max()) for each in parts) + 1
            raise UserError(
                f"{found} have more than data.seq_len + 1 = {self.seq_len + 1:,} tokens, the longest {longest:,} "
                f"({_named(long, numbers)}); raise it, or set data.too_long to truncate or drop"
            )
        if long.any() and self.too_long == "drop":
            keep &= ~long
            warnings.append(f"{found} are longer than data.seq_len {self.seq_len:,} and are dropped")
        elif long.any():
            tokens = sum(int((each.full - each.lengths).sum()) for each in parts)
            targets = sum(each.cut_targets for each in parts)
            warnings.append(
                f"{found} are longer than data.seq_len {self.seq_len:,} and are cut at their end, by {tokens:,} tokens "
                f"together, {targets:,} of them targets"
            )
        empty = np.any([each.targets == 0 for each in parts], axis=0) & keep
        if empty.any():
            none = f"{empty.sum():,} of {len(numbers):,} {what} of {where} have no targets ({_named(empty, numbers)})"
            if self.without_targets == "error":
                raise UserError(
                    f"{none}: the assistant says nothing there, or what it says was cut off; raise data.seq_len, or "
                    "set data.without_targets to drop"
                )
            keep &= ~empty
            warnings.append(f"{none} and are dropped")
        if not keep.any():
            raise UserError(f"none of the {len(numbers):,} {what} of {where} is left: {'; '.join(warnings)}")
        return np.flatnonzero(keep), tuple(warnings)


def _named(mask: np.ndarray, numbers: np.ndarray) -> str:
    found = (numbers[mask] + 1).tolist()
    return f"number {', '.join(map(str, found[:5]))}{', …' if len(found) > 5 else ''} of the file"


# --------------------------------------------------------------------------------------------------------------------
# Samples


class ChatRows:
    """Conversations one by one, padded to the longest of a batch, or several in each row of `seq_len` tokens."""

    def __init__(
        self,
        documents: Documents,
        packs: Ragged,
        seq_len: int | None,
        pad_id: int,
        warnings: tuple[str, ...] = (),
    ):
        """`packs`: the documents of each sample; without `seq_len` there is one in each."""
        self.documents, self.packs = documents, packs
        self.warnings = warnings
        self._seq_len, self._pad_id = seq_len, pad_id

    def __len__(self) -> int:
        return len(self.packs)

    def fetch(self, ids: np.ndarray) -> Batch:
        groups = self.packs.take(ids)
        rows = self.documents.rows(groups, self._pad_id, self._seq_len)
        if self._seq_len is None:
            inputs, targets = rows.padded()
        else:
            inputs = {"input_ids": torch.from_numpy(rows.inputs), "position_ids": torch.from_numpy(rows.positions)}
            targets = torch.from_numpy(rows.targets)
        return {"inputs": inputs, "targets": targets, "ids": torch.from_numpy(ids)}
