"""Adapters beside frozen weights that checkpoints refer to: under every strategy, resumed from every other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import RECIPE, lora_recipe
from runs import assert_same_run, cli, last, train
from safetensors.torch import load_file, save_file
from test_matrix import create, stopped_copy
from test_strategies import WAYS, assert_agrees, run_all
from torch import nn

from distrain.checkpoint import difference, read_manifest
from distrain.config import UserError
from distrain.config.yaml import parse_recipe
from distrain.parallel import TrainingState
from distrain.parallel.frozen import referred
from distrain.run.folder import RunDir

pytest.importorskip("transformers")

SMOOTH = RECIPE.replace("precision: fp32", "precision: fp32, ema: 0.9").replace(
    "every: 2 steps, metrics", "every: null, metrics"
)
"""With an average of what is trained."""
FROZEN = """
name: frozen
task: language_modeling
data: {name: text, path: TEXT, tokenizer: bytes, seq_len: 8, split: [0.9, 0.1]}
model: {name: gpt, n_layer: 2, n_head: 2, d_model: 12}
optim: {name: adamw, lr: 1.0e-2, freeze: ["*.0.*"]}
batch: {global: 12, micro: 1}
train: {steps: 4, precision: fp32}
eval: {every: null}
checkpoint: {every: 2 steps, keep: 100, async: false, frozen: reference}
log: {every: 1 steps}
"""
"""A recipe that freezes a block that its seed has made."""
QUICK = (("ddp", 2), ("zero3", 2), ("fsdp2", 2))
CASES = {"adapters": SMOOTH, "block": FROZEN}


class Runs:
    """The uninterrupted runs of each way, made when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: set[tuple[str, int]] = set()

    def of(self, strategy: str, world_size: int) -> dict[str, Path]:
        runs = {name: self.folder / f"{strategy}{world_size}-{name}" for name in CASES}
        if (strategy, world_size) not in self.made:
            for name, run in runs.items():
                create(run, lora_recipe(self.folder, CASES[name]), (), strategy, world_size)
            assert run_all(strategy, world_size, runs) == {}
            self.made.add((strategy, world_size))
        return runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("frozen"))


SEVERAL = [pytest.param(*way, marks=[] if way in QUICK else pytest.mark.more) for way in WAYS if way[1] > 1]


@pytest.mark.parametrize(("strategy", "world_size"), SEVERAL)
def test_every_strategy_trains_beside_frozen_weights(
    made: Runs, strategy: str, world_size: int, tmp_path: Path
) -> None:
    alone, several = made.of("single", 1), made.of(strategy, world_size)
    for name, run in several.items():
        assert_agrees(run, alone[name])
        assert read_manifest(last(run)).frozen == read_manifest(last(alone[name])).frozen
    # resumes what a single process has left, and its own to the bit
    taken = {f"{name} taken": stopped_copy(run, tmp_path / f"{name}-1", 2) for name, run in alone.items()}
    again = {name: stopped_copy(run, tmp_path / f"{name}-2", 2) for name, run in several.items()}
    assert run_all(strategy, world_size, taken | again) == {}
    for name in CASES:
        assert_agrees(taken[f"{name} taken"], alone[name])
        assert_same_run(again[name], several[name])


def test_a_single_process_resumes_what_each_strategy_left(made: Runs, tmp_path: Path) -> None:
    alone = made.of("single", 1)
    left = {
        f"{name} {strategy}{world_size}": stopped_copy(run, tmp_path / f"{strategy}{world_size}-{name}", 2)
        for strategy, world_size in sorted(made.made)
        for name, run in made.of(strategy, world_size).items()
    }
    assert run_all("single", 1, left) == {}
    for case, run in left.items():
        name, _, strategy = case.partition(" ")
        if strategy == "single1":
            assert_same_run(run, alone[name])
        else:
            assert_agrees(run, alone[name])


