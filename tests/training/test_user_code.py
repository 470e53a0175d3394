"""What models, tasks and data sets of one's own do beside what is asked of them: numbers are right, or it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distrain

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(48, 6, generator=GENERATOR) * 10
Y = X.sum(1, keepdim=True) / 10
PARTS = {name: {"name": "sgd", "lr": 0.05, "params": f"layer.{name}"} for name in ("weight", "bias")}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(name: str, model: Any, task: Any, **changes: Any) -> distrain.Run:
    values: dict[str, Any] = {
        "batch": {"global": 16},
        "optim": {"name": "sgd", "lr": 0.05},
        "train": {"steps": 4},
        "eval": {"every": "2 steps"},
        "log": {"every": "1 steps"},
        "data": (X, Y),
    }
    return distrain.train(task=task, model=model, run_dir=name, **{**values, **changes})


def numbers(run: distrain.Run, *names: str) -> Tensor:
    table = run.metrics
    return torch.tensor(table[table.event.isin(("train", "eval"))][list(names)].to_numpy(float))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x - 5) / 3)


class InPlace(Linear):
    """The same, which changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 5
        x /= 3
        return self.layer(x)


class Squares(distrain.Task):
    form, metrics = "regression", ("mae",)

    def losses(self, model: Any, batch: Any) -> Any:
        return {"square": (model(batch["inputs"]) - batch["targets"]).square().mean(1)}

    def measure(self, predictions: Tensor, batch: Any) -> Any:
        return {"largest": distrain.LossSum(batch["inputs"].amax(1).sum())}


class InTurn(distrain.Task):
    optimizers = tuple(PARTS)

    def losses(self, model: Any, batch: Any, optimizer: str) -> Any:
        return {optimizer: (model(batch["inputs"]) - batch["targets"]).square().mean(1)}


class Centred(distrain.Task):
    couples_samples = True

    def losses(self, model: Any, batch: Any) -> Any:
        found, wanted = distrain.gather(model(batch["inputs"])), distrain.gather(batch["targets"])
        return {"square": ((found - found.mean()) - (wanted - wanted.mean())).square().mean()}


@pytest.mark.parametrize(
    ("task", "names", "changes"),
    [
        (Squares, ("loss", "mae", "largest"), {}),
        (InTurn, ("loss", *PARTS), {"optim": PARTS}),
        (Centred, ("loss",), {"batch": {"global": 16, "micro": 4}}),
        ("regression", ("loss", "mae"), {"train": {"steps": 4, "precision": "fp16"}}),
    ],
    ids=["losses and predictions", "several optimizers", "two passes", "a step that is made again"],
)
def test_a_model_may_change_its_inputs_in_place(task: Any, names: tuple[str, ...], changes: dict[str, Any]) -> None:
    expected, found = (numbers(train(kind.__name__, kind, task, **changes), *names) for kind in (Linear, InPlace))
    assert torch.equal(expected.nan_to_num(), found.nan_to_num())


def test_a_loss_that_is_over_nothing_in_a_step_trains_nothing_in_it() -> None:
    class Partly(distrain.Task):
        def count(self, batch: Any) -> Any:
            return {"few": (batch["targets"] > 3.4).sum()}

        def losses(self, model: Any, batch: Any) -> Any:
            found, wanted = model(batch["inputs"]), batch["targets"]
            few = wanted > 3.4
            return {"all": (found - wanted).abs().mean(1), "few": distrain.LossSum(found[few].sum(), few.sum())}

    class Batches(distrain.Callback):
        found: list[Any] = []

        def on_batches(self, step: int, micro_batches: Any) -> None:
            self.found.append(micro_batches)

    torch.manual_seed(0)
    model = Linear()
    run = train("partly", model, Partly, batch={"global": 4, "micro": 2}, train={"steps": 6}, callbacks=[Batches])
    optimizer, empty = torch.optim.SGD(model.parameters(), 0.05), 0
    for step in Batches.found:
        x, y = (torch.cat([each[key] for each in step]) for key in ("inputs", "targets"))
        few, found = y > 3.4, model(x)
        empty += not few.any()
        loss = F.l1_loss(found, y) + (found[few].mean() if few.any() else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 < empty < 6
    torch.testing.assert_close(run.model().layer.weight, model.layer.weight)
    of_few = run.metrics.query("event == 'train'")["few"]
    assert of_few.dtype == float  # not the text that JSON has for NaN
    assert of_few.isna().sum() == empty
