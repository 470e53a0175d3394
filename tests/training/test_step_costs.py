"""What a step does besides its mathematics, counted: operations, and memory that it asks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import captured
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import in_world

from distrain.config.yaml import load_recipe
from distrain.launchers import open_run
from distrain.loop import train_step
from distrain.parallel import StrategySpec, open_world
from distrain.run.folder import Launch, RunDir
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


def of_a_step(recipe: str, folder: str) -> tuple[dict[str, int], int]:
    """Take three steps as `train` does; returns the operations of the third by name, and its bytes."""
    run, loaded = RunDir(folder), load_recipe(Path(recipe))
    found: list[Counts] = []

    def steps() -> int:
        world = open_world("fp32", StrategySpec("single"))
        open_run(run, loaded, Launch.describe(1, "single"))
        with Session.open(run, loaded.recipe, world) as session:
            for micro_batches in session.batches():
                with Counts() as counts:
                    taken = train_step(session.t, micro_batches, session.flags)
                    session.deliver_metrics(taken)
                found.append(counts)
                if session.t.step == 3:
                    return 0
        return 1

    ended = captured(steps)
    assert ended.status == 0, ended.err
    return dict(found[-1].operations), found[-1].bytes


@pytest.mark.parametrize(("layers", "micro"), [(1, 32), (8, 32), (1, 8)])
def test_a_step_takes_few_operations_more_than_a_plain_loop(tmp_path: Path, layers: int, micro: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("LAYERS", "ReLU, {Linear: [32, 32]}, " * layers).replace("MICRO", str(micro)))
    ((operations, nbytes),) = in_world(1, of_a_step, str(recipe), str(tmp_path / "run"))
    plain = raw(layers, micro)
    more = Counter(operations) - plain.operations
    assert more.total() <= 4 + 5 * (32 // micro), more  # however many layers there are
    assert nbytes <= plain.bytes + 1024
