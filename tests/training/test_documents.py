"""Conversations that share a row: the loss of each alone, on any number of processes, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chats import CHATML, save_tokenizer, some_chats, write_lines
from runs import assert_close, assert_same_run, checkpoint, last, losses, rows, train, write_recipe
from torch import nn

from distrain.config import DataSection, UserError
from distrain.config.yaml import parse_recipe
from distrain.datasets.base import Data, DataMeta, DataRequest
from distrain.datasets.user import named_data
from distrain.inference import predict_table as predict
from distrain.networks.calling import calling_convention
from distrain.networks.gpt import GPT
from distrain.optim import build_loss
from distrain.training.documents import check_documents_apart

VOCABULARY = 262
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
NAMES = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def of_transformers(model_type: str, attention: str = "sdpa", **config: Any) -> nn.Module:
    made = transformers.CONFIG_MAPPING[model_type](**{**SIZE, **NAMES, "max_position_embeddings": 256, **config})
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)


def own(positions: str) -> Callable[[], nn.Module]:
    return lambda: GPT(VOCABULARY, 256, n_layer=2, n_head=2, d_model=32, positions=positions)  # type: ignore[arg-type]


def recognisable(model: nn.Module) -> nn.Module:
    """Make what a token sees matter, which it hardly does with initial weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


APART = {
    "gpt": own("learned"),
    "gpt, rotary": own("rotary"),
    "llama": lambda: of_transformers("llama"),
    "gpt2": lambda: of_transformers("gpt2"),
    "qwen2, eager": lambda: of_transformers("qwen2", "eager"),
    "gemma3 with a window": lambda: of_transformers("gemma3_text", sliding_window=6, head_dim=16),
}


def chats(base: Path, *, pack: bool) -> Data:
    section = DataSection(  # type: ignore[call-arg]
        name="chat", path="chats.jsonl", tokenizer="tokenizer", seq_len=256, pack=pack, split=[1.0]
    )
    return named_data(DataRequest(section, "language_modeling", seed=0, base=base))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    save_tokenizer(folder / "tokenizer", CHATML)
    write_lines(folder / "chats.jsonl", some_chats(24))
    return folder


def loss_and_gradient(model: nn.Module, data: Data) -> tuple[float, float, torch.Tensor]:
    """Return the sum of the loss over the whole split in batches of 4, its count, and the gradient of the sum."""
    recipe = parse_recipe(
        "{name: a, task: language_modeling, data: chat, model: gpt, batch: {global: 4}, train: {steps: 1}}", "here"
    )
    loss, call, source = build_loss(recipe, DataMeta()), calling_convention(model), data.splits["train"]
    model.zero_grad()
    total = torch.zeros(2, dtype=torch.float64)
    for ids in np.split(np.arange(len(source)), range(4, len(source), 4)):  # type: ignore[arg-type]
        batch = source.fetch(ids)  # type: ignore[union-attr]
        loss_sum, count = loss.sum_and_count(call(model, batch["inputs"]).logits, batch["targets"])
        loss_sum.backward()
        total += torch.stack((loss_sum.detach().double(), count))
    gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
    return total[0].item(), total[1].item(), gradient


@pytest.mark.parametrize("build", APART.values(), ids=APART.keys())
def test_the_loss_of_packs_is_that_of_each_conversation_alone(base: Path, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = recognisable(build())
    apart, packed = (loss_and_gradient(model, chats(base, pack=pack)) for pack in (False, True))
    assert apart[1] == packed[1] > 100
    assert packed[0] == pytest.approx(apart[0], rel=1e-6)
    torch.testing.assert_close(packed[2], apart[2], rtol=1e-4, atol=1e-4)
    check_documents_apart(model, calling_convention(model), VOCABULARY, torch.device("cpu"))


def test_flash_attention_gets_all_documents_in_one_row() -> None:
    torch.manual_seed(0)
    model = recognisable(of_transformers("llama"))
    inputs = {"input_ids": torch.randint(1, 200, (2, 8)), "position_ids": torch.arange(4).repeat(2, 2)}
    in_rows = calling_convention(model)(model, inputs).logits
    model.config._attn_implementation = "flash_attention_2"
    convention = calling_convention(model)
    model.config._attn_implementation = "sdpa"  # whose mask does for one row what the kernel does
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    torch.testing.assert_close(convention(model, inputs).logits, in_rows)
    assert seen == [(1, 16)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: of_transformers("opt", ffn_dim=48, word_embed_proj_dim=32), "OPT.* sees the conversations before it"),
        (lambda: of_transformers("bert", is_decoder=True), "sees the conversations before it"),
        (lambda: of_transformers("bloom", "eager", n_head=2), "takes no position_ids.* data.pack: false"),
    ],
    ids=["opt", "bert", "bloom"],
)
def test_models_that_mix_documents_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    model = build()  # with initial weights, where little of what it sees matters
    with pytest.raises(UserError, match=message):
        check_documents_apart(model, calling_convention(model), VOCABULARY, torch.device("cpu"))


