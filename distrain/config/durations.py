"""Lengths of training with their units, and what they are in optimizer steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from distrain.system.errors import UserError, close_names
from distrain.system.numbers import a_kind

_DURATION = re.compile(r"\s*([+-]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]+)\s*")
_UNITS = {
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "sample": "samples",
    "samples": "samples",
    "token": "tokens",
    "tokens": "tokens",
    "%": "%",
    "s": "seconds",
    "sec": "seconds",
    "second": "seconds",
    "seconds": "seconds",
    "min": "minutes",
    "minute": "minutes",
    "minutes": "minutes",
    "h": "hours",
    "hour": "hours",
    "hours": "hours",
}
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_LARGEST = 1e18
_FORMS = "a number and a unit, as in '200 steps', '3 epochs', '1e6 samples', '1e9 tokens', '10%', '20 min'"


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit, as written: `200 steps`, `3 epochs`, `1e9 tokens`, `10%`, `20 min`."""

    amount: float
    unit: str
    """One of steps, epochs, samples, tokens, %, seconds, minutes, hours."""

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Read a duration from text; raises ValueError saying which forms are known."""
        if isinstance(text, Duration):
            return text
        found = repr(text) if isinstance(text, str | int | float) else a_kind(text)
        match = _DURATION.fullmatch(text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        if unit is None or not math.isfinite(amount):
            hint = close_names(match[2], _UNITS) if match and unit is None else ""
            raise ValueError(f"found {found}, expected {_FORMS}{hint}")
        if amount < 0:
            raise ValueError(f"found {found}, expected a duration of zero or more")
        if amount > (100 if unit == "%" else _LARGEST):
            raise ValueError(f"found {found}, expected at most {'100%' if unit == '%' else f'{_LARGEST:g} {unit}'}")
        if unit in ("steps", "samples", "tokens") and not amount.is_integer():
            raise ValueError(f"found {found}, expected a whole number of {unit}")
        return cls(amount, unit)

    @property
    def seconds(self) -> float | None:
        """The length in seconds, or None when the unit counts training rather than time."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def __str__(self) -> str:
        whole = self.amount == int(self.amount) and self.amount < 1e15
        number = str(int(self.amount)) if whole else repr(self.amount)
        if self.unit == "%":
            return f"{number}%"
        return f"{number} {self.unit.removesuffix('s') if self.amount == 1 else self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{_DURATION.pattern}$", "title": _FORMS}


@dataclass(frozen=True)
class Horizon:
    """The sizes that turn durations into optimizer steps."""

    global_batch_size: int
    """Samples that one optimizer step consumes over all processes."""
    samples_per_epoch: int | None
    """Samples in the training split; None for a stream of unknown length."""
    tokens_per_sample: int | None
    """Tokens in a sample of fixed length; None where samples differ in length or have no tokens."""
    total_steps: int | None = None
    """Optimizer steps of the whole run; None while that itself is being computed."""

    def steps(self, duration: Duration, what: str) -> int:
        """Return `duration` in optimizer steps, rounded up, so at least 1 unless it is zero.

        `what` names the key in the UserError that a duration without a meaning here raises.
        """
        return math.ceil(self.exact_steps(duration, what))

    def exact_steps(self, duration: Duration, what: str) -> Fraction:
        """Return `duration` in optimizer steps, which need not be whole; raises as `steps` does."""
        # Exact: as floats, 7% of 100 steps is a little more than 7, and would be rounded up to 8.
        return Fraction(repr(float(duration.amount))) * self._steps_per(duration, what)

    def _steps_per(self, duration: Duration, what: str) -> Fraction:
        if duration.unit == "steps":
            return Fraction(1)
        if duration.unit == "samples":
            return Fraction(1, self.global_batch_size)
        if duration.unit == "epochs":
            if self.samples_per_epoch is None:
                raise UserError(
                    f"{what}: '{duration}' of a stream whose length is not known; write it in steps or samples"
                )
            return Fraction(self.samples_per_epoch, self.global_batch_size)
        if duration.unit == "tokens":
            if self.tokens_per_sample is None:
                raise UserError(
                    f"{what}: '{duration}' needs samples of a fixed number of tokens; write it in steps or epochs"
                )
            return Fraction(1, self.global_batch_size * self.tokens_per_sample)
        if duration.unit == "%":
            if self.total_steps is None:
                raise UserError(f"{what}: '{duration}' has no meaning here; write it in steps, epochs or tokens")
            return Fraction(self.total_steps, 100)
        raise UserError(f"{what}: '{duration}' is a time; only checkpoint.every and log.every can be one")
