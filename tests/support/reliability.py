"""The table of docs/reliability.md, made from what tests of faults found.

A test says which fault of the catalogue it makes by `@pytest.mark.fault(ROW)`, and by `record_property` how many times
(`trials`) and how many finished steps were trained again at most (`steps_lost`). `pytest --all --reliability
docs/reliability.md` puts what a run found into the page; rows of which it tried nothing stay as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FAULTS = {
    1: ("the time limit comes near (a signal)", "all ranks save one step, requeue, same final weights"),
    2: ("preemption by another partition", "the same, within the grace time"),
    3: ("the grace time is too short", "it resumes from the checkpoint before"),
    4: ("`scancel`", "ends, is not requeued, leaves no process"),
    5: ("the signal comes twice, or during a save", "one save, complete"),
    6: ("a rank is killed, in each phase", "the rank is named, a new attempt resumes from the newest checkpoint"),
    7: ("the launcher is killed", "its workers end too"),
    8: ("a node dies, and its processes do not", "only the new start publishes"),
    9: ("the network goes", "the wait and its machines are named in bounded time, resumes elsewhere"),
    10: ("a rank hangs", "rank, host, step, phase and line are named, all end"),
    11: ("`kill -9` at any moment of training and saving", "the old checkpoint or the new one, same final weights"),
    12: ("the disk is full, or files may not grow", "a clear error, the checkpoint before is whole"),
    13: ("the folder is read-only or missing", "fails before the first step"),
    14: ("a flipped bit in any file", "refused and named, the checkpoint before is taken"),
    15: ("a truncated, missing or extra file", "refused and named, the checkpoint before is taken"),
    16: ("a checkpoint of another model", "refused with the names and shapes that differ"),
    17: ("another number of processes, another strategy", "resumes, and reports what changed"),
    18: ("ranks see different folders", "refused before the first step"),
    19: ("a loss that is NaN or infinite, or spikes", "all ranks stop, skip or roll back alike; never saved as good"),
    20: ("out of memory", "rank, peak and what to lower are named, not started again"),
    21: ("a sample that does not decode", "an error with its path and number; or skipped and counted, by the recipe"),
    22: ("no data, too little data, uneven shards", "an error at the start, or exact counts"),
    23: ("wandb without a network or an account", "training continues, reported once"),
    24: ("the clock jumps", "the order is that of steps, no timeout fires"),
    25: ("the port is taken", "another one is used"),
    26: ("a malicious pickle in a checkpoint's place", "refused, nothing of it runs"),
    27: ("paths that lead out of a folder", "refused"),
    28: ("hostile or mistaken YAML", "refused, or read as it is meant"),
    29: ("hostile names and values of sites", "refused, or quoted: no shell reads them"),
    30: ("secrets in the environment", "in no log, script or file of a run"),
    31: ("a job that fails at once, every time", "stops after a few starts without progress"),
    32: ("two starts on one folder", "the second is refused, and the first is named"),
    33: (
        "data, code or weights change between two starts",
        "named and refused; `--update` accepts and records it",
    ),
    34: ("variables of a launcher that is gone", "ignored with a word, or refused with what to do; nothing waits"),
    35: ("several tasks of srun, mpirun or the like", "each is refused with what to use instead"),
    36: ("a state that a checkpoint could not give back", "named before the first step, the optimizer's after it"),
    37: ("ranks use different parameters in a step", "trained as in one process, or named before a rank waits"),
    38: ("an evaluation that is NaN, a metric that is undefined", "an error or a warning; never the best"),
    39: ("an index out of range, also on a GPU", "value, sample and what fits are named, not started again"),
    41: ("hostile text: escapes, forged lines, formulas, emoji codes", "shown escaped everywhere"),
    42: ("very many rows of metrics", "a resume reads their end alone"),
    43: ("loader processes that cannot hand over a batch", "named at once with what to do"),
    44: ("loader processes that are stuck", "named within seconds with line and cure; ends by a limit or a stop"),
}
"""What each fault is, and what its tests see happen."""

_HEAD = """\
| # | fault | what happens | tests | times made | finished steps trained again, at most | data lost |
|---|---|---|---|---|---|---|
"""


@dataclass(eq=False)  # a plugin must be hashable
class Reliability:
    """Collects what tests of faults found."""

    page: Path | None
    passed: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    failed: set[int] = field(default_factory=set)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Note how a test of a fault ended."""
        report = (yield).get_result()
        for marker in item.iter_markers("fault"):
            for row in marker.args:
                assert row in FAULTS, f"{item.nodeid}: there is no fault {row}"
                if report.failed:
                    self.failed.add(row)
                elif report.when == "call" and report.passed:
                    self.passed[row].append(dict(item.user_properties))

    def pytest_sessionfinish(self) -> None:
        """Write the page, where one was asked for."""
        if self.page is not None:
            self.page.write_text(self.filled(self.page.read_text()))

    def filled(self, text: str) -> str:
        """Return the page's text with the rows that this session tried."""
        before, table, after = re.split(r"(?<=<!-- faults -->\n)(.*)(?=<!-- end of faults -->)", text, flags=re.DOTALL)
        lines = {int(m[1]): m[0] for m in re.finditer(r"^\| (\d+) \|.*\n", table, re.MULTILINE)}
        lines |= {row: self._line(row) for row in {*self.passed, *self.failed}}
        return before + _HEAD + "".join(lines[row] for row in sorted(lines)) + after

    def _line(self, row: int) -> str:
        fault, happens = FAULTS[row]
        cases = self.passed[row]
        trials = sum(int(case.get("trials", 1)) for case in cases)
        lost = [int(case["steps_lost"]) for case in cases if "steps_lost" in case]
        kept = "**a test failed**" if row in self.failed else "none"
        return f"| {row} | {fault} | {happens} | {len(cases)} | {trials} | {max(lost) if lost else '-'} | {kept} |\n"
