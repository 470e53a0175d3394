"""Processes of this machine that are forked: what is imported once, whose code runs where, and how each ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from runs import Ended, captured, rows, write_recipe
from worlds import in_world

from distrain.config import RecipeError, UserError
from distrain.launchers.forking import Meeting, can_fork, in_copy, run_forked

OWN_MODEL = """
import os
with open("imported", "a") as file:
    file.write(f"{os.getpid()} {os.environ.get('RANK')}\\n")
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
"""


def commanded(*arguments: str) -> tuple[Ended, list[str]]:
    """Run the command in this process; returns how it ended, and what started processes."""
    from distrain.cli.main import main

    started: list[str] = []
    sys.addaudithook(lambda event, found: _note(started, event, found))

    def run() -> int:
        sys.argv = ["distrain", *arguments]
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return captured(run), started


def _note(started: list[str], event: str, found: Any) -> None:
    if event == "os.fork":
        started.append("fork")
    elif event == "subprocess.Popen":
        started.append(Path(found[0]).name)


def test_one_process_imports_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a new interpreter imports torch, a forked process has it: one checks the recipe, two train
    recipe = write_recipe(tmp_path).read_text().replace("{name: mlp, hidden: [16]}", "{name: 'mine.py:Net'}")
    write_recipe(tmp_path, recipe)
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "recipe.yaml", "train.steps=4", "--run-dir", "run", "--processes", "2")
    (ended, started), launcher = in_world(1, commanded_with_pid, *arguments, launched=False)[0]
    assert ended.status == 0, ended.err
    assert started.count("fork") == 3
    assert not [name for name in started if name.startswith("python")]
    assert len([row for row in rows(tmp_path / "run") if row["event"] == "train"]) == 4
    imported = [line.split() for line in (tmp_path / "imported").read_text().splitlines()]
    assert sorted(rank for _, rank in imported) == ["0", "1", "None"]  # each with its own environment
    assert str(launcher) not in [pid for pid, _ in imported]


def commanded_with_pid(*arguments: str) -> tuple[tuple[Ended, list[str]], int]:
    return commanded(*arguments), os.getpid()


def test_all_that_is_wrong_is_reported_once_from_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path).read_text().replace("name: mlp", "name: mlpp").replace("accuracy", "acuracy")
    write_recipe(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    ended, started = in_world(
        1, commanded, "train", "recipe.yaml", "--run-dir", "run", "--processes", "2", launched=False
    )[0]
    assert ended.status == 1
    assert (ended.err.count("did you mean 'mlp'"), ended.err.count("did you mean 'accuracy'")) == (1, 1)
    assert started.count("fork") == 1
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------
# The parts


def answered(what: str) -> Any:
    def action() -> Any:
        if what == "recipe error":
            raise RecipeError("r.yaml", ["one", "two"])
        if what == "bug":
            raise KeyError("bug")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    try:
        return in_copy(action) != os.getpid()
    except (UserError, SystemExit) as error:
        return type(error), getattr(error, "problems", None), str(error)


def test_what_a_copy_returns_or_raises() -> None:
    assert in_world(1, answered, "value", launched=False) == [True]
    kind, problems, _ = in_world(1, answered, "recipe error", launched=False)[0]
    assert (kind, problems) == (RecipeError, ["one", "two"])
    assert in_world(1, answered, "bug", launched=False)[0][0] is SystemExit
    kind, _, text = in_world(1, answered, "killed", launched=False)[0]
    assert kind is UserError
    assert "SIGKILL" in text


def forked(script: str, arguments: list[str], processes: int, signals: list[int]) -> tuple[dict[int, int], bool]:
    """Fork a script's processes; each of `signals` is sent here once all ranks have written their file."""
    this, folder = os.getpid(), Path(arguments[0])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # as launch/node.py does until it can hand them on

    def send() -> None:
        while len(list(folder.glob("rank-*"))) < processes:
            time.sleep(0.02)
        for number in signals:
            os.kill(this, number)

    class Watching(nullcontext[None]):
        def __enter__(self) -> None:
            threading.Thread(target=send, daemon=True).start()

    return run_forked(
        Path(script), arguments, processes, meeting=Meeting(), variables={"GIVEN": "yes"}, notice=signal.SIGUSR1,
        patience_s=20, watching=Watching,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "signals", "codes", "told"),
    [
        ("", [], {0: 0, 1: 0}, False),
        # when the other has ended: the one that fails ends it otherwise
        ("rank == 1 and ended(0); sys.exit(3 * rank)", [], {0: 0, 1: 3}, False),
        ("rank == 1 and os.kill(os.getpid(), 9) or time.sleep(60)", [], {0: -15, 1: -9}, False),
        # blocked, as the one that fails first ends the other by it
        (
            "signal.pthread_sigmask(signal.SIG_BLOCK, {15}); meet('blocked'); raise KeyError(rank)",
            [],
            {0: 1, 1: 1},
            False,
        ),
        ("time.sleep(60)", [signal.SIGTERM], {0: -15, 1: -15}, True),
        ("time.sleep(60)", [signal.SIGINT], {0: 130, 1: 130}, True),
        # blocked from the first moment, so that it waits for a handler
        ("assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1", [signal.SIGUSR1], {0: 0, 1: 0}, False),
    ],
    ids=["well", "a status", "killed", "an exception", "terminated", "interrupted", "a notice"],
)
def test_how_forked_processes_end(
    code: str, signals: list[int], codes: dict[int, int], told: bool, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    begin = (
        "import atexit, json, os, random, signal, sys, time\n"
        "import numpy as np\n"
        "rank, place = int(os.environ['RANK']), sys.argv[1]\n"
        "drawn = [random.random(), np.random.rand()]\n"
        "found = dict(os.environ, session=os.getsid(0) == os.getpid(), argv=sys.argv, drawn=drawn, pid=os.getpid())\n"
        "def meet(name):\n"
        "    open(f'{place}/part-{rank}', 'w').write(json.dumps(found))\n"
        "    os.rename(f'{place}/part-{rank}', f'{place}/{name}-{rank}')\n"
        "    while not os.path.exists(f'{place}/{name}-{1 - rank}'):\n"
        "        time.sleep(0.01)\n"
        "def ended(other):\n"
        "    pid = json.load(open(f'{place}/rank-{other}'))['pid']\n"
        "    while os.path.exists(f'/proc/{pid}'):\n"
        "        time.sleep(0.01)\n"
        "atexit.register(lambda: open(f'{place}/left-{rank}', 'w').close())\n"
        "meet('rank')\n"
    )
    script.write_text(f"{begin}{code}\n")
    assert in_world(1, forked, str(script), [str(tmp_path)], 2, signals, launched=False) == [(codes, told)]
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)]
    assert [found["RANK"] for found in ranks] == ["0", "1"]
    assert [(found["WORLD_SIZE"], found["GIVEN"], found["session"]) for found in ranks] == [("2", "yes", True)] * 2
    assert ranks[0]["argv"] == [str(script), str(tmp_path)]
    assert all(one != other for one, other in zip(ranks[0]["drawn"], ranks[1]["drawn"], strict=True))
    for rank, status in codes.items():
        # what is registered for the end of a process is called, as in a new interpreter
        assert (tmp_path / f"left-{rank}").exists() == (status >= 0)


