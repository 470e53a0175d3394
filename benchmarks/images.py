"""ResNet-50 on images of bytes: distrain beside bare loops of PyTorch and of timm.

    python benchmarks/images.py [--rounds 5] [--gpu] [--quick] [--save FILE]

A bare loop has its images in pinned memory, copies the bytes, makes floats of them on the device, and takes a step of
SGD with momentum under autocast to bf16 (on a CPU without): in the layout that PyTorch starts with (NCHW), with the
channels last, and with cuDNN's autotuning besides. timm's is the same loop with its model, where timm is installed.
distrain reads a data set by loader processes, with its recipe's defaults, and does all that it always does; with --gpu
it also runs with each switch of `tune` off. Every subject is a process that stays on the device and takes its turn of
some steps when the others wait; a turn ends when the device is done.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from turns import Table, options_of

SWITCHES = ("channels_last", "uint8_inputs", "copy_stream", "fused_optimizer", "tf32")
CLASSES = 1000


class Sizes(NamedTuple):
    """What is trained."""

    model: str
    batch: int
    side: int
    """Pixels."""
    steps: int
    """In a turn."""
    warm: int
    """Steps before the first turn."""
    samples: int
    workers: int


ON_GPU = Sizes("resnet50", 96, 224, 20, 12, 768, 6)
ON_CPU = Sizes("resnet50", 8, 64, 2, 2, 64, 0)
QUICK = Sizes("resnet18", 4, 32, 2, 2, 16, 0)


class Images:
    """Images of bytes in memory."""

    classes = tuple(map(str, range(CLASSES)))

    def __init__(self, samples: int, side: int):
        import torch

        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8, generator=generator)
        self._labels = torch.randint(0, CLASSES, (samples,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self._images[number], self._labels[number]


# --------------------------------------------------------------------------------------------------------------------
# Subjects, each in a process of its own


class Turns:
    """Waits for a turn, and reports how long it took, over the pipes of this process."""

    def __init__(self, sizes: Sizes):
        self._sizes, self._step, self._began = sizes, 0, 0.0
        # what is printed otherwise is not for the one who measures
        self._report = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def before_step(self) -> None:
        """Call before each step."""
        done = self._step - self._sizes.warm
        if done >= 0 and done % self._sizes.steps == 0:
            self._wait_for_device()
            took = time.perf_counter() - self._began if done else None
            print(json.dumps({"seconds": took}), file=self._report, flush=True)
            if not sys.stdin.readline():
                os._exit(0)  # nobody measures any more
            self._began = time.perf_counter()
        self._step += 1

    @staticmethod
    def _wait_for_device() -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def run_bare(sizes: Sizes, library: str, layout: str, *flags: str) -> None:
    """A loop as PyTorch's documentation shows it."""
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.backends.cudnn.benchmark = "benchmark" in flags
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(sizes.model, num_classes=CLASSES)
    else:
        import torchvision

        model = getattr(torchvision.models, sizes.model)(num_classes=CLASSES)
    model = model.to(device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = Images(2 * sizes.batch, sizes.side)
    host = [torch.stack([data[index][0] for index in range(part, 2 * sizes.batch, 2)]) for part in (0, 1)]
    labels = [torch.tensor([data[index][1] for index in range(part, 2 * sizes.batch, 2)]) for part in (0, 1)]
    if device.type == "cuda":
        host, labels = ([each.pin_memory() for each in tensors] for tensors in (host, labels))
    turns, step = Turns(sizes), 0
    while True:
        turns.before_step()
        images, target = (each[step % 2].to(device, non_blocking=True) for each in (host, labels))
        images = images.to(memory_format=memory_format).float().div_(255)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = functional.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            loss.item()


def run_distrain(sizes: Sizes, *overrides: str) -> None:
    """distrain as `distrain train` starts it."""
    from distrain import Callback
    from distrain.launchers import work

    turns = Turns(sizes)

    class Waits(Callback):
        asks = False

        def on_step_start(self, step: int) -> None:
            turns.before_step()

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            "name: images\ntask: classification\n"
            f"data: {{name: '{Path(__file__).resolve()}:Images', samples: {sizes.samples}, side: {sizes.side}, "
            f"split: [0.75, 0.25], workers: {sizes.workers}}}\n"
            f"model: {{name: 'torchvision.models:{sizes.model}', num_classes: {CLASSES}}}\n"
            "optim: {name: sgd, lr: 0.05, momentum: 0.9}\n"
            f"batch: {{global: {sizes.batch}, micro: {sizes.batch}}}\ntrain: {{steps: 1000000}}\n"
            "eval: {every: null}\ncheckpoint: {every: null}\nlog: {every: 10 steps}\n"
        )
        status = work(str(recipe), overrides, run_dir=f"{folder}/run", callbacks=[Waits()])
    sys.exit(status or 1)  # it trains as long as somebody measures


