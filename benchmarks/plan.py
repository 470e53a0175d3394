"""Predicted memory of `distrain plan` beside what processes take, and beside what `accelerate estimate-memory` says.

    python benchmarks/plan.py [--quick] [--strategies ddp zero1 …] [--save benchmarks/results/plan.md]

Each case trains three steps in a world of two processes on CPUs over gloo. Measured is by how much the resident memory
of a process rises while it builds and trains: its high-water mark (VmHWM, begun anew for each case) above what it was
after a step of the same recipe with a micro-batch of two, so that libraries are there already; of the two ranks the
larger one. glibc is told to give back what is freed. Predicted are the plan's parts but those of a GPU alone.

`accelerate estimate-memory` knows a model's parameters alone, no strategy, batch or sequence: its figure for training
with Adam is the largest of those that its own function returns for the same model and precision.

On one H200 steps of distrain were measured before (results/h200-before.md); the second table has them beside what a
plan says of the same recipes, traced here without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from turns import Table, in_processes, options_of

RECIPES = {
    "mlp": """
data: {name: digits, split: [0.9, 0.1]}
task: classification
model: {name: mlp, hidden: [2560, 2560, 2560]}
batch: {global: 512, micro: 256}
""",
    "resnet": """
data: {name: digits, split: [0.9, 0.1]}
task: classification
model: {name: resnet18}
batch: {global: 128, micro: 64}
""",
    "vit": """
data: {name: digits, split: [0.9, 0.1], transforms: {train: [{name: Resize, size: [64, 64]}],
                                                     eval: [{name: Resize, size: [64, 64]}]}}
task: classification
model: {name: "timm:vit_tiny_patch16_224", img_size: 64}
batch: {global: 64, micro: 32}
""",
    "gpt": """
data: {name: python_source, seq_len: 128, max_bytes: 100_000, split: [0.9, 0.1]}
task: language_modeling
model: {name: gpt, n_layer: 6, n_head: 8, d_model: 512}
batch: {global: 16, micro: 8}
""",
}
COMMON = """
name: plan
optim: {name: adamw, lr: 1.0e-3, weight_decay: 0.05, clip_norm: 1.0}
train: {steps: 100, precision: PRECISION}
eval: {every: null}
checkpoint: {every: null, async: false}
"""
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RANKS = 2
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
"""Has the C library give back what is freed, so that resident memory is what is in use."""


def worker(strategy: str, folder: Path, labels: list[str]) -> dict[str, Any]:
    """Make three steps of each recipe, as one rank; returns the bytes that memory rises by label."""
    import torch

    from distrain.config.yaml import load_recipe
    from distrain.launchers import open_run
    from distrain.loop import train_step
    from distrain.parallel import StrategySpec, open_world
    from distrain.parallel.precision import resolve
    from distrain.run.folder import Launch, RunDir
    from distrain.training.run_loop import Session

    torch.set_num_threads(1)
    world = open_world("fp32", StrategySpec(strategy))

    def train(label: str, steps: int, *overrides: str) -> None:
        run, loaded = RunDir(folder / f"run-{label}-{steps}"), load_recipe(folder / f"{label}.yaml", overrides)
        world.run_on_rank0(lambda: open_run(run, loaded, Launch.describe(world.world_size, strategy)))
        world.mixed_precision = resolve(loaded.recipe.train.precision, world.device)
        world.precision = world.mixed_precision.name
        with Session.open(run, load_recipe(run.recipe_path).recipe, world, built_in=()) as session:
            batches = session.batches()
            for _ in range(steps):
                train_step(session.t, next(batches)).read()
            batches.close()  # type: ignore[attr-defined]

    found: dict[str, Any] = {}
    for label in labels:
        train(label, 1, f"batch.global={2 * RANKS}", "batch.micro=2")  # what is imported late is there from now on
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        train(label, 3)
        found[label] = resident("VmHWM") - before
    world.close()
    return found


def resident(name: str) -> int:
    """Return a size of this process's status in bytes, with what was freed given back first."""
    if name == "VmRSS":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def measured(strategy: str, labels: list[str], folder: Path) -> dict[str, int]:
    """Return the largest peak of two ranks for each recipe."""
    given = json.dumps({"strategy": strategy, "labels": labels})
    ranks = in_processes(__file__, ["--worker", given, "--folder", str(folder)], world_size=RANKS, **MALLOC)
    return {label: max(each[label] for each in ranks) for label in labels}


def planned(folder: Path, label: str) -> tuple[dict[str, int], int]:
    """Return the bytes that are predicted for each strategy, and the bytes of `accelerate estimate-memory`."""
    from accelerate.commands.estimate import estimate_training_usage

    from distrain.config.yaml import load_recipe
    from distrain.plan.gpus import Gpu
    from distrain.plan.planning import make_plan

    here = Gpu("cpu", 1e3, {"fp32": 0.1, "half": 0.1}, 10, 3, 1, bf16=False)
    plan = make_plan(load_recipe(folder / f"{label}.yaml").recipe, here, 1, RANKS)
    name = {"fp32": "float32", "bf16": "bfloat16"}[plan.precision]
    usage = estimate_training_usage(plan.model.nbytes + plan.model.buffer_bytes, name)
    found = {each.strategy: each.memory.allocated for each in plan.options if not each.checkpointing}
    return found, max(usage.values())


