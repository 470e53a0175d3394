"""What a run really consumed and computed, step by step and rank by rank, for `distrain prove` to compare.

Off unless the environment variable `DISTRAIN_TRACE` asks for it: a JSON object with

    folder      where each rank writes `rank-R.jsonl`; it exists
    last_step   the run stops after this step, with a checkpoint, as if it had been asked to (null: it continues)
    pause_at    rank 0 writes a file `paused` into the folder once this many steps are done, and waits there until there
                is a file `go` (null: it does not)
    save_at     a checkpoint is published once this many steps are done, whatever the recipe says (null: none is)

Each line is one JSON object, in the order of what happened:

    start   the step that the attempt starts at, its state, and what is known of the model and the data
    batch   the ids of the step's samples, with a digest of each sample as the data set gave it, and of the inputs and
            targets as the model gets them; which loader process made each micro-batch, and what has changed there
    between buffers, and what no checkpoint holds, that something has changed since the step, as an evaluation may
    state   after the step: the learning rates and gradients with which the optimizer stepped, and what a checkpoint
            of that moment would hold
    loss    the step's loss and gradient norm, over all ranks

State and gradients are digests, each with the norm of its tensor. `outside_files.py` notes beside it which files
the user's code has opened.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import get_worker_info
from torch.utils.hooks import RemovableHandle

from distrain.checkpoints.dtypes import FLOATS
from distrain.checkpoints.floats import widen
from distrain.data import Transform
from distrain.datasets.base import Batch, is_stream
from distrain.networks.memory import local
from distrain.optim import canonical_name
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome, StepMetrics
from distrain.training.callbacks.hidden_state import held_by_callback, hidden_state, hidden_weights
from distrain.training.callbacks.outside_files import VARIABLE
from distrain.training.context import dropout_seed

if TYPE_CHECKING:
    pass

STOPPED = "the end of what is proved"
_CHUNK = 1 << 20  # elements widened at a time
_PATIENCE_S = 600.0

Digests = dict[str, tuple[str, float]]
"""For each name a digest of its bytes and its 2-norm, NaN where that has no meaning."""


class Trace(Callback):
    """One rank's record of one attempt at a run."""

    asks = False

    def __init__(self, folder: Path, *, last_step: int | None, pause_at: int | None, save_at: int | None = None):
        self.folder, self.last_step, self.pause_at, self.save_at = folder, last_step, pause_at, save_at
        self._file: TextIO | None = None
        self._hook: RemovableHandle | None = None
        self._recorded = False
        self._micro_batches = 0
        self._names: dict[int, str] = {}
        self._rates: set[float] = set()
        self._gradients: Digests = {}
        self._hidden: dict[str, str] = {}
        self._known: Digests = {}
        """The state as it was noted last."""
        self._of_samples: dict[str, Any] = {}
        self._of_loaders: dict[int, dict[str, str]] = {}

    @classmethod
    def from_environment(cls) -> Trace | None:
        """Return the trace that was asked for, or None."""
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        asked = json.loads(text)
        return cls(Path(asked.pop("folder")), **asked)

    def write(self, at: str, step: int, **values: Any) -> None:
        """Add a line, which a killed process has written whole or not at all."""
        assert self._file is not None, "on_start opens it"
        self._file.write(json.dumps({"at": at, "step": step, **values}) + "\n")
        self._file.flush()

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks

    def wrap_transform(self, transform: Transform) -> Transform:
        """Return a transform that does the same, and notes the samples as the data set gave them."""
        return _Noting(transform)

    def on_start(self, run: CallbackRun) -> None:
        """Have the run stop and save where the proof wants it."""
        self._run, self._context, self.rank = run, run.context, run.rank
        self._file = (self.folder / f"rank-{run.rank}.jsonl").open("a", encoding="utf-8")
        self._names = {
            id(parameter): canonical_name(name) for name, parameter in self._context.t.state.model.named_parameters()
        }
        if self.last_step is not None:
            run.stop_after(self.last_step, STOPPED)
        if self.save_at is not None:
            run.save_after(self.save_at)
        self._hook = register_optimizer_step_pre_hook(self._about_to_step)

    def on_step_start(self, step: int) -> None:
        """Note the state that training starts from, or what has changed since the step before."""
        done = step - 1
        if not self._recorded:
            self._recorded = True
            self._start()
        self._between()
        if done == self.save_at:
            self._context.checkpoints.finish()
        self._pause(done)

    def on_batches(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Take out of the micro-batches what was noted of their samples, before the user's callbacks look at them."""
        self._micro_batches = len(micro_batches)
        self._of_samples = {
            "samples": [batch.pop("samples") for batch in micro_batches],
            "loaders": self._changed_in_loaders(micro_batches),
            "workers": [batch.pop("worker") for batch in micro_batches],
        }

    def note_batches(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Note what a step consumes. Called behind on_batches of all callbacks, which may change it."""
        self.write("batch", step, **self._of_samples, **_of_batches(micro_batches))

    def note_step(self, step: int) -> None:
        """Note the state after a step. Called behind on_step_taken of all callbacks, which may change it."""
        context = self._context
        changed = self._changed()
        self.write(
            "state",
            step,
            # an optimizer that is no torch.optim.Optimizer inside calls no hooks
            lr=sorted(self._rates or {float(group["lr"]) for group in context.t.strategy.optimizer.param_groups}),
            gradients=self._gradients,
            state=self._state(),
            scalars=context.t.state.scalars(),
            drawn=self._drawn(step),
            hidden=changed,
            time=time.time(),
        )
        self._rates, self._gradients = set(), {}

    def on_step_end(self, step: int, metrics: StepMetrics) -> None:
        """Note a step's loss and the norm of its gradient, which are read later than the step is taken."""
        norm = metrics.grad_norm or math.hypot(*metrics.grad_norms.values())
        self.write("loss", step, loss=metrics.loss, norm=norm)

    def on_rollback(self, step: int) -> None:
        """Note the state anew that training resumes from."""
        self._recorded = False

    def on_close(self, outcome: Outcome) -> None:
        """Leave the optimizer as it was."""
        if self._hook is not None:
            self._hook.remove()
        if self._file is not None:
            self._file.close()

    # ----------------------------------------------------------------------------------------------------------------

    def _drawn(self, step: int) -> list[str]:
        """Return which generators the last micro-batch of a step has drawn from."""
        t = self._context.t
        made = [each for each in t.acting(step) if t.anomalies is None or t.anomalies.skipped(step, each.name) is None]
        if not made:
            return []
        return _drawn_from(dropout_seed(t, step - 1, self._micro_batches - 1, made[-1]), t.world.device)

    def _start(self) -> None:
        context = self._context
        t, source = context.t, context.data.splits["train"]
        self._hidden = self._hidden_now()
        self.write(
            "start",
            t.step,
            pid=os.getpid(),
            world_size=context.world.world_size,
            strategy=context.world.strategy,
            replicas=context.world.mesh.replicas,
            precision=context.world.precision,
            total_steps=context.total_steps,
            samples=None if is_stream(source) else len(source),
            workers=context.recipe.data.workers,
            micro_batches=context.setup.feed.accumulation,
            callbacks=list(context.callbacks.users),
            batch_norm=_batch_norms(t.state.model),
            state=self._state(),
            scalars=t.state.scalars(),
            hidden=self._hidden,
            time=time.time(),
        )

    def _pause(self, step: int) -> None:
        if self.rank != 0 or self.pause_at is None or step < self.pause_at:
            return
        if not (self.folder / "paused").exists():
            (self.folder / "paused").touch()
            self._wait_for("go")
        elif step >= self.pause_at + 2:
            # whoever interrupts may be slower than small steps are
            self.pause_at = None
            self._wait_for("sent")

    def _wait_for(self, name: str) -> None:
        until = time.monotonic() + _PATIENCE_S
        while not (self.folder / name).exists() and time.monotonic() < until:
            time.sleep(0.001)

    def _about_to_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # some strategies step one group after the other, and each step comes here
        for index, group in enumerate(optimizer.param_groups):
            self._rates.add(float(group["lr"]))
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                name = self._names.get(id(parameter), f"group {index}, tensor {place}")
                self._gradients[name] = _digest_of(parameter.grad)

    def _state(self) -> Digests:
        state, world = self._context.t.state, self._context.world
        buffers = {name for name, each in state.held().items() if each.role == "buffer"}
        found = self._buffers_now()
        averages = {name.replace("model/", "ema/", 1) for name in buffers}
        specs = state.specs()
        for piece in state.pieces(world.mesh):
            if piece.name not in buffers | averages:
                raw = np.frombuffer(piece.source.to_host(), np.uint8)
                found[f"{piece.name}@{piece.start}"] = (_hash(raw), _norm(raw, specs[piece.name].dtype))
        self._known = found
        return found

    def _buffers_now(self) -> Digests:
        # each rank has its own until they are aligned, and rank 0's are then everybody's
        held = self._context.t.state.held() if self.rank == 0 else {}
        return {name: _digest_of(each.values) for name, each in held.items() if each.role == "buffer"}

    def _between(self) -> None:
        """Note what an evaluation has changed: a save after it holds such buffers, and the next step goes by all.

        What is no buffer, callbacks of the user's alone can have changed.
        """
        known, hidden = self._known, self._changed()
        now = self._state() if self._context.callbacks.users else self._buffers_now()
        changed = {name: digest for name, digest in now.items() if known.get(name) != digest}
        self._known = known | now
        if changed or hidden:
            self.write("between", self._context.t.step, between=changed, hidden_between=hidden)

    def _changed(self) -> dict[str, tuple[str, str]]:
        """Return (before, now) of what no checkpoint holds and has changed since this was last asked."""
        before, self._hidden = self._hidden, self._hidden_now()
        return changes(before, self._hidden)

    def _changed_in_loaders(self, micro_batches: Sequence[Batch]) -> list[dict[str, tuple[str, str]]]:
        """Return the same of the loader process that made each micro-batch, as it was when that was made."""
        found: list[dict[str, tuple[str, str]]] = []
        for batch in micro_batches:
            held, worker = batch.pop("held"), batch["worker"]
            if held is None:
                found.append({})
                continue
            found.append(changes(self._of_loaders.get(worker, {}), held))
            self._of_loaders[worker] = held
        return found

    def _hidden_now(self) -> dict[str, str]:
        context, feed = self._context, self._context.setup.feed
        splits, objective = context.data.splits, context.t.objective
        loss, model = "task" if objective.loss is None else "loss", context.t.state.model
        held = {id(each) for each in (*model.parameters(), *model.buffers())} - _not_saved(model)
        found = hidden_state(
            {
                "model": model,
                "optimizer": context.t.state.optimizer,
                loss: objective.holds,
                **{f"{turn.name} schedule".strip(): turn.schedule for turn in context.t.turns},
                "data": splits["train"],
                "transforms": feed.transforms["train"],
                "metrics": context.evaluator.metrics,
                "evaluated data": {name: each for name, each in splits.items() if name != "train"},
                "evaluated transforms": feed.transforms["eval"],
                "callback": {name: held_by_callback(each) for name, each in context.callbacks.users.items()},
            },
            besides=held,
        )
        return found | hidden_weights(loss, objective.holds, model)


class _Noting(Transform):
    """A transform that puts digests of what it is given into the batch, in whatever process it runs."""

    def __init__(self, inner: Transform):
        self.inner = inner

    def __call__(self, batch: Batch, epochs: np.ndarray) -> Batch:
        rows = len(batch["ids"]) if "ids" in batch else len(epochs)
        samples = _rows({"inputs": batch["inputs"], "targets": batch.get("targets")}, rows)
        worker = get_worker_info()
        batch = self.inner(batch, epochs)
        batch["samples"], batch["worker"] = samples, None if worker is None else worker.id
        # what is in this process, the one that trains looks at itself
        roots = {} if worker is None else {"data": getattr(worker.dataset, "source", None), "transforms": self.inner}
        batch["held"] = hidden_state(roots) if roots else None
        return batch


def changes(before: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return {path: (before, now)} of what is not the same."""
    paths = sorted(before.keys() | now.keys())
    pairs = {path: (before.get(path, "nothing"), now.get(path, "nothing")) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


# --------------------------------------------------------------------------------------------------------------------
# Digests


def _of_batches(micro_batches: Sequence[Batch]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {key: [] for key in ("ids", "inputs", "targets", "shapes")}
    for batch in micro_batches:
        ids = batch["ids"].tolist()
        found["ids"].append(ids)
        found["inputs"].append(_rows(batch["inputs"], len(ids)))
        found["targets"].append(_rows(batch.get("targets"), len(ids)))
        found["shapes"].append(_shape({"inputs": batch["inputs"], "targets": batch.get("targets")}))
    return found


def _rows(value: Any, rows: int) -> list[str]:
    """Return a digest of each of the `rows` samples in a tensor, a list, or a dict of these."""
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        flat = value.detach().cpu().contiguous().view(rows, -1).view(torch.uint8).numpy()
        return [_hash(row) for row in flat]
    if isinstance(value, dict):
        parts = [_rows(value[key], rows) for key in sorted(value)]
        return ["".join(row) for row in zip(*parts, strict=True)]
    if isinstance(value, list | tuple) and len(value) == rows:
        return [_digest_of(item)[0] if isinstance(item, Tensor) else _hash(repr(item).encode()) for item in value]
    whole = _digest_of(value)[0] if isinstance(value, Tensor) else _hash(repr(value).encode())
    return [whole] * rows


def _shape(value: Any) -> Any:
    """Return the shape of one sample in a batch: rows are the same bytes only where that is the same."""
    if isinstance(value, Tensor):
        return list(value.shape[1:])
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    return [_shape(item[None]) if isinstance(item, Tensor) else None for item in value] if value is not None else None


def _digest_of(tensor: Tensor) -> tuple[str, float]:
    flat = local(tensor).detach().cpu().contiguous().view(-1)
    norm = float(flat.double().norm()) if flat.is_floating_point() else float("nan")
    return _hash(flat.view(torch.uint8).numpy()), norm


def _hash(raw: Any) -> str:
    return xxhash.xxh3_64_hexdigest(raw)


def _norm(raw: np.ndarray, dtype: str) -> float:
    if dtype not in FLOATS:
        return float("nan")
    values = widen(raw, dtype)
    chunks = (values[start : start + _CHUNK].astype(np.float64) for start in range(0, len(values), _CHUNK))
    return sum(float(np.dot(chunk, chunk)) for chunk in chunks) ** 0.5


# --------------------------------------------------------------------------------------------------------------------
# What is known of the model


def _not_saved(model: nn.Module) -> set[int]:
    """Return the ids of buffers that are in no checkpoint."""
    return {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}


def _batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the layers whose results depend on which samples share a micro-batch."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [canonical_name(name) for name, module in model.named_modules() if isinstance(module, kinds)]


def _drawn_from(seed: int, device: torch.device) -> list[str]:
    """Return which of the generators, seeded with `seed`, have been drawn from since: dropout does, whoever calls it.

    A generator that was seeded and not drawn from is in the state that seeding a fresh one gives.
    """
    found = []
    fresh = torch.Generator().manual_seed(seed)
    if not torch.equal(fresh.get_state(), torch.default_generator.get_state()):
        found.append("torch")
    if device.type == "cuda":
        here = torch.cuda.default_generators[device.index or 0]
        if not torch.equal(torch.Generator(device).manual_seed(seed).get_state(), here.get_state()):
            found.append("torch.cuda")
    if random.Random(seed).getstate() != random.getstate():
        found.append("random")
    legacy, now = np.random.RandomState(seed % 2**32).get_state(), np.random.get_state()
    if not all(np.array_equal(one, other) for one, other in zip(legacy, now, strict=True)):
        found.append("numpy.random")
    return found
