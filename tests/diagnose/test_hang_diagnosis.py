"""Who hangs, by what all ranks have written; where threads are; who is slow; what the driver of the GPUs says."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from beats import beat, run_in
from runs import write_recipe
from worlds import in_world

from distrain.config import Duration, RecipeError, WatchdogSection
from distrain.config.yaml import load_recipe
from distrain.diagnose.hang_diagnosis import Limits, Watchdog, evidence
from distrain.diagnose.hang_diagnosis.diagnosis import Diagnosis, RankReport, find_culprit, record, sentence
from distrain.diagnose.hang_diagnosis.gpus import describe_gpus, gpu_faults, parse_memory_errors, parse_xids
from distrain.diagnose.hang_diagnosis.stragglers import Stragglers, slowest
from distrain.launchers import reported
from distrain.parallel import ddp
from distrain.run import heartbeat, stacks
from distrain.run.heartbeat import Heartbeat, enter_phase, stepped
from distrain.run.stacks import Frame, Stack, Where, line_to_see, parse_dump, shortened, waits, where

# --------------------------------------------------------------------------------------------------------------------
# Who hangs

OWN = Frame("/home/me/model.py", 12, "forward")


def report(rank: int, place: tuple[int, int] = (4, 3), waits: bool | None = True, **more: Any) -> RankReport:
    """Return a rank that has said where it is."""
    where = Where(OWN, waits, "", ("model.py:12 in forward",)).plain() | more
    return RankReport(rank, beat(rank, host=f"n{rank}", step=place[0], marks=place[1], idle=600.0, stalled=where))


def silent(rank: int, state: str | None = None, line: Frame | None = None, **values: Any) -> RankReport:
    """Return a rank from which nothing comes any more."""
    return RankReport(rank, beat(rank, host=f"n{rank}", **values), 20.0, state, line)


CASES: dict[str, tuple[list[RankReport], list[int]]] = {
    "who does not wait for others": ([report(0), report(1, waits=False), report(2)], [1]),
    "who is behind": ([report(0, (4, 4)), report(1, (4, 3), waits=False), report(2, (4, 4))], [1]),
    "who is a step behind": ([report(0, (5, 1)), report(1, (4, 5), waits=None), report(2, (5, 1))], [1]),
    "who is behind, though others compute too": (
        [report(0, (5, 1), waits=False), report(1, (4, 5), waits=False)], [1],
    ),
    "all that read from one disk": ([report(rank, waits=False) for rank in range(3)], [0, 1, 2]),
    "who is silent": ([report(0, waits=False), silent(1), report(2)], [1]),
    "all that are silent": ([report(0), silent(1), silent(2)], [1, 2]),
    "who has never begun": ([report(0), RankReport(1, None, 20.0), report(2)], [1]),
    "who has gone on from a broadcast and hangs": (
        [report(0, (4, 4), waits=False), report(1), report(2)], [0],
    ),
    "whose backward pass never ends, by collectives": (
        [report(0, waits=None, collectives={"g": 7}), report(1, waits=None, collectives={"g": 6})], [1],
    ),
    "whose backward pass never ends, by a thread that computes": (
        [report(0, waits=None, cpu=0.01), report(1, waits=None, cpu=0.4), report(2, waits=None, cpu=0.0)], [1],
    ),
    "whose stack does not tell where the others' do": ([report(0), report(1, waits=None), report(2)], [1]),
    "nobody, where all wait for each other": ([report(0), report(1), report(2)], []),
    "nobody, where all are in a backward pass": (
        [report(rank, waits=None, collectives={"g": 3}, cpu=0.0) for rank in range(3)], [],
    ),
    "who is alone": ([report(0, waits=True)], [0]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_culprit_is(case: str) -> None:
    reports, ranks = CASES[case]
    diagnosis = find_culprit(reports)
    assert list(diagnosis.ranks) == ranks
    assert set(diagnosis.waiting) == {each.rank for each in reports} - set(ranks)


def said(*reports: RankReport) -> str:
    """Return the sentence on a run."""
    return sentence(find_culprit(reports), reports, Path("/runs/a/heartbeat"))


def test_one_sentence_says_it() -> None:
    tail = "; the stacks of all threads are in /runs/a/heartbeat"
    assert said(report(0), report(1, waits=False), report(2)) == (
        "rank 1 on n1 hangs in the forward pass of step 5, at /home/me/model.py:12 in forward, with no progress for "
        "10 min, and ranks 0 and 2 wait for it" + tail
    )
    assert said(report(0), report(1, waits=False, thread="loader process 3")).startswith(
        "rank 1 on n1 hangs in the forward pass of step 5, at /home/me/model.py:12 in forward (loader process 3), with"
    )
    assert said(report(0)).startswith("rank 0 on n0 hangs in the forward pass of step 5, at /home/me/model.py:12 ")
    assert "and rank 0 waits for it" in said(report(0), report(1, waits=False))
    both = said(report(0), report(1, waits=False), report(2, waits=False))
    assert "rank 1 on n1 hangs" in both
    assert "; rank 2 on n2 hangs" in both
    assert both.endswith(", and rank 0 waits for them" + tail)
    many = said(*(report(rank, waits=False) for rank in range(20)))
    assert many.count("hangs in") == 3
    assert "so do ranks 3, 4, 5, 6, 7, 8, 9, 10 and 9 more" in many


def test_the_sentence_on_a_silent_rank_reports_what_is_known_of_it() -> None:
    for state, words in {
        "T": "its process is stopped, by SIGSTOP or a debugger",
        "": "its process has ended",
        "Z": "its process has ended",
        "D": "stuck in the kernel",
        None: "its process is stopped or has ended, its machine is gone, or its thread holds the GIL",
        "R": "its process is stopped or has ended, its machine is gone, or its thread holds the GIL",
    }.items():
        text = said(report(0), silent(1, state))
        assert text.startswith("rank 1 on n1 hangs in the forward pass of step 8: ")
        assert words in text
        assert "nothing has come from it for 20 s" in text
    held = said(report(0), silent(1, "R", OWN))
    assert "at /home/me/model.py:12 in forward: no other thread gets to run Python there (the GIL is held)" in held
    assert said(report(0), RankReport(1, None, 20.0)).startswith("rank 1 on an unknown machine has not begun")


def test_a_wait_without_a_culprit_is_reported_as_one() -> None:
    text = said(report(0), report(1))
    assert text.startswith("all ranks (n0, n1) wait for each other in the forward pass of step 5, at ")
    assert "look at the network between them" in text


def test_what_is_recorded_names_rank_host_step_phase_and_line() -> None:
    reports = [report(0), report(1, waits=False), silent(2, "T")]
    folder = Path("/runs/a/heartbeat")
    diagnosis = Diagnosis((1,), "busy", (0, 2))
    found = record(diagnosis, reports, folder, {"n1": ["GPU 0: Xid 79"], "n0": ["GPU 1: Xid 13"]})
    assert (found["error"], found["rank"], found["host"], found["step"]) == ("Hang", 1, "n1", 4)
    assert (found["phase"], found["file"], found["line"], found["function"]) == (
        "forward", "/home/me/model.py", 12, "forward",
    )  # fmt: skip
    assert found["restart"] is True
    assert found["gpu_faults"] == ["n1: GPU 0: Xid 79"]
    assert found["message"].endswith(". The driver reports: n1: GPU 0: Xid 79")
    assert [each["rank"] for each in found["silent"]] == [2]
    assert found["silent"][0]["pid"] == os.getpid()
    none = record(Diagnosis((), "together", (0, 1)), reports[:2], folder, {"n0": ["GPU 1: Xid 74"]})
    assert none["rank"] is None
    assert none["gpu_faults"] == ["n0: GPU 1: Xid 74"]


# --------------------------------------------------------------------------------------------------------------------
# Where threads are

SITE = stacks._SITE[0]
PACKAGE = stacks.PACKAGE


def stack(*files: str) -> list[Frame]:
    """Return a stack of functions `f` in these files, the innermost first."""
    return [Frame(*(file.split("|")[0], 3, file.split("|")[1] if "|" in file else "f")) for file in files]


LOOP, LAUNCH = f"{PACKAGE}loop.py", "/repo/launch/train.py"
FORKED = (f"{PACKAGE}launchers/forking.py", f"{PACKAGE}launchers/slurm/node.py", "/repo/launch/node.py")


def test_the_line_to_see_is_the_users() -> None:
    torch_file, other = f"{SITE}torch/nn/modules/linear.py", f"{SITE}timm/models/vit.py"
    standard = os.__file__
    for files, wanted in (
        ([torch_file, "/home/me/model.py", torch_file, LOOP, LAUNCH], "/home/me/model.py"),
        ([standard, "/home/me/deep.py", "/home/me/model.py", LOOP, LAUNCH], "/home/me/deep.py"),
        ([torch_file, other, torch_file, LOOP, LAUNCH], other),
        ([torch_file, LOOP, f"{PACKAGE}launchers/worker.py", LAUNCH], LOOP),
        ([torch_file, LOOP, f"{PACKAGE}launchers/worker.py", LAUNCH, *FORKED], LOOP),
        ([torch_file, "/home/me/model.py", LOOP, LAUNCH, *FORKED], "/home/me/model.py"),
        ([standard, torch_file], standard),
    ):
        found = line_to_see(stack(*files))
        assert found is not None
        assert found.file == wanted
    assert line_to_see([]) is None


def test_the_command_line_is_never_the_place() -> None:
    inside, plumbing = "torch/optim/adamw.py", f"{PACKAGE}loop.py"
    for tool in ("typer/main.py", "click/core.py", f"{PACKAGE}cli/main.py", f"{PACKAGE}cli/cluster.py"):
        frames = stack(
            f"{SITE}{inside}", plumbing, f"{PACKAGE}launchers/worker.py", tool_file(tool), f"{PACKAGE}cli/main.py"
        )
        found = line_to_see(frames)
        assert found is not None
        assert found.file == plumbing
        assert not any("cli" in line or "typer" in line or "click" in line for line in where(frames).stack)
    assert line_to_see(stack(tool_file("typer/main.py"))) is not None, "where nothing else is there"


def tool_file(name: str) -> str:
    return name if name.startswith("/") else f"{SITE}{name}"


def test_a_call_to_the_gpu_is_reported_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at_device = stack(f"{SITE}torch/cuda/streams.py", f"{PACKAGE}parallel/comm.py", f"{PACKAGE}training/run_loop.py")
    elsewhere = [
        stack("/usr/lib/python3/queue.py", f"{PACKAGE}loop.py"),
        stack(f"{SITE}torch/utils/data/x.py"),
        [],
    ]
    assert not stacks.is_at_device(at_device), "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert where(at_device).device
    assert not any(where(each).device for each in elsewhere)
    assert Where.of(where(at_device).plain()) == where(at_device)
    text = "at /home/me/model.py:12 in forward, with no progress for 10 min; it is in a call"
    assert f"{text} to the GPU, which has not ended what was launched last, in the forward pass of step 5" in said(
        report(0, device=True)
    )


def test_whether_a_thread_waits_for_others() -> None:
    for files, wanted in (
        ([f"{SITE}torch/distributed/distributed_c10d.py", LOOP], True),
        ([f"{SITE}torch/_ops.py", f"{SITE}torch/distributed/_functional_collectives.py", LOOP], True),
        ([f"{SITE}torch/nn/parallel/distributed.py", LOOP], True),
        ([f"{SITE}deepspeed/comm/torch.py", LOOP], True),
        ([f"{SITE}deepspeed/runtime/zero/partition_parameters.py|wait", LOOP], True),
        ([f"{SITE}deepspeed/runtime/zero/stage3.py|step", LOOP], False),
        ([f"{PACKAGE}parallel/strategy.py|share_buffers", LOOP], True),
        ([f"{SITE}torch/autograd/graph.py|_engine_run_backward", LOOP], None),
        ([f"{PACKAGE}parallel/ddp.py|_run_backward", LOOP], None),
        ([f"{SITE}torch/cuda/streams.py|synchronize", LOOP], None),
        (["/home/me/model.py", f"{SITE}torch/nn/parallel/distributed.py", LOOP], False),
        ([f"{SITE}torch/nn/functional.py", LOOP], False),
        ([], False),
    ):
        assert waits(stack(*files)) is wanted, files


@pytest.mark.parametrize("run_backward", [ddp._run_backward, torch.autograd.backward])
def test_a_backward_pass_leaves_open_whether_it_waits(run_backward: Callable[..., None]) -> None:
    stacks_there: list[Stack] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            stacks_there.append(stacks.stack_of(sys._getframe()))
            return gradients[0]

    run_backward((Noting.apply(torch.ones((), requires_grad=True)),), (torch.ones(()),))
    (found,) = stacks_there
    caller = next(at for at, frame in enumerate(found) if "run_backward" in frame.function)
    assert waits(found[caller:]) is None


def test_names_of_files_are_those_that_people_know() -> None:
    assert shortened(f"{SITE}torch/nn/modules/linear.py") == "torch/nn/modules/linear.py"
    assert shortened(f"{PACKAGE}loop.py") == "distrain/loop.py"
    assert shortened(str(Path.cwd() / "mine.py")) == "mine.py"
    assert shortened("/usr/lib/python3/dist-packages/six.py") == "six.py"
    assert shortened("/home/me/model.py") == "/home/me/model.py"


DUMP = """Timeout (0:00:03)!
Thread 0x00007f5 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f4 (most recent call first):
  File "/home/me/my model.py", line 12 in forward
  File "<string>", line ??? in <module>