# --------------------------------------------------------------------------------------------------------------------
# Running them


class Subject:
    """A process that takes turns."""

    def __init__(self, arguments: list[str], size: str, *, gpu: bool):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
        self._arguments, self._errors = arguments, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--size", size, "--subject", *arguments],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def report(self) -> float:
        """Return how many seconds its turn took; 0.0 when it is ready for the first."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._errors.seek(0)
            raise SystemExit(f"{' '.join(self._arguments)} ended:\n{self._errors.read()[-3000:]}")
        return float(json.loads(line)["seconds"] or 0.0)

    def turn(self, images: int) -> float:
        """Let it take a turn of so many images; returns images a second."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return images / self.report()

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def main() -> None:
    """Measure and print a table; or, with --subject, be one of the measured processes."""
    parser = options_of(__doc__)
    parser.add_argument("--size", choices=("gpu", "cpu", "quick"), help=argparse.SUPPRESS)
    parser.add_argument("--subject", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    size = a.size or ("quick" if a.quick else "gpu" if a.gpu else "cpu")
    sizes = {"gpu": ON_GPU, "cpu": ON_CPU, "quick": QUICK}[size]
    if a.subject:
        import torch

        torch.set_num_threads(1)
        (run_distrain if a.subject[0] == "distrain" else run_bare)(
            sizes, *(a.subject[1:] if a.subject[0] == "distrain" else a.subject)
        )
    subjects = {
        "bare, NCHW": ["torchvision", "nchw"],
        "bare, channels last": ["torchvision", "channels_last"],
        "distrain": ["distrain"],
    }
    if a.gpu:
        subjects["bare, channels last, cudnn.benchmark"] = ["torchvision", "channels_last", "benchmark"]
        if importlib.util.find_spec("timm"):
            subjects["timm, channels last"] = ["timm", "channels_last"]
        if not a.quick:  # which runs without a GPU as well
            subjects["distrain, cudnn_benchmark: true"] = ["distrain", "tune.cudnn_benchmark=true"]
        subjects |= {f"distrain, {key}: false": ["distrain", f"tune.{key}=false"] for key in SWITCHES}
    else:
        subjects["distrain, channels_last: true"] = ["distrain", "tune.channels_last=true"]
    table = Table(
        f"{sizes.model} on {sizes.batch} images of {sizes.side}²",
        "images/s",
        lower_is_better=False,
        digits=0 if a.gpu else 1,
    )
    processes = {name: Subject(arguments, size, gpu=a.gpu) for name, arguments in subjects.items()}
    try:
        for process in processes.values():
            process.report()
        images = sizes.batch * sizes.steps
        measured = {name: functools.partial(process.turn, images) for name, process in processes.items()}
        goals = {"distrain": 1.0} if a.gpu else {}
        table.measure(measured, base="bare, channels last", rounds=1 if a.quick else a.rounds, goals=goals)
    finally:
        for process in processes.values():
            process.end()
    table.save(a.save)


if __name__ == "__main__":
    main()
