"""What grows with the number of ranks, on paper: each part of a run that knows of all ranks, simulated up to 1,024.

    python benchmarks/scale.py [--tensors 10000] [--rounds 5] [--quick] [--save FILE]

A checkpoint of many tensors as FSDP2 cuts them (the same number of rows for each rank) is listed, read and looked up
as a rank would; a step's samples are found; heartbeats are written, read and shown by `distrain status`. Nothing here
needs as many processes: each function is the one that a run calls, given what so many ranks would have left. The limit
is growth with the number of ranks, W: what rank 0 or a command does may take W / 64 times as long as for 64 ranks, and
what a rank does for itself no longer at all; a quarter (a half) more is allowed for noise.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from turns import Table, options_of

from distrain.checkpoint import FileInfo, TensorSpec, fingerprint
from distrain.checkpoints.format import (
    VERSION,
    Manifest,
    Run,
    Tensor,
    add_piece,
    canonical_json,
    parse_manifest,
    rank_file_name,
)
from distrain.checkpoints.headers import pack_header, read_header
from distrain.checkpoints.rank_files import RankFiles
from distrain.datasets.order import SampleOrder
from distrain.report.status import status_of
from distrain.run import heartbeat
from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat
from distrain.system.processes import process_started

WORLDS = (64, 256, 1024)
ROWS, WIDTH = 3000, 8
BATCH = 8  # samples of a rank in a step
HEADERS = 4  # headers that are read in place of all


class World:
    """What a run of so many ranks leaves behind."""

    def __init__(self, folder: Path, ranks: int, tensors: int):
        self.ranks = ranks
        self.folder = folder / str(ranks)
        self.specs = {f"model/blocks.{n}.weight": TensorSpec((ROWS, WIDTH), "F32", "parameter") for n in range(tensors)}
        self.tensors: dict[str, Tensor] = {}
        share = -(-ROWS // ranks)
        for name, spec in self.specs.items():
            runs: list[Run] = []
            for rank in range(ranks):
                start, stop = min(ROWS, rank * share), min(ROWS, (rank + 1) * share)
                if start < stop:
                    add_piece(runs, rank, start * WIDTH, (stop - start) * WIDTH)
            self.tensors[name] = Tensor(spec, tuple(runs))
        self.order = SampleOrder(10**9, seed=0)
        self.run = RunDir(self.folder)
        heartbeat.folder(self.run).mkdir(parents=True)
        self.text = self.listed()
        self.manifest = parse_manifest(self.text)
        self.headers = [self.folder / f"header-{rank}" for rank in range(HEADERS)]
        for rank, path in enumerate(self.headers):
            entries = RankFiles(self.manifest)[rank].entries()
            header = pack_header(entries)
            with open(path, "wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(4 * shape[0] for _, shape in entries.values()))

    def listed(self) -> bytes:
        """Return the manifest, as rank 0 writes it."""
        content: dict[str, Any] = {
            "format": "distrain", "version": VERSION, "step": 1, "created": "", "world_size": self.ranks,
            "strategy": "fsdp2", "score": None, "fingerprint": fingerprint(self.specs), "recipe": "", "scalars": {},
            "aliases": {},
            "files": [
                {"name": rank_file_name(rank, self.ranks), "size": 1 << 30, "xxh3_128": f"{rank:032x}"}
                for rank in range(self.ranks)
            ],
            "tensors": {
                name: {"shape": t.spec.shape, "dtype": t.spec.dtype, "role": t.spec.role, "pieces": t.listed()}
                for name, t in self.tensors.items()
            },
        }  # fmt: skip
        text = canonical_json(content)
        return b'{"xxh3_128":"%s",' % xxhash.xxh3_128_hexdigest(text).encode() + text[1:]

    def read_manifest(self) -> Manifest:
        """Read it, as every rank does."""
        return parse_manifest(self.text)

    def entries(self) -> dict[str, Any]:
        """Return what the file of one rank must hold."""
        return RankFiles(self.manifest)[self.ranks // 2].entries()

    def plan(self) -> int:
        """Find the pieces of a rank in the middle of a world of three quarters; return in how many files they lie."""
        others = self.ranks * 3 // 4
        share = -(-ROWS // others)
        rank = min(others // 2, ROWS // share - 1)
        start, stop = rank * share * WIDTH, (rank + 1) * share * WIDTH
        files = set()
        for tensor in self.manifest.tensors.values():
            for file, begin, _ in tensor.pieces_from(start):
                if begin >= stop:
                    break
                files.add(file)
        return len(files)

    def place(self) -> None:
        """Read the headers of a few files, as rank 0 does of all when an attempt publishes its first checkpoint."""
        placed: dict[str, list[Run]] = {name: [] for name in self.specs}
        for index, path in enumerate(self.headers):
            with open(path, "rb") as file:
                header, _ = read_header(file.fileno(), os.fstat(file.fileno()).st_size)
            for key, (_, (numel,), _, _) in header.items():
                name, _, start = key.rpartition("@")
                add_piece(placed[name], index, int(start), numel)

    def samples(self) -> None:
        """Find a rank's samples of a thousandth step in the endless order."""
        start = 1000 * self.ranks * BATCH + self.ranks // 2 * BATCH
        self.order.at(start, start + BATCH)

    def beat(self) -> None:
        """Write the heartbeats of all ranks."""
        for rank in range(self.ranks):
            beat = Heartbeat(
                rank=rank, host=f"node{rank // 8}", pid=os.getpid(), started=process_started(), job=None, attempt="a",
                world_size=self.ranks, sequence=1, time=time.time(), interval=5.0, step=7, marks=3, phase="forward",
                seconds=0.5, idle=0.0, steps=7,
            )  # fmt: skip
            heartbeat.write_heartbeat(self.run, beat)

    def status(self) -> None:
        """Show how the run does."""
        with contextlib.redirect_stdout(io.StringIO()):
            status_of(self.folder, [])


