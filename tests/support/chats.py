"""Tokenizers with chat templates, of one token for each byte, and files of conversations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot|>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(
    folder: Path, template: str | None = None, *, eos: str | None = "</s>", merges: Sequence[tuple[str, str]] = ()
) -> Path:
    """Save a byte-level tokenizer with these merges, the tokens SPECIAL, and a chat template; returns its folder."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(each) for each in merges)]
    made = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    kept = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    kept.chat_template = template
    kept.save_pretrained(folder)
    return folder


def marked(tokenizer: Any, inputs: Sequence[int], targets: Sequence[int]) -> str:
    """Return the text of a document with its targets «marked», token by token where each is one character.

    A last token that is no target is not shown: neither inputs nor targets hold it.
    """
    tokens, wanted = [*inputs, targets[-1]], [-100, *targets]
    if wanted[-1] < 0:
        tokens, wanted = tokens[:-1], wanted[:-1]
    assert all(target in (-100, token) for token, target in zip(tokens, wanted, strict=True)), (
        "a target is the next token"
    )
    shown = ""
    for learned, several in itertools.groupby(zip(tokens, wanted, strict=True), lambda each: each[1] >= 0):
        text = tokenizer.decode([token for token, _ in several])
        shown += f"«{text}»" if learned else text
    return shown


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Return messages of a user and the assistant in turn, after one of the system if it is `first`."""
    roles = ["system"] if first == "system" else []
    roles += ["user", "assistant"] * len(contents)
    return [{"role": role, "content": each} for role, each in zip(roles, contents, strict=False)]


def some_chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversations of one to three turns, of different lengths."""
    generator = np.random.default_rng(seed)
    return [
        {
            "messages": said(
                *(
                    f"{word * int(generator.integers(1, 9))}"
                    for _ in range(int(generator.integers(1, 4)))
                    for word in "ab"
                )
            )
        }
        for _ in range(count)
    ]
