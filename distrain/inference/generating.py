"""`distrain generate`: text after prompts, shown as it is written or in a file."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.inference.generation import Generated, GenerationOptions, Generator
from distrain.inference.trained import Trained
from distrain.run import heartbeat
from distrain.system.bounded_json import ROW
from distrain.system.output import error_line

logger = logging.getLogger(__name__)

_WRITTEN = ("text", "tokens", "finish")


@dataclass(frozen=True)
class Prompt:
    """One prompt, as it was given."""

    given: Mapping[str, Any]
    """{"prompt": text} or {"messages": […]}, with whatever else its line holds."""
    number: int
    """Its place among the prompts, which decides what is drawn for it."""
    place: str
    """Where it stands, for errors."""

    def tokens(self, trained: Trained) -> Sequence[int]:
        """Return what a model reads; raises UserError."""
        data, name = trained.data, trained.recipe.data.name
        if "messages" in self.given:
            if data.chat is None:
                raise UserError(
                    f"{self.place} has messages, and the tokenizer of data set {name!r} has no chat template; give the "
                    "text of a prompt, or train on data set 'chat'"
                )
            return data.chat(self.given["messages"])
        if data.encode is None:
            raise UserError(
                f"data set {name!r} cannot turn text into tokens; give it a method encode(text) that returns them"
            )
        try:
            return data.encode(self.given["prompt"])
        except UnicodeEncodeError as error:
            raise UserError(f"{self.place} holds what is not text: {error.reason}") from error


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a JSONL file; raises UserError for a line that is none."""
    number = 0
    try:
        with path.open("rb") as file:
            for line, content in enumerate(iter(lambda: file.readline(ROW), b""), start=1):
                if content.strip():
                    place = f"{path}, line {line}"
                    yield Prompt(_checked(_parsed(content, place), place), number, place)
                    number += 1
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror or error}") from error
    if number == 0:
        raise UserError(f'{path} has no prompts; expected a line of JSON for each, such as {{"prompt": "…"}}')


def _parsed(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error_line(error)}") from error


def _checked(record: Any, place: str) -> Mapping[str, Any]:
    expected = 'expected {"prompt": TEXT} or {"messages": [{"role": …, "content": …}, …]}'
    if not isinstance(record, dict):
        raise UserError(f"{place} is no object; {expected}")
    if ("prompt" in record) == ("messages" in record):
        found = "both a prompt and messages" if "prompt" in record else f"{', '.join(map(str, record)) or 'nothing'}"
        raise UserError(f"{place} has {found}; {expected}")
    messages = record.get("messages", [{}])
    if not isinstance(record.get("prompt", ""), str):
        raise UserError(f"{place}: the prompt is no text; {expected}")
    if not (isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)):
        raise UserError(f"{place}: the messages are no list of objects; {expected}")
    if clash := [key for key in _WRITTEN if key in record]:
        raise UserError(f"{place} has the key {clash[0]!r}, which the result is written under; rename it")
    return record


def generate_texts(
    target: Path | str,
    prompts: Callable[[], Iterator[Prompt]],
    options: GenerationOptions,
    *,
    batch_size: int,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str], None] | None = None,
    initial_weights: str | None = None,
) -> list[Generated]:
    """Continue prompts with a run's or a checkpoint's model, `batch_size` at a time; returns what was generated last.

    `prompts` is called twice: all are checked before the first is continued. `write` gets for each, in their order,
    what was given, and `text`, `tokens` and `finish`. `show` gets the text of a single prompt as it is written.
    `initial_weights` is that of `Trained.load`.
    """
    trained = Trained.load(target, inputs_only=True, initial_weights=initial_weights, to_write=True)
    try:
        heartbeat.enter_phase("evaluate")
        generator = Generator(trained)
        for each in prompts():
            generator.check(each.tokens(trained), each.place)
        last: list[Generated] = []
        remaining = prompts()
        while batch := list(itertools.islice(remaining, batch_size)):
            tokens = [each.tokens(trained) for each in batch]
            last = generator.generate(tokens, options, [each.number for each in batch], show)
            for each, found in zip(batch, last, strict=True):
                write({**each.given, "text": found.text, "tokens": found.tokens, "finish": found.finish})
        return last
    finally:
        trained.world.close()


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON in ASCII: no character of it ends the line or is obeyed by a terminal."""
    return json.dumps(record)
