"""The Python API: objects in place of names, runs that are resumed and read, and the same through the command."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from runs import captured, cli, last
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from warm import warm_children
from worlds import in_world

import distrain
from distrain import UserError
from distrain.api.objects import Objects
from distrain.api.recipes import read_recipe
from distrain.checkpoint import difference, list_checkpoints
from distrain.config import DataSection
from distrain.config.yaml import load_recipe
from distrain.datasets.arrays import ArrayData
from distrain.datasets.base import DataRequest
from distrain.optim.losses.user import default_dtype
from distrain.run.folder import RunDir

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(120, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()

RECIPE: dict[str, Any] = {
    "task": "classification",
    "batch": {"global": 16},
    "train": {"steps": 10},
    "eval": {"every": "5 steps", "metrics": ["accuracy"]},
    "checkpoint": {"every": "5 steps", "async": False},
    "log": {"every": "1 steps"},
}


class Net(nn.Module):
    """Logits (batch, num_classes) for (batch, 4)."""

    def __init__(self, num_classes: int = 3, hidden: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.Dropout(0.1), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Points(Dataset):
    """The same points, one by one."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Collect(distrain.Callback):
    """Keeps the losses; `stop` asks for a stop as the interrupt button of a notebook does."""

    def __init__(self, stop: int | None = None):
        self.losses: list[float] = []
        self.stop = stop

    def on_step_end(self, step: int, metrics: Any) -> None:
        self.losses.append(metrics.loss)
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def accuracy_of_first(outputs: Tensor, targets: Tensor) -> Tensor:
    """A metric of one's own."""
    return (outputs.argmax(1) == targets).double()


def local_net() -> type[nn.Module]:
    """Return a class that no other process can import."""

    class Local(Net):
        pass

    return Local


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and find signals and logging as they were."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler


def train(run_dir: str = "runs/a", **arguments: Any) -> distrain.Run:
    """Train the points."""
    return distrain.train({**RECIPE, **arguments.pop("recipe", {})}, run_dir=run_dir, **{"data": (X, Y)} | arguments)


# --------------------------------------------------------------------------------------------------------------------
# Objects in place of names


@pytest.mark.parametrize(
    "model",
    [
        lambda: local_net(),
        lambda: lambda num_classes: Net(num_classes),
        lambda: {"name": local_net(), "hidden": 8},
        lambda: Net,
    ],
    ids=["a class of a function", "a lambda", "with arguments", "a class that can be imported"],
)
def test_a_model_has_the_initial_weights_of_its_seed_however_it_is_given(model: Callable[[], Any]) -> None:
    # as a file would have it
    named = distrain.train(RECIPE, model=f"{__file__}:Net", data=(X, Y), run_dir="runs/named")
    run = train(model=model())
    assert run.status == named.status == "finished"
    assert difference(last(run.path), last(named.path)).identical


def test_of_a_module_a_copy_is_trained() -> None:
    torch.manual_seed(7)
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    runs = [train(f"runs/{number}", model=module) for number in range(2)]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert difference(last(runs[0].path), last(runs[1].path)).identical
    assert not torch.equal(runs[0].model().state_dict()["layers.0.weight"], before["layers.0.weight"])


