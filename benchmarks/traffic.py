"""What the ranks send each other in a step: counted for each strategy beside theory, and the time of a step of fsdp2.

    python benchmarks/traffic.py [--rounds 5] [--quick] [--save FILE]

A `gpt` trains on CPUs over gloo. Counted are the calls of torch.distributed that rank 0 makes in a step once the first
ones are past, with the bytes that a rank sends where each group is a ring: of a tensor that N ranks gather or
reduce-scatter (N-1)/N, of one that they all-reduce twice that. `Case.theory` has the formulas, which tests hold to the
byte. Then fsdp2 under bf16 with four accumulated micro-batches takes turns with itself as it is without its savings
(`tune.cast_before_gather: false`, `tune.reduce_every_micro: true`), in the same two processes: the time of a step, and
how far anonymous memory rises in it. A machine's memory is a far faster network than any, so that the time shows least.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from turns import Table, in_processes, options_of

from distrain.plan.traffic import Case, Collective, Parameter

# --------------------------------------------------------------------------------------------------------------------
# Counting

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """Notes the collectives that this thread calls, in their order; those of a backward pass on CPUs too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            leaves = torch.utils._pytree.tree_leaves(args)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            group = next(each for each in objects if "ProcessGroup" in str(each._type()))
            nbytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            several = name in ("allreduce_", "broadcast_")
            self.calls.append(
                Collective(
                    KINDS.get(name, name),
                    sum(nbytes) if several else max(nbytes, default=0),
                    dist.ProcessGroup.unbox(group).size(),
                    str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
                )
            )
        return func(*args, **(kwargs or {}))


