"""A run that hangs says on which rank, machine and line, and ends; one that is slow goes on, and says what slows it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hanging_parts
import pytest
from covering import covering
from places import IMPORTABLE
from runs import rows, write_recipe
from worlds import running_world

import distrain
from distrain.run.folder import RunDir
from distrain.run.heartbeat import read_heartbeats

ROOT = Path(distrain.__file__).parent.parent
LIMIT_S = 2.0
TINY = f"""
name: hangs
task: classification
data: {{name: "hanging_parts:Points"}}
model: {{name: "hanging_parts:Model"}}
optim: {{name: sgd, lr: 0.1}}
batch: {{global: 16}}
train: {{steps: 12}}
eval: {{every: 4 steps, batch: 2}}
checkpoint: {{every: 6 steps}}
watchdog: {{setup: 60 s, step: {LIMIT_S} s, save: {LIMIT_S} s, evaluate: {LIMIT_S} s}}
log: {{every: 1 steps}}
"""


def hang_rank(recipe: str, run: str, overrides: list[str], strategy: str, fsync: tuple[int, int] | None) -> int:
    """Train as `distrain train` does in each process, what is said in a file of its own.

    `fsync` (rank, count): from the count-th on, that rank's synchronisations to the disk never return.
    """
    from distrain.launchers import work

    folder = Path(run).parent
    os.environ["DISTRAIN_TEST_FOLDER"] = str(folder)
    with (folder / f"err-{os.environ['RANK']}").open("w") as err:
        os.dup2(err.fileno(), 2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    if fsync is not None and int(os.environ["RANK"]) == fsync[0]:
        trouble, sync = hanging_parts.Trouble(fsync[0], fsync[1]), os.fsync

        def synchronise(descriptor: int) -> None:
            if trouble.due():
                time.sleep(hanging_parts.LONG_S)
            sync(descriptor)

        os.fsync = synchronise  # type: ignore[assignment]
    if status := work(recipe, overrides, run_dir=run, strategy=strategy):
        os._exit(status)
    return 0


@dataclass
class Hung:
    """How a run that hung has ended."""

    codes: list[int]
    seconds: float
    """From the moment at which a rank began to hang to the end of all."""
    err: str
    failed: dict[str, Any]


def hung(
    folder: Path, world_size: int, *overrides: str, strategy: str = "auto", fsync: tuple[int, int] | None = None
) -> Hung:
    """Train in a world until all of it has ended."""
    recipe, run = write_recipe(folder, TINY), folder / "run"
    with running_world(world_size, hang_rank, str(recipe), str(run), list(overrides), strategy, fsync) as world:
        codes = world.wait(60)
        ended = time.monotonic()
    began = float((folder / "hangs").read_text())
    failed = RunDir(run).failed
    assert failed is not None, "".join(path.read_text() for path in sorted(folder.glob("err-*")))
    err = "".join((folder / f"err-{rank}").read_text() for rank in range(world_size))
    return Hung(codes, ended - began, err, failed)


def assert_named(found: Hung, rank: int, phase: str, file: str, line: int | None) -> None:
    """One sentence names the rank, this machine, the phase and the line, within the limit and five seconds."""
    host = socket.gethostname()
    assert found.seconds < LIMIT_S + 5, found
    assert all(code in (1, -signal.SIGKILL) for code in found.codes), found.codes
    failed = found.failed
    assert (failed["error"], failed["rank"], failed["host"], failed["phase"]) == ("Hang", rank, host, phase), failed
    assert failed["restart"] is True
    assert Path(failed["file"] or "").name == file, failed
    assert line is None or failed["line"] == line, failed
    assert found.err.count("error") == 1, found.err
    assert found.err.strip() == f"error: {failed['message']}"
    assert failed["message"].startswith(f"rank {rank} on {host} hangs in "), failed["message"]
    assert f"{file}:{failed['line']}" in failed["message"]


IN_A_STEP = {
    "data": ["data.rank=2", "data.at=48"],
    "loader": ["data.rank=2", "data.at=48", "data.workers=1"],
    "forward": ["model.where=forward", "model.rank=2", "model.at=6"],
    "backward": ["model.where=backward", "model.rank=2", "model.at=6"],
    "evaluate": ["model.where=evaluate", "model.rank=2", "model.at=3"],
}


@pytest.mark.parametrize("where", IN_A_STEP)
@pytest.mark.fault(10)
def test_a_rank_that_hangs_is_named_with_its_line(tmp_path: Path, where: str) -> None:
    found = hung(tmp_path, 4, *IN_A_STEP[where])
    phase = "data" if where == "loader" else where
    assert_named(found, 2, phase, "hanging_parts.py", hanging_parts.line_of(f"in {phase}"))
    assert ("loader process 0" in found.failed["message"]) == (where == "loader")
    assert "ranks 0, 1 and 3 wait for it" in found.failed["message"]
    folder = tmp_path / "run" / "heartbeat"
    for rank in range(4):
        text = (folder / f"stacks-rank-{rank}.txt").read_text()
        assert "thread MainThread" in text
        line = f"hanging_parts.py:{found.failed['line']} in "
        assert (line in text) == (rank == 2), text


@pytest.mark.parametrize(("strategy", "where"), covering(["zero3", "fsdp2"], ["forward", "backward", "evaluate"]))
@pytest.mark.fault(10)
def test_a_rank_that_hangs_is_named_where_the_model_is_sharded(tmp_path: Path, strategy: str, where: str) -> None:
    settings = [setting.replace("rank=2", "rank=1") for setting in IN_A_STEP[where]]
    found = hung(tmp_path, 2, *settings, strategy=strategy)
    assert_named(found, 1, where, "hanging_parts.py", hanging_parts.line_of(f"in {where}"))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.fault(10)
def test_a_rank_whose_disk_hangs_is_named(tmp_path: Path, asynchronous: str) -> None:
    # the first is of the rehearsal
    found = hung(tmp_path, 4, f"checkpoint.async={asynchronous}", fsync=(3, 2))
    assert_named(found, 3, "save", "test_hangs.py", None)
    assert "distrain/checkpoints/writing.py" in found.failed["traceback"]
    assert ("the thread 'checkpoint-" in found.failed["message"]) == (asynchronous == "true")


@pytest.mark.fault(10)
def test_a_rank_that_is_stopped_is_named_and_ended(tmp_path: Path) -> None:
    found = hung(tmp_path, 4, "model.where=forward", "model.how=stop", "model.rank=0", "model.at=6")
    assert found.seconds < LIMIT_S + 5, found
    assert found.codes[0] == -signal.SIGKILL
    assert 0 not in found.codes
    assert "rank 0 on " in found.failed["message"]
    assert "its process is stopped, by SIGSTOP or a debugger" in found.failed["message"]
    assert found.err.count("error") == 1, found.err
    assert (found.failed["rank"], found.failed["error"]) == (0, "Hang")


@pytest.mark.fault(10)
def test_a_rank_whose_code_keeps_the_lock_of_python_is_named_with_its_line(tmp_path: Path) -> None:
    found = hung(tmp_path, 4, "model.where=forward", "model.how=gil", "model.rank=1", "model.at=6")
    assert found.codes == [1, -signal.SIGKILL, 1, 1]
    assert_named(found, 1, "forward", "hanging_parts.py", hanging_parts.line_of("in gil"))
    assert "(the GIL is held)" in found.failed["message"]


@pytest.mark.fault(10)
def test_a_rank_that_hangs_in_the_set_up_is_named(tmp_path: Path) -> None:
    settings = ["model.where=setup", "model.rank=1", "model.at=1", f"watchdog.setup={LIMIT_S} s"]
    found = hung(tmp_path, 2, *settings)
    assert_named(found, 1, "setup", "hanging_parts.py", hanging_parts.line_of("in setup"))


@pytest.mark.fault(10)
def test_one_process_that_hangs_is_named(tmp_path: Path) -> None:
    found = hung(tmp_path, 1, "model.where=forward", "model.rank=0", "model.at=6")
    assert_named(found, 0, "forward", "hanging_parts.py", hanging_parts.line_of("in forward"))
    assert "wait" not in found.failed["message"].partition(";")[0]


@pytest.mark.fault(10)
def test_one_process_whose_code_keeps_the_lock_of_python_reports_where_and_ends(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, TINY), tmp_path / "run"
    settings = ["model.where=forward", "model.how=gil", "model.rank=0", "model.at=1"]
    settings += [f"watchdog.setup={LIMIT_S} s"]
    with running_world(1, hang_rank, str(recipe), str(run), settings, "auto", None) as world:
        assert world.wait(60) == [1]
        ended = time.monotonic()
    assert ended - float((tmp_path / "hangs").read_text()) < LIMIT_S + 5
    assert f'hanging_parts.py", line {hanging_parts.line_of("in gil")} in hang' in (tmp_path / "err-0").read_text()


@pytest.mark.fault(10)
def test_a_run_that_hung_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    hung(tmp_path, 2, "model.where=evaluate", "model.rank=1", "model.at=14")
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    settings = ["model.where=evaluate", "model.rank=1", "model.at=14"]
    with running_world(2, hang_rank, str(recipe), str(run), settings, "auto", None) as world:
        assert world.wait(60) == [0, 0], (tmp_path / "err-0").read_text() + (tmp_path / "err-1").read_text()
    assert RunDir(run).failed is None
    assert [row["step"] for row in rows(run) if row["event"] == "train"] == list(range(1, 13))


# --------------------------------------------------------------------------------------------------------------------
# No alarm


def test_a_first_step_that_takes_its_time_is_no_hang(tmp_path: Path) -> None:
    settings = ["model.where=forward", "model.rank=-1", "model.at=1", "model.seconds=10"]
    settings += [f"watchdog.{key}=8 s" for key in ("step", "save", "evaluate")]
    recipe, run = write_recipe(tmp_path, TINY), tmp_path / "run"
    with running_world(4, hang_rank, str(recipe), str(run), settings, "auto", None) as world:
        assert world.wait(60) == [0, 0, 0, 0], (tmp_path / "err-0").read_text()
    assert (tmp_path / "hangs").exists()
    assert [beat.phase for beat in read_heartbeats(RunDir(run))] == ["ended"] * 4
    assert not list((run / "heartbeat").glob("st*"))


@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 4), pytest.param("fsdp2", 2, marks=pytest.mark.more), ("zero3", 2)]
)
def test_a_rank_that_is_slow_is_named_and_not_ended(tmp_path: Path, strategy: str, world_size: int) -> None:
    recipe, run, rank = write_recipe(tmp_path, TINY), tmp_path / "run", world_size // 2
    slow = ["model.where=forward", f"model.rank={rank}", "model.at=4", "model.how=slow", "model.seconds=0.03"]
    settings = [*slow, "train.steps=100000", "eval.every=null", "checkpoint.every=null"]
    # heartbeats as often as the least of the limits wants them, and steps that may take longer
    settings += ["watchdog.step=20 s", "watchdog.save=20 s"]
    with running_world(world_size, hang_rank, str(recipe), str(run), settings, strategy, None) as world:
        until, found = time.monotonic() + 40, list[dict[str, Any]]()
        while not found and time.monotonic() < until:
            time.sleep(0.1)
            found = [row for row in RunDir(run).rows() if row["event"] == "straggler"] if run.exists() else []
        world.signal(signal.SIGTERM)
        assert world.wait(30) == [0] * world_size, (tmp_path / "err-0").read_text()
    assert len(found) == 1
    row = found[0]
    assert (row["rank"], row["host"], row["phase"]) == (rank, socket.gethostname(), "forward")
    # of a step under way when a heartbeat is written some part counts; where the model is sharded, what is waited for
    # within the forward pass is sampled
    assert row["seconds"] > (0.02 if strategy == "ddp" else 0.01)
    assert row["ratio"] > 1.5
    log = (run / "log-rank-0.txt").read_text()
    assert log.count(f"rank {rank} on {socket.gethostname()} is slow: ") == 1
    assert RunDir(run).preempted is not None


# --------------------------------------------------------------------------------------------------------------------
# With a launcher


@pytest.mark.slow
@pytest.mark.fault(10)
def test_the_launcher_ends_when_a_rank_is_stopped(tmp_path: Path) -> None:
    settings = ["model.where=forward", "model.how=stop", "model.rank=1", "model.at=6"]
    command = [
        sys.executable,
        "-m",
        "distrain",
        "train",
        write_recipe(tmp_path, TINY),
        "--processes",
        2,
        *settings,
    ]
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    variables["PYTHONPATH"] = IMPORTABLE
    done = subprocess.run(
        [*map(str, command), "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=variables | {"DISTRAIN_TEST_FOLDER": str(tmp_path)},
        timeout=120,
    )
    ended = time.monotonic()
    assert done.returncode == 1
    # and what the launcher takes to end, which on a busy machine is several seconds
    assert ended - float((tmp_path / "hangs").read_text()) < LIMIT_S + 5 + 30
    assert done.stderr.count("error") == 1, done.stderr
    loading, _, told = done.stderr.partition("\n")
    assert loading.startswith("loading PyTorch")
    assert told.startswith(f"error: rank 1 on {socket.gethostname()} hangs in the forward pass of step ")
