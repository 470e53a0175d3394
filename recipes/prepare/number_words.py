"""German number words and their English: `siebenundvierzigtausendelf<TAB>forty-seven thousand eleven`.

Nothing here is random but the choice of numbers, so a translation is right or wrong. German says units before tens, and
writes it all as one word.
"""

from __future__ import annotations

import random
from pathlib import Path

COUNT = 20_000
LARGEST = 99_999

_GERMAN_UNITS = """\
null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
siebzehn achtzehn neunzehn"""
_GERMAN_TENS = "- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
_ENGLISH_UNITS = """\
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_ENGLISH_TENS = "- ten twenty thirty forty fifty sixty seventy eighty ninety"


def german(number: int) -> str:
    """Return 0 to 999 999 in German."""
    word = _german_part(number)
    return word + "s" if number % 100 == 1 else word


def _german_part(number: int) -> str:
    """Return a number as the first part of a longer word: `ein`, not `eins`."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        return _german_part(thousands) + "tausend" + (_german_part(rest) if rest else "")
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return _GERMAN_UNITS.split()[hundreds] + "hundert" + (_german_part(rest) if rest else "")
    if number < 20:
        return _GERMAN_UNITS.split()[number]
    tens, units = divmod(number, 10)
    return (_GERMAN_UNITS.split()[units] + "und" if units else "") + _GERMAN_TENS.split()[tens]


def english(number: int) -> str:
    """Return 0 to 999 999 in English."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            count, rest = divmod(number, size)
            return f"{english(count)} {name}" + (f" {english(rest)}" if rest else "")
    if number < 20:
        return _ENGLISH_UNITS.split()[number]
    tens, units = divmod(number, 10)
    return _ENGLISH_TENS.split()[tens] + (f"-{_ENGLISH_UNITS.split()[units]}" if units else "")


def write(path: Path) -> None:
    """Write `COUNT` different numbers, one a line."""
    numbers = random.Random(0).sample(range(LARGEST + 1), COUNT)
    path.write_text("".join(f"{german(number)}\t{english(number)}\n" for number in numbers), encoding="utf-8")
