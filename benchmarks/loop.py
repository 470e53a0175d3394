"""What a training step costs beside its mathematics: distrain against raw PyTorch, Accelerate, Lightning and Trainer.

    python benchmarks/loop.py [--processes 1 2] [--rounds 5] [--steps 300] [--gpu] [--quick] [--save FILE]

The model is so small (8 × 8 pixels, 64-64-64-10, 32 samples in a step) that only overhead counts. Every peer does the
same work: batches by index from memory in shuffled order, forward, backward, the gradient clipped to norm 1, a fused
AdamW step, a cosine learning rate, and the loss over all processes known for every tenth step. distrain does what it
always does besides: seeded dropout streams, a metrics row, agreement of the ranks, asynchronous checkpoints,
heartbeats, a watchdog and the lease on the run's folder. Each figure is the median time of a step over windows of 50
after a warm-up, in a process of its own; peers take turns, and the ratio is within a round. Threads are one for each
process. Lightning is measured where it is installed. The environment may set the width of the hidden layers and the
samples of a step (BENCHMARK_WIDTH, BENCHMARK_BATCH).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import Table, in_processes, options_of

GOALS = {1: 1.2, 2: 1.1}
PEERS = ("raw", "distrain", "accelerate", "lightning", "trainer")
WINDOW = 50
SAMPLES, FEATURES, CLASSES = 4096, 64, 10
WIDTH, BATCH = int(os.environ.get("BENCHMARK_WIDTH", "64")), int(os.environ.get("BENCHMARK_BATCH", "32"))
"""Of the hidden layers, and of all processes together."""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _model() -> Any:
    from torch import nn

    hidden = (nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, CLASSES))


def _tensors() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return inputs.view(-1, 1, 8, 8), inputs[:, :CLASSES].argmax(dim=1)


class Clock:
    """Times windows of steps."""

    def __init__(self) -> None:
        self.windows: list[float] = []
        self._count = 0
        self._began = time.perf_counter()

    def tick(self) -> None:
        """One step is done."""
        self._count += 1
        if self._count % WINDOW == 0:
            now = time.perf_counter()
            self.windows.append((now - self._began) / WINDOW)
            self._began = now

    def median_us(self) -> float:
        """Microseconds of a step, the first windows left out."""
        return statistics.median(self.windows[2:]) * 1e6


def run_raw(steps: int, world_size: int, rank: int) -> float:
    """PyTorch as its documentation shows it."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional

    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    device = _device()
    model = _model().to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    inputs, targets = _tensors()
    micro, clock, step = BATCH // world_size, Clock(), 0
    while step < steps:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))
        for index in order[rank::world_size].split(micro):
            x, y = inputs[index], targets[index]
            if device == "cuda":
                x, y = (each.pin_memory().to(device, non_blocking=True) for each in (x, y))
            loss = functional.cross_entropy(wrapped(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 10 == 0:
                total = loss.detach()
                if world_size > 1:
                    dist.all_reduce(total)
                total.item()
            clock.tick()
            if step == steps:
                break
    if world_size > 1:
        dist.destroy_process_group()
    return clock.median_us()


def run_accelerate(steps: int, world_size: int, rank: int) -> float:
    """Accelerate as its documentation shows it."""
    import torch
    from accelerate import Accelerator
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(cpu=_device() == "cpu")
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    loader = DataLoader(
        TensorDataset(*_tensors()), batch_size=BATCH // world_size, shuffle=True, pin_memory=_device() == "cuda"
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    clock, step = Clock(), 0
    while step < steps:
        for inputs, targets in loader:
            loss = functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                accelerator.reduce(loss.detach()).item()
            clock.tick()
            if step == steps:
                break
    accelerator.end_training()
    return clock.median_us()


def run_lightning(steps: int, world_size: int, rank: int) -> float:
    """Lightning's Trainer with its usual checkpointing and logging off, which favours it."""
    import lightning
    import torch
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    clock = Clock()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = functional.cross_entropy(self.model(batch[0]), batch[1])
            if index % 10 == 0:
                self.log("loss", loss, sync_dist=world_size > 1)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
            shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shape, "interval": "step"}}

        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="auto", devices=world_size, strategy="ddp" if world_size > 1 else "auto", max_steps=steps,
            gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, log_every_n_steps=10,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TensorDataset(*_tensors()), batch_size=BATCH // world_size, shuffle=True))
    return clock.median_us()


def run_trainer(steps: int, world_size: int, rank: int) -> float:
    """Hugging Face's Trainer without checkpoints."""
    import torch
    from torch.nn import functional
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            logits = self.model(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class Rows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.inputs, self.targets = _tensors()

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": self.inputs[index], "labels": self.targets[index]}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH // world_size, learning_rate=1e-3,
            lr_scheduler_type="cosine", max_grad_norm=1.0, logging_steps=10, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=_device() == "cpu", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(Net(), arguments, train_dataset=Rows(), callbacks=[Ticks()])
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    return clock.median_us()


def run_distrain(steps: int, world_size: int, rank: int) -> float:
    """distrain with everything on, as `distrain train` starts it in each process."""
    from distrain import Callback
    from distrain.launchers import work

    clock = Clock()

    class Ticks(Callback):
        asks = False

        def on_step_start(self, step: int) -> None:
            clock.tick()

    folder = Path(os.environ["BENCHMARK_FOLDER"])
    recipe = folder / f"recipe-{rank}.yaml"
    recipe.write_text(
        "name: overhead\ntask: classification\n"
        "data: {name: digits, split: [0.9, 0.1]}\n"
        f"model: {{name: sequential, layers: [Flatten, {{Linear: [64, {WIDTH}]}}, ReLU, "
        f"{{Linear: [{WIDTH}, {WIDTH}]}}, ReLU, {{Linear: [{WIDTH}, 10]}}]}}\n"
        "optim: {name: adamw, lr: 1.0e-3, clip_norm: 1.0}\nschedule: cosine\n"
        f"batch: {{global: {BATCH}}}\ntrain: {{steps: {steps}}}\neval: {{every: null}}\n"
        "checkpoint: {every: 200 steps}\nlog: {every: 10 steps}\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = work(str(recipe), run_dir=str(folder / "run"), processes=world_size, callbacks=[Ticks()])
    assert status == 0, said.getvalue()
    return clock.median_us()


# --------------------------------------------------------------------------------------------------------------------
# Running them


def timed(peer: str, world_size: int, steps: int, *, gpu: bool = False, **variables: str) -> Callable[[], float]:
    """Return a function that measures the microseconds of a step of a peer, in fresh processes with such variables."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments, variables["BENCHMARK_FOLDER"] = ["--peer", peer, "--steps", str(steps)], folder
            found: float = in_processes(__file__, arguments, world_size=world_size, gpu=gpu, **variables)[0]["us"]
            return found

    return measure


def main() -> None:
    """Measure and print a table; or, with --peer, be one of the measured processes."""
    parser = options_of(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1 2; with --gpu 1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        runners: dict[str, Callable[[int, int, int], float]] = {
            "raw": run_raw, "distrain": run_distrain, "accelerate": run_accelerate, "lightning": run_lightning,
            "trainer": run_trainer,
        }  # fmt: skip
        us = runners[a.peer](a.steps, int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")))
        print(json.dumps({"us": us}))
        return
    peers = [peer for peer in PEERS if peer != "lightning" or importlib.util.find_spec("lightning")]
    steps = 200 if a.quick else a.steps

    worlds = a.processes or ([1] if a.gpu else [1, 2])
    rounds = 1 if a.quick else a.rounds
    table = Table("A training step where only overhead counts", "µs a step")
    for world_size in worlds:
        table.measure(
            {peer: timed(peer, world_size, steps, gpu=a.gpu) for peer in peers},
            base="raw",
            rounds=rounds,
            title=f"{world_size} process{'es' if world_size > 1 else ''}",
            goals={"distrain": 1.15 if a.gpu else GOALS.get(world_size, 1.1)},
        )
    table.save(a.save)


if __name__ == "__main__":
    main()
