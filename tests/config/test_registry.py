"""Names from outside the package: by file, by module, and from installed packages."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import Ended, train_rank, write_recipe
from safetensors.numpy import save_file
from worlds import in_world

from distrain.checkpoints.export.opening import detect, open_foreign
from distrain.config import UserError, registry
from distrain.config.registry import Registry, installed_offers

CODE = """
import numpy as np
import torch
from torch import nn

from distrain import Callback, Tracker


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
"""
"""One of each kind."""

KINDS = {
    "models": "Net", "datasets": "Points", "losses": "loss", "metrics": "constant", "optimizers": "Descent",
    "schedules": "fall", "trackers": "Rows", "callbacks": "Noting",
}  # fmt: skip

BUILT_IN = sorted(KINDS.keys() - {"callbacks"})
"""Those with names of their own."""

RECIPE = """
name: outside
task: classification
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
    """Install a package for one test, and forget afterwards what it has registered."""
    for kind in KINDS:
        table: Registry = getattr(registry, kind)
        table.names()
        monkeypatch.setattr(table, "_entries", dict(table._entries))

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


def train_beside(site: str, recipe: str, run_dir: str) -> Ended:
    """Train one process where `site` is among the folders of installed packages."""
    sys.path.insert(0, site)
    installed_offers.cache_clear()
    return train_rank(recipe, [], run_dir, None, False)


@pytest.mark.parametrize("by", ["file", "module", "entry point"])
def test_a_run_of_names_from_outside(tmp_path: Path, by: str) -> None:
    names = {kind: f"my-{kind}" for kind in KINDS}
    site = write_package(tmp_path / "site", {kind: {names[kind]: f"outside:{at}"} for kind, at in KINDS.items()})
    if by == "file":
        names = {kind: f"{site}/outside.py:{at}" for kind, at in KINDS.items()}
    elif by == "module":
        names = {kind: f"outside:{at}" for kind, at in KINDS.items()}
    recipe = write_recipe(tmp_path, RECIPE.format(**names))
    (ended,) = in_world(1, train_beside, str(site), str(recipe), str(tmp_path / "run"))
    assert ended.status == 0, ended.out + ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    key = names["metrics"].rpartition(":")[2]
    assert [row[key] for row in rows if row["event"] == "final"] == [0.25]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4]
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


def test_what_a_package_registers_is_called_as_what_is_built_in(install: Install) -> None:
    code = (
        "from distrain.config.registry import datasets\n\n\n"
        "@datasets.register('theirs', tasks=['regression'])\n"
        "def theirs(request, size: int = 3):\n    'Some numbers.'\n    return request, size\n"
    )
    install({"datasets": {"theirs": "registering:theirs"}}, "registering", code)
    entry = registry.datasets.find("theirs", "regression")
    assert (entry.registered, entry.summary) == (True, "Some numbers.")
    with pytest.raises(UserError, match="data set 'theirs' is for regression, and the recipe's task is binary"):
        registry.datasets.find("theirs", "binary")


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
    code = (
        "from distrain.checkpoints.foreign import from_safetensors\n\n\n"
        "def theirs(source, path, *, trust):\n    from_safetensors.open_file(source, path / 'weights.bin')\n"
    )
    site = install({"formats": {"theirs": "opening:theirs"}}, "opening", code)
    (tmp_path / "saved").mkdir()
    save_file({"layer.weight": np.ones((2, 3), np.float32)}, tmp_path / "saved" / "weights.bin")
    for name in ("theirs", "opening:theirs", f"{site}/opening.py:theirs"):
        with open_foreign(tmp_path / "saved", format=name) as source:
            assert source.spec("model/layer.weight").shape == (2, 3)


@pytest.mark.parametrize("length", [128, 384, 640])
def test_a_safetensors_file_is_known_whatever_its_header_is_long(tmp_path: Path, length: int) -> None:
    file, header = tmp_path / "model", {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    assert detect(file) == "safetensors"