def test_a_model_that_counts_positions_by_itself_is_refused() -> None:
    class Counting(GPT):
        def forward(self, input_ids: Any, position_ids: Any = None, attention_mask: Any = None) -> Any:
            mask = (position_ids == 0).cumsum(1)
            same = (mask[:, :, None] == mask[:, None, :]).tril()[:, None]
            places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            return self.head(self._hidden(input_ids, places, same))

    torch.manual_seed(0)
    model = Counting(VOCABULARY, 16, n_layer=1, n_head=2, d_model=8)
    with pytest.raises(UserError, match="is read otherwise than at the beginning of a row"):
        check_documents_apart(model, calling_convention(model), VOCABULARY, torch.device("cpu"))


RECIPE = """
name: chats
task: language_modeling
data:
  name: chat
  path: {base}/chats.jsonl
  tokenizer: {base}/tokenizer
  seq_len: 256
  pack: {pack}
  split: [0.7, 0.3]
model: {{name: gpt, n_layer: 1, n_head: 2, d_model: 16, dropout: 0.1}}
optim: {{name: adamw, lr: 1.0e-2, clip_norm: 1.0}}
batch: {{global: 4}}
train: {{steps: 4, precision: fp64}}
eval: {{every: 2 steps}}
checkpoint: {{every: 2 steps, keep: 9, async: false}}
log: {{every: 1 steps}}
"""


@pytest.mark.parametrize("pack", ["true", "false"])
def test_chats_train_alike_on_any_number_of_processes_and_resume_to_the_bit(
    base: Path, pack: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.format(base=base, pack=pack))
    train(1, recipe, tmp_path / "one", "model.dropout=0")
    train(2, recipe, tmp_path / "two", "model.dropout=0")
    assert_close(tmp_path / "one", tmp_path / "two", 1e-9)
    samples = {row["samples"] for name in ("one", "two") for row in rows(tmp_path / name) if row["event"] == "eval"}
    assert len(samples) == 1
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    if pack == "false":
        tested, prompts = (set(predict(tmp_path / "one", each)["text"]) for each in ("test", base / "chats.jsonl"))
        assert tested < prompts
    train(1, recipe, tmp_path / "whole")
    train(1, recipe, tmp_path / "cut", stop_after=2)
    train(1, recipe, tmp_path / "cut")
    assert last(tmp_path / "cut") == checkpoint(tmp_path / "cut", 4)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


HIDING = """
from torch import nn

from distrain.networks.gpt import GPT


class Net(GPT):
    'Begins with a head of zeros, as nanochat does.'

    def __init__(self, vocab_size, seq_len, leaks):
        super().__init__(vocab_size, seq_len, n_layer=1, n_head=2, d_model=8, positions="rotary", tied=False)
        self.leaks = leaks
        for layer in (self.head, self.blocks[0].attention.out):
            nn.init.zeros_(layer.weight)

    def forward(self, input_ids, position_ids=None):
        return super().forward(input_ids, None if self.leaks else position_ids)
"""


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [("single", 1), *(pytest.param(each, 2, marks=pytest.mark.more) for each in ("fsdp2", "zero1", "zero3"))],
)
def test_layers_that_begin_as_zeros_hide_nothing(base: Path, strategy: str, world_size: int, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(HIDING)
    text = RECIPE.format(base=base, pack="true").replace("fp64", "fp32")
    model = "{name: gpt, n_layer: 1, n_head: 2, d_model: 16, dropout: 0.1}"
    assert model in text
    recipe = write_recipe(tmp_path, text.replace(model, '{name: "net.py:Net", leaks: false}'))
    few = ("train.steps=1", "eval.every=null")
    train(world_size, recipe, tmp_path / "apart", *few, strategy=strategy)
    assert losses(tmp_path / "apart")[0] == pytest.approx(np.log(VOCABULARY), rel=1e-6), "they are zeros again"
    ended = train(world_size, recipe, tmp_path / "leaks", "model.leaks=true", *few, status=1, strategy=strategy)
    assert "does not keep apart the conversations" in "".join(rank.err for rank in ended)
