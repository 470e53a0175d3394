"""Samples with what is predicted for them: the same in any world, in the terms of the task, at no cost unless asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, rows, train, write_recipe
from torch import nn

from distrain import Task
from distrain.config import UserError
from distrain.datasets.base import DataMeta, TensorSource
from distrain.run.folder import RunDir
from distrain.run.media import Encoded, media_of, read_table
from distrain.training.samples import SampleView

SHOWN = TINY.replace("metrics: [accuracy]", "metrics: [accuracy], samples: 5")


class Shown(Task):
    """Classifies, and shows its samples in its own way."""

    form = "classification"
    metrics = ("accuracy",)

    def losses(self, model: Any, batch: Any) -> Any:
        return {"ce": nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")}

    def show(self, model: Any, batch: Any) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.log_image("inputs", batch["inputs"], "as they are")
        self.log_text("best", str(model(batch["inputs"]).argmax(1).tolist()))


class Early(Shown):
    """Logs where nothing is kept."""

    def losses(self, model: Any, batch: Any) -> Any:
        self.log_text("early", "x")
        return super().losses(model, batch)


def shown_files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("media/*/*"))}


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.more), pytest.param("zero3", marks=pytest.mark.more)]
)
@pytest.mark.parametrize("task", ["classification", f"{__file__}:Shown"], ids=["built in", "own"])
def test_samples_are_the_same_in_any_world(tmp_path: Path, task: str, strategy: str) -> None:
    text = SHOWN if strategy == "ddp" else SHOWN.replace("fp64", "fp32")
    recipe = write_recipe(tmp_path, text.replace("task: classification", f"task: '{task}'"))
    one, two = tmp_path / "one", tmp_path / "two"
    train(1, recipe, one, "train.steps=4", "log.tensorboard=true")
    train(2, recipe, two, "train.steps=4", strategy=strategy)
    found = shown_files(one)
    assert list(found) == list(shown_files(two))
    evaluations = [row for row in rows(one) if row["event"] in ("eval", "final")]
    assert sorted(item.file for row in evaluations for item in media_of(row)) == sorted(found)
    assert len(found) == 4
    for name, content in shown_files(two).items():
        if not name.endswith(".json"):
            assert content == found[name]
            continue
        table, other = json.loads(content), json.loads(found[name])
        assert table["columns"] == ["id", "target", "prediction", "probability"]
        samples = 269 if "test" in name else 270
        assert [row[0] for row in table["rows"]] == [row * samples // 5 for row in range(5)]
        for row, same in zip(table["rows"], other["rows"], strict=True):
            assert row == [*same[:3], pytest.approx(same[3], rel=1e-6)]


def test_without_the_key_there_is_nothing_of_it(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run", "train.steps=4")
    assert not (tmp_path / "run" / "media").exists()
    assert all("media" not in row for row in RunDir(tmp_path / "run").rows())


def test_a_task_logs_where_something_is_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SHOWN.replace("task: classification", f"task: '{__file__}:Early'"))
    (ended,) = train(1, recipe, tmp_path / "run", "train.steps=4", status=1)
    assert "Early calls log_text where nothing is kept; call it in show(model, batch)" in ended.out + ended.err


# --------------------------------------------------------------------------------------------------------------------
# Each form


def shown(form: str, inputs: Any, targets: Any, outputs: Any, **meta: Any) -> list[Encoded]:
    """Return what is shown of three samples, of four that there are."""
    source = TensorSource(inputs, targets)
    recipe: Any = SimpleNamespace(
        eval=SimpleNamespace(samples=3),
        form=form,
        data=SimpleNamespace(skip_corrupt=0),
        task=SimpleNamespace(name=form),
    )
    world: Any = SimpleNamespace(
        rank=0, device=torch.device("cpu"), tuning={"channels_last": False}, precision="fp32", copies=None
    )
    objective: Any = SimpleNamespace(
        shows=False, loss=None, predict=lambda model, batch: outputs[batch["ids"]] + 0 * batch["inputs"].sum()
    )
    strategy: Any = SimpleNamespace(model=nn.Identity(), world=world)
    view = SampleView(recipe, strategy, objective, DataMeta(**meta), None)
    return view.take(source, "valid")


def table(encoded: Encoded, tmp_path: Path) -> tuple[list[str], list[list[Any]]]:
    (tmp_path / "x.json").write_bytes(encoded.content)
    return read_table(tmp_path / "x.json")


PICTURES = torch.randint(0, 255, (4, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FEATURES = torch.arange(8.0).view(4, 2)


@pytest.mark.parametrize(
    ("form", "targets", "outputs", "meta", "columns", "first"),
    [
        pytest.param(
            "classification", torch.tensor([1, 0, 1, 1]), torch.tensor([[0.0, 4.0]] * 4), {"class_names": ("a", "b")},
            ["target", "prediction", "probability"], ["b", "b", pytest.approx(0.982, abs=1e-3)], id="classes",
        ),
        pytest.param(
            "binary", torch.tensor([1.0, 0, 1, 1]), torch.tensor([-4.0] * 4), {},
            ["target", "prediction", "probability"], [1, 0, pytest.approx(0.018, abs=1e-3)], id="yes or no",
        ),
        pytest.param(
            "multilabel", torch.tensor([[1.0, 0]] * 4), torch.tensor([[3.0, 3.0]] * 4), {"class_names": ("a", "b")},
            ["target_a", "target_b", "prediction_a", "prediction_b"], [1.0, 0.0, True, True], id="labels",
        ),
        pytest.param(
            "regression", torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0.5]] * 4),
            {"target_mean": (10.0,), "target_std": (2.0,)}, ["target", "prediction"], [12.0, 11.0], id="numbers",
        ),
        pytest.param(
            "classification", torch.tensor([-1, 0, 1, 1]), torch.tensor([[0.0, 4.0]] * 4), {"class_names": ("a", "b")},
            ["target", "prediction", "probability"], ["-1", "b", pytest.approx(0.982, abs=1e-3)], id="no class",
        ),
    ],
)  # fmt: skip
def test_tables_speak_in_the_terms_of_the_targets(
    tmp_path: Path, form: str, targets: Any, outputs: Any, meta: Any, columns: list[str], first: list[Any]
) -> None:
    names, cells = table(shown(form, FEATURES, targets, outputs, **meta)[0], tmp_path)
    assert names == ["id", *columns]
    assert cells[0] == [0, *first]
    assert [row[0] for row in cells] == [0, 1, 2]
    kinds = [each.kind for each in shown(form, PICTURES.float() * 3 - 9, targets, outputs, **meta)]
    assert kinds == ["image", "table"], "of pictures there is a grid besides"


def test_masks_stand_beside_their_pictures() -> None:
    targets, outputs = torch.zeros(4, 8, 6, dtype=torch.int64), torch.zeros(4, 3, 8, 6)
    targets[:, 0] = 2
    outputs[:, 1] = 1
    (found,) = shown("segmentation", PICTURES, targets, outputs, num_classes=3)
    sheet = np.asarray(Image.open(io.BytesIO(found.content)))
    assert sheet.shape == (3 * 8, 3 * 6, 3)
    assert np.array_equal(sheet[:8, :6], PICTURES[0].permute(1, 2, 0).numpy())
    truth, predicted = sheet[:8, 6:12], sheet[:8, 12:]
    assert len({tuple(pixel) for pixel in truth.reshape(-1, 3)}) == 2
    assert len({tuple(pixel) for pixel in predicted.reshape(-1, 3)}) == 1
    assert tuple(predicted[0, 0]) not in {tuple(truth[0, 0]), tuple(truth[1, 0])}


@pytest.mark.parametrize("form", ["language_modeling", "token_classification"])
def test_texts_are_those_of_the_tokens_that_count(tmp_path: Path, form: str) -> None:
    targets = torch.tensor([[0, 1, -100], [2, 2, 2], [1, 1, 1], [0, 0, 0]])
    outputs = torch.zeros(4, 3, 3)
    outputs[..., 2] = 1
    meta: Any = (
        {"decode": lambda ids: "".join("xyz"[each] for each in ids)}
        if form == "language_modeling"
        else {"class_names": ("x", "y", "z")}
    )
    (found,) = shown(form, targets.clamp(min=0), targets, outputs, **meta)
    names, cells = table(found, tmp_path)
    if form == "language_modeling":
        assert (names, cells[0], cells[1]) == (["id", "text", "predicted"], [0, "xy", "zz"], [1, "zzz", "zzz"])
    else:
        assert (names, cells[0]) == (["id", "target", "prediction"], [0, "x y", "z z"])


def test_a_task_of_ones_own_says_what_to_show() -> None:
    with pytest.raises(UserError, match=r"eval.samples: task 'custom' .* give it a method show\(model, batch\)"):
        shown("custom", FEATURES, FEATURES, FEATURES)