def by_kind(calls: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Return how many collectives there were of each kind, and their bytes."""
    found: dict[str, tuple[int, int]] = {}
    for call in calls:
        count, nbytes = found.get(call.kind, (0, 0))
        found[call.kind] = count + 1, nbytes + call.nbytes
    return found


# --------------------------------------------------------------------------------------------------------------------
# Measuring

RANKS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2, "hsdp": 4}
CASES = {"fp32 x 1": ("fp32", 1), "fp32 x 4": ("fp32", 4), "bf16 x 1": ("bf16", 1), "bf16 x 4": ("bf16", 4)}
"""Precision, and micro-batches of a step."""
SAVINGS = {
    "without": {"cast_before_gather": "false", "reduce_every_micro": "true"},
    "with": {"cast_before_gather": "auto", "reduce_every_micro": "auto"},
}
RECIPE = """
name: traffic
task: language_modeling
data: {{name: python_source, seq_len: 32, max_bytes: 20_000, split: [0.9, 0.1]}}
model: {{name: gpt, n_layer: {n_layer}, n_head: 8, d_model: 256}}
optim: {{name: adamw, lr: 1.0e-3, weight_decay: 0.1, clip_norm: 1.0}}
batch: {{global: {batch}, micro: 2}}
train: {{steps: 100, precision: {precision}}}
tune: {{{tune}}}
eval: {{every: null}}
checkpoint: {{every: null, async: false}}
"""


def units_of(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[list[Parameter]]:
    """Return the parameters of a `gpt`, first those in no block; its linear layers are what is only cast."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    units: dict[str, list[Parameter]] = {"": []}
    for name, shape in shapes.items():
        found = re.search(r"blocks\.(\d+)\.", name)
        parameter = Parameter(shape, cast=name.rpartition(".")[0] in linear)  # the tied head is the embedding's
        units.setdefault(found[1] if found else "", []).append(parameter)
    return list(units.values())


def worker(strategy: str, folder: Path, precisions: dict[str, str], steps: int) -> dict[str, Any]:
    """Make steps of each recipe in the folder, as one rank; returns {name: {calls, theory, seconds, peak}}."""
    from sharding import Peaks

    from distrain.config.yaml import load_recipe
    from distrain.launchers import open_run
    from distrain.loop import train_step
    from distrain.parallel import StrategySpec, open_world
    from distrain.parallel.precision import resolve
    from distrain.run.folder import Launch, RunDir
    from distrain.training.run_loop import Session

    torch.set_num_threads(1)
    name = "fsdp2" if strategy == "hsdp" else strategy
    world = open_world("fp32", StrategySpec(name, replicate=2 if strategy == "hsdp" else 1))
    found: dict[str, Any] = {}
    for label, precision in precisions.items():
        run, loaded = RunDir(folder / f"run-{label}"), load_recipe(folder / f"{label}.yaml")
        world.run_on_rank0(
            lambda run=run, loaded=loaded: open_run(run, loaded, Launch.describe(world.world_size, name))
        )
        world.mixed_precision = resolve(precision, world.device)
        world.precision = world.mixed_precision.name
        with Session.open(run, load_recipe(run.recipe_path).recipe, world, built_in=()) as session:
            batches, seconds, peaks = session.batches(), [], None
            for step in range(3 + steps):
                if step == 3:
                    peaks = Peaks()
                micro_batches = next(batches)
                began = time.perf_counter()
                with Collectives() if step == 2 else contextlib.nullcontext() as counter:
                    train_step(session.t, micro_batches).read()
                if counter is not None:
                    calls = counter.calls
                seconds.append(time.perf_counter() - began)
            peak = max(peaks.stop().values()) if peaks is not None else 0
            engine = session.t.strategy
            named = dict(engine.model.named_parameters())
            shapes = {key: tuple(engine.shard(parameter).shape) for key, parameter in named.items()}
            case = Case(
                strategy, world.world_size, units_of(engine.model, shapes), engine.accumulation,
                autocast=precision == "bf16",
            )  # fmt: skip
            found[label] = {
                "count": len(calls),
                "sent": sum(call.sent for call in calls),
                "theory": case.sent(),
                "seconds": statistics.median(seconds[3:]) if steps else 0.0,
                "peak": peak,
            }
            batches.close()  # type: ignore[attr-defined]
    world.close()
    return found


def run_workers(
    strategy: str, ranks: int, recipes: dict[str, tuple[str, int, dict[str, str]]], steps: int, *, small: bool
) -> dict[str, Any]:
    """Return what rank 0 found of recipes {label: (precision, micro-batches, tune)}, all in one world."""
    with tempfile.TemporaryDirectory() as folder:
        for label, (precision, times, tune) in recipes.items():
            text = RECIPE.format(
                n_layer=2 if small else 6, batch=2 * ranks * times, precision=precision,
                tune=", ".join(f"{key}: {value}" for key, value in tune.items()),
            )  # fmt: skip
            Path(folder, f"{label}.yaml").write_text(text)
        precisions = {label: precision for label, (precision, *_) in recipes.items()}
        given = json.dumps({"strategy": strategy, "precisions": precisions, "steps": steps})
        return in_processes(__file__, ["--worker", given, "--folder", folder], world_size=ranks)[0]


def main() -> None:
    """Measure and print the tables; or, with --worker, be one of the measured processes."""
    parser = options_of(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asked = json.loads(options.worker)
        with contextlib.redirect_stdout(io.StringIO()):
            found = worker(asked["strategy"], options.folder, asked["precisions"], asked["steps"])
        print(json.dumps(found))
        return
    lines = [
        "",
        "### Sent by a rank in a step, MB (theory), and collectives",
        "",
        "| strategy | processes | " + " | ".join(CASES) + " |",
        "|---|---|" + "---|" * len(CASES),
    ]
    for strategy, ranks in RANKS.items():
        recipes = {label: (precision, times, {}) for label, (precision, times) in CASES.items()}
        found = run_workers(strategy, ranks, recipes, 0, small=True)
        cells = [f"{each['sent'] / 1e6:.2f} ({each['theory']}), {each['count']}" for each in found.values()]
        lines.append(f"| {strategy} | {ranks} | {' | '.join(cells)} |")
    rounds = 2 if options.quick else options.rounds
    recipes = {
        f"{label} {turn}": ("bf16", 4, tune)
        for turn in range(rounds)
        for label, tune in (SAVINGS.items() if turn % 2 else reversed(SAVINGS.items()))
    }
    found = run_workers("fsdp2", 2, recipes, 2 if options.quick else 4, small=options.quick)
    table = Table("What the ranks send each other", "ms a step")
    table.lines = lines
    ordered = {label: [found[f"{label} {turn}"] for turn in range(rounds)] for label in SAVINGS}
    times = {label: [each["seconds"] * 1e3 for each in turns] for label, turns in ordered.items()}
    table.add(times, base="without", title="fsdp2 under bf16, four micro-batches, with and without its savings")
    for label, turns in ordered.items():
        peak = statistics.median(each["peak"] for each in turns)
        table.note(
            f"{label}: {turns[0]['sent'] / 1e6:.0f} MB sent in {turns[0]['count']} collectives; memory rises by "
            f"{peak / 1e6:.0f} MB in a step."
        )
    table.save(options.save)


if __name__ == "__main__":
    main()
