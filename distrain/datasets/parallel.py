"""Pairs of texts, for translation and similar tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distrain.config import UserError
from distrain.config.registry import datasets
from distrain.datasets.base import Batch, Data, DataMeta, DataRequest, split_indices
from distrain.datasets.labels import IGNORED
from distrain.datasets.nested import padded
from distrain.datasets.ragged import Ragged
from distrain.datasets.tokens import FileTokenizer, frequent_tokens, text_lines

_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_UNKNOWN = 3
TooLong = Literal["error", "drop", "truncate"]


@datasets.register("parallel_text", tasks=["seq2seq"])
def parallel_text(
    request: DataRequest,
    source_tokenizer: str = "words",
    target_tokenizer: str = "words",
    min_count: int = 1,
    max_vocab: int | None = None,
    max_len: int = 256,
    too_long: TooLong = "error",
) -> Data:
    """Lines of `source<TAB>target`, each side as words, as characters or by a Hugging Face tokenizer.json.

    `data.path` is such a file, or `data.split` names the file of each split. The vocabularies of `words` (separated by
    white space) and `chars` are fitted on the training split: at most the `max_vocab` most frequent tokens that occur
    `min_count` times or more, after `<pad> <bos> <eos> <unk>` as 0 to 3. A tokenizer.json keeps its own numbers, its
    own padding and BOS if it has them (otherwise BOS is the padding, as in T5 and Marian). `too_long` decides about a
    pair with more than `max_len` tokens on a side, without special ones: an error, or drop or truncate with a warning.

    `inputs` is {"source": (batch, longest source) int64, ending with EOS, "target": (batch, longest target) int64,
    beginning with BOS}, padded with `meta.pad_id`; `targets` (batch, longest target) int64 ends with EOS and is -100 at
    the padding of `target`. Outside the training split `references` is the list of the raw target texts.
    """
    for key, value in (("min_count", min_count), ("max_vocab", max_vocab), ("max_len", max_len)):
        if value is not None and value < 1:
            raise UserError(f"data.{key} {value} should be at least 1")
    pairs, files = ({}, []) if request.inputs_only else _read_splits(request)
    specs = {"source": source_tokenizer, "target": target_tokenizer}
    if request.state is None:
        texts = {"source": [pair.source for pair in pairs["train"]], "target": [pair.target for pair in pairs["train"]]}
        state = {side: _fit(spec, texts[side], request.base, min_count, max_vocab) for side, spec in specs.items()}
    else:
        state = request.state
    source, target = (_open(specs[side], state[side], request.base, side) for side in ("source", "target"))
    if source.pad_id != target.pad_id:
        raise UserError(
            f"the source is padded with {source.pad_id} and the target with {target.pad_id}, but a model has one "
            "padding id; use the same tokenizer.json on both sides"
        )
    splits = {
        name: _encode(name, split, source, target, max_len, too_long, keep_references=name != "train")
        for name, split in pairs.items()
    }

    def decode(ids: Sequence[int]) -> str:
        kept = list(ids)
        if target.eos_id in kept:
            kept = kept[: kept.index(target.eos_id)]
        return target.decode(
            [number for number in kept if number >= 0 and number not in (target.pad_id, target.bos_id)]
        )

    meta = DataMeta(
        vocab_size=source.vocab_size,
        target_vocab_size=target.vocab_size,
        pad_id=target.pad_id,
        bos_id=target.bos_id,
        eos_id=target.eos_id,
        decode=decode,
    )

    def encode(text: str) -> list[int]:
        (ids,) = source.encode([text])
        if len(ids) > max_len and too_long != "truncate":
            raise UserError(f"a source has {len(ids)} tokens, more than data.max_len {max_len}: {text[:40]!r}…")
        return [*ids[:max_len], source.eos_id]

    return Data(
        dict(splits), meta, state, lambda path: _read_sources(path, source, max_len, too_long), files, encode=encode
    )


# --------------------------------------------------------------------------------------------------------------------
# The tokens of one side


@dataclass(frozen=True)
class _Side:
    encode: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int


def _fit(spec: str, texts: Iterable[str], base: Path, min_count: int, max_vocab: int | None) -> dict[str, Any]:
    """Return the vocabulary or the digest of a side's tokenizer, as JSON values."""
    if spec not in ("words", "chars"):
        return {"tokenizer": "file", "digest": FileTokenizer(base / spec).digest}
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split() if spec == "words" else text)
    return {"tokenizer": spec, "vocabulary": frequent_tokens(counts, _SPECIALS, min_count, max_vocab)}


