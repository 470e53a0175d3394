"""The layer of a language model that makes its logits: found where it is the last, and nothing is left of the look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distrain.config import UserError
from distrain.networks.gpt import GPT
from distrain.networks.heads import find_head
from distrain.networks.meta_device import build_on_meta

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 64,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def transformers_model(model_type: str, **values: Any) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**SMALL | values)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


class Wrong(GPT):
    output_head = "haed"


@pytest.mark.parametrize("on_meta", [False, True], ids=["built", "on the meta device"])
@pytest.mark.parametrize(
    ("model_type", "head", "why"),
    [
        ("gpt2", "lm_head", ""),
        ("llama", "lm_head", ""),
        ("mixtral", "lm_head", ""),
        ("gemma2", "", "Gemma2ForCausalLM computes with what lm_head returns"),
        ("granite", "", "GraniteForCausalLM computes with what lm_head returns"),
    ],
)
def test_it_is_found_where_nothing_follows_it(model_type: str, head: str, why: str, on_meta: bool) -> None:
    extra = {"logits_scaling": 8.0} if model_type == "granite" else {}
    model = (
        build_on_meta(lambda: transformers_model(model_type, **extra)) if on_meta else transformers_model(model_type)
    )
    before = {name: (id(each), each.device) for name, each in (*model.named_parameters(), *model.named_buffers())}
    random = torch.get_rng_state()
    found, reason = find_head(model)
    assert (found, reason[: len(why)]) == (head, why)
    assert before == {n: (id(e), e.device) for n, e in (*model.named_parameters(), *model.named_buffers())}
    assert all("forward" not in vars(each) and each.training for each in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_class_states_it() -> None:
    size = {"n_layer": 1, "n_head": 1, "d_model": 4}
    assert find_head(GPT(5, 4, **size)) == ("head", "")
    assert find_head(nn.Linear(2, 2))[1] == "Linear does not state which layer makes its logits (output_head)"
    with pytest.raises(UserError, match=r"Wrong\.output_head is 'haed', and the model has no such layer; correct it"):
        find_head(Wrong(5, 4, **size))
    hooked = GPT(5, 4, **size)
    hooked.head.register_forward_hook(lambda *_: None)
    assert find_head(hooked) == ("", "head of GPT is not a plain nn.Linear")
