"""Whether a model keeps apart the documents that share a row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.calling import Convention, unwrap_model

_LENGTH = 3
"""Tokens of each document that is tried."""


def check_documents_apart(
    model: nn.Module, call: Convention, vocab_size: int, device: torch.device, *, narrow: bool = False
) -> None:
    """Raise UserError for a model in which a token sees a document before its own, or counts positions from there.

    Tried with a few tokens, since neither a model's arguments nor its class tell: many of those that take
    `position_ids` only look up embeddings by them. `narrow`: whether it computes in 16 bits. All ranks call: a sharded
    model's forward runs collectives.
    """
    if vocab_size < 2:
        return
    first, other, last = (torch.arange(_LENGTH) * step % vocab_size for step in (1, vocab_size // 2 + 1, 2))
    first[0], other[0] = 0, 1
    tokens = torch.stack([torch.cat(each) for each in ((first, last), (other, last), (last, first))])
    positions = torch.arange(_LENGTH).repeat(3, 2)
    inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
    was_training = model.training
    model.eval()  # draws no random numbers
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = call(model, inputs).logits
    finally:
        model.train(was_training)
    after, after_other, alone = logits[0, _LENGTH:], logits[1, _LENGTH:], logits[2, :_LENGTH]
    kind = type(unwrap_model(model)).__name__
    if _differ(after, after_other, logits, narrow=narrow):
        what = "sees the conversations before it in its row"
    elif _differ(after, alone, logits, narrow=narrow):
        what = "is read otherwise than at the beginning of a row"
    else:
        return
    raise UserError(
        f"{kind} does not keep apart the conversations that share a row (data.pack): one of them {what}, though its "
        "positions begin at 0. Set data.pack: false, or take a model that attends by position_ids, as gpt, llama, qwen "
        "and most of transformers do"
    )


def _differ(one: Tensor, other: Tensor, logits: Tensor, *, narrow: bool) -> bool:
    """Whether logits differ by more than rounding."""
    scale = logits.float().abs().max()
    return bool((one.float() - other.float()).abs().max() > (2e-2 if narrow else 1e-4) * scale)
