"""Sentences with a tag for each token: columns as of CoNLL, or lines of JSON. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distrain.config import UserError, close_names
from distrain.datasets.tags import Scheme, as_scheme
from distrain.datasets.tokens import text_lines

EXPECTED = "a file with a token and its tag on a line, and a blank line after each sentence, or a .jsonl file"
_BLANKS = re.compile(r"[ \t]+")
"""Not what else Unicode calls white space, which may be within a token."""
_SHOWN = 10


class Sentence(NamedTuple):
    """One sentence of a file."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    line: int
    """Where it begins, from 1."""


@dataclass(frozen=True)
class TaggedReader:
    """Reads files of sentences."""

    tokens: int | str | None
    """The column, from 0 or from the end below 0, or in a .jsonl file the key. None: the first; `tokens`."""
    tags: int | str | None
    """None: the last; `tags`."""
    delimiter: str | None
    scheme: Scheme
    classes: tuple[str, ...] | None
    """What numbers in lines of JSON mean."""

    def read(self, path: Path, *, tagged: bool) -> list[Sentence]:
        """Return the sentences of a file; `tagged`: whether it has to have tags. Raises UserError with each place."""
        lines = path.suffix.lower() in (".jsonl", ".ndjson")
        for key, value in (("tokens", self.tokens), ("tags", self.tags)):
            if value is not None and isinstance(value, str) != lines:
                what = "the name of a key of its lines" if lines else "the number of a column, from 0"
                raise UserError(f"data.{key}: {value!r} for {path}; expected {what}")
        found, problems = (self._lines if lines else self._columns)(path)
        if tagged and not problems and (bare := [each.line for each in found if each.tags is None]):
            problems = [f"{path}:{line} has tokens without tags" for line in bare]
        checked = []
        for sentence in found if not problems else ():
            if sentence.tags is not None:
                tags, problem = as_scheme(sentence.tags, self.scheme)
                if problem is not None:
                    place, why = problem
                    problems.append(
                        f"the sentence at {path}:{sentence.line}, token {place + 1} ({sentence.tokens[place]!r}): {why}"
                    )
                sentence = sentence._replace(tags=tuple(tags))
            checked.append(sentence)
        if problems:
            more = [f"and {len(problems) - _SHOWN} more places"] if len(problems) > _SHOWN else []
            hint = (
                f"data.scheme is {self.scheme!r}: "
                + {
                    "iob2": "each entity begins with B-; iob1 is for files where I- may begin one, any for other tags",
                    "iob1": "an entity has I-, or B- where it follows another; any is for other tags",
                    "iobes": "entities are B- … E-, or S- for one token; iob2 is for files without E- and S-",
                    "any": "tags are of any kind",
                }[self.scheme]
            )
            raise UserError("\n".join([*problems[:_SHOWN], *more, hint]))
        if not checked:
            raise UserError(f"{path} has no sentences; expected {EXPECTED}")
        return checked

    def _columns(self, path: Path) -> tuple[list[Sentence], list[str]]:
        """Return the sentences, and problems, of columns."""
        token_at, tag_at = 0 if self.tokens is None else self.tokens, -1 if self.tags is None else self.tags
        assert isinstance(token_at, int)
        assert isinstance(tag_at, int)
        universal = path.suffix.lower() == ".conllu"
        lines = text_lines(path)
        first = next((line for line in lines if line.strip(" \t") and not (universal and line[0] == "#")), "")
        delimiter = self.delimiter or ("\t" if "\t" in first else None)
        width = len(_cells(first, delimiter))
        columns = [token_at + width if token_at < 0 else token_at, tag_at + width if tag_at < 0 else tag_at]
        tagged = 0 <= columns[1] < width and columns[1] != columns[0]
        if not 0 <= columns[0] < width:
            return [], [f"data.tokens: there is no column {token_at} in the {width} of {path}"]
        if not tagged and self.tags is not None and width > 1:
            why = "that of the tokens" if columns[1] == columns[0] else "not there"
            return [], [f"data.tags: column {tag_at} of the {width} of {path} is {why}"]
        found: list[Sentence] = []
        problems: list[str] = []
        tokens: list[str] = []
        tags: list[str] = []
        begin = 0
        for number, line in enumerate([*lines, ""], start=1):
            if universal and line.startswith("#"):
                continue
            cells = _cells(line, delimiter)
            document = cells[:1] == ["-DOCSTART-"]
            if not line.strip(" \t") or document:
                if tokens:
                    found.append(Sentence(tuple(tokens), tuple(tags) if tagged else None, begin))
                    tokens, tags = [], []
                continue
            if universal and not cells[0].isdigit():  # a word of several tokens, which follow, or one left out
                continue
            if len(cells) != width:
                problems.append(f"{path}:{number} has {len(cells)} columns, and the first line has {width}")
                continue
            token, tag = cells[columns[0]], cells[columns[1]] if tagged else ""
            if not token or (tagged and not tag):
                problems.append(f"{path}:{number} has an empty {'tag' if token else 'token'}")
                continue
            begin = begin if tokens else number
            tokens.append(token)
            tags.append(tag)
        return found, problems

    def _lines(self, path: Path) -> tuple[list[Sentence], list[str]]:
        """Return the sentences, and problems, of lines of JSON."""
        names = [self.tokens or "tokens", self.tags or "tags"]
        found: list[Sentence] = []
        problems: list[str] = []
        for number, line in enumerate(text_lines(path), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                problems.append(f"{path}:{number} is no JSON: {error}")
                continue
            if not isinstance(record, dict) or names[0] not in record:
                keys = [str(key) for key in record] if isinstance(record, dict) else []
                problems.append(f"{path}:{number} has no {names[0]!r}{close_names(str(names[0]), keys)}")
                continue
            tokens, tags = record[names[0]], record.get(names[1])
            if not _is_list_of(tokens, str) or not tokens or not all(tokens):
                problems.append(f"{path}:{number}: {names[0]!r} is {_brief(tokens)}; expected a list of tokens")
            elif tags is None:
                found.append(Sentence(tuple(tokens), None, number))
            elif not (_is_list_of(tags, str) or _is_list_of(tags, int)) or len(tags) != len(tokens):
                problems.append(
                    f"{path}:{number}: {names[1]!r} is {_brief(tags)}; expected a list of {len(tokens)} tags, as there "
                    "are tokens"
                )
            else:
                try:
                    found.append(Sentence(tuple(tokens), tuple(map(self._name, tags)), number))
                except UserError as error:
                    problems.append(f"{path}:{number}: {error}")
        return found, problems

    def _name(self, tag: str | int) -> str:
        if isinstance(tag, str):
            return tag
        if self.classes is None:
            raise UserError(f"the tag {tag} is a number; name what each means, in their order, in data.classes")
        if not 0 <= tag < len(self.classes):
            raise UserError(f"the tag {tag} is none of the {len(self.classes)} of data.classes")
        return self.classes[tag]


def _cells(line: str, delimiter: str | None) -> list[str]:
    return line.split(delimiter) if delimiter is not None else _BLANKS.split(line.strip(" \t"))


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) and not isinstance(each, bool) for each in value)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def classes_of(sentences: Sequence[Sentence]) -> set[str]:
    """Return the tags that occur."""
    return {tag for sentence in sentences for tag in sentence.tags or ()}
