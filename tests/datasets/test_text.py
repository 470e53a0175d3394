from __future__ import annotations

import copy
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

import distrain.datasets.tokens
from distrain.config import DataSection, UserError
from distrain.datasets import text
from distrain.datasets.base import Data, DataRequest
from distrain.datasets.text import TokenRows
from distrain.datasets.tokens import open_shards, read_index, tokenize_corpus
from distrain.datasets.user import named_data


def build(name: str, base: Path, state: dict[str, Any] | None = None, **section: Any) -> Data:
    return named_data(
        DataRequest(DataSection(name=name, **section), "language_modeling", seed=0, base=base, state=state)
    )


def rows(data: Data, split: str) -> list[list[int]]:
    source: Any = data.splits[split]
    return source.fetch(np.arange(len(source)))["inputs"].tolist()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer trained on a few words, which can write any text."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat on the mat\n" * 20], vocab_size=300, special_tokens=["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


# --------------------------------------------------------------------------------------------------------------------
# Rows


@given(data=st.data())
def test_rows_are_slices_of_the_whole_sequence_whatever_the_shards(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    seq_len = data.draw(st.integers(1, 9))
    whole = np.arange(sum(lengths), dtype=np.uint16)
    count = (len(whole) - 1) // seq_len
    if count < 1:
        return
    cut = data.draw(st.integers(0, count))
    skip = data.draw(st.integers(0, count - cut))
    spans = [range(cut), range(cut + skip, count)]
    numbers = [*spans[0], *spans[1]]
    shards = np.split(whole, np.cumsum(lengths)[:-1])
    if data.draw(st.booleans()):  # as separate files are: anywhere in memory, in any order
        shards = [part.copy() for part in shards][:: data.draw(st.sampled_from([1, -1]))]
        whole = np.concatenate(shards)
    source = TokenRows(shards, seq_len, spans)
    assert len(source) == len(numbers)
    ids = np.array(data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=6)) if numbers else [], dtype=np.int64)
    batch = source.fetch(ids)
    assert batch["inputs"].shape == batch["targets"].shape == (len(ids), seq_len)
    for at, index in enumerate(ids.tolist()):
        begin = numbers[index] * seq_len
        assert batch["inputs"][at].tolist() == whole[begin : begin + seq_len].tolist()
        assert batch["targets"][at].tolist() == whole[begin + 1 : begin + seq_len + 1].tolist()
    assert batch["ids"].tolist() == ids.tolist()


def test_rows_of_a_batch_are_copied_at_once_from_all_shards() -> None:
    whole = np.arange(64_000).astype(np.uint16)
    source = TokenRows([part.copy() for part in np.split(whole, 64)], 10, [range(6399)])
    inside = np.array([number for number in range(6399) if number % 100 < 99], dtype=np.int64)

    def lines(ids: np.ndarray) -> int:
        """Return how many lines of Python a batch takes."""
        count = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            source.fetch(ids)
        finally:
            sys.settrace(before)
        return count

    assert lines(inside[::1000]) == lines(inside) < 20
    for made in (source, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        found = made.fetch(np.arange(6399))
        assert torch.equal(found["inputs"], torch.from_numpy(whole[:63_990].astype(np.int64)).view(6399, 10))
        assert torch.equal(found["targets"], torch.from_numpy(whole[1:63_991].astype(np.int64)).view(6399, 10))


def test_splits_are_contiguous_ranges_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(101)))
    data = build("text", tmp_path, path="a.txt", seq_len=10, split=[0.5, 0.2, 0.3])
    assert [row[0] for row in rows(data, "train")] == [0, 10, 20, 30, 40]
    assert [row[0] for row in rows(data, "valid")] == [50, 60]
    assert [row[0] for row in rows(data, "test")] == [70, 80, 90]
    data = build("text", tmp_path, path="a.txt", seq_len=10, split={"fold": 2, "of": 5})
    assert [row[0] for row in rows(data, "test")] == [20, 30]
    assert [row[0] for row in rows(data, "train")] == [0, 10, 40, 50, 60, 70, 80, 90]
    assert {name: len(rows(build("text", tmp_path, path="a.txt", seq_len=10), name)) for name in ("train", "test")} == {
        "train": 9,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"split": [0.99, 0.01]}, "leave test without a sample"),
        ({"split": {"fold": 1, "of": 50}}, "50 folds of 10 samples"),
        ({"seq_len": 101}, r"has 101 tokens, and one row takes data\.seq_len \+ 1 = 102"),
        ({"seq_len": 0}, "should be at least 1"),
        ({"path": "gone.txt"}, "there is nothing at"),
        ({"eos": "</s>"}, "bytes have no token between files"),
        ({"tokenizer": "gone.json"}, "there is no tokenizer at"),
        ({"tokenizer": "a.txt"}, "is not a Hugging Face tokenizer"),
    ],
)
def test_text_that_does_not_do(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(101)))
    with pytest.raises(UserError, match=message):
        build("text", tmp_path, **{"path": "a.txt", "seq_len": 10, **section})