def test_a_checkpoint_holds_what_trains(made: Runs) -> None:
    run = made.of("single", 1)["adapters"]
    manifest = read_manifest(last(run))
    base = load_file(made.folder / "base/model.safetensors")
    assert manifest.frozen is not None
    assert manifest.frozen.tensors.keys() == {f"model/{name}" for name in base}
    layer = "model.layers.0.self_attn.q_proj"
    assert {f"model/{layer}.lora_A.weight", f"ema/{layer}.lora_B.weight"} <= manifest.tensors.keys()
    assert not {f"ema/{layer}.weight", f"optimizer/{layer}.weight/exp_avg"} & manifest.tensors.keys()
    stored = sum(each.spec.nbytes for name, each in manifest.tensors.items() if name.startswith("model/"))
    assert stored * 8 < sum(tensor.nbytes for tensor in base.values())
    effect = RunDir(run).effect()
    assert effect is not None
    assert effect["gradient_bytes"]["ranks"] == [stored]
    assert effect["ema_bytes"]["ranks"] == [stored]


def test_a_frozen_weight_that_code_has_changed_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    state = TrainingState(model, optimizer, None)
    recipe = parse_recipe(FROZEN.replace("TEXT", "words.txt"), "the recipe")
    frozen = referred(recipe, model, ["0.weight", "0.bias"], None, hashes=True)
    state.refer(frozen)
    with torch.no_grad():
        model[1].weight.add_(1)
        assert state.snapshot().specs.keys() == {"model/1.weight", "model/1.bias"}
        assert state.snapshot().frozen == frozen
        model[0].weight.mul_(0.99)
    with pytest.raises(UserError, match=r"changed frozen parameters in place \(0\.weight\)"):
        state.snapshot()


# --------------------------------------------------------------------------------------------------------------------
# Where the weights are


@pytest.fixture
def moved(made: Runs, tmp_path: Path) -> tuple[Path, Path]:
    """A stopped run whose recipe names another copy of the model, and that copy."""
    base = tmp_path / "base"
    shutil.copytree(made.folder / "base", base)
    run = tmp_path / "run"
    create(run, lora_recipe(tmp_path, SMOOTH), ("train.steps=2",), "single", 1)
    assert run_all("single", 1, {"run": run}) == {}
    return run, base


def changed(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_other_initial_weights_are_refused_and_a_moved_folder_is_named(
    moved: tuple[Path, Path], tmp_path: Path
) -> None:
    run, base = moved
    kept = base.rename(tmp_path / "elsewhere")
    out = tmp_path / "model.safetensors"
    missing = cli("export", run, "-o", out)
    assert missing.status == 1
    assert "there is no config.json in" in missing.err or "cannot be opened from" in missing.err
    assert "refers to 21 frozen weights there and does not store them (model.path was" in missing.err
    assert "--initial-weights PATH" in missing.err
    done = cli("evaluate", run, "--initial-weights", kept, "--json")
    assert done.status == 0, done.err
    shutil.copytree(kept, base)
    assert json.loads(cli("evaluate", run, "--json").out)["loss"] == json.loads(done.out)["loss"]
    assert cli("checkpoint", "verify", run).status == 0
    changed(base)
    for command in (["evaluate", run], ["checkpoint", "verify", run], ["export", run, "-o", out]):
        ended = cli(*command)
        assert ended.status == 1
        said = ended.out + ended.err
        assert "1 of 21 are not those that it was trained beside" in said
        assert "model.layers.1.mlp.up_proj.weight: found the hash" in said
    assert not out.exists()
    (ended,) = train(1, run / "recipe.yaml", run, "train.steps=4", update=True, status=1)
    assert "model.layers.1.mlp.up_proj.weight: found the hash" in ended.err
    train(1, run / "recipe.yaml", run, "train.steps=4", f"model.path={kept}", update=True)


def test_training_what_a_checkpoint_refers_to_is_refused(made: Runs, tmp_path: Path) -> None:
    run = stopped_copy(made.of("single", 1)["block"], tmp_path / "run", 2)
    (ended,) = train(1, run / "recipe.yaml", run, "optim.freeze=[]", update=True, status=1)
    assert "refers to" in ended.err
    assert "freeze them as before" in ended.err


def test_a_checkpoint_that_stores_all_compares_with_one_that_refers(made: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    create(run, lora_recipe(made.folder, SMOOTH), ("checkpoint.frozen=store",), "single", 1)
    assert run_all("single", 1, {"run": run}) == {}
    other = made.of("single", 1)["adapters"]
    found = difference(last(run), last(other))
    assert found.identical, found.lines()
    assert read_manifest(last(run)).frozen is None
    # it goes on as it was
    again = stopped_copy(run, tmp_path / "again", 2)
    assert run_all("single", 1, {"again": again}) == {}
    assert_same_run(again, run)
