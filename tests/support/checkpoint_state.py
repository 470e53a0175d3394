"""States, and worlds of threads and processes, for the tests of checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distrain.checkpoint import Piece, Saver, TensorSpec
from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.format import MANIFEST, canonical_json

DESCRIBED: dict[str, Any] = {
    "scalars": {"groups": [{"lr": 0.1, "betas": [0.9, 0.999]}], "position": 10**15},
    "aliases": {"model/tied.weight": "model/layer.weight"},
    "recipe": "name: test\n",
    "strategy": "ddp",
}

SPECS = {
    "model/layer.weight": TensorSpec((7, 11), "F32", "parameter"),
    "model/half": TensorSpec((5,), "BF16", "parameter"),
    "model/half16": TensorSpec((3, 3), "F16", "parameter"),
    "model/wide": TensorSpec((9,), "F64", "parameter"),
    "model/count": TensorSpec((), "I64", "buffer"),
    "model/none": TensorSpec((0, 4), "F32", "buffer"),
    "model/mask": TensorSpec((13,), "BOOL", "buffer"),
    "optimizer/layer.weight/exp_avg": TensorSpec((7, 11), "F32", "optimizer"),
    "ema/layer.weight": TensorSpec((7, 11), "F32", "ema"),
}

State = dict[str, np.ndarray]


def make_state(seed: int, specs: dict[str, TensorSpec] = SPECS) -> State:
    """Return the bytes of each tensor; finite numbers, which the bytes depend on the seed."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, spec in specs.items():
        if spec.dtype in ("F32", "F64", "F16"):
            values = rng.standard_normal(spec.numel).astype({"F32": "f4", "F64": "f8", "F16": "f2"}[spec.dtype])
        elif spec.dtype == "BF16":
            values = (rng.standard_normal(spec.numel).astype("f4").view("u4") >> 16).astype("u2")
        elif spec.dtype == "BOOL":
            values = rng.integers(0, 2, spec.numel, dtype=np.uint8)
        else:
            values = rng.integers(0, 2**40, spec.numel).astype("i8")
        state[name] = values.view(np.uint8).reshape(-1)
    return state


def cut(state: State, world_size: int, seed: int = 0, specs: dict[str, TensorSpec] = SPECS) -> list[list[Piece]]:
    """Cut the state anywhere and deal the pieces to the ranks."""
    rng = np.random.default_rng(seed)
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    for name, raw in state.items():
        numel, size = specs[name].numel, ITEM_SIZES[specs[name].dtype]
        edges = sorted({0, numel, *(int(edge) for edge in rng.integers(0, numel + 1, rng.integers(0, 5)))})
        for start, stop in pairwise(edges):
            data = raw[start * size : stop * size]
            ranks[rng.integers(world_size)].append(Piece(name, start, data, copied=bool(rng.integers(2))))
    for pieces in ranks:
        rng.shuffle(pieces)  # type: ignore[arg-type]
    return ranks


class ThreadWorld:
    """A world whose ranks are threads of this process."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=300)
        self.slots: list[Any] = [None] * world_size

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        """Return what `function(communicator)` returned, or the exception that it raised, on each rank."""
        results: list[Any] = [None] * self.world_size

        def body(rank: int) -> None:
            try:
                results[rank] = function(_ThreadCommunicator(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class _ThreadCommunicator:
    def __init__(self, world: ThreadWorld, rank: int):
        self.world, self.rank, self.world_size = world, rank, world.world_size

    def gather(self, value: Any) -> list[Any]:
        self.world.slots[self.rank] = pickle.dumps(value)
        self.world.barrier.wait()
        found = [pickle.loads(slot) for slot in self.world.slots]
        self.world.barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


class FileCommunicator:
    """A world of processes that speak through files in a folder."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size, self.calls = folder, rank, world_size, 0

    def gather(self, value: Any) -> list[Any]:
        self.calls += 1
        own = self.folder / f"{self.calls}-{self.rank}"
        own.with_suffix(".part").write_bytes(pickle.dumps(value))
        own.with_suffix(".part").rename(own)
        deadline, found = time.monotonic() + 60, []
        for rank in range(self.world_size):
            other = self.folder / f"{self.calls}-{rank}"
            while not other.exists():
                assert time.monotonic() < deadline, f"rank {rank} did not come"
                time.sleep(0.001)
            found.append(pickle.loads(other.read_bytes()))
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def run_processes(world_size: int, folder: Path, function: Callable[..., None], *args: Any) -> list[int | None]:
    """Run `function(communicator, *args)` in one process for each rank; return their exit codes."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=function, args=(FileCommunicator(folder, rank, world_size), *args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def save_world(folder: Path, world_size: int, step: int, state: State, *, seed: int = 0, **options: Any) -> list[Any]:
    """Save `state`, cut among the ranks of a world of threads; return what each rank got."""
    score = options.pop("score", None)
    ranks = cut(state, world_size, seed)

    def rank(comm: Any) -> Any:
        saver = Saver(folder, comm, **options)
        return saver.save(step, SPECS, ranks[comm.rank], score=score, **DESCRIBED)

    return ThreadWorld(world_size).run(rank)


def rewrite_manifest(path: Path, change: Any) -> None:
    """Change the manifest as somebody would who knows how to hash it."""
    content = json.loads((path / MANIFEST).read_bytes())
    del content["xxh3_128"]
    change(content)
    text = canonical_json(content)
    (path / MANIFEST).write_bytes(b'{"xxh3_128":"%s",' % xxhash.xxh3_128_hexdigest(text).encode() + text[1:])
