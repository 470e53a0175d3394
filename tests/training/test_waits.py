"""In a step and in an evaluation the host waits for no device: counted on one that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import IMPORTABLE
from runs import losses, typed, write_recipe
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.config.yaml import load_recipe
from distrain.datasets.base import DataMeta
from distrain.loop import train_step
from distrain.metrics import build_metrics
from distrain.optim import build_optimizer
from distrain.parallel import BuildSpec, StepFlags, StrategySpec, World
from distrain.parallel.ddp import DDPStrategy
from distrain.parallel.mesh import Mesh
from distrain.parallel.precision import MixedPrecision
from distrain.run.folder import RunDir
from distrain.training.context import TrainContext, Turn, to_device
from distrain.training.evaluation import _Tally
from distrain.training.skipping import Anomalies
from distrain.training.tasks import TaskContext, build_objective

DEVICE = torch.device("meta")
"""Computes nothing and has no numbers: whatever reads one raises."""


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: numbers read from it, copies from memory that is not pinned."""

    def __init__(self, world: DistantWorld):
        super().__init__()
        self.world, self.found = world, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        source = args[1] if name == "copy_" else args[0] if args else None
        first = args[0] if args and isinstance(args[0], Tensor) else torch.empty(0)
        to = first.device if name == "copy_" else torch.device(kwargs.get("device") or first.device)
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero") and first.device == DEVICE:
            self.found.append(name)
        if name in ("_to_copy", "copy_") and isinstance(source, Tensor) and (source.device, to) == (CPU, DEVICE):
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if not non_blocking or source.data_ptr() not in self.world.pinned:
                self.found.append(f"{name} of {tuple(source.shape)} {source.dtype} from pageable memory")
        if name in ("_to_copy", "copy_") and isinstance(source, Tensor) and (source.device, to) == (DEVICE, CPU):
            self.found.append(f"{name} to the host")
        return func(*args, **kwargs)


CPU = torch.device("cpu")


class Constants(TorchFunctionMode):
    """Notes tensors that are made on the device from Python's numbers, which are copied there."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self.found.append(f"{func.__name__}({str(args[0])[:40]})")
        return func(*args, **kwargs)


class DistantWorld(World):
    """A process whose device computes nothing; with it, one other that sends what this one does."""

    def __init__(self) -> None:
        accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=DEVICE)
        accelerator.no_sync = lambda model: nullcontext()
        precision = MixedPrecision("fp32", None, torch.float32, scaled=False)
        super().__init__(accelerator, precision, StrategySpec("single"), timedelta(seconds=9))
        self.mesh = Mesh.of(self.asked, 0, [(0, 1)])
        self.pinned: set[int] = set()
        self.kept: list[Tensor] = []

    def pin(self, values: Tensor) -> Tensor:
        values = values.clone() if values.data_ptr() not in self.pinned else values
        self.pinned.add(values.data_ptr())
        self.kept.append(values)  # so that no other gets its place
        return values

    def to_host_async(self, *values: Tensor) -> Callable[[], list[float]]:
        torch.cat(values)
        return lambda: [0.0] * sum(map(len, values))

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        return [value] * self.world_size

    def sum(self, values: Tensor) -> Tensor:
        return values * self.world_size

    def sum_async(self, values: Tensor) -> Callable[[], Tensor]:
        return lambda: self.sum(values)


RECIPE = """
name: distant
task: {task}
data: {{name: digits}}
model: {{name: mlp, hidden: [4]}}
{more}
batch: {{global: 8, micro: 8}}
train: {{steps: 4, ema: 0.9}}
"""


LOSSES = """
import distrain

class Two(distrain.Task):
    weights = {"second": 0.5}

    def count(self, batch):
        return {"second": (batch["targets"] > 0).sum()}

    def losses(self, model, batch):
        outputs = model(batch["inputs"])
        self.log("largest", outputs.amax(1).sum())
        used = batch["targets"] > 0
        chosen = outputs.logsumexp(1) * used
        return {"first": outputs.square().mean(1), "second": distrain.LossSum(chosen.sum(), used.sum())}

    def measure(self, predictions, batch):
        return {"positive": distrain.LossSum((predictions > 0).sum(), predictions.numel())}

def counted(outputs, targets):
    return (outputs - targets).abs().sum(), 3.0

