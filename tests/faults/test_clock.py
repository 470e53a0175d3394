"""A clock that jumps changes nothing: the order of things is that of steps, and durations are measured elsewhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, assert_same_run, rows, train, write_recipe

from distrain.run.folder import RunDir

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
DAY = 24 * 3600
RECIPE = TINY.replace("steps: 12", "steps: 300").replace("every: 4 steps, keep", "every: 60 s, keep")


@pytest.mark.slow
@pytest.mark.fault(24)
@pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime, which scripts/install-slurm.sh brings")
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = os.environ | {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    run = tmp_path / "run"
    command = [sys.executable, "-m", "distrain", "train", str(recipe), "--run-dir", str(run)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for days, steps in ((400, 30), (-400, 70), (0, 110)):
            until = time.monotonic() + 60
            while len(rows(run)) < steps and time.monotonic() < until and process.poll() is None:
                time.sleep(0.005)
            clock.write_text(f"{days * DAY:+d}")
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out.decode()
    train(1, recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", run)
    times = [row["time"] for row in RunDir(run).rows() if row["event"] == "train"]
    jumps = [after - before for before, after in itertools.pairwise(times)]
    assert max(jumps) > 300 * DAY, "the clock did jump"
    assert min(jumps) < -300 * DAY
