"""Text after prompts: in a batch as alone, by every kind of model; stop texts, whole characters, ends and errors."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import cli, train, write_recipe
from torch import nn
from worlds import in_world

from distrain.cli.generate import generate
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.inference.generating import read_prompts
from distrain.inference.generation import GenerationOptions, Generator, TextStream
from distrain.inference.trained import Trained
from distrain.networks.decoding import Sampling

TEXT = "the quick brown fox jumps over the lazy dög, 5€ a day. "
PAIRS = "".join(f"{word} {word[::-1]}\t{word[::-1]} {word}\n" for word in TEXT.split() * 3)


class Plain(nn.Module):
    """A language model of its own: a GRU, which no method continues."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.layer = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(tokens))[0])


MODELS = {
    "gpt": "{name: gpt, n_layer: 2, n_head: 2, d_model: 16, positions: rotary}",
    "own": "{name: 'test_generation:Plain'}",
    "gpt2": "{name: 'transformers:AutoModelForCausalLM', "
    "config: {model_type: gpt2, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 48}}",
    "llama": "{name: 'transformers:AutoModelForCausalLM', config: {model_type: llama, hidden_size: 16, "
    "intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 48}}",
    "transformer": "{name: seq2seq, d_model: 16, n_layer: 1}",
    "gru": "{name: seq2seq, kind: gru, d_model: 16, n_layer: 1}",
    "bart": "{name: 'transformers:AutoModelForSeq2SeqLM', config: {model_type: bart, d_model: 16, encoder_layers: 1, "
    "decoder_layers: 1, encoder_attention_heads: 2, decoder_attention_heads: 2, encoder_ffn_dim: 16, "
    "decoder_ffn_dim: 16, max_position_embeddings: 48}}",
}
PROMPTS = ["the quick", "fox jumps over the lazy dög, 5", "a", "lazy dög", "the lazy dög, 5€"]


def recipe_of(folder: Path, kind: str) -> Path:
    pairs = kind in ("transformer", "gru", "bart")
    (folder / "data.txt").write_text(PAIRS if pairs else TEXT * 30)
    data = "{name: parallel_text, path: data.txt, source_tokenizer: chars, target_tokenizer: chars}"
    return write_recipe(
        folder,
        f"""
name: writes
task: {"seq2seq" if pairs else "language_modeling"}
data: {data if pairs else "{name: text, path: data.txt, seq_len: 44}"}
model: {MODELS[kind]}
optim: {{lr: 1.0e-2}}
batch: {{global: 8}}
train: {{steps: 2, precision: bf16}}
eval: {{every: null}}
""",
    )


def untrained(recipe: Path) -> Trained:
    """Return a model of a recipe as it is at the start, sharp enough that no two tokens are as likely as each other."""
    from distrain.data import build_data
    from distrain.models import build_model
    from distrain.parallel import open_world
    from distrain.training.tasks import TaskContext, build_objective

    found = load_recipe(recipe).recipe
    data = build_data(found)
    model = build_model(found, data.meta).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    objective = build_objective(found, data.meta)
    objective.bind(model, TaskContext(found, data.meta, torch.device("cpu"), lambda: model))
    return Trained(recipe, found, data, model, objective, open_world("fp32"), {})


def tokens_of(trained: Trained, texts: Sequence[str]) -> list[list[int]]:
    assert trained.data.encode is not None
    return [list(trained.data.encode(text)) for text in texts]


def in_batches_and_alone(recipe: str) -> None:
    trained = untrained(Path(recipe))
    generator = Generator(trained)
    prompts = tokens_of(trained, PROMPTS)
    for sampling in (Sampling(), Sampling(0.7, top_p=0.95), Sampling(1.3, top_k=20)):
        options = GenerationOptions(24, sampling, stops=("z", "q"), seed=3)
        together = generator.generate(prompts, options)
        alone = [generator.generate([prompt], options, [at])[0] for at, prompt in enumerate(prompts)]
        assert together == alone
        backwards = generator.generate(prompts[::-1], options, range(len(prompts))[::-1])
        assert together == backwards[::-1]
        assert len({each.text for each in together}) > 1
        assert not any({"z", "q"} & set(each.text) for each in together)
        if sampling.temperature:
            others = generator.generate(prompts, options, [at + 5 for at in range(len(prompts))])
            assert others != together, "what is drawn depends on the number of the prompt"
            assert generator.generate(prompts, GenerationOptions(24, sampling, ("z", "q"), 4)) != together, (
                "and the seed"
            )
    greedy = generator.generate(prompts, GenerationOptions(12, Sampling()))
    assert [each.text for each in greedy] == [by_full_passes(trained, prompt, 12) for prompt in prompts]
    shown: list[str] = []
    (found,) = generator.generate(prompts[1:2], GenerationOptions(12, Sampling()), show=shown.append)
    assert found == greedy[1]
    assert "".join(shown) == found.text