def _stream() -> Any:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(X, Y, strict=True))

    return {"train": Stream(), "eval": Stream()}


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (lambda: (X, Y), {"train": 96, "test": 24}),
        (lambda: (X.numpy().astype(np.float64), Y.tolist()), {"train": 96, "test": 24}),
        (lambda: (pd.DataFrame(X.numpy()), pd.Series(Y.numpy())), {"train": 96, "test": 24}),
        (lambda: [X, Y], {"train": 96, "test": 24}),
        (lambda: ((X[:80], Y[:80]), (X[80:], Y[80:])), {"train": 80, "test": 40}),
        (lambda: {"train": (X[:80], Y[:80]), "eval": (X[80:], Y[80:])}, {"train": 80, "valid": 40}),
        (lambda: TensorDataset(X, Y), {"train": 96, "test": 24}),
        (lambda: Points(), {"train": 96, "test": 24}),
        (lambda: Points, {"train": 96, "test": 24}),
        (lambda: (lambda: Points()), {"train": 96, "test": 24}),
        (lambda: (lambda: (X, Y)), {"train": 96, "test": 24}),
        (lambda: (lambda split: (X, Y.numpy())), {"train": 120, "test": 120}),
        (lambda: (Points(), Points(), Points()), {"train": 120, "valid": 120, "test": 120}),
        (lambda: {"train": Points(), "test": (X[80:], Y[80:])}, {"train": 120, "test": 40}),
        (_stream, {"train": None, "valid": None}),
    ],
    ids=["tensors", "arrays", "a table", "a list", "pairs", "pairs by split", "a Dataset", "one of one's own",
         "its class", "a function", "a function of arrays", "one of each split", "three", "both kinds", "streams"],
)  # fmt: skip
def test_data_come_in_every_form(data: Callable[[], Any], sizes: dict[str, int | None]) -> None:
    run = train(model=Net, data=data(), recipe={"train": {"steps": 2}, "eval": {"every": "2 steps"}})
    inputs = json.loads((run.path / "inputs.json").read_text())
    assert inputs["splits"] == sizes
    assert run.status == "finished"
    assert run.metrics.query("event == 'train'")["loss"].notna().all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: X, "expected a Dataset"),
        (lambda: {"train": Points(), "dev": Points()}, "found a dict of train, dev"),
        (lambda: {"eval": Points()}, "expected train"),
        (lambda: (X, Y[:-1]), "120 inputs and 119 targets"),
        (lambda: (X, Y.float()), "expects whole numbers"),
        (lambda: (pd.DataFrame(X.numpy()), pd.Series(Y.numpy())[::-1]), "the same index in another order"),
        (lambda: (X, Y - 1), "a target is -1"),
        (lambda: iter([(X, Y)]), "which ends once"),
        (lambda: {"train": Points(), "eval": Points(), "valid": Points()}, "both eval and valid"),
    ],
    ids=["inputs alone", "another split", "no train", "lengths", "floats", "another order", "negative", "an iterator",
         "eval twice"],
)  # fmt: skip
def test_other_data_are_refused_before_a_step(data: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(model=Net, data=data())
    assert not list(Path("runs").glob("a/checkpoints/*"))


@pytest.mark.parametrize(("targets", "said"), [(Y, False), (Y + 1, True)])
def test_classes_that_are_numbered_from_one_are_told(targets: torch.Tensor, said: bool) -> None:
    made = ArrayData({"train": (X, targets)}).build(DataRequest(DataSection(name="arrays"), "classification", 0))
    assert [each.partition(":")[2][:16] for each in made.warnings] == [" no target is 0,"] * said


@pytest.mark.parametrize(
    ("loss", "stored"),
    [
        (nn.CrossEntropyLoss(), "cross_entropy"),
        (nn.CrossEntropyLoss, "cross_entropy"),
        (functional.cross_entropy, "cross_entropy"),
        (functional.binary_cross_entropy_with_logits, "bce_with_logits"),
        (nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1, ignore_index=-1),
         {"name": "cross_entropy", "weight": [1.0, 1.0, 1.0], "ignore_index": -1, "label_smoothing": 0.1}),
        (nn.HuberLoss(delta=2.0), {"name": "huber", "delta": 2.0}),
        (nn.MSELoss(reduction="sum"), {"name": "mse", "reduction": "sum"}),
        (functional.mse_loss, "mse_loss"),
        (accuracy_of_first, f"{__file__}:accuracy_of_first"),
        (lambda outputs, targets: outputs.mean(), "object.loss:lambda"),
        ("l1", "l1"),
    ],
    ids=["object", "class", "function", "with logits", "weights", "arguments", "refused later", "mse", "own", "lambda",
         "name"],
)  # fmt: skip
def test_a_loss_of_torch_goes_by_its_name(loss: Any, stored: Any) -> None:
    assert Objects().component("loss", loss) == stored


