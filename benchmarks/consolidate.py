"""How long a sharded checkpoint takes to become one file, and in how much memory, beside what others offer.

The model has GPT-2 medium's shapes in fp32 (355 M parameters, 1.4 GB at `--scale 1`) and random numbers, cut over 4
and over 8 ranks three times: as a checkpoint of distrain; as the folder that `torch.distributed.checkpoint` writes from
that many processes, each with its rows of every tensor, which is what FSDP2 and Accelerate save; and as DeepSpeed lays
out ZeRO-2 and ZeRO-3, with both moments of Adam beside the weights. Each tool makes one file of the weights. Every
command runs as a process of its own, imports included, after the inputs were read once and the disk was synced. Memory
is the highest resident size and the highest anonymous part of it, which leaves out pages of libraries and files; both
are sampled every 2 ms. The last column is the time in that of `cp` of the one file.
"""

from __future__ import annotations

import argparse
import os
import platform
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

EXPORT = "import sys; from distrain.checkpoints.export import export; export(sys.argv[1], sys.argv[2], {})"
IMPORT = (
    "import sys; from distrain.checkpoints.export import import_checkpoint; import_checkpoint(sys.argv[1], sys.argv[2])"
)
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
DEEPSPEED = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
convert_zero_checkpoint_to_state_dict(sys.argv[1], sys.argv[2], safe_serialization=True)
"""
WRITE_DCP = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from safetensors import safe_open
source, out, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
mesh, state = init_device_mesh("cpu", (world,)), {}
with safe_open(source, "pt") as file:
    for name in file.keys():
        rows = file.get_slice(name)
        shape = torch.Size(rows.get_shape())
        share = -(-shape[0] // world)
        local = rows[min(rank * share, shape[0]) : min((rank + 1) * share, shape[0])]
        stride = torch.empty(shape, device="meta").stride()
        state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
dcp.save({"model": state}, checkpoint_id=out)
del state
dist.barrier()
dist.destroy_process_group()
"""
WRITE_ZERO = """
import os, sys, torch
from safetensors import safe_open
source, out, stage, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tag = out + "/global_step1"
os.makedirs(tag)
open(out + "/latest", "w").write("global_step1")
with safe_open(source, "pt") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
if stage == 3:
    shares = {name: -(-tensor.numel() // world) for name, tensor in tensors.items()}
    def part(rank):
        found = []
        for name, share in shares.items():
            piece = tensors[name].reshape(-1)[rank * share : (rank + 1) * share]
            found.append(torch.nn.functional.pad(piece, (0, share - piece.numel())))
        return torch.cat(found)
else:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    share = -(-flat.numel() // (2 * world)) * 2
    def part(rank):
        return flat[rank * share : (rank + 1) * share].clone()
head = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, "global_steps": 1,
        "frozen_param_shapes": None, "frozen_param_fragments": None, "ds_version": "0"}
masters = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
states = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
for rank in range(world):
    weights = part(rank)
    kept = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": weights.clone(), "exp_avg_sq": weights.clone()}}}
    content = {"zero_stage": stage, "partition_count": world, masters: [weights], states: kept}
    torch.save({"optimizer_state_dict": content}, f"{tag}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if stage == 3 or rank == 0:
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(head, f"{tag}/{name}_model_states.pt")
"""


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


