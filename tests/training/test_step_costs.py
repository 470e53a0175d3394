"""What a step does besides its mathematics, counted: operations, and memory that it asks for."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import captured
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import in_world

import distrain
from distrain.config.yaml import load_recipe
from distrain.diagnose.hang_diagnosis import evidence
from distrain.launchers import open_run
from distrain.loop import train_step
from distrain.parallel import StrategySpec, open_world
from distrain.run.folder import Launch, RunDir
from distrain.training.callbacks.base import Callback
from distrain.training.run_loop import Session

RECIPE = """
name: counted
task: classification
data: {name: digits, split: [0.9, 0.1]}
model: {name: sequential, layers: [Flatten, {Linear: [64, 32]}, LAYERS {Linear: [32, 10]}]}
optim: {name: adamw, lr: 1.0e-3, clip_norm: 1.0}
schedule: cosine
batch: {global: 32, micro: MICRO}
train: {steps: 100}
eval: {every: null}
checkpoint: {every: 100 steps}
log: {every: 100 steps}
"""


TURNS = """
name: turns
task: "adversarial_parts:Adversarial"
data: "adversarial_parts:NoisyPoints"
model: {name: "adversarial_parts:Pair", blocks: 1}
optim:
  d: {params: "d.*", name: adam, lr: 1.0e-2, clip_norm: 0.2}
  g: {params: "g.*", name: sgd, lr: 0.2, every: 2}
batch: {global: 12}
train: {steps: 12}
eval: {every: null}
checkpoint: {every: 100 steps}
log: {every: 100 steps}
"""


class Counts(TorchDispatchMode):
    """Counts operations, and bytes of what they return in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function)] += 1
        outcome = function(*args, **(kwargs or {}))
        if isinstance(outcome, torch.Tensor) and not any(
            isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() == outcome.untyped_storage().data_ptr()
            for each in args
        ):
            self.bytes += outcome.nbytes
        return outcome


