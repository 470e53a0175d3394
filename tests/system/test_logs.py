"""Where the lines of `logging` go: rank 0's terminal, and a file for each rank."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from runs import Ended, captured
from worlds import in_world

from distrain.config import UserError
from distrain.launchers import reported
from distrain.run.folder import RunDir
from distrain.system import logs
from distrain.system.logs import EACH_RANK, FILE_ALONE, reset, show_on_terminal, write_to_file
from distrain.system.terminal import Console

HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202egnp.exe\nerror: forged"
logger = logging.getLogger("distrain.somewhere")


def log_lines(folder: str) -> Ended:
    """Log one of each kind, on each rank of this world."""
    rank = int(os.environ["RANK"])

    def speak() -> int:
        show_on_terminal(converses=True)
        write_to_file(RunDir(folder).log_path(rank), rank)
        for _ in range(3):
            logger.info("step 1  loss 0.5")
        logger.info("100% of it")
        logger.warning("a slow disk")
        logger.warning("%s", f"class {HOSTILE}")
        logger.warning("no batch comes", extra=EACH_RANK)
        logger.warning("looked at by the watchdog", extra=FILE_ALONE)
        return 0

    return captured(speak)


def read(folder: Path, rank: int) -> list[str]:
    """Return the lines of a rank's file, without their times."""
    return [
        re.sub(r"^[0-9-]{10} [0-9:,]{12} ", "", line) for line in RunDir(folder).log_path(rank).read_text().splitlines()
    ]


def test_rank_0_shows_it_and_each_rank_has_it_in_its_file(tmp_path: Path) -> None:
    first, second = in_world(2, log_lines, str(tmp_path))
    cleaned = r"class \x1b[2J\x1b]0;title\x07 \u202egnp.exe"
    assert first.out.splitlines() == [
        "step 1  loss 0.5",
        "step 1  loss 0.5 (2 more times)",
        "100% of it",
        "warning: a slow disk",
        f"warning: {cleaned}",
        "  error: forged",
    ]
    assert first.err == "warning (rank 0): no batch comes\n"
    assert (second.out, second.err) == ("", "warning (rank 1): no batch comes\n")
    for rank in (0, 1):
        assert read(tmp_path, rank) == [
            f"rank {rank} INFO step 1  loss 0.5",
            f"rank {rank} INFO step 1  loss 0.5 (2 more times)",
            f"rank {rank} INFO 100% of it",
            f"rank {rank} WARNING a slow disk",
            f"rank {rank} WARNING {cleaned}",
            "    error: forged",
            f"rank {rank} WARNING no batch comes",
            f"rank {rank} WARNING looked at by the watchdog",
        ]


def fail_on_rank_1(folder: str, of_the_user: bool) -> Ended:
    rank, run = int(os.environ["RANK"]), RunDir(folder)
    run.path.mkdir(exist_ok=True)

    def fail() -> None:
        write_to_file(run.log_path(rank), rank)
        if rank == 1:
            raise UserError("found 3, expected 4") if of_the_user else ArithmeticError("the model broke")

    return captured(lambda: reported(run, rank, fail))


@pytest.mark.parametrize("of_the_user", [False, True])
def test_an_exception_is_in_the_file_of_its_rank(tmp_path: Path, of_the_user: bool) -> None:
    first, second = in_world(2, fail_on_rank_1, str(tmp_path / "run"), of_the_user)
    said = "found 3, expected 4" if of_the_user else "ArithmeticError: the model broke"
    assert (first.status, first.out, first.err) == (0, "", "")
    assert second.status == 1
    assert said in second.err if not of_the_user else second.err == ""
    text = "\n".join(read(tmp_path / "run", 1))
    assert text.startswith("rank 1 ERROR ")
    assert said in text
    assert ("Traceback" in text) != of_the_user
    assert RunDir(tmp_path / "run").log_path(0).read_text() == ""


def log_as_libraries_do(folder: str) -> Ended:
    def speak() -> int:
        quiet = logging.getLogger("DeepSpeed")
        quiet.handlers[:] = [logging.StreamHandler(sys.stdout)]
        show_on_terminal(converses=True)
        write_to_file(RunDir(folder).log_path(0), 0)
        for name in ("somebody", "accelerate.state"):
            logging.getLogger(name).warning("%s says \x1b[2J", name)
            logging.getLogger(name).info("not worth it")
        quiet.propagate = False
        quiet.setLevel(logging.INFO)
        quiet.warning("by a handler of its own")
        quiet.info("by that alone")
        warnings.warn("an old argument", stacklevel=1)
        return 0

    return captured(speak)


def test_warnings_of_libraries_are_in_the_file_and_on_the_terminal_as_without_it(tmp_path: Path) -> None:
    (ended,) = in_world(1, log_as_libraries_do, str(tmp_path))
    names = ["somebody", "accelerate.state"]
    assert ended.err.splitlines() == [rf"{name} says \x1b[2J" for name in names]
    assert ended.out == "by a handler of its own\nby that alone\n"
    *found, warned, source = read(tmp_path, 0)
    assert found == [
        *(rf"rank 0 WARNING {name}: {name} says \x1b[2J" for name in names),
        "rank 0 WARNING DeepSpeed: by a handler of its own",
    ]
    assert warned.startswith("rank 0 WARNING py.warnings: ")
    assert warned.endswith("UserWarning: an old argument")
    assert source.strip().startswith("warnings.warn(")


def log_without_set_up() -> Ended:
    def speak() -> int:
        logger.info("found the data")
        logger.warning("they are few")
        return 0

    return captured(speak)


def test_without_set_up_only_warnings_are_shown_as_those_of_any_library() -> None:
    (ended,) = in_world(1, log_without_set_up)
    assert (ended.out, ended.err) == ("", "they are few\n")


def test_a_command_whose_result_is_its_output_shows_warnings_alone_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_on_terminal()
    logger.info("loaded 6 tensors")
    logger.warning("the data changed")
    logger.error("found 3, expected 4\nand 5")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "warning: the data changed\nerror: found 3, expected 4\n  and 5\n"


def test_lines_go_above_a_line_of_progress_while_there_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=40)
    console._force_terminal = True
    show_on_terminal(converses=True, console=console)
    logger.info("  batch    16 = 1 x 16 (batch.micro auto: global / processes)")
    assert [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()] == [
        "  batch    16 = 1 x 16 (batch.micro",
        "           auto: global / processes)",
    ]
    if (child := os.fork()) == 0:
        logger.info("from a process that was forked")
        os._exit(0)
    os.waitpid(child, 0)
    logs.leave_console(console)
    logger.info("afterwards")
    assert capfd.readouterr().out == "from a process that was forked\nafterwards\n"


def test_a_resume_appends_and_set_up_can_be_repeated_and_undone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("distrain", *logs._OTHERS)
    before = [list(logging.getLogger(name).handlers) for name in names]
    run = RunDir(tmp_path)
    for attempt in (1, 2):
        for _ in range(2):
            show_on_terminal(converses=True)
            write_to_file(run.log_path(0), 0)
        for _ in range(attempt):
            logger.info(f"attempt {attempt}")
        reset()
        logger.info("heard by nobody")
        assert [list(logging.getLogger(name).handlers) for name in names] == before
        assert logging.getLogger("distrain").propagate
        assert not logging.getLogger("distrain").isEnabledFor(logging.INFO)
        assert warnings.showwarning.__module__ != "logging"
    said = ["attempt 1", "attempt 2", "attempt 2 (1 more time)"]
    assert read(tmp_path, 0) == [f"rank 0 INFO {line}" for line in said]
    assert capsys.readouterr().out.splitlines() == said
