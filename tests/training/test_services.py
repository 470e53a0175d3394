"""MLflow and trackio, the packages themselves where they are installed: one run over requeues, each row once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_logs import RowLogs
from runs import TINY, write_recipe

from distrain.config.yaml import load_recipe
from distrain.run.folder import Launch, RunDir
from distrain.run.media import encode_image, encode_table, encode_text, write_media
from distrain.training.callbacks.base import Outcome
from distrain.training.callbacks.services import MLflow, Trackio
from distrain.training.callbacks.trackers import check_trackers

SERVICES = {"mlflow": MLflow, "trackio": Trackio}
ABSENT = [name for name in SERVICES if importlib.util.find_spec(name) is None]


def write(folder: Path, name: str) -> Path:
    uri = f"tracking_uri: 'sqlite:///{folder}/mlflow.db', " if name == "mlflow" else ""
    item = f"{{name: {name}, {uri}}}"
    return write_recipe(folder, TINY.replace("log: {", f"log: {{artifacts: checkpoints, trackers: [{item}], "))


def in_mlflow(run: RunDir, recipe: Any) -> tuple[list[tuple[int, float]], int]:
    from mlflow import MlflowClient

    client = MlflowClient(recipe.log.trackers[0].args["tracking_uri"])
    run_id = (run.path / "mlflow" / "run-id").read_text().strip()
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.01"
    assert {each.path for each in client.list_artifacts(run_id)} >= {"media", "model", "final", "recipe.json"}
    media = [each.path for folder in client.list_artifacts(run_id, "media") for each in
             client.list_artifacts(run_id, folder.path)]  # fmt: skip
    history = client.get_metric_history(run_id, "train/loss")
    return [(each.step, each.value) for each in history], len(media)


def in_trackio(run: RunDir, recipe: Any) -> tuple[list[tuple[int, float]], int]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("distrain", (run.path / "trackio" / "run-id").read_text().strip())
    media = [value for log in logs for value in log.values() if isinstance(value, dict) and "_type" in value]
    return [(log["optimizer_step"], log["train/loss"]) for log in logs], len(media)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        pytest.param(
            name,
            there,
            marks=pytest.mark.skipif(
                name in ABSENT, reason=f"{name} is not installed; pip install 'distrain[{name}]' runs this test"
            ),
        )
        for name, there in (("mlflow", in_mlflow), ("trackio", in_trackio))
    ],
)
def test_one_run_has_each_row_once_over_three_requeues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    recipe, run = load_recipe(write(tmp_path, name)).recipe, RunDir(tmp_path / "run")
    run.create("name: x\n", Launch.describe(1, "single"))
    run.checkpoint(12).mkdir()
    (run.checkpoint(12) / "MANIFEST.json").write_text("{}")
    run.export_path.parent.mkdir()
    run.export_path.write_bytes(b"weights")
    start, history = 0, None
    for until, saved in ((6, 4), (10, 8), (9, 8), (12, 12)):  # steps after the saved one are trained again
        logs = RowLogs(run, recipe, start, history)
        assert [type(mirror) for mirror in logs.trackers.mirrors] == [SERVICES[name]]
        for step in range(start + 1, until + 1):
            row: dict[str, Any] = {"event": "train", "step": step, "loss": 1 / step, "time": 1e9 + step}
            if step % 4 == 0:
                found = [encode_image("i", np.eye(3)), encode_table("t", ["a"], [[1], ["x"]]), encode_text("x", "<b>")]
                row["media"] = write_media(run.path, step, "train", found)
            logs.write(row)
            if step == saved:
                history = logs.saved_at(step)
        if until == 12:
            logs.context.state = type("State", (), {"saved_step": 12})
            logs.trackers.on_end(Outcome("finished", 12, summary={"model": str(run.export_path)}))
        logs.close()
        start = saved
    found_there, media = there(run, recipe)
    assert found_there == [(step, pytest.approx(1 / step)) for step in range(1, 13)]
    assert media == 9


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_not_installed_is_said_before_anything_is_built(tmp_path: Path, name: str) -> None:
    problems = check_trackers(load_recipe(write(tmp_path, name)).recipe)
    absent = f"log.trackers: '{name}' needs {name}, which is not installed: pip install 'distrain[{name}]'"
    assert problems == ([absent] if name in ABSENT else [])
