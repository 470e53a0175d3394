"""The story of a run: `train` on one page, `train_step` as the whole mathematics, `evaluate` over every sample once.

The state of training is `(step, parameters, optimizer state)`. Which samples a step consumes, its learning rate and its
random numbers are computed from the recipe and the step, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distrain.checkpoint import Manifest, Reader, Saved, Saver, find_newest
from distrain.config import Duration, Horizon, Recipe, RecipeError, UserError, mix
from distrain.consolidate import export
from distrain.data import (
    SampleOrder,
    Transform,
    batch_shape,
    build_data,
    build_eval_loader,
    build_loader,
    build_transform,
    prepare_data,
)
from distrain.datasets import AnySource, Batch, Data, is_stream
from distrain.metrics import MetricSet, build_metrics, check_metrics, higher_is_better
from distrain.models import Convention, build_model, calling_convention, check_model, describe_model
from distrain.optim import (
    Ema,
    Loss,
    Schedule,
    build_loss,
    build_optimizer,
    check_loss,
    check_optimizer,
    check_schedule,
    resolve_schedule,
    set_lr,
)
from distrain.recipe_file import dump_recipe, load_recipe
from distrain.rundir import RunDir, now
from distrain.strategy import TrainingState, World, align_buffers, clip_gradients, prepare, without_sync
from distrain.telemetry import Telemetry, duration

T = TypeVar("T")

IGNORED = -100
"""The target of a token that is not to be predicted."""

# --------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class Training:
    """What a step needs. `step` counts finished optimizer steps; everything else is fixed during a run."""

    recipe: Recipe
    world: World
    model: nn.Module
    """Wrapped for the world."""
    optimizer: torch.optim.Optimizer
    """Prepared for the world."""
    parameters: list[nn.Parameter]
    """Those that are trained."""
    call: Convention
    """How the model is called on inputs."""
    loss: Loss
    schedule: Schedule
    state: TrainingState
    step: int = 0

    def objective(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what a batch adds to the loss, and its count, with the model's auxiliary loss for each sample."""
        outputs = self.call(model, batch["inputs"])
        loss_sum, count = self.loss.sum_and_count(self.loss.taken(outputs), batch["targets"])
        if outputs.aux_loss is not None:
            loss_sum = loss_sum + outputs.aux_loss * count.to(loss_sum.dtype)
        return loss_sum, count


def train_step(t: Training, micro_batches: Sequence[Batch]) -> Tensor:
    """Make one optimizer step; returns this rank's (3,) float64: sum of losses, their count, norm of the gradient.

    The gradient is that of `sum of losses / count`, both taken over all micro-batches and ranks, so it depends neither on
    how samples are spread over them nor on how many targets each holds. All ranks call. The norm is that of the whole
    gradient before clipping, on rank 0; it is 0 on other ranks and where the recipe does not clip.
    """
    world, loss = t.world, t.loss
    set_lr(t.optimizer, t.recipe.optim.lr * t.schedule(t.step))
    # ranks' gradients are averaged on the way, and this is to be a sum: hence the world's size above the count
    share: float | Tensor
    if loss.count_is_fixed:
        share = world.world_size / loss.fixed_count(t.recipe.batch.global_batch_size, micro_batches[0]["targets"])
    else:
        counts = torch.stack([loss.count(batch["targets"]) for batch in micro_batches]).sum()
        share = world.world_size / world.sum(counts.to(world.device))
    loss_sum = count = norm = torch.zeros((), dtype=torch.float64, device=world.device)
    for index, batch in enumerate(micro_batches):
        batch = to_device(batch, world)
        seed_dropout(world, mix(t.recipe.seed, "dropout", t.step, world.rank, index))
        with without_sync(world, t.model, last=index == len(micro_batches) - 1):
            objective, counted = t.objective(t.model, batch)
            (objective * share).backward()
        loss_sum = loss_sum + objective.detach()
        count = count + counted
    if t.recipe.optim.clip_norm is not None:
        whole = clip_gradients(t.parameters, t.recipe.optim.clip_norm)
        norm = whole if world.rank == 0 else norm
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.state.ema is not None:
        t.state.ema.update()
    t.step += 1
    return torch.stack((loss_sum, count, norm.double()))


