"""Files of conversations, prompts with completions, and preferences, in the forms in which they are published.

Imports no torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.system.bounded_json import SUMMARY, read_bounded
from distrain.system.numbers import a_kind
from distrain.system.output import one_line

Message = dict[str, Any]
"""`role`, `content`, and what else a chat template may read, such as `tool_calls`."""

EXPECTED = "a .jsonl (or .jsonl.gz), .json or .parquet file of conversations"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from`, and the role that chat templates know."""


@dataclass(frozen=True)
class Conversation:
    """Messages in their order."""

    messages: list[Message]
    place: str
    """file:line, for errors."""
    tools: Any = None
    """The JSON schemas of the tools that the model may call, for templates that show them."""
    fixed: int = 0
    """So many messages from the first are no targets, whoever wrote them: those of a prompt."""


# --------------------------------------------------------------------------------------------------------------------
# Records


def records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (record, its place) of a file; raises UserError for what is no such file."""
    inner = Path(path.stem) if path.suffix == ".gz" else path
    if not path.is_file():
        raise UserError(f"there is no file at {path}; expected {EXPECTED}")
    if inner.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected {EXPECTED}")
    if inner.suffix == ".parquet":
        yield from _parquet(path)
        return
    count = 0
    for record, place in _array(path) if inner.suffix == ".json" else _lines(path):
        count += 1
        if not isinstance(record, dict):
            raise UserError(f"{place}: found {a_kind(record)}, expected an object")
        yield record, place
    if not count:
        raise UserError(f"{path} holds no conversation")


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line.removeprefix(b"\xef\xbb\xbf")), f"{path}:{number}"
                    except ValueError as error:
                        raise UserError(f"{path}:{number} is not JSON: {error}") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error


def _array(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        content = json.loads(read_bounded(path, SUMMARY))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; a file with an object in each line is named .jsonl") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: found {a_kind(content)}, expected a list of objects")
    yield from ((record, f"{path}, item {number}") for number, record in enumerate(content, start=1))


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield record, f"{path}, row {number}"


# --------------------------------------------------------------------------------------------------------------------
# Conversations


@dataclass(frozen=True)
class Form:
    """A form of conversations, by the keys of a record."""

    name: str
    keys: tuple[str, ...]
    """All of which a record has."""

    def of(self, record: Mapping[str, Any]) -> bool:
        return all(record.get(key) is not None for key in self.keys)


_MESSAGES = Form("messages of role and content", ("messages",))
_SHAREGPT = Form("ShareGPT (conversations of from and value)", ("conversations",))
_ALPACA = Form("Alpaca (instruction, input and output)", ("instruction", "output"))
_DOLLY = Form("Dolly (instruction, context and response)", ("instruction", "response"))
_COMPLETION = Form("prompt and completion", ("prompt", "completion"))
_RESPONSE = Form("prompt and response", ("prompt", "response"))
FORMS = (_MESSAGES, _SHAREGPT, _ALPACA, _DOLLY, _COMPLETION, _RESPONSE)
_PROMPTS = (Form("prompts", ("prompt",)), Form("instructions", ("instruction",)))

_SHOWN = (
    '{"messages": [{"role": "user", "content": …}, …]}, {"conversations": [{"from": "human", "value": …}, …]}, '
    '{"prompt": …, "completion": …} or {"instruction": …, "input": …, "output": …}'
)


def form_of(path: Path) -> Form:
    """Return the form of a file's first record."""
    record, place = next(records(path))
    return _form(record, place, FORMS)


def conversations(path: Path, form: Form) -> Iterator[Conversation]:
    """Yield the conversations of a file whose records are all of one form; raises UserError for one that is not."""
    for record, place in records(path):
        if not form.of(record):
            raise UserError(
                f"{place}: the records of this file are {form.name}, and this one has {_keys(record)}; put different "
                "forms into different files"
            )
        yield _conversation(record, form, place)


def prompts(path: Path) -> Iterator[Conversation]:
    """Yield the prompts of a file for generation: conversations without what the assistant said last.

    Lines of a .txt file are what a user says.
    """
    if path.suffix == ".txt":
        from distrain.datasets.tokens import text_lines

        for number, line in enumerate(text_lines(path), start=1):
            if not line.strip():
                raise UserError(f"{path}:{number} is empty; a prompt needs at least one character")
            yield Conversation([{"role": "user", "content": line}], f"{path}:{number}")
        return
    for record, place in records(path):
        found = _conversation(record, _form(record, place, (*FORMS, *_PROMPTS)), place)
        messages = found.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{place} has no message of a user; a prompt ends with one")
        yield Conversation(messages, place, found.tools)


def _form(record: Mapping[str, Any], place: str, forms: Sequence[Form]) -> Form:
    found = next((form for form in forms if form.of(record)), None)
    if found is None:
        raise UserError(f"{place} has {_keys(record)}; expected {_SHOWN}")
    return found


def _keys(record: Mapping[str, Any]) -> str:
    there = [one_line(str(key)) for key, value in record.items() if value is not None]
    return f"the keys {', '.join(there[:12])}" if there else "no keys"