def add_cases(table: Table, cases: dict[str, dict[str, int]], folder: Path) -> None:
    """Add a row for each case {strategy: {model-precision: measured bytes}}."""
    table.lines += [
        "",
        f"### Memory of a process, {RANKS} processes on CPUs, MiB",
        "",
        "| model | precision | strategy | measured | predicted | error | estimate-memory | its error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors, others = [], []
    plans = {label: planned(folder, label) for label in sorted({each for labels in cases.values() for each in labels})}
    for label, (predicted, estimate) in plans.items():
        model, precision = label.split("-")
        for strategy, labels in cases.items():
            if (taken := labels.get(label)) is None:
                continue
            errors.append(predicted[strategy] / taken - 1)
            others.append(estimate / taken - 1)
            sizes = [f"{each / 2**20:,.0f}" for each in (taken, predicted[strategy], estimate)]
            table.lines.append(
                f"| {model} | {precision} | {strategy} | {sizes[0]} | {sizes[1]} | {errors[-1]:+.0%} | {sizes[2]} | "
                f"{others[-1]:+.0%} |"
            )
    for name, found in (("distrain plan", errors), ("accelerate estimate-memory", others)):
        sizes = [abs(each) for each in found]
        table.note(
            f"{name}: {len(found)} cases, error {statistics.median(sizes):.0%} (median), {max(sizes):.0%} (worst)."
        )


H200 = {
    # (n_layer, n_head, d_model), samples of 1,024 tokens, compiled: GiB and ms as measured
    "GPT-2 124M, eager, 4 x 1024": ((12, 12, 768), 4, False, 5.37, 25.10),
    "GPT-2 124M, eager, 8 x 1024": ((12, 12, 768), 8, False, 9.04, 29.25),
    "GPT-2 124M, compiled, 12 x 1024": ((12, 12, 768), 12, True, 12.47, 32.28),
    "GPT-2 350M, compiled, 4 x 1024": ((24, 16, 1024), 4, True, 10.40, 45.75),
}
GPT = """
name: plan
task: language_modeling
data: {{name: python_source, seq_len: 1024, max_bytes: 3_000_000, split: [0.95, 0.05]}}
model: {{name: gpt, n_layer: {0}, n_head: {1}, d_model: {2}, vocab_size: 50304}}
optim: {{name: adamw, lr: 6.0e-4, clip_norm: 1.0}}
batch: {{global: {samples}, micro: {samples}}}
train: {{steps: 100, precision: bf16, compile: {compiled}}}
tune: {{chunked_loss: false}}
"""
RESNET50 = """
name: plan
task: classification
data: {name: digits, split: [0.9, 0.1], transforms: {train: [{name: Resize, size: [224, 224]}, {name: RGB}],
                                                     eval: [{name: Resize, size: [224, 224]}, {name: RGB}]}}
model: {name: resnet50, num_classes: 1000}
optim: {name: sgd, lr: 0.05, momentum: 0.9}
batch: {global: 96, micro: 96}
train: {steps: 100, precision: bf16}
"""
MLP = """
name: plan
task: classification
data: {name: digits, split: [0.9, 0.1]}
model: {name: mlp, hidden: [64, 64]}
optim: {name: adamw, lr: 1.0e-3, clip_norm: 1.0}
batch: {global: 32, micro: 32}
train: {steps: 100, precision: fp32}
"""


def add_gpu(table: Table) -> None:
    """Add a row for each step that was measured on an H200, as it was then: without chunks of logits."""
    from distrain.config.yaml import parse_recipe
    from distrain.plan.gpus import GPUS
    from distrain.plan.planning import make_plan

    recipes = {
        name: (GPT.format(*shape, samples=samples, compiled=str(compiled).lower()), gib, ms)
        for name, (shape, samples, compiled, gib, ms) in H200.items()
    }
    recipes["ResNet-50, 96 x 224 x 224, channels last (a bare loop)"] = RESNET50, 4.33, 25.12
    recipes["64-64-64-10, fp32, 32 samples"] = MLP, 0.06, 2.50
    table.lines += [
        "",
        "### One H200: peak of torch's allocator, GiB, and the time of a step, ms",
        "",
        "| | measured | predicted | error | measured ms | predicted ms | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (text, gib, ms) in recipes.items():
        option = make_plan(parse_recipe(text, name), GPUS["h200"]).options[0]
        memory, seconds = option.memory.allocated / 2**30, option.time.total * 1e3
        table.lines.append(
            f"| {name} | {gib:.2f} | {memory:.2f} | {memory / gib - 1:+.0%} | {ms:.1f} | {seconds:.1f} | "
            f"{seconds / ms - 1:+.0%} |"
        )
    table.note("The efficiencies of timing.py were set by these steps; other GPUs, and links, were not measured.")


def write_recipes(folder: Path) -> list[str]:
    """Write the recipe of each model and precision; returns their names."""
    labels = [f"{model}-{precision}" for model in RECIPES for precision in ("fp32", "bf16")]
    for label in labels:
        model, _, precision = label.partition("-")
        (folder / f"{label}.yaml").write_text(RECIPES[model] + COMMON.replace("PRECISION", precision))
    return labels


def main() -> None:
    """Measure and print the tables; or, with --worker, be one of the measured processes."""
    parser = options_of(__doc__)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asked = json.loads(options.worker)
        with contextlib.redirect_stdout(io.StringIO()):
            found = worker(asked["strategy"], options.folder, asked["labels"])
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = write_recipes(folder)
        cases = {
            # each model once in each precision, over the strategies
            strategy: measured(strategy, ["mlp-fp32"] if options.quick else labels[place % 2 :: 2], folder)
            for place, strategy in enumerate(options.strategies)
        }
        table = Table("Predicted memory and time", "MiB")
        add_cases(table, cases, folder)
        if not options.quick:
            add_gpu(table)
        table.save(options.save)


if __name__ == "__main__":
    main()