def write_checkpoint(folder: Path, scale: float, world_size: int) -> Path:
    """Save the model as that many ranks of FSDP would hold it: each tensor cut along its first dimension."""
    specs = {f"model/{name}": TensorSpec(shape, "F32", "parameter") for name, shape in shapes(scale).items()}
    noise = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    barrier, slots = threading.Barrier(world_size), [None] * world_size

    def rank(number: int) -> None:
        pieces = []
        for name, spec in specs.items():
            row = spec.numel // spec.shape[0]
            start, stop = (spec.shape[0] * r // world_size * row for r in (number, number + 1))
            pieces.append(Piece(name, start, np.resize(noise, stop - start).view(np.uint8), copied=True))
        saver = Saver(folder, Ranks(number, world_size, barrier, slots), asynchronous=False)
        saver.save(1, specs, pieces, scalars={}, aliases={}, recipe="", strategy="fsdp2")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folder / "step-00000001"


def run(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start Python with that code; all that is written is checked afterwards."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment)


def finish(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for all of them; none may fail."""
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("an input could not be written")


def measure(command: list[str], clean: Callable[[], None]) -> tuple[float, float, float]:
    """Return (seconds, resident MB, anonymous MB) of one run of the command."""
    clean()
    os.sync()
    resident = anonymous = 0
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
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


def table(work: Path, world_size: int, options: argparse.Namespace) -> list[str]:
    """Write the inputs for that many ranks, measure every command, and return the rows of a Markdown table."""
    checkpoint = write_checkpoint(work / "ours", options.scale, world_size)
    one, out, dcp = work / "one.safetensors", work / "out", work / "dcp"
    zero = {stage: work / f"zero{stage}" for stage in (2, 3)}
    finish(run(EXPORT.format("sync=False"), checkpoint, one))
    finish(*(run(WRITE_DCP, one, dcp, rank, world_size) for rank in range(world_size)))
    for stage, folder in zero.items():
        finish(run(WRITE_ZERO, one, folder, stage, world_size))

    def clean() -> None:
        for path in work.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def python(code: str, source: Path, target: str = "out.safetensors") -> list[str]:
        return [sys.executable, "-c", code, str(source), str(work / target)]

    fast = EXPORT.format("sync=False")
    commands = {
        "`cp` of one file": ["cp", str(one), str(out)],
        "**distrain's own checkpoint**": None,
        "distrain, export": python(fast, checkpoint),
        "distrain, export, waiting for the disk": python(EXPORT.format(""), checkpoint),
        "distrain, export, not verifying": python(EXPORT.format("verify=False, sync=False"), checkpoint),
        "distrain, export to bf16": python(EXPORT.format("dtype='bf16', sync=False"), checkpoint),
        "**FSDP2, `torch.distributed.checkpoint`**": None,
        "distrain, export ": python(fast, dcp),
        "distrain, export, not verifying ": python(EXPORT.format("verify=False, sync=False"), dcp),
        "distrain, import": python(IMPORT, dcp, "out"),
        "DCP: `dcp_to_torch_save`": python(DCP, dcp),
        "Accelerate: `merge_fsdp_weights`": python(ACCELERATE, dcp, "out"),
    }
    for stage, folder in zero.items():
        space = " " * stage  # names are keys
        commands |= {
            f"**DeepSpeed ZeRO-{stage}**": None,
            f"distrain, export{space}": python(fast, folder),
            f"distrain, export, not verifying{space}": python(EXPORT.format("verify=False, sync=False"), folder),
            f"distrain, import with the optimizer's state{space}": python(IMPORT, folder, "out"),
            f"DeepSpeed: `zero_to_fp32`{space}": python(DEEPSPEED, folder, "out"),
        }
    for path in [path for path in work.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name, command in commands.items() if command}
    for _ in range(options.runs):  # in turn, so that a busy minute of the machine hits them all
        for name in results:
            command = commands[name]
            assert command is not None
            results[name].append(measure(command, clean))
    base = statistics.median(seconds for seconds, _, _ in results["`cp` of one file"])
    lines = [
        f"## {one.stat().st_size / 1e9:.2f} GB over {world_size} ranks",
        "",
        "| | seconds | fastest | resident MB | anonymous MB | × `cp` |",
        "|---|---|---|---|---|---|",
    ]
    for name in commands:
        if name not in results:
            lines.append(f"| {name} | | | | | |")
            continue
        seconds, resident, anonymous = zip(*results[name], strict=True)
        lines.append(
            f"| {name.strip()} | {statistics.median(seconds):.2f} | {min(seconds):.2f} "
            f"| {statistics.median(resident):.0f} | {statistics.median(anonymous):.0f} "
            f"| {statistics.median(seconds) / base:.1f} |"
        )
    return [*lines, ""]


def main() -> None:
    """Measure, print the tables, and write them where `--save` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of GPT-2 medium (1.4 GB)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="what the model is cut over")
    parser.add_argument("--folder", help="where to work, in a temporary folder that is removed (default: the system's)")
    parser.add_argument("--save", type=Path, help="a Markdown file to write the tables to")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed"))
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, median of {options.runs}; {versions}; "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
    ]
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            lines += table(Path(folder), world_size, options)
    print("\n".join(lines))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