class Centred(torch.nn.Module):
    """A loss that weighs more with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.calls * functional.cross_entropy(outputs, targets, reduction="none")


def test_of_a_loss_that_is_a_module_a_copy_is_used() -> None:
    loss = Centred()
    runs = [train(f"runs/{number}", model=Net, loss=loss) for number in range(2)]
    assert loss.calls == 0
    assert difference(last(runs[0].path), last(runs[1].path)).identical


def test_a_function_of_torch_and_the_loss_of_its_name_are_one_loss() -> None:
    named, given = train("runs/named", model=Net), train(model=Net, loss=functional.cross_entropy)
    assert difference(last(named.path), last(given.path)).identical


def test_metrics_and_callbacks_are_functions_classes_and_objects() -> None:
    seen = Collect()
    own = lambda outputs, targets: (outputs.argmax(1) == targets).double()  # noqa: E731
    run = train(model=Net, metrics=["accuracy", accuracy_of_first, own], callbacks=[seen, Collect])
    assert [each.name for each in run.recipe.callbacks] == ["object.callbacks:Collect", f"{__file__}:Collect"]
    last_row = run.metrics.query("event == 'final'").iloc[-1]
    assert last_row["accuracy"] == last_row["accuracy_of_first"] == last_row["lambda"]
    assert seen.losses == run.metrics.query("event == 'train'")["loss"].tolist()


def test_a_task_is_a_class() -> None:
    class Halves(distrain.Task):
        def losses(self, model: Any, batch: Any) -> Any:
            return {"loss_of_own": functional.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")}

    run = train(model=Net, task=Halves, eval={"metrics": None, "every": "5 steps"})
    assert run.recipe.task.name == "object.task:Halves"
    assert run.metrics.query("event == 'final'")["loss_of_own"].notna().all()
    assert distrain.load("runs/a", task=Halves, data=(X, Y)).evaluate() == run.evaluate()
    with pytest.raises(UserError, match=r"task: found .*give its class"):
        train("runs/b", model=Net, task=Halves())


def test_a_recipe_in_python_is_the_recipe_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a\ntask: classification\ndata: {name: iris, split: [0.6, 0.4]}\nmodel: {name: mlp, hidden: [8]}\n"
        "optim: {name: sgd, lr: 0.5, momentum: 0.9}\nbatch: {global: 16}\ntrain: {epochs: 3}\n"
    )
    wanted = load_recipe(path).recipe
    values = {
        "name": "a", "task": "classification", "data": {"name": "iris", "split": (0.6, 0.4)},
        "model": {"name": "mlp", "hidden": [8]},
        "optim": {"name": torch.optim.SGD, "lr": np.float64(0.5), "momentum": 0.9},
        "batch": {"global": np.int64(16)}, "train": {"epochs": 3},
    }  # fmt: skip
    assert read_recipe(values, Objects(), {}, {}).recipe == wanted
    assert read_recipe(wanted, Objects(), {}, {}).recipe == wanted
    changed = [
        read_recipe(path, Objects(), {}, overrides)
        for overrides in ({"optim": {"lr": 0.25}}, {"optim__lr": 0.25}, {"optim.lr": 0.25})
    ]
    assert [each.recipe.optim.lr for each in changed] == [0.25] * 3
    assert all(each.recipe.optim.args == {"momentum": 0.9} for each in changed)
    assert changed[0].origins["optim.lr"] == "Python"
    other = read_recipe(path, Objects(), {"model": "linear"}, {"optim": {"name": "adamw"}}).recipe
    assert (other.model.args, other.optim.args) == ({}, {})  # those were of another class


def test_what_a_section_without_a_name_says_holds_for_the_object_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a\ntask: classification\ndata: {split: [0.6, 0.4]}\nmodel: {width: 9}\nloss: {label_smoothing: 0.2}\n"
        "optim: {lr: 0.5}\nbatch: {global: 16}\ntrain: {epochs: 3}\n"
    )
    values = {
        "name": "a", "task": "classification", "data": {"split": [0.6, 0.4]}, "model": {"width": 9},
        "loss": {"label_smoothing": 0.2}, "optim": {"lr": 0.5}, "batch": {"global": 16}, "train": {"epochs": 3},
    }  # fmt: skip
    given = {"data": (X, Y), "model": Net, "loss": nn.CrossEntropyLoss}
    for base in (path, values):
        found = read_recipe(base, Objects(), given, {})
        assert found.recipe.data.split == [0.6, 0.4]
        assert found.recipe.model.args == {"width": 9}
        assert found.recipe.loss is not None
        assert found.recipe.loss.args == {"label_smoothing": 0.2}
        other = read_recipe(base, Objects(), given | {"model": {"name": Net, "width": 7}}, {"optim": "sgd"}).recipe
        assert other.model.args == {"width": 7}
        assert other.optim.lr != 0.5  # that was of the default optimizer
    command = load_recipe(
        path, ["data=iris", "model={name: mlp, hidden: [3]}", "loss=cross_entropy", "model.width=null"]
    )
    assert command.recipe.data.split == [0.6, 0.4]
    assert command.origins["data.split"] == f"{path}:3"
    assert command.origins["data.name"] == "command line"


def test_all_mistakes_come_at_once_and_nothing_is_written() -> None:
    with pytest.raises(UserError) as raised:
        train(model=Net, optim={"lr": -1}, batch={"globl": 16})
    assert all(words in str(raised.value) for words in ("optim.lr", "globl", "Python:", "2 problems"))
    with pytest.raises(UserError, match=r"model\.depth: .*no argument 'depth'"):
        train(model={"name": Net, "depth": 3})
    with pytest.raises(UserError, match="a recipe holds text"):
        train(model={"name": Net, "hidden": object()})
    for asked, words in (
        ({"update": "no"}, "update: found 'no'; expected True or False"),
        ({"run_dir": 5}, "run_dir: found 5"),
        ({"strategy": 5}, "strategy: found 5"),
        ({"train": {"steps": 3}, "train__steps": 4}, "train.steps: given twice, as 3 and 4"),
        ({"metrics": ["accuracy"], "eval": {"metrics": ["f1_macro"]}}, "eval.metrics: given twice"),
    ):
        with pytest.raises(UserError, match=words):
            train(**{"model": Net, **asked})
    assert not Path("runs").exists()


def test_what_the_users_code_raises_is_raised() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("of the user's")

    with pytest.raises(LookupError, match="of the user's"):
        train(model=Broken)
    assert distrain.load("runs/a").status == "failed"


# --------------------------------------------------------------------------------------------------------------------
# Runs


def test_an_interrupt_saves_and_the_same_call_resumes_to_the_bit() -> None:
    whole = train("runs/whole", model=local_net(), callbacks=[Collect()], log__report=True)
    assert "</html>" in (whole.path / "report.html").read_text()
    first = Collect(stop=3)
    run = train(model=local_net(), callbacks=[first])
    assert run.status == "stopped"
    with pytest.warns(DeprecationWarning, match="stopped"):
        assert run.status == "preempted", "what scripts may still ask for"
    assert run.status != "failed"
    assert run.best is None
    second = Collect()
    run = train(model=local_net(), callbacks=[second])
    assert run.status == "finished"
    assert difference(last(whole.path), last(run.path)).identical
    assert [*first.losses, *second.losses] == whole.metrics.query("event == 'train'")["loss"].tolist()
    assert train(model=local_net(), callbacks=[Collect()]).best == run.best == whole.best  # a finished one at once


def test_other_code_and_other_data_are_said() -> None:
    train(model=local_net(), callbacks=[Collect(stop=3)])

    class Local(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * 2

    with pytest.raises(UserError, match=r"code file .*Local of object\.model:Local: changed"):
        train(model=Local, callbacks=[Collect(stop=3)])
    with pytest.raises(UserError, match="data: sample 0 of train is another one"):
        train(model=local_net(), data=(X + 1, Y), callbacks=[Collect(stop=3)])
    assert train(model=Local, callbacks=[Collect()], update=True).status == "finished"


def test_other_values_of_a_function_are_other_code() -> None:
    def scaled(factor: float) -> Callable[..., Tensor]:
        return lambda outputs, targets: factor * functional.cross_entropy(outputs, targets)

    def of_default(factor: float) -> Callable[..., Tensor]:
        return lambda outputs, targets, by=factor: by * functional.cross_entropy(outputs, targets)

    def of_partial(factor: float) -> Callable[..., Tensor]:
        return partial(lambda by, outputs, targets: by * functional.cross_entropy(outputs, targets), factor)

    for number, make in enumerate((scaled, of_default, of_partial)):
        folder = f"runs/{number}"
        train(folder, model=Net, loss=make(1.0), callbacks=[Collect(stop=3)])
        with pytest.raises(UserError, match=r"the value of .* of object\.loss:lambda: changed"):
            train(folder, model=Net, loss=make(2.0), callbacks=[Collect()])
        assert train(folder, model=Net, loss=make(1.0), callbacks=[Collect()]).status == "finished"


def test_a_run_is_read_in_python() -> None:
    run = train(model=Net, eval={"best": "accuracy"}, train={"ema": 0.9})
    found = distrain.load("runs/a", data=(X, Y))
    assert (found.path, found.recipe) == (run.path, run.recipe)
    rows = found.metrics
    assert rows.query("event == 'eval'")["step"].tolist() == [5, 10]
    assert run.best is not None
    assert run.best.value == rows.query("event == 'eval'")["accuracy"].max()
    # the model is that of the export, of which the average was taken
    from safetensors.torch import load_file

    exported, model = load_file(run.path / "export" / "model.safetensors"), run.model()
    assert not model.training
    assert all(torch.equal(value, exported[name]) for name, value in model.state_dict().items())
    steps = [info.step for info in list_checkpoints(run.path / "checkpoints")]
    assert run.checkpoint("last").name.endswith(str(max(steps)))
    assert run.checkpoint("best").name.endswith(f"{run.best.step:08d}")
    assert run.checkpoint(steps[-1]).name.endswith(f"{steps[-1]:08d}")
    with pytest.raises(UserError, match="expected 'best', 'last' or the step"):
        run.checkpoint(3)
    values = found.evaluate("test")
    assert values["accuracy"] == rows.query("event == 'final'")["accuracy"].iloc[-1]
    table = found.predict(X[:5], out="predictions.csv")
    logits = model(X[:5])
    assert table["prediction"].tolist() == logits.argmax(1).tolist()
    assert np.allclose(table["probability"], logits.softmax(1).max(1).values.detach(), atol=1e-6)
    assert pd.read_csv("predictions.csv").shape == table.shape
    assert found.predict(Points())["target"].tolist() == Y.tolist()
    found.export("net.safetensors")
    assert torch.export.load(found.export("net.pt2").paths[0]) is not None
    assert load_file("net.safetensors").keys() == exported.keys()
    assert "finished" in repr(run)


@pytest.mark.parametrize("labels", [np.array(["a", "b", "a"]), ["a", "b", "a"], np.array(["a", 1, "b"], object)])
def test_labels_that_are_texts_are_refused_with_how_to_number_them(labels: Any) -> None:
    with pytest.raises(distrain.UserError, match=r"targets are texts, such as 'a'; .*numpy\.unique\(labels"):
        ArrayData({"train": (np.zeros((3, 2)), labels)}).build(
            DataRequest(DataSection(name="arrays"), "classification", 0)
        )


def test_arrays_do_not_bypass_what_a_built_in_data_set_makes_of_its_files() -> None:
    run = train(model="mlp", data="iris")
    assert run.best is not None
    with pytest.raises(UserError, match="'iris' encodes what it reads"):
        run.predict(X)
    assert len(distrain.predict("runs/a", "test")) == 30


def test_steps_that_were_trained_twice_are_in_the_table_once(tmp_path: Path) -> None:
    run = train(model=Net)
    path = run.path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = [{**row, "loss": 99.0} for row in rows if row["event"] in ("train", "eval") and row["step"] > 5]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    table = run.metrics
    for event, count in (("train", 10), ("eval", 2)):
        found = table[table["event"] == event]
        assert found["step"].is_unique
        assert len(found) == count
        assert (found[found["step"] > 5]["loss"] == 99.0).all()


def test_another_process_is_told_what_to_pass(capfd: pytest.CaptureFixture[str]) -> None:
    train(model=local_net(), callbacks=[Collect(stop=3)])
    found = distrain.load("runs/a")
    with pytest.raises(UserError, match=r"distrain\.load\('.*runs/a', data=\.\.\., model=\.\.\.\)"):
        found.evaluate()
    with pytest.raises(UserError, match=r"object\.model:Local is an object of the Python process"):
        found.resume()
    for command in (["evaluate", "runs/a"], ["train", "runs/a"]):
        ended = cli(*command)
        assert ended.status == 1
        assert "is an object of the Python process" in ended.err
        assert "distrain.load(RUN, model=...)" in ended.err or "distrain.load(RUN, data=...)" in ended.err
    with pytest.raises(UserError, match="loss: found 1 to pass; the recipe of the run has no loss"):
        distrain.load("runs/a", loss=nn.MSELoss)
    done = found.resume(model=local_net(), data=(X, Y), callbacks=[Collect()])
    assert done.status == "finished"
    # weights need no data
    assert isinstance(distrain.load("runs/a", model=local_net()).model(), Net)
    with pytest.raises(UserError, match="is no run"):
        distrain.load("runs")


def test_what_can_be_imported_is_used_by_the_command() -> None:
    run = train(model=Net, data=Points, loss=functional.cross_entropy, callbacks=[Collect])
    assert run.recipe.model.name == f"{__file__}:Net"
    ended = cli("evaluate", "runs/a", "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["loss"] == run.evaluate()["loss"]


# --------------------------------------------------------------------------------------------------------------------
# Several processes


def _in_two_processes(folder: str) -> list[Any]:
    os.chdir(folder)
    Local = local_net()
    with warm_children():
        run = train("runs/two", model=Local, callbacks=[Collect()], processes=2)
        stopped = [train("runs/stop", model=Local, callbacks=[Interrupt()], processes=2).status for _ in range(2)]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(UserError) as refused:
            train("runs/three", model=Local, callbacks=[Holding()], processes=2)
    return [run.status, run.best, stopped, str(refused.value), "DISTRAIN_OBJECTS" in os.environ]


class Interrupt(distrain.Callback):
    """Interrupts the process that has started this one, once, as a notebook's button does."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def on_start(self, run: Any) -> None:
        self.first = run.rank == 0 and run.resumed_step is None

    def on_step_end(self, step: int, metrics: Any) -> None:
        if self.first and step == 3:
            os.kill(self.parent, signal.SIGINT)


