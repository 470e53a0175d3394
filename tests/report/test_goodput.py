"""What the time of a run went to: by rows that are known, and of runs that were killed and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import train, train_rank, write_recipe
from worlds import running_world

from distrain.report.goodput import goodput, goodput_of
from distrain.report.status import status_of, status_rows
from distrain.run.attempts import ended_row
from distrain.run.energy import EnergyMeter
from distrain.run.folder import RunDir
from distrain.run.json_files import read_rows

PARTS = ("useful_s", "replayed_s", "checkpoint_s", "start_s", "evaluation_s", "idle_s", "unknown_s")


def began(token: str, time: float, step: int = 0, processes: int = 2) -> dict[str, Any]:
    return {"token": token, "time": time, "step": step, "processes": processes}


def ended(token: str, time: float, step: int, steps: int, **more: Any) -> dict[str, Any]:
    phases = {"setup": 10.0, "forward": 60.0, "data": 20.0, "evaluate": 5.0, "save": 3.0, "finish": 2.0}
    return {"event": "ended", "token": token, "time": time, "step": step, "steps": steps, "phases": phases, **more}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(
            [began("a", 1000), ended("a", 1102, 40, 40)],
            {"useful_s": 80, "checkpoint_s": 5, "start_s": 12, "evaluation_s": 5, "total_s": 102, "device_s": 204},
            id="one attempt",
        ),
        pytest.param(
            [began("a", 1000), ended("a", 1100, 40, 40), began("b", 1150, 30), ended("b", 1250, 70, 40)],
            {
                "useful_s": 60 + 80, "replayed_s": 20, "checkpoint_s": 10, "start_s": 20, "evaluation_s": 10,
                "idle_s": 50, "total_s": 250, "steps": 70, "replayed_steps": 10, "device_s": 400,
            },
            id="killed ten steps after its checkpoint",
        ),
        pytest.param(
            [began("a", 0), ended("a", 100, 40, 40), began("b", 100, 40), ended("b", 200, 80, 40), began("c", 200, 20)],
            {"useful_s": 40, "replayed_s": 120, "steps": 20, "replayed_steps": 60, "total_s": 200},
            id="later checkpoints were lost",
        ),
        pytest.param(
            [began("a", 0), ended("a", 100, 40, 50)],
            {"useful_s": 64, "replayed_s": 16, "steps": 40, "replayed_steps": 10, "total_s": 100},
            id="rolled back",
        ),
        pytest.param(
            [began("a", 0), ended("a", 100, 9, 9, first_step_s=40.0)],
            {"useful_s": 80 - 35, "start_s": 10 + 35, "total_s": 100},
            id="compiled",
        ),
        pytest.param(
            [began("a", 0), began("b", 30, 0), ended("b", 130, 40, 40)],
            {"unknown_s": 30, "useful_s": 80, "total_s": 130},
            id="of an earlier version",
        ),
        pytest.param(
            [began("a", 0), ended("a", 45, 40, 40)],
            {"useful_s": 40, "checkpoint_s": 2.5, "evaluation_s": 2.5, "start_s": 0, "total_s": 45},
            id="a clock was set back",
        ),
    ],
)  # fmt: skip
def test_seconds_are_split_by_what_was_kept(rows: list[dict[str, Any]], expected: Mapping[str, float]) -> None:
    found = goodput(rows)
    assert found is not None
    assert {name: pytest.approx(getattr(found, name)) for name in expected} == expected
    assert sum(getattr(found, part) for part in PARTS) == pytest.approx(found.total_s)


def test_costs_are_those_of_the_steps_that_are_kept() -> None:
    energy = {"energy_wh": {"0": 3.0, "1": 5.0}}
    rows = [began("a", 0), ended("a", 100, 40, 40, **energy), began("b", 900, 20), ended("b", 1000, 40, 20, **energy)]
    found = goodput(rows, global_batch_size=50, gpu_hour_price=9.0)
    assert found is not None
    assert (found.samples, found.device_s, found.energy_wh, found.price) == (2000, 400, 16, pytest.approx(1.0))
    assert found.device_s_per_1000_samples == pytest.approx(200)
    assert found.energy_wh_per_1000_samples == pytest.approx(8)
    assert found.price_per_1000_samples == pytest.approx(0.5)
    bare = goodput([began("a", 0), ended("a", 100, 40, 40)])
    assert bare is not None
    assert (bare.energy_wh, bare.price, bare.samples, goodput([])) == (None, None, None, None)


def row(event: str, time: float, step: int, **values: float) -> dict[str, Any]:
    return {"event": event, "time": time, "step": step, **values}


def test_what_followed_the_last_heartbeat_is_in_the_rows() -> None:
    beat: Any = SimpleNamespace(steps=0, step=4, time=100.0, phase="setup", phases={"setup": 7.0}, first_step_s=None)
    rows = [
        row("train", 103.0, 6, step_s=0.5),
        row("eval", 104.0, 6, seconds=0.75),
        row("train", 105.0, 8, step_s=0.25),
    ]
    found = ended_row({"token": "a", "time": 92.0, "step": 4}, beat, rows)
    assert (found["time"], found["step"], found["steps"]) == (105.0, 8, 4)
    # 2 s until its first two steps began, which took a second; then two more and an evaluation
    assert found["phases"] == {"setup": 9.0, "evaluate": 0.75, "step": pytest.approx(2.25)}
    assert ended_row({"token": "a", "time": 92.0, "step": 4}, None, [])["time"] == 92.0
    found = ended_row({"token": "a", "time": 92.0, "step": 4}, beat, [*rows, row("eval", 106.0, 9, seconds=0.5)])
    assert (found["time"], found["step"], found["steps"]) == (106.0, 9, 5), "what was evaluated was trained"


LONG = ["train.steps=24", "checkpoint.every=8 steps", "log.gpu_hour_price=3"]


def test_a_run_that_was_killed_and_stopped_adds_up_to_its_wall_time(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), RunDir(tmp_path / "run")
    with running_world(1, train_rank, str(recipe), LONG, str(run.path), None, False) as world:
        until = time.monotonic() + 60
        while not any(row["step"] >= 10 for row in run.rows()) and time.monotonic() < until:
            time.sleep(0.002)
        world.kill()
        assert world.wait(30) == [-9]
    train(1, recipe, run.path, *LONG, stop_after=20)
    found = goodput_of(run)
    assert found is not None
    stopped = run.attempts()[-1]
    assert (found.attempts, found.steps) == (2, run.preempted["step"] if run.preempted else None)
    train(1, recipe, run.path, *LONG)

    rows = [*read_rows(run.attempts_path)]
    assert [each.get("event") for each in rows] == [None, "ended", None, "ended", None]
    killed = rows[1]
    assert killed["token"] == rows[0]["token"]
    assert rows[3]["token"] == stopped["token"]
    found = goodput_of(run, global_batch_size=12, gpu_hour_price=3.0)
    assert found is not None
    resumed = run.attempts()[1]["step"]
    assert (found.attempts, found.steps, found.replayed_steps) == (3, 24, killed["step"] - resumed)
    assert killed["step"] >= 10 > resumed == 8
    end = max(json.loads(run.heartbeat_path(0).read_text())["time"], max(each["time"] for each in run.rows()))
    assert found.total_s == pytest.approx(end - rows[0]["time"], abs=1e-3)
    assert sum(getattr(found, part) for part in PARTS) == pytest.approx(found.total_s)
    parts = {part: getattr(found, part) for part in PARTS}
    assert parts.pop("unknown_s") == 0
    assert all(seconds > 0 for seconds in parts.values()), parts
    assert found.samples == 24 * 12

    status = status_of(run.path, [])
    assert status.goodput == found
    said = dict(status_rows(status))
    assert said["goodput"].startswith(f"{found.share:.0%} of ")
    assert said["cost"].endswith("in all")


# --------------------------------------------------------------------------------------------------------------------
# Energy


class Nvml:
    """Stands for pynvml: a GPU with a counter, or one that tells its power alone, or neither."""

    class NVMLError(Exception):
        pass

    def __init__(self, counter: list[float] | None, power: list[float] | None):
        self.counter, self.power = counter, power

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        return self._next(self.counter)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> float:
        return self._next(self.power)

    def _next(self, values: list[float] | None) -> float:
        if not values:
            raise self.NVMLError
        return values.pop(0)


def test_energy_is_that_of_the_counter_or_of_the_power_over_time() -> None:
    counted = EnergyMeter(Nvml([5e6, 5e6 + 3.6e6, 5e6 + 7.2e6], None), "gpu")
    assert [counted.read_wh(), counted.read_wh(), counted.read_wh()] == [1.0, 2.0, 2.0], "the last that is known"
    seconds = iter((0.0, 36.0, 72.0))
    sampled = EnergyMeter(Nvml(None, [100e3, 200e3, 100e3]), "gpu", lambda: next(seconds))
    assert [sampled.read_wh(), sampled.read_wh()] == [pytest.approx(1.5), pytest.approx(3.0)]
    with pytest.raises(Nvml.NVMLError):
        EnergyMeter(Nvml(None, None), "gpu")


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert goodput_of(RunDir(tmp_path)) is None
