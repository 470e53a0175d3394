"""How checks are run and shown: none takes the others with it, and what was found is there in any width."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.doctor.checks import Check, run_checks
from distrain.doctor.command import examine
from distrain.doctor.context import Context, make_context
from distrain.doctor.findings import Finding, Level, Report, error, ok, warning
from distrain.doctor.showing import finding_row, merged, problem_lines, summary
from distrain.system.terminal import Console


def hangs(context: Context) -> Iterator[Finding]:
    yield ok("the first of two")
    (context.folder / "pipe").open()  # nobody writes into it, as with a file system that does not answer
    yield ok("the second")


def raises(context: Context) -> Iterator[Finding]:
    raise OSError(f"no \x1b[2J in {context.folder.name}")
    yield


def is_killed(context: Context) -> Iterator[Finding]:
    os.write(2, b"libcuda.so: cannot go on\n")
    os.kill(os.getpid(), signal.SIGKILL)
    yield ok("")


def ends(context: Context) -> Iterator[Finding]:
    os._exit(3)
    yield ok("")


def prints(context: Context) -> Iterator[Finding]:
    print("noise of a library", flush=True)
    yield warning("few files", "it is slow", "take more")


def asks_nothing(context: Context) -> Iterator[Finding]:
    yield from ()


PLANTED = [Check(each.__name__, each) for each in (raises, is_killed, ends, hangs, asks_nothing, prints)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    folder = tmp_path_factory.mktemp("runs")
    os.mkfifo(folder / "pipe")
    context = Context(folder, host="node1")
    return [each for found in run_checks(PLANTED, context, limit_s=2.0) for each in found]


def test_a_check_that_fails_leaves_the_others_alone(found: list[Finding]) -> None:
    assert [(each.check, each.level.value) for each in found] == [
        ("raises", "error"), ("is_killed", "error"), ("ends", "error"), ("hangs", "ok"), ("hangs", "error"),
        ("prints", "warning"),
    ]  # fmt: skip
    raised, killed, ended, before, hung, _ = (each.found for each in found)
    assert raised.startswith("the check raised OSError: no \\x1b[2J in ")
    assert killed == "the check was ended by SIGKILL: libcuda.so: cannot go on"
    assert ended == "the check ended with exit code 3"
    assert (before, hung) == ("the first of two", "did not end within 2 s")
    assert all(each.means and each.do for each in found if each.level is not Level.ok)
    assert {each.host for each in found} == {"node1"}


def test_a_finding_travels_as_json(found: list[Finding]) -> None:
    sent = json.loads(json.dumps([each.to_json() | {"later": 1} for each in found]))
    assert [Finding.from_json(each) for each in sent] == found


def test_what_all_machines_have_found_is_shown_once() -> None:
    full = error("full", "ends", "clear it")
    several = [Finding(Level.ok, "slow", host=host, rank=rank) for rank, host in enumerate(("a", "a", "b"))]
    one = Finding(full.level, full.found, full.means, full.do, host="b", rank=2)
    assert [(each.found, each.host, each.rank) for each in merged([*several, one])] == [
        ("slow", "a, b", None),
        ("full", "b", 2),
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_findings_fit_the_terminal(found: list[Finding], width: int) -> None:
    long = error("one of " + "many words " * 30, "what they mean " * 20, "what to do about them " * 20)
    shown = io.StringIO()
    console = Console(file=shown, width=width)
    for each in (*found, long):
        console.print(finding_row(each, width, hosts=True), soft_wrap=True)
        console.print(problem_lines(each, width), soft_wrap=True)
    console.print(summary(Report((*found, long), 1.25)))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in shown.getvalue()
    assert lines[-1] == "5 errors, 1 warning, 1 ok in 1.2 s"
    assert "warning  prints            node1: few files" in lines
    at = lines.index("warning: prints: few files")
    assert lines[at + 1 : at + 3] == ["  means  it is slow", "  do     take more"]


@pytest.mark.parametrize("planted", [[], ["raises"], ["prints"]])
def test_the_exit_status_tells_errors(planted: list[str], tmp_path: Path) -> None:
    report = examine(Context(tmp_path), [each for each in PLANTED if each.name in planted])
    assert report.exit_status == (1 if planted == ["raises"] else 0)
    assert report.to_json()["sound"] == (not planted)


def test_a_recipe_that_cannot_be_read_leaves_the_rest(tmp_path: Path) -> None:
    context = make_context(str(tmp_path / "missing.yaml"), processes=2)
    assert context.recipe is None
    assert "missing.yaml" in context.recipe_problem
    assert (context.processes, context.existing.is_dir()) == (2, True)
