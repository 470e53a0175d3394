"""Names from outside the package: by file, by module, and from installed packages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import Ended, captured, write_recipe
from safetensors.numpy import save_file
from typer.testing import CliRunner
from warm import warm_children
from worlds import in_world

from distrain.checkpoints.export.opening import detect, open_foreign
from distrain.cli.main import Kind, app
from distrain.config import UserError, registry
from distrain.config.registry import Registry, installed_offers
from distrain.config.yaml import load_recipe
from distrain.launchers import (
    Options,
    find_launcher,
    launcher_environment,
    launcher_of,
    open_run,
    read_target,
    resolve,
)
from distrain.report.status import cancel_jobs, statuses
from distrain.run.folder import Launch, RunDir

CODE = """
import subprocess
import sys

import numpy as np
import torch
from torch import nn

from distrain import Callback, Classification, Tracker
from distrain.checkpoints.foreign import from_safetensors
from distrain.launchers import Submitted, open_run, shared_file
from distrain.launchers.launcher import Job


class Net(nn.Module):
    def __init__(self, in_features, num_classes, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.layers(x)


class Points:
    classes = ("a", "b")

    def __init__(self, samples: int = 24):
        self.inputs = torch.from_numpy(np.random.default_rng(1).normal(size=(samples, 3))).float()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], int(self.inputs[index].sum() > 0)


class Sure(Classification):
    def __init__(self, share: float = 0.5):
        self.weights = {"entropy": share}

    def losses(self, model, batch):
        logs = model(batch["inputs"]).log_softmax(1)
        return {**super().losses(model, batch), "entropy": -(logs.exp() * logs).sum(1)}


def loss(outputs, targets, factor: float = 1.0):
    return factor * nn.functional.cross_entropy(outputs, targets, reduction="none")


def constant(outputs, targets):
    return torch.full((len(targets),), 0.25)


def fall(step, total_steps, power: float = 1.0):
    return (1 - step / total_steps) ** power


class Rows(Tracker):
    def __init__(self, start, file: str):
        self.file = open(start.run.path / file, "w")

    def write(self, index, row):
        print(index, row["event"], row["step"], file=self.file, flush=True)


class Noting(Callback):
    def __init__(self, file: str):
        self.file = file

    def on_start(self, run):
        self.path = run.folder / self.file

    def on_step_end(self, step, metrics):
        with open(self.path, "a") as file:
            print(step, metrics.lr, file=file)


class Descent(torch.optim.SGD):
    def __init__(self, params, lr, momentum: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum)


def weights(source, path, *, trust):
    from_safetensors.open_file(source, path / "weights.bin")


class Shed:
    name = "shed"

    def submit(self, start):
        open_run(start.run, start.given, start.launch())
        self.note(start.run.path, "RUNNING")
        done = subprocess.run([sys.executable, str(shared_file("launch", start.script)), *start.worker_arguments])
        self.note(start.run.path, "COMPLETED")
        return Submitted("s1", done.returncode)

    def note(self, folder, state):
        (folder / "job.txt").write_text(state)

    def knows(self, folder):
        return (folder / "job.txt").exists()

    def status(self, folders):
        return {folder: [Job("s1", (folder / "job.txt").read_text())] for folder in folders if self.knows(folder)}

    def cancel(self, folder):
        (job,) = self.status([folder])[folder]
        if job.alive:
            self.note(folder, "CANCELLED")
        return [job] if job.alive else []