def _open(spec: str, state: dict[str, Any], base: Path, side: str) -> _Side:
    if state["tokenizer"] == "file":
        return _open_file(base / spec, state["digest"], side)
    if state["tokenizer"] != spec:
        raise UserError(f"data.{side}_tokenizer is {spec!r}, but the model was trained with {state['tokenizer']!r}")
    tokens = [*_SPECIALS, *state["vocabulary"]]
    numbers = {token: number for number, token in enumerate(tokens) if number >= len(_SPECIALS)}
    split: Callable[[str], Iterable[str]] = str.split if spec == "words" else iter
    glue = " " if spec == "words" else ""
    return _Side(
        lambda texts: [[numbers.get(token, _UNKNOWN) for token in split(text)] for text in texts],
        # a model may have as many outputs as the other side has tokens
        lambda ids: glue.join(tokens[number if number < len(tokens) else _UNKNOWN] for number in ids),
        vocab_size=len(tokens),
        pad_id=0,
        bos_id=1,
        eos_id=2,
    )


def _open_file(path: Path, digest: str, side: str) -> _Side:
    tokenizer = FileTokenizer(path)
    if tokenizer.digest != digest:
        raise UserError(f"data.{side}_tokenizer: {path} is not the tokenizer that the model was trained with")
    assert tokenizer.eos_id is not None
    vocab_size = tokenizer.vocab_size
    pad_id = tokenizer.first_id(("<pad>", "[PAD]", "<|pad|>", "<|padding|>"))
    if pad_id is None:
        pad_id, vocab_size = vocab_size, vocab_size + 1
    bos_id = tokenizer.first_id(("<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>", "[CLS]"))
    return _Side(
        lambda texts: [ids.tolist() for ids in tokenizer.encode([text.encode() for text in texts])],
        tokenizer.decode,
        vocab_size=vocab_size,
        pad_id=pad_id,
        bos_id=pad_id if bos_id is None else bos_id,
        eos_id=tokenizer.eos_id,
    )


# --------------------------------------------------------------------------------------------------------------------
# Reading lines


@dataclass(frozen=True)
class _Pair:
    source: str
    target: str
    place: str
    """file:line, for errors."""


def _read_splits(request: DataRequest) -> tuple[dict[str, list[_Pair]], list[Path]]:
    """Return the pairs of each split, and their files."""
    if files := request.split_paths():
        return {name: _read_pairs(file) for name, file in files.items()}, list(files.values())
    file = request.path("a text file whose lines are source<TAB>target")
    pairs = _read_pairs(file)
    indices = split_indices(len(pairs), request.section, request.seed)
    return {name: [pairs[index] for index in each.tolist()] for name, each in indices.items()}, [file]


def _read_pairs(path: Path) -> list[_Pair]:
    pairs, problems = [], []
    for number, line in enumerate(text_lines(path), start=1):
        sides = line.split("\t")
        if len(sides) != 2:
            problems.append(f"{path}:{number} has {len(sides) - 1} tabs, expected source<TAB>target")
        elif not all(side.strip() for side in sides):
            problems.append(f"{path}:{number} has an empty {'target' if sides[0].strip() else 'source'}")
        else:
            pairs.append(_Pair(sides[0], sides[1], f"{path}:{number}"))
    _raise(problems)
    return pairs


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        raise UserError("\n".join([*problems[:10], *more]))