def to_device(batch: Batch, world: World) -> Batch:
    """Return the batch on this rank's device, floating inputs and targets in float64 where the recipe's arithmetic is."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        dtype = torch.float64 if world.precision == "fp64" and value.is_floating_point() else value.dtype
        return value.to(world.device, dtype, non_blocking=True)

    return {key: move(value) if key in ("inputs", "targets") else value for key, value in batch.items()}


def seed_dropout(world: World, seed: int) -> None:
    """Seed the generator that the model draws from; much cheaper than `torch.manual_seed`, which visits every device."""
    torch.default_generator.manual_seed(seed)
    if world.device.type == "cuda":
        torch.cuda.default_generators[world.device.index or 0].manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: nn.Module,
    call: Convention,
    source: AnySource,
    *,
    world: World,
    loss: Loss,
    metrics: MetricSet,
    batch_size: int,
    transform: Transform | None = None,
    workers: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """Return {metric: value} over every sample of `source` exactly once. All ranks call; all get the same.

    Ranks add up sums and counts, one reduction carries them, one division follows. Raises RuntimeError when the samples
    seen are not the data set, each once.
    """
    metrics.reset()
    seen = _Seen()
    was_training = model.training
    model.eval()
    loss_sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    loader = build_eval_loader(
        source,
        rank=world.rank,
        world_size=world.world_size,
        batch_size=batch_size,
        transform=transform,
        workers=workers,
        pin_memory=world.device.type == "cuda",
        split=split,
    )
    with torch.no_grad():
        for batch in loader:
            ids = batch["ids"]
            seen.add(ids.numpy())
            keep = (ids >= 0).to(world.device, non_blocking=True)
            batch = to_device(batch, world)
            outputs = call(model, batch["inputs"])
            loss_sum, count = loss.sum_and_count(loss.taken(outputs), batch["targets"], keep)
            loss_sums += torch.stack((loss_sum.double(), count.double()))
            metrics.update(outputs.logits, batch["targets"], keep, (loss_sum, count))
            if metrics.needs_text:
                metrics.update_text(*_texts(model, batch, decode), keep=(ids >= 0).tolist())
    model.train(was_training)
    own = torch.tensor(seen.sums(), dtype=torch.float64, device=world.device)
    metric_sums = metrics.sums().to(world.device)
    total = world.sum(torch.cat((loss_sums, own, metric_sums)))
    seen.check(total[2:5].tolist(), source, split)
    gathered = metrics.gather(world.gather)
    return {
        "loss": (total[0] / total[1]).item(),
        **metrics.compute(total[5:], gathered),
        "samples": int(total[2].item()),
    }


def _texts(
    model: nn.Module, batch: Batch, decode: Callable[[Sequence[int]], str] | None
) -> tuple[list[str], list[str]]:
    """Return what the model generates for a batch of sources, and the references."""
    generate = getattr(model, "generate", None)
    if decode is None or generate is None or "references" not in batch:
        raise UserError(
            "metric 'bleu' compares texts: it needs a model with a method generate(source, max_new_tokens) and a data set "
            "of parallel text; take it out of eval.metrics"
        )
    source = batch["inputs"]["source"]
    # Translations longer than twice the reference are wrong anyway. Each row has a limit of its own: with one for the
    # batch the score would depend on what else is in it, and so on the number of processes.
    limits = (2 * (batch["targets"] != IGNORED).sum(dim=1) + 8).tolist()
    generated = generate(source, max_new_tokens=max(limits)).tolist()
    return [decode(row[:limit]) for row, limit in zip(generated, limits, strict=True)], list(batch["references"])


class _Seen:
    """Counts sample ids so that one repeated and one missing cannot pass for each other."""

    def __init__(self) -> None:
        self._count = 0
        self._hash = 0

    def add(self, ids: np.ndarray) -> None:
        ids = ids[ids >= 0]
        self._count += len(ids)
        self._hash = (self._hash + _hash_sum(ids)) % 2**64

    def sums(self) -> list[float]:
        # halves of 32 bits stay exact in float64 when summed over ranks
        return [float(self._count), float(self._hash >> 32), float(self._hash & 0xFFFFFFFF)]

    @staticmethod
    def check(total: list[float], source: AnySource, split: str) -> None:
        count = int(total[0])
        expected = len(source) if hasattr(source, "__len__") else count
        found = ((int(total[1]) << 32) + int(total[2])) % 2**64
        if count != expected or found != sum(map(_hash_sum, _chunks(expected))) % 2**64:
            raise RuntimeError(
                f"the evaluation of split '{split}' saw {count} samples that are not the {expected} of the data set, each "
                "once; its numbers are not reported"
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


# --------------------------------------------------------------------------------------------------------------------
# The run


class Every:
    """Says after which steps something is due: each time `period` steps, which may be a fraction, have gone by."""

    def __init__(self, duration: Duration | None, horizon: Horizon, what: str):
        self.seconds = duration.seconds if duration is not None else None
        self._period: Fraction | None = None
        if duration is not None and self.seconds is None and duration.amount > 0:
            self._period = max(Fraction(1), horizon.exact_steps(duration, what))

    def due(self, step: int) -> bool:
        """Whether it is due after `step` finished steps."""
        if self._period is None:
            return False
        steps, periods = self._period.numerator, self._period.denominator
        return step * periods // steps > (step - 1) * periods // steps

    def elapsed(self, since: float) -> bool:
        """Whether a period in seconds has gone by on this rank's monotonic clock."""
        return self.seconds is not None and time.monotonic() - since >= self.seconds