"""
"""One of each kind."""

KINDS = {
    "tasks": "Sure", "models": "Net", "datasets": "Points", "losses": "loss", "metrics": "constant",
    "optimizers": "Descent", "schedules": "fall", "trackers": "Rows", "callbacks": "Noting",
    "formats": "weights", "launchers": "Shed",
}  # fmt: skip

BUILT_IN = sorted(KINDS.keys() - {"callbacks"})
"""Those with names of their own."""

RECIPE = """
name: outside
task: {{name: "{tasks}", share: 0.25}}
data: {{name: "{datasets}", samples: 24}}
model: {{name: "{models}", width: 5}}
loss: {{name: "{losses}", factor: 2.0}}
optim: {{name: "{optimizers}", lr: 0.1, momentum: 0.5}}
batch: {{global: 8}}
train: {{steps: 4}}
eval: {{every: 2 steps, metrics: ["{metrics}", accuracy]}}
checkpoint: {{every: 2 steps, async: false}}
schedule: {{name: "{schedules}", power: 2.0}}
callbacks: [{{name: "{callbacks}", file: lr.txt}}]
log: {{every: 1 steps, trackers: [{{name: "{trackers}", file: rows.txt}}]}}
"""

Install = Callable[..., Path]


def write_package(folder: Path, points: dict[str, dict[str, str]], name: str = "outside", code: str = CODE) -> Path:
    """Write an installed package of one module, as pip leaves it, and return the folder that it is in."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [
        f"[distrain.{group}]\n" + "".join(f"{key} = {at}\n" for key, at in each.items())
        for group, each in points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / f"{name}.py").write_text(code)
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install packages for one test."""

    def write(points: dict[str, dict[str, str]], name: str = "outside", code: str = CODE) -> Path:
        folder = write_package(tmp_path / name, points, name, code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        installed_offers.cache_clear()
        return folder

    yield write
    installed_offers.cache_clear()


# --------------------------------------------------------------------------------------------------------------------
# A run of nothing but names from outside


def launched(site: str, launcher: str, recipe: str, run_dir: str) -> Ended:
    """Start a run by a launcher where `site` is among the folders of installed packages."""
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = site  # as the processes that it starts have it
    installed_offers.cache_clear()
    request = resolve(read_target(recipe, run_dir=run_dir), Options(), launcher_environment(1))
    with warm_children():
        return captured(lambda: find_launcher(launcher).submit(request).status)


@pytest.mark.parametrize("by", ["file", "module", "entry point"])
def test_a_run_of_names_from_outside(tmp_path: Path, by: str) -> None:
    names = {kind: f"my-{kind}" for kind in KINDS}
    site = write_package(tmp_path / "site", {kind: {names[kind]: f"outside:{at}"} for kind, at in KINDS.items()})
    if by == "file":
        names = {kind: f"{site}/outside.py:{at}" for kind, at in KINDS.items()}
    elif by == "module":
        names = {kind: f"outside:{at}" for kind, at in KINDS.items()}
    recipe = write_recipe(tmp_path, RECIPE.format(**names))
    run = tmp_path / "run"
    (ended,) = in_world(1, launched, str(site), names["launchers"], str(recipe), str(run), launched=False)
    assert ended.status == 0, ended.out + ended.err
    assert (run / "job.txt").read_text() == "COMPLETED"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    key = names["metrics"].rpartition(":")[2]
    assert [row[key] for row in rows if row["event"] == "final"] == [0.25]
    mine = names["losses"] if by == "entry point" else "supervised"
    trained = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert [row["loss"] for row in trained] == pytest.approx([row[mine] + 0.25 * row["entropy"] for row in trained])
    kept = (tmp_path / "run" / "rows.txt").read_text().splitlines()
    assert kept == [f"{index} {row['event']} {row['step']}" for index, row in enumerate(rows)]
    rates = [float(line.split()[1]) for line in (tmp_path / "run" / "lr.txt").read_text().splitlines()]
    # the code is known again whatever it is named by: the package is not below site-packages, as an editable one is not
    assert "outside.py" in json.loads((tmp_path / "run" / "inputs.json").read_text())["code"]
    assert rates == [0.1 * (1 - step / 4) ** 2.0 for step in range(4)]


# --------------------------------------------------------------------------------------------------------------------
# Names


def test_entry_points_are_found_and_listed_and_their_packages_stay_closed(install: Install) -> None:
    install({"models": {"my-net": "outside:Net"}, "losses": {"my-loss": "outside:loss"}})
    assert registry.models.summaries()["my-net"] == "the installed package outside 1.2 (outside:Net)"
    assert "outside" not in sys.modules
    entry = registry.models.find("my-net")
    assert (entry.value.__name__, entry.registered, entry.spec) == ("Net", False, "outside:Net")
    assert registry.models.spec_of("my-net") == "outside:Net"
    assert registry.models.spec_of("mlp") is None
    with pytest.raises(UserError, match=r"model\.name: no model 'my-nett'; did you mean 'my-net'"):
        registry.models.find("my-nett")


def test_a_package_may_offer_one_of_each_kind(install: Install) -> None:
    install({kind: {f"my-{kind}": f"outside:{at}"} for kind, at in KINDS.items()})
    assert sorted(KINDS) == sorted(Kind)
    for kind, at in KINDS.items():
        listed = CliRunner().invoke(app, ["list", kind]).output
        assert f"my-{kind:<25} the installed package outside 1.2 (outside:{at})" in listed
    assert "outside" not in sys.modules, "a list imports no package"
    for kind, at in KINDS.items():
        assert getattr(registry, kind).find(f"my-{kind}").value.__name__ == at


@pytest.mark.parametrize("kind", BUILT_IN)
def test_what_is_built_in_is_found_without_looking_at_packages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table: Registry = getattr(registry, kind)
    registry.installed_offers.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: pytest.fail("packages were looked at"))
    for name in table.names():
        assert table.find(name).spec is None


@pytest.mark.parametrize("kind", BUILT_IN)
def test_an_unknown_name_reports_what_there_is(kind: str) -> None:
    table: Registry = getattr(registry, kind)
    first = table.names()[0]
    with pytest.raises(UserError) as caught:
        table.find("zzzzzz")
    said = str(caught.value)
    assert said.startswith(f"{table.where}: no {table.kind} 'zzzzzz'; there are {first}, ")
    assert "'path/to/file.py:NAME' or 'package.module:NAME'" in said
    assert f"distrain.{kind}" in said
    with pytest.raises(UserError, match=f"did you mean '{first}'"):
        table.find(f"{first}x")


@pytest.mark.parametrize(("kind", "name"), [("models", "resnet18"), *((kind, None) for kind in BUILT_IN)])
def test_a_package_cannot_take_a_name_that_is_built_in(install: Install, kind: str, name: str | None) -> None:
    table: Registry = getattr(registry, kind)
    name = name or table.names()[0]
    install({kind: {name: "outside:Net", "fine": "outside:Net"}})
    assert table.find(name).spec is None, "what is built in holds"
    assert table.find("fine").value.__name__ == "Net", "the package's other names hold"
    with pytest.raises(UserError) as caught:
        table.find("zzzzzz")
    said = f"{name!r} of the installed package outside 1.2 is the name of what is built in; name it as outside:Net"
    assert said in str(caught.value)


def test_two_packages_cannot_share_a_name(install: Install) -> None:
    install({"models": {"net": "first:Net"}}, "first")
    install({"models": {"net": "second:Net"}}, "second")
    with pytest.raises(UserError) as caught:
        registry.models.find("net")
    assert "'net' is offered by the installed package" in str(caught.value)
    assert "first 1.2" in str(caught.value)
    assert "second 1.2" in str(caught.value)
    assert registry.models.find("first:Net").spec == "first:Net"


def test_a_broken_package_is_named_and_breaks_no_other(install: Install, tmp_path: Path) -> None:
    install({"models": {"broken": "broken:Net", "gone": "broken:Gone.net"}}, "broken", "import no_such_module\n")
    install({"models": {"not-module": "one two"}}, "odd")
    damaged = install({}, "damaged")
    (damaged / "damaged-1.2.dist-info" / "entry_points.txt").write_text("[distrain.models]\nno equals sign\n")
    install({"models": {"fine": "outside:Net"}})
    assert registry.models.find("fine").value.__name__ == "Net"
    assert registry.models.find("mlp").spec is None
    with pytest.raises(
        UserError, match=r"model\.name: 'broken' of the installed package broken 1.2 cannot be used: .*no_such"
    ):
        registry.models.find("broken")
    with pytest.raises(UserError) as caught:
        registry.models.find("zzzzzz")
    assert "the installed package damaged 1.2: its entry points cannot be read" in str(caught.value)
    assert "the installed package odd 1.2: its entry points cannot be read" in str(caught.value)


REGISTERING = """
from distrain.config.registry import datasets


