"""Sentences with a tag for each token: in columns and lines of JSON, by words and by pieces of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from chats import save_tokenizer
from runs import assert_close, cli, last, rows, train, write_recipe

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest
from distrain.datasets.user import named_data

SENTENCES = [
    (["Ada", "Bell", "saw", "Rome", "."], ["B-PER", "I-PER", "O", "B-LOC", "O"]),
    (["Rome", "\u00a0x"], ["B-LOC", "O"]),
    (["so"], ["O"]),
]
CLASSES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
WANTED = [[3, 4, 0, 1, 0], [1, 0], [0]]


def columns(sentences: list[tuple[list[str], list[str]]], glue: str = " ", middle: str = "") -> str:
    blocks = (
        "".join(f"{token}{glue}{middle}{tag}\n" for token, tag in zip(tokens, tags, strict=True))
        for tokens, tags in sentences
    )
    return "\n".join(blocks)


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def build(base: Path, state: Any = None, inputs_only: bool = False, **section: Any) -> Data:
    made = DataSection(name="tagged_text", **{"path": "rows.conll", "split": [1.0], **section})
    request = DataRequest(made, "token_classification", 0, base, state, inputs_only=inputs_only)
    return named_data(request)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "rows.conll").write_text(columns(SENTENCES))
    return tmp_path


def everything(source: Any) -> dict[str, Any]:
    return source.fetch(np.arange(len(source)))  # type: ignore[no-any-return]


def kept(targets: torch.Tensor) -> list[list[int]]:
    """Return the targets that count, by sample."""
    return [[each for each in row if each != -100] for row in targets.tolist()]


def test_words_have_the_vocabulary_of_the_training_split(base: Path) -> None:
    (base / "test.conll").write_text(columns([(["Bell", "new"], ["B-PER", "O"])]))
    data = build(base, path=None, split={"train": "rows.conll", "test": "test.conll"})
    assert data.state["vocabulary"] == ["Rome", ".", "Ada", "Bell", "saw", "so", "\u00a0x"]
    assert (data.meta.class_names, data.meta.vocab_size, data.meta.pad_id) == (CLASSES, 9, 0)
    batch = everything(data.splits["train"])
    assert batch["inputs"].tolist() == [[4, 5, 6, 2, 3], [2, 8, 0, 0, 0], [7, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [WANTED[0], [1, 0, -100, -100, -100], [0, -100, -100, -100, -100]]
    assert everything(data.splits["test"])["inputs"].tolist() == [[5, 1]]
    test: Any = data.splits["test"]
    assert test.texts(np.array([0])) == ["Bell new"]
    assert build(base, min_count=2).state["vocabulary"] == ["Rome"]
    assert build(base, max_vocab=3).state["vocabulary"] == ["Rome", ".", "Ada"]
    again = build(base, data.state, inputs_only=True, path="gone")
    assert again.meta == data.meta
    assert again.read is not None
    assert everything(again.read(base / "test.conll"))["inputs"].tolist() == [[5, 1]]


@pytest.mark.parametrize(
    ("name", "text", "section"),
    [
        ("rows.txt", columns(SENTENCES, "\t"), {}),
        ("rows.txt", columns(SENTENCES, " ", "NN X ").replace("\n\n", "\n  \n\n-DOCSTART- -X- O O\n\n"), {}),
        ("rows.txt", columns(SENTENCES, "|", "X|"), {"delimiter": "|", "tags": 2}),
        ("rows.conllu", "# text\n1-2\tAdaBell\t_\n" + "".join(
            "".join(f"{at}\t{token}\t{tag}\n" for at, (token, tag) in enumerate(zip(*pair, strict=True), 1)) + "\n"
            for pair in SENTENCES
        ), {"tokens": 1}),
        ("rows.jsonl", lines([{"tokens": a, "tags": b} for a, b in SENTENCES]), {}),
        ("rows.jsonl", lines([{"words": a, "ner": [CLASSES.index(each) for each in b]} for a, b in SENTENCES]),
         {"tokens": "words", "tags": "ner", "classes": list(CLASSES)}),
        ("rows.txt", columns([(a, [tag.replace("B-", "I-") for tag in b]) for a, b in SENTENCES]), {"scheme": "iob1"}),
    ],
    ids=["tabs", "three-columns", "delimiter", "conllu", "jsonl", "numbers", "iob1"],
)  # fmt: skip
def test_every_kind_of_file_is_the_same(base: Path, name: str, text: str, section: dict[str, Any]) -> None:
    expected = everything(build(base).splits["train"])
    (base / name).write_text(text)
    data = build(base, path=name, **section)
    found = everything(data.splits["train"])
    assert torch.equal(found["inputs"], expected["inputs"])
    assert torch.equal(found["targets"], expected["targets"])
    assert data.meta.class_names == CLASSES


@pytest.mark.parametrize(
    ("scheme", "tags", "problem"),
    [
        ("iob2", "O I-X", r"token 2 \('1'\): 'I-X' continues an entity that does not begin"),
        ("iob2", "B-X I-Y", "'I-Y' continues an entity"),
        ("iob2", "NN O", "'NN' is none of B-TYPE, I-TYPE and O\n.*any for other tags"),
        ("iob2", "B- O", "'B-' is none of"),
        ("iob1", "I-X B-X", None),
        ("iob1", "E-X O", "'E-X' is none of"),
        ("iobes", "B-X I-X E-X S-Y O", None),
        ("iobes", "B-X O", "'O' stands where E-X should end one"),
        ("iobes", "O E-X", "'E-X' continues"),
        ("iobes", "S-X I-X", "'I-X' continues"),
        ("iobes", "B-X I-X", "ends the sentence within an entity"),
        ("any", "NN I-X", None),
    ],
)
def test_tags_are_held_against_their_scheme(base: Path, scheme: str, tags: str, problem: str | None) -> None:
    both = tags.split()
    (base / "rows.conll").write_text(
        columns([(["a"], ["O"] if scheme != "any" else ["x"]), ([*"01234"][: len(both)], both)])
    )
    if problem is None:
        assert build(base, scheme=scheme).meta.num_classes
    else:
        with pytest.raises(UserError, match=r"(?s)rows.conll:3, token \d.*" + problem.removeprefix(r"token 2 ")):
            build(base, scheme=scheme)


@pytest.mark.parametrize(
    ("text", "section", "message"),
    [
        ("a O\nb\n", {}, r"rows.conll:2 has 1 columns, and the first line has 2"),
        ("a\n\nb\n", {}, r"rows.conll:1 has tokens without tags\n.*:3 has"),
        ("a\tO\n\tO\n", {}, "rows.conll:2 has an empty token"),
        ("a O\n", {"tags": 4}, "data.tags: column 4 of the 2 of .* is not there"),
        ("a O\n", {"tags": 0}, "is that of the tokens"),
        ("a O\n", {"tokens": -3}, "there is no column -3 in the 2"),
        ("a O\n", {"tags": "ner"}, "data.tags: 'ner' .* expected the number of a column"),
        ("a O\n", {"tokenizer": "gone"}, "there is no tokenizer in"),
        ("a O\n", {"tokenizer": "gone", "min_count": 2}, "are for a vocabulary of words"),
        ("a O\n", {"min_count": 2}, "no token of the training split is as frequent"),
        ("a B-X\n", {"classes": ["O", "B-Y"]}, "rows.conll:1 has the tag 'B-X', which is no class"),
        ("a B-X\n", {"classes": ["O", "O"]}, "'O' is there twice"),
        ("", {}, "is empty"),
        ("\n\n", {}, "has no sentences"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(base: Path, text: str, section: dict[str, Any], message: str) -> None:
    (base / "rows.conll").write_text(text)
    with pytest.raises(UserError, match=message):
        build(base, **section)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"tokens": ["a"], "tags": ["O", "O"]}', r"'tags' is \[\"O\", \"O\"\]; expected a list of 1 tags"),
        ('{"tokens": ["a", ""], "tags": ["O", "O"]}', "expected a list of tokens"),
        ('{"token": ["a"]}', "rows.jsonl:1 has no 'tokens'; did you mean 'token'"),
        ('{"tokens": ["a"], "tags": [0]}', "the tag 0 is a number; name what each means"),
        ("[]", "has no 'tokens'"),
        ("{", "is no JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused(tmp_path: Path, record: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(record + "\n")
    with pytest.raises(UserError, match=message):
        build(tmp_path, path="rows.jsonl")


def save_words(folder: Path) -> dict[str, int]:
    """Save a tokenizer that cuts Ada and Bell into two pieces, and has none for what is not printed."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ad", "##a", "be", "##ll", "saw", "rome", ".", "so", "x", "[MASK]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return {word: at for at, word in enumerate(words)}