counted.count = lambda targets: 3.0
"""


def tokens() -> dict[str, Tensor]:
    """Return sequences of which some targets do not count."""
    targets = torch.randint(0, 11, (4, 6))
    targets[0, 3:] = -100
    return {"inputs": torch.randint(0, 11, (4, 6)), "targets": targets, "ids": torch.arange(4)}


def classes() -> dict[str, Tensor]:
    """Return images in three classes."""
    return {"inputs": torch.rand(4, 1, 6, 6), "targets": torch.randint(0, 3, (4,)), "ids": torch.arange(4)}


def numbers() -> dict[str, Tensor]:
    """Return a regression."""
    return {"inputs": torch.rand(4, 5), "targets": torch.rand(4, 1), "ids": torch.tensor([0, 1, 2, -1])}


def convolutions() -> nn.Module:
    """Return a network with statistics of batches and dropout."""
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(32, 3)
    return nn.Sequential(*layers)


def gpt() -> nn.Module:
    """Return a small language model."""
    from distrain.networks.gpt import GPT

    return GPT(vocab_size=11, seq_len=6, n_layer=1, n_head=2, d_model=8, dropout=0.1)


CASES: dict[str, tuple[str, str, Callable[[], dict[str, Tensor]], Callable[[], nn.Module]]] = {
    "tokens": ("language_modeling", "optim: {clip_norm: 1.0}", tokens, gpt),
    "classes": ("classification", "", classes, convolutions),
    "clipped": ("classification", "optim: {name: sgd, momentum: 0.9, clip_norm: 1.0}", classes, convolutions),
    "rollback": ("classification", "anomalies: {nonfinite: rollback, spike: rollback}", classes, convolutions),
    "weighted": ("classification", "loss: {name: cross_entropy, weight: [1, 2, 3]}", classes, convolutions),
    "smoothed": ("classification", "loss: {name: cross_entropy, label_smoothing: 0.1}", classes, convolutions),
    "regression": ("regression", "loss: huber_loss", numbers, lambda: nn.Linear(5, 1)),
    "task": ("{folder}/losses.py:Two", "", classes, convolutions),
    "users": ("regression", 'loss: "{folder}/losses.py:counted"', numbers, lambda: nn.Linear(5, 1)),
}


@contextmanager
def opened(folder: Path, case: str, ranks: int) -> Iterator[tuple[TrainContext, Any, Callable[[], None]]]:
    """Build a case on the device; after the block nothing may have waited."""
    task, more, _, build = CASES[case]
    (folder / "losses.py").write_text(LOSSES)
    recipe = load_recipe(
        write_recipe(folder, RECIPE.format(task=task, more=more).replace("{folder}", str(folder)))
    ).recipe
    world = DistantWorld()
    objective = build_objective(recipe, DataMeta())

    def loss_sum(model: nn.Module, index: int) -> Tensor:
        raise AssertionError("a single process needs no dry run")

    def bound() -> nn.Module:
        model = build()
        objective.bind(model, TaskContext(recipe, DataMeta(), DEVICE, lambda: model))
        return model

    plan = BuildSpec(
        model=bound,
        optimizer=lambda model: build_optimizer(model, recipe.optim, fused=False),
        loss_sum=loss_sum,
        micro_batch_size=4,
        accumulation=2,
        clip_norm=recipe.optim.clip_norm,
        ema=0.9,
    )
    strategy = DDPStrategy(world, plan)
    strategy.model.train()
    anomalies = Anomalies(RunDir(folder), recipe, world)
    world.world_size = ranks  # from here on
    turn = Turn("", 0, recipe.optim, lambda step: 1.0, objective)
    t = TrainContext(recipe, strategy, objective, [turn], anomalies=anomalies)
    with Constants() as constants, Waits(world) as waits:
        first = iter((True, True))

        def forget() -> None:
            if next(first, None):
                waits.found.clear()
                constants.found.clear()

        yield t, world, forget
    assert waits.found == []
    assert constants.found == []


def pinned(world: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch as a loader gives it for a GPU."""
    return {key: world.pin(value) for key, value in batch.items()}


@pytest.mark.parametrize(
    ("case", "ranks"),
    # ranks that act on a norm send it to each other, and here is no other
    [(case, ranks) for case in CASES for ranks in (1, 2) if (case, ranks) != ("rollback", 2)],
)
def test_in_a_step_the_host_does_not_wait(tmp_path: Path, case: str, ranks: int) -> None:
    with opened(tmp_path, case, ranks) as (t, world, forget):
        for _ in range(3):
            forget()  # the first one may bring what is constant
            micro_batches = [pinned(world, CASES[case][2]()) for _ in range(2)]
            train_step(t, micro_batches, StepFlags)
    assert t.step == 3


@pytest.mark.parametrize("case", ["tokens", "classes", "weighted", "regression", "task"])
def test_in_a_batch_of_an_evaluation_the_host_does_not_wait(tmp_path: Path, case: str) -> None:
    with opened(tmp_path, case, 1) as (t, world, forget):
        tally, model = _Tally(t.objective, build_metrics(t.recipe, DataMeta()), world), t.strategy.model.eval()
        for _ in range(3):
            forget()
            batch = to_device(pinned(world, CASES[case][2]()), world)
            with torch.no_grad():
                tally.add(batch, t.objective.evaluate(model, batch, predict=True))


