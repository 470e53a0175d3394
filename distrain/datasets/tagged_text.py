"""Sentences with a tag for each token: named entities, parts of speech."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distrain.config import UserError, close_names
from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Batch, Data, DataMeta, DataRequest, split_indices
from distrain.datasets.chat import TooLong
from distrain.datasets.chat_template import (
    check_tokenizer,
    load_tokenizer_folder,
    padding_warnings,
    tokenizer_digest,
    vocabulary_facts,
)
from distrain.datasets.labels import IGNORED
from distrain.datasets.nested import padded
from distrain.datasets.ragged import Encoded, Ragged, Row, encoded
from distrain.datasets.tagged_files import EXPECTED, Sentence, TaggedReader, classes_of
from distrain.datasets.tags import Scheme, all_classes
from distrain.datasets.tokens import frequent_tokens

_SPECIALS = ("<pad>", "<unk>")
_UNKNOWN = 1
_COLUMNS = {"input_ids": "uint32", "first": "int32", "length": "int32"}
_BATCH = 1024
"""Sentences that are tokenized at once."""


def encode_sentences(
    request: DataRequest, tokenizer: str | None = None, max_len: int = 512, cache: str | None = None, **args: Any
) -> None:
    """Encode what `tagged_text` maps."""
    if tokenizer is not None:
        reader = _reader(request, **args)
        pieces = _Pieces(request.base / tokenizer, max_len, request.base / cache if cache is not None else None)
        for path in dict.fromkeys((request.split_paths() or {"train": request.path(EXPECTED)}).values()):
            pieces.encoded(path, reader, reader.read(path, tagged=True))


def _reader(
    request: DataRequest,
    tokens: int | str | None = None,
    tags: int | str | None = None,
    scheme: Scheme = "iob2",
    classes: list[str] | None = None,
    delimiter: str | None = None,
    **_: Any,
) -> TaggedReader:
    if classes is not None and len(set(classes)) < len(classes):
        raise UserError(f"data.classes: {next(each for each in classes if classes.count(each) > 1)!r} is there twice")
    return TaggedReader(tokens, tags, delimiter, scheme, tuple(classes) if classes is not None else None)


@datasets.register("tagged_text", tasks=["token_classification"], encode_ahead=encode_sentences)
def tagged_text(
    request: DataRequest,
    tokenizer: str | None = None,
    tokens: int | str | None = None,
    tags: int | str | None = None,
    scheme: Scheme = "iob2",
    classes: list[str] | None = None,
    max_len: int = 512,
    too_long: TooLong = "truncate",
    min_count: int = 1,
    max_vocab: int | None = None,
    delimiter: str | None = None,
    cache: str | None = None,
) -> Data:
    """Sentences with a tag for each token, in columns as of CoNLL or lines of JSON.

    `data.path` is a file, or `data.split` names that of each split. In columns, a line has a token and its tag, and a
    blank line ends a sentence; `tokens` and `tags` number their columns from 0, or from the end below 0 (the first and
    the last). In a .jsonl file a line is {"tokens": […], "tags": […]}; `tokens` and `tags` name the keys. `scheme` says
    how tags mark entities, and each is held against it; `iob1` becomes `iob2`. `classes` names the tags in their order;
    without it they are those of the training split.

    `tokenizer` is the folder of one of transformers: the first piece of a token has its tag, the others have none.
    Without one, tokens are words: at most the `max_vocab` most frequent ones that occur `min_count` times or more in
    the training split, after `<pad>` and `<unk>`. A sentence of more than `max_len` is cut, dropped, or an error, by
    `too_long`. Pieces are encoded once; `cache`: the folder for that, by default `.distrain` beside the file.

    `inputs` is (batch, longest) int64, padded with `meta.pad_id`; `targets` has the same shape, and the number that the
    loss ignores (-100) where there is no tag.
    """
    for key, value in (("min_count", min_count), ("max_vocab", max_vocab), ("max_len", max_len)):
        if value is not None and value < 1:
            raise UserError(f"data.{key} {value} should be at least 1")
    if tokenizer is not None and (min_count > 1 or max_vocab is not None):
        raise UserError(
            "data.min_count and data.max_vocab are for a vocabulary of words; remove them, or the tokenizer"
        )
    reader = _reader(request, tokens, tags, scheme, classes, delimiter)
    files: dict[str, Path] = {}
    read: dict[Path, list[Sentence]] = {}
    rows: dict[str, np.ndarray] = {}
    if not request.inputs_only:
        files, read, rows = _read_splits(request, reader)
    pieces = None
    if tokenizer is not None:
        pieces = _Pieces(request.base / tokenizer, max_len, request.base / cache if cache is not None else None)
    if request.state is None:
        training = [read[files["train"]][row] for row in rows["train"].tolist()]
        found = classes_of(training)
        state: dict[str, Any] = {"classes": classes or all_classes(found, scheme), "scheme": scheme}
        state |= _vocabulary(training, min_count, max_vocab) if pieces is None else pieces.state
    else:
        state = request.state
        _check_state(state, pieces, scheme)
    words: _Tokens = _Words(state["vocabulary"], max_len) if pieces is None else pieces
    encoded_files = {path: words.encoded(path, reader, sentences) for path, sentences in read.items()}
    ignored = request.labels("train", len(state["classes"])).ignored
    numbers = _Numbers(state["classes"], IGNORED if ignored is None else ignored)
    splits: dict[str, AnySource] = {}
    for name, kept in rows.items():
        path = files[name]
        keep, warnings = _keep(encoded_files[path], kept, read[path], max_len, too_long, f"the split {name!r}", path)
        splits[name] = TaggedTexts(encoded_files[path], keep, read[path], numbers, words.pad_id, path, warnings)

    def read_file(path: Path) -> TaggedTexts:
        sentences = reader.read(path, tagged=False)
        every, made = np.arange(len(sentences)), words.encode(sentences)
        keep, warnings = _keep(made, every, sentences, max_len, "truncate", str(path), path)
        return TaggedTexts(made, keep, sentences, numbers, words.pad_id, path, warnings)

    meta = DataMeta(
        num_classes=len(state["classes"]),
        class_names=tuple(state["classes"]),
        vocab_size=words.vocab_size,
        pad_id=words.pad_id,
    )
    about = () if pieces is None else padding_warnings(pieces.facts, pieces.folder)
    return Data(splits, meta, state, read_file, tuple(read), about)


def _read_splits(
    request: DataRequest, reader: TaggedReader
) -> tuple[dict[str, Path], dict[Path, list[Sentence]], dict[str, np.ndarray]]:
    """Return the file of each split, the sentences of each file, and which of them each split has."""
    if paths := request.split_paths():
        read = {path: reader.read(path, tagged=True) for path in dict.fromkeys(paths.values())}
        return paths, read, {name: np.arange(len(read[path])) for name, path in paths.items()}
    path = request.path(EXPECTED)
    sentences = reader.read(path, tagged=True)
    rows = split_indices(len(sentences), request.section, request.seed)
    return dict.fromkeys(rows, path), {path: sentences}, rows


def _vocabulary(training: Sequence[Sentence], min_count: int, max_vocab: int | None) -> dict[str, Any]:
    counts = Counter(token for sentence in training for token in sentence.tokens)
    return {"vocabulary": frequent_tokens(counts, _SPECIALS, min_count, max_vocab)}


def _check_state(state: Mapping[str, Any], pieces: _Pieces | None, scheme: Scheme) -> None:
    """Raise UserError where the model was trained with other tokens."""
    if (pieces is None) != ("vocabulary" in state):
        was = "a vocabulary of words" if "vocabulary" in state else f"the tokenizer of {state.get('tokenizer')}"
        raise UserError(f"data.tokenizer: the model was trained with {was}")
    if pieces is not None:
        check_tokenizer(state, pieces.state["tokenizer_digest"], pieces.folder)
    if state["scheme"] != scheme:
        raise UserError(f"data.scheme is {scheme!r}, and the model was trained with {state['scheme']!r}")


# --------------------------------------------------------------------------------------------------------------------
# Tokens to numbers


class _Tokens(Protocol):
    """How tokens become the numbers that a model reads."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, sentences: Sequence[Sentence]) -> Encoded:
        """Return rows of `input_ids`; of `first`, where each token begins in them, -1 where it does not; of `length`.

        `length` (1,) is that of the whole sentence, before it was cut.
        """
        ...

    def encoded(self, path: Path, reader: TaggedReader, sentences: Sequence[Sentence]) -> Encoded:
        """Return what `encode` returns for the sentences of a file."""
        ...


