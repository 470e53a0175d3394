"""Every recipe that comes with distrain: it is valid, it runs, and it learns what its first line promises."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import train_rank
from worlds import in_world

from distrain.config.yaml import dump_recipe, load_recipe, parse_recipe
from distrain.data import build_transform
from distrain.datasets.base import DataMeta
from distrain.models import build_model
from distrain.networks.calling import forward
from distrain.run.folder import RunDir
from distrain.training.checks import check_recipe

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
TWO_STEPS = ["train.epochs=null", "train.steps=2"]
SMALLER = {"python_source": ["data.max_bytes=200_000"]}
CIFAR10 = ROOT / "recipes/prepared/cifar-10-batches-py"


@dataclass(frozen=True)
class Figure:
    """What a recipe reaches on its test split."""

    recipe: str
    metric: str
    least: float | None = None
    most: float | None = None
    worlds: tuple[int, ...] = (1, 2)
    """The numbers of processes that it is trained in."""
    overrides: tuple[str, ...] = ()
    """What makes it shorter than the recipe is."""
    more: bool = False
    """Whether a shorter one stands for it, unless every combination is asked for."""


FIGURES = [
    Figure("digits", "accuracy", least=0.98, worlds=(2,)),
    Figure("image_folder", "accuracy", least=0.97, worlds=(1,)),
    Figure("finetune_resnet", "accuracy", least=0.90, worlds=(1,), more=True),
    Figure("table", "accuracy", least=0.90),
    Figure("iris", "accuracy", least=0.80),
    Figure("breast_cancer", "accuracy", least=0.94),
    Figure("breast_cancer", "auroc", least=0.98),
    Figure("diabetes", "r2", least=0.40),
    Figure("translate", "bleu", least=60, more=True),
    # a part of the steps already tells a model that learns from one that does not (8 bits)
    Figure("chat", "token_accuracy", least=0.80, worlds=(1,), overrides=("train.epochs=1",)),
    Figure("chat", "token_accuracy", least=0.95, worlds=(2,), more=True),
    Figure("tagged", "entity_f1", least=0.95, worlds=(1,), overrides=("train.epochs=2",)),
    Figure("tagged", "entity_f1", least=0.98, worlds=(2,), more=True),
    Figure("python_source", "bits_per_byte", most=4.9, worlds=(1,), overrides=("train.steps=40",)),
    Figure("python_source", "bits_per_byte", most=2.8, worlds=(2,), more=True),
    Figure("lora", "bits_per_byte", most=1.0, worlds=(1,), overrides=("train.steps=60",)),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipes, so that what they prepare is made anew and outside the repository."""
    folder = tmp_path_factory.mktemp("shipped") / "recipes"
    shutil.copytree(ROOT / "recipes", folder, ignore=shutil.ignore_patterns("prepared"))
    return folder


def trained(recipes: Path, name: str, world_size: int, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Train a recipe in a world of that size; returns what FINISHED says."""
    recipe = str(recipes / f"{name}.yaml")
    ended = in_world(world_size, train_rank, recipe, list(overrides), str(run_dir), None, False, timeout_s=500)
    assert [rank.status for rank in ended] == [0] * world_size, "\n".join(rank.out + rank.err for rank in ended)
    summary = RunDir(run_dir).finished
    assert summary is not None
    return summary


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_reports_what_it_shows(name: str) -> None:
    file = ROOT / "recipes" / f"{name}.yaml"
    loaded = load_recipe(file)
    check_recipe(loaded.recipe, file.name)
    assert parse_recipe(dump_recipe(loaded.recipe), "the dump") == loaded.recipe
    assert file.read_text().startswith("# "), "the first line of a recipe says what it is an example of"


LEARNED = {(figure.recipe, world_size) for figure in FIGURES if not figure.more for world_size in figure.worlds}


def assert_ended(recipe_path: Path, world_size: int, summary: dict[str, Any]) -> None:
    """What FINISHED says is whole."""
    recipe = load_recipe(recipe_path).recipe
    assert summary["processes"] == world_size
    assert summary["test"]["samples"] > 0
    assert {metric.name for metric in recipe.eval.metrics or []} <= summary["test"].keys()
    assert all(math.isfinite(value) for value in summary["test"].values() if isinstance(value, float))
    assert Path(summary["model"]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        # one that is to learn there runs there, and one that runs in two processes in one
        pytest.param(
            name, world_size, marks=[pytest.mark.more] if world_size == 1 or (name, world_size) in LEARNED else []
        )
        for name in NAMES
        for world_size in (1, 2)
    ],
)
def test_a_recipe_runs(recipes: Path, name: str, world_size: int, tmp_path: Path) -> None:
    overrides = [*TWO_STEPS, *SMALLER.get(name, [])]
    if name == "cifar10":
        if not CIFAR10.is_dir():
            pytest.skip(f"there is no {CIFAR10.relative_to(ROOT)}, and nothing is downloaded")
        overrides.append(f"data.path={CIFAR10.parent}")
    summary = trained(recipes, name, world_size, tmp_path / "run", *overrides)
    assert summary["steps"] == 2
    assert_ended(recipes / f"{name}.yaml", world_size, summary)


def test_the_model_and_transforms_of_cifar10_fit_its_images() -> None:
    recipe = load_recipe(ROOT / "recipes/cifar10.yaml").recipe
    meta = DataMeta(input_shape=(3, 32, 32), num_classes=10)
    ids = np.arange(4)
    for split in ("train", "eval"):
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        batch = build_transform(recipe, split)({"inputs": pixels, "ids": torch.from_numpy(ids)}, np.zeros_like(ids))
        assert batch["inputs"].shape == (4, 3, 32, 32)
        assert batch["inputs"].dtype == torch.float32
        assert forward(build_model(recipe, meta), batch["inputs"]).logits.shape == (4, 10)


@pytest.fixture(scope="module")
def summaries() -> dict[tuple[Any, ...], dict[str, Any]]:
    """What was trained already, for a recipe of which several figures are asked."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "world_size"),
    [
        pytest.param(
            figure,
            world_size,
            id="-".join([figure.recipe, figure.metric, str(world_size), *figure.overrides]),
            marks=[pytest.mark.more] if figure.more else [],
        )
        for figure in FIGURES
        for world_size in figure.worlds
    ],
)
def test_a_recipe_learns(
    recipes: Path,
    summaries: dict[tuple[Any, ...], dict[str, Any]],
    figure: Figure,
    world_size: int,
    tmp_path: Path,
) -> None:
    key = (figure.recipe, world_size, figure.overrides)
    if key not in summaries:
        summaries[key] = trained(recipes, figure.recipe, world_size, tmp_path / "run", *figure.overrides)
        assert_ended(recipes / f"{figure.recipe}.yaml", world_size, summaries[key])
    value = summaries[key]["test"][figure.metric]
    assert figure.least is None or value >= figure.least
    assert figure.most is None or value <= figure.most
