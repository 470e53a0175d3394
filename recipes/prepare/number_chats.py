"""Conversations about numbers, in German and English, and a tokenizer with a chat template to read them with.

`train.jsonl` and `test.jsonl` hold a conversation a line; `tokenizer/` is as a model of transformers has one beside its
weights.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from number_words import english, german
from tokenizers import ByteLevelBPETokenizer

COUNT = 4_000
TESTED = 200
LARGEST = 999

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
"""What is between the tags is what the model is to say, with the token that ends it."""
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def conversation(number: int) -> list[dict[str, str]]:
    """Return two questions about a number, of which the second follows from the first, and their answers."""
    turns = [f"{german(number)}?", english(number), "und eins mehr?", english(number + 1)]
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(turns)]


def write(path: Path) -> None:
    """Write the folder."""
    generator = random.Random(0)
    numbers = list(range(LARGEST))
    generator.shuffle(numbers)
    tested, learned = numbers[:TESTED], numbers[TESTED:]
    path.mkdir(parents=True)
    for name, chosen in (("train", [generator.choice(learned) for _ in range(COUNT)]), ("test", tested)):
        lines = [json.dumps({"messages": conversation(number)}, ensure_ascii=False) for number in chosen]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [message["content"] for number in learned for message in conversation(number)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=320, special_tokens=SPECIAL)
    (path / "tokenizer").mkdir()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
