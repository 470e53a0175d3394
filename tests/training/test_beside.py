"""What models, tasks and data sets of one's own do beside what is asked of them: numbers are right, or it is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import distrain
from distrain import UserError

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


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() * torch.exp(-self.spread) + self.spread


class Weighted(Squares):
    def __init__(self) -> None:
        self.shares = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Linear(6, 1).requires_grad_(False)

    def losses(self, model: Any, batch: Any) -> Any:
        error = (model(batch["inputs"]) - self.frozen(batch["inputs"])).square().mean(1)
        return {"square": error * torch.exp(-self.shares[0]) + self.shares.sum()}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"task": "regression", "loss": Balanced}, "spread"),
        ({"task": Weighted}, "shares"),
        ({"task": Squares}, None),
        ({"task": "regression", "loss": lambda outputs, targets: (outputs - targets).square().mean(1)}, None),
    ],
    ids=["of a loss", "of a task", "a task without", "a loss without"],
)
def test_parameters_that_no_optimizer_trains_are_said(
    changes: dict[str, Any], names: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    train("untrained", Linear, **changes)
    said = f"has parameters that are no part of the model ({names})"
    out = capsys.readouterr().out
    assert said in out if names else "no part of the model" not in out


class Refilled(Dataset):
    """Gives one tensor for all samples, filled anew."""

    def __init__(self) -> None:
        self.inputs, self.targets = torch.zeros(6), np.zeros(1, np.float32)

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        self.inputs.copy_(X[index])
        self.targets[:] = Y[index].numpy()
        return self.inputs, self.targets


class Kept(Refilled):
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index].numpy()


class Alternating(Refilled):
    """Gives two in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = [(torch.zeros(6), np.zeros(1, np.float32)) for _ in range(2)]
        self.read = 0

    def __getitem__(self, index: int) -> Any:
        self.inputs, self.targets = self.pairs[self.read % 2]
        self.read += 1
        return super().__getitem__(index)


class RefilledStream(IterableDataset):
    source: type[Refilled] = Refilled

    def __iter__(self) -> Iterator[Any]:
        data = self.source()
        return (data[index] for index in range(len(data)))


class AlternatingStream(RefilledStream):
    source = Alternating


class KeptStream(RefilledStream):
    source = Kept


class Alone(Squares):
    """Its batches are single samples, as they are."""

    def collate(self, samples: list[Any]) -> Any:
        ((inputs, targets),) = samples
        return {"inputs": inputs[None], "targets": torch.as_tensor(targets)[None]}


@pytest.mark.parametrize(
    ("refilled", "kept", "task", "micro"),
    [
        (Refilled, Kept, "regression", 16),
        (Alternating, Kept, "regression", 16),
        (AlternatingStream, KeptStream, "regression", 16),
        (Alternating, Kept, Alone, 1),
        (RefilledStream, KeptStream, Alone, 1),
    ],
)
def test_a_data_set_may_fill_the_same_tensors_again_and_again(refilled: Any, kept: Any, task: Any, micro: int) -> None:
    batch = {"global": 16, "micro": micro}
    found = [train(each.__name__, Linear, task, data=each, batch=batch) for each in (kept, refilled)]
    assert torch.equal(numbers(found[0], "loss"), numbers(found[1], "loss"))
    assert torch.equal(found[0].model().layer.weight, found[1].model().layer.weight)


def test_a_loader_is_refused_as_a_data_set() -> None:
    with pytest.raises(UserError, match="is a DataLoader, whose items are batches"):
        train("loaded", Linear, "regression", data=DataLoader(Kept(), batch_size=4))


class Drawn(Kept):
    def __init__(self, own: bool):
        self.random = np.random.default_rng(0) if own else None

    def __getitem__(self, index: int) -> Any:
        noise = np.random.rand() if self.random is None else self.random.random()
        return X[index] + float(noise), Y[index]


@pytest.mark.parametrize("own", [True, False])
def test_a_data_set_with_a_generator_of_its_own_is_said(own: bool, capsys: pytest.CaptureFixture[str]) -> None:
    train("drawn", Linear, "regression", data={"name": Drawn, "own": own})
    assert ("are others each time that they are read" in capsys.readouterr().out) == own


def test_columns_of_tables_go_by_their_names() -> None:
    table = pd.DataFrame(X.numpy(), columns=list("abcdef"))
    run = train("table", Linear, "regression", data=(table, Y))
    rows = run.predict(table[:3])
    assert run.predict(table[:3].to_numpy()).equals(rows)
    assert run.predict(pd.DataFrame(X[:3].numpy())).equals(rows)  # without names
    with pytest.raises(UserError, match="inputs: the table has them in another order: the columns of"):
        run.predict(table[:3][list("fedcba")])
    with pytest.raises(UserError, match="inputs: the table has g and lacks f: "):
        run.predict(table[:3].rename(columns={"f": "g"}))
    with pytest.raises(UserError, match="the test split has them in another order"):
        train("splits", Linear, "regression", data={"train": (table, Y), "test": (table[list("fedcba")], Y)})


def test_arrays_of_other_layouts_are_their_numbers() -> None:
    array = X.numpy()
    forms = [array, array[::-1].copy()[::-1], array.astype(">f4"), X.to_sparse(), np.ma.masked_array(array)]
    runs = [train(str(number), Linear, "regression", data=(form, Y)) for number, form in enumerate(forms)]
    for each in runs[1:]:
        assert torch.equal(each.model().layer.weight, runs[0].model().layer.weight)
    with pytest.raises(UserError, match="inputs are a masked array, and some of its values are masked"):
        train("masked", Linear, "regression", data=(np.ma.masked_array(array, mask=array > 9), Y))


class Features(nn.Module):
    """Returns what its last layer is given before what that makes of it; `named` as a named tuple."""

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.named = nn.Linear(6, 8), nn.Linear(8, 3), named

    def forward(self, x: Tensor) -> Any:
        found = self.body(x / 10).relu()
        return Named(found, self.head(found)) if self.named else (found, self.head(found))


class Named(NamedTuple):
    features: Tensor
    logits: Tensor


@pytest.mark.parametrize("named", [False, True])
def test_features_that_are_returned_before_logits_are_not_taken_for_them(
    named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"name": Features, "named": named}
    run = train("features", model, "classification", data=(X, torch.arange(48) % 3), loss="cross_entropy")
    said = "the model gives outputs for 8 classes, and the data have 3: the others are never right"
    assert (said in " ".join(capsys.readouterr().out.split())) == (not named)
    assert run.predict("test").filter(like="probability_").shape[1] == (3 if named else 8)


class Scripted(nn.Module):
    """Has a layer of TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.jit.script(nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x - 5) / 3)


def scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(6, 1))


def test_torchscript_is_trained_in_one_process_as_a_layer_alone() -> None:
    found = numbers(train("script", Scripted, "regression"), "loss")
    assert torch.allclose(found, numbers(train("plain", Linear, "regression"), "loss"), rtol=1e-5)
    with pytest.raises(
        UserError, match=r"the model is TorchScript .* cannot train here; build it from its Python class"
    ):
        train("whole", scripted, "regression")
    with pytest.raises(UserError, match=r"layer layer is TorchScript .* cannot train under ddp"):
        train("two", Scripted, "regression", processes=2)


class Double(Linear):
    """Has a layer in float64, and casts to that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double()).float()


def test_a_model_that_counts_on_its_own_dtypes_is_told_of_those_that_it_has() -> None:
    with pytest.raises(RuntimeError, match="same dtype") as caught:
        train("double", Double, "regression")
    assert "the model's parameters are float32, whatever dtype its code gave them" in caught.value.__notes__[0]
