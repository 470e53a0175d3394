"""Text for language models: rows of tokens of one length, from shards made once, plain files, or Python itself."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from distrain.config import DataSection, FoldSplit, UserError
from distrain.config.registry import datasets
from distrain.datasets.base import AnySource, Batch, Data, DataMeta, DataRequest
from distrain.datasets.tokens import (
    INDEX_NAME,
    Tokenizer,
    corpus_files,
    load_tokenizer,
    open_shards,
    read_index,
    tokenize_files,
)

_DEFAULT_SPLIT = (0.9, 0.1)
_IN_MEMORY_BYTES = 256 << 20


@datasets.register("tokens", tasks=["language_modeling"])
def tokens(request: DataRequest, seq_len: int, verify: bool = False) -> Data:
    """Token shards made by `distrain data tokenize`, memory-mapped; corpora may be larger than memory.

    `data.path` is such a folder, or one with such folders named train, valid and test; or `data.split` names the folder
    of each split. Row i is the tokens [i * seq_len, (i + 1) * seq_len], across documents and shards; `inputs` are all
    but its last and `targets` all but its first, each (batch, seq_len) int64. Fractions and folds cut the rows of one
    folder into contiguous ranges, so that a document is in two splits only where it crosses a border; [0.9, 0.1] where
    data.split is not given. `verify` hashes every shard at the start.
    """
    folders = _token_folders(request)
    opened, files = {}, []
    loaded: Tokenizer | None = None
    text_bytes = token_count = 0
    for name, folder in folders.items():
        index = read_index(folder)
        this = load_tokenizer("bytes" if index.tokenizer == "bytes" else folder / "tokenizer.json", eos=False)
        this.vocab_size, this.eos_id = index.vocab_size, index.eos_id
        if this.digest != index.tokenizer_digest:
            raise UserError(f"{folder / 'tokenizer.json'} is not the one that made the tokens; copy the folder again")
        if loaded is not None and (this.digest, this.vocab_size) != (loaded.digest, loaded.vocab_size):
            raise UserError(f"{folder} was tokenized with another tokenizer than {folders['train']}")
        if loaded is None:
            loaded, text_bytes, token_count = this, index.bytes, index.tokens
        opened[name] = open_shards(folder, index, verify)
        files += [folder / each for each in (INDEX_NAME, *(shard.file for shard in index.shards))]
    assert loaded is not None
    return _data(request, opened, loaded, seq_len, text_bytes / token_count, files)


@datasets.register("text", tasks=["language_modeling"])
def text(request: DataRequest, seq_len: int = 256, tokenizer: str = "bytes", eos: str | bool = True) -> Data:
    """Plain text files as bytes, memory-mapped, or tokenized at the start with a Hugging Face tokenizer.json.

    `data.path` is a file, or a folder whose files are taken in the order of their names; or `data.split` names the file
    or folder of each split. Bytes are tokens 0 to 255 with nothing between files. `tokenizer` is `bytes` or the path of
    a tokenizer.json, for up to 256 MB; each file is then followed by the token `eos` (true: the usual one, false:
    none). Rows, batches and fractions are as those of `tokens`.
    """
    section = request.section
    paths: dict[str, Path] = (
        {str(name): request.base / path for name, path in section.split.items()}
        if isinstance(section.split, dict)
        else {"train": request.path("a text file, or a folder of them")}
    )
    files = {name: [file for file in corpus_files([path]) if file.stat().st_size] for name, path in paths.items()}
    for name, found in files.items():
        if not found:
            raise UserError(f"there is no text in {paths[name]}")
    every = [file for found in files.values() for file in found]
    if tokenizer == "bytes":
        if eos is not True:
            raise UserError(f"data.eos: {eos!r} is for a tokenizer; bytes have no token between files")
        mapped = {
            name: [np.asarray(np.memmap(file, dtype=np.uint8, mode="r")) for file in found]
            for name, found in files.items()
        }
        return _data(request, mapped, load_tokenizer("bytes", eos=False), seq_len, 1.0, every)

    size = sum(file.stat().st_size for file in every)
    if size > _IN_MEMORY_BYTES:
        raise UserError(
            f"{size / 1e6:.0f} MB of text is more than the {_IN_MEMORY_BYTES / 1e6:.0f} MB that are tokenized at every "
            f"start; make shards once with 'distrain data tokenize', and use the data set 'tokens'"
        )
    loaded = load_tokenizer(request.base / tokenizer, eos)
    encoded = {name: tokenize_files(found, loaded) for name, found in files.items()}
    train_tokens, train_bytes = encoded["train"]
    shards = {name: [each] for name, (each, _) in encoded.items()}
    return _data(request, shards, loaded, seq_len, train_bytes / max(1, len(train_tokens)), every)


_NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}


@datasets.register("python_source", tasks=["language_modeling"])
def python_source(request: DataRequest, seq_len: int = 256, max_bytes: int = 8_000_000) -> Data:
    """The running interpreter's own standard library as bytes: a real corpus that needs no download.

    The .py files of the library (but for its tests, and packages installed beside it), at most `max_bytes` of them, in
    the order of the hashes of their paths: always the same, and mixed, so that what is held out is like the rest. It
    differs between versions of Python. Rows, batches and fractions are as those of `tokens`.
    """
    if request.section.path is not None:
        raise UserError("data.path: data set 'python_source' takes none; for files of your own use data set 'text'")
    if isinstance(request.section.split, dict):
        raise UserError("data.split: data set 'python_source' is one piece; give fractions such as [0.9, 0.1]")
    library = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, within, files in os.walk(library):
        # many thousands of files may be installed beside the library
        within[:] = [name for name in within if name not in _NOT_SOURCE]
        inside = Path(folder).relative_to(library)
        names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    content = bytearray()
    for name in sorted(names, key=lambda name: xxhash.xxh3_128_digest(name.encode())):
        if not name.startswith("_sysconfigdata"):
            content += (library / name).read_bytes()
            if len(content) >= max_bytes:
                break
    if not content:
        raise UserError(f"this Python keeps no source of its standard library in {library}")
    array = np.frombuffer(bytes(content[:max_bytes]), dtype=np.uint8)
    return _data(request, {"train": [array]}, load_tokenizer("bytes", eos=False), seq_len, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# What they share


class TokenRows:
    """Rows of `seq_len` tokens, and the one after, of the sequence that `shards`, each (tokens,), are together."""

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, spans: Sequence[range]):
        """`spans` are the row numbers that this split has, in order."""
        self._shards = shards
        self._seq_len = seq_len
        self._begins = np.cumsum([0, *(len(shard) for shard in shards)])
        lengths = np.array([len(span) for span in spans], dtype=np.int64)
        self._span_ends = np.cumsum(lengths)
        # What is added to an id to make it a row number, in each span.
        self._shifts = np.array([span.start for span in spans], dtype=np.int64) - (self._span_ends - lengths)

    def __len__(self) -> int:
        return int(self._span_ends[-1])

    def fetch(self, ids: np.ndarray) -> Batch:
        shift = self._shifts[np.searchsorted(self._span_ends, ids, side="right")]
        begins = (ids + shift) * self._seq_len
        homes = np.searchsorted(self._begins, begins, side="right") - 1
        offsets = begins - self._begins[homes]
        tokens = np.empty((len(ids), self._seq_len + 1), self._shards[0].dtype)
        for row, (home, offset) in enumerate(zip(homes.tolist(), offsets.tolist(), strict=True)):
            part = self._shards[home][offset : offset + self._seq_len + 1]
            tokens[row] = part if len(part) == self._seq_len + 1 else self._across(part, home)
        return {
            "inputs": torch.from_numpy(tokens[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(tokens[:, 1:].astype(np.int64)),
            "ids": torch.from_numpy(ids),
        }

    def _across(self, part: np.ndarray, home: int) -> np.ndarray:
        """Return the row that begins with `part`, the end of the shard `home`, and goes on in those that follow."""
        parts = [part]
        while missing := self._seq_len + 1 - sum(map(len, parts)):
            home += 1
            parts.append(self._shards[home][:missing])
        return np.concatenate(parts)


class Prompts:
    """Beginnings of text to continue; their batches have no targets."""

    def __init__(self, prompts: Sequence[np.ndarray], pad_id: int):
        self._prompts = prompts
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._prompts)

    def fetch(self, ids: np.ndarray) -> Batch:
        """`inputs` (batch, longest) int64, filled up on the right; `lengths` (batch,) int64."""
        rows = [self._prompts[index] for index in ids.tolist()]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        inputs = np.full((len(rows), lengths.max(initial=0)), self._pad_id, dtype=np.int64)
        for at, row in enumerate(rows):
            inputs[at, : len(row)] = row
        return {
            "inputs": torch.from_numpy(inputs),
            "lengths": torch.from_numpy(lengths),
            "ids": torch.from_numpy(ids),
        }


def _data(
    request: DataRequest,
    shards: dict[str, list[np.ndarray]],
    tokenizer: Tokenizer,
    seq_len: int,
    bytes_per_token: float,
    files: Sequence[Path] = (),
) -> Data:
    if seq_len < 1:
        raise UserError(f"data.seq_len {seq_len} should be at least 1")
    if request.section.stratify:
        raise UserError(
            f"data.stratify: the rows of data set {request.section.name!r} have no classes to keep the shares of"
        )
    state = {"tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    if request.state is not None and request.state != state:
        raise UserError(
            f"the text is tokenized with {tokenizer.name} ({tokenizer.vocab_size} tokens), and the model was trained "
            f"on {request.state.get('tokenizer')} ({request.state.get('vocab_size')} tokens) or another version of it; "
            "use the tokenizer of the training"
        )
    if "train" not in shards:
        raise UserError(f"data.split names {', '.join(shards)} and no folder or file for train")
    rows = {name: (sum(map(len, each)) - 1) // seq_len for name, each in shards.items()}
    for name, count in rows.items():
        if count < 1:
            raise UserError(
                f"the split {name!r} has {sum(map(len, shards[name]))} tokens, and one row takes data.seq_len + 1 = "
                f"{seq_len + 1}"
            )
    whole = len(shards) == 1 and not isinstance(request.section.split, dict)
    splits: dict[str, AnySource] = (
        {
            name: TokenRows(shards["train"], seq_len, spans)
            for name, spans in _row_spans(rows["train"], request.section).items()
        }
        if whole
        else {name: TokenRows(each, seq_len, [range(rows[name])]) for name, each in shards.items()}
    )
    meta = DataMeta(
        input_shape=(seq_len,),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokens_per_sample=seq_len,
        bytes_per_token=bytes_per_token,
        decode=tokenizer.decode,
    )
    return Data(splits, meta, state, lambda path: _read_prompts(path, tokenizer), files)


def _row_spans(rows: int, section: DataSection) -> dict[str, list[range]]:
    """Return the contiguous ranges of rows of each split."""
    split: Any = section.split or list(_DEFAULT_SPLIT)
    if isinstance(split, FoldSplit):
        if split.fold > split.of or split.of > rows:
            raise UserError(
                f"data.split: fold {split.fold} of {split.of} of {rows} rows does not exist; folds are numbered from "
                "1, and each needs a row"
            )
        start, stop = (rows * edge // split.of for edge in (split.fold - 1, split.fold))
        return {"train": [range(start), range(stop, rows)], "test": [range(start, stop)]}
    names = {1: ["train"], 2: ["train", "test"], 3: ["train", "valid", "test"]}.get(len(split))
    if names is None or abs(sum(split) - 1) > 1e-6:
        raise UserError(
            f"data.split: {split} should be the fractions of [train, test] or [train, valid, test], and add up to 1"
        )
    edges = [round(rows * edge) for edge in np.cumsum([0.0, *split]).tolist()]
    spans = {name: [range(*edges[at : at + 2])] for at, name in enumerate(names)}
    if empty := [name for name, (span,) in spans.items() if not len(span)]:
        raise UserError(f"data.split: {split} of {rows} rows leave {' and '.join(empty)} without one")
    return spans


def _token_folders(request: DataRequest) -> dict[str, Path]:
    if isinstance(request.section.split, dict):
        return {name: request.base / path for name, path in request.section.split.items()}
    folder = request.path("a folder of tokens made by 'distrain data tokenize'")
    parts = {name: folder / name for name in ("train", "valid", "test") if (folder / name / INDEX_NAME).is_file()}
    if (folder / INDEX_NAME).is_file() or not parts:
        return {"train": folder}
    if request.section.split is not None:
        raise UserError(f"data.split: {folder} holds the splits {', '.join(parts)} already; leave data.split out")
    return parts


def _read_prompts(path: Path, tokenizer: Tokenizer) -> Prompts:
    """Read one prompt from each line of a UTF-8 text file."""
    if not path.is_file():
        raise UserError(f"there is no file at {path}; prompts are read from a text file, one a line")
    lines = [line.removesuffix(b"\r") for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty; prompts are one a line")
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number} is not UTF-8 text: {error}") from error
        if not line:
            raise UserError(f"{path}, line {number} is empty; a prompt needs at least one character")
    return Prompts(tokenizer.encode(lines), tokenizer.eos_id or 0)
