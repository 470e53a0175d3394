"""What a shell completes: commands, options, keys of a recipe, runs and sites."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.cli import completion

IN_BASH = """
source <(distrain --show-completion bash)
for words in "$@"; do
    read -ra COMP_WORDS <<< "$words"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _distrain_completion distrain
    echo "${COMPREPLY[@]}"
done
"""


def test_a_shell_completes_commands_keys_runs_and_sites(tmp_path: Path) -> None:
    (tmp_path / "runs/iris").mkdir(parents=True)
    typed = [
        "distrain eval",
        "distrain status runs/i",
        "distrain train r.yaml train.prec",
        "distrain submit --site gen",
        "distrain train r.yaml optim.name = adam",
    ]
    bash = ["bash", "--norc", "-c", IN_BASH, "bash", *typed]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        bash, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=300
    )
    command, run, key, sites, optimizers = found.stdout.splitlines()
    assert (command, run, key) == ("evaluate", "runs/iris", "train.precision=")
    assert set(optimizers.split()) == {"adam", "adamw", "adamax"}
    assert {"generic-cpu", "generic-gpu"} <= set(sites.split())


def test_keys_of_a_recipe_are_completed_with_what_they_are() -> None:
    found = dict(completion.recipe_keys(""))
    assert {"model=", "model.name=", "model.lora.r=", "batch.global=", "train.steps=", "seed="} <= set(found)
    assert found["train.precision="].startswith("Precision of the forward pass")
    assert "train=" not in found
    assert set(dict(completion.recipe_keys("train.e"))) == {"train.epochs=", "train.ema="}
    assert {"optim.lr=", "optim.name=", "schedule.warmup=", "schedule.name="} <= set(found), "of several sections"
    assert len(completion.recipe_keys("")) == len(found)


@pytest.mark.parametrize(
    ("incomplete", "before", "expected"),
    [
        ("model.name=text_", [], ["model.name=text_classifier"]),
        ("text_", ["seed=1", "model.name", "="], ["text_classifier"]),
        ("loss=mul", [], ["loss=multi_label_margin", "loss=multi_label_soft_margin", "loss=multi_margin"]),
        ("model=timm:vit_tiny_patch16_2", [], ["model=timm:vit_tiny_patch16_224"]),
        ("data.name=zzz", [], []),
        ("train.steps=1", [], []),
        ("1", ["train.steps", "="], []),
        ("a", ["="], []),
    ],
    ids=["zsh", "bash", "by the section", "of a library", "an unknown name", "a number", "a number in bash", "no key"],
)
def test_names_are_completed_behind_their_keys(incomplete: str, before: list[str], expected: list[str]) -> None:
    assert [name for name, _ in completion.recipe_keys(incomplete, before)] == expected
    schedules = dict(completion.recipe_keys("", ["schedule.name", "="]))
    assert schedules["cosine"] == "Half a cosine to `final`."


def test_runs_are_completed_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completion.runs("") == []
    for name in ("iris", "digits"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/notes.txt").touch()
    assert completion.runs("") == ["runs/digits", "runs/iris"]
    assert completion.runs("ir") == completion.runs("runs/ir") == ["runs/iris"]
    assert completion.runs("elsewhere/") == []
