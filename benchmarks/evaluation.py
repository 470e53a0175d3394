"""What it takes the processes to bring their metrics together at the end of an evaluation: distrain and torchmetrics.

    python benchmarks/evaluation.py [--processes 2 4] [--rounds 7] [--quick] [--save FILE]

Five metrics of 10 classes (accuracy, macro F1, macro precision and recall, the confusion matrix) hold what a batch gave
them. The processes talk over gloo, with one thread each, and the subjects take turns in the same processes:

    one all_reduce        of as many numbers as distrain sends: the limit
    distrain              `World.sum_of_all` of the sums, as `evaluate` calls it: the metrics, the loss and its count,
                          the ids that were seen, and whether a rank has failed
    distrain, values      the same, and the values of the metrics from it
    torchmetrics          `sync` of each metric
    torchmetrics, values  `compute` of a collection of the metrics, which synchronises them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from turns import Table, in_processes, in_turns, options_of

CLASSES, SAMPLES = 10, 256
GOAL = 0.1


def _metrics() -> Any:
    from distrain.config import Recipe
    from distrain.datasets.base import DataMeta
    from distrain.metrics import build_metrics

    names = ["accuracy", "f1_macro", "precision_macro", "recall_macro", "confusion_matrix"]
    recipe = {
        "name": "evaluation", "task": "classification", "data": "digits", "model": "mlp", "batch": {"global": 1},
        "train": {"steps": 1}, "eval": {"metrics": names},
    }  # fmt: skip
    return build_metrics(Recipe.model_validate(recipe), DataMeta(num_classes=CLASSES))


def _torchmetrics() -> Any:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassConfusionMatrix,
        MulticlassF1Score,
        MulticlassPrecision,
        MulticlassRecall,
    )

    kinds = [MulticlassF1Score, MulticlassPrecision, MulticlassRecall]
    made = [MulticlassAccuracy(CLASSES, average="micro"), *(kind(CLASSES) for kind in kinds)]
    return MetricCollection([*made, MulticlassConfusionMatrix(CLASSES)])


def measure(rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of each subject in each round, as this process sees them. All processes call."""
    import torch
    import torch.distributed as dist

    from distrain.parallel import open_world
    from distrain.parallel.comm import AT_ONCE

    torch.set_num_threads(1)
    world = open_world("fp32")
    generator = torch.Generator().manual_seed(world.rank)
    logits = torch.randn(SAMPLES, CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    ours, theirs = _metrics(), _torchmetrics()
    ours.update(logits, targets)
    theirs.update(logits, targets)
    numbers, loss_and_seen = torch.zeros(AT_ONCE + 1, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)

    def summed() -> torch.Tensor:
        return world.sum_of_all(lambda: torch.cat((loss_and_seen, ours.sums())))

    def synchronised() -> None:
        for metric in theirs.values(copy_state=False):
            metric.sync()
            metric.unsync()

    def computed() -> Any:
        for metric in theirs.values(copy_state=False):
            metric._computed = None  # it would answer from the last time
        return theirs.compute()

    subjects: dict[str, Callable[[], Any]] = {
        "one all_reduce": lambda: dist.all_reduce(numbers),
        "distrain": summed,
        "distrain, values": lambda: ours.compute(summed()[6:]),
        "torchmetrics": synchronised,
        "torchmetrics, values": computed,
    }
    values, wanted = ours.compute(summed()[6:]), computed()
    assert abs(values["accuracy"] - float(wanted["MulticlassAccuracy"])) < 1e-6
    assert values["confusion_matrix"] == wanted["MulticlassConfusionMatrix"].tolist()

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            dist.barrier()
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            return 1e3 * statistics.median(seconds)

        return once

    found = in_turns({name: timed(work) for name, work in subjects.items()}, rounds)
    world.close()
    return found


def main() -> None:
    """Measure and print a table; or, with --part, be one of the measured processes."""
    parser = options_of(__doc__, rounds=7)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.part:
        warnings.filterwarnings("ignore")
        print(json.dumps(measure(a.rounds, a.part)))
        return
    table = Table("Metrics of an evaluation, brought together", "ms", digits=2)
    rounds, repeats = (2, 3) if a.quick else (a.rounds, 6)
    for world_size in a.processes:
        arguments = ["--part", str(repeats), "--rounds", str(rounds)]
        found = in_processes(__file__, arguments, world_size=world_size)[0]
        goals = {"distrain": GOAL}
        table.add(found, base="torchmetrics", title=f"{world_size} processes on {_cores()} cores", goals=goals)
    table.save(a.save)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
