"""What saving costs: the training loop while a checkpoint is saved beside it, and many small tensors.

    python benchmarks/saving.py [--gpu] [--folder DIR] [--rounds 1] [--quick] [--save FILE]

**The loop.** A `gpt` trains with fused AdamW and saves every so many steps: distrain asynchronously, Accelerate by
`save_state`, PyTorch's distributed checkpoints by `save` and by `async_save`, each into the same kind of folder. The
limit is a loop that copies the same state into memory of its own, allocated before, and writes nothing. What a save
costs is the sum, over the first two thirds of the steps until the next save, of what each took beyond the usual step,
which is the median of the other third, when nothing is saved any more. The first save of a run, at which some allocate
memory, has a table of its own. On a CPU the state has 0.23 GB (parameters and two moments in fp32), and one thread
computes; with `--gpu` it is the GPT-2 of 124 M parameters, 1.42 GB, at 4 x 1024 tokens a step.

**Many small tensors.** 20,000 parameters of 6 numbers with AdamW's state are 80,000 tensors. The whole time of a save,
until it is on disk and published, and of a load into a new model and optimizer; `torch.save` writes the state dicts of
model and optimizer, and `torch.load` with both `load_state_dict` reads them. distrain also hashes, flushes to disk and
verifies.

Peers take turns, each in a process of its own; a process makes six saves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turns import Table, in_processes, options_of

PEERS = ("copy", "distrain", "accelerate", "dcp", "dcp_async")
TINY = ("torch", "distrain")
LEAST_COST_S = 1e-3
"""Below it a cost is noise, and a ratio of it says nothing."""

Costs = dict[str, list[float]]
"""Seconds: of the `first` save, of the `others`, of the `usual` step, and of the `others` on the loop's own thread."""


@dataclass(frozen=True)
class Size:
    """Of the model, of a step, and of the run."""

    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int
    batch: int
    seq_len: int
    every: int
    """Steps from a save to the next."""
    saves: int

    @property
    def steps(self) -> int:
        """Of the run: some before the first save, and as many after the last as between two."""
        return self.every * (self.saves + 1) - 1


SIZES = {
    "cpu": Size(6, 512, 8, 257, 1, 16, 12, 6),
    "quick": Size(2, 64, 2, 257, 1, 16, 20, 2),
    "gpu": Size(12, 768, 12, 50304, 4, 1024, 40, 4),
}


class Steps:
    """The times of steps, and what saves cost them."""

    def __init__(self, size: Size):
        self.size = size
        self.seconds: list[float] = []
        self.on_thread: list[float] = []
        """CPU seconds of the thread that trains."""
        self.begin()

    def begin(self) -> None:
        """Begin the first step."""
        self._began, self._used = time.perf_counter(), time.thread_time()

    def tick(self) -> None:
        """Note that one step is done."""
        now, used = time.perf_counter(), time.thread_time()
        self.seconds.append(now - self._began)
        self.on_thread.append(used - self._used)
        self._began, self._used = now, used

    def costs(self, seconds: list[float]) -> list[float]:
        """Return the seconds beyond usual steps after each save.

        A save is made at the end of step `every`, counted from 1, and may be in the time of that step or of the next.
        """
        every = self.size.every
        spans = [seconds[save * every - 1 : (save + 1) * every - 1] for save in range(1, self.size.saves + 1)]
        quiet = 2 * every // 3
        usual = statistics.median(each for span in spans for each in span[quiet:])
        return [sum(each - usual for each in span[:quiet]) for span in spans]

    def report(self) -> Costs:
        """Return the costs of the first save and of the others, and the usual step, in seconds."""
        first, *others = self.costs(self.seconds)
        usual = [statistics.median(self.seconds[self.size.every :])]
        return {"first": [first], "others": others, "usual": usual, "on_thread": self.costs(self.on_thread)[1:]}


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_distrain(size: Size, folder: Path) -> Costs:
    """distrain as `distrain train` starts it."""
    from distrain import Callback
    from distrain.launchers import work

    steps = Steps(size)

    class Ticks(Callback):
        asks = False
        started = False

        def on_step_start(self, step: int) -> None:
            if self.started:
                steps.tick()
            else:
                steps.begin()
                self.started = True

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "name: saving\ntask: language_modeling\n"
        f"data: {{name: python_source, seq_len: {size.seq_len}, max_bytes: {size.seq_len * 80}, split: [0.9, 0.1]}}\n"
        f"model: {{name: gpt, n_layer: {size.n_layer}, d_model: {size.d_model}, n_head: {size.n_head}, "
        f"vocab_size: {size.vocab_size}}}\n"
        "optim: {name: adamw, lr: 1.0e-4}\nschedule: constant\n"
        f"batch: {{global: {size.batch}, micro: {size.batch}}}\n"
        f"train: {{steps: {size.steps + 1}, precision: {'bf16' if _device().type == 'cuda' else 'fp32'}}}\n"
        f"eval: {{every: null}}\ncheckpoint: {{every: {size.every} steps, keep: 1}}\nlog: {{every: 10 steps}}\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = work(str(recipe), run_dir=str(folder / "run"), processes=1, callbacks=[Ticks()])
    assert status == 0, said.getvalue()
    return steps.report()


