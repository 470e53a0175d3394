"""Token shards: text files -> memory-mapped tokens. Imports no torch.

`tokenize_corpus` streams text of any size into a folder of

    index.json          dtype, tokenizer, vocabulary, and for each shard its tokens, bytes of text, documents and hash
    tokens-00000.bin …  the tokens, little-endian, nothing else
    tokenizer.json      the tokenizer, unless it is bytes

`open_shards` maps such a folder.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import xxhash

from distrain.config import UserError
from distrain.run.json_files import fsync
from distrain.system.bounded_json import SUMMARY, read_bounded, read_json
from distrain.system.processes import umask

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT = 1

# --------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer(Protocol):
    """Text <-> token numbers."""

    name: str
    """`bytes`, or the name of its file."""
    digest: str
    """Hash of its content; tokens of different tokenizers do not mix."""
    vocab_size: int
    """One more than the largest token number."""
    eos_id: int | None
    """The token between documents."""

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each text, without EOS."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens have none."""
        ...


class ByteTokenizer:
    """Each byte is its own token; 256 is EOS."""

    name = "bytes"
    digest = "bytes"
    vocab_size = 257
    eos_id: int | None = 256

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(number for number in ids if 0 <= number < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json."""

    USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")

    def __init__(self, path: Path, eos: str | bool = True):
        """`eos`: True finds a token by the usual names, False means none, text names the token."""
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        if not path.is_file():
            raise UserError(
                f"there is no tokenizer at {path}; give 'bytes', or the path of a Hugging Face tokenizer.json"
            )
        try:
            content = read_bounded(path, SUMMARY)
            self._tokenizer = HuggingFaceTokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = path.name
        self.digest = xxhash.xxh3_128_hexdigest(content)
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        self.eos_id = None if eos is False else self.first_id(self.USUAL_EOS if eos is True else [str(eos)])
        if self.eos_id is None and eos is True:
            raise UserError(
                f"{path} has none of the usual end-of-text tokens ({', '.join(self.USUAL_EOS)}); name its own with "
                "eos, or turn the separator off with eos: false"
            )
        if self.eos_id is None and eos is not False:
            raise UserError(f"eos: {path} has no token {eos!r}")

    def first_id(self, names: Iterable[str]) -> int | None:
        """Return the number of the first of these tokens that exists."""
        return next((self.vocabulary[name] for name in names if name in self.vocabulary), None)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(number) for number in ids if number >= 0], skip_special_tokens=True))


def load_tokenizer(spec: str | Path, eos: str | bool = True) -> Tokenizer:
    """Return the tokenizer `bytes`, or the one of a tokenizer.json at that path."""
    if spec != "bytes":
        return FileTokenizer(Path(spec), eos)
    if not isinstance(eos, bool):
        raise UserError(f"eos: found {eos!r}, expected true (256) or false for bytes")
    tokenizer = ByteTokenizer()
    if not eos:
        tokenizer.eos_id, tokenizer.vocab_size = None, 256
    return tokenizer


def frequent_tokens(
    counts: Mapping[str, int], specials: Sequence[str], min_count: int, max_vocab: int | None
) -> list[str]:
    """Return the tokens of a training split that a vocabulary has besides special ones, the most frequent first."""
    frequent = sorted(
        ((token, count) for token, count in counts.items() if count >= min_count and token not in specials),
        key=lambda each: (-each[1], each[0]),
    )
    if not frequent:
        raise UserError(f"data.min_count {min_count}: no token of the training split is as frequent; lower it")
    return [token for token, _ in frequent[:max_vocab]]


# --------------------------------------------------------------------------------------------------------------------
# Reading text, in pieces of bounded size

_PIECE_BYTES = 4 << 20
_UNIT_BYTES = 1 << 20

Documents = Literal["file", "line"]


@dataclass(frozen=True)
class _Piece:
    """A document, or part of a long one."""

    text: bytes
    ends_document: bool
    source: str
    """Its origin, for errors."""


def _pieces(path: Path, documents: Documents, field: str) -> Iterator[_Piece]:
    inner = Path(path.stem) if path.suffix == ".gz" else path
    if inner.suffix == ".parquet":
        yield from _parquet_pieces(path, field)
        return
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            if inner.suffix in (".jsonl", ".ndjson"):
                yield from _jsonl_pieces(path, file, field)
            elif documents == "line":
                for number, line in enumerate(file, start=1):
                    if text := line.rstrip(b"\r\n"):
                        yield from _cut([text], f"{path}, line {number}")
            else:
                yield from _cut(iter(partial(file.read, _PIECE_BYTES), b""), str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error


def _jsonl_pieces(path: Path, file: IO[bytes], field: str) -> Iterator[_Piece]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{path}, line {number}: expected an object with text under {field!r}; name its key with field"
            )
        try:
            yield from _cut([text.encode()], f"{path}, line {number}")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}, line {number} holds half of a surrogate pair, which is not text: {error}"
            ) from error


def _parquet_pieces(path: Path, field: str) -> Iterator[_Piece]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    with file:
        if field not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
        rows = itertools.chain.from_iterable(
            batch.column(0) for batch in file.iter_batches(batch_size=256, columns=[field])
        )
        for number, value in enumerate(rows, start=1):
            text = value.as_py()
            if not isinstance(text, str):
                raise UserError(f"{path}, row {number}: column {field!r} holds {type(text).__name__}, not text")
            yield from _cut([text.encode()], f"{path}, row {number}")


def _cut(chunks: Iterable[bytes], source: str) -> Iterator[_Piece]:
    """Cut one document, given in chunks, into pieces of at most `_PIECE_BYTES`."""
    rest = b""
    for chunk in chunks:
        rest = rest + chunk if rest else chunk
        start = 0
        while len(rest) - start > _PIECE_BYTES:
            length = _good_cut(rest[start : start + _PIECE_BYTES + 1])
            yield _Piece(rest[start : start + length], False, source)
            start += length
        rest = rest[start:]
    if rest:
        yield _Piece(rest, True, source)


# from the best place to cut, where the parts have the tokens of the whole, to the worst
_CUTS = (re.compile(rb"(?<=\S)\n(?=\S)"), re.compile(rb"(?<=\S)(?= \S)"), re.compile(rb"(?<=\s)(?=\S)"))


def _good_cut(text: bytes) -> int:
    """Return how much of `text` to take, less than all: up to the last good place in its last quarter."""
    for pattern in _CUTS:
        places = [match.end() for match in pattern.finditer(text, len(text) * 3 // 4) if match.end() < len(text)]
        if places:
            return places[-1]
    # the last byte belongs to the next piece, with the rest of its UTF-8 sequence
    end = len(text) - 1
    return next((at for at in range(end, max(end - 4, 1), -1) if text[at] & 0xC0 != 0x80), end)


def _units(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces into units of work of about `_UNIT_BYTES`."""
    unit: list[_Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= _UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


# --------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    bytes: int
    """Bytes of source text."""
    documents: int
    """Documents that end in it."""
    xxh3_128: str
    """Hash of the file."""


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json."""

    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    eos_id: int | None
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def tokenize_corpus(
    paths: Sequence[Path],
    out_dir: Path,
    tokenizer: str | Path = "bytes",
    *,
    shard_tokens: int = 100_000_000,
    eos: str | bool = True,
    documents: Documents = "file",
    field: str = "text",
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Tokenize text files into shards in `out_dir`, which must not exist yet, and return its index.

    `paths` are files, or folders whose files, except hidden ones, are read in the order of their names; `.jsonl` holds
    a document a line and `.parquet` a document a row, both under `field`; any other file is text, and is one document
    or, with `documents="line"`, one document a line (blank ones are skipped). `.gz` is unpacked. `tokenizer` is `bytes`
    or the path of a Hugging Face tokenizer.json. EOS follows each document (`eos`: True is the usual token, False none,
    text names the token).

    Memory is bounded by the longest line: documents longer than 4 MiB are tokenized in pieces cut between lines. A
    shard ends with the first piece that brings it to `shard_tokens`. The result depends neither on `workers` nor on the
    machine. `progress` is called with the bytes of text since the last call. The folder appears by one rename after
    everything in it is on disk.

    Raises UserError for files that are missing, unreadable or not UTF-8 (`bytes` takes anything), for a corpus without
    text, and if `out_dir` exists.
    """
    if shard_tokens < 1 or workers < 1:
        raise UserError(f"shard_tokens ({shard_tokens}) and workers ({workers}) should be at least 1")
    files = corpus_files(paths)
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; remove it, or write to another folder")
    loaded = load_tokenizer(tokenizer, eos)
    dtype: Literal["uint16", "uint32"] = "uint16" if loaded.vocab_size <= 1 << 16 else "uint32"
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{out_dir.name}-", dir=out_dir.parent))
    try:
        pieces = itertools.chain.from_iterable(_pieces(path, documents, field) for path in files)
        writer = _ShardWriter(folder, np.dtype(dtype).newbyteorder("<"), shard_tokens)
        with contextlib.closing(writer):
            for unit, encoded in _encoded(_units(pieces), loaded, tokenizer, eos, workers):
                for piece, tokens in zip(unit, encoded, strict=True):
                    writer.add(tokens, len(piece.text), loaded.eos_id, piece.ends_document)
                if progress:
                    progress(sum(len(piece.text) for piece in unit))
        if not writer.shards:
            raise UserError(f"there is no text in {', '.join(str(path) for path in paths)}")
        if tokenizer != "bytes":
            shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
        index = ShardIndex(dtype, loaded.name, loaded.digest, loaded.vocab_size, loaded.eos_id, tuple(writer.shards))
        content = {"format": FORMAT, **asdict(index), "tokens": index.tokens, "bytes": index.bytes}
        (folder / INDEX_NAME).write_text(json.dumps(content, indent=1) + "\n")
        for path in folder.iterdir():
            fsync(path)
        fsync(folder)
        folder.chmod(0o777 & ~umask())  # mkdtemp makes folders for one user only
        folder.rename(out_dir)
        fsync(out_dir.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return index


def corpus_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among `paths` and those in its folders except hidden ones, folder by folder by name."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is nothing at {path}")
        found = [path]
        if path.is_dir():
            names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
            found = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not found:
            raise UserError(f"the folder {path} has no files")
        files += found
    if not files:
        raise UserError("found no file to tokenize, expected at least one")
    return files


def tokenize_files(files: Iterable[Path], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Return the tokens of small files, each followed by EOS if there is one, and their bytes of text."""
    parts: list[np.ndarray] = []
    size = 0
    for unit in _units(itertools.chain.from_iterable(_pieces(path, "file", "text") for path in files)):
        for piece, tokens in zip(unit, _encode_unit(tokenizer, unit), strict=True):
            parts.append(tokens)
            if piece.ends_document and tokenizer.eos_id is not None:
                parts.append(np.array([tokenizer.eos_id], tokens.dtype))
            size += len(piece.text)
    return np.concatenate(parts) if parts else np.empty(0, np.uint32), size


class _ShardWriter:
    """Writes pieces of tokens into consecutive shards."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int):
        self.shards: list[Shard] = []
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._file: IO[bytes] | None = None

    def add(self, tokens: np.ndarray, text_bytes: int, eos_id: int | None, ends_document: bool) -> None:
        if self._file is None:
            self._file = (self._folder / f"tokens-{len(self.shards):05d}.bin").open("wb")
            self._hash = xxhash.xxh3_128()
            self._tokens = self._bytes = self._documents = 0
        if ends_document and eos_id is not None:
            tokens = np.append(tokens, np.asarray(eos_id, tokens.dtype))
        data = tokens.astype(self._dtype, copy=False).data
        self._file.write(data)
        self._hash.update(data)
        self._tokens += len(tokens)
        self._bytes += text_bytes
        self._documents += ends_document
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """End the current shard, if any; drops one without tokens (text that encodes to nothing)."""
        if self._file is None:
            return
        self._file.close()
        path, self._file = Path(self._file.name), None
        if self._tokens:
            self.shards.append(Shard(path.name, self._tokens, self._bytes, self._documents, self._hash.hexdigest()))
        else:
            path.unlink()


_worker_tokenizer: Tokenizer


def _start_worker(spec: str | Path, eos: str | bool) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = load_tokenizer(spec, eos)


def _encode_in_worker(unit: list[_Piece]) -> list[np.ndarray]:
    return _encode_unit(_worker_tokenizer, unit)


def _encode_unit(tokenizer: Tokenizer, unit: list[_Piece]) -> list[np.ndarray]:
    try:
        return tokenizer.encode([piece.text for piece in unit])
    except UnicodeDecodeError:
        for piece in unit:
            try:
                piece.text.decode()
            except UnicodeDecodeError as error:
                found = piece.text[error.start : error.end]
                raise UserError(
                    f"{piece.source} is not UTF-8 text: {error.reason} {found!r}; "
                    "convert it, or use the tokenizer 'bytes'"
                ) from None
        raise


def _encoded(
    units: Iterator[list[_Piece]], tokenizer: Tokenizer, spec: str | Path, eos: str | bool, workers: int
) -> Iterator[tuple[list[_Piece], list[np.ndarray]]]:
    """Yield each unit with its tokens, in order, with at most a few units in memory for each worker."""
    if workers == 1:
        for unit in units:
            yield unit, _encode_unit(tokenizer, unit)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (spec, eos))
    waiting: deque[tuple[list[_Piece], Future[list[np.ndarray]]]] = deque()
    try:
        for unit in units:
            waiting.append((unit, pool.submit(_encode_in_worker, unit)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read_index(folder: Path) -> ShardIndex:
    """Return the index of a folder of shards; raises UserError, naming the file, if it is invalid."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UserError(f"there is no {INDEX_NAME} in {folder}; make a folder of tokens with 'distrain data tokenize'")
    try:
        content = read_json(path, SUMMARY)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, and this version reads {FORMAT}; tokenize again")
        fields = {key: content[key] for key in ("dtype", "tokenizer", "tokenizer_digest", "vocab_size", "eos_id")}
        index = ShardIndex(**fields, shards=tuple(Shard(**shard) for shard in content["shards"]))
        assert index.dtype in ("uint16", "uint32")
        assert index.shards
        assert all(shard.tokens > 0 and Path(shard.file).name == shard.file for shard in index.shards)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} is not an index of tokens ({type(error).__name__}: {error}); tokenize again"
        ) from error
    return index


def text_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, ended by LF or CRLF; other line separators of Unicode are text."""
    if not path.is_file():
        raise UserError(f"there is no file at {path}")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number} is not UTF-8 text: {error.reason}") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def open_shards(folder: Path, index: ShardIndex, verify: bool = False) -> list[np.ndarray]:
    """Map the shards of a folder, each (tokens,) uint16 or uint32, after checking their sizes and, with `verify`,
    their hashes. Raises UserError naming each file that differs from the index."""
    dtype = np.dtype(index.dtype).newbyteorder("<")
    problems = []
    for shard in index.shards:
        path = folder / shard.file
        expected = shard.tokens * dtype.itemsize
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (size := path.stat().st_size) != expected:
            problems.append(f"{path} has {size} bytes, and {INDEX_NAME} says {expected}")
        elif verify and hash_file(path) != shard.xxh3_128:
            problems.append(f"{path} changed after it was written: its hash differs from the one in {INDEX_NAME}")
    if problems:
        raise UserError("\n".join([*problems, "copy the folder again, or tokenize again"]))
    # a plain array over the map: slicing numpy's memmap class costs several times as much
    return [np.asarray(np.memmap(folder / shard.file, dtype=dtype, mode="r")) for shard in index.shards]


def hash_file(path: Path) -> str:
    """Return the hash of a file's content (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
