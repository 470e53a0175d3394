"""Evaluates a model on every sample of a split, each once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.config import UserError
from distrain.data import Transform
from distrain.datasets.base import AnySource, Batch, DataMeta, is_stream
from distrain.datasets.batches import too_many
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.labels import IGNORED
from distrain.datasets.nested import tensors_in
from distrain.diagnose.index_errors import given
from distrain.metrics import MetricSet
from distrain.networks.huggingface import generate, is_transformers
from distrain.parallel import World
from distrain.run.heartbeat import enter_phase
from distrain.system.errors import some
from distrain.training.company import warn_of_company
from distrain.training.context import to_device
from distrain.training.tasks import Means, Objective


class Interrupted(UserError):
    """An evaluation ended early, because a rank is asked to stop. All ranks raise it."""


def evaluate(
    model: nn.Module,
    objective: Objective,
    source: AnySource,
    *,
    world: World,
    metrics: MetricSet,
    batch_size: int,
    transform: Transform | None = None,
    workers: int = 0,
    meta: DataMeta | None = None,
    split: str = "test",
    unsharded: Callable[[], AbstractContextManager[Any]] = nullcontext,
    stopping: Callable[[], bool] = lambda: False,
    skip_corrupt: int = 0,
    load_batches: Callable[..., Iterable[Batch]] = build_eval_loader,
    try_company: bool = False,
) -> dict[str, Any]:
    """Return {metric: value} over every sample of `source` exactly once. All ranks call; all get the same.

    Ranks add up sums and counts, one reduction carries them, one division follows. Raises RuntimeError when the samples
    seen are not the data set, each once; what one rank raises, all raise.

    Where the ranks hold parts of the model (`world.forward_is_collective`), a forward pass needs all of them: see
    `_pass_together`. Metrics of generated text need more passes on one rank than on another, so for them all weights
    are gathered on every rank: `unsharded` returns the context in which a sharded model needs no other rank.

    `stopping` is asked before each batch; where it is true on a rank, all raise Interrupted.

    `load_batches` makes the loader of one pass, of which each rank has the same number of batches.

    `try_company`: whether the first batch is tried by `warn_of_company`.

    Where the loss is not finite, `nonfinite` says which samples it comes from, as far as their data tell. Where it is
    NaN, so are the metrics.

    Up to `skip_corrupt` corrupt samples are skipped: they are {id: why} in `corrupt_samples`, if there
    are any, and do not count as `samples`.
    """
    metrics.reset(getattr(source, "bytes_per_token", None))
    _check_metrics(objective, metrics)
    objective.begin_evaluation()
    tally = _Tally(objective, metrics, world)
    where = f"the evaluation of split '{split}'"

    reading = {"batch_size": batch_size, "transform": transform, "workers": workers, "split": split}
    options = pass_options(world, **reading, skip_corrupt=skip_corrupt)

    def load() -> Iterable[Batch]:
        return load_batches(source, **options)

    def batches() -> Iterator[Batch]:
        loaded = iter(load())
        while True:
            enter_phase("evaluate")
            if stopping():
                raise Interrupted(f"{where} was left for a request to stop")
            if (batch := next(loaded, None)) is None:
                return
            given(where, [batch])
            yield to_device(batch, world)

    def forward(batch: Batch) -> Any:
        nonlocal try_company
        evaluated = objective.evaluate(model, batch, predict=bool(metrics.names))
        if try_company:
            try_company = False
            warn_of_company(model, objective, batch, world, evaluated)
        return evaluated

    def pass_alone() -> Tensor:
        for batch in batches():
            tally.add(batch, forward(batch))
            if metrics.needs_text:
                metrics.update_text(
                    *generated_texts(model, batch, meta or DataMeta()), keep=(batch["ids"] >= 0).tolist()
                )
        return tally.sums()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if objective.couples or (world.forward_is_collective and not metrics.needs_text):
                _pass_together(world, batches(), forward, tally, stream=is_stream(source))
                if objective.couples:
                    tally.add_means(objective.coupled(model, world))
                total = world.sum_of_all(tally.sums)
            else:
                with unsharded() if world.forward_is_collective else nullcontext():
                    # no rank waits for another before the sums: one whose sample is corrupt must reach the others
                    total = world.sum_of_all(pass_alone)
    finally:
        model.train(was_training)
    means, seen, total = tally.split(total)
    tally.seen.check(seen, source, split)
    nan = math.isnan(means["loss"])
    scores = metrics.undefined("the loss is NaN") if nan else metrics.compute(total, metrics.gather(world.gather))
    values: dict[str, Any] = {**means, **scores, "samples": int(seen[0] - seen[3])}
    if not math.isfinite(values["loss"]):
        found = world.run_on_all(lambda: _look_again(load(), int(tally.first_nonfinite)))
        values["nonfinite"] = _nonfinite(world.gather(found), coupled=objective.couples)
    return values | (_corrupt_samples(tally, world, skip_corrupt) if seen[3] > 0 else {})


def _corrupt_samples(tally: _Tally, world: World, most: int) -> dict[str, Any]:
    """Return {`corrupt_samples`: {id: why}} of all ranks; raises UserError for more than are tolerated."""
    found = dict(sorted(each for part in world.gather(tally.corrupt) for each in part.items()))
    if len(found) > most:  # each rank for itself may have met fewer
        raise UserError(too_many(found, most))
    return {"corrupt_samples": found}


def _check_metrics(objective: Objective, metrics: MetricSet) -> None:
    if objective.couples and metrics.needs_text:
        raise UserError(
            f"{objective.name} couples samples, and its evaluation has no metrics of generated text; take bleu out of "
            "eval.metrics"
        )


def pass_options(world: World, **options: Any) -> dict[str, Any]:
    """Return the arguments of `build_eval_loader` for this rank; `options` are those that depend on the recipe."""
    mesh = world.mesh
    pinned = world.device.type == "cuda"
    return {"rank": mesh.data_rank, "world_size": mesh.data_size, "pin_memory": pinned, **options}


class _Tally:
    """The sums and counts of this rank, and which samples they are of."""

    def __init__(self, objective: Objective, metrics: MetricSet, world: World):
        self._objective, self._metrics, self._world, self._device = objective, metrics, world, world.device
        self._names: tuple[str, ...] | None = None
        self._pairs: Tensor | None = None
        """(names, 2) float64: sum and count of each loss, and of what else the task reports."""
        self._batches = 0
        self.first_nonfinite = torch.full((), -1, dtype=torch.int64, device=world.device)
        """The first batch whose loss is not finite, by its number; read at the end alone, so that nothing waits."""
        self.seen = _Seen()
        self.corrupt: dict[int, str] = {}
        """{id: why} of samples that were skipped."""

    def add(self, batch: Batch, evaluated: Any) -> None:
        """Add a batch on the device, and what `Objective.evaluate` returned for it."""
        ids = batch["ids"]
        self.seen.add(ids.numpy())
        if corrupt := batch.get("corrupt_samples"):
            self.corrupt.update(corrupt)
            self.seen.skip(np.array(list(corrupt)))
        scored = self._objective.score(evaluated, batch, self._world)
        pairs = self.add_means(scored.means)
        finite = pairs[: len(self._objective.names), 0].isfinite().all()
        self.first_nonfinite.masked_fill_(~finite & (self.first_nonfinite < 0), self._batches)
        self._batches += 1
        if scored.predictions is not None and self._metrics.names:
            self._metrics.update(scored.predictions, scored.targets, scored.keep, scored.loss)

    def add_means(self, means: Means) -> Tensor:
        """Add sums and counts; returns them (names, 2)."""
        names, pairs = means
        if self._names is not None and sorted(names) == sorted(self._names):
            pairs = pairs if names == self._names else pairs[[names.index(name) for name in self._names]]
        elif self._names is not None:
            raise UserError(
                f"{self._objective.name} reports {', '.join(names)} of one batch and {', '.join(self._names or ())} of "
                "another; report the same in each, with a count of 0 where there is nothing"
            )
        self._names = self._names or names
        self._pairs = pairs if self._pairs is None else self._pairs + pairs
        return pairs

    def sums(self) -> Tensor:
        """Return what the ranks add up, 1-D float64.

        A number that the names of the means give, their sums and counts by name, four of `_Seen`, those of the metrics.
        """
        assert self._pairs is not None, "each rank has as many batches, and at least one"
        assert self._names is not None
        head = torch.tensor([self._named()], dtype=torch.float64, device=self._device)
        pairs = self._pairs[[self._names.index(name) for name in sorted(self._names)]]
        seen = torch.tensor(self.seen.sums(), dtype=torch.float64, device=self._device)
        return torch.cat((head, pairs.flatten(), seen, self._metrics.sums().to(self._device)))

    def _named(self) -> float:
        return float(zlib.crc32("\0".join(sorted(self._names or ())).encode()))

    def split(self, total: Tensor) -> tuple[dict[str, float], list[float], Tensor]:
        """Return the means by name with the whole loss, the sums of `_Seen`, and those of the metrics."""
        assert self._names is not None
        if total[0] != self._world.world_size * self._named():
            raise UserError(
                f"{self._objective.name} reports {', '.join(self._names)} on rank {self._world.rank} and others on "
                "another; report the same of each batch, with a count of 0 where there is nothing"
            )
        total, end = total[1:], 2 * len(self._names)
        pairs = total[:end].view(-1, 2)
        found = dict(zip(sorted(self._names), (pairs[:, 0] / pairs[:, 1]).tolist(), strict=True))
        means = {name: found[name] for name in self._names}
        losses = self._objective.names
        loss = sum(self._objective.weights.get(name, 1.0) * means[name] for name in losses)
        return (
            {"loss": loss} | {k: v for k, v in means.items() if k != "loss"},
            total[end : end + 4].tolist(),
            total[end + 4 :],
        )


def _pass_together(
    world: World, batches: Iterator[Batch], forward: Callable[[Batch], Any], tally: _Tally, *, stream: bool
) -> None:
    """Take every batch through `forward`, in which ranks wait for each other, and add it to `tally`.

    Before each forward pass the ranks agree that all have a batch. What one of them could not read or add, all raise
    there, where none is left waiting for it. What fails within the forward pass is raised at once: the others are in
    the middle of a collective, and learn of it by the end of this process. The length of a stream is known at its end
    alone, so ranks agree on that as well.
    """
    failure: Exception | None = None
    batch: Batch | None = None

    def fetch() -> Tensor:
        nonlocal batch
        if failure is not None:
            raise failure
        batch = next(batches, None)
        return torch.tensor([batch is None], dtype=torch.float64)

    while True:
        ended = int(world.sum_of_all(fetch, at_once=1))
        if stream and 0 < ended < world.world_size:
            raise RuntimeError(
                "the stream that is evaluated ended on one rank and not on another; it must give every process the "
                "same samples in the same order"
            )
        if batch is None:
            return
        outputs = forward(batch)
        try:
            tally.add(batch, outputs)
        except Exception as error:
            failure = error


_SHOWN = 8
"""Samples in a message."""


def _look_again(loader: Iterable[Batch], number: int) -> tuple[str, list[int]] | None:
    """Return what is not finite in the data of a batch, and of which samples; all of them where their data are sound.

    None where no batch of this rank is meant.
    """
    if number < 0:
        return None
    batch = next(islice(loader, number, None))
    kept = batch["ids"] >= 0
    for key, what in (("inputs", "the inputs"), ("targets", "the targets")):
        bad = torch.zeros(len(kept), dtype=torch.bool)
        for tensor in tensors_in(batch.get(key)):
            if tensor.dim() and tensor.is_floating_point() and len(tensor) == len(kept):
                bad |= ~tensor.reshape(len(kept), -1).isfinite().all(dim=1)
        if (bad & kept).any():
            return what, batch["ids"][bad & kept].tolist()
    return "", batch["ids"][kept].tolist()


def _nonfinite(ranks: Sequence[tuple[str, list[int]] | None], *, coupled: bool) -> str:
    """Return the reason why the loss is not finite, from what every rank has found."""
    found = [each for each in ranks if each is not None]
    if not found:
        return (
            "samples that it takes together give one that is not"
            if coupled
            else "no sample of it has a target that counts"
        )
    what = max(what for what, _ in found)
    ids = sorted(each for kind, part in found if kind == what for each in part)
    samples = f"sample{'s' * (len(ids) > 1)} {some(ids, _SHOWN)}"
    if what:
        return f"{what} of {samples} are not finite"
    return f"it is not finite in a batch of {samples}, whose inputs and targets are: the outputs are not, or too large"


def generated_texts(model: nn.Module, batch: Batch, meta: DataMeta) -> tuple[list[str], list[str]]:
    """Return what the model generates for a batch of sources, and the references."""
    decode, write = meta.decode, getattr(model, "generate", None)
    if decode is None or write is None or "references" not in batch:
        raise UserError(
            "metric 'bleu' compares texts: it needs a model with a method generate(source, max_new_tokens) and a data "
            "set of parallel text; take it out of eval.metrics"
        )
    source = batch["inputs"]["source"]
    # Translations longer than twice the reference are wrong anyway. Each row has a limit of its own: with one for the
    # batch the score would depend on what else is in it, and so on the number of processes.
    limits = (2 * (batch["targets"] != IGNORED).sum(dim=1) + 8).tolist()
    if is_transformers(model):
        pad_id = meta.pad_id or 0
        most = min(max(limits), (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - 1)
        ids: dict[str, Any] = {"pad_id": pad_id, "bos_id": meta.bos_id, "eos_id": meta.eos_id}
        made = generate(model, source, source != pad_id, max_new_tokens=most, starts=True, **ids)[:, 1:]
    else:
        made = write(source, max_new_tokens=max(limits))
    generated = made.tolist()
    return [decode(row[:limit]) for row, limit in zip(generated, limits, strict=True)], list(batch["references"])


class _Seen:
    """Counts sample ids so that one repeated and one missing cannot pass for each other."""

    def __init__(self) -> None:
        self._count = 0
        self._hash = 0
        self._skipped = 0

    def add(self, ids: np.ndarray) -> None:
        ids = ids[ids >= 0]
        self._count += len(ids)
        self._hash = (self._hash + _hash_sum(ids)) % 2**64

    def skip(self, ids: np.ndarray) -> None:
        """Count samples that are in no batch, and are accounted for."""
        self.add(ids)
        self._skipped += len(ids)

    def sums(self) -> list[float]:
        # halves of 32 bits stay exact in float64 when summed over ranks
        return [float(self._count), float(self._hash >> 32), float(self._hash & 0xFFFFFFFF), float(self._skipped)]

    @staticmethod
    def check(total: list[float], source: AnySource, split: str) -> None:
        count = int(total[0])
        expected = count if is_stream(source) else len(source)
        found = ((int(total[1]) << 32) + int(total[2])) % 2**64
        if count != expected or found != sum(map(_hash_sum, _chunks(expected))) % 2**64:
            raise RuntimeError(
                f"the evaluation of split '{split}' saw {count} samples that are not the {expected} of the data set, "
                "each once; its numbers are not reported"
            )


def _chunks(length: int) -> Iterable[np.ndarray]:
    size = 1 << 20
    return (np.arange(start, min(start + size, length)) for start in range(0, length, size))


def _hash_sum(ids: np.ndarray) -> int:
    """Return the sum modulo 2^64 of a hash of each id (the finaliser of SplitMix64; Steele, Lea, Flood 2014)."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(np.sum(z ^ (z >> np.uint64(31)), dtype=np.uint64))