# --------------------------------------------------------------------------------------------------------------------
# Plain text, and Python's own


def test_text_is_the_bytes_of_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes("é\r\n".encode())
    (folder / "b" / "c.txt").write_bytes(b"xyz!")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("no")
    data = build("text", tmp_path, path="texts", seq_len=7, split=[1.0])
    assert bytes(rows(data, "train")[0]) == "é\r\nxyz".encode()
    assert (data.meta.vocab_size, data.meta.bytes_per_token, data.meta.tokens_per_sample) == (256, 1.0, 7)
    assert data.meta.decode is not None
    assert data.meta.decode([0xC3, 0xA9, 10]) == "é\n"


def test_text_with_a_tokenizer(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "train.txt").write_text("the cat sat on the mat\n" * 9)
    (tmp_path / "test.txt").write_text("the mat sät on the cat 🐈\n" * 3)
    data = build(
        "text",
        tmp_path,
        split={"train": "train.txt", "test": "test.txt"},
        seq_len=8,
        tokenizer=str(tokenizer_file),
    )
    assert data.meta.decode is not None
    assert data.meta.decode(rows(data, "test")[0] + rows(data, "test")[1]).startswith("the mat sät on the")
    source: Any = data.splits["train"]
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    expected = [*reference.encode("the cat sat on the mat\n" * 9).ids, reference.token_to_id("<|endoftext|>")]
    assert data.meta.bytes_per_token == pytest.approx(9 * 23 / len(expected))
    assert rows(data, "train")[-1] == expected[(len(source) - 1) * 8 :][:8]
    state = json.loads(json.dumps(data.state))
    with pytest.raises(UserError, match="use the tokenizer of the training"):
        build("text", tmp_path, state, path="train.txt", seq_len=8)