Thread 0x00007f3 [watchdog] (most recent call first):
  <no Python frame>
"""


def test_what_faulthandler_writes_is_read() -> None:
    found = parse_dump(DUMP)
    assert [len(each) for each in found] == [2, 0, 2]
    assert found[-1] == [Frame("/home/me/my model.py", 12, "forward"), Frame("<string>", 0, "<module>")]
    assert parse_dump("") == []
    assert parse_dump("no stack") == []


def test_of_a_dump_the_thread_that_trains_is_taken_once_it_is_there() -> None:
    watching = f"{PACKAGE}diagnose/hang_diagnosis/__init__.py"
    other = f'Thread 0x1 (most recent call first):\n  File "{watching}", line 3 in _watch\n'
    other += f'  File "{os.path.dirname(os.__file__)}/python/threading.py", line 9 in _bootstrap\n'
    training = 'Thread 0x2 (most recent call first):\n  File "/home/me/model.py", line 12 in forward\n'
    assert evidence.main_of(parse_dump(other)) == []
    assert evidence.main_of(parse_dump(other + training)) == [], "it is being written"
    training += f'  File "{LOOP}", line 5 in _attempt\n'
    assert line_to_see(evidence.main_of(parse_dump(other + training))) == OWN
    assert line_to_see(evidence.main_of(parse_dump(training + other))) == OWN


def test_what_faulthandler_writes_here_is_read(tmp_path: Path) -> None:
    import faulthandler

    with (tmp_path / "dump").open("w") as file:
        faulthandler.dump_traceback(file)
    found = parse_dump((tmp_path / "dump").read_text())[-1]
    assert found[0].file == __file__
    assert found[0].function == "test_what_faulthandler_writes_here_is_read"


def test_a_thread_of_the_backward_pass_is_found() -> None:
    """As on a GPU, where threads of the autograd engine, unknown to Python's threading, run it."""
    import _thread

    release, there = threading.Event(), threading.Event()

    class Sleepy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            there.set()
            release.wait(30)
            return gradients[0]

    x = torch.ones(2, requires_grad=True)
    _thread.start_new_thread(Sleepy.apply(x).sum().backward, ())
    assert there.wait(10)
    try:
        unsure = stack(f"{SITE}torch/autograd/graph.py|_engine_run_backward", LOOP)
        found = stacks.where_is(0, stacks.stacks())
        assert found.line is None, "no such thread"
        found = stacks.where_is(0, stacks.stacks() | {0: unsure})
    finally:
        release.set()
    assert found.thread == "a thread of the backward pass"
    assert found.line is not None
    assert (found.line.file, found.line.function) == (__file__, "backward")
    assert found.waits is False


