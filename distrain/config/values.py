"""The kinds of values in a recipe, each with its check."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from distrain.config.durations import Duration
from distrain.config.user_files import is_object_spec


def _integral(value: Any) -> Any:
    # people write large counts as `1e6`, which is a float
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_zero(duration: Duration) -> Duration:
    if duration.amount == 0:
        raise ValueError(f"found '{duration}', expected more than zero")
    return duration


def not_time(duration: Duration) -> Duration:
    if duration.seconds is not None:
        raise ValueError(
            f"found '{duration}', but only checkpoint.every and log.every can be a time; write it in steps, epochs, "
            "samples, tokens or %"
        )
    return duration


def _a_time(duration: Duration) -> Duration:
    if duration.seconds is None:
        raise ValueError(f"found '{duration}', expected a time, as in '90 s', '10 min', '1 hour'")
    return duration


def _component_name(name: str) -> str:
    if (":" in name or name.endswith(".py")) and not is_object_spec(name):
        raise ValueError(f"found {name!r}, expected a name, 'package.module:name' or 'path/to/file.py:name'")
    return name


def object_spec(spec: str) -> str:
    if not is_object_spec(spec):
        raise ValueError(f"found {spec!r}, expected 'path/to/file.py:name' or 'package.module:name'")
    return spec


class ByName:
    """Lets a bare name stand for a mapping that holds only `name`."""

    @staticmethod
    def _mapping(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._mapping, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1, "title": "a name"}, handler(schema)]}


Text = Annotated[str, Field(min_length=1)]
ComponentName = Annotated[Text, AfterValidator(_component_name)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e18)]
NotNegative = Annotated[float, Field(ge=0, le=1e18)]
WHOLE = BeforeValidator(_integral)
Count = Annotated[int, Field(ge=1, le=10**12), WHOLE]
BatchSize = Annotated[int, Field(ge=1, le=2**31), WHOLE]
Interval = Annotated[Duration, AfterValidator(_not_zero)]
TrainingInterval = Annotated[Interval, AfterValidator(not_time)]
Time = Annotated[Interval, AfterValidator(_a_time)]
OnOff = bool | Literal["auto"]