def test_large_text_is_not_tokenized_at_every_start(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_IN_MEMORY_BYTES", 10)
    (tmp_path / "a.txt").write_text("more than ten bytes")
    with pytest.raises(UserError, match="distrain data tokenize"):
        build("text", tmp_path, path="a.txt", seq_len=1, tokenizer=str(tokenizer_file))


def test_python_source_is_python(tmp_path: Path) -> None:
    data = build("python_source", tmp_path, seq_len=64, max_bytes=1_000_000)
    again = build("python_source", tmp_path, seq_len=64, max_bytes=1_000_000)
    train, test = rows(data, "train"), rows(data, "test")
    assert (len(train), len(test)) == (round(15624 * 0.9), 15624 - round(15624 * 0.9))
    assert train == rows(again, "train")
    assert data.meta.decode is not None
    assert "import" in data.meta.decode(np.concatenate(train[:200]).tolist())
    with pytest.raises(UserError, match="takes none"):
        build("python_source", tmp_path, path="x")


def test_prompts_are_lines(tmp_path: Path) -> None:
    data = build("python_source", tmp_path, max_bytes=10_000)
    assert data.read is not None
    (tmp_path / "prompts.txt").write_bytes("def é(\r\nx".encode())
    source = data.read(tmp_path / "prompts.txt")
    batch = source.fetch(np.array([1, 0]))
    assert batch["lengths"].tolist() == [1, 7]
    assert bytes(batch["inputs"][1].tolist()).decode() == "def é("
    assert batch["inputs"][0].tolist() == [ord("x")] + [0] * 6
    assert "targets" not in batch
    for content, message in (
        (b"", "is empty"),
        (b"a\n\nb", "prompts.txt:2 is empty"),
        (b"a\n\xff", "prompts.txt:2 is not UTF-8"),
    ):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            data.read(tmp_path / "prompts.txt")


# --------------------------------------------------------------------------------------------------------------------
# Shards


def everything(folder: Path) -> np.ndarray:
    return np.concatenate(open_shards(folder, read_index(folder), verify=True))


def test_bytes_become_shards_and_rows(tmp_path: Path) -> None:
    documents = [b"first", "zweité\r\n".encode(), b"\xff\x00 third"]
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_bytes(document)
    index = tokenize_corpus([tmp_path / f"{number}.txt" for number in range(3)], tmp_path / "out", shard_tokens=8)
    assert index == read_index(tmp_path / "out")
    assert everything(tmp_path / "out").tolist() == [each for document in documents for each in (*document, 256)]
    assert [(shard.tokens, shard.bytes, shard.documents) for shard in index.shards] == [(16, 14, 2), (9, 8, 1)]
    assert (index.dtype, index.vocab_size, index.eos_id) == ("uint16", 257, 256)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []

    data = build("tokens", tmp_path, path="out", seq_len=4, split=[0.5, 0.5], verify=True)
    assert (
        np.concatenate(rows(data, "train") + rows(data, "test")).tolist() == everything(tmp_path / "out")[:24].tolist()
    )
    assert (data.meta.vocab_size, data.meta.eos_id) == (257, 256)
    assert data.meta.bytes_per_token == pytest.approx(22 / 25)
    assert data.meta.decode is not None
    assert data.meta.decode([102, 105, 256]) == "fi"


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 40))
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path, documents: list[str], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "c.jsonl").write_text("\n".join(lines))
    if not any(documents):
        return
    index = tokenize_corpus([folder / "c.jsonl"], folder / "out", tokenizer_file, shard_tokens=shard_tokens)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    assert reference.decode(everything(folder / "out").tolist()) == "".join(documents)
    assert index.bytes == len("".join(documents).encode())
    assert index.documents == sum(bool(document) for document in documents)


def test_every_form_of_a_corpus_is_the_same(tmp_path: Path) -> None:
    documents = ["one two", "drei\u2028vier", "fünf"]
    (tmp_path / "a.txt").write_text("\r\n".join([*documents, ""]), newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(("\n\n".join(documents)).encode()))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"body": document, "n": 1}) for document in documents))
    pd.DataFrame({"body": documents}).to_parquet(tmp_path / "d.parquet")
    for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.parquet"):
        tokenize_corpus([tmp_path / name], tmp_path / f"{name}.out", documents="line", field="body")
        assert everything(tmp_path / f"{name}.out").tolist() == [
            each for document in documents for each in (*document.encode(), 256)
        ]