class _Words:
    """Tokens of a vocabulary."""

    def __init__(self, vocabulary: Sequence[str], max_len: int):
        self._numbers = {token: number for number, token in enumerate(vocabulary, start=len(_SPECIALS))}
        self._max_len = max_len
        self.vocab_size, self.pad_id = len(self._numbers) + len(_SPECIALS), 0

    def encode(self, sentences: Sequence[Sentence]) -> Encoded:
        rows: list[Row] = []
        for sentence in sentences:
            every = np.arange(len(sentence.tokens))
            ids = [self._numbers.get(token, _UNKNOWN) for token in sentence.tokens[: self._max_len]]
            first = np.where(every < len(ids), every, -1)
            rows.append({"input_ids": np.array(ids), "first": first, "length": np.array([len(every)])})
        return _joined(rows, {})

    def encoded(self, path: Path, reader: TaggedReader, sentences: Sequence[Sentence]) -> Encoded:
        return self.encode(sentences)


class _Pieces:
    """Tokens cut into the pieces of a tokenizer of transformers."""

    def __init__(self, folder: Path, max_len: int, cache: Path | None):
        self.folder, self._max_len, self._cache = folder, max_len, cache
        self.state = {"tokenizer": str(folder), "tokenizer_digest": tokenizer_digest(folder)}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer, which takes a second to import: only where something is to be encoded."""
        tokenizer = load_tokenizer_folder(self.folder)
        if getattr(tokenizer, "add_prefix_space", True):
            return tokenizer
        return load_tokenizer_folder(self.folder, add_prefix_space=True)  # each token is a word of its own

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What `vocabulary_facts` returns."""
        return vocabulary_facts(self._tokenizer, self.folder)

    @property
    def pad_id(self) -> int:
        return int(self.facts["pad_id"])

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    def encode(self, sentences: Sequence[Sentence]) -> Encoded:
        rows: list[Row] = []
        self._encode(sentences, rows.append)
        return _joined(rows, self.facts)

    def _encode(self, sentences: Sequence[Sentence], add: Callable[[Row], None]) -> None:
        options = {"is_split_into_words": True, "return_attention_mask": False, "return_token_type_ids": False}
        for start in range(0, len(sentences), _BATCH):
            tokens = [list(sentence.tokens) for sentence in sentences[start : start + _BATCH]]
            made = self._tokenizer(tokens, verbose=False, **options)
            for row, words in enumerate(tokens):
                ids, of = made["input_ids"][row], made.word_ids(row)
                length = len(ids)
                if length > self._max_len:
                    cut = self._tokenizer(words, truncation=True, max_length=self._max_len, **options)
                    ids, of = cut["input_ids"], cut.word_ids()
                first = np.full(len(words), -1)
                for place in range(len(of) - 1, -1, -1):
                    if of[place] is not None:
                        first[of[place]] = place
                add({"input_ids": np.asarray(ids), "first": first, "length": np.array([length])})

    def encoded(self, path: Path, reader: TaggedReader, sentences: Sequence[Sentence]) -> Encoded:
        def encode(add: Callable[[Row], None]) -> dict[str, Any]:
            self._encode(sentences, add)
            return self.facts

        made_from = {
            "kind": "tagged_text",
            "tokenizer": self.state["tokenizer_digest"],
            "tokens": reader.tokens,
            "tags": reader.tags,
            "delimiter": reader.delimiter,
            "max_len": self._max_len,
        }
        found = encoded(path, self._cache, made_from, _COLUMNS, encode)
        self.__dict__["facts"] = found.facts
        return found


