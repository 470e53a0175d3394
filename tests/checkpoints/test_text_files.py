"""A language model's folder has the tokenizer, template and end tokens that it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapters import base_model
from chats import CHATML, said, save_tokenizer, some_chats, write_lines
from runs import train, write_recipe

from distrain.checkpoint import find_newest
from distrain.checkpoints.export import export
from distrain.inference.graphs import export_graph

OTHER = CHATML.replace("<|im_start|>", "<s>")
MESSAGES = said("ab", "ba", "b")[:3]


@pytest.fixture
def base(tmp_path) -> Path:
    """The folder of a model and its tokenizer, whose text ends with </s> alone."""
    folder = base_model(tmp_path, vocab_size=262)
    save_tokenizer(folder, CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.7}))
    return folder


def trained(place: Path, model: dict[str, Any], **data: Any) -> Path:
    write_lines(place / "chats.jsonl", some_chats(12))
    recipe = {
        "name": "chat",
        "task": "language_modeling",
        "data": {"name": "chat", "path": "./chats.jsonl", "seq_len": 48, **data},
        "model": model,
        "batch": {"global": 2},
        "train": {"steps": 1, "precision": "fp32"},
    }
    train(1, write_recipe(place, yaml.safe_dump(recipe)), place / "run")
    return find_newest(place / "run" / "checkpoints")[0]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def transformers_model(base: Path) -> dict[str, Any]:
    return {"name": "transformers:AutoModelForCausalLM", "path": str(base)}


def test_the_template_is_that_of_the_training(base, tmp_path):
    checkpoint = trained(tmp_path, transformers_model(base), tokenizer=str(base), template="plain")
    for kind in ("hf", "pt2"):
        if kind == "hf":
            export(checkpoint, tmp_path / kind)
        else:
            export_graph(checkpoint, tmp_path / kind, format="pt2")
        shown = tokenizer_of(tmp_path / kind).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert shown == "### User:\nab\n\n### Assistant:\nba</s>\n\n### User:\nb\n\n### Assistant:\n"


def test_the_tokenizer_is_that_of_the_training(base, tmp_path):
    own = save_tokenizer(tmp_path / "own", OTHER, eos="<|im_end|>")
    checkpoint = trained(tmp_path, transformers_model(base), tokenizer=str(own))
    notes = export(checkpoint, tmp_path / "out").notes
    found = tokenizer_of(tmp_path / "out")
    assert (found.eos_token, found.chat_template) == ("<|im_end|>", OTHER)
    # it ends where `distrain generate` does
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 4],
        "temperature": 0.7,
    }
    assert "generation_config.json has the token 4 as an end, which that of the model's folder had not" in notes
    shutil.rmtree(own)
    notes = export(checkpoint, tmp_path / "without").notes
    assert f"skipped: the tokenizer that the run was trained with, which is no longer in {own}" in notes
    assert not list((tmp_path / "without").glob("*token*"))


def test_a_model_that_began_with_no_folder_has_its_template_too(tmp_path):
    own = save_tokenizer(tmp_path / "own", OTHER)
    checkpoint = trained(tmp_path, {"name": "gpt", "n_layer": 1, "n_head": 2, "d_model": 8}, tokenizer=str(own))
    export(checkpoint, tmp_path / "out", card=True)
    assert tokenizer_of(tmp_path / "out").chat_template == OTHER


def test_a_model_that_was_trained_on_bytes_has_no_tokenizer(base, tmp_path):
    for tokenizer in ("bytes", str(base / "tokenizer.json")):
        place = tmp_path / tokenizer[-5:]
        place.mkdir()
        (place / "text.txt").write_text("ab ba " * 40)
        recipe = {
            "name": "text",
            "task": "language_modeling",
            "data": {"name": "text", "path": "./text.txt", "seq_len": 8, "tokenizer": tokenizer},
            "model": transformers_model(base),
            "batch": {"global": 2},
            "train": {"steps": 1, "precision": "fp32"},
        }
        train(1, write_recipe(place, yaml.safe_dump(recipe)), place / "run")
        notes = export(find_newest(place / "run" / "checkpoints")[0], place / "out").notes
        skipped = "skipped: the tokenizer of the model's folder, as the run was trained on bytes"
        assert (skipped in notes) == (tokenizer == "bytes"), notes
        assert (place / "out" / "tokenizer.json").exists() == (tokenizer != "bytes")
