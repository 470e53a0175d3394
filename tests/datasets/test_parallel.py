from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest, warnings_of
from distrain.datasets.user import named_data


def build(base: Path, train: str, test: str, state: dict[str, Any] | None = None, **section: Any) -> Data:
    (base / "train.tsv").write_bytes(train.encode())
    (base / "test.tsv").write_bytes(test.encode())
    section = {"split": {"train": "train.tsv", "test": "test.tsv"}, **section}
    return named_data(
        DataRequest(DataSection(name="parallel_text", **section), "seq2seq", seed=0, base=base, state=state)
    )


def everything(data: Data, split: str) -> dict[str, Any]:
    source: Any = data.splits[split]
    return source.fetch(np.arange(len(source)))


def test_pairs_become_padded_batches(tmp_path: Path) -> None:
    data = build(tmp_path, "a b\tx\na\ty z\n", "b c\tz  z q\n")
    pad, bos, eos, unk = 0, 1, 2, 3
    batch = everything(data, "train")
    assert batch["inputs"]["source"].tolist() == [[4, 5, eos], [4, eos, pad]]
    assert batch["inputs"]["target"].tolist() == [[bos, 4, pad], [bos, 5, 6]]
    assert batch["targets"].tolist() == [[4, eos, -100], [5, 6, eos]]
    assert "references" not in batch
    batch = everything(data, "test")
    assert batch["inputs"]["source"].tolist() == [[5, unk, eos]]
    assert batch["targets"].tolist() == [[6, 6, unk, eos]]
    assert batch["references"] == ["z  z q"]
    test: Any = data.splits["test"]
    assert test.texts(np.array([0])) == ["b <unk>"]
    assert batch["inputs"]["source"].dtype == batch["targets"].dtype == torch.int64
    meta = data.meta
    assert (meta.vocab_size, meta.target_vocab_size, meta.pad_id, meta.bos_id, meta.eos_id) == (6, 7, pad, bos, eos)
    assert meta.decode is not None
    assert meta.decode([bos, 5, 6, unk, eos, 4, pad]) == "y z <unk>"
    assert meta.decode([]) == ""


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), min_size=1), min_size=1))
def test_any_text_comes_back_from_its_characters(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    texts = [text for text in texts if text.strip()] or ["x"]
    lines = "".join(f"s\t{text}\n" for text in texts)
    data = build(tmp_path_factory.mktemp("pairs"), lines, lines, target_tokenizer="chars")
    batch = everything(data, "test")
    assert data.meta.decode is not None
    assert [data.meta.decode(row) for row in batch["targets"].tolist()] == texts == batch["references"]


def test_vocabularies_are_of_the_training_split_alone(tmp_path: Path) -> None:
    data = build(tmp_path, "a b b c\tx\nc c\tx\n", "d d d d d\ty y y\n", min_count=2)
    assert data.state["source"]["vocabulary"] == ["c", "b"]
    assert data.state["target"]["vocabulary"] == ["x"]
    data = build(tmp_path, "a b b c\tx\nc c\tx\n", "d\ty\n", max_vocab=1)
    assert data.state["source"]["vocabulary"] == ["c"]
    with pytest.raises(UserError, match="min_count 9: no token"):
        build(tmp_path, "a\tx\n", "a\tx\n", min_count=9)


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    data = build(tmp_path, "<eos> a\t<pad> x\n", "a\tx\n")
    assert everything(data, "train")["inputs"]["source"].tolist() == [[3, 4, 2]]


def test_the_state_is_json_and_is_never_fitted_again(tmp_path: Path) -> None:
    first = build(tmp_path, "a b\tx\n", "b\tx\n")
    state = json.loads(json.dumps(first.state))
    again = build(tmp_path, "c a\tnew\n", "b\tx\n", state)
    assert again.state == first.state
    assert everything(again, "test")["inputs"]["source"].tolist() == [[5, 2]]
    assert everything(again, "train")["inputs"]["source"].tolist() == [[3, 4, 2]]
    with pytest.raises(UserError, match="was trained with 'words'"):
        build(tmp_path, "c a\tnew\n", "b\tx\n", state, source_tokenizer="chars")


def test_crlf_bom_and_unicode_separators(tmp_path: Path) -> None:
    data = build(
        tmp_path, "\ufeffä\u2028b\tx\x85y\r\nc\tz", "c\tz\r\n", source_tokenizer="chars", target_tokenizer="chars"
    )
    assert data.state["source"]["vocabulary"] == ["b", "c", "ä", "\u2028"]
    assert data.state["target"]["vocabulary"] == ["x", "y", "z", "\x85"]


def test_one_file_is_split_by_fractions(tmp_path: Path) -> None:
    lines = "".join(f"s{number}\tt{number}\n" for number in range(10))
    (tmp_path / "all.tsv").write_text(lines)
    data = build(tmp_path, "", "", path="all.tsv", split=[0.7, 0.3])
    train: Any = data.splits["train"]
    assert (len(train), len(everything(data, "test")["references"])) == (7, 3)
    seen = set(data.state["target"]["vocabulary"])
    assert seen.isdisjoint(everything(data, "test")["references"])
    assert len(seen) == 7


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, "a\tx\nno tab\n\tx\na\t \n\na\tb\tc\n", "a\tx\n")
    problems = str(caught.value).splitlines()
    assert [problem.split("train.tsv:")[1] for problem in problems] == [
        "2 has 0 tabs, expected source<TAB>target",
        "3 has an empty source",
        "4 has an empty target",
        "5 has 0 tabs, expected source<TAB>target",
        "6 has 2 tabs, expected source<TAB>target",
    ]
    (tmp_path / "latin.tsv").write_bytes(b"a\tx\nb\xe4\ty\n")
    with pytest.raises(UserError, match=r"latin\.tsv:2 is not UTF-8"):
        build(tmp_path, "", "", split={"train": "latin.tsv"})
    with pytest.raises(UserError, match=r"train\.tsv is empty"):
        build(tmp_path, "", "a\tx\n")