class Copies:
    """Stands for a stream: notes what it was given."""

    def __init__(self, large: int):
        self.large, self.copied = large, []

    def takes(self, batch: list[Tensor]) -> bool:
        return sum(each.nbytes for each in batch) >= self.large

    @contextmanager
    def batch(self) -> Iterator[Callable[[Tensor], Tensor]]:
        def copy(values: Tensor) -> Tensor:
            self.copied.append(tuple(values.shape))
            return values.to(DEVICE, non_blocking=True)

        yield copy


def test_a_large_batch_goes_by_the_stream_and_a_small_one_does_not() -> None:
    world = DistantWorld()
    world.copies = copies = Copies(4 * 64)
    for rows in (3, 8):
        inputs = {"left": torch.rand(rows, 4), "right": [torch.rand(2)]}
        batch = {"inputs": inputs, "targets": torch.rand(rows, 4), "ids": torch.arange(rows), "lengths": [rows]}
        moved = to_device(batch, world)
        assert moved["inputs"]["left"].device == moved["targets"].device == DEVICE
        assert moved["ids"] is batch["ids"]
        assert batch["inputs"] is inputs, "the batch itself stays on the host"
    assert copies.copied == [(8, 4), (2,), (8, 4)], "those in a list too"


@pytest.mark.parametrize(
    "wait",
    [
        lambda world, x: x.add(1).to(DEVICE),
        lambda world, x: torch.zeros(3, device=DEVICE).copy_(x),
        lambda world, x: world.to_device(x).cpu(),
        lambda world, x: torch.tensor([1.0, 2.0], device=DEVICE),
        lambda world, x: world.pin(x).to(DEVICE),
    ],
)
def test_what_waits_is_found(wait: Callable[[Any, Tensor], Any]) -> None:
    world = DistantWorld()
    with Constants() as constants, Waits(world) as waits:
        world.to_device(torch.ones(3))
        assert waits.found == constants.found == []
        with suppress(NotImplementedError):
            wait(world, torch.ones(3))
    assert len(waits.found + constants.found) == 1


# --------------------------------------------------------------------------------------------------------------------
# On a GPU

STRICT = """
import torch

from distrain import Callback


class Strict(Callback):
    def on_batches(self, step, micro_batches):
        if step > 2:  # the first ones may bring what is constant
            torch.cuda.set_sync_debug_mode("error")

    def on_step_taken(self, step):
        torch.cuda.set_sync_debug_mode("default")


class Pictures:
    def __init__(self, split):
        self.images = torch.randint(0, 256, (96, 3, 64, 64), dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], number % 5


def train(recipe, run_dir, *overrides):
    import sys

    from distrain.launchers import work

    sys.exit(work(recipe, overrides, run_dir=run_dir, callbacks=[Strict()]))
"""
ON_GPU = """
name: strict
task: classification
data:
  name: "{folder}/strict.py:Pictures"
  workers: 1
  transforms:
    train: [{{name: ToDtype, dtype: float32, scale: true}}, {{name: Normalize, mean: [0.5], std: [0.2]}}]
model:
  name: sequential
  layers: [{{Conv2d: [3, 16, 3]}}, {{BatchNorm2d: 16}}, ReLU, {{AdaptiveAvgPool2d: 1}}, Flatten, {{Linear: [16, 5]}}]
optim: {{name: adamw, clip_norm: 1.0}}
batch: {{global: 96, micro: 48}}
train: {{steps: 8, precision: bf16, ema: 0.9}}
eval: {{every: null}}
log: {{every: 1 steps}}
"""
OVERRIDES = {
    "images": (),
    "fp32": ("train.precision=fp32",),
    "weighted": ("loss={name: cross_entropy, weight: [1, 2, 3, 4, 5]}",),
    "sgd": ("optim={name: sgd, momentum: 0.9}", "tune.channels_last=false"),
    "plain": ("tune.uint8_inputs=false", "tune.copy_stream=false"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", OVERRIDES)
def test_in_a_step_the_host_does_not_wait_for_a_gpu(tmp_path: Path, case: str) -> None:
    (tmp_path / "strict.py").write_text(STRICT)
    recipe = write_recipe(tmp_path, ON_GPU.format(folder=tmp_path))
    code = f"import strict; strict.train({str(recipe)!r}, {str(tmp_path / 'run')!r}, *{OVERRIDES[case]!r})"
    done = typed("python", "-c", code, folder=tmp_path, PYTHONPATH=f"{tmp_path}:{IMPORTABLE}")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 8
    effect = RunDir(tmp_path / "run").effect()
    assert effect is not None
    assert effect["device"] == "cuda"
    if case == "images":
        off = {key for key, each in effect["tune"].items() if not each["on"]}
        assert not off & {"channels_last", "uint8_inputs", "copy_stream", "fused_optimizer", "flash_attention", "tf32"}
