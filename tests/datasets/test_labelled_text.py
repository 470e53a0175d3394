"""Texts with classes or numbers: columns of a table, by a tokenizer."""

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
from runs import cli, last, state, train, write_recipe
from tokenizers.processors import TemplateProcessing

from distrain.config import DataSection, UserError
from distrain.config.yaml import parse_recipe
from distrain.datasets.base import Data, DataRequest
from distrain.datasets.user import named_data
from distrain.models import build_model
from distrain.networks.calling import forward

ROWS = {
    "id": ["x", "y", "z", "w"],
    "text": ["good", "bad, NA", "so so é", "good\nbad"],
    "other": ["a", "b", "c", "d"],
    "label": ["pos", "neg", "pos", "neg"],
    "one": [1, 0, 1, 1],
    "two": [0, 0, 1, 0],
    "score": [1.5, -2.0, 0.5, 4.0],
}


def build(base: Path, task: str = "classification", state: Any = None, **section: Any) -> Data:
    section = {
        "path": "rows.csv",
        "tokenizer": "tokenizer",
        "text": "text",
        "label": "label",
        "split": [1.0],
        **section,
    }
    made = DataSection(name="text_classification", **section)
    return named_data(DataRequest(made, task, seed=0, base=base, state=state))  # type: ignore[arg-type]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path


def everything(source: Any) -> dict[str, Any]:
    return source.fetch(np.arange(len(source)))  # type: ignore[no-any-return]


def texts(base: Path, tokens: torch.Tensor) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    return [tokenizer.decode([each for each in row if each != 2]) for row in tokens.tolist()]


@pytest.mark.parametrize(
    ("task", "section", "targets"),
    [
        ("classification", {}, [1, 0, 1, 0]),
        ("binary", {}, [1.0, 0.0, 1.0, 0.0]),
        ("binary", {"positive": "neg"}, [0.0, 1.0, 0.0, 1.0]),
        ("multilabel", {"label": ["one", "two"]}, [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        ("regression", {"label": "score"}, [1.5, -2.0, 0.5, 4.0]),
        ("regression", {"label": ["score", "one"]}, [[1.5, 1.0], [-2.0, 0.0], [0.5, 1.0], [4.0, 1.0]]),
    ],
)
def test_targets_are_as_in_a_table(base: Path, task: str, section: dict[str, Any], targets: list[Any]) -> None:
    data = build(base, task, **section)
    batch = everything(data.splits["train"])
    assert batch["targets"].tolist() == targets
    source: Any = data.splits["train"]
    assert texts(base, batch["inputs"]) == source.texts(np.arange(len(source))) == ROWS["text"]
    assert (data.meta.pad_id, data.meta.vocab_size) == (2, 262)
    if task == "classification":
        assert (data.meta.class_names, data.meta.num_classes) == (("neg", "pos"), 2)


def test_standardised_targets_have_their_mean_in_the_meta(base: Path) -> None:
    data = build(base, "regression", label="score", standardize_target=True)
    targets = everything(data.splits["train"])["targets"]
    assert targets.mean().item() == pytest.approx(0, abs=1e-6)
    assert data.meta.target_mean == (1.0,)
    assert data.meta.target_std is not None
    assert (targets * data.meta.target_std[0] + 1).tolist() == pytest.approx(ROWS["score"])


@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl", "rows.parquet"])
def test_every_kind_of_file_is_the_same(base: Path, name: str) -> None:
    expected = everything(build(base).splits["train"])
    frame = pd.DataFrame(ROWS)
    if name.endswith("jsonl"):
        frame.to_json(base / name, orient="records", lines=True)
    elif name.endswith("tsv"):
        frame.to_csv(base / name, sep="\t", index=False)
    else:
        frame.to_parquet(base / name)
    found = everything(build(base, path=name).splits["train"])
    assert torch.equal(found["inputs"], expected["inputs"])
    assert torch.equal(found["targets"], expected["targets"])


def test_pairs_are_told_apart_where_the_tokenizer_does(base: Path) -> None:
    words = {
        word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "a", "b", "c", "d"])
    }
    (base / "bert").mkdir()
    (base / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(base / "bert" / "vocab.txt")).save_pretrained(base / "bert")
    source = build(base, text=["text", "other"], tokenizer="bert").splits["train"]
    first = source.fetch(np.array([0]))["inputs"]  # type: ignore[union-attr]
    assert first["input_ids"].tolist() == [[words[each] for each in ("[CLS]", "good", "[SEP]", "a", "[SEP]")]]
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    alone = build(base, tokenizer="bert").splits["train"].fetch(np.array([0]))["inputs"]  # type: ignore[union-attr]
    assert alone.tolist() == [[words[each] for each in ("[CLS]", "good", "[SEP]")]]
    joined = build(base, text=["text", "other"]).splits["train"].fetch(np.array([0]))["inputs"]  # type: ignore[union-attr]
    assert texts(base, joined) == ["gooda"]