# --------------------------------------------------------------------------------------------------------------------
# Evidence


def join_late(folder: str) -> dict[str, int]:
    dist.init_process_group("gloo")
    rank, values = dist.get_rank(), torch.ones(3)
    dist.all_reduce(values)
    work = dist.all_reduce(values, async_op=True) if rank == 0 else None
    found = evidence.collectives(Path(folder) / f"collectives-rank-{rank}")
    (work or dist.all_reduce(values, async_op=True)).wait()
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_a_rank_that_has_not_joined_a_collective_is_known_by_its_recorder(tmp_path: Path) -> None:
    first, second = in_world(2, join_late, str(tmp_path))
    assert first.keys() == second.keys()
    assert [(first[group], second[group]) for group in first] == [(2, 1)]
    assert (tmp_path / "collectives-rank-0-gloo.json").exists()
    reports = [report(0, waits=None, collectives=first), report(1, waits=None, collectives=second)]
    assert find_culprit(reports).ranks == (1,)


def test_a_thread_that_computes_is_distinguished_from_one_that_waits() -> None:
    ended = threading.Event()
    tasks: dict[str, int] = {}

    def compute() -> None:
        tasks["compute"] = threading.get_native_id()
        values = torch.ones(400, 400)
        while not ended.is_set():
            values = torch.mm(values, values).clamp(max=1)

    def wait() -> None:
        tasks["wait"] = threading.get_native_id()
        ended.wait()

    threads = [threading.Thread(target=each) for each in (compute, wait)]
    for thread in threads:
        thread.start()
    try:
        while len(tasks) < 2:
            time.sleep(0.01)
        computes, waiting = evidence.cpu_share(tasks["compute"]), evidence.cpu_share(tasks["wait"])
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert computes is not None
    assert waiting is not None
    assert computes > max(0.02, 5 * waiting)
    assert evidence.cpu_share(1) is None