class Bare:
    """A loop of plain PyTorch with the same model."""

    def __init__(self, size: Size):
        import torch

        from distrain.networks.gpt import GPT

        torch.manual_seed(0)
        self.size, self.device = size, _device()
        shape: dict[str, Any] = {"n_layer": size.n_layer, "n_head": size.n_head, "d_model": size.d_model}
        self.model: Any = GPT(size.vocab_size, size.seq_len, **shape).to(self.device)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rows = torch.randint(size.vocab_size, (64, size.batch, size.seq_len + 1))

    def train(self, save: Callable[[int], None], backward: Callable[[Any], None] | None = None) -> Costs:
        """Make the steps and call `save(step)` where it is due; return what `Steps.report` does."""
        import torch
        from torch.nn import functional

        steps = Steps(self.size)
        for step in range(1, self.size.steps + 1):
            rows = self.rows[step % len(self.rows)]
            if self.device.type == "cuda":
                rows = rows.pin_memory().to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = self.model(rows[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (backward or torch.Tensor.backward)(loss)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                loss.item()
            if step % self.size.every == 0:
                save(step)
            steps.tick()
        return steps.report()

    def tensors(self) -> list[Any]:
        """Return the tensors of the state."""
        import torch

        found = [each.detach() for each in self.model.state_dict().values()]
        state = self.optimizer.state.values()
        return found + [value for of in state for value in of.values() if isinstance(value, torch.Tensor)]


def run_copy(size: Size, folder: Path) -> Costs:
    """The limit: a copy into memory that was allocated and touched before."""
    import torch

    bare = Bare(size)
    targets: list[Any] = []

    def copy(step: int) -> None:
        tensors = bare.tensors()
        if not targets:
            pinned = bare.device.type == "cuda"
            targets.extend(torch.zeros(each.shape, dtype=each.dtype, pin_memory=pinned) for each in tensors)
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)

    return bare.train(copy)


def run_accelerate(size: Size, folder: Path) -> Costs:
    """Accelerate's `save_state`."""
    from accelerate import Accelerator

    bare, accelerator = Bare(size), Accelerator(cpu=_device().type == "cpu")
    bare.model, bare.optimizer = accelerator.prepare(bare.model, bare.optimizer)

    def save(step: int) -> None:
        accelerator.save_state(str(folder / f"state-{step}"))
        shutil.rmtree(folder / f"state-{step - size.every}", ignore_errors=True)

    return bare.train(save, accelerator.backward)


def _run_dcp(size: Size, folder: Path, *, asynchronous: bool) -> Costs:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    bare = Bare(size)
    pending: list[Any] = []
    done: list[Path] = []
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as place:
        store = dist.FileStore(f"{place}/store", 1)
        backend = "cpu:gloo,cuda:nccl" if bare.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)

        def save(step: int) -> None:
            model, optimizer = get_state_dict(bare.model, bare.optimizer)
            state = {"model": model, "optimizer": optimizer}
            path = folder / f"dcp-{step}"
            if not asynchronous:
                dcp.save(state, checkpoint_id=path)
            else:
                if pending:
                    pending.pop().result()
                pending.append(dcp.async_save(state, checkpoint_id=path))
            done.append(path)
            if len(done) > 2:
                shutil.rmtree(done.pop(0), ignore_errors=True)

        found = bare.train(save)
        if pending:
            pending.pop().result()
        dist.destroy_process_group()
    return found


LOOPS: dict[str, Callable[[Size, Path], Costs]] = {
    "copy": run_copy,
    "distrain": run_distrain,
    "accelerate": run_accelerate,
    "dcp": lambda size, folder: _run_dcp(size, folder, asynchronous=False),
    "dcp_async": lambda size, folder: _run_dcp(size, folder, asynchronous=True),
}