def _joined(rows: Sequence[Row], facts: dict[str, Any]) -> Encoded:
    return Encoded(facts, {name: Ragged.of([row[name] for row in rows], dtype) for name, dtype in _COLUMNS.items()})


def _keep(
    made: Encoded,
    rows: np.ndarray,
    sentences: Sequence[Sentence],
    max_len: int,
    too_long: TooLong,
    what: str,
    path: Path,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return which of `rows` become samples, and warnings; raises UserError."""
    lengths = made.columns["length"].values[rows].astype(np.int64)
    long = lengths > max_len
    warnings = []
    if long.any():
        found = f"{long.sum():,} of {len(rows):,} sentences of {what} have more than data.max_len {max_len:,} tokens"
        if too_long == "error":
            where = "; ".join(f"{path}:{sentences[row].line}" for row in rows[long][:5].tolist())
            raise UserError(
                f"{found}, the longest {lengths.max():,} ({where}); raise it, or set data.too_long to truncate or drop"
            )
        if too_long == "drop":
            if long.all():
                raise UserError(f"{found}, and none is left; raise it, or set data.too_long to truncate")
            warnings.append(f"{found} and are dropped")
            rows = rows[~long]
    absent = Ragged((made.columns["first"].values < 0).astype(np.int64), made.columns["first"].ends).sums()[rows]
    is_long = made.columns["length"].values[rows] > max_len
    if is_long.any():
        warnings.append(f"{found} and are cut: {absent[is_long].sum():,} tokens are not read and have no tag")
    if lost := int(absent[~is_long].sum()):
        warnings.append(f"{lost:,} tokens of {what} have no piece in the tokenizer, so they have no tag")
    return rows, tuple(warnings)


# --------------------------------------------------------------------------------------------------------------------
# Tags to numbers


@dataclass(frozen=True)
class _Numbers:
    """The number of each tag, and the one that means none."""

    classes: Sequence[str]
    ignored: int

    def of(self, sentences: Sequence[Sentence], path: Path) -> np.ndarray:
        """Return the numbers of all tags, one after the other; raises UserError for tags that are no class."""
        numbers = {tag: number for number, tag in enumerate(self.classes)}
        problems = []
        for sentence in sentences:
            if odd := next((tag for tag in sentence.tags or () if tag not in numbers), None):
                problems.append(
                    f"the sentence at {path}:{sentence.line} has the tag {odd!r}, which is no class"
                    f"{close_names(odd, self.classes)}"
                )
        if problems:
            more = [f"and {len(problems) - 10} more sentences"] if len(problems) > 10 else []
            hint = f"classes are {', '.join(self.classes)}; name all of them in data.classes"
            raise UserError("\n".join([*problems[:10], *more, hint]))
        return np.array([numbers[tag] for sentence in sentences for tag in sentence.tags or ()], dtype=np.int64)


class TaggedTexts:
    """Sentences with their tags, padded to the longest of a batch; without tags for prediction."""

    def __init__(
        self,
        made: Encoded,
        rows: np.ndarray,
        sentences: Sequence[Sentence],
        numbers: _Numbers,
        pad_id: int,
        path: Path,
        warnings: tuple[str, ...] = (),
    ):
        """`rows` (samples,): where each sample is among `sentences`, of which `made` has the tokens."""
        self.warnings = warnings
        self._rows, self._sentences, self._pad_id = rows, sentences, pad_id
        self._tokens, self._first = made.columns["input_ids"], made.columns["first"]
        self._ignored = numbers.ignored
        self._targets: Ragged | None = None
        if all(sentences[row].tags is not None for row in rows.tolist()):
            targets = np.full(len(self._tokens.values), numbers.ignored, np.int32)
            kept = [sentences[row] for row in rows.tolist()]
            first = self._first.take(rows)
            begins = np.repeat(self._tokens.starts[rows], first.lengths)
            there = first.values >= 0
            targets[(begins + first.values)[there]] = numbers.of(kept, path)[there]
            self._targets = Ragged(targets, self._tokens.ends)

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, ids: np.ndarray) -> Batch:
        rows = self._rows[ids].tolist()
        batch: Batch = {"inputs": padded(map(self._tokens.row, rows), self._pad_id), "ids": torch.from_numpy(ids)}
        if self._targets is not None:
            batch["targets"] = padded(map(self._targets.row, rows), self._ignored)
        return batch

    def keys(self, ids: np.ndarray) -> dict[str, Sequence[Any]]:
        return {"tokens": [list(self._sentences[row].tokens) for row in self._rows[ids].tolist()]}

    def texts(self, ids: np.ndarray) -> list[str]:
        """Return the sentences, for people."""
        return [" ".join(self._sentences[row].tokens) for row in self._rows[ids].tolist()]

    def places(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return for each sample where each of its tokens begins in the row of `inputs`, -1 where it was cut."""
        return [self._first.row(row) for row in self._rows[ids].tolist()]