class Holding(distrain.Callback):
    """A callback that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_several_processes_get_the_objects(tmp_path: Path) -> None:
    one = train("runs/one", model=local_net(), callbacks=[Collect()])
    status, best, stopped, error, left = in_world(1, _in_two_processes, str(tmp_path), launched=False)[0]
    assert status == "finished"
    assert best.step == one.best.step
    assert best.value == pytest.approx(one.best.value, rel=0.05)  # dropout differs by rank
    assert "object.callbacks:Holding cannot be passed to several processes: TypeError" in error
    assert stopped == ["stopped", "finished"]
    assert not left
    assert RunDir("runs/two").launch().processes == 2


# --------------------------------------------------------------------------------------------------------------------
# Scripts


SCRIPT = """
import distrain, torch
from torch import nn

def net(num_classes=2):
    return nn.Linear(4, num_classes)

def data():
    return torch.utils.data.TensorDataset(torch.randn(64, 4, generator=torch.Generator()), torch.arange(64) % 2)

def main():
    run = distrain.train(task="classification", model=net, data=data, batch={"global": 16}, run_dir="runs/script",
                         train={"steps": 2}, checkpoint={"async": False})
    print(run.recipe.model.name, run.recipe.data.name)
"""


@pytest.mark.parametrize(
    ("ending", "can_be_imported"),
    [('if __name__ == "__main__":\n    main()\n', True), ("main()\n", False)],
    ids=["guarded", "trains when imported"],
)
def test_a_script_is_imported_by_others_where_it_does_not_train_then(
    ending: str, can_be_imported: bool, tmp_path: Path
) -> None:
    Path("script.py").write_text(SCRIPT + ending)
    done = in_world(1, _run_script, str(tmp_path), launched=False)[0]
    places = (f"{tmp_path}/script.py:net", f"{tmp_path}/script.py:data")
    assert done.out.splitlines()[-1] == " ".join(
        places if can_be_imported else ("object.model:net", "object.data:data")
    )
    if can_be_imported:
        assert cli("evaluate", "runs/script").status == 0
    else:
        with pytest.raises(UserError, match="called while its file was imported"):
            train(model=places[0])


def _run_script(folder: str) -> Any:
    os.chdir(folder)

    def run() -> int:
        here = sys.modules["__main__"]
        main = sys.modules["__main__"] = type(sys)("__main__")
        main.__file__ = "script.py"
        try:
            exec(compile(Path("script.py").read_text(), "script.py", "exec"), main.__dict__)
        finally:
            sys.modules["__main__"] = here
        return 0

    return captured(run)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, distrain; dir(distrain); distrain.train, distrain.Run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr
    assert all(getattr(distrain, name) is not None for name in distrain.__all__)


def test_a_run_does_not_depend_on_what_the_caller_has_set() -> None:
    plain = train("runs/plain", model=Net)
    narrow = torch.autocast("cpu", torch.bfloat16)
    with torch.inference_mode(), narrow, default_dtype(torch.float64), torch.device("meta"):
        run = train("runs/around", model=Net)
        score, rows, dtype = run.evaluate("test"), run.predict(X[:3].numpy()), torch.get_default_dtype()
    losses = [each.metrics.query("event == 'train'")["loss"].tolist() for each in (run, plain)]
    assert losses[0] == losses[1]
    assert score["loss"] == plain.evaluate("test")["loss"]
    assert rows.equals(plain.predict(X[:3].numpy()))
    assert dtype == torch.float64


def test_what_a_run_sets_is_for_that_run_alone() -> None:
    torch.set_float32_matmul_precision("high")
    random.seed(1)
    try:
        state = random.getstate(), torch.get_rng_state(), torch.backends.cudnn.deterministic
        train(recipe={"train": {"steps": 2, "deterministic": True}}, model=Net)
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.are_deterministic_algorithms_enabled()
        assert random.getstate() == state[0]
        assert torch.equal(torch.get_rng_state(), state[1])
        assert torch.backends.cudnn.deterministic == state[2]
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


def _several_strategies_beside_the_callers_accelerator(around: str) -> list[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    os.chdir(around)
    faulthandler.disable()
    strategies = ["single", "fsdp2", "zero1", "single", "zero3"]
    found: list[Any] = [
        train(f"runs/{place}-{strategy}", model=Net, strategy=strategy).best
        for place, strategy in enumerate(strategies[:2])
    ]
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    found += [
        train(f"runs/{place}-{strategy}", model=Net, strategy=strategy).best
        for place, strategy in enumerate(strategies[2:], 2)
    ]
    [in_effect] = {
        json.loads((path / "effect.json").read_text())["strategy"] == path.name[2:] for path in Path("runs").iterdir()
    }
    state = AcceleratorState()
    kept = own.mixed_precision, own.gradient_accumulation_steps, state.mixed_precision, state.distributed_type.value
    return [found, in_effect, kept, faulthandler.is_enabled(), torch.distributed.is_initialized()]


def test_runs_of_any_strategy_follow_each_other_beside_an_accelerator_of_the_callers(tmp_path: Path) -> None:
    [found] = in_world(1, _several_strategies_beside_the_callers_accelerator, str(tmp_path), launched=False)
    best, in_effect, kept, shows_faults, joined = found
    assert len(set(best)) == 1, best
    assert (in_effect, kept, shows_faults, joined) == (True, ("bf16", 4, "bf16", "NO"), False, False)


class Counts(distrain.Callback):
    def __init__(self, *, anew: bool = False) -> None:
        self.steps, self.rows, self.anew, self.total = 0, [0], anew, 0

    def on_start(self, run: Any) -> None:
        self.total = run.total_steps
        if self.anew:
            self.steps, self.rows = 0, [0]

    def on_step_end(self, step: int, metrics: Any) -> None:
        self.steps += 1
        self.rows.append(step)


@pytest.mark.parametrize("anew", [False, True])
def test_a_callback_that_begins_with_what_another_run_left_is_warned_of(anew: bool) -> None:
    counts = Counts(anew=anew)
    for name in ("a", "b"):
        train(f"runs/{name}", model=Net, callbacks=[counts])
        said = Path(f"runs/{name}/log-rank-0.txt").read_text()
        warned = "was given to a run before, and begins with what that has left in steps, rows;" in said
        assert warned == (name == "b" and not anew), said


def test_threads_evaluate_one_after_the_other_and_not_beside_a_training() -> None:
    run = train("runs/done", model=Net)
    expected, interval = run.evaluate("test"), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = [each.result() for each in [threads.submit(run.evaluate, "test") for _ in range(24)]]
    finally:
        sys.setswitchinterval(interval)
    assert all(each == expected for each in found)

    class Meanwhile(distrain.Callback):
        def on_step_end(self, step: int, metrics: Any) -> None:
            if step == 2:
                assert run.evaluate("test")["loss"] == expected["loss"]
                with ThreadPoolExecutor(1) as threads, pytest.raises(UserError, match="another thread of this process"):
                    threads.submit(run.evaluate, "test").result()

    assert train("runs/beside", model=Net, callbacks=[Meanwhile()]).status == "finished"