def test_pairs_that_are_too_long(tmp_path: Path) -> None:
    train, test = "a b c\tx\na\tx\n", "a\tx y z\na\tx\n"
    with pytest.raises(UserError, match=r"train\.tsv:1 has 3 tokens on a side, more than data\.max_len 2"):
        build(tmp_path, train, test, max_len=2)
    dropped = build(tmp_path, train, test, max_len=2, too_long="drop")
    assert [len(everything(dropped, name)["ids"]) for name in ("train", "test")] == [1, 1]
    assert warnings_of(dropped.splits["train"]) == (
        "1 of 2 pairs of the split 'train' have more than data.max_len 2 tokens on a side and are dropped",
    )
    cut = build(tmp_path, train, test, max_len=2, too_long="truncate")
    assert everything(cut, "train")["inputs"]["source"].shape == (2, 3)
    assert everything(cut, "test")["references"] == ["x y z", "x"]
    assert warnings_of(cut.splits["test"])[0].endswith("on a side and are truncated")
    (tmp_path / "new.txt").write_text("a b c\na\n")
    assert cut.read is not None
    assert warnings_of(cut.read(tmp_path / "new.txt")) == (
        f"1 of 2 lines of {tmp_path / 'new.txt'} have more than data.max_len 2 tokens and are truncated",
    )
    assert warnings_of(build(tmp_path, "a\tx\nb\ty\n", "a\tx\n", max_len=2, too_long="drop").splits["train"]) == ()
    with pytest.raises(UserError, match="leaves the split 'test' without a pair"):
        build(tmp_path, train, "a b c\tx\n", max_len=2, too_long="drop")


def test_reading_sources_for_prediction(tmp_path: Path) -> None:
    data = build(tmp_path, "a b\tx\n", "a\tx\n", max_len=3)
    assert data.read is not None
    (tmp_path / "new.txt").write_text("b a\r\nunseen\n", newline="")
    batch = data.read(tmp_path / "new.txt").fetch(np.array([0, 1]))
    assert batch["inputs"]["source"].tolist() == [[5, 4, 2], [3, 2, 0]]
    assert set(batch) == {"inputs", "ids"}
    assert set(batch["inputs"]) == {"source"}
    (tmp_path / "new.txt").write_text("a\n\na\tx\na a a a\n")
    with pytest.raises(UserError) as caught:
        data.read(tmp_path / "new.txt")
    assert [line.split("new.txt:")[1][:10] for line in str(caught.value).splitlines()] == [
        "2 is empty",
        "3 has a ta",
        "4 has 4 to",
    ]


def test_a_hugging_face_tokenizer_keeps_its_numbers(tmp_path: Path) -> None:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat " * 20], vocab_size=290, special_tokens=["<pad>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    both = {"source_tokenizer": "tokenizer.json", "target_tokenizer": "tokenizer.json"}
    data = build(tmp_path, "the cat\tthe cät 🐈\n", "sat\tthe cät 🐈\n", **both)
    batch = everything(data, "test")
    assert batch["inputs"]["target"][0, 0].item() == data.meta.pad_id == data.meta.bos_id == 0
    assert data.meta.eos_id == 1
    assert data.meta.decode is not None
    assert data.meta.decode(batch["targets"][0].tolist()) == "the cät 🐈"
    assert data.meta.vocab_size == made.get_vocab_size()
    state = json.loads(json.dumps(data.state))
    made.train_from_iterator(["other words " * 20], vocab_size=280, special_tokens=["<pad>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="is not the tokenizer that the model was trained with"):
        build(tmp_path, "the\tcat\n", "the\tcat\n", state, **both)
