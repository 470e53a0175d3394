"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from distrain.system.numbers import a_kind, counted, number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.99256, "0.9926"),
        (1.0, "1"),
        (1.2341e-7, "1.234e-07"),
        (140198.63, "140,199"),
        (-2345.6, "-2,346"),
        (21745989495.4667, "2.175e+10"),
        (12345678901, "12,345,678,901"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (True, "True"),
        (None, "–"),
    ],
)
def test_a_number_has_the_digits_that_say_something(value: object, shown: str) -> None:
    assert number(value) == shown


def test_one_is_not_in_the_plural() -> None:
    assert [counted(each, "row") for each in (0, 1, 1234)] == ["0 rows", "1 row", "1,234 rows"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1, "an int"), (1.0, "a float"), ([], "a list"), (object(), "an object"), (None, "None")],
)
def test_a_kind_has_the_article_of_its_sound(value: object, shown: str) -> None:
    assert a_kind(value) == shown