class StopRequest:
    """Notes SIGTERM and SIGINT; the loop turns the note into a decision of all ranks. A second SIGINT interrupts."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@dataclass
class Best:
    """The evaluations so far, and which was best. Read back from metrics.jsonl, so nothing of it is state."""

    metric: str
    higher: bool
    scores: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, metrics: MetricSet, run: RunDir, world: World, step: int) -> Best:
        """Take up the scores of this run up to `step`."""
        name = (recipe.eval.best or "loss").removeprefix("-")
        best = cls(name, higher_is_better(recipe.eval.best or "loss", metrics))
        rows = world.first(
            lambda: [(row["step"], row[name]) for row in run.rows() if row["event"] == "eval" and row["step"] <= step]
        )
        best.scores = [(at, float(score)) for at, score in rows]
        return best

    def _key(self, scored: tuple[int, float]) -> float:
        step, score = scored
        if math.isnan(score):
            return -math.inf
        return score if self.higher else -score

    def value(self) -> tuple[int, float] | None:
        """Return (step, score) of the best evaluation, the earliest of equals."""
        return max(self.scores, key=self._key, default=None)

    def improved(self) -> bool:
        """Whether the last evaluation is the best."""
        return bool(self.scores) and self.value() == self.scores[-1]

    def exhausted(self, patience: int, min_delta: float) -> bool:
        """Whether the last `patience` evaluations brought no improvement of more than `min_delta`."""
        top, since = -math.inf, 0
        for scored in self.scores:
            if self._key(scored) > top + min_delta or top == -math.inf:
                top, since = self._key(scored), 0
            else:
                since += 1
        return since >= patience


def train(run: RunDir, world: World) -> dict[str, Any]:
    """Train the run's recipe from its newest checkpoint to its end; returns the summary. All ranks call.

    Raises UserError for what the user can mend, before the first step wherever that is possible. A run that is asked to
    stop saves its state, is marked PREEMPTED, and goes on from there when it is started again.
    """
    recipe = load_recipe(run.recipe_path).recipe
    with StopRequest() as stop, Session.open(run, recipe, world) as s:
        if s.t.step == 0 and recipe.eval.every is None:
            s.say("eval.every is null: the model is scored only at the end")
        late = None
        for micro_batches in s.loader():
            latest = s.begin_report(train_step(s.t, micro_batches), stop)
            # a step's numbers are read while the next one runs, so that nothing waits for the device
            s.finish_report(late)
            late = latest
            if s.eval_due() or s.save_due() or s.at_end():
                s.finish_report(late)
                late = None
            if s.eval_due() or (s.at_end() and not s.stopping):
                s.evaluate()
            if s.save_due() or s.at_end() or s.new_best():
                s.save()
            if s.at_end():
                break
        return s.finish() if not s.stopping else s.preempt()


class Session:
    """One attempt at a run: what `train` reads like a list. Every method is called by all ranks at the same step."""

    def __init__(self, run: RunDir, recipe: Recipe, world: World):
        """Build everything up to the first step; what can fail fails here, on all ranks together."""
        self.run, self.recipe, self.world = run, recipe, world
        self.started = time.monotonic()
        check_recipe(recipe, str(run.recipe_path))
        world.first(run.clear_markers)
        world.first(lambda: prepare_data(recipe))
        checkpoint, skipped = world.first(lambda: find_newest(run.checkpoints))
        reader = world.together(lambda: Reader(checkpoint, verify=False)) if checkpoint is not None else None
        self.data: Data = world.together(
            lambda: build_data(recipe, state=reader.manifest.scalars["data"] if reader is not None else None)
        )
        self.transforms = {"train": build_transform(recipe, "train"), "eval": build_transform(recipe, "eval")}
        self.horizon = horizon_of(recipe, self.data)
        assert self.horizon.total_steps is not None
        self.total_steps: int = self.horizon.total_steps
        self._told: list[str] = []
        self.t = self._training(resumes=reader is not None)
        if reader is not None:
            world.together(lambda: self.t.state.restore(reader))
            reader.close()
            self.t.step = reader.manifest.step
        self.first_step = self.t.step
        self.metrics = build_metrics(recipe, self.data.meta)
        self.best = Best.of(recipe, self.metrics, run, world, self.t.step)
        self.stopping = ""
        # a run can be stopped between the evaluation that ends it and the end itself
        self.ended_early = self._exhausted()
        self.telemetry = Telemetry.open(
            run,
            recipe,
            rank=world.rank,
            total_steps=self.total_steps,
            start_step=self.t.step,
            config=recipe.model_dump(mode="json", by_alias=True),
        )
        self.saver = Saver(
            run.checkpoints,
            world,
            keep=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            asynchronous=recipe.checkpoint.asynchronous,
        )
        self.saver.rehearse()
        self._log_every = Every(recipe.log.every, self.horizon, "log.every")
        self._eval_every = Every(recipe.eval.every, self.horizon, "eval.every")
        self._save_every = Every(recipe.checkpoint.every, self.horizon, "checkpoint.every")
        self._saved_step = self.t.step if reader is not None else -1
        self._scored_step = self.best.scores[-1][0] if self.best.scores else -1
        self._saved_at = self._logged_at = time.monotonic()
        self._logged_step = self.t.step
        self._time_to_save = False
        self._waited = Waited()
        for path, reason in skipped:
            self.say(f"skipped checkpoint {path.name}: {reason}")
        self._introduce(reader.manifest if reader is not None else None)
        for told in self._told:
            self.say(f"  {told}")

    @classmethod
    @contextmanager
    def open(cls, run: RunDir, recipe: Recipe, world: World) -> Iterator[Session]:
        """Set up, and put the terminal, trackers and files in order at the end, however it comes."""
        session = cls(run, recipe, world)
        try:
            yield session
        finally:
            session.saver.close()
            session.telemetry.close()

    def _training(self, *, resumes: bool) -> Training:
        recipe, world = self.recipe, self.world
        micro_batch_size, accumulation = batch_shape(recipe.batch, world.world_size)
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation

        def build() -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
            model = build_model(recipe, self.data.meta, weights=not resumes, say=self._told.append)
            model.to(world.device)
            return model, build_optimizer(model, recipe.optim), build_loss(recipe, self.data.meta)

        model, optimizer, loss = world.together(build)
        call = calling_convention(model)

        ema = Ema(model, recipe.train.ema) if recipe.train.ema is not None else None
        schedule = resolve_schedule(recipe.schedule, self.horizon)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = TrainingState(model, optimizer, ema)
        t = Training(recipe, world, model, optimizer, trained, call, loss, schedule, state)

        def rehearse(wrapped: nn.Module) -> None:
            (first, *_) = next(self._batches(start_step=0))
            t.objective(wrapped, to_device(first, world))[0].backward()

        model.train()
        t.model, t.optimizer = prepare(world, model, optimizer, rehearse)
        if recipe.train.compile:
            model.compile()
        return t

    def _batches(self, start_step: int) -> Iterator[list[Batch]]:
        source = self.data.splits["train"]
        length = len(source) if not is_stream(source) else None
        return build_loader(
            source,
            SampleOrder(length, self.recipe.seed) if length is not None else None,
            recipe=self.recipe,
            rank=self.world.rank,
            world_size=self.world.world_size,
            micro_batch_size=self.micro_batch_size,
            start_step=start_step,
            stop_step=self.total_steps,
            transform=self.transforms["train"],
            pin_memory=self.world.device.type == "cuda",
        )

    # ----------------------------------------------------------------------------------------------------------------
    # What is due

    def loader(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left, noting how long the loop waits for them."""
        if self.ended_early:
            return iter(())
        return self._waited.during(self._batches(start_step=self.t.step))

    def at_end(self) -> bool:
        """Whether no step follows this one."""
        return self.t.step >= self.total_steps or bool(self.stopping) or self.ended_early

    def eval_due(self) -> bool:
        """Whether the recipe wants the model scored after this step."""
        return self._scored_step != self.t.step and self._eval_every.due(self.t.step) and self.split is not None

    def save_due(self) -> bool:
        """Whether the recipe wants the state saved after this step."""
        return self._save_every.due(self.t.step) or self._time_to_save

    def new_best(self) -> bool:
        """Whether the model was scored after this step and is the best so far."""
        return self.recipe.checkpoint.keep_best > 0 and self._scored_step == self.t.step and self.best.improved()

    @property
    def split(self) -> str | None:
        """The split that is scored during training."""
        return next((name for name in ("valid", "test") if name in self.data.splits), None)

    # ----------------------------------------------------------------------------------------------------------------
    # A step's report

    def begin_report(self, sums: Tensor, stop: StopRequest) -> Report:
        """Start adding up a step's numbers over the ranks; what else the ranks must agree on rides along."""
        time_to_save = self.world.rank == 0 and self._save_every.elapsed(self._saved_at)
        written = self.saver.in_flight is not None and self.saver.written
        flags = torch.tensor([stop.reason is not None, time_to_save, written], dtype=torch.float64, device=sums.device)
        return Report(self.t.step, self.world.sum_later(torch.cat((sums, flags))), stop)

    def finish_report(self, report: Report | None) -> None:
        """Read a step's numbers, write its row if one is due, and act on what the ranks agreed."""
        if report is None:
            return
        loss_sum, count, norm, stops, time_to_save, written = report.read()
        loss = loss_sum / count if count else math.nan
        for what, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                self._published(self.saver.finish())  # of an earlier step, when all was well
                raise UserError(
                    f"the {what} of step {report.step} is {value}; the run stops with its last checkpoint as it was. "
                    "Lower optim.lr, set optim.clip_norm, or look at the inputs and for divisions by zero in the model"
                )
        if (
            self._log_every.due(report.step)
            or report.step == self.total_steps
            or self._log_every.elapsed(self._logged_at)
        ):
            self._log(report.step, loss, norm)
        if stops and not self.stopping:
            self.stopping = report.stop.reason or "a request on another rank"
        self._time_to_save = bool(time_to_save)
        if written == self.world.world_size:
            self._published(self.saver.finish())

    def _log(self, step: int, loss: float, norm: float) -> None:
        clock = time.monotonic()
        seconds = clock - self._logged_at
        samples = (step - self._logged_step) * self.recipe.batch.global_batch_size
        row = {
            "step": step,
            "epoch": self._epoch(step),
            "samples": step * self.recipe.batch.global_batch_size,
            "loss": loss,
            "lr": self.recipe.optim.lr * self.t.schedule(step - 1),
            "samples_per_s": samples / seconds if seconds else 0.0,
            "data_wait": min(self._waited.take() / seconds, 1.0) if seconds else 0.0,
            "time": now(),
        }
        if self.recipe.optim.clip_norm is not None:
            row["grad_norm"] = norm
        self._logged_at, self._logged_step = clock, step
        self.telemetry.train(row)

    def _epoch(self, step: int) -> float:
        length = self.horizon.samples_per_epoch
        return step * self.recipe.batch.global_batch_size / length if length else 0.0

    # ----------------------------------------------------------------------------------------------------------------
    # Scoring and saving

    def evaluate(self) -> None:
        """Score the model on the split for that, and stop early where the recipe says so."""
        if self.split is None or self._scored_step == self.t.step:
            return
        values = self._score(self.split)
        self._scored_step = self.t.step
        self.best.scores.append((self.t.step, float(values[self.best.metric])))
        stop = self.recipe.eval.early_stop
        if stop is not None and self._exhausted():
            self.ended_early = True
            self.say(
                f"stopping early: {self.best.metric} has not improved by more than {stop.min_delta:g} in "
                f"{stop.patience} evaluations"
            )
        # evaluation is not training time
        self._logged_at, self._logged_step = time.monotonic(), self.t.step

    def _exhausted(self) -> bool:
        stop = self.recipe.eval.early_stop
        return stop is not None and self.best.exhausted(stop.patience, stop.min_delta)

    def _score(self, split: str, event: str = "eval") -> dict[str, Any]:
        began = time.monotonic()
        align_buffers(self.world, self.t.state)
        ema = self.t.state.ema
        with ema.applied(self.t.state.model) if ema is not None else nullcontext():
            values = evaluate(
                self.t.state.model,
                self.t.call,
                self.data.splits[split],
                world=self.world,
                loss=self.t.loss,
                metrics=self.metrics,
                batch_size=self.recipe.eval.batch or self.micro_batch_size,
                transform=self.transforms["eval"],
                workers=self.recipe.data.workers,
                decode=self.data.meta.decode,
                split=split,
            )
        seconds = time.monotonic() - began
        self.telemetry.write(
            {"event": event, "step": self.t.step, "split": split, **values, "seconds": seconds, "time": now()}
        )
        self.say(f"step {self.t.step}  {split}: {in_words(values)}  ({duration(seconds)})")
        return values

    def save(self) -> None:
        """Save the state of this step, once."""
        if self._saved_step == self.t.step:
            return
        score = None
        if self._scored_step == self.t.step:
            score = self.best.scores[-1][1] * (1 if self.best.higher else -1)
        state = self.t.state
        self._published(self.saver.finish())
        if not all_finite(state.model):
            raise UserError(
                f"after step {self.t.step} the model has weights that are not finite; they are not saved, and the run stops "
                "with its last checkpoint as it was. Lower optim.lr, or set optim.clip_norm"
            )
        align_buffers(self.world, state)
        self.saver.begin(
            self.t.step,
            state.specs(),
            state.pieces(self.world.rank, self.world.world_size),
            scalars=state.scalars() | {"data": self.data.state},
            aliases=state.tensors()[1],
            recipe=dump_recipe(self.recipe),
            strategy=self.world.strategy,
            score=score,
        )
        self._saved_step, self._saved_at, self._time_to_save = self.t.step, time.monotonic(), False
        if not self.recipe.checkpoint.asynchronous:
            self._published(self.saver.finish())

    def _published(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self.telemetry.write(
            {"event": "checkpoint", "step": saved.step, "bytes": saved.nbytes, "seconds": saved.seconds, "time": now()}
        )
        self.say(f"saved {saved.path.name} ({saved.nbytes / 2**20:.1f} MiB in {saved.seconds:.2f} s)")
        for warning in saved.warnings:
            self.say(f"warning: {warning}")

    # ----------------------------------------------------------------------------------------------------------------
    # The end

    def preempt(self) -> dict[str, Any]:
        """Leave the run so that the same command goes on from here."""
        self._published(self.saver.finish())
        self.world.first(lambda: self.run.mark_preempted(self.t.step, self.stopping))
        self.say(
            f"stopped by {self.stopping} after step {self.t.step}, which is saved; the same command goes on from there"
        )
        return {"finished": False, "step": self.t.step, "reason": self.stopping}

    def finish(self) -> dict[str, Any]:
        """Export the model, score what was exported on the test split, and write the summary."""
        self.evaluate()  # where a stop came between the last step and its evaluation
        self.save()
        self._published(self.saver.finish())
        best = self.best.value()
        chosen, why = self._chosen(best)
        values: dict[str, Any] = {}
        if "test" in self.data.splits:
            if chosen != self.t.step:
                reader = self.world.together(lambda: Reader(self._checkpoint(chosen)))
                self.world.together(lambda: self.t.state.restore(reader))
                reader.close()
                self.t.step = chosen
            values = self._score("test", event="final")
        summary = {
            "finished": True,
            "name": self.recipe.name,
            "steps": self.total_steps if not self.ended_early else self._saved_step,
            "exported_step": chosen,
            "exported": why,
            "model": str(self.run.export_path),
            "checkpoint": str(self._checkpoint(chosen)),
            "test": values,
            "best": {"metric": self.best.metric, "step": best[0], "value": best[1]} if best else None,
            "processes": self.world.world_size,
            "strategy": self.world.strategy,
            "precision": self.world.precision,
            "seconds": time.monotonic() - self.started,
            "samples_per_s": self._rate(),
        }

        def write() -> None:
            self.run.export_path.parent.mkdir(exist_ok=True)
            export(
                self._checkpoint(chosen), self.run.export_path, ema=self.recipe.train.ema is not None, overwrite=True
            )
            self.run.mark_finished(summary)

        self.world.first(write)
        if self.telemetry.display is not None:
            show_summary(summary, self.telemetry.display.console)
        return summary

    def _rate(self) -> float:
        rows = (
            [row["samples_per_s"] for row in self.run.rows() if row["event"] == "train"] if self.world.rank == 0 else []
        )
        return float(np.median(rows)) if rows else 0.0

    def _chosen(self, best: tuple[int, float] | None) -> tuple[int, str]:
        """Return the step whose model is exported, and why: the best where the recipe names eval.best, else the last."""
        if self.recipe.eval.best is None or best is None:
            return self._saved_step, "last step"
        if self.world.first(lambda: self._checkpoint(best[0]).is_dir()):
            return best[0], f"best {self.best.metric}"
        return self._saved_step, f"last step; the best, step {best[0]}, was not kept: checkpoint.keep_best"

    def _checkpoint(self, step: int) -> Path:
        return self.run.checkpoints / f"step-{step:08d}"

    def say(self, text: str) -> None:
        """Tell the person in front of the terminal, once."""
        self.telemetry.say(text)

    def _introduce(self, resumed: Manifest | None) -> None:
        world, recipe = self.world, self.recipe
        splits = ", ".join(
            f"{name} {len(source):,}" if not is_stream(source) else f"{name} (stream)"
            for name, source in self.data.splits.items()
        )
        per_step = f"{recipe.batch.global_batch_size} = {world.world_size} x {self.micro_batch_size}"
        if self.accumulation > 1:
            per_step += f" x {self.accumulation} accumulated"
        if recipe.batch.micro_batch_size == "auto":
            per_step += " (batch.micro auto: global / processes, not probed)"
        self.say(f"run {self.run.path}")
        self.say(f"  world    {world.world_size} x {world.device.type}, {world.strategy}, {world.precision}")
        self.say(f"  data     {recipe.data.name}: {splits}")
        self.say(f"  model    {recipe.model.name}: {describe_model(self.t.state.model)}")
        self.say(f"  batch    {per_step}; {self.total_steps:,} steps")
        if resumed is None:
            return
        written_by, now_by = f"{resumed.world_size} x {resumed.strategy}", f"{world.world_size} x {world.strategy}"
        changed = f", written by {written_by}; goes on with {now_by}" if written_by != now_by else ""
        self.say(f"  resumes  {self._checkpoint(resumed.step).name}{changed}")
        # published and not yet noted when the attempt before was killed
        size = sum(file.size for file in resumed.files)
        self.telemetry.write(
            {"event": "checkpoint", "step": resumed.step, "bytes": size, "seconds": None, "time": now()}
        )


@dataclass(frozen=True)
class Report:
    """A step's numbers on their way."""

    step: int
    read: Callable[[], list[float]]
    stop: StopRequest


def all_finite(model: nn.Module) -> bool:
    """Return whether every parameter is: the same answer on every rank, as they hold the same values."""
    largest = torch._foreach_norm([parameter.detach() for parameter in model.parameters()], math.inf)
    return bool(torch.stack([value.double() for value in largest]).isfinite().all())


class Waited:
    """Measures how long a loop waits for its batches."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def during(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the same."""
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - began
            yield item

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def check_recipe(recipe: Recipe, source: str) -> None:
    """Raise RecipeError with everything that can be known to be wrong with a recipe's names and arguments before data."""
    problems = [
        *check_model(recipe),
        *check_loss(recipe),
        *check_optimizer(recipe.optim),
        *check_schedule(recipe.schedule),
        *check_metrics(recipe),
    ]
    if problems:
        raise RecipeError(source, problems)


def horizon_of(recipe: Recipe, data: Data) -> Horizon:
    """Return what durations mean for this recipe and data, with the total number of steps."""
    train = data.splits["train"]
    length = None if is_stream(train) else len(train)
    if length == 0:
        raise UserError(f"data set {recipe.data.name!r} has no samples to train on")
    horizon = Horizon(recipe.batch.global_batch_size, length, data.meta.tokens_per_sample)
    return replace(horizon, total_steps=horizon.steps(recipe.train.length, "train"))


def in_words(values: dict[str, Any]) -> str:
    """Return an evaluation's single numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Print how a finished run went."""
    table = Table(
        title=f"{summary['name']}: {summary['steps']:,} steps in {duration(summary['seconds'])}", title_justify="left"
    )
    table.add_column("result")
    table.add_column("value")
    for name, value in summary["test"].items():
        if isinstance(value, int | float):
            table.add_row(f"test {name}", f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    if best := summary["best"]:
        table.add_row(f"best {best['metric']}", f"{best['value']:.4f} at step {best['step']:,}")
    table.add_row(
        "rate", f"{summary['samples_per_s']:,.0f} samples/s on {summary['processes']} x {summary['strategy']}"
    )
    table.add_row("model", f"{summary['model']} ({summary['exported']})")
    console.print(table)
