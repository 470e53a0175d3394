"""The layer of a language model that makes its logits: what a loss may take over, so that they are never whole."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.calling import calling_convention
from distrain.networks.huggingface import is_transformers
from distrain.networks.undisturbed import fake_tensors, undisturbed, use_stand_ins


def find_head(model: nn.Module) -> tuple[str, str]:
    """Return the name of the linear layer whose output is a model's logits, and why there is none; one is empty.

    A class states it as its `output_head`. A causal language model of transformers is tried with tensors of which only
    the shapes are there, since many scale or cap what comes out of that layer. Raises UserError for a stated one that
    the model does not have.
    """
    kind, name = type(model).__name__, getattr(type(model), "output_head", "")
    if name:
        if name not in dict(model.named_modules()):
            raise UserError(f"model: {kind}.output_head is {name!r}, and the model has no such layer; correct it")
    elif is_transformers(model):
        layer = model.get_output_embeddings()  # type: ignore[operator]
        name = next((key for key, module in model.named_modules() if module is layer), "")
    if not name:
        return "", f"{kind} does not state which layer makes its logits (output_head)"
    head = model.get_submodule(name)
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "", f"{name} of {kind} is not a plain nn.Linear"
    if is_transformers(model) and not _is_last(model, head):
        return "", f"{kind} computes with what {name} returns, or cannot be tried"
    return name, ""


def _is_last(model: nn.Module, head: nn.Linear) -> bool:
    """Whether what the head returns, called once, is what the model returns as its logits."""
    made: list[Tensor] = []

    def forward(_: nn.Linear, hidden: Tensor) -> Tensor:
        made.append(hidden.float().sum())  # without dimensions, as a loss is
        return made[-1]

    with undisturbed(model):
        head.forward = MethodType(forward, head)  # type: ignore[method-assign]
        model.eval()  # draws no random numbers
        try:
            with fake_tensors(), torch.no_grad():
                use_stand_ins(model, torch.device("cpu"))
                tokens = torch.zeros(1, 4, dtype=torch.long)
                output = calling_convention(model)(model, tokens)
        except Exception:  # whatever it is: it computes in another way than is known here
            return False
    return len(made) == 1 and output.logits is made[0]