def _conversation(record: Mapping[str, Any], form: Form, place: str) -> Conversation:
    fixed = 0
    if form is _MESSAGES:
        messages = messages_of(record["messages"], f"{place}: messages")
    elif form is _SHAREGPT:
        messages = messages_of(record["conversations"], f"{place}: conversations")
    elif form in (_ALPACA, _DOLLY, _PROMPTS[1]):
        texts = [_text(record.get("instruction"), f"{place}: instruction")]
        more = record.get("context" if form is _DOLLY else "input")
        if more:
            texts.append(_text(more, f"{place}: {'context' if form is _DOLLY else 'input'}"))
        messages = [*_history(record, place), {"role": "user", "content": "\n\n".join(texts)}]
        if len(form.keys) == 2:
            fixed = len(messages)
            messages.append({"role": "assistant", "content": _text(record[form.keys[1]], f"{place}: {form.keys[1]}")})
    else:
        messages = turns(record["prompt"], "user", f"{place}: prompt")
        if len(form.keys) == 2:
            fixed = len(messages)
            messages += turns(record[form.keys[1]], "assistant", f"{place}: {form.keys[1]}")
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages, fixed = [{"role": "system", "content": system}, *messages], fixed + (fixed > 0)
    return Conversation(messages, place, tools_of(record, place), fixed)


def tools_of(record: Mapping[str, Any], place: str) -> Any:
    """Return the tools of a record, which may be JSON text; None without any."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{place}: tools is no JSON: {error}") from error
    return tools or None


def _history(record: Mapping[str, Any], place: str) -> list[Message]:
    """Return earlier turns, [[user, assistant], …]."""
    found: list[Message] = []
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UserError(f"{place}: history should be a list of [what the user said, what the assistant said]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            found.append({"role": role, "content": _text(text, f"{place}: history")})
    return found


def turns(value: Any, role: str, what: str) -> list[Message]:
    """Return a text as one message of that role, or messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value, what)


def messages_of(value: Any, what: str) -> list[Message]:
    """Return messages as chat templates read them, of `role` and `content`, or `from` and `value`."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{what}: found {_shown(value)}, expected a list of messages")
    found = []
    for number, each in enumerate(value, start=1):
        if not isinstance(each, dict):
            raise UserError(f"{what}: message {number} is {_shown(each)}, expected an object of role and content")
        message = {key: item for key, item in each.items() if item is not None}  # templates would show them as "None"
        if "role" not in message and "from" in message:
            speaker = message.pop("from")
            if speaker not in _ROLES:
                raise UserError(f"{what}: message {number} is from {_shown(speaker)}; known are {', '.join(_ROLES)}")
            message = {"role": _ROLES[speaker], "content": message.pop("value", None), **message}
        if not isinstance(message.get("role"), str):
            raise UserError(f"{what}: message {number} has no role")
        if not (isinstance(message.get("content"), str | list) or message.get("tool_calls")):
            raise UserError(f"{what}: message {number} has {_shown(message.get('content'))} as content, expected text")
        found.append(message)
    return found


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what}: found {_shown(value)}, expected text")
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else one_line(repr(value))[:60]


# --------------------------------------------------------------------------------------------------------------------
# Preferences


def preferences(path: Path) -> Iterator[tuple[Conversation, Conversation]]:
    """Yield (chosen, rejected) of each record {"prompt": …, "chosen": …, "rejected": …}, of texts or messages.

    `chosen` and `rejected` may begin with the prompt, and `prompt` may then be missing. Targets are what follows it.
    """
    count = twice = 0
    for record, place in records(path):
        if record.get("chosen") is None or record.get("rejected") is None:
            raise UserError(f'{place} has {_keys(record)}; expected {{"prompt": …, "chosen": …, "rejected": …}}')
        before = turns(record["prompt"], "user", f"{place}: prompt") if record.get("prompt") is not None else []
        chosen, rejected = (
            _after(before, turns(record[key], "assistant", f"{place}: {key}"), f"{place}: {key}")
            for key in ("chosen", "rejected")
        )
        texts: list[Any] = [record.get(key) for key in ("prompt", "chosen", "rejected")]
        repeats = all(isinstance(each, str) and each.startswith(texts[0]) for each in texts) and texts[0] != ""
        count, twice = count + 1, twice + repeats
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared in (len(chosen), len(rejected)):
            raise UserError(f"{place}: chosen and rejected are the same, or one is the beginning of the other")
        if shared == 0:
            raise UserError(
                f"{place}: chosen and rejected begin with different messages, and there is no prompt; give one"
            )
        tools = tools_of(record, place)
        yield Conversation(chosen, place, tools, shared), Conversation(rejected, place, tools, shared)
    if count and twice == count:
        raise UserError(
            f"{path}: in each of {count:,} records the texts of chosen and rejected begin with that of prompt, which "
            "would be there twice; remove it from them"
        )


def _after(before: list[Message], answer: list[Message], what: str) -> list[Message]:
    """Return an answer after its prompt, of which it may repeat all, maybe after a system message, or the end."""
    size = len(before)
    if any(answer[at : at + size] == before for at in range(len(answer))):
        return answer
    shared = next(each for each in range(min(size, len(answer)), -1, -1) if before[size - each :] == answer[:each])
    if not shared and before[-1] in answer and answer[0]["role"] != "assistant":
        raise UserError(f"{what}: it holds the last message of the prompt, after others than the prompt has")
    return before + answer[shared:]