def milliseconds(action: Callable[[World], object], world: World) -> float:
    """Return how long it takes at best in three times."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        action(world)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found)


PARTS: dict[str, tuple[Callable[[World], object], bool]] = {
    "Manifest written, by rank 0": (World.listed, True),
    "Manifest read, by every rank": (World.read_manifest, True),
    "What one file must hold, by a rank that reads it": (World.entries, False),
    "Pieces found by a rank of a world of 3/4 W": (World.plan, False),
    f"Headers of {HEADERS} files read, by rank 0 when it publishes (W of them in all)": (World.place, False),
    "Samples of a rank in a step": (World.samples, False),
    "Heartbeats of all ranks written (each rank writes 1/W of it)": (World.beat, True),
    "`distrain status`": (World.status, True),
}
"""{title: (what is timed, whether it may grow with W)}."""


def main() -> None:
    """Measure, print the tables, and write them where `--save` says."""
    parser = options_of(__doc__)
    parser.add_argument("--tensors", type=int, default=10_000, help="of the checkpoint")
    options = parser.parse_args()
    tensors, rounds = (500, 2) if options.quick else (options.tensors, options.rounds)
    table = Table("scale", "ms", digits=2)
    with tempfile.TemporaryDirectory() as folder:
        worlds = {ranks: World(Path(folder), ranks, tensors) for ranks in WORLDS}
        names = {ranks: f"W = {ranks:,}" for ranks in WORLDS}
        for title, (action, linear) in PARTS.items():
            table.measure(
                {names[ranks]: partial(milliseconds, action, world) for ranks, world in worlds.items()},
                base=names[WORLDS[0]],
                rounds=rounds,
                title=title,
                goals={names[ranks]: 1.25 * ranks / WORLDS[0] if linear else 1.5 for ranks in WORLDS[1:]},
            )
        for ranks, world in worlds.items():
            told = len(pickle.dumps((FileInfo(rank_file_name(0, ranks), 1 << 40, "0" * 32), "0" * 32, None)))
            entries = world.entries()
            beats = sum(path.stat().st_size for path in heartbeat.folder(world.run).iterdir())
            pieces = sum(len(tensor.pieces) for tensor in world.tensors.values())
            table.note(
                f"W = {ranks:,}, {tensors:,} tensors: {pieces:,} pieces in a manifest of {len(world.text):,} bytes; a "
                f"rank's header {len(pack_header(entries)):,} bytes; a save gathers {told * ranks:,} bytes on each "
                f"rank; a rank of {ranks * 3 // 4:,} reads {world.plan()} files; heartbeats {beats:,} bytes."
            )
    table.save(options.save)


if __name__ == "__main__":
    main()
