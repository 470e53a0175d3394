"""Text for language models: rows of tokens of one length, from shards made once, plain files, or Python itself."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from distrain.config import DataSection, FoldSplit, UserError
from distrain.config.registry import datasets
from distrain.datasets.base import (
    Batch,
    Data,
    DataMeta,
    DataRequest,
    check_folds,
    check_split_sizes,
    split_fractions,
)
from distrain.datasets.nested import padded
from distrain.datasets.token_rows import TokenRows
from distrain.datasets.tokens import (
    INDEX_NAME,
    TOKENIZER_NAME,
    ShardIndex,
    Tokenizer,
    corpus_files,
    load_tokenizer,
    open_shards,
    read_index,
    text_lines,
    tokenize_files,
)
from distrain.system.numbers import counted

_DEFAULT_SPLIT = (0.9, 0.1)
_IN_MEMORY_BYTES = 256 << 20


@datasets.register("tokens", tasks=["language_modeling"])
def tokens(request: DataRequest, seq_len: int, verify: bool = False) -> Data:
    """Token shards made by `distrain data tokenize`, memory-mapped; corpora may be larger than memory.

    `data.path` is such a folder, or one with such folders named train, valid and test; or `data.split` names the folder
    of each split. Row i is the tokens [i * seq_len, (i + 1) * seq_len], across documents and shards; `inputs` are all
    but its last and `targets` all but its first, each (batch, seq_len) int64. Fractions (by default [0.9, 0.1]) and
    folds cut the rows of one folder into contiguous ranges, so that only documents at a border are in two splits.
    `verify` hashes every shard at the start.
    """
    folders = _token_folders(request)
    indices = {name: read_index(folder) for name, folder in folders.items()}
    loaded = {name: _shards_tokenizer(folders[name], index) for name, index in indices.items()}
    train = loaded["train"]
    for name, other in loaded.items():
        if (other.digest, other.vocab_size) != (train.digest, train.vocab_size):
            raise UserError(f"{folders[name]} was tokenized with another tokenizer than {folders['train']}")
    opened = {name: open_shards(folders[name], index, verify) for name, index in indices.items()}
    files = [
        folders[name] / file
        for name, index in indices.items()
        for file in (INDEX_NAME, *(shard.file for shard in index.shards))
    ]
    return _data(
        request, opened, train, seq_len, {name: each.bytes / each.tokens for name, each in indices.items()}, files
    )


def _shards_tokenizer(folder: Path, index: ShardIndex) -> Tokenizer:
    tokenizer = load_tokenizer("bytes" if index.tokenizer == "bytes" else folder / TOKENIZER_NAME, eos=False)
    tokenizer.vocab_size, tokenizer.eos_id = index.vocab_size, index.eos_id
    if tokenizer.digest != index.tokenizer_digest:
        raise UserError(f"{folder / TOKENIZER_NAME} is not the one that made the tokens; copy the folder again")
    return tokenizer


@datasets.register("text", tasks=["language_modeling"])
def text(request: DataRequest, seq_len: int = 256, tokenizer: str = "bytes", eos: str | bool = True) -> Data:
    """Plain text files as bytes, memory-mapped, or tokenized at the start with a Hugging Face tokenizer.json.

    `data.path` is a file, or a folder whose files are read in the order of their names; or `data.split` names the file
    or folder of each split. Bytes are tokens 0 to 255 with nothing between files. `tokenizer` is `bytes` or the path of
    a tokenizer.json, for up to 256 MB; the token `eos` then follows each file (true: the usual one, false: none). Rows,
    batches and fractions are as in `tokens`.
    """
    if request.inputs_only:
        known = (
            load_tokenizer(tokenizer, False) if tokenizer == "bytes" else load_tokenizer(request.base / tokenizer, eos)
        )
        return _data(request, {}, known, seq_len, None)
    paths = request.split_paths() or {"train": request.path("a text file, or a folder of them")}
    files = {name: [file for file in corpus_files([path]) if file.stat().st_size] for name, path in paths.items()}
    for name, found in files.items():
        if not found:
            raise UserError(f"there is no text in {paths[name]}")
    every = [file for found in files.values() for file in found]
    if tokenizer == "bytes":
        if eos is not True:
            raise UserError(f"data.eos: {eos!r} needs a tokenizer; bytes have no token between files")
        mapped = {
            name: [np.asarray(np.memmap(file, dtype=np.uint8, mode="r")) for file in found]
            for name, found in files.items()
        }
        return _data(request, mapped, load_tokenizer("bytes", eos=False), seq_len, {"train": 1.0}, every)

    size = sum(file.stat().st_size for file in every)
    if size > _IN_MEMORY_BYTES:
        raise UserError(
            f"{size / 1e6:.0f} MB of text is more than the {_IN_MEMORY_BYTES / 1e6:.0f} MB that are tokenized at every "
            "start; make shards once with 'distrain data tokenize', and use the data set 'tokens'"
        )
    loaded = load_tokenizer(request.base / tokenizer, eos)
    encoded = {name: tokenize_files(found, loaded) for name, found in files.items()}
    shards = {name: [each] for name, (each, _) in encoded.items()}
    sizes = {name: count / max(1, len(each)) for name, (each, count) in encoded.items()}
    return _data(request, shards, loaded, seq_len, sizes, every)


_NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}


@datasets.register("python_source", tasks=["language_modeling"])
def python_source(request: DataRequest, seq_len: int = 256, max_bytes: int = 8_000_000) -> Data:
    """The running interpreter's own standard library as bytes: a real corpus that needs no download.

    The .py files of the library without its tests and installed packages, at most `max_bytes` of them, in the order of
    the hashes of their paths: always the same, and mixed, so that the test split is like the training split. It differs
    between versions of Python. Rows, batches and fractions are as in `tokens`.
    """
    if request.section.path is not None:
        raise UserError("data.path: data set 'python_source' takes none; for your own files use data set 'text'")
    if request.inputs_only:
        return _data(request, {}, load_tokenizer("bytes", eos=False), seq_len, None)
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
        raise UserError(f"this Python has no source of its standard library in {library}")
    array = np.frombuffer(bytes(content[:max_bytes]), dtype=np.uint8)
    return _data(request, {"train": [array]}, load_tokenizer("bytes", eos=False), seq_len, {"train": 1.0})


# --------------------------------------------------------------------------------------------------------------------
# Rows of tokens


class Prompts:
    """Prompts for a language model; their batches have no targets."""

    def __init__(self, prompts: Sequence[np.ndarray], pad_id: int):
        self._prompts = prompts
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._prompts)

    def fetch(self, ids: np.ndarray) -> Batch:
        """`inputs`: (batch, longest) int64, padded on the right; `lengths`: (batch,) int64."""
        rows = [self._prompts[index] for index in ids.tolist()]
        return {
            "inputs": padded(rows, self._pad_id),
            "lengths": torch.tensor([len(row) for row in rows]),
            "ids": torch.from_numpy(ids),
        }


def _data(
    request: DataRequest,
    shards: dict[str, list[np.ndarray]],
    tokenizer: Tokenizer,
    seq_len: int,
    bytes_per_token: Mapping[str, float] | None,
    files: Sequence[Path] = (),
) -> Data:
    """`bytes_per_token`: of the text of each split that has its own; of the others it is that of `train`."""
    if seq_len < 1:
        raise UserError(f"data.seq_len {seq_len} should be at least 1")
    state = {"tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    if request.state is not None and request.state != state:
        raise UserError(
            f"the text is tokenized with {tokenizer.name} ({tokenizer.vocab_size} tokens), but the model was trained "
            f"with {request.state.get('tokenizer')} ({request.state.get('vocab_size')} tokens) or another version of "
            "it; use the tokenizer of the training"
        )
    rows = {name: (sum(map(len, each)) - 1) // seq_len for name, each in shards.items()}
    for name, count in rows.items():
        if count < 1:
            raise UserError(
                f"the split {name!r} has {counted(sum(map(len, shards[name])), 'token')}, and one row takes "
                f"data.seq_len + 1 = {seq_len + 1}"
            )
    if len(shards) == 1 and not isinstance(request.section.split, dict):
        spans = _row_spans(rows["train"], request.section)
    else:
        spans = {name: [range(count)] for name, count in rows.items()}
    splits: dict[str, TokenRows] = {
        name: TokenRows(shards.get(name, shards["train"]), seq_len, each) for name, each in spans.items()
    }
    for name, source in splits.items():
        source.bytes_per_token = (bytes_per_token or {}).get(name)
    meta = DataMeta(
        input_shape=(seq_len,),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokens_per_sample=seq_len,
        bytes_per_token=None if bytes_per_token is None else bytes_per_token["train"],
        decode=tokenizer.decode,
    )

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer.encode([text.encode()])[0]]

    return Data(dict(splits), meta, state, lambda path: _read_prompts(path, tokenizer), files, encode=encode)


def _row_spans(rows: int, section: DataSection) -> dict[str, list[range]]:
    """Return the contiguous ranges of rows of each split."""
    if isinstance(section.split, FoldSplit):
        check_folds(section.split, rows)
        start, stop = (rows * edge // section.split.of for edge in (section.split.fold - 1, section.split.fold))
        return {"train": [range(start), range(stop, rows)], "test": [range(start, stop)]}
    fractions = split_fractions(section, _DEFAULT_SPLIT)
    edges = [round(rows * edge) for edge in np.cumsum([0.0, *fractions.values()]).tolist()]
    spans = {name: [range(*edges[at : at + 2])] for at, name in enumerate(fractions)}
    check_split_sizes(fractions, {name: len(span) for name, (span,) in spans.items()})
    return spans


def _token_folders(request: DataRequest) -> dict[str, Path]:
    if paths := request.split_paths():
        return paths
    folder = request.path("a folder of tokens made by 'distrain data tokenize'")
    parts = {name: folder / name for name in ("train", "valid", "test") if (folder / name / INDEX_NAME).is_file()}
    if (folder / INDEX_NAME).is_file() or not parts:
        return {"train": folder}
    if request.section.split is not None:
        raise UserError(f"data.split: {folder} holds the splits {', '.join(parts)} already; remove data.split")
    return parts


def _read_prompts(path: Path, tokenizer: Tokenizer) -> Prompts:
    """Read one prompt from each line of a UTF-8 text file."""
    lines = text_lines(path)
    if "" in lines:
        raise UserError(f"{path}:{lines.index('') + 1} is empty; a prompt needs at least one character")
    return Prompts(tokenizer.encode([line.encode() for line in lines]), tokenizer.eos_id or 0)