@datasets.register("theirs", tasks=["regression"])
def theirs(request, size: int = 3):
    "Some numbers."
    return request, size
"""


def find_theirs(site: str) -> list[object]:
    sys.path.insert(0, site)
    installed_offers.cache_clear()
    entry = registry.datasets.find("theirs", "regression")
    try:
        registry.datasets.find("theirs", "binary")
    except UserError as error:
        return [entry.registered, entry.summary, str(error)]
    return []


def test_what_a_package_registers_is_called_as_what_is_built_in(tmp_path: Path) -> None:
    site = write_package(tmp_path, {"datasets": {"theirs": "registering:theirs"}}, "registering", REGISTERING)
    ((registered, summary, said),) = in_world(1, find_theirs, str(site), launched=False)
    assert (registered, summary) == (True, "Some numbers.")
    assert "data set 'theirs' is for regression, and the recipe's task is binary" in said


def test_a_name_is_registered_once() -> None:
    for name in ("mlp", "resnet18"):
        with pytest.raises(UserError, match=f"model '{name}' of .*test_registry.* has the name of"):
            registry.models.register(name)(test_a_name_is_registered_once)
    assert registry.models.find("mlp").value.__module__ == "distrain.networks.basic"


def test_what_is_registered_has_what_was_given_with_it() -> None:
    table: Registry = Registry("thing", "things", None)
    table.register("known", about="What it is.", colour="red")(Path)
    entry = table.find("known")
    assert (entry.value, entry.summary, entry.metadata["colour"]) == (Path, "What it is.", "red")
    with pytest.raises(UserError, match="things: no thing 'knwon'; did you mean 'known'"):
        table.find("knwon")


# --------------------------------------------------------------------------------------------------------------------
# Formats of checkpoints


def test_a_format_from_outside_is_opened(install: Install, tmp_path: Path) -> None:
    site = install({"formats": {"theirs": "outside:weights"}})
    (tmp_path / "saved").mkdir()
    save_file({"layer.weight": np.ones((2, 3), np.float32)}, tmp_path / "saved" / "weights.bin")
    for name in ("theirs", "outside:weights", f"{site}/outside.py:weights"):
        with open_foreign(tmp_path / "saved", format=name) as source:
            assert source.spec("model/layer.weight").shape == (2, 3)


@pytest.mark.parametrize("length", [128, 384, 640])
def test_a_safetensors_file_is_known_whatever_its_header_is_long(tmp_path: Path, length: int) -> None:
    file, header = tmp_path / "model", {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    assert detect(file) == "safetensors"


# --------------------------------------------------------------------------------------------------------------------
# Launchers


@pytest.mark.parametrize("name", ["shed", "outside:Shed", "outside.py:Shed"])
def test_jobs_of_a_launcher_from_outside_are_shown_and_cancelled(install: Install, tmp_path: Path, name: str) -> None:
    site = install({"launchers": {"shed": "outside:Shed"}})
    shed = find_launcher(f"{site}/{name}" if name.endswith(".py:Shed") else name)
    loaded = load_recipe(write_recipe(tmp_path))
    run = RunDir(tmp_path / "run")
    open_run(run, loaded, Launch.describe(1, "single"))
    assert launcher_of(run.path).name == "local"
    (run.path / "job.txt").write_text("PENDING")
    assert launcher_of(run.path).name == "shed", "one that a package offers is asked"
    (found,) = statuses(run.path)
    assert (found.state, found.job, found.job_state) == ("queued", "s1", "PENDING")
    if name == "shed":
        assert cancel_jobs(run.path)[0] == "cancelled job s1, which was PENDING; it is not queued again"
    else:
        assert [job.id for job in shed.cancel(run.path)] == ["s1"]
    assert cancel_jobs(run.path) == [f"no job of {run.path} is queued or runs (s1 CANCELLED)"]