def test_workers_change_nothing(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distrain.datasets.tokens, "_UNIT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("".join(f"the cat {number}\n" for number in range(2000)))
    done: list[int] = []
    one = tokenize_corpus([tmp_path / "a.txt"], tmp_path / "one", tokenizer_file, documents="line", shard_tokens=5000)
    two = tokenize_corpus(
        [tmp_path / "a.txt"],
        tmp_path / "two",
        tokenizer_file,
        documents="line",
        shard_tokens=5000,
        workers=2,
        progress=done.append,
    )
    assert one == two
    assert len(one.shards) > 1
    assert sum(done) == one.bytes


def test_long_documents_are_cut_where_tokens_stay_the_same(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distrain.datasets.tokens, "_PIECE_BYTES", 200)
    content = "".join(f"the cat sat on the mat {number} times\n" + "\n" * (number % 3) for number in range(100))
    (tmp_path / "a.txt").write_text(content)
    index = tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", tokenizer_file, eos=False)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    assert everything(tmp_path / "out").tolist() == reference.encode(content).ids
    assert (index.documents, index.bytes) == (1, len(content))


@given(st.text(alphabet="aé🐈 \n", min_size=300, max_size=700))
def test_cuts_fall_between_characters(content: str) -> None:
    pieces = list(distrain.datasets.tokens._cut([content.encode()], "here"))
    assert b"".join(piece.text for piece in pieces) == content.encode()
    for piece in pieces:
        piece.text.decode()
    for size in (64, 65, 66, 67):
        at = distrain.datasets.tokens._good_cut(content.encode()[:size])
        assert 0 < at < size
        content.encode()[:at].decode()


def test_a_corpus_that_does_not_do_leaves_nothing_behind(tmp_path: Path, tokenizer_file: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    cases: list[tuple[str, bytes, str]] = [
        ("a.txt", b"fine \xff", "a.txt is not UTF-8 text"),
        ("a.txt", b"", "there is no text in"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "line 2: expected an object with text under 'text'"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half of a surrogate pair"),
        ("a.txt.gz", b"not packed", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be unpacked"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ]
    for name, content, message in cases:
        (corpus / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenize_corpus([corpus], out, tokenizer_file)
        (corpus / name).unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    with pytest.raises(UserError, match="has no files"):
        tokenize_corpus([corpus], out)
    with pytest.raises(UserError, match="there is nothing at"):
        tokenize_corpus([corpus / "gone"], out)
    (corpus / "a.txt").write_text("x")
    with pytest.raises(UserError, match="has no token '</s>'"):
        tokenize_corpus([corpus], out, tokenizer_file, eos="</s>")
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        tokenize_corpus([corpus], out)


def test_an_error_in_a_worker_names_the_file(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8"):
        tokenize_corpus([tmp_path / "bad.txt"], tmp_path / "out", tokenizer_file, workers=2)


def test_shards_that_are_not_as_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef" * 10)
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out")
    shard = tmp_path / "out" / "tokens-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2] + b"\0\0")
    build("tokens", tmp_path, path="out", seq_len=4)
    with pytest.raises(UserError, match=r"tokens-00000\.bin changed after it was written"):
        build("tokens", tmp_path, path="out", seq_len=4, verify=True)
    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match=r"tokens-00000\.bin has 120 bytes, and index\.json says 122"):
        build("tokens", tmp_path, path="out", seq_len=4)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        build("tokens", tmp_path, path="out", seq_len=4)
    (tmp_path / "out" / "index.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is not an index of tokens"):
        build("tokens", tmp_path, path="out", seq_len=4)
    with pytest.raises(UserError, match=r"there is no index\.json"):
        build("tokens", tmp_path, path=".", seq_len=4)


def test_a_folder_of_splits(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef" * 10)
    (tmp_path / "b.txt").write_text("ghijkl" * 5)
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "all" / "train")
    tokenize_corpus([tmp_path / "b.txt"], tmp_path / "all" / "test")
    for section in ({"path": "all"}, {"split": {"train": "all/train", "test": "all/test"}}):
        data = build("tokens", tmp_path, seq_len=6, **section)
        assert {name: len(rows(data, name)) for name in data.splits} == {"train": 10, "test": 5}
    with pytest.raises(UserError, match="holds the splits train, test already"):
        build("tokens", tmp_path, path="all", seq_len=6, split=[0.5, 0.5])
    tokenize_corpus([tmp_path / "b.txt"], tmp_path / "other", tokenizer_file)
    with pytest.raises(UserError, match="with another tokenizer"):
        build("tokens", tmp_path, seq_len=6, split={"train": "all/train", "test": "other"})


def test_tokenizing_needs_no_torch() -> None:
    command = "import sys, distrain.datasets.tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