def raw(layers: int, micro: int) -> Counts:
    """Return what a step of a plain loop takes: forward and backward for each micro-batch, clip, AdamW."""
    hidden = [each for _ in range(layers) for each in (nn.ReLU(), nn.Linear(32, 32))]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *hidden, nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs, targets = torch.zeros(micro, 64), torch.zeros(micro, dtype=torch.int64)
    for counts in (Counts(), Counts()):  # the first makes the optimizer's state
        with counts:
            for _ in range(32 // micro):
                loss = functional.cross_entropy(model(inputs), targets)
                (loss / (32 // micro)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return counts


def late_step(recipe: str, folder: str, counting: Callable[[], AbstractContextManager[Any]], late: int = 3) -> Any:
    """Take steps as `train` does; returns what `counting` gave for the last, the `late`-th."""
    run, loaded = RunDir(folder), load_recipe(Path(recipe))
    found: list[Any] = []

    def steps() -> int:
        world = open_world("fp32", StrategySpec("single"))
        open_run(run, loaded, Launch.describe(1, "single"))
        with Session.open(run, loaded.recipe, world) as session:
            for micro_batches in session.batches():
                with counting() as counts:
                    taken = train_step(session.t, micro_batches, session.flags)
                    session.deliver_metrics(taken)
                found.append(counts)
                if session.t.step == late:
                    return 0
        return 1

    ended = captured(steps)
    assert ended.status == 0, ended.err
    return found[-1]


def of_a_step(recipe: str, folder: str) -> tuple[dict[str, int], int]:
    """Return the operations of a step by name, and its bytes."""
    found = late_step(recipe, folder, Counts)
    return dict(found.operations), found.bytes


@pytest.mark.parametrize(("layers", "micro"), [(1, 32), (8, 32), (1, 8)])
def test_a_step_takes_few_operations_more_than_a_plain_loop(tmp_path: Path, layers: int, micro: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("LAYERS", "ReLU, {Linear: [32, 32]}, " * layers).replace("MICRO", str(micro)))
    ((operations, nbytes),) = in_world(1, of_a_step, str(recipe), str(tmp_path / "run"))
    plain = raw(layers, micro)
    more = Counter(operations) - plain.operations
    assert more.total() <= 4 + 5 * (32 // micro), more  # however many layers there are
    assert nbytes <= plain.bytes + 1024


# --------------------------------------------------------------------------------------------------------------------
# Python

MANY = """
import torch
from torch import nn

class Many(nn.Module):
    def __init__(self, scalars):
        super().__init__()
        self.scalars = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(scalars))
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1)) + torch.stack(list(self.scalars)).sum()
"""


@contextmanager
def python() -> Iterator[Counter[str]]:
    """Count the calls and the lines of distrain's own code in this block; a comprehension's line for each element.

    `any`: the calls of all code, also of functions in C.
    """
    counts: Counter[str] = Counter()
    package = str(Path(distrain.__file__).parent)

    def enter(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        counts["calls"] += 1
        return line

    def line(frame: Any, event: str, _: Any) -> Any:
        counts["lines"] += event == "line"
        return line

    def note(frame: Any, event: str, _: Any) -> None:
        counts["any"] += event in ("call", "c_call")

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(enter)
    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])


def python_of_a_step(recipe: str, folder: str) -> dict[str, int]:
    return dict(late_step(recipe, folder, python, late=6))  # in 1, 2, 4 and 8 parameters are compared


@pytest.mark.parametrize("judged", [False, True], ids=["", "judged"])
def test_python_of_a_step_does_not_grow_with_the_parameters(judged: bool, tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(MANY)
    found = []
    for scalars in (8, 998):
        recipe = tmp_path / f"recipe-{scalars}.yaml"
        layers = "{name: sequential, layers: [Flatten, {Linear: [64, 32]}, LAYERS {Linear: [32, 10]}]}"
        model = f"{{name: '{tmp_path / 'many.py'}:Many', scalars: {scalars}}}"
        anomalies = "anomalies: {nonfinite: skip}\n" if judged else ""
        recipe.write_text(RECIPE.replace(layers, model).replace("MICRO", "32") + anomalies)
        found += in_world(1, python_of_a_step, str(recipe), str(tmp_path / f"run-{scalars}"))
    few, many = found
    assert 0 < few["calls"] <= (130 if judged else 100)
    assert 0 < few["any"] <= (400 if judged else 340)
    assert many["calls"] <= few["calls"] + 5  # some of them are due by the time
    # gradients are collected once and dropped once; what else is done for each of them, torch does
    assert many["lines"] <= few["lines"] + 3 * 990 + 50


# --------------------------------------------------------------------------------------------------------------------
# The start


def collectives_of_a_start(strategy: str, recipe: str, folder: str) -> int:
    """Return how many collectives this rank has begun when the batches of its first step are waited for."""
    from distrain.launchers import work

    found: list[int] = []

    class Count(Callback):
        asks = False

        def on_step_start(self, step: int) -> None:
            if step == 1:
                recorded = evidence.collectives(Path(folder) / f"recorded-{os.environ['RANK']}")
                found.append(sum(recorded.values()))

    ended = captured(lambda: work(recipe, run_dir=f"{folder}/run", strategy=strategy, callbacks=[Count()]))
    assert ended.status == 0, ended.err
    return found[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1"])
def test_the_collectives_of_a_start_do_not_grow_with_the_model(tmp_path: Path, strategy: str) -> None:
    counts = []
    for layers in (2, 20):
        folder = tmp_path / str(layers)
        folder.mkdir()
        recipe = folder / "recipe.yaml"
        text = RECIPE.replace("LAYERS", "ReLU, {Linear: [32, 32]}, " * layers).replace("MICRO", "16")
        recipe.write_text(text.replace("steps: 100}", "steps: 1}", 1))
        counts.append(in_world(2, collectives_of_a_start, strategy, str(recipe), str(folder)))
    (few, same), more = counts
    assert few == same
    assert more == [few, few]
    assert few <= 60


def steps_between_evaluations(strategy: str, recipe: str, folder: str) -> tuple[list[int], list[int]]:
    """Return how many collectives this rank begins in each step, and how many keys the store has before each."""
    from distrain.launchers import work

    begun, keys = [], []

    def count() -> int:
        return sum(evidence.collectives(Path(folder) / f"recorded-{os.environ['RANK']}").values())

    class Count(Callback):
        asks = False

        def on_step_start(self, step: int) -> None:
            keys.append(torch.distributed.distributed_c10d._get_default_store().num_keys())
            self.before = count()

        def on_step_end(self, step: int, metrics: Any) -> None:
            begun.append(count() - self.before)

    ended = captured(lambda: work(recipe, run_dir=f"{folder}/run", strategy=strategy, callbacks=[Count()]))
    assert ended.status == 0, ended.err
    return begun, keys


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_step_behind_an_evaluation_sends_no_more_than_one_before(tmp_path: Path, strategy: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace("LAYERS", "ReLU, {Linear: [32, 32]}, " * 2).replace("MICRO", "16")
    recipe.write_text(text.replace("steps: 100}", "steps: 12}", 1).replace("every: null", "every: 5 steps", 1))
    for begun, keys in in_world(2, steps_between_evaluations, strategy, str(recipe), str(tmp_path)):
        del begun[7]  # as the steps 1, 2 and 4, the eighth looks for mistakes
        assert len(begun) == 11
        assert set(begun[5:]) == {begun[4]}, begun
        assert set(keys[5:]) == {keys[4]}, keys


def test_turns_of_several_optimizers_send_no_more_than_their_gradients_and_weights(tmp_path: Path) -> None:
    """Each turn gathers other weights than the one before, and they are known after its first."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TURNS)
    for begun, keys in in_world(2, steps_between_evaluations, "fsdp2", str(recipe), str(tmp_path)):
        # weights forth and back, gradients, a norm, and what the ranks agree on
        assert max(begun[2::2]) <= 15, begun
        assert max(begun[3::2]) <= 26, begun
        assert set(keys[2:]) == {keys[2]}, keys
