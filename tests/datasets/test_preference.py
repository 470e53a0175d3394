"""Pairs of answers: what both begin with is the prompt, and what follows it is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, marked, said, save_tokenizer, write_lines

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest
from distrain.datasets.chat_template import load_tokenizer_folder
from distrain.datasets.user import named_data

PLAIN = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def build(base: Path, records: list[Any], template: str = PLAIN, **section: Any) -> Data:
    save_tokenizer(base / "tokenizer", template)
    write_lines(base / "pairs.jsonl", records)
    section = {"path": "pairs.jsonl", "tokenizer": "tokenizer", "seq_len": 100, "split": [1.0], **section}
    request: Any = DataRequest(DataSection(name="preference", **section), "custom", seed=0, base=base)  # type: ignore[arg-type]
    return named_data(request)


def shown(base: Path, source: Any, index: int) -> tuple[str, str]:
    """Return both answers with their targets «marked»."""
    batch = source.fetch(np.array([index]))
    tokenizer = load_tokenizer_folder(base / "tokenizer")
    chosen, rejected = (
        marked(tokenizer, batch["inputs"][side]["input_ids"][0].tolist(), batch["targets"][side][0].tolist())
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p", "chosen": "yes", "rejected": "no"}, ("u:p</s>a:«yes</s>»", "u:p</s>a:«no</s>»")),
        (
            {"prompt": said("p", "q", "r"), "chosen": "yes", "rejected": "no"},
            ("u:p</s>a:q</s>u:r</s>a:«yes</s>»", "u:p</s>a:q</s>u:r</s>a:«no</s>»"),
        ),
        (
            {"prompt": "p", "chosen": said("p", "yes"), "rejected": said("p", "no")},
            ("u:p</s>a:«yes</s>»", "u:p</s>a:«no</s>»"),
        ),
        (
            {
                "prompt": "p",
                "chosen": said("S", "p", "yes", first="system"),
                "rejected": said("S", "p", "no", first="system"),
            },
            ("s:S</s>u:p</s>a:«yes</s>»", "s:S</s>u:p</s>a:«no</s>»"),
        ),
        (
            {
                "prompt": said("S", "p", "q", "r", first="system"),
                "chosen": said("r", "yes"),
                "rejected": said("r", "no"),
            },
            ("s:S</s>u:p</s>a:q</s>u:r</s>a:«yes</s>»", "s:S</s>u:p</s>a:q</s>u:r</s>a:«no</s>»"),
        ),
        (
            {"chosen": said("p", "q", "r", "yes"), "rejected": said("p", "q", "r", "no", "s", "!")},
            ("u:p</s>a:q</s>u:r</s>a:«yes</s>»", "u:p</s>a:q</s>u:r</s>a:«no</s>»u:s</s>a:«!</s>»"),
        ),
    ],
)
def test_the_answers_are_targets_and_the_prompt_is_not(
    tmp_path: Path, record: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert shown(tmp_path, build(tmp_path, [record]).splits["train"], 0) == expected


def test_both_answers_are_padded_each_to_its_longest_and_limits_hold_for_both(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "chosen": "a" * 9, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b" * 5},
        {"prompt": "p" * 30, "chosen": "a", "rejected": "b"},
    ]
    data = build(tmp_path, records, template=CHATML, seq_len=40, without_targets="drop")
    source: Any = data.splits["train"]
    assert len(source) == 2
    assert any("1 of 3 pairs" in each and "dropped" in each for each in source.warnings)
    batch = source.fetch(np.arange(2))
    chosen, rejected = batch["inputs"]["chosen"], batch["inputs"]["rejected"]
    assert (chosen["attention_mask"].sum(1) - rejected["attention_mask"].sum(1)).tolist() == [8, -4]
    for side in ("chosen", "rejected"):
        assert batch["targets"][side].shape == batch["inputs"][side]["input_ids"].shape
        assert (batch["targets"][side][~batch["inputs"][side]["attention_mask"]] == -100).all()
    assert (data.meta.vocab_size, data.meta.input_shape) == (262, (40,))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"pairs\.jsonl:1 has the keys prompt, chosen; expected"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "begin with different messages"),
        ({"prompt": "p", "chosen": "p a", "rejected": "p b"}, "would be there twice"),
        (
            {"prompt": said("S", "p", first="system"), "chosen": said("q", "r", "p", "a"), "rejected": "b"},
            "holds the last message of the prompt, after others",
        ),
        ({"chosen": "a", "rejected": "b"}, "begin with different messages, and there is no prompt"),
    ],
)
def test_pairs_that_do_not_do(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, [record])
