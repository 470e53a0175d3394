"""What a check says of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is."""

    ok = "ok"
    warning = "warning"
    """A run works, but slower than it could, or not everywhere."""
    error = "error"
    """A run cannot start here, ends early, or loses something."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found."""

    level: Level
    found: str
    """What is there, in some words."""
    means: str = ""
    """What it means for a run; empty where all is well."""
    do: str = ""
    """What to do about it; empty where all is well."""
    check: str = ""
    """The name of the check; set by who runs it."""
    host: str = ""
    """The machine; set by who runs the check."""
    rank: int | None = None
    """The process of a run, where only that one is concerned; None: the whole machine."""

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return asdict(self) | {"level": self.level.value}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Finding:
        """Return what `to_json` has made, perhaps on another machine."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in found.items() if key in known} | {"level": Level(found["level"])})


def ok(found: str) -> Finding:
    """Return that all is well with what was found."""
    return Finding(Level.ok, found)


def warning(found: str, means: str, do: str) -> Finding:
    """Return what makes a run slower than it could be, or fails where a run is another."""
    return Finding(Level.warning, found, means, do)


def error(found: str, means: str, do: str) -> Finding:
    """Return what keeps a run from starting, ends it early, or loses something."""
    return Finding(Level.error, found, means, do)


@dataclass(frozen=True)
class Report:
    """All that was found."""

    findings: tuple[Finding, ...]
    seconds: float
    """In which it was found."""

    def of(self, level: Level) -> Sequence[Finding]:
        """Return the findings of a level."""
        return [each for each in self.findings if each.level is level]

    @property
    def exit_status(self) -> int:
        """1 where there is an error, else 0."""
        return 1 if self.of(Level.error) else 0

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "sound": not self.of(Level.error) and not self.of(Level.warning),
            "errors": len(self.of(Level.error)),
            "warnings": len(self.of(Level.warning)),
            "hosts": list(dict.fromkeys(each.host for each in self.findings)),
            "seconds": round(self.seconds, 3),
            "findings": [each.to_json() for each in self.findings],
        }