@torch.no_grad()
def by_full_passes(trained: Trained, prompt: list[int], count: int) -> str:
    """Return the text of the likeliest tokens, each from a pass over all before it, as training computes it."""
    meta, model = trained.data.meta, trained.model
    assert meta.decode is not None
    pairs = trained.recipe.form == "seq2seq"
    written = [meta.bos_id or 0] if pairs else list(prompt)
    start = len(written)
    for _ in range(count):
        tokens = torch.tensor([written])
        inputs: Any = {"source": torch.tensor([prompt]), "target": tokens} if pairs else tokens
        written.append(int(trained.objective.call(model, inputs).logits[0, -1].argmax()))
        if written[-1] == meta.eos_id:
            break
        if not pairs and getattr(model, "seq_len", 99) == len(written) - 1:
            raise AssertionError("the context is longer than what this test writes")
    return meta.decode(written[start:])


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_depends_on_its_prompt_and_number_alone(tmp_path: Path, kind: str) -> None:
    in_world(1, in_batches_and_alone, str(recipe_of(tmp_path, kind)))


def at_the_last_position(recipe: str) -> None:
    trained = untrained(Path(recipe))
    generator = Generator(trained)
    prompts = tokens_of(trained, ["the", "the quick brown fox jumps over the lazy", "the quick brown fox jumps"])
    found = generator.generate(prompts, GenerationOptions(30, Sampling(1.0)))
    assert [(each.tokens, each.finish) for each in found] == [(30, "length"), (9, "context"), (23, "context")]
    options = GenerationOptions(30, Sampling(1.0))
    assert found == [generator.generate([prompt], options, [at])[0] for at, prompt in enumerate(prompts)]
    with pytest.raises(UserError, match="the prompt has 48 tokens, and the model 48 positions; shorten it"):
        generator.check([1] * 48, "the prompt")


def test_a_transformers_model_ends_at_its_last_position_whatever_else_is_in_the_batch(tmp_path: Path) -> None:
    in_world(1, at_the_last_position, str(recipe_of(tmp_path, "gpt2")))


# --------------------------------------------------------------------------------------------------------------------
# Text as it grows


def as_text(ids: Sequence[int]) -> str:
    """Decode tokens that are numbers of bytes, several to a token."""
    return b"".join(PIECES[each] for each in ids).decode(errors="replace")


PIECES: list[bytes] = []


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("héllo wörld, 5€ a 🎉🎊 day", (), None),
        ("say ENDE and END", ("END", "ENDLESS"), "say "),
        ("aab aac aad", ("aad", "aax"), "aab aac "),
        ("a\n\nUser: b", ("\n\nUser:",), "a"),
        ("a\n\nUser", ("\n\nUser:",), "a\n\nUser"),
        ("ünd ü€", ("€",), "ünd ü"),
        ("\x00🎉", ("never",), None),
        ("STOP", ("STOP",), ""),
    ],
)
def test_what_is_shown_is_whole_and_ends_before_a_stop_text(
    size: int, text: str, stops: tuple[str, ...], wanted: str | None
) -> None:
    raw = text.encode()
    PIECES[:] = [b"before ", *(raw[at : at + size] for at in range(0, len(raw), size))]
    stream = TextStream(as_text, [0], stops)
    shown = []
    for token in range(1, len(PIECES)):
        shown.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
        assert not any(stop in "".join(shown) for stop in stops)
        if stream.stopped:
            break
    shown.append(stream.finish())
    assert "".join(shown) == stream.text == (text if wanted is None else wanted)
    assert stream.stopped == any(stop in text for stop in stops)