def test_what_takes_too_long_or_fails_is_left() -> None:
    began = time.monotonic()
    assert evidence.within(time.sleep, 0.1, 5.0) is None
    assert time.monotonic() - began < 2
    assert evidence.within(int, 1.0, "x") is None
    assert evidence.within(int, 1.0, "3") == 3


# --------------------------------------------------------------------------------------------------------------------
# Limits

RECIPE = """
name: a
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: mlp, hidden: [4]}
batch: {global: 8}
train: {steps: 2}
"""


def test_limits_come_from_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "watchdog: {setup: 2 h, step: 90 s, save: null}\n")
    section = load_recipe(path).recipe.watchdog
    assert Limits.of(section) == Limits(7200.0, 90.0, None, 600.0)
    path.write_text(RECIPE)
    assert Limits.of(load_recipe(path).recipe.watchdog) == Limits(1800.0, 600.0, 1800.0, 600.0)
    for value in ("5 steps", "0 s", "10%", "-3 min", "soon", "5"):
        path.write_text(RECIPE + f"watchdog: {{step: {value}}}\n")
        with pytest.raises(RecipeError, match=r"watchdog\.step"):
            load_recipe(path)


def test_collectives_wait_longer_than_any_limit() -> None:
    limits = {"setup": Duration(3, "hours"), "step": Duration(1, "minutes")}
    assert WatchdogSection(**limits).collectives_s > 3 * 3600
    assert WatchdogSection().collectives_s > 1800
    assert WatchdogSection(save=None).collectives_s >= 24 * 3600