MEETING = """
import os, sys, time
import torch
import torch.distributed as dist
from distrain.run.heartbeat import this_attempt
from distrain.system.job_environment import job_environment
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), [None] * dist.get_world_size()
place = rank, os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"]
dist.all_gather_object(ranks, (*place, this_attempt(job_environment()), os.getpid()))
if rank == 3:
    for *_, pid in ranks[:2]:  # the processes of the first machine
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
    for _ in range(10):
        time.sleep(0.05)
        dist.distributed_c10d._get_default_store().set("here", "")
open(f"{sys.argv[1]}/met-{rank}", "w").write(repr([place for *place, _, _ in ranks]))
assert len({attempt for *_, attempt, _ in ranks}) == 1
"""


def forked_machine(script: str, folder: str, port: int, node: int) -> tuple[dict[int, int], bool]:
    """Fork the two processes of one of two machines."""
    return run_forked(
        Path(script), [folder], 2, meeting=Meeting("127.0.0.1", port, nodes=2, node=node), variables={},
        notice=signal.SIGUSR1, patience_s=20, watching=nullcontext,
    )  # fmt: skip


def test_processes_of_several_machines_meet_and_the_store_is_there_until_the_last_has_ended(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MEETING)
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
    machines = [(str(script), str(tmp_path), port, node) for node in (1, 0)]
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda each: in_world(1, forked_machine, *each, launched=False)[0], machines))
    assert ended == [({2: 0, 3: 0}, False), ({0: 0, 1: 0}, False)]
    ranks = [[0, "0", "0"], [1, "1", "0"], [2, "0", "1"], [3, "1", "1"]]
    assert [(tmp_path / f"met-{rank}").read_text() for rank in range(4)] == [repr(ranks)] * 4


def fitness(what: str) -> bool:
    if what == "a thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if what == "a GPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    return can_fork()


@pytest.mark.parametrize(("what", "fit"), [("nothing", True), ("a thread", False), ("a GPU", False)])
def test_which_process_is_forked_from(what: str, fit: bool) -> None:
    assert in_world(1, fitness, what, launched=False) == [fit]