def test_bytes_that_are_no_text_are_shown_as_such_and_hold_nothing_back() -> None:
    generator = random.Random(0)
    raw = bytes(generator.randrange(128, 256) for _ in range(3000))
    PIECES[:] = [bytes([each]) for each in raw]
    stream = TextStream(as_text)
    longest = 0
    for token in range(len(PIECES)):
        stream.push(token)
        longest = max(longest, len(as_text(range(token + 1))) - len(stream.text)) if token % 97 == 0 else longest
    stream.finish()
    assert longest <= 8
    assert len(stream.text) == pytest.approx(len(raw.decode(errors="replace")), rel=0.01)


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_continues_prompts_and_says_what_it_cannot(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, recipe_of(tmp_path, "gpt"), run, "train.steps=60")
    one = cli("generate", run, "--prompt", "the quick", "--max-new-tokens", 20)
    assert one.status == 0, one.err
    assert one.err == "20 tokens; ended by --max-new-tokens\n"
    options = ("--max-new-tokens", "60", "--temperature", "0.8", "--top-p", "0.9", "--stop", "over", "--seed", "7")
    lines = [{"prompt": text, "id": at} for at, text in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    for batch in (1, 3):
        ended = cli("generate", run, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / f"{batch}.jsonl",
                    "--batch", batch, *options)  # fmt: skip
        assert (ended.status, ended.out) == (0, f"wrote 5 texts to {tmp_path}/{batch}.jsonl\n"), ended.err
        assert "it continues from the last half" in ended.err
    found = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert (tmp_path / "3.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()
    assert [{"prompt": each["prompt"], "id": each["id"]} for each in found] == lines
    assert {each["finish"] for each in found} <= {"length", "stop"}
    assert all("over" not in each["text"] and each["tokens"] <= 60 for each in found)
    printed = cli("generate", run, "--prompt", PROMPTS[0], "--json", *options)
    assert json.loads(printed.out) == {key: value for key, value in found[0].items() if key != "id"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    (tmp_path / "messages.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a" * 45}))
    prompts = {
        "messages.jsonl": "messages.jsonl, line 1 has messages, and the tokenizer of data set 'text' has no chat templ",
        "long.jsonl": "long.jsonl, line 2 has 45 tokens, and the model 44 tokens in its context; shorten it",
    }
    for name, message in prompts.items():
        ended = cli("generate", run, "--prompts", tmp_path / name, "-o", tmp_path / "no.jsonl")
        assert ended.status == 1
        assert message in ended.err
        assert not list(tmp_path.glob("*no.jsonl*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"}', 'line 2 has text; expected {"prompt": TEXT}'),
        ('{"prompt": "a", "messages": []}', "line 2 has both a prompt and messages"),
        ('{"prompt": 3}', "line 2: the prompt is no text"),
        ('{"messages": "a"}', "line 2: the messages are no list of objects"),
        ('{"prompt": "a", "tokens": 1}', "line 2 has the key 'tokens'"),
        ("[]", "line 2 is no object"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}, {message}")):
        list(read_prompts(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="has no prompts"):
        list(read_prompts(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either --prompt TEXT or --prompts"),
        ({"prompt": "a", "prompts": Path("p.jsonl")}, "give either --prompt TEXT or --prompts"),
        ({"prompt": "a", "top_p": 0.5}, "add --temperature"),
        ({"prompt": "a", "top_k": 5}, "add --temperature"),
        ({"prompt": "a", "top_p": 0.0, "temperature": 1.0}, "expected a number above 0 and at most 1"),
        ({"prompt": "a", "out": "a.csv"}, "written as a .jsonl file"),
        ({"prompt": "a", "out": "nowhere/a.jsonl"}, "expected a place in a folder that exists"),
        ({"prompt": "a", "stop": [""]}, "would end each text at once"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_a_model_is_loaded(
    arguments: dict[str, Any], message: str
) -> None:
    defaults = {"prompt": None, "prompts": None, "max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "top_k": None}
    others = {"stop": None, "seed": 0, "batch": 1, "out": None, "as_json": False}
    with pytest.raises(UserError, match=re.escape(message)):
        generate("nowhere", **(defaults | others | arguments))


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path)).recipe
    trained: Any = SimpleNamespace(recipe=recipe, data=None, checkpoint=Path("runs/x"))
    with pytest.raises(UserError, match=re.escape("runs/x was trained for task classification, which writes no text")):
        Generator(trained)