def test_a_first_step_may_take_as_long_as_the_set_up() -> None:
    limits = Limits(setup=30.0, step=10.0, save=20.0, evaluate=5.0)
    now = heartbeat.begin()
    assert limits.at(now) == 30
    enter_phase("forward")
    assert limits.at(now) == 30
    stepped(1)
    enter_phase("data")
    assert limits.at(now) == 10
    for phase, limit in (("evaluate", 5), ("save", 20), ("finish", 20), ("backward", 10), ("setup", 30)):
        enter_phase(phase)
        assert limits.at(now) == limit
    enter_phase("ended")
    assert limits.at(now) is None
    assert Limits(None, 10.0, None, None).at(heartbeat.begin()) is None
    assert Limits(None, None, None, None).interval_s == 5
    assert Limits(None, 2.0, None, None).interval_s == 0.5


def test_who_is_silent_is_known_at_the_limit() -> None:
    for limit in (2.0, 10.0, 60.0, 600.0, 7200.0):
        limits = Limits(None, limit, None, None)
        assert 3 * limits.interval_s <= limits.silence_s < limit, limit
    assert Limits(None, 600.0, None, None).silence_s == 90, "network file systems keep what they know for a minute"


# --------------------------------------------------------------------------------------------------------------------
# Looking


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    """A watchdog whose thread never looks by itself."""
    watchdog = Watchdog(run_in(tmp_path), Limits(3600.0, 3600.0, 3600.0, 3600.0), rank=0, world_size=1)
    watchdog._ended.set()
    watchdog._thread.join()
    yield watchdog
    watchdog.close()


