"""From a recipe to processes: the world that is asked for or none, by every launcher; and what a run folder refuses."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SCRIPT
from runs import TINY, Ended, checkpoint, cli, cli_rank, losses, rows, script, tool, train, typed, write_recipe
from worlds import in_world, running_world

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers import (
    LaunchPlan,
    configuration_file,
    find_launcher,
    find_run,
    gpu_count,
    launch,
    launch_argv,
    open_run,
    recipe_differences,
    recipe_text,
    shared_file,
    unsaid_failures,
)
from distrain.run.folder import Launch, RunDir
from distrain.run.json_files import append_row
from distrain.run.lease import Holder, take_lease
from distrain.system.processes import process_stat

# --------------------------------------------------------------------------------------------------------------------
# Plans


def test_the_arguments_of_accelerate_launch() -> None:
    plan = LaunchPlan(Path("/x/train.py"), ("runs/a b", "--update"), 4, Path("/x/ddp.yaml"))
    assert launch_argv(plan) == [
        "--config_file", "/x/ddp.yaml", "--num_processes", "4", "--num_machines", "1", "--machine_rank", "0",
        "--rdzv_backend", "static", "--main_process_port", "0", "/x/train.py", "runs/a b", "--update",
    ]  # fmt: skip
    offload = launch_argv(replace(plan, offload="optimizer"))
    assert offload[2:4] == ["--offload_optimizer_device", "cpu"]
    offload = launch_argv(replace(plan, offload="all"))
    for option, value in (("optimizer_device", "cpu"), ("param_device", "cpu"), ("params", "true")):
        name = f"--fsdp_offload_{option}" if option == "params" else f"--offload_{option}"
        assert offload[offload.index(name) + 1] == value


def test_failures_that_no_rank_reported_are_reported_once_for_each_kind() -> None:
    assert unsaid_failures({0: 1, 1: -signal.SIGTERM}) == []
    lines = unsaid_failures({3: -signal.SIGKILL, 0: -signal.SIGKILL, 1: 1, 2: -signal.SIGABRT, 4: 7, 5: -63})
    assert len(lines) == 4
    assert lines[0].startswith("ranks 0, 3 were ended by SIGKILL; out of memory")
    assert lines[1] == "rank 2 was ended by SIGABRT"
    assert lines[2] == "rank 4 exited with code 7 without an error message"
    assert lines[3] == "rank 5 was ended by signal 63"


def test_gpus_are_counted_without_torch() -> None:
    assert gpu_count({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert gpu_count({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}) == 1
    for nothing in ("", "-1", " "):
        assert gpu_count({"CUDA_VISIBLE_DEVICES": nothing}) == 0


def test_files_that_come_along_are_found() -> None:
    assert shared_file("launch", "train.py") == SCRIPT
    with pytest.raises(UserError, match=r"recipes/none\.yaml is not part of this installation"):
        shared_file("recipes", "none.yaml")


# --------------------------------------------------------------------------------------------------------------------
# Run folders


def test_a_recipe_names_its_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run, loaded = find_run(str(recipe), ["name=other"], None)
    assert run.path == Path("runs/other").absolute()
    assert loaded is not None
    assert find_run(str(recipe), [], str(tmp_path / "x"))[0].path == tmp_path / "x"
    assert not Path("runs/other").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without recipe\.yaml, so it is not a run"):
        find_run(str(tmp_path), [], None)


def opened(folder: Path, *overrides: str, update: bool = False) -> RunDir:
    run, loaded = find_run(str(write_recipe(folder)), overrides, str(folder / "run"))
    open_run(run, loaded, Launch.describe(1, "single"), update=update)
    return run


def test_a_run_takes_no_new_values(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert find_run(str(run.path), [], None)[1] is None
    for overrides, run_dir in ((["optim.lr=1"], None), ([], "x")):
        with pytest.raises(UserError, match="is a run, whose recipe is fixed"):
            find_run(str(run.path), overrides, run_dir)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds files and is not a run; choose another --run-dir"):
        opened(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("left", ["", "metrics.jsonl"])
def test_an_attempt_that_trained_nothing_fixes_no_recipe(tmp_path: Path, left: str) -> None:
    run = opened(tmp_path)
    if left:
        (run.path / left).touch()  # as by an attempt whose first batch could not be read
    opened(tmp_path, "optim.lr=0.5")
    assert load_recipe(run.recipe_path).recipe.optim.lr == 0.5


def test_a_checkpoint_before_the_first_row_fixes_the_recipe(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.metrics_path.touch()
    run.checkpoint(1).mkdir(parents=True)
    with pytest.raises(UserError, match=r"optim\.lr: was 0\.01, now 0\.5"):
        opened(tmp_path, "optim.lr=0.5")


def test_a_loss_that_is_the_tasks_own_is_not_only_null(tmp_path: Path) -> None:
    run = opened(tmp_path, "loss=cross_entropy")
    append_row(run.metrics_path, {"event": "train", "step": 1})
    with pytest.raises(UserError, match=r"loss: was cross_entropy, now null \(the task's own loss\)"):
        opened(tmp_path)


def test_another_recipe_is_refused_with_both_values(tmp_path: Path) -> None:
    run = opened(tmp_path)
    append_row(run.metrics_path, {"event": "train", "step": 1})
    before = run.recipe_path.read_text()
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "optim.lr=0.5", "train.ema=null", "seed=3")
    for line in ("optim.lr: was 0.01, now 0.5", "train.ema: was 0.9, now null", "seed: was 0, now 3"):
        assert f"\n  {line}\n" in str(caught.value)
    assert str(caught.value).count(": was ") == 3
    assert run.recipe_path.read_text() == before
    opened(tmp_path)
    opened(tmp_path, "optim.lr=0.5", update=True)
    assert load_recipe(run.recipe_path).recipe.optim.lr == 0.5


def test_a_recipe_may_be_mended_until_something_was_trained(tmp_path: Path) -> None:
    run = opened(tmp_path)
    opened(tmp_path, "optim.lr=0.5")
    assert load_recipe(run.recipe_path).recipe.optim.lr == 0.5


def test_a_recipe_with_mistakes_leaves_no_run_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    mistakes = ["model.hiden=[3]", "data.spilt=[0.5,0.5]", "eval.metrics=[acuracy]"]
    (ended,) = train(1, recipe, tmp_path / "run", *mistakes, status=1)
    assert ended.err.startswith(f"error: {recipe}: 3 problems\n")
    for name in ("hidden", "split", "accuracy"):
        assert f"did you mean '{name}'" in ended.err
    assert not (tmp_path / "run").exists()


def test_the_stored_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path), ["optim.lr=0.5"])
    stored = tmp_path / "stored.yaml"
    stored.write_text(recipe_text(loaded))
    assert load_recipe(stored).recipe == loaded.recipe
    assert recipe_differences(load_recipe(stored), loaded) == []
    assert "command line" in stored.read_text(), "each value says where it came from"


def test_update_resumes_with_the_new_values(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(1, recipe, run)
    ended = train(1, recipe, run, "train.steps=16", status=1)
    assert "train.steps: was 12, now 16" in ended[0].err, "also of a finished run"
    assert RunDir(run).finished is not None
    train(1, recipe, run, "train.steps=16", update=True)
    assert len(losses(run)) == 16
    done = RunDir(run).finished
    assert done is not None
    assert done["steps"] == 16
    assert [row["step"] for row in rows(run) if row["event"] == "final"] == [12, 16]


def test_update_replaces_the_rows_of_steps_that_it_trains_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(1, recipe, run)
    for step in (8, 12):
        shutil.rmtree(checkpoint(run, step))
    train(1, recipe, run, "optim.lr=1e-4", "eval.metrics=[accuracy,f1_macro]", "eval.best=f1_macro", update=True)
    found = rows(run)
    rates = [row["lr"] for row in found if row["event"] == "train"]
    assert len(rates) == 12
    assert max(rates[:4]) > 5e-3
    assert max(rates[4:]) <= 1e-4
    assert ["f1_macro" in row for row in found if row["event"] == "eval"] == [False, True, True]
    done = RunDir(run).finished
    assert done is not None
    assert done["best"]["step"] in (8, 12), "the score of step 4 is another metric's"


def hold(run: str) -> None:
    lease = take_lease(RunDir(run), Holder.of_this_process(), step=0, processes=1, strategy="single")
    (Path(run) / "held").touch()
    time.sleep(60)
    lease.release(clean=True)


@pytest.mark.fault(32)
def test_a_run_that_another_process_is_at_work_on_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(1, recipe, run, stop_after=1)
    with running_world(1, hold, str(run), launched=False) as other:
        until = time.monotonic() + 30
        while not (run / "held").exists() and time.monotonic() < until:
            time.sleep(0.01)
        refused = f"{run} is in use by process {other.processes[0].pid} on "
        for processes in (1, 2):
            ended = cli("train", recipe, "--run-dir", run, "--processes", processes, "--update", "optim.lr=1")
            assert ended.status == 1
            assert refused in ended.err
        other.kill()
        other.wait(30)
    assert RunDir(run).preempted is not None, "as it was"
    assert "lr: 0.01" in RunDir(run).recipe_path.read_text()
    train(1, recipe, run)


# --------------------------------------------------------------------------------------------------------------------
# Launchers, as they are typed


MULTI_CPU = ROOT / "accelerate_configs" / "multi_cpu.yaml"
WRONG = {
    "python": (["python", SCRIPT], ["--processes", "2"], "this run asks for 2 processes, found 1"),
    "torchrun": (
        ["torchrun", "--nproc-per-node", "2", SCRIPT], ["--processes", "3"], "this run asks for 3 processes, found 2"
    ),
    "accelerate": (
        ["accelerate", "launch", "--cpu", "--num_processes", "2", SCRIPT], [],
        "the launcher's command asks for 2 processes, found 1",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param(n, marks=[pytest.mark.more] * (n == "accelerate")) for n in WRONG])
def test_a_world_other_than_the_requested_is_refused(tmp_path: Path, launcher: str) -> None:
    command, more, message = WRONG[launcher]
    arguments = [*command[1:], write_recipe(tmp_path), "--run-dir", tmp_path / "run", *more]
    if launcher == "accelerate":  # which is recognised by the command of the process above
        done = typed(launcher, *arguments, folder=tmp_path)
        status, err = done.returncode, done.stderr
    else:
        ended = script(*arguments) if launcher == "python" else tool(launcher, *arguments)
        status, err = ended.status, ended.err
    assert status != 0
    assert err.count(message) == 1, err
    assert "nothing was written" in err
    assert "distrain train RECIPE --processes" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


LATE = """
import os, sys, time

