"""How much memory each process needs under each strategy, beside what its share of the state is in theory.

    python benchmarks/sharding.py [--processes 2 4] [--strategies ddp zero1 …] [--save benchmarks/results/sharding.md]

A `gpt` of 57 M parameters in fp32 (227 MB) trains with AdamW on CPUs. What counts is the anonymous part of a
process's resident memory (RssAnon: without the pages of libraries and files), read every 2 ms by a thread of the
process, above what it was when the processes had found each other. The largest of the ranks is shown:

    build   the highest while the model, the optimizer and the engine are made
    step    the highest during the first three steps, at which the optimizer's state comes into being
    held    what is left between two steps
    save    the highest while a checkpoint is written (`checkpoint.async: false`)

glibc's allocator is told to give back what is freed (MALLOC_MMAP_THRESHOLD_), so that figures are of what is in use:
left alone it keeps what blocks of up to 32 MB have left behind, under every strategy.

Theory: parameters, the optimizer's two moments and gradients, each whole (1) or shared (1/W):

    single, ddp   1 + 2 + 1                    zero1   1 + 1/W + 2/W + 1
    fsdp2         1/W + 2/W + 1/W              zero2   1 + 1/W + 2/W + 1/W
                                               zero3   1/W + 1/W + 2/W + 1/W

DeepSpeed holds what it trains beside what computes, also where both are fp32: hence a share of parameters more.
ZeRO-1 and 2 reach the same height on CPUs, in gathering the weights after the optimizer's step: gloo needs room for all
of them once more, which is as much as the gradients that ZeRO-2 has let go of by then. Stage 3 keeps room for a rank's
gradients between steps. Every figure has
some 20 MB in it that do not grow with the model, and 60 MB under DeepSpeed, of libraries that are imported late.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
PHASES = ("build", "step", "held", "save")
RECIPE = """
name: sharding
task: language_modeling
data: {{name: python_source, seq_len: 16, max_bytes: 20_000, split: [0.9, 0.1]}}
model: {{name: gpt, n_layer: {n_layer}, n_head: 8, d_model: {d_model}}}
optim: {{name: adamw, lr: 1.0e-3, clip_norm: 1.0}}
schedule: constant
batch: {{global: {batch}, micro: 1}}
train: {{steps: 100, precision: fp32}}
eval: {{every: null}}
checkpoint: {{every: 100 steps, async: false}}
"""


def anonymous() -> int:
    """Bytes of this process's anonymous memory that are resident."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


class Peaks:
    """The highest anonymous memory in each phase, above what it was at the start."""

    def __init__(self) -> None:
        self.phase, self.start = "", anonymous()
        self.bytes: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.note()

    def note(self) -> None:
        """Read now."""
        phase = self.phase
        self.bytes[phase] = max(self.bytes.get(phase, 0), anonymous() - self.start)

    def stop(self) -> dict[str, int]:
        """Return the bytes of each phase."""
        self._stop.set()
        self._thread.join()
        return self.bytes


def train(strategy: str, offload: str, run_dir: str, recipe: str) -> dict[str, Any]:
    """Build, make three steps and save, as one rank; returns bytes by phase, and what took effect."""
    import torch

    from distrain.config.yaml import load_recipe
    from distrain.launchers import open_run
    from distrain.loop import train_step
    from distrain.parallel import StrategySpec, open_world
    from distrain.run.folder import Launch, RunDir
    from distrain.training.run_loop import Session

    if strategy == "fsdp2":
        import distrain.parallel.fsdp2
    elif strategy.startswith("zero"):
        import distrain.parallel.zero  # noqa: F401
    torch.set_num_threads(1)
    asked = StrategySpec(strategy, offload_optimizer=offload != "none", offload_parameters=offload == "all")
    world = open_world("fp32", asked)
    run = RunDir(run_dir)
    world.run_on_rank0(lambda: open_run(run, load_recipe(Path(recipe)), Launch.describe(world.world_size, strategy)))
    # reductions allocate what they need at their first use
    world.sum(torch.zeros(1 << 16))
    peaks = Peaks()
    peaks.phase = "build"
    with Session.open(run, load_recipe(run.recipe_path).recipe, world, built_in=()) as session:
        peaks.phase = "step"
        batches = session.batches()
        for micro_batches in batches:
            numbers = train_step(session.t, micro_batches)
            numbers.read()
            if session.t.step == 3:
                break
        peaks.phase = "held"
        time.sleep(0.02)
        peaks.phase = "save"
        session.checkpoints.save()
        peaks.phase = ""
        effect = session.t.strategy.effect()
        batches.close()  # type: ignore[attr-defined]
    found = peaks.stop()
    world.close()
    return {"peaks": {phase: found[phase] for phase in PHASES}, "effect": effect}


# --------------------------------------------------------------------------------------------------------------------
# Running them


def measure(strategy: str, world_size: int, options: argparse.Namespace) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the largest bytes of a rank in each phase, and what took effect."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE.format(n_layer=options.n_layer, d_model=options.d_model, batch=world_size))
        workers = []
        for rank in range(world_size):
            variables = os.environ | {
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": str(2**17),
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            command = [sys.executable, __file__, "--rank-of", strategy, "--folder", folder]
            command += ["--offload", options.offload]
            workers.append(
                subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        outputs = [worker.communicate(timeout=600) for worker in workers]
        for worker, (_, errors) in zip(workers, outputs, strict=True):
            if worker.returncode != 0:
                raise SystemExit(f"{strategy} failed:\n{errors[-3000:]}")
    found = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    return {phase: max(rank["peaks"][phase] for rank in found) for phase in PHASES}, found[0]["effect"]


def theory(strategy: str, world_size: int, parameter_bytes: int) -> float:
    """Return the bytes of parameters, optimizer state and gradients on a rank."""
    share = 1 / world_size
    shares = {"zero1": 2 + 3 * share, "zero2": 1 + 4 * share, "zero3": 5 * share, "fsdp2": 4 * share}
    return shares.get(strategy, 4.0) * parameter_bytes


def main() -> None:
    """Measure and print a table; or, with --rank-of, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--n-layer", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--offload", choices=("none", "optimizer", "all"), default="none")
    parser.add_argument("--folder", help="where to work, in a temporary folder that is removed (default: the system's)")
    parser.add_argument("--save", type=Path, help="also write the table here")
    parser.add_argument("--rank-of", choices=STRATEGIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        with contextlib.redirect_stdout(io.StringIO()):
            run_dir, recipe = f"{options.folder}/run", f"{options.folder}/recipe.yaml"
            found = train(options.rank_of, options.offload, run_dir, recipe)
        print(json.dumps(found))
        return
    rows, size = [], 0
    for strategy in options.strategies:
        for world_size in [1] if strategy == "single" else options.processes:
            peaks, effect = measure(strategy, world_size, options)
            size = effect["parameter_bytes"]["full"]
            expected = theory(strategy, world_size, size)
            cells = [strategy, str(world_size), f"{expected / 1e6:,.0f}"]
            rows.append(cells + [f"{peaks[phase] / 1e6:,.0f}" for phase in PHASES])
            print(" ".join(rows[-1]), file=sys.stderr)
    lines = [
        f"Anonymous memory of a process, MB: a model of {size / 4e6:.0f} M parameters in fp32 ({size / 1e6:,.0f} MB), "
        "AdamW; the largest of the ranks.",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", "deepspeed"))
        + f", gloo, {time.strftime('%Y-%m-%d')}.",
        "",
        "| strategy | processes | theory | " + " | ".join(PHASES) + " |",
        "|---|---|---|" + "---|" * len(PHASES),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    print("\n".join(lines))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
