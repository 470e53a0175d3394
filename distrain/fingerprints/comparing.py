"""The differences between two fingerprints, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.fingerprints.files import listing
from distrain.fingerprints.items import same_item

_MAX_LINES = 10

DRAWN_ANEW = "Splits are drawn anew from what is there now: samples that the model was trained on may be in the others."


@dataclass(frozen=True)
class Changes:
    """Differences between two fingerprints, one line each."""

    data: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    """Files that the model's section names: initial weights, a pretrained folder; and those that user code is given."""
    unsure: tuple[str, ...] = ()
    """Possible changes, which the fingerprint does not decide."""

    def __bool__(self) -> bool:
        return bool(self.data or self.code or self.model)

    @property
    def lines(self) -> list[str]:
        """All changes."""
        return [*self.data, *self.code, *self.model]


def compare(then: Mapping[str, Any], now: Mapping[str, Any], *, unread: str = "") -> Changes:
    """Return how two fingerprints differ; keys that are missing in one of them are not compared.

    `unread`: a key of the recipe whose files are not read.
    """
    data, unsure = _files(then.get("data"), now.get("data"), "data")
    data += _lengths(then.get("splits"), now.get("splits"))
    data += _items(then.get("items"), now.get("items"))
    loose, more = _files(then.get("folder"), now.get("folder"), "data.path", new_is_change=bool(data))
    # a resume reads no initial weights, and a new file was more likely written by the run than read by it
    model, maybe = _files(then.get("model"), now.get("model"), "weights", gone_is_change=False, new_is_change=False)
    # a file that is gone is missed by who reads it
    named, others = _files(
        then.get("arguments"), now.get("arguments"), "argument", gone_is_change=False, new_is_change=False
    )
    of_data = [line for line in named if line.startswith("argument file data.")]
    of_model = [line for line in model if not unread or f" {unread}: " not in line]
    return Changes(
        tuple(_truncated(data + loose + of_data)),
        tuple(_truncated(_code(then.get("code"), now.get("code")))),
        tuple(_truncated(of_model + [line for line in named if line not in of_data])),
        tuple(_truncated(unsure + more + maybe + others)),
    )


def same_file(then: Mapping[str, Any], label: str, path: Path) -> bool:
    """Whether a file is the one of that label in the listing of a fingerprint, as far as that has it."""
    before = (then.get("files") or {}).get(label)
    if before is None:
        return True
    now = listing({label: str(path)}, full=True)["files"]
    return not _single_files({label: before}, now, "", True, True)[0]


def _truncated(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MAX_LINES else [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more"]


def _files(
    then: Any, now: Any, what: str, *, gone_is_change: bool = True, new_is_change: bool = True
) -> tuple[list[str], list[str]]:
    """Return (changes, possible changes) of two listings of files."""
    if then is None or now is None:
        return [], []
    if "files" in then and "files" in now:
        return _single_files(then["files"], now["files"], what, gone_is_change, new_is_change)
    if "folders" in then and "folders" in now:
        return _folders(then, now, what)
    before, after = (
        [(row[0], row[1]) for row in each["folders"].values()]
        if "folders" in each
        else [(1, row[0]) for row in each["files"].values()]
        for each in (then, now)
    )
    totals = [_total(sum(row[0] for row in rows), sum(row[1] for row in rows)) for rows in (before, after)]
    return [f"{what} files: {totals[0]} -> {totals[1]}"], []


def _total(count: int, size: int) -> str:
    return f"{count:,} file{'s' * (count != 1)} of {size:,} bytes"


def _single_files(
    then: dict[str, list[Any]], now: dict[str, list[Any]], what: str, gone_is_change: bool, new_is_change: bool
) -> tuple[list[str], list[str]]:
    changed, unsure = [], []
    for name, before in then.items():
        if name not in now:
            if gone_is_change:
                changed.append(f"{what} file {name}: is no longer there")
            continue
        after = now[name]
        same_method = before[1].partition("-")[0] == after[1].partition("-")[0]
        if before[0] != after[0]:
            changed.append(f"{what} file {name}: {before[0]:,} bytes -> {after[0]:,} bytes")
        elif same_method and before[1] != after[1]:
            changed.append(f"{what} file {name}: other content, of {after[0]:,} bytes as before")
        elif before[2:] != after[2:]:
            unsure.append(f"{what} file {name}: written again; its size, and what is read of it, are as they were")
    new = [f"{what} file {name}: one more, of {now[name][0]:,} bytes" for name in now if name not in then]
    (changed if new_is_change else unsure).extend(new)
    return changed, unsure


def _folders(then: dict[str, Any], now: dict[str, Any], what: str) -> tuple[list[str], list[str]]:
    changed, unsure = [], []
    old, new = then["folders"], now["folders"]
    for name in sorted(old.keys() | new.keys()):
        shown = f"{what} folder {name or '.'}"
        if name not in new or name not in old:
            there = new.get(name) or old[name]
            changed.append(f"{shown}: {'is no longer there' if name in old else 'one more'}, {_total(*there[:2])}")
            continue
        before, after = old[name], new[name]
        comparable = before[2].startswith("full-") == after[2].startswith("full-")
        if before[:2] != after[:2]:
            changed.append(f"{shown}: {_total(*before[:2])} -> {_total(*after[:2])}")
        elif comparable and before[2] != after[2]:
            changed.append(f"{shown}: {_total(*after[:2])} as before, of other names or sizes or content")
        elif before[3] < after[3] and not after[2].startswith("full-"):
            unsure.append(f"{shown}: some files were written again, with the sizes that they had")
    for name, digest in then["sampled"].items():
        if name in now["sampled"] and now["sampled"][name] != digest:
            changed.append(f"{what} file {name}: other content")
    return changed, unsure


def _lengths(then: Any, now: Any) -> list[str]:
    if then is None or now is None or then == now:
        return []

    def shown(length: Any) -> str:
        return "none" if length == 0 else f"{length:,}" if isinstance(length, int) else "a stream"

    parts = [
        f"{name} {shown(then.get(name, 0))} -> {shown(now.get(name, 0))}"
        for name in ("train", "valid", "test")
        if then.get(name, 0) != now.get(name, 0)
    ]
    totals = [sum(length or 0 for length in each.values()) for each in (then, now)]
    return [f"data samples: {', '.join(parts)}; {totals[0]:,} -> {totals[1]:,} in all"]


def _items(then: Any, now: Any) -> list[str]:
    if then is None or now is None:
        return []
    return [
        f"data: sample {number} of {split} is another one"
        for split, items in then.items()
        for number, item in items.items()
        if number in now.get(split, {}) and not same_item(item, now[split][number])
    ]


def _code(then: Any, now: Any) -> list[str]:
    if then is None or now is None:
        return []
    lines = []
    for name in sorted(then.keys() | now.keys()):
        if name not in now:
            lines.append(f"code file {name}: is no longer used")
        elif name not in then:
            lines.append(f"code file {name}: one more")
        elif then[name][0] != now[name][0] and (not now[name][1] or then[name][1] != now[name][1]):
            lines.append(f"code file {name}: changed")
    return lines
