"""Low-rank adapters, held against those of peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain.config import LoraSection, UserError
from distrain.models import isolated_seed
from distrain.networks.lora import adapted_layers, add_adapters, is_adapter, merge_adapters


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.two = nn.Conv1d(6, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).flatten(2))  # type: ignore[no-any-return]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table(x))  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    """A model of transformers whose layers have weights of (in, out), and tied ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()


TOKENS = torch.tensor([[1, 2, 3, 0, 7], [10, 0, 4, 5, 6]])
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], Tensor]] = {
    "convolutions": (Convolutions, ["one", "two"], torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)),
    "words": (Words, ["table", "body.0", "body.2"], TOKENS),
    "gpt2": (gpt2, ["c_attn", "c_proj"], TOKENS),
}


def built(name: str) -> nn.Module:
    with isolated_seed(3):
        return MODELS[name][0]()


def output(model: nn.Module, x: Tensor) -> Tensor:
    found: Any = model(x)
    return found if isinstance(found, Tensor) else found.logits


def steps(model: nn.Module, x: Tensor) -> None:
    """Train what is trained in a model for three steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        output(model, x).sin().square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_adapters_train_and_merge_as_those_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    _, targets, x = MODELS[name]
    ours, plain = built(name), built(name)
    add_adapters(ours, LoraSection(r=2, alpha=6.0, targets=targets))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2")
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(plain))
    assert torch.equal(output(ours, x), output(plain, x))
    adapter = {key: value for key, value in ours.state_dict().items() if is_adapter(key)}
    found = peft.set_peft_model_state_dict(theirs, copy.deepcopy(adapter))
    assert not found.unexpected_keys
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(map(torch.numel, adapter.values()))
    steps(ours, x)
    steps(theirs, x)
    trained = peft.get_peft_model_state_dict(theirs)
    assert trained.keys() == adapter.keys()
    for key, value in ours.state_dict().items():
        if key in trained:
            torch.testing.assert_close(value, trained[key], rtol=1e-5, atol=1e-6)
    expected = output(theirs, x)
    assert (expected - output(plain, x)).abs().max() > 1e-2
    torch.testing.assert_close(output(ours, x), expected, rtol=1e-5, atol=1e-5)
    merge_adapters(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output(plain, x), expected, rtol=1e-5, atol=1e-5)


def test_initial_values_come_from_the_seed() -> None:
    first, again, other = (built("words") for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        with isolated_seed(seed):
            add_adapters(model, LoraSection(r=2))
    one, two, three = (dict(model.named_parameters()) for model in (first, again, other))
    assert list(adapted_layers(first)) == ["body.0", "body.2"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["body.0.lora_A.weight"], three["body.0.lora_A.weight"])
    assert not one["body.2.lora_B.weight"].any()


def test_dropout_is_that_of_the_adapters_in_training() -> None:
    model = built("words")
    add_adapters(model, LoraSection(r=2, dropout=0.5))
    nn.init.normal_(model.get_parameter("body.0.lora_B.weight"))
    with isolated_seed(1):
        first, second = model(TOKENS), model(TOKENS)
    with isolated_seed(1):
        assert torch.equal(model(TOKENS), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_what_is_named_besides_is_trained_in_full() -> None:
    model = built("words")
    add_adapters(model, LoraSection(r=2, train=["body.2.*"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"body.0.lora_A.weight", "body.0.lora_B.weight", "body.2.weight"}


def test_the_head_of_a_language_model_has_no_adapter_unless_it_is_named() -> None:
    model = built("gpt2")
    add_adapters(model, LoraSection())
    names = [name.rpartition(".")[2] for name in adapted_layers(model)]
    assert names == ["c_attn", "c_proj", "c_fc", "c_proj"]


def test_layers_that_are_not_called_have_no_adapters_and_an_encoder_calls_its_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    add_adapters(model, LoraSection())
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"linear1", "linear2"}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)[~padding]
        model.eval()
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected)
    with pytest.raises(UserError, match=r"self_attn\.out_proj is not called"):
        add_adapters(nn.TransformerEncoder(layer, 2), LoraSection(targets=["out_proj"]))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (LoraSection(targets=["boddy.0"]), "no layer is named 'boddy.0'; did you mean 'body.0'"),
        (LoraSection(targets=["body"]), "body is a Sequential; adapters are for linear layers"),
        (LoraSection(targets=[]), "found an empty list, expected names of layers"),
        (LoraSection(train=["bdy.*"]), "no parameter matches 'bdy.*'; did you mean 'body.2.*'"),
        (LoraSection(targets=["body.0"], train=["body.0.*"]), "body.0 is in model.lora.train as well"),
    ],
)
def test_what_fits_no_layer_is_refused(section: LoraSection, said: str) -> None:
    with pytest.raises(UserError) as error:
        add_adapters(built("words"), section)
    assert said in str(error.value)


def test_a_model_without_such_layers_is_refused() -> None:
    for model in (nn.Conv1d(2, 2, 1), nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU())):
        with pytest.raises(UserError, match="the model has no linear layer"):
            add_adapters(model, LoraSection())


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 7


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def test_a_layer_into_which_an_adapter_cannot_be_merged_is_refused() -> None:
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    for layer in (Standardized(3, 4, 3), Scaled(5, 4), weighted):
        with pytest.raises(UserError, match=rf"0 \({type(layer).__name__}\) computes its weight, or with it, in a way"):
            add_adapters(nn.Sequential(layer), LoraSection(targets=["0"]))
    drawn = []
    for layer in (Plain(3, 4), nn.Linear(3, 4)):  # trying it draws nothing
        torch.manual_seed(1)
        add_adapters(nn.Sequential(layer), LoraSection(targets=["0"]))
        drawn.append(layer.get_parameter("lora_A.weight"))
    assert torch.equal(*drawn)


def test_a_tied_weight_and_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"the weight of transformer\.wte is also lm_head\.weight"):
        add_adapters(built("gpt2"), LoraSection(targets=["wte"]))
    with pytest.raises(UserError, match="a convolution with 2 groups"):
        add_adapters(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraSection(targets=["0"]))
