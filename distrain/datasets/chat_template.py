"""Chat templates: conversations -> tokens, and which of them are targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from distrain.config import UserError
from distrain.datasets.conversations import Conversation, Message
from distrain.system.output import error_line, one_line

TrainOn = Literal["assistant", "last", "all"]

PLAIN = """\
{%- for message in messages -%}
{{ '### ' + message['role'].capitalize() + ':\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}
"""
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}

_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
_BATCH = 256
"""Conversations that are tokenized at once."""

Span = tuple[int, int]


def tokenizer_digest(folder: Path) -> str:
    """Return the hash of the files of a tokenizer, its chat template among them; raises UserError without any."""
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if folder.is_file() or not files:
        raise UserError(
            f"data.tokenizer: there is no tokenizer in {folder}; expected a folder that a tokenizer's save_pretrained "
            "wrote, as beside a model's weights"
        )
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_tokenizer_folder(folder: Path, **options: Any) -> Any:
    """Return the tokenizer of a folder, one of transformers' that knows where in a text its tokens are.

    `options` are the tokenizer's own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"data.tokenizer: the tokenizer in {folder} cannot be opened: {error_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer: {type(tokenizer).__name__} in {folder} cannot tell where in a text its tokens are; use a "
            "tokenizer with a tokenizer.json"
        )
    return tokenizer


def vocabulary_facts(tokenizer: Any, folder: Path) -> dict[str, int]:
    """Return the number that pads and the size of the vocabulary; raises UserError where nothing can pad."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise UserError(f"the tokenizer in {folder} has no padding token; set its pad_token")
    added = tokenizer(" ")["input_ids"]  # the special tokens around a text
    return {
        "pad_id": pad_id,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "pads_around": int(pad_id in added),
    }


def padding_warnings(facts: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Return a warning where the token that pads stands around texts as well: it is then masked there."""
    if not facts.get("pads_around"):  # which an earlier cache has not
        return ()
    return (
        f"the tokenizer in {folder} pads with token {facts['pad_id']}, which it also puts around texts: models do not "
        "read it there, and those that are exported do elsewhere, by the tokenizer's own mask. Give the tokenizer a "
        "pad_token of its own",
    )


def check_tokenizer(state: Mapping[str, Any], digest: str, folder: Path) -> None:
    """Raise UserError where the model was trained with another tokenizer."""
    if state.get("tokenizer_digest") != digest:
        raise UserError(
            f"the model was trained with another tokenizer than that of {folder}; use the tokenizer of the training"
        )


class ChatTokenizer:
    """A tokenizer with a chat template."""

    def __init__(self, folder: Path, template: str | None, base: Path = Path()):
        """`template`: one of BUILT_IN, the path of a Jinja file, or None for the tokenizer's own. Raises UserError."""
        self.folder = folder
        self.tokenizer = load_tokenizer_folder(folder)
        self.name, self.template = self._template(template, base)
        self.marks = _GENERATION.search(self.template) is not None
        """Whether the template says itself what a model is to generate."""
        self.vocab_size: int = max(self.tokenizer.get_vocab().values()) + 1
        self._special = set(self.tokenizer.all_special_ids) | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }

    def _template(self, template: str | None, base: Path) -> tuple[str, str]:
        """Return what to call the template in messages, and its text."""
        tokenizer = self.tokenizer
        if template is None:
            try:
                return f"the chat template of {self.folder}", tokenizer.get_chat_template()
            except ValueError as error:
                raise UserError(
                    f"the tokenizer in {self.folder} has no chat template. Set data.template to the path of a Jinja "
                    "file, written as ./FILE, or to 'plain' (### User: …, with the tokenizer's end-of-text token after "
                    "each answer) or 'chatml' (<|im_start|>user …). A model that was tuned to chat already needs the "
                    "template that it was tuned with"
                ) from error
        if template in BUILT_IN:
            if template == "plain" and tokenizer.eos_token is None:
                raise UserError(
                    f"data.template: 'plain' ends each answer with the end-of-text token, and the tokenizer in "
                    f"{self.folder} has none; set its eos_token"
                )
            unknown = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
            if template == "chatml" and unknown:
                raise UserError(
                    f"data.template: 'chatml' needs the tokens <|im_start|> and <|im_end|>, and the tokenizer in "
                    f"{self.folder} lacks {' and '.join(unknown)}; add them to it and to the model, or use 'plain'"
                )
            return f"the template {template!r}", BUILT_IN[template]
        path = base / template
        if not path.is_file():
            raise UserError(
                f"data.template: there is no file at {path}; give the path of a Jinja template, "
                f"{' or '.join(BUILT_IN)}, or leave it out for the tokenizer's own"
            )
        return f"the template {path}", path.read_text(encoding="utf-8")

    # ----------------------------------------------------------------------------------------------------------------

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """Return the tokens (tokens,) after which the model is to answer, uint32."""
        text, _ = self._render(conversation, conversation.messages, prompts=True)
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint32)

    def encode(
        self, conversations: Iterable[Conversation], train_on: TrainOn
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each conversation its tokens (tokens,) and the spans of its targets (spans, 2), in tokens.

        Targets are what the assistant says, with the token that ends it: all turns after those of a prompt, or the
        `last` one alone; or everything. Raises UserError for a conversation that the template refuses, and for a
        template that does not show what the assistant says.
        """
        walk = iter(conversations)
        while several := list(islice(walk, _BATCH)):
            shown = [self._shown(each, train_on) for each in several]
            made = self.tokenizer(
                [text for text, _ in shown],
                add_special_tokens=False,  # they are in the template
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for ids, offsets, (_, spans) in zip(made["input_ids"], made["offset_mapping"], shown, strict=True):
                tokens = np.asarray(ids, dtype=np.uint32)
                if train_on == "all":
                    yield tokens, np.array([[0, len(tokens)]], dtype=np.int32)
                else:
                    yield tokens, self._in_tokens(tokens, np.asarray(offsets).reshape(-1, 2), spans)

    def _shown(self, conversation: Conversation, train_on: TrainOn) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of its targets, in characters."""
        messages = conversation.messages
        text, marked = self._render(conversation, messages)
        if train_on == "all":
            return text, []
        spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [number for number in spoken if number >= conversation.fixed]
        if train_on == "last":
            wanted = wanted[-1:]
        if not self.marks:
            return text, [self._by_prefix(conversation, number, text) for number in wanted]
        if len(marked) != len(spoken):
            raise UserError(
                f"{conversation.place}: {self.name} marks {len(marked)} turns as generated, and the assistant speaks "
                f"{len(spoken)} times; put {{% generation %}} around each of its turns"
            )
        return text, [marked[spoken.index(number)] for number in wanted]

    def _by_prefix(self, conversation: Conversation, number: int, text: str) -> Span:
        """Return where a message is in a conversation's text: between the texts of what is before it and up to it."""
        messages = conversation.messages
        before, _ = self._render(conversation, messages[:number], prompts=True)
        upto = text if number + 1 == len(messages) else self._render(conversation, messages[: number + 1])[0]
        for part, what in ((before, "before"), (upto, "up to")):
            if not text.startswith(part):
                at = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
                raise UserError(
                    f"{conversation.place}: {self.name} shows what is {what} message {number + 1} in another way once "
                    f"more follows: {_around(part, at)} alone, {_around(text, at)} in the whole conversation. So it is "
                    "unknown which tokens are answers. Put {% generation %} … {% endgeneration %} around what the "
                    "assistant says in the template (data.template), or set data.train_on to 'last' where only the "
                    "last answer is shown as it is generated, or to 'all'"
                )
        return len(before), len(upto)

    def _render(self, conversation: Conversation, messages: Sequence[Message], *, prompts: bool = False) -> Any:
        """Return the text of messages, and the spans (start, stop) that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                tools=conversation.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompts,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # whatever the template raises
            what = f"its first {len(messages)} messages" if len(messages) < len(conversation.messages) else "it"
            raise UserError(f"{conversation.place}: {self.name} refuses {what}: {error_line(error)}") from error
        (text,), marked = rendered
        return text, [(int(start), int(stop)) for start, stop in marked[0]] if marked else []

    def _in_tokens(self, tokens: np.ndarray, offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
        """Return spans in tokens for spans in characters: of all tokens that hold a character of one."""
        found = []
        for start, stop in spans:
            inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
            if not len(inside):
                continue
            first, last = int(inside[0]), int(inside[-1]) + 1
            if not self.marks:
                last = self._end(tokens, first, last)
            found.append((first, last))
        return np.array(found, dtype=np.int32).reshape(-1, 2)

    def _end(self, tokens: np.ndarray, first: int, last: int) -> int:
        """Return where a turn ends, without the white space that a template puts after its end token."""
        end = next((at for at in range(last - 1, first, -1) if int(tokens[at]) in self._special), None)
        if end is None or self.tokenizer.decode(tokens[end + 1 : last].tolist()).strip():
            return last
        return end + 1


def _around(text: str, at: int) -> str:
    return f"'…{one_line(text[max(0, at - 20) : at + 20])}…'"
