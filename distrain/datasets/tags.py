"""Tags of tokens, of which those of entities have a prefix: B-PER, I-PER, O. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

Scheme = Literal["iob2", "iob1", "iobes", "any"]
OUTSIDE = "O"
_PREFIXES = {"iob2": "BI", "iob1": "BI", "iobes": "BIES"}


def parted(tag: str) -> tuple[str, str] | None:
    """Return (prefix, type) of a tag of entities, such as ("B", "PER"), ("B", "") or ("O", ""); None for others."""
    prefix, dash, kind = tag.partition("-")
    if tag == OUTSIDE or (prefix in tuple("BIES") and bool(dash) == bool(kind)):
        return prefix, kind
    return None


def mark_entities(tags: Iterable[str]) -> bool:
    """Whether all tags are those of entities, and not of O alone."""
    found = {parted(tag) for tag in tags}
    return None not in found and bool(found - {(OUTSIDE, "")})


def all_classes(tags: Iterable[str], scheme: Scheme) -> list[str]:
    """Return the classes for the tags of a training split: O first, and each type with all prefixes of the scheme.

    A prefix that no training sentence needs, as I- where all entities have one token, may be needed later.
    """
    found = set(tags)
    if scheme == "any":
        return sorted(found)
    kinds = sorted({each[1] for each in map(parted, found) if each is not None and each[0] != OUTSIDE})
    return [OUTSIDE, *(f"{prefix}-{kind}" if kind else prefix for kind in kinds for prefix in _PREFIXES[scheme])]


def as_scheme(tags: Sequence[str], scheme: Scheme) -> tuple[list[str], tuple[int, str] | None]:
    """Return a sentence's tags, of `iob1` as those of `iob2`, and (place, problem) of the first that does not fit."""
    if scheme == "any":
        return list(tags), None
    found: list[str] = []
    before, kind_before = OUTSIDE, ""
    for place, tag in enumerate(tags):
        both = parted(tag)
        if both is None or (both[0] != OUTSIDE and both[0] not in _PREFIXES[scheme]):
            prefixes = ", ".join(f"{each}-TYPE" for each in _PREFIXES[scheme])
            return found, (place, f"{tag!r} is none of {prefixes} and O")
        prefix, kind = both
        inside = before in ("B", "I") and kind == kind_before
        if prefix in ("I", "E") and not inside:
            if scheme != "iob1":
                return found, (place, f"{tag!r} continues an entity that does not begin before it")
            tag = f"B-{kind}" if kind else "B"
        if scheme == "iobes" and before in ("B", "I") and not (prefix in ("I", "E") and inside):
            return found, (place, f"{tag!r} stands where {'-'.join(filter(None, ('E', kind_before)))} should end one")
        found.append(tag)
        before, kind_before = prefix, kind
    if scheme == "iobes" and before in ("B", "I"):
        return found, (len(tags) - 1, f"{tags[-1]!r} ends the sentence within an entity")
    return found, None