def test_what_is_too_long_is_cut_dropped_or_refused_and_counted(base: Path) -> None:
    source: Any = build(base, max_len=6).splits["train"]
    assert texts(base, everything(source)["inputs"]) == ["good", "bad, N", "so so ", "good\nb"]
    assert source.warnings == (
        "3 of 4 texts of the split 'train' have more than data.max_len 6 tokens and are cut, by 5 tokens together",
    )
    source = build(base, max_len=7, too_long="drop").splits["train"]
    assert texts(base, everything(source)["inputs"]) == ["good", "bad, NA"]
    assert everything(source)["targets"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"3 of 4 .* the longest 8 \(.*row 2; .*row 3"):
        build(base, max_len=6, too_long="error")
    with pytest.raises(UserError, match="none is left"):
        build(base, max_len=1, too_long="drop")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"text": "txt"}, "has no column 'txt'; did you mean 'text'"),
        ({"label": "lable"}, "data.label: .*has no column 'lable'"),
        ({"text": ["text", "other", "label"]}, "found 3 columns, expected one, or two"),
        ({"text": "label"}, "'label' is also in data.text"),
        ({"tokenizer": "gone"}, "there is no tokenizer in"),
        ({"id": "gone"}, "data.id: .*has no column 'gone'"),
        ({"positive": "pos"}, "data.positive is for task binary"),
        ({"max_len": 0}, "max_len 0 should be at least 1"),
    ],
)
def test_columns_that_do_not_do(base: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(base, **section)


def test_labels_in_two_spellings_are_told(base: Path) -> None:
    assert not build(base).warnings
    rows = pd.DataFrame(ROWS)
    label = str(rows["label"][0])
    rows["label"] = [f" {label}", *map(str, rows["label"][1:])]
    rows.to_csv(base / "rows.csv", index=False)
    (said,) = build(base).warnings
    assert f"target column 'label': ' {label}' and {label!r} differ only in how they are written" in said


def test_rows_without_text_are_refused(base: Path) -> None:
    (base / "rows.csv").write_text("text,label\nx,a\n,b\n")
    with pytest.raises(UserError, match=r"column 'text' has no text at .*rows\.csv, row 2"):
        build(base)


def test_a_file_for_prediction_is_read_as_the_training_was(base: Path) -> None:
    data = build(base, id="id")
    assert data.read is not None
    (base / "new.csv").write_text('text,id\ngood,1\n"x, y",2\n')
    source = data.read(base / "new.csv")
    batch = everything(source)
    assert texts(base, batch["inputs"]) == ["good", "x, y"]
    assert "targets" not in batch
    assert source.keys(np.array([1])) == {"id": ["2"]}  # type: ignore[attr-defined]
    assert everything(data.read(base / "rows.csv"))["targets"].tolist() == [1, 0, 1, 0]
    (base / "new.txt").write_text("good\nbad\n")
    assert texts(base, everything(data.read(base / "new.txt"))["inputs"]) == ["good", "bad"]
    state = json.loads(json.dumps(data.state))
    assert build(base, state=state).meta.class_names == ("neg", "pos")
    save_tokenizer(base / "tokenizer", merges=[("a", "b")])
    with pytest.raises(UserError, match="trained with another tokenizer"):
        build(base, state=state)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "text_classifier", "n_layer": 1, "d_model": 16},
        {"name": "rnn", "hidden": 8},
        {
            "name": "transformers:AutoModelForSequenceClassification",
            "config": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        },
    ],
    ids=["text_classifier", "rnn", "bert"],
)
def test_what_a_model_says_of_a_text_does_not_depend_on_its_padding(base: Path, model: dict[str, Any]) -> None:
    data = build(base)
    text = json.dumps(
        {
            "name": "a",
            "task": "classification",
            "data": "text_classification",
            "model": model,
            "batch": {"global": 4},
            "train": {"steps": 1},
        }
    )
    made = build_model(parse_recipe(text, "here"), data.meta).eval()
    batch = everything(data.splits["train"])
    together = forward(made, batch["inputs"]).logits
    assert together.shape == (4, 2)
    for index in range(4):
        alone = data.splits["train"].fetch(np.array([index]))  # type: ignore[union-attr]
        torch.testing.assert_close(forward(made, alone["inputs"]).logits[0], together[index])
    if model["name"].startswith("transformers:"):
        assert made.config.id2label == {0: "neg", 1: "pos"}  # type: ignore[union-attr]


