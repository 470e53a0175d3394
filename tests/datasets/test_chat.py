"""Conversations as samples: which tokens are learned, which share a row, and what is cut."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chats import CHATML, marked, said, save_tokenizer, some_chats, write_lines
from hypothesis import given
from hypothesis import strategies as st
from logged import logged

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest
from distrain.datasets.chat import ChatRows
from distrain.datasets.chat_template import load_tokenizer_folder
from distrain.datasets.packing import pack
from distrain.datasets.ragged import encoded
from distrain.datasets.user import named_data
from distrain.inference.generation import before_answers, unpadded


def build(base: Path, state: dict[str, Any] | None = None, **section: Any) -> Data:
    section = {"path": "chats.jsonl", "tokenizer": "tokenizer", "seq_len": 500, "pack": False, **section}
    return named_data(
        DataRequest(DataSection(name="chat", **section), "language_modeling", seed=0, base=base, state=state)
    )


def shown(base: Path, records: list[Any], **section: Any) -> list[str]:
    """Return the text of each conversation, with what is learned «marked»."""
    path = write_lines(base / "chats.jsonl", records)
    data = build(base, path=str(path), split=[1.0], **section)
    return marked_rows(base, data.splits["train"])


def marked_rows(base: Path, source: Any) -> list[str]:
    tokenizer = load_tokenizer_folder(base / "tokenizer")
    found = []
    for index in range(len(source)):
        batch = source.fetch(np.array([index]))
        length = int(batch["inputs"]["attention_mask"].sum())
        found.append(
            marked(tokenizer, batch["inputs"]["input_ids"][0, :length].tolist(), batch["targets"][0, :length].tolist())
        )
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer", CHATML)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------------
# Which tokens are learned

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '#' + m.role + '#\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant#\n\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "A:{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role + ':' + m.content }}{% endif %};{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# as templates of models that think: only the last answer keeps its thoughts
FORGETFUL = (
    "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('=')[-1] %}"
    "{{ m.role + ': ' + text + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»\n"
            "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n«no 🐈<|im_end|>»",
        ),
        (LLAMA2, "<s>[INST] hé [/INST]« ok </s>»<s>[INST] ? [/INST]« no 🐈 </s>»"),
        (LLAMA3, "<s>#user#\n\nhé<|eot|>#assistant#\n\n«ok<|eot|>»#user#\n\n?<|eot|>#assistant#\n\n«no 🐈<|eot|>»"),
        (TAGGED, "user:hé;A:«ok</s>»;user:?;A:«no 🐈</s>»"),
        (NO_END, "user: hé\nassistant: «ok\n»user: ?\nassistant: «no 🐈\n»"),
        (
            "plain",
            "### User:\nhé\n\n### Assistant:\n«ok</s>»\n\n### User:\n?\n\n### Assistant:\n«no 🐈</s>»\n",
        ),
        (
            "chatml",
            "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»\n"
            "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n«no 🐈<|im_end|>»",
        ),
    ],
    ids=["chatml", "llama-2", "llama-3", "generation tags", "no end token", "built-in plain", "built-in chatml"],
)
def test_what_the_assistant_says_is_learned_and_nothing_else(tmp_path: Path, template: str, expected: str) -> None:
    own = template in ("plain", "chatml")
    save_tokenizer(tmp_path / "tokenizer", None if own else template)
    section = {"template": template} if own else {}
    (found,) = shown(tmp_path, [{"messages": said("hé", "ok", "?", "no 🐈")}], **section)
    # inputs are all tokens but the last, so a white space behind the last end token is not among them
    assert found == expected


@pytest.mark.parametrize("template", [CHATML, TAGGED, FORGETFUL], ids=["chatml", "generation tags", "forgetful"])
def test_only_the_last_answer_or_all_tokens_can_be_learned(tmp_path: Path, template: str) -> None:
    save_tokenizer(tmp_path / "tokenizer", template)
    chat = [{"messages": said("a", "x=b", "c", "y=d")}]
    (last,) = shown(tmp_path, chat, train_on="last")
    assert last.count("«") == 1
    assert "«y=d<" in last
    (every,) = shown(tmp_path, chat, train_on="all")
    assert every.count("«") == 1
    assert every.index("«") == len(next(token for token in ("<|im_start|>", "u") if every.startswith(token)))


def test_a_template_that_shows_a_turn_otherwise_once_more_follows_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", FORGETFUL)
    with pytest.raises(UserError, match=r"chats\.jsonl:2: .* in another way once more follows.*generation.*'last'"):
        shown(tmp_path, [{"messages": said("a", "b")}, {"messages": said("a", "x=b", "c", "d")}])


def test_a_token_on_the_border_of_an_answer_belongs_to_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", NO_END, merges=[("Ġ", "o"), ("Ġo", "k")])
    (found,) = shown(tmp_path, [{"messages": said("hi", "ok")}])
    assert found == "user: hi\nassistant:« ok\n»"


@pytest.mark.parametrize(
    ("records", "form", "expected"),
    [
        ([{"messages": said("S", "q", "r", first="system")}], "messages of role", "system:S;user:q;A:«r</s>»"),
        (
            [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "S"}],
            "ShareGPT",
            "system:S;user:q;A:«r</s>»",
        ),
        ([{"prompt": "q", "completion": "r"}], "prompt and completion", "user:q;A:«r</s>»"),
        (
            [{"prompt": said("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}],
            "prompt and completion",
            "user:a;A:b</s>;user:c;A:«d</s>»",  # of a prompt nothing is learned
        ),
        ([{"prompt": "q", "response": "r"}], "prompt and response", "user:q;A:«r</s>»"),
        ([{"instruction": "q", "input": "i", "output": "r"}], "Alpaca", "user:q\n\ni;A:«r</s>»"),
        (
            [{"instruction": "q", "input": "", "output": "r", "history": [["a", "b"]]}],
            "Alpaca",
            "user:a;A:b</s>;user:q;A:«r</s>»",
        ),
        ([{"instruction": "q", "context": "i", "response": "r"}], "Dolly", "user:q\n\ni;A:«r</s>»"),
    ],
)
def test_every_form_is_detected_and_said(tmp_path: Path, records: list[Any], form: str, expected: str) -> None:
    save_tokenizer(tmp_path / "tokenizer", TAGGED)
    with logged() as lines:
        (found,) = shown(tmp_path, records)
    assert found == expected
    assert any("1 conversations, read as " in line and form in line for line in map(str, lines))


def test_every_kind_of_file_is_the_same(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", TAGGED)
    records = [{"messages": said("a", "b")}, {"messages": said("c", "d", "e", "f")}]
    expected = shown(tmp_path, records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, records)).encode()))
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl.gz", "a.parquet"):
        assert marked_rows(tmp_path, build(tmp_path, path=name, split=[1.0]).splits["train"]) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r":1 has the keys text; expected .*messages"),
        ([1], ":1: found a list, expected an object"),
        ({"messages": []}, "found .., expected a list of messages"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has 3 as content, expected text"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "message 1 is from 'martian'; known are human"),
        ({"messages": [{"role": "system", "content": "x"}, *said("a", "b")]}, "refuses it: .*no system here"),
        ({"messages": said("only a question")}, "1 of 1 conversations .* have no targets .*without_targets to drop"),
        ({"instruction": 1, "output": "x"}, "instruction: found 1, expected text"),
    ],
)
def test_conversations_that_do_not_do(tmp_path: Path, record: Any, message: str) -> None:
    save_tokenizer(tmp_path / "tokenizer", LLAMA2)
    with pytest.raises(UserError, match=message):
        shown(tmp_path, [record])
    kept = [path.name for path in tmp_path.glob(".distrain/*")]
    assert not any(name.startswith(".tmp") for name in kept)


def test_forms_are_not_mixed(base: Path) -> None:
    with pytest.raises(UserError, match=r"chats\.jsonl:2: the records of this file are messages.*has the keys prompt"):
        shown(base, [{"messages": said("a", "b")}, {"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize(
    ("tokenizer", "section", "message"),
    [
        ({"template": None}, {}, "has no chat template. Set data.template to .* 'plain' .* or 'chatml'"),
        ({"template": None, "eos": None}, {"template": "plain"}, "'plain' ends each answer with the end-of-text token"),
        ({"template": CHATML}, {"template": "gone.jinja"}, "there is no file at .*gone.jinja"),
        ({"template": "{% for"}, {}, "refuses it: TemplateSyntaxError"),
        ({"template": CHATML}, {"tokenizer": "gone"}, "there is no tokenizer in"),
        ({"template": CHATML}, {"seq_len": 0}, "seq_len 0 should be at least 1"),
    ],
)
def test_tokenizers_and_templates_that_do_not_do(
    tmp_path: Path, tokenizer: dict[str, Any], section: dict[str, Any], message: str
) -> None:
    save_tokenizer(tmp_path / "tokenizer", **tokenizer)
    with pytest.raises(UserError, match=message):
        shown(tmp_path, [{"messages": said("a", "b")}], **section)


def test_a_template_can_be_a_file(base: Path) -> None:
    (base / "mine.jinja").write_text(TAGGED)
    assert shown(base, [{"messages": said("a", "b")}], template="mine.jinja") == ["user:a;A:«b</s>»"]


# --------------------------------------------------------------------------------------------------------------------
# What is cut


def test_what_is_too_long_is_cut_dropped_or_refused_and_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", TAGGED)
    # user:a;A:b</s>; has 12 tokens, 11 of them inputs
    records = [{"messages": said("a", "b")}, {"messages": said("a", "bcdefg")}, {"messages": said("abcdefgh", "b")}]
    path = write_lines(tmp_path / "chats.jsonl", records)
    section: dict[str, Any] = {"path": str(path), "split": [1.0], "seq_len": 11}
    with pytest.raises(
        UserError, match=r"2 of 3 .* more than data.seq_len \+ 1 = 12 tokens, the longest 19.*number 2, 3"
    ):
        build(tmp_path, **section, too_long="error")
    with pytest.raises(UserError, match=r"1 of 3 conversations .* have no targets \(number 3 of the file\)"):
        build(tmp_path, **section)
    source = build(tmp_path, **section, without_targets="drop").splits["train"]
    assert marked_rows(tmp_path, source) == ["user:a;A:«b</s>»", "user:a;A:«bcd»"]
    assert any("2 of 3" in each and "12 tokens together, 6 of them targets" in each for each in source.warnings)
    assert any("1 of 3" in each and "are dropped" in each for each in source.warnings)
    source = build(tmp_path, **section, too_long="drop").splits["train"]
    assert marked_rows(tmp_path, source) == ["user:a;A:«b</s>»"]
    assert source.warnings == (
        "2 of 3 conversations of the split 'train' are longer than data.seq_len 11 and are dropped",
    )
    with pytest.raises(UserError, match="none of the 3 conversations"):
        build(tmp_path, **{**section, "seq_len": 5}, too_long="drop")


# --------------------------------------------------------------------------------------------------------------------
# Packs


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30), st.integers(0, 3))
def test_every_document_is_in_one_pack_that_holds_it(lengths: list[int], size: int, seed: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    packs = pack(sizes, size, seed)
    assert sorted(packs.values.tolist()) == list(range(len(lengths)))
    sums = [int(sizes[packs.row(index)].sum()) for index in range(len(packs))]
    assert all(each <= size for each in sums)
    # two packs that fit into one would have been one
    assert all(a + b > size for at, a in enumerate(sums) for b in sums[:at])
    again = pack(sizes, size, seed)
    assert (again.values.tolist(), again.ends.tolist()) == (packs.values.tolist(), packs.ends.tolist())


def documents_of(source: ChatRows) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, targets) of each document of packed rows."""
    batch = source.fetch(np.arange(len(source)))
    inputs = batch["inputs"]
    for tokens, positions, targets in zip(inputs["input_ids"], inputs["position_ids"], batch["targets"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(tokens)]
        for start, stop in itertools.pairwise(starts):
            assert positions[start:stop].tolist() == list(range(stop - start))
            if (targets[start:stop] >= 0).any():
                yield tokens[start:stop].tolist(), targets[start:stop].tolist()


def test_packs_hold_the_documents_whole(base: Path) -> None:
    write_lines(base / "chats.jsonl", some_chats(60))
    apart, packed = build(base), build(base, pack=True)
    assert (packed.packed, packed.meta.tokens_per_sample, packed.meta.input_shape) == (True, 500, (500,))
    assert (apart.packed, apart.meta.tokens_per_sample) == (False, None)
    for name in ("train", "test"):
        source: Any = apart.splits[name]
        rows = [source.fetch(np.array([index])) for index in range(len(source))]
        expected = [(row["inputs"]["input_ids"][0].tolist(), row["targets"][0].tolist()) for row in rows]
        found: Any = packed.splits[name]
        assert sorted(documents_of(found)) == sorted(expected)
        assert len(found) < len(source) / 2
    assert len(apart.splits["train"]) == 54  # type: ignore[arg-type]


def test_rows_of_a_batch_are_padded_to_its_longest(base: Path) -> None:
    write_lines(base / "chats.jsonl", [{"messages": said("a", "b")}, {"messages": said("a", "b" * 9)}])
    source: Any = build(base, split=[1.0]).splits["train"]
    batch = source.fetch(np.array([0, 1]))
    mask = batch["inputs"]["attention_mask"]
    assert mask.sum(1).tolist() == [len(batch["targets"][1]) - 8, len(batch["targets"][1])]
    assert (batch["targets"][~mask] == -100).all()
    assert torch.equal(batch["inputs"]["input_ids"][0][mask[0]], source.fetch(np.array([0]))["inputs"]["input_ids"][0])


# --------------------------------------------------------------------------------------------------------------------
# What is kept


def kept(base: Path) -> list[str]:
    return sorted(path.name for path in (base / ".distrain").iterdir())


def test_what_was_encoded_is_found_again_and_a_change_is_encoded_anew(base: Path) -> None:
    records = [{"messages": said("a", "b")}, {"messages": said("c", "d")}]
    first = shown(base, records)
    folder = base / ".distrain" / kept(base)[0]
    time = (folder / "index.json").stat().st_mtime_ns
    assert shown(base, records) == first
    assert (folder / "index.json").stat().st_mtime_ns == time
    seen = {tuple(kept(base))}
    for change in (
        lambda: shown(base, [*records[::-1]]),
        lambda: shown(base, records, train_on="last"),
        lambda: shown(base, records, template="plain"),
        lambda: save_tokenizer(base / "tokenizer", LLAMA3) and shown(base, records),
    ):
        change()
        assert tuple(kept(base)) not in seen
        seen.add(tuple(kept(base)))
    assert len(kept(base)) == 5
    build(base, split=[1.0], cache="elsewhere")
    assert {path.name for path in (base / "elsewhere").iterdir()} < set(kept(base))


def test_a_folder_that_cannot_be_written_to_is_said(base: Path) -> None:
    (base / "file").write_text("")
    with pytest.raises(UserError, match=r"name a folder that can be written to in data\.cache"):
        shown(base, [{"messages": said("a", "b")}], cache="file")


def test_what_was_kept_and_is_damaged_is_refused(base: Path) -> None:
    shown(base, [{"messages": said("a", "b")}])
    folder = base / ".distrain" / kept(base)[0]
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(UserError, match=r"tokens\.bin has .* bytes, expected .*; remove it"):
        build(base, split=[1.0])
    shutil.rmtree(folder)
    build(base, split=[1.0])


def test_processes_that_start_together_keep_one_result(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    done: list[str] = []

    def encode(add: Any, name: str, meanwhile: Any = lambda: None) -> dict[str, Any]:
        meanwhile()
        add({"values": np.arange(3)})
        done.append(name)
        return {"by": name}

    def other() -> None:
        encoded(file, None, {}, {"values": "int32"}, lambda add: encode(add, "the other"))

    one = encoded(file, None, {}, {"values": "int32"}, lambda add: encode(add, "this", other))
    assert done == ["the other", "this"]
    assert one.facts == {"by": "the other"}
    assert one.columns["values"].row(0).tolist() == [0, 1, 2]
    assert len(kept(tmp_path)) == 1


def test_files_that_differ_in_their_ending_alone_are_encoded_each(tmp_path: Path) -> None:
    for number, ending in enumerate(("csv", "tsv")):
        file = tmp_path / f"a.{ending}"
        file.write_text("x")

        def encode(add: Any, value: int = number) -> dict[str, Any]:
            add({"values": np.array([value])})
            return {}

        assert encoded(file, None, {}, {"values": "int32"}, encode).columns["values"].row(0).tolist() == [number]


def test_a_folder_holds_splits_and_a_state_is_held_against_the_tokenizer(base: Path) -> None:
    for name, count in (("train", 5), ("test", 2)):
        write_lines(base / f"{name}.jsonl", some_chats(count, seed=count))
    data = build(base, path=".")
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 5, "test": 2}  # type: ignore[arg-type]
    data = build(base, path=None, split={"train": "train.jsonl", "test": "test.jsonl"})
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 5, "test": 2}  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds the splits train, test already"):
        build(base, path=".", split=[0.5, 0.5])
    state = json.loads(json.dumps(data.state))
    build(base, path=".", state=state)
    with pytest.raises(UserError, match="trained with another chat template"):
        build(base, path=".", state=state, template="plain")
    save_tokenizer(base / "tokenizer", CHATML, merges=[("a", "b")])
    with pytest.raises(UserError, match="trained with another tokenizer"):
        build(base, path=".", state=state)


