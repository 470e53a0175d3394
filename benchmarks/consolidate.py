"""How long a sharded checkpoint takes to become one file, and in how much memory, beside `cat` and what others offer.

    python benchmarks/consolidate.py [--ranks 4] [--scale 1] [--shards 1024] [--rounds 5] [--quick] [--save FILE]

The model has GPT-2 medium's shapes in fp32 (355 M parameters, 1.4 GB at `--scale 1`) and random numbers, cut over a few
ranks in each way: as a checkpoint of distrain; as the folder that `torch.distributed.checkpoint` writes from that many
processes, each with its rows of every tensor, which is what FSDP2 and Accelerate save; and as DeepSpeed lays out ZeRO-2
and ZeRO-3, with both moments of Adam beside the weights. Each tool makes one file of the weights. The limit is `cat` of
the shards into one file, which hashes nothing. Then distrain alone: with many small shards, with more bytes
(`--large`), and with as many bytes as `--huge` says, over few ranks and over many. One of these sets is on the disk at
a time. With more blocks than GPT-2 medium has, the vocabulary stays as it is.

Every command runs as a process of its own, imports included, after the inputs were read once and the disk was synced;
commands take turns. Nothing waits for the disk unless it says so; but a set that does not fit the page cache beside
what is written of it is read from the disk, and then the table says so. CPU seconds are those of the process, in the
kernel too; on a machine with other work they say more than the seconds. Memory is the highest anonymous size, which
leaves out pages of libraries and files, sampled every 2 ms in a run of its own.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from turns import Table, options_of

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


_BLOCK = 12 * 1024**2 + 13 * 1024  # parameters


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """Return GPT-2 medium's shapes, with `scale` of its 24 blocks and at most of its vocabulary."""
    width, found = 1024, {}
    found["wte.weight"], found["wpe.weight"] = (round(50257 * min(scale, 1)), width), (1024, width)
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
            share = -(-spec.shape[0] // world_size)  # rows: the last ranks have fewer, or none
            start, stop = (min(share * r, spec.shape[0]) * row for r in (number, number + 1))
            part = noise[: stop - start] if stop - start <= noise.size else np.resize(noise, stop - start)
            pieces.append(Piece(name, start, part.view(np.uint8), copied=True))
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


def measure(command: list[str], clean: Callable[[], None], cpu: list[float]) -> float:
    """Return the seconds of one run of the command; adds its CPU seconds."""
    clean()
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    wait(start_process(command))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds


def anonymous_bytes(command: list[str], clean: Callable[[], None]) -> int:
    """Return the highest anonymous size of one run of the command."""
    clean()
    highest = 0
    process = start_process(command)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                found = [int(line.split()[1]) for line in file if line.startswith("RssAnon")]
        except ProcessLookupError:
            break
        highest = max([highest, *found])
        time.sleep(0.002)
    wait(process)
    return highest * 1024


def start_process(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a command that is measured; what it says is kept for `wait`."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command, which may not fail."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args!r:.200} failed:\n{errors.decode()}")


def size_of(folder: Path) -> int:
    """Return the bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Bench:
    """Commands that take turns at making one file in a folder, and the table of what they took."""

    def __init__(self, work: Path, rounds: int, table: Table, goal: float | None):
        self.work = work
        self.rounds = rounds
        self.goal = goal
        self.table = table

    def clean(self) -> None:
        """Remove what a command wrote."""
        for path in self.work.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def python(self, code: str, source: Path, target: str = "out.safetensors") -> list[str]:
        """Return a command."""
        return [sys.executable, "-c", code, str(source), str(self.work / target)]

    def cat(self, folder: Path, pattern: str) -> list[str]:
        """Return the limit."""
        files = sorted(map(str, folder.glob(pattern)))
        return ["sh", "-c", f'cat "$@" > {self.work}/out', "cat", *files]

    def run(self, title: str, source: Path, commands: dict[str, list[str]], mergers: tuple[str, ...] = ()) -> None:
        """Measure the commands, the first of which is the limit, and add their rows."""
        for path in [path for path in source.rglob("*") if path.is_file()]:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
        cpu: dict[str, list[float]] = {name: [] for name in commands}
        base, export = list(commands)[:2]
        found = self.table.measure(
            {name: lambda name=name: measure(commands[name], self.clean, cpu[name]) for name in commands},  # type: ignore[misc]
            base=base, rounds=self.rounds, title=title, goals={} if self.goal is None else {export: self.goal},
        )  # fmt: skip
        memory = {name: anonymous_bytes(command, self.clean) / 2**20 for name, command in commands.items()}
        self.clean()
        for name in mergers:
            ratio = statistics.median(one / other for one, other in zip(found[name], found[export], strict=True))
            self.table.note(
                f"{name}: {ratio:.1f} × {export}; goal ≥ 5: {'holds' if ratio >= 5 else '**does not hold**'}."
            )
        used = ", ".join(
            f"{name} {statistics.median(values):.2f} "
            f"(× {statistics.median(one / other for one, other in zip(values, cpu[base], strict=True)):.2f})"
            for name, values in cpu.items()
        )
        self.table.note(f"CPU seconds, median (× {base} within a round): {used}.")
        nbytes, memory_bytes = size_of(source), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 2 * nbytes > 0.8 * memory_bytes:
            self.table.note(
                f"{nbytes / 1e9:.1f} GB and as much that is written do not fit the page cache of a machine with "
                f"{memory_bytes / 1e9:.0f} GB of memory: all commands wait for the disk."
            )
        highest = ", ".join(f"{name} {mebibytes:.0f}" for name, mebibytes in memory.items())
        held = "holds" if memory[export] <= 64 else "**does not hold**"
        self.table.note(f"Anonymous MiB: {highest}; goal of {export} ≤ 64: {held}.")


FAST = EXPORT.format("sync=False")


def own(bench: Bench, scale: float, ranks: int, title: str, more: bool) -> Path:
    """Measure the export of distrain's own checkpoint; return it."""
    checkpoint = write_checkpoint(bench.work / f"ours-{ranks}", scale, ranks)
    commands = {"`cat`": bench.cat(checkpoint, "rank-*"), "distrain, export": bench.python(FAST, checkpoint)}
    if more:
        commands |= {
            "distrain, export, waiting for the disk": bench.python(EXPORT.format(""), checkpoint),
            "distrain, export, not verifying": bench.python(EXPORT.format("verify=False, sync=False"), checkpoint),
            "distrain, export to bf16": bench.python(EXPORT.format("dtype='bf16', sync=False"), checkpoint),
            "distrain, export in shards of 500 MB": bench.python(
                EXPORT.format("shards='500MB', sync=False"), checkpoint, "out"
            ),
        }
    bench.run(f"{title}: {size_of(checkpoint) / 1e9:.2f} GB over {ranks:,} ranks", checkpoint, commands)
    return checkpoint


def peers(bench: Bench, checkpoint: Path, ranks: int, stages: list[int]) -> None:
    """Measure the mergers of others beside distrain's export of what they merge."""
    one, dcp = bench.work / "one.safetensors", bench.work / "dcp"
    finish(run(FAST, checkpoint, one))
    finish(*(run(WRITE_DCP, one, dcp, rank, ranks) for rank in range(ranks)))
    bench.run(
        "FSDP2, `torch.distributed.checkpoint`",
        dcp,
        {
            "`cat`": bench.cat(dcp, "*.distcp"),
            "distrain, export": bench.python(FAST, dcp),
            "distrain, import": bench.python(IMPORT, dcp, "out"),
            "DCP: `dcp_to_torch_save`": bench.python(DCP, dcp),
            "Accelerate: `merge_fsdp_weights`": bench.python(ACCELERATE, dcp, "out"),
        },
        ("DCP: `dcp_to_torch_save`", "Accelerate: `merge_fsdp_weights`"),
    )
    shutil.rmtree(dcp)
    for stage in stages:
        zero = bench.work / f"zero{stage}"
        finish(run(WRITE_ZERO, one, zero, stage, ranks))
        bench.run(
            f"DeepSpeed ZeRO-{stage}",
            zero,
            {
                "`cat` of the weights": bench.cat(checkpoint, "rank-*"),
                "distrain, export": bench.python(FAST, zero),
                "distrain, import with the optimizer's state": bench.python(IMPORT, zero, "out"),
                "DeepSpeed: `zero_to_fp32`": bench.python(DEEPSPEED, zero, "out"),
            },
            ("DeepSpeed: `zero_to_fp32`",),
        )
        shutil.rmtree(zero)


def main() -> None:
    """Measure, print the tables, and write them where `--save` says."""
    parser = options_of(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of GPT-2 medium (1.4 GB)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="what the model is cut over")
    parser.add_argument("--stages", type=int, nargs="+", default=[3], help="of DeepSpeed's ZeRO")
    parser.add_argument(
        "--large", type=float, default=0.0, help="share of GPT-2 medium that is exported alone (0: none)"
    )
    parser.add_argument("--huge", type=float, default=0.0, help="GB of checkpoints over --ranks and --shards (0: none)")
    parser.add_argument("--shards", type=int, default=1024, help="ranks of a checkpoint that is exported alone")
    parser.add_argument("--folder", help="where to work, in a temporary folder that is removed (default: the system's)")
    parser.add_argument("--no-peers", action="store_true", help="distrain and `cat` only")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    scale, large, shards = (0.05, 0.1, 64) if options.quick else (options.scale, options.large, options.shards)
    table = Table("consolidate", "seconds", digits=2)
    blocks = (options.huge * 1e9 - 4 * sum(map(math.prod, shapes(1).values()))) / 4 / _BLOCK / 24 + 1
    for title, part, ranks, more in [
        *(("distrain's own checkpoint", scale, ranks, True) for ranks in options.ranks),
        ("Many small shards", scale, shards, False),
        *([("Larger", large, options.ranks[0], False)] if large else []),
        *(("Much larger", blocks, ranks, False) for ranks in (options.ranks[0], shards) if options.huge),
    ]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(
                Path(folder), rounds, table, None if options.quick else 0.9
            )  # of bytes, not of starting Python
            checkpoint = own(bench, part, ranks, title, more)
            if more and not options.no_peers:
                bench.rounds = min(rounds, 3)  # a merger takes so long that a busy second hardly counts
                peers(bench, checkpoint, ranks, options.stages)
    table.save(options.save)


if __name__ == "__main__":
    main()