# --------------------------------------------------------------------------------------------------------------------
# Many small tensors


def _tiny(count: int) -> tuple[Any, Any]:
    """Return a model of parameters of 6 numbers, and its optimizer after one step."""
    import torch
    from torch import nn

    model = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(count)])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


@contextlib.contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into[name] = time.perf_counter() - began


def run_tiny(peer: str, count: int, folder: Path) -> dict[str, float]:
    """Save, and load into a new model and optimizer; return the seconds of both."""
    import torch

    model, optimizer = _tiny(count)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other, others = _tiny(count)
    seconds: dict[str, float] = {}
    if peer == "torch":
        with _timed(seconds, "save"):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
        with _timed(seconds, "load"):
            state = torch.load(folder / "state.pt")
            other.load_state_dict(state["model"])
            others.load_state_dict(state["optimizer"])
    else:
        from distrain.checkpoint import LocalCommunicator, Reader, Saver
        from distrain.parallel.arena import TensorArena
        from distrain.parallel.mesh import Mesh
        from distrain.parallel.snapshot import pieces_of
        from distrain.parallel.state import TrainingState

        held, new = TrainingState(model, optimizer, None), TrainingState(other, others, None)
        arena, mesh = TensorArena(torch.device("cpu")), Mesh(0, 1, 1)
        saver = Saver(folder / "checkpoints", LocalCommunicator(), arena=arena)
        with _timed(seconds, "save"):
            found = held.snapshot()
            described: dict[str, Any] = {"scalars": found.scalars, "aliases": found.aliases, "strategy": "single"}
            saved = saver.save(1, found.specs, pieces_of(found.held, mesh), recipe="", **described)
        with _timed(seconds, "load"), Reader(saved.path) as reader:
            new.restore(reader)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    return seconds


# --------------------------------------------------------------------------------------------------------------------
# Running them


def main() -> None:
    """Measure and print tables; or, with --peer, be one of the measured processes."""
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--only", choices=("loop", "tiny"))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        folder = Path(os.environ["BENCHMARK_FOLDER"])
        kind, _, peer = a.peer.partition(":")
        found = LOOPS[peer](SIZES[a.size], folder) if kind == "loop" else run_tiny(peer, int(a.size), folder)
        print(json.dumps(found))
        return
    rounds = 1 if a.quick else a.rounds
    size = "quick" if a.quick else "gpu" if a.gpu else "cpu"
    count = 1000 if a.quick else 20_000

    def measured(kind: str, peer: str, what: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=a.folder) as folder:
            arguments = ["--peer", f"{kind}:{peer}", "--size", what]
            found: dict[str, Any] = in_processes(__file__, arguments, gpu=a.gpu, BENCHMARK_FOLDER=folder)[0]
        print(f"{kind} {peer}: {found}", file=sys.stderr, flush=True)
        return found

    table = Table("Saving", "ms")
    if a.only != "tiny":
        peers = [peer for peer in a.peers if peer != "accelerate" or importlib.util.find_spec("accelerate")]
        each: dict[str, list[Costs]] = {peer: [] for peer in peers}
        for turn in range(rounds):
            for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
                each[peer].append(measured("loop", peer, size))
        titles = {
            "others": "What a save costs the loop",
            "first": "What the first save of a run costs the loop",
            "usual": "A usual step",
            "on_thread": "CPU time of the thread that trains, of what a save costs the loop",
        }
        for key, title in titles.items():
            costs = {
                peer: [max(one, LEAST_COST_S) * 1e3 for found in each[peer] for one in found[key]] for peer in peers
            }
            table.add(costs, base=peers[0], title=title)
        table.note("Each save counts as a round: those of a process are some steps apart.")
    if a.only != "loop" and not a.gpu:
        both: dict[str, list[dict[str, float]]] = {peer: [] for peer in TINY}
        for turn in range(rounds):
            for peer in TINY if turn % 2 else TINY[::-1]:
                both[peer].append(measured("tiny", peer, str(count)))
        for key, title in {"save": "to save", "load": "to load"}.items():
            found = {peer: [f[key] * 1e3 for f in values] for peer, values in both.items()}
            table.add(found, base="torch", title=f"{count:,} parameters of 6 numbers {title}", goals={"distrain": 1.0})
    table.save(a.save)


if __name__ == "__main__":
    main()