def look(watchdog: Watchdog, *passed: float) -> float:
    """Look after so many seconds each; returns for how long nothing has come of the process."""
    for seconds in passed:
        watchdog._look(seconds)
    return watchdog._idle


def test_time_without_progress_is_counted(quiet: Watchdog) -> None:
    look(quiet, 1.0)
    assert look(quiet, 1.0, 1.0) == 3
    enter_phase("data")
    assert look(quiet, 1.0) == 0
    assert look(quiet, 1.0) == 1
    heartbeat.progress()
    assert look(quiet, 1.0) == 0


def test_no_clock_of_the_wall_decides(quiet: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    look(quiet, 1.0)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
        before = quiet._idle
        assert look(quiet, 1.0) == before + 1
        assert quiet._stalled is None
        assert quiet._beat().time == pytest.approx(1.7e9 + jump)


def test_a_process_that_was_stopped_was_not_idle_for_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 3600.0)  # between any two looks
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    limits = Limits(setup=60.0, step=60.0, save=60.0, evaluate=60.0)
    with Watchdog.over(run_in(tmp_path), WatchdogSection(), rank=0, world_size=1) as watchdog:
        watchdog.limits, watchdog.poll_s = limits, 0.05
        time.sleep(2.5)
        assert 1.0 < watchdog._idle < 60
        assert watchdog._stalled is None


def test_a_debugger_holds_the_limit_up(quiet: Watchdog) -> None:
    quiet.limits = Limits(10.0, 10.0, 10.0, 10.0)
    look(quiet, 1.0, 4.0)
    debugger: dict[str, Any] = {}
    exec(compile("def interaction(f):\n    return f()", "/usr/lib/python3.11/pdb.py", "exec"), debugger)
    assert debugger["interaction"](lambda: look(quiet, *[1.0] * 30)) < 6
    assert quiet._stalled is None


def test_a_run_that_continues_is_not_taken_to_hang(quiet: Watchdog) -> None:
    quiet.limits = Limits(10.0, 10.0, 10.0, 10.0)
    look(quiet, 1.0, 6.0, 6.0)
    assert quiet._stalled is not None
    assert (heartbeat.folder(quiet.run) / "stacks-rank-0.txt").exists()
    found = heartbeat.read_heartbeat(quiet.run, 0)
    assert found is not None
    assert found.stalled is not None
    assert Where.of(found.stalled) is not None
    enter_phase("data")
    look(quiet, 1.0)
    found = heartbeat.read_heartbeat(quiet.run, 0)
    assert found is not None
    assert found.stalled is None
    assert quiet.run.failed is None