def test_the_first_piece_of_a_token_has_its_tag(base: Path) -> None:
    numbers = save_words(base / "bert")
    data = build(base, tokenizer="bert")
    batch = everything(data.splits["train"])
    pieces = ["[CLS]", "ad", "##a", "be", "##ll", "saw", "rome", ".", "[SEP]"]
    assert batch["inputs"][0].tolist() == [numbers[each] for each in pieces]
    assert batch["targets"][0].tolist() == [-100, 3, -100, 4, -100, 0, 1, 0, -100]
    assert kept(batch["targets"]) == WANTED
    assert (data.meta.vocab_size, data.meta.pad_id) == (len(numbers), 0)
    encoded_once = sorted(path for path in (base / ".distrain").iterdir())
    again = everything(build(base, data.state, tokenizer="bert").splits["train"])
    assert torch.equal(again["inputs"], batch["inputs"])
    assert sorted((base / ".distrain").iterdir()) == encoded_once


def test_a_byte_level_tokenizer_reads_each_token_as_a_word(base: Path) -> None:
    save_tokenizer(base / "bytes")
    batch = everything(build(base, tokenizer="bytes").splits["train"])
    assert kept(batch["targets"]) == WANTED
    assert (batch["targets"][2] != -100).sum() == 1  # of the two bytes of "so"