RECIPE = """
name: texts
task: classification
data:
  name: text_classification
  path: {base}/rows.csv
  tokenizer: {base}/tokenizer
  text: text
  label: label
  split: [0.75, 0.25]
model: {{name: text_classifier, n_layer: 1, n_head: 2, d_model: 16, dropout: 0}}
optim: {{lr: 5.0e-3}}
batch: {{global: 12}}
train: {{steps: 12}}
eval: {{metrics: [accuracy]}}
"""


def test_texts_are_learned_and_predictions_have_the_names_of_classes(base: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(["sunny", "rain"], 120)
    words = [
        " ".join(["abc" if label == "rain" else "xyz"] * int(n))
        for label, n in zip(labels, generator.integers(1, 5, 120), strict=True)
    ]
    pd.DataFrame({"text": words, "label": labels}).to_csv(base / "rows.csv", index=False)
    build(base)
    ended = train(2, write_recipe(tmp_path, RECIPE.format(base=base)), tmp_path / "run")
    assert "reads padding" not in ended[0].out + ended[0].err
    (tmp_path / "new.txt").write_text("abc abc\nxyz\n")
    assert cli("predict", tmp_path / "run", tmp_path / "new.txt", "-o", tmp_path / "out.csv").status == 0
    assert pd.read_csv(tmp_path / "out.csv")["prediction"].tolist() == ["rain", "sunny"]


MEANS = """
import torch
from torch import nn


class Means(nn.Module):
    def __init__(self, vocab_size, num_classes):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens):
        self.calls += 1
        return self.head(self.embed(tokens).mean(1))
"""


@pytest.mark.parametrize(("strategy", "world_size"), [("auto", 1), ("zero3", 2), ("fsdp2", 2)])
def test_a_model_that_reads_padding_is_warned_of(base: Path, tmp_path: Path, strategy: str, world_size: int) -> None:
    (base / "means.py").write_text(MEANS)
    head, _, tail = RECIPE.format(base=base).replace("[0.75, 0.25]", "[0.5, 0.5]").partition("model: ")
    recipe = write_recipe(base, f"{head}model: {{name: 'means.py:Means'}}\n{tail.partition(chr(10))[2]}")
    ended = train(world_size, recipe, tmp_path / "run", "batch.global=2", "train.steps=1", strategy=strategy)
    said = " ".join((ended[0].out + ended[0].err).split())
    assert "Means computes something else of a sample where a longer one is beside it: it reads padding" in said
    assert state(last(tmp_path / "run"))["model/calls"] == 2, "of the step and the evaluation; a trial leaves nothing"


@pytest.mark.parametrize("name", ["text_classification", "tagged_text"])
def test_padding_that_also_stands_around_texts_is_warned_of(base: Path, name: str) -> None:
    (base / "rows.conll").write_text("a O\nb O\n\nc O\n")
    section = {"path": "rows.csv", "text": "text", "label": "label"}
    section = section if name == "text_classification" else {"path": "rows.conll"}
    task = "classification" if name == "text_classification" else "token_classification"
    found = []
    for around, pad in ((False, "</s>"), (True, "<pad>"), (True, "</s>")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer", pad_token=pad)
        if around:
            tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.save_pretrained(base / "own")
        made = DataSection(name=name, tokenizer="own", split=[1.0], **section)  # type: ignore[arg-type]
        found.append(named_data(DataRequest(made, task, seed=0, base=base)).warnings)  # type: ignore[arg-type]
    assert found[:2] == [(), ()]
    assert found[2][0].startswith(f"the tokenizer in {base / 'own'} pads with token 1, which it also puts around texts")