def _read_sources(path: Path, side: _Side, max_len: int, too_long: TooLong) -> PairSource:
    """Read one source text from each line."""
    lines = text_lines(path)
    problems = [
        f"{path}:{number} {'is empty' if not line.strip() else 'has a tab'}, expected one source text"
        for number, line in enumerate(lines, start=1)
        if not line.strip() or "\t" in line
    ]
    encoded = side.encode(lines)
    if too_long != "truncate":  # every line gets a prediction, so none is dropped
        problems += [
            f"{path}:{number} has {len(ids)} tokens, more than data.max_len {max_len}"
            for number, ids in enumerate(encoded, start=1)
            if len(ids) > max_len
        ]
    _raise(problems)
    long = sum(len(ids) > max_len for ids in encoded)
    warnings = _length_warning(long, f"{len(lines):,} lines of {path}", max_len, "", too_long)
    return PairSource(
        Ragged.of([[*ids[:max_len], side.eos_id] for ids in encoded], np.int32), None, side, None, warnings, source=side
    )


# --------------------------------------------------------------------------------------------------------------------
# Encoded pairs


class PairSource:
    """Encoded pairs, padded to the longest of each batch; without targets, sources alone."""

    def __init__(
        self,
        sources: Ragged,
        targets: Ragged | None,
        target: _Side,
        references: Sequence[str] | None,
        warnings: tuple[str, ...] = (),
        *,
        source: _Side,
    ):
        """`targets` hold no special tokens; `target` defines those. `source` made the tokens of the sources."""
        self.warnings = warnings
        self._sources, self._targets, self._references = sources, targets, references
        self._target, self._source = target, source

    def __len__(self) -> int:
        return len(self._sources)

    def texts(self, ids: np.ndarray) -> list[str]:
        """Return what the tokens of sources say, for people."""
        rows = [self._sources.row(each).tolist() for each in ids.tolist()]
        return [self._source.decode([token for token in row if token != self._source.eos_id]) for row in rows]

    def fetch(self, ids: np.ndarray) -> Batch:
        side = self._target
        index = ids.tolist()
        inputs = {"source": padded(map(self._sources.row, index), side.pad_id)}
        batch: Batch = {"inputs": inputs, "ids": torch.from_numpy(ids)}
        if self._targets is not None:
            rows = [self._targets.row(each) for each in index]
            inputs["target"] = padded([np.concatenate(([side.bos_id], row)) for row in rows], side.pad_id)
            batch["targets"] = padded([np.append(row, side.eos_id) for row in rows], IGNORED)
        if self._references is not None:
            batch["references"] = [self._references[each] for each in index]
        return batch


def _encode(
    name: str,
    pairs: Sequence[_Pair],
    source: _Side,
    target: _Side,
    max_len: int,
    too_long: TooLong,
    keep_references: bool,
) -> PairSource:
    sources, targets = source.encode([pair.source for pair in pairs]), target.encode([pair.target for pair in pairs])
    longest = [max(len(first), len(second)) for first, second in zip(sources, targets, strict=True)]
    long = [at for at, length in enumerate(longest) if length > max_len]
    if long and too_long == "error":
        _raise(
            [
                f"{pairs[at].place} has {longest[at]} tokens on a side, more than data.max_len {max_len}; raise it, or "
                "set data.too_long to drop or truncate"
                for at in long
            ]
        )
    kept = range(len(pairs)) if too_long != "drop" else [at for at, length in enumerate(longest) if length <= max_len]
    if not kept:
        raise UserError(
            f"data.max_len {max_len} leaves the split {name!r} without a pair; the shortest has {min(longest)} tokens"
        )
    return PairSource(
        Ragged.of([[*sources[at][:max_len], source.eos_id] for at in kept], np.int32),
        Ragged.of([targets[at][:max_len] for at in kept], np.int32),
        target,
        [pairs[at].target for at in kept] if keep_references else None,
        _length_warning(len(long), f"{len(pairs):,} pairs of the split {name!r}", max_len, " on a side", too_long),
        source=source,
    )


def _length_warning(count: int, of: str, max_len: int, where: str, too_long: TooLong) -> tuple[str, ...]:
    """Return the warning about texts that are too long, if any."""
    done = "dropped" if too_long == "drop" else "truncated"
    return (f"{count:,} of {of} have more than data.max_len {max_len:,} tokens{where} and are {done}",) if count else ()