@pytest.mark.parametrize("tokenizer", [None, "bert"])
def test_what_is_too_long_is_cut_dropped_or_refused_and_counted(base: Path, tokenizer: str | None) -> None:
    save_words(base / "bert")
    most, left = (6, [[3, 4], [1, 0], [0]]) if tokenizer else (3, [[3, 4, 0], [1, 0], [0]])
    source: Any = build(base, max_len=most, tokenizer=tokenizer).splits["train"]
    assert kept(everything(source)["targets"]) == left
    (warning,) = source.warnings
    assert warning.startswith(
        f"1 of 3 sentences of the split 'train' have more than data.max_len {most} tokens and are"
    )
    assert warning.endswith(f"cut: {5 - len(left[0])} tokens are not read and have no tag")
    source = build(base, max_len=most, too_long="drop", tokenizer=tokenizer).splits["train"]
    assert kept(everything(source)["targets"]) == left[1:]
    assert source.warnings[0].endswith("are dropped")
    with pytest.raises(UserError, match=r"1 of 3 .*rows.conll:1\)"):
        build(base, max_len=most, too_long="error", tokenizer=tokenizer)


def test_a_token_without_a_piece_is_said(base: Path) -> None:
    save_words(base / "bert")
    (base / "rows.conll").write_text(columns([(["so", "\u200b", "so"], ["O", "B-X", "O"])]))
    source: Any = build(base, tokenizer="bert").splits["train"]
    assert source.warnings == ("1 tokens of the split 'train' have no piece in the tokenizer, so they have no tag",)
    assert kept(everything(source)["targets"]) == [[0, 0]]


RECIPE = """
name: tags
task: token_classification
data: {name: tagged_text, path: rows.jsonl, split: [0.8, 0.2]%s}
model: {name: token_classifier, n_layer: 1, n_head: 2, d_model: 16, dropout: 0.0}
optim: {lr: 1.0e-2}
batch: {global: 8}
train: {steps: 20, precision: fp64}
eval: {every: 10 steps, batch: 8}
checkpoint: {every: 10 steps, keep: 9, async: false}
log: {every: 1 steps}
"""


def test_tags_are_learned_alike_in_any_world_and_written_token_by_token(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    records = []
    for _ in range(60):
        tokens = random.choice(["Ada", "Bell", "saw", "Rome", "so"], random.integers(1, 9)).tolist()
        records.append({"tokens": tokens, "tags": ["B-LOC" if each == "Rome" else "O" for each in tokens]})
    (tmp_path / "rows.jsonl").write_text(lines(records))
    recipe = write_recipe(tmp_path, RECIPE % "")
    train(1, recipe, tmp_path / "one")
    train(2, recipe, tmp_path / "two", "batch.micro=2")
    assert_close(tmp_path / "one", tmp_path / "two", 1e-9)
    found = [row for row in rows(tmp_path / "one") if row["event"] == "eval"][-1]
    assert found["entity_f1"] == found["token_accuracy"] == 1
    assert found["entity_f1"] == [row for row in rows(tmp_path / "two") if row["event"] == "eval"][-1]["entity_f1"]

    (tmp_path / "new.conll").write_text("Rome\nso\n\nnew\n")
    (tmp_path / "rows.jsonl").unlink()  # the vocabulary is kept with the run
    wanted = [(["Rome", "so"], ["B-LOC", "O"]), (["new"], ["O"])]
    for name in ("out.conll", "out.csv"):
        assert cli("predict", last(tmp_path / "one"), tmp_path / "new.conll", "-o", tmp_path / name).status == 0
    assert (tmp_path / "out.conll").read_text() == columns(wanted, "\t") + "\n"
    assert pd.read_csv(tmp_path / "out.csv")[["tokens", "tags"]].values.tolist() == [
        [" ".join(each) for each in pair] for pair in wanted
    ]


def test_tags_of_pieces_are_written_token_by_token(tmp_path: Path) -> None:
    save_words(tmp_path / "bert")
    (tmp_path / "rows.jsonl").write_text(lines([{"tokens": a, "tags": b} for a, b in SENTENCES * 4]))
    recipe = write_recipe(tmp_path, RECIPE % ", tokenizer: ./bert, max_len: 7")
    train(1, recipe, tmp_path / "run", "train.steps=2")
    (tmp_path / "new.jsonl").write_text(lines([{"tokens": ["Ada"] * 4}, {"tokens": ["so"], "tags": ["B-PER"]}]))
    assert cli("predict", last(tmp_path / "run"), tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl").status == 0
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [each in CLASSES for each in first["tags"]] == [True, True, True, False]  # five pieces were read
    assert first["tags"][3] is None
    assert len(second["tags"]) == 1
    assert cli("predict", last(tmp_path / "run"), "test", "-o", tmp_path / "split.jsonl").status == 0
    for record in map(json.loads, (tmp_path / "split.jsonl").read_text().splitlines()):
        known = dict(map(tuple, ((" ".join(tokens), tags) for tokens, tags in SENTENCES)))[" ".join(record["tokens"])]
        pairs = zip(record["tags"], record["target"], known, strict=True)
        assert all(target == (None if tag is None else each) for tag, target, each in pairs)
