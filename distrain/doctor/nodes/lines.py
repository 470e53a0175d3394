"""How nodes tell what they have found: by lines that they print.

Standard output reaches whoever waits also where nodes share no folder and cannot reach each other. A message is cut
into short lines, as srun breaks long ones and mixes the parts of several nodes.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_MARK = "distrain-doctor"
_LENGTH = 600
"""Characters of a message in a line: with the rest of the line less than the 1,024 bytes that srun takes at once."""
_LINE = re.compile(rf"{_MARK} (\S+) (\d+)/(\d+) (.*)")
_LABEL = re.compile(r"\s*(\d{1,6}): (.*)")


class Teller:
    """Prints messages of a node, or of one of its ranks."""

    def __init__(self, node: int, rank: int | None = None, output: int = 1):
        self.node, self.rank, self._output = node, rank, output
        self._count = 0

    def tell(self, kind: str, value: Any = None) -> None:
        """Print a message; `value` is made of what JSON has."""
        text = json.dumps({"kind": kind, "node": self.node, "rank": self.rank, "value": value})
        name = f"{self.node}.{'n' if self.rank is None else self.rank}.{self._count}"
        self._count += 1
        parts = [text[start : start + _LENGTH] for start in range(0, len(text), _LENGTH)]
        for number, part in enumerate(parts):
            # each in one write, which a pipe keeps together; the first break ends what a library has begun to print
            os.write(self._output, f"\n{_MARK} {name} {number}/{len(parts)} {part}\n".encode())


@dataclass
class Told:
    """What was read of a job."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """In the order in which they were whole, each with kind, node, rank and value."""
    words: dict[int | None, deque[str]] = field(default_factory=dict)
    """The last of the other lines that each node printed; None: of the script and srun."""
    _parts: dict[str, dict[int, str]] = field(default_factory=dict)

    def read(self, lines: Iterable[str]) -> None:
        """Take up lines, as srun prints them with the number of the node before each."""
        for line in lines:
            line = line.rstrip("\n")
            labelled = _LABEL.fullmatch(line)
            node, text = (int(labelled[1]), labelled[2]) if labelled else (None, line)
            found = _LINE.fullmatch(text)
            if found is None:
                if text.strip():
                    self.words.setdefault(node, deque(maxlen=40)).append(text.strip())
                continue
            parts = self._parts.setdefault(found[1], {})
            parts[int(found[2])] = found[4]
            if len(parts) == int(found[3]):
                self.messages.append(json.loads("".join(parts[number] for number in sorted(parts))))

    def of(self, kind: str, node: int | None = None) -> list[dict[str, Any]]:
        """Return the messages of a kind, of all nodes or of one."""
        return [each for each in self.messages if each["kind"] == kind and node in (None, each["node"])]

    def by_node(self, kind: str) -> dict[int, Any]:
        """Return the last value of a kind for each node that has told one."""
        return _sorted({each["node"]: each["value"] for each in self.of(kind)})

    def by_rank(self, kind: str) -> dict[int, Any]:
        """Return the last value of a kind for each rank that has told one."""
        return _sorted({each["rank"]: each["value"] for each in self.of(kind) if each["rank"] is not None})


def _sorted(values: dict[int, Any]) -> dict[int, Any]:
    return {key: values[key] for key in sorted(values)}