sys.path.insert(0, {root!r})
from distrain.launchers import work

if os.environ["RANK"] == "0":
    time.sleep(4)
sys.exit(work(sys.argv[1], run_dir=sys.argv[2], processes=3))
"""


@pytest.mark.slow
def test_a_rank_that_is_faster_leaves_the_report_to_rank_0(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE.format(root=str(ROOT)))
    done = typed("torchrun", "--nproc-per-node", 2, script, write_recipe(tmp_path), tmp_path / "run", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("this run asks for 3 processes, found 2") == 1, done.stderr


LEFT_OVER = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "4",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "198.51.100.7:29400",
    "MASTER_ADDR": "198.51.100.7",
    "RANK": "0",
    "OMPI_COMM_WORLD_RANK": "0",
}
"""Of a launcher that is gone, with an address for documentation, where nobody answers."""


LAUNCHERS = {
    "python": [SCRIPT],
    "torchrun": ["torchrun", "--nproc-per-node", "2", SCRIPT],
    "accelerate": ["accelerate", "launch", "--config_file", MULTI_CPU, SCRIPT],
    "distrain": [sys.executable, "-m", "distrain", "train", "--processes", "2"],
}


@pytest.mark.slow
@pytest.mark.fault(34)
# test_preflight has `accelerate launch` start a run under FSDP2
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.more] * (n == "accelerate")) for n in LAUNCHERS])
def test_every_launcher_trains_the_same_run(tmp_path: Path, name: str) -> None:
    recipe = write_recipe(tmp_path)
    train(2, recipe, tmp_path / "wanted")
    run = tmp_path / name
    left = LEFT_OVER if name == "distrain" else {}
    command = [*LAUNCHERS[name], recipe, "--run-dir", run]
    if name == "python":
        ended = script(*command)
        status, err = ended.status, ended.err
    else:  # they are recognised by the command of the process above
        done = typed(*command, folder=tmp_path, PYTHONPATH=str(ROOT), **left)
        status, err = done.returncode, done.stderr
    assert status == 0, err
    ignored = "note: ignored MASTER_ADDR, PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE"
    assert err.count(ignored) == bool(left)
    assert RunDir(run).launch().processes == (1 if name == "python" else 2)
    assert losses(run) == pytest.approx(losses(tmp_path / "wanted"), rel=1e-12)
    if name != "python":
        assert losses(run) == losses(tmp_path / "wanted")
    assert "Traceback" not in err
    if name == "distrain":
        # the same command shows it; with --update it trains on, in the processes that are started
        again = ["train", recipe, "--processes", 2, "--run-dir", run]
        assert "is finished" in cli(*again).out
        ended = cli(*again, "train.steps=14", "--update")
        assert ended.status == 0, ended.err
        assert len(losses(run)) == 14


@pytest.mark.slow
@pytest.mark.fault(6)
def test_distrain_train_reports_a_failure_once_and_names_a_killed_rank(tmp_path: Path) -> None:
    text = TINY.replace("model: {name: mlp, hidden: [16]}", 'model: {name: "own_parts:Faulty", width: 64, classes: 10}')
    recipe = write_recipe(tmp_path, text)
    command = ["train", recipe, "--processes", 2]
    ended = cli(*command, "--run-dir", tmp_path / "a")
    assert ended.status == 1
    assert ended.err.count("ArithmeticError: the model broke") == 1
    assert ended.err.count("error") == 1, ended.err
    assert "ChildFailedError" not in ended.err + ended.out
    ended = cli(*command, "model.how=kill", "--run-dir", tmp_path / "b")
    assert ended.status == 1
    assert "error: rank 1 was ended by SIGKILL" in ended.err


def test_a_wrong_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = cli("train", recipe, "optim.lr=-1", "trian.steps=3", "--run-dir", tmp_path / "run")
    assert ended.status == 1
    assert "optim.lr" in ended.err
    assert "trian" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


SAVES = """
import signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(32)
    Path(sys.argv[1], "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "ready").touch()
while True:
    time.sleep(0.1)
"""


def launch_slow(folder: str, script: str) -> int:
    return launch(LaunchPlan(Path(script), (folder,), 1, configuration_file("ddp")))


@pytest.mark.slow
def test_a_stopped_rank_may_save_for_longer_than_half_a_minute(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    with running_world(1, launch_slow, str(tmp_path), str(script), launched=False) as launcher:
        until = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.05)
        launcher.signal(signal.SIGTERM)
        launcher.results()
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processes follow their launcher on Linux only")
@pytest.mark.fault(7)
def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    arguments = ["train", write_recipe(tmp_path), "--run-dir", run.path, "--processes", 2, "train.steps=100000"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "distrain", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    )
    until = time.monotonic() + 60
    try:
        while next(run.rows(), None) is None and time.monotonic() < until:
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == 2
    finally:
        launcher.kill()
        launcher.wait()
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert [child for child in children if _runs(child)] == []


def _runs(process: str) -> bool:
    found = process_stat(process)
    return found is not None and found.state not in "ZX"


# --------------------------------------------------------------------------------------------------------------------
# Launchers


def test_this_machine_has_no_queue(tmp_path: Path) -> None:
    local = find_launcher("local")
    assert local.status([tmp_path]) is None
    with pytest.raises(UserError, match=f"distrain stop {tmp_path}` has a run save and end"):
        local.cancel(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# From a command to training


def files_entered(recipe: str, run_dir: str) -> list[str]:
    """Train in this process; returns the files that the recipe, the run or its request enters until training begins.

    A file counts each time that one of its functions is given one of them after a function of another file was. Those
    of a request itself, of the run folder's files and of `distrain.system` are not on the way.
    """
    from distrain.launchers import RunRequest, Target, start

    package, entered = f"{ROOT}/distrain/", [""]

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package) or entered[-1] == "loop.py":
            return
        file = code.co_filename.removeprefix(package)
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if file.startswith("system/") or file in ("run/folder.py", "run/json_files.py"):
            return
        if given and code.co_varnames[0] == "self" and isinstance(given[0], RunRequest):
            return
        if any(
            isinstance(each, RunRequest | RunDir | Target) or (type(each) is str and each == recipe) for each in given
        ):
            entered.extend([file] if file != entered[-1] else [])

    sys.setprofile(note)
    try:
        assert start(recipe, run_dir=run_dir, processes=1).status == 0
    finally:
        sys.setprofile(None)
    return entered[1:]


def test_a_recipe_comes_to_training_by_few_files(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (entered,) = in_world(1, files_entered, str(recipe), str(tmp_path / "run"), launched=False)
    assert entered[:2] == ["launchers/local.py", "launchers/request.py"]
    assert entered[-1] == "loop.py"
    assert len(entered) <= 18, entered


CRASHING = """
import math
import os
import signal

from torch import nn


class Net(nn.Linear):
    def __init__(self, input_shape, num_classes):
        super().__init__(math.prod(input_shape), num_classes)

    def forward(self, rows):
        if os.environ["RANK"] == "1" and self.training:
            os.kill(os.getpid(), signal.SIGSEGV)  # as a library does that writes where it may not
        return super().forward(rows.flatten(1))
"""


def started_as_people_do(arguments: list[str]) -> Ended:
    faulthandler.disable()  # which tests enable for themselves
    return cli_rank(arguments)


def test_a_rank_that_crashes_below_python_shows_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    recipe = write_recipe(tmp_path, TINY.replace("model: {name: mlp, hidden: [16]}", "model: 'crashing.py:Net'"))
    arguments = ["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--processes", "2"]
    (ended,) = in_world(1, started_as_people_do, arguments, launched=False)
    assert ended.status == 1
    assert "rank 1 was ended by SIGSEGV" in ended.err
    assert "Fatal Python error: Segmentation fault" in ended.err
    assert 'crashing.py", line 15 in forward' in ended.err
