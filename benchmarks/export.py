"""How long a sharded checkpoint takes to become one file, and in how much memory, beside what others offer.

The model has GPT-2 medium's shapes in fp32 (355 M parameters, 1.4 GB at `--scale 1`) and random numbers. Ours is a
checkpoint of four rank files. The others get what `torch.distributed.checkpoint` writes from one process with four
threads (four `.distcp` files), which is the layout of an FSDP checkpoint of four ranks. Every command runs as a process
of its own, imports included, after the inputs were read once and the disk was synced. Memory is the highest resident
size and the highest anonymous part of it, which leaves out pages of libraries and files; both are sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distrain.checkpoint import Piece, Saver, TensorSpec

OURS = "import sys; from distrain.consolidate import export; export(sys.argv[1], sys.argv[2], {})"
DCP = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
ACCELERATE = """
import sys
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights(sys.argv[1], sys.argv[2])
"""
WRITE_DCP = """
import sys, warnings
warnings.simplefilter("ignore")
import safetensors.torch, torch.distributed.checkpoint as dcp
state = {"model": safetensors.torch.load_file(sys.argv[1])}
dcp.save(state, storage_writer=dcp.FileSystemWriter(sys.argv[2], thread_count=4), no_dist=True)
"""
RANKS = 4


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """Return GPT-2 medium's shapes, with `scale` of its 24 blocks and of its vocabulary."""
    width, found = 1024, {}
    found["wte.weight"], found["wpe.weight"] = (round(50257 * scale), width), (1024, width)
    for block in range(max(1, round(24 * scale))):
        for name, shape in {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.up.weight": (4 * width, width), "mlp.up.bias": (4 * width,),
            "mlp.down.weight": (width, 4 * width), "mlp.down.bias": (width,),
        }.items():  # fmt: skip
            found[f"h.{block}.{name}"] = shape
    return found


class Ranks:
    """A communicator for each of several threads."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any]):
        self.rank, self.world_size, self.barrier, self.slots = rank, world_size, barrier, slots

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def write_checkpoint(folder: Path, scale: float) -> Path:
    """Save the model as four ranks of FSDP would hold it: each tensor cut along its first dimension."""
    specs = {f"model/{name}": TensorSpec(shape, "F32", "parameter") for name, shape in shapes(scale).items()}
    noise = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    barrier, slots = threading.Barrier(RANKS), [None] * RANKS

    def rank(number: int) -> None:
        pieces = []
        for name, spec in specs.items():
            row = spec.numel // spec.shape[0]
            start, stop = (spec.shape[0] * r // RANKS * row for r in (number, number + 1))
            pieces.append(Piece(name, start, np.resize(noise, stop - start).view(np.uint8), copied=True))
        saver = Saver(folder, Ranks(number, RANKS, barrier, slots), asynchronous=False)
        saver.save(1, specs, pieces, scalars={}, aliases={}, recipe="", strategy="fsdp2")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folder / "step-00000001"


def measure(command: list[str], clean: Callable[[], None]) -> tuple[float, float, float]:
    """Return (seconds, resident MB, anonymous MB) of one run of the command."""
    clean()
    os.sync()
    resident = anonymous = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                sizes = {
                    key: int(value.split()[0])
                    for key, _, value in (line.partition(":") for line in file)
                    if "kB" in value
                }
        except ProcessLookupError:
            break
        resident, anonymous = max(resident, sizes.get("VmHWM", 0)), max(anonymous, sizes.get("RssAnon", 0))
        time.sleep(0.002)
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command[:3]} failed:\n{errors.decode()}")
    return seconds, resident * 1024 / 1e6, anonymous * 1024 / 1e6


def main() -> None:
    """Measure, print a table, and write it where `--save` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of GPT-2 medium (1.4 GB)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument("--folder", help="where to work, in a temporary folder that is removed (default: the system's)")
    parser.add_argument("--save", type=Path, help="a Markdown file to write the table to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        checkpoint = write_checkpoint(work / "ours", options.scale)
        rank_files = sorted(map(str, checkpoint.glob("*.safetensors")))
        one, out = work / "one.safetensors", work / "out"
        subprocess.run([sys.executable, "-c", OURS.format("sync=False"), str(checkpoint), str(one)], check=True)
        subprocess.run([sys.executable, "-c", WRITE_DCP, str(one), str(work / "dcp")], check=True)
        distcp = list((work / "dcp").glob("*.distcp"))

        def clean() -> None:
            for path in work.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def ours(arguments: str, target: Path = work / "out.safetensors") -> list[str]:
            return [sys.executable, "-c", OURS.format(arguments), str(checkpoint), str(target)]

        commands = {
            "`cat` of the rank files": ["sh", "-c", f"cat {' '.join(rank_files)} > {out}"],
            "`cp` of one file": ["cp", str(one), str(out)],
            "distrain": ours("sync=False"),
            "distrain, waiting for the disk": ours(""),
            "distrain, not verifying": ours("verify=False, sync=False"),
            "distrain, to bf16": ours("dtype='bf16', sync=False"),
            "DCP: `dcp_to_torch_save`": [sys.executable, "-c", DCP, str(work / "dcp"), str(out)],
            "Accelerate: `merge_fsdp_weights`": [sys.executable, "-c", ACCELERATE, str(work / "dcp"), str(out)],
        }
        for path in [*rank_files, one, *distcp]:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.runs):  # in turn, so that a busy minute of the machine hits them all
            for name, command in commands.items():
                results[name].append(measure(command, clean))
        size = one.stat().st_size / 1e9
    lines = [
        f"{size:.2f} GB in {RANKS} files to one, {len(distcp)} `.distcp` files for the others; {os.cpu_count()} cores, "
        f"median of {options.runs}; torch {version('torch')}, accelerate {version('accelerate')}.",
        "",
        "| | seconds | fastest | resident MB | anonymous MB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        seconds, resident, anonymous = zip(*runs, strict=True)
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} "
            f"| {statistics.median(resident):.0f} | {statistics.median(anonymous):.0f} |"
        )
    print("\n".join(lines))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