def test_no_heartbeat_on_a_full_disk_is_reported_once_and_no_more(
    quiet: Watchdog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = quiet.run.heartbeat_path(0)
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")
    quiet._write()
    quiet._write()
    assert caplog.text.count("No space left on device") == 1


def test_what_earlier_starts_left_is_taken_away(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    folder = heartbeat.folder(run)
    names = ["stacks-rank-0.txt", "stuck-rank-0.txt", "collectives-rank-0-gloo.json", "stacks-rank-3.txt", "notes.txt"]
    for name in [*names, "stacks-rank-1.txt", "rank-3.json", "rank-1.json"]:
        (folder / name).touch()
    with Watchdog.over(run, WatchdogSection(), rank=0, world_size=2):
        left = {path.name for path in folder.iterdir()}
    assert left == {"rank-0.json", "stuck-rank-0.txt", "notes.txt", "stacks-rank-1.txt", "rank-1.json"}
    ended = heartbeat.read_heartbeat(run, 0)
    assert ended is not None
    assert ended.phase == "ended"
    assert not (folder / "stuck-rank-0.txt").exists()


# --------------------------------------------------------------------------------------------------------------------
# Who is slow


def beats(steps: int, own: list[float], **more: Any) -> list[Heartbeat]:
    """Return heartbeats after so many steps of 100 ms, each rank with its own work in a forward pass."""
    return [
        beat(rank, steps=steps, step=steps, work={"data": 0.001 * steps, "forward": each * steps, "step": 0.1 * steps})
        for rank, each in enumerate(own)
    ]


SLOW = [0.01, 0.01, 0.05, 0.012]


def test_a_slow_rank_is_named_when_it_was_so_twice_and_not_again_soon() -> None:
    found = Stragglers()
    assert found.look(beats(10, SLOW)) is None
    assert found.look(beats(20, SLOW)) is None
    slow = found.look(beats(30, SLOW))
    assert slow is not None
    assert (slow.rank, slow.phase, slow.step) == (2, "forward", 30)
    assert slow.seconds == pytest.approx(0.051)
    assert slow.others == pytest.approx(0.011)
    assert slow.ratio == pytest.approx(0.051 / 0.011)
    assert "rank 2 on n1 is slow: 51 ms of own work in a step, where the others need 11 ms (4.6x)" in str(slow)
    assert found.look(beats(40, SLOW)) is None
    assert found.look(beats(50, SLOW)) is None


def test_who_is_slow_now_and_then_is_not_named() -> None:
    found = Stragglers()
    own = [0.0] * 4
    for turn in range(12):
        work = [0.01] * 4
        work[turn % 4] = 0.05
        own = [before + 10 * each for before, each in zip(own, work, strict=True)]
        steps = 10 * (turn + 1)
        assert found.look(beats(steps, [each / steps for each in own])) is None


@pytest.mark.parametrize(
    "own",
    [[0.01] * 4, [0.01, 0.01, 0.014, 0.01], [0.001, 0.001, 0.009, 0.001], [0.05, 0.01, 0.05, 0.05]],
    ids=["alike", "not by much", "a small part of a step", "one is fast"],
)
def test_nobody_is_named_where(own: list[float]) -> None:
    found = Stragglers()
    assert [found.look(beats(steps, own)) for steps in (10, 20, 30, 40)] == [None] * 4


def test_too_few_steps_are_waited_for() -> None:
    found = Stragglers()
    named = [found.look(beats(steps, SLOW)) is not None for steps in (10, 13, 20, 23, 26)]
    assert named == [False, False, False, False, True]
    assert slowest({}) is None


def test_of_two_ranks_the_slow_one_is_named() -> None:
    found = Stragglers()
    assert [found.look(beats(steps, [0.03, 0.01])) is not None for steps in (10, 20, 30)] == [False, False, True]


# --------------------------------------------------------------------------------------------------------------------
# GPUs

DMESG = """\
[    0.000000] Linux version 5.15
[  812.000001] NVRM: GPU at PCI:0000:3b:00: GPU-1a2b
[  812.345678] NVRM: Xid (PCI:0000:3B:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
<4>[ 9000.100000] NVRM: Xid (PCI:0000:86:00): 48, pid=4711, name=python, Uncorrectable ECC error, double-bit
[ 9000.200000] [ T4711] NVRM: Xid (PCI:0000:86:00.0): 1234, an unknown one
[ 9001.000000] NVRM: something else
"""
SMI = """\
0, 00000000:3B:00.0, 0
1, 00000000:86:00.0, 2
2, 00000000:AF:00.0, [N/A]
No devices were found
"""


def test_errors_in_the_kernels_log_are_read() -> None:
    found = parse_xids(DMESG)
    assert [(each.time_s, each.gpu, each.code) for each in found] == [
        (812.345678, "0000:3b:00", 79), (9000.1, "0000:86:00", 48), (9000.2, "0000:86:00.0", 1234),
    ]  # fmt: skip
    assert str(found[0]).startswith("GPU 0000:3b:00: Xid 79 (the GPU has fallen off the bus): pid='<unknown>'")
    assert str(found[2]) == "GPU 0000:86:00.0: Xid 1234: an unknown one"
    assert parse_xids("") == []


def test_memory_errors_are_read() -> None:
    assert parse_memory_errors(SMI) == {"1 (00000000:86:00.0)": 2}
    assert parse_memory_errors("") == {}


def test_described_faults_are_those_of_this_run() -> None:
    lines = describe_gpus(parse_xids(DMESG), parse_memory_errors(SMI), since_s=1000)
    assert len(lines) == 3
    assert lines[0].startswith("GPU 0000:86:00: Xid 48 (a double-bit error in memory that cannot be corrected)")
    assert lines[2] == "GPU 1 (00000000:86:00.0): 2 uncorrectable memory errors"
    assert len(describe_gpus(parse_xids(DMESG), {})) == 3


def test_without_a_driver_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("distrain.diagnose.hang_diagnosis.gpus._DRIVER", tmp_path / "none")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("it was"))
    assert gpu_faults() == []


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A driver with the commands that ask it, in the folder that is returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("dmesg", DMESG), ("nvidia-smi", SMI)):
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f'#!/bin/sh\ncat "{folder}/{name}.txt"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setattr("distrain.diagnose.hang_diagnosis.gpus._DRIVER", tmp_path)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_commands_are_asked_and_their_failures_left(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gpu_faults(0.0)) == 4
    (driver / "dmesg").write_text(
        "#!/bin/sh\necho 'dmesg: read kernel buffer failed: Operation not permitted' >&2\nexit 1\n"
    )
    assert gpu_faults(0.0) == ["GPU 1 (00000000:86:00.0): 2 uncorrectable memory errors"]
    (driver / "nvidia-smi").write_text("#!/bin/sh\nsleep 20\n")
    monkeypatch.setattr("distrain.diagnose.hang_diagnosis.gpus._PATIENCE_S", 0.2)
    began = time.monotonic()
    assert gpu_faults(0.0) == []
    assert time.monotonic() - began < 10


def test_a_failure_of_a_gpu_comes_with_what_the_driver_reports(
    driver: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = "the driver reports: GPU 1 (00000000:86:00.0): 2 uncorrectable memory errors"
    (driver / "dmesg.txt").write_text("")
    run = run_in(tmp_path)
    write_recipe(run.path)

    def fail(text: str) -> Callable[[], None]:
        def action() -> None:
            raise RuntimeError(text)

        return action

    for text, told in (("CUDA error: an illegal memory access was encountered", True), ("sizes differ", False)):
        run.clear_markers()
        assert reported(run, 0, fail(text)) == 1
        assert (faults in capfd.readouterr().err) == told
        failed = run.failed
        assert failed is not None
        assert (faults in failed["traceback"]) == told
        assert failed["message"] == text
