"""Losses that couple samples: those of the whole global batch, however it is cut into micro-batches and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coupled_parts
import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_run, last, rows, state, train, write_recipe

from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.order import SampleOrder
from distrain.models import build_model

RECIPE = """
name: coupled
task: "coupled_parts:Clip"
data: {name: "coupled_parts:Pairs", split: {train: train, valid: held}}
model: {name: "coupled_parts:Towers"}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
schedule: {name: constant}
batch: {global: 64}
train: {steps: 4, precision: fp64}
eval: {every: 2 steps}
checkpoint: {every: 2 steps, keep: 10, async: false}
log: {every: 1 steps}
"""


def plain(
    recipe: Path, *overrides: str, evaluated: int = 0
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Return the losses, the final weights and losses of groups of the split `valid` in plain PyTorch."""
    wanted = load_recipe(recipe, list(overrides)).recipe
    data = build_data(wanted)
    torch.manual_seed(0)
    model = build_model(wanted, data.meta).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = SampleOrder(160, wanted.seed)

    def batch(source: Any, ids: list[int]) -> Any:
        found = source.fetch(torch.tensor(ids).numpy())
        return {key: each.double() for key, each in found["inputs"].items()}, found["targets"]

    def loss_of(source: Any, ids: list[int]) -> torch.Tensor:
        inputs, targets = batch(source, ids)
        left, right = model(**inputs)
        if wanted.task.name.endswith("Clip"):
            return coupled_parts.clip_loss(left, right, model.scale)[0]
        probability, target = (left * right).sum(1).sigmoid(), targets.double()
        dice = 1 - 2 * (probability * target).sum() / ((probability + target).sum() + 1)
        return dice + F.binary_cross_entropy(probability, target)

    losses = []
    for step in range(4):
        loss = loss_of(data.splits["train"], order.at(64 * step, 64 * (step + 1))[1].tolist())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    groups = []
    if evaluated:
        source = data.splits["valid"]
        for start in range(0, len(source), evaluated):
            ids = list(range(start, min(start + evaluated, len(source))))
            groups.append((len(ids), loss_of(source, ids).item()))
    total = sum(count for count, _ in groups)
    return losses, dict(model.state_dict()), [sum(count * loss for count, loss in groups) / total] if groups else []


def check_against_plain(run: Path, expected: Any, tolerance: float) -> None:
    losses, weights, evaluated = expected
    found = [row["loss"] for row in rows(run) if row["event"] == "train"]
    assert found == pytest.approx(losses, rel=tolerance)
    stored = state(last(run))
    for name, weight in weights.items():
        assert torch.from_numpy(stored[f"model/{name}"]).allclose(weight.double().flatten(), rtol=0, atol=tolerance), (
            name
        )
    if evaluated:
        final = [row for row in rows(run) if row["event"] == "eval"][-1]
        assert final["loss"] == pytest.approx(evaluated[0], rel=tolerance)


WORLDS = [
    (1, 64, "single"),
    (1, 16, "single"),
    (2, 32, "ddp"),
    (2, 8, "ddp"),
    (4, 8, "ddp"),
    (2, 16, "fsdp2"),
    (2, 16, "zero3"),
    *(
        pytest.param(2, micro, strategy, marks=pytest.mark.more)
        for micro, strategy in [(32, "fsdp2"), (32, "zero3"), (8, "zero1"), (8, "zero2")]
    ),
]
"""Processes, samples of a micro-batch, strategy."""


@pytest.mark.parametrize(("world_size", "micro", "strategy"), WORLDS)
def test_a_contrastive_loss_is_that_of_the_whole_batch(
    tmp_path: Path, world_size: int, micro: int, strategy: str
) -> None:
    precision, tolerance = ("fp32", 1e-6) if strategy.startswith("zero") else ("fp64", 1e-12)
    recipe = write_recipe(tmp_path, RECIPE.replace("fp64", precision))
    train(world_size, recipe, tmp_path / "run", f"batch.micro={micro}", strategy=strategy)
    check_against_plain(tmp_path / "run", plain(recipe, evaluated=64), tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sums_over_the_whole_batch_couple_samples_too(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("Clip", "Dice"))
    train(world_size, recipe, tmp_path / "run", "batch.micro=16")
    check_against_plain(tmp_path / "run", plain(recipe, evaluated=64), 1e-10)
    assert {"dice", "entropy"} <= rows(tmp_path / "run")[-1].keys()


@pytest.mark.parametrize(("group", "evaluated"), [(24, 24), (1000, 160)])
def test_an_evaluation_couples_groups_of_samples_by_their_ids(tmp_path: Path, group: int, evaluated: int) -> None:
    text = RECIPE.replace('"coupled_parts:Clip"', f'{{name: "coupled_parts:Clip", evaluation_group: {group}}}')
    recipe = write_recipe(tmp_path, text.replace("every: 2", "every: 4"))
    finals = []
    for world_size, size in ((1, 160), (2, 7)):
        run = tmp_path / str(world_size)
        train(world_size, recipe, run, f"eval.batch={size}")
        finals.append([row for row in rows(run) if row["event"] == "eval"][-1])
    expected = plain(recipe, evaluated=evaluated)[2][0]
    assert [each["loss"] for each in finals] == pytest.approx([expected, expected], rel=1e-10)
    assert finals[0]["retrieved"] == finals[1]["retrieved"]
    assert 0 < finals[0]["retrieved"] < 1


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, ["batch.micro=16", "train.activation_checkpointing=Sequential"]), (2, ["batch.micro=16"])],
)
def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path, world_size: int, options: list[str]) -> None:
    # with dropout, and a BatchNorm whose statistics may count each micro-batch once
    text = RECIPE.replace('"coupled_parts:Towers"', '"coupled_parts:Towers", dropout: 0.3, norm: true')
    recipe = write_recipe(tmp_path, text.replace("fp64", "bf16"))
    train(world_size, recipe, tmp_path / "whole", *options)
    train(world_size, recipe, tmp_path / "parts", *options, stop_after=2)
    train(world_size, recipe, tmp_path / "parts", *options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    batches = state(last(tmp_path / "whole"))["model/left.1.num_batches_tracked"]
    assert batches == 4 * 64 // 16 // world_size


@pytest.mark.parametrize(
    ("task", "world_size", "options", "said"),
    [
        ("Anchors", 2, ["batch.micro=32"], "loss 'contrastive' differs between the micro-batches of a step"),
        ("Anchors", 1, ["batch.micro=16"], "loss 'contrastive' differs between the micro-batches of a step"),
        ("Counted", 1, ["batch.micro=16"], "loss 'contrastive' is over 16 in this step, and was divided by 64"),
        ("Dependent", 1, ["batch.micro=16"], "between its two passes, without and with gradients"),
        ("Never", 1, [], "its losses called distrain.gather for nothing"),
        ("Unsaid", 1, [], "set couples_samples = True"),
        ("Sums", 1, [], "was given a tensor (5, 64) for 64 samples"),
        ("Sometimes", 1, ["batch.micro=8"], "make the same calls for each"),
        ("OnOneRank", 2, ["batch.micro=32"], "make the same calls of distrain.gather on all ranks"),
    ],
)
def test_what_is_no_loss_of_the_whole_batch_is_refused(
    tmp_path: Path, task: str, world_size: int, options: list[str], said: str
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("Clip", task))
    ended = train(world_size, recipe, tmp_path / "run", *options, status=1)
    assert any(said in " ".join((each.out + each.err).split()) for each in ended), ended
