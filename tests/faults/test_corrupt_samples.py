"""Samples that do not decode, which a recipe tolerates: skipped alike in every world, and counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_state import rewrite_manifest
from PIL import Image
from runs import assert_same_run, losses, rows, train, write_recipe
from worlds import in_world

from distrain.checkpoint import list_checkpoints
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.evaluation import build_eval_loader
from distrain.run.folder import RunDir

RECIPE = """
name: damaged
task: classification
data:
  name: image_folder
  path: images
  skip_corrupt: 3
model: {name: mlp, hidden: [8]}
optim: {name: adamw, lr: 1.0e-2}
batch: {global: 12}
train: {steps: 8, precision: fp64}
eval: {every: 4 steps, metrics: [accuracy]}
checkpoint: {every: 3 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
DAMAGED = {"train": ("a/03.png", "a/04.png", "b/11.png"), "test": ("b/00.png", "b/06.png")}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe over images of two classes, some of whose files are cut short or hold something else."""
    draw = np.random.default_rng(3)
    for split, count in (("train", 15), ("test", 7)):
        for label, name in enumerate("ab"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 100, (6, 6, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number:02}.png")
        first, *others = (tmp_path / "images" / split / damaged for damaged in DAMAGED[split])
        first.write_text("no image at all")
        for path in others:
            path.write_bytes(path.read_bytes()[:60])
    return write_recipe(tmp_path, RECIPE)


def skipped(run: Path) -> list[tuple[int, list[str]]]:
    """Return the steps in which samples were replaced, with these."""
    return [(row["step"], list(row["samples"])) for row in rows(run) if row["event"] == "corrupt_samples"]


@pytest.mark.fault(21)
def test_corrupt_samples_are_skipped_alike_in_every_world(recipe: Path, tmp_path: Path) -> None:
    (said,) = train(1, recipe, tmp_path / "one")
    train(2, recipe, tmp_path / "two", "data.workers=2", strategy="fsdp2")
    train(3, recipe, tmp_path / "three", "batch.micro=2")
    for sample, name in zip((3, 4, 26), DAMAGED["train"], strict=True):
        path = tmp_path / "images" / "train" / name
        assert (
            said.out.count(f"warning: skipped a corrupt sample of train: sample {sample}, {path}, cannot be decoded")
            == 1
        )
    expected = skipped(tmp_path / "one")
    assert sum(len(samples) for _, samples in expected) >= 9  # three in each of the three epochs, and more
    assert {each for _, samples in expected for each in samples} == {"3", "4", "26"}
    for run in ("two", "three"):
        assert skipped(tmp_path / run) == expected
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one"), rel=1e-10)
    for run in ("one", "two", "three"):
        scored = [row for row in rows(tmp_path / run) if row["event"] in ("eval", "final")]
        assert [row["samples"] for row in scored] == [12, 12, 12]
        assert all(list(row["corrupt_samples"]) == ["7", "13"] for row in scored)
        summary = RunDir(tmp_path / run).finished
        assert summary is not None
        assert summary["corrupt_samples"] == {"train": [3, 4, 26], "test": [7, 13]}


@pytest.mark.fault(21)
def test_a_resumed_run_skips_what_the_uninterrupted_one_does(recipe: Path, tmp_path: Path) -> None:
    train(1, recipe, tmp_path / "whole")
    train(1, recipe, tmp_path / "run", stop_after=3)
    train(1, tmp_path / "run", None)
    assert skipped(tmp_path / "run") == skipped(tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.fault(21)
@pytest.mark.parametrize("kept", ["the checkpoint", "rows"])
def test_what_a_run_noted_under_earlier_names_is_taken_up(recipe: Path, tmp_path: Path, kept: str) -> None:
    train(1, recipe, tmp_path / "whole")
    run = RunDir(tmp_path / "run")
    train(1, recipe, run.path, stop_after=5)

    def rename(text: str) -> str:
        return text.replace("skip_corrupt", "skip_undecodable").replace("corrupt_samples", "undecodable")

    for path in (run.recipe_path, run.metrics_path):
        path.write_text(rename(path.read_text()))

    def change(content: dict[str, Any]) -> None:
        known = content["history"].pop("corrupt_samples")
        if kept == "the checkpoint":
            content["history"]["undecodable"] = known

    rewrite_manifest(list_checkpoints(run.checkpoints)[0].path, change)
    train(1, run.path, None)
    assert "skip_undecodable" in run.recipe_path.read_text()
    assert run.finished is not None
    assert run.finished["corrupt_samples"] == {"train": [3, 4, 26], "test": [7, 13]}
    assert losses(run.path) == losses(tmp_path / "whole")


@pytest.mark.fault(21)
@pytest.mark.parametrize("world_size", [1, 2])
def test_one_more_than_is_tolerated_ends_the_run(recipe: Path, tmp_path: Path, world_size: int) -> None:
    ended = train(world_size, recipe, tmp_path / "run", "data.skip_corrupt=2", "train.steps=30", status=1)
    told = "".join(rank.err for rank in ended)
    assert told.count("3 samples of a split are corrupt, and data.skip_corrupt is 2; the last: sample") == 1
    assert RunDir(tmp_path / "run").finished is None


def evaluate_rank(run: str) -> str:
    from distrain.inference import evaluate_checkpoint

    try:
        return str(evaluate_checkpoint(run, "test", changed_data=True)["corrupt_samples"])
    except UserError as error:
        return str(error)


@pytest.mark.fault(21)
def test_processes_that_score_together_tolerate_no_more_than_one_does(recipe: Path, tmp_path: Path) -> None:
    train(1, recipe, tmp_path / "run")
    for name in ("a/00.png", "a/05.png"):  # with the two that are damaged already, two for each process
        (tmp_path / "images" / "test" / name).write_text("no image either")
    for said in [
        *in_world(1, evaluate_rank, str(tmp_path / "run")),
        *in_world(2, evaluate_rank, str(tmp_path / "run")),
    ]:
        assert said.startswith("4 samples of a split are corrupt, and data.skip_corrupt is 3")


@pytest.mark.fault(21)
def test_a_missing_file_is_never_skipped(recipe: Path, tmp_path: Path) -> None:
    """It may come back, and would then be trained on: a run must not depend on that."""
    source = build_data(load_recipe(recipe).recipe).splits["train"]
    gone = source.paths[20]  # type: ignore[union-attr]
    gone.unlink()
    loader = build_eval_loader(source, rank=0, world_size=1, batch_size=4, skip_corrupt=9)
    with pytest.raises(UserError, match=rf"sample 20, {gone}, cannot be read: FileNotFoundError"):
        list(loader)