def test_prompts_end_where_the_model_answers(base: Path) -> None:
    write_lines(base / "chats.jsonl", some_chats(5))
    data, packed = build(base, split=[1.0]), build(base, pack=True, split=[1.0]).splits["train"]
    assert data.read is not None
    assert data.meta.decode is not None
    write_lines(base / "prompts.jsonl", [{"messages": said("a", "b", "c", "gone")}, {"prompt": "x"}])
    (base / "prompts.txt").write_text("x\n")
    batch = data.read(base / "prompts.jsonl").fetch(np.array([0, 1]))
    texts = [
        data.meta.decode(row[:length].tolist())
        for row, length in zip(batch["inputs"], batch["lengths"].tolist(), strict=True)
    ]
    assert texts == ["user\na\nassistant\nb\nuser\nc\nassistant\n", "user\nx\nassistant\n"]
    assert data.encode is not None
    assert data.chat is not None
    assert data.meta.decode(data.encode("é x")) == "é x"
    assert data.chat(said("a", "b", "c")) == batch["inputs"][0, : int(batch["lengths"][0])].tolist()
    # a sample is a prompt up to its last answer
    rows = data.splits["train"].fetch(np.arange(5))
    (base / "chats.jsonl").rename(base / "same.jsonl")
    asked = data.read(base / "same.jsonl").fetch(np.arange(5))
    prompts = unpadded(asked, data.meta, False)
    assert before_answers(rows, unpadded(rows, data.meta, False)) == prompts
    together = packed.fetch(np.array([0]))
    assert before_answers(together, unpadded(together, data.meta, False))[0] in prompts
    one = data.read(base / "prompts.txt").fetch(np.array([0]))
    assert one["inputs"][0].tolist() == batch["inputs"][1, : int(batch["lengths"][1])].tolist()
