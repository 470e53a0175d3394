"""What the input costs: CIFAR-sized images into the loop, against plain copying and against torchvision one by one.

    python benchmarks/input.py [--rounds 7] [--seconds 0.5]

One thread, no loader processes, images of random bytes in memory; the time is that of the CPU, which other programs on
the machine disturb less. The subjects take turns, and each number is the median of the rounds:

    copying      rows of the uint8 array by index, and no more: the limit
    distrain     build_loader with RandomCrop(32, padding 4), RandomHorizontalFlip, ToDtype(float32), Normalize
    v2, batches  the same transforms of torchvision v2 on whole batches: one crop and one flip for a whole batch, which
                 is not the same augmentation
    v2, samples  the same transforms of torchvision v2 on one image after the other, and torch.stack
    step         build_loader on rows of 64 floats, batches of 32: microseconds for a step, where only overhead counts
    order        SampleOrder.at in blocks of 16384 for 10**12 samples
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torchvision.transforms import v2

from distrain.config import Recipe
from distrain.data import build_loader, build_transform
from distrain.datasets.base import TensorSource
from distrain.datasets.order import SampleOrder

BATCH = 256
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
TRANSFORMS = [
    {"name": "RandomCrop", "size": 32, "padding": 4},
    {"name": "RandomHorizontalFlip"},
    {"name": "ToDtype", "dtype": "float32", "scale": True},
    {"name": "Normalize", "mean": MEAN, "std": STD},
]


def recipe(global_batch_size: int, transforms: list[dict[str, Any]]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "input",
            "task": "classification",
            "data": {"name": "cifar10", "transforms": {"train": transforms}},
            "model": "resnet18",
            "batch": {"global": global_batch_size},
            "train": {"steps": 1},
        }
    )


def loader(source: TensorSource, made: Recipe) -> Iterator[Any]:
    size = made.batch.global_batch_size
    return build_loader(
        source,
        SampleOrder(len(source), made.seed),
        recipe=made,
        rank=0,
        world_size=1,
        micro_batch_size=size,
        transform=build_transform(made, "train"),
    )


def rate(work: Callable[[], Any], amount: int, seconds: float) -> float:
    """Return amounts per second of CPU time of `work`, repeated for about `seconds`."""
    work()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        work()
        count += 1
    return count * amount / (time.process_time() - start)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--seconds", type=float, default=0.5)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    source = TensorSource(images, torch.zeros(len(images), dtype=torch.int64))
    rows = TensorSource(torch.zeros(10_000, 64), torch.zeros(10_000, dtype=torch.int64))
    chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
    torchvision = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    augmented = loader(source, recipe(BATCH, TRANSFORMS))
    plain = loader(rows, recipe(32, []))
    order = SampleOrder(10**12, 0)
    subjects: dict[str, tuple[Callable[[], Any], int]] = {
        "copying": (lambda: images.index_select(0, chosen), BATCH),
        "distrain": (lambda: next(augmented), BATCH),
        "v2, batches": (lambda: torchvision(images.index_select(0, chosen)), BATCH),
        "v2, samples": (lambda: torch.stack([torchvision(images[index]) for index in chosen[:32].tolist()]), 32),
        "step": (lambda: [next(plain) for _ in range(100)], 100),
        "order": (lambda: order.at(10**13, 10**13 + 16384), 16384),
    }
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(options.rounds):
        for name, (work, amount) in subjects.items():
            found[name].append(rate(work, amount, options.seconds))
    median = {name: statistics.median(values) for name, values in found.items()}
    result = {
        f"{name}, images/s": round(median[name]) for name in ("copying", "distrain", "v2, batches", "v2, samples")
    } | {
        "distrain / copying": round(median["distrain"] / median["copying"], 3),
        "distrain / v2, batches": round(median["distrain"] / median["v2, batches"], 2),
        "distrain / v2, samples": round(median["distrain"] / median["v2, samples"], 1),
        "step, us": round(1e6 / median["step"], 1),
        "order, ids/s": round(median["order"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
