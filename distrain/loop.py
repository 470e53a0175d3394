"""The story of a run: `train` on one page, and `train_step`, the whole mathematics.

The state of training is `(step, parameters, optimizer state)`. Which samples a step consumes, its learning rate and its
random numbers are computed from the recipe and the step, so a resumed run computes what an uninterrupted one does.
The parts of both are in `training/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.base import Batch
from distrain.diagnose.index_errors import given
from distrain.parallel import StepFlags, StepRecord, World
from distrain.run.folder import RunDir
from distrain.run.heartbeat import enter_phase, stepped
from distrain.run.lease import Lease
from distrain.training import noise
from distrain.training.callbacks.base import Callback
from distrain.training.context import PendingMetrics, TrainContext, Turn, seed_forward, to_device
from distrain.training.coupling import look_ahead
from distrain.training.intervals import StopRequest
from distrain.training.run_loop import Session
from distrain.training.skipping import Anomaly, LocalStepResult


def train(
    run: RunDir,
    world: World,
    lease: Lease | None = None,
    lost: Callable[[UserError], None] | None = None,
    callbacks: Sequence[Callback] = (),
    built_in: Sequence[Callback] | None = None,
) -> dict[str, Any]:
    """Train the run's recipe from its newest checkpoint to its end; returns the summary. All ranks call.

    Each step is taken, and its metrics are delivered: to callbacks, of which logging, trackers, early stopping and the
    trace of a proof are some. Then the model is evaluated and its state saved, where that is due. A rollback changes
    which batches come next.

    Raises UserError for what the user can mend, before the first step wherever that is possible. A run that is asked to
    stop saves its state, is marked PREEMPTED, and is resumed by the same command. Nothing is published once another
    attempt has the `lease`. `lost` reports what went wrong where this process has lost its GPU. `callbacks` are
    called after those of the recipe; `built_in` replaces `built_in_callbacks(recipe)`, which come before.
    """
    recipe = load_recipe(run.recipe_path).recipe
    watched = run.stop_path if world.rank == 0 else None
    with StopRequest(watched) as stop, Session.open(run, recipe, world, stop, lease, lost, callbacks, built_in) as s:
        s.evaluate_if_missed()
        for micro_batches in s.batches():
            taken = train_step(s.t, micro_batches, s.flags)
            s.deliver_metrics(taken)
            # a request to stop comes first: who stops a run may not wait for an evaluation
            if not s.stopping and (s.evaluator.due() or s.at_end()):
                s.evaluator.evaluate()
            if s.checkpoints.due() or s.evaluator.found_best() or s.at_end():
                s.checkpoints.save()
        return s.end()


def train_step(
    t: TrainContext, micro_batches: Sequence[Batch], flags: Callable[[], StepFlags] = StepFlags
) -> PendingMetrics:
    """Take one optimizer step: all of its mathematics, the same under every strategy. All ranks call.

    The gradient is that of `sum of losses / count`, both taken over all micro-batches and ranks, so it depends neither
    on how samples are spread over them nor on how many targets each holds. `flags` returns what this rank has for the
    others; their means over the ranks come with the loss. A step whose scaled gradient overflows is made again with a
    smaller scale, from the same samples. A skipped step changes nothing but the count of steps.

    Several optimizers act one after the other, each on its own losses of the same samples, which see what those before
    it have changed. A skipped turn changes nothing; the others are taken.
    """
    acting = t.acting(t.step + 1)
    given(f"step {t.step + 1}", micro_batches)
    t.strategy.begin_step(t.step)
    if t.objective.follows:
        t.objective.at_step(t.step)
    t.set_lr(t.step)
    taken: tuple[PendingMetrics, ...] = ()
    for turn in acting:
        with t.strategy.only(turn.name):
            taken += (take_turn(t, turn, micro_batches, flags if turn is acting[-1] else StepFlags),)
    if (t.objective.follows or t.state.ema is not None) and any(each.taken for each in taken):
        t.objective.step_taken(t.strategy.model)
        if t.state.ema is not None:
            t.state.ema.update()
    t.step += 1
    stepped(t.step)
    return taken[-1] if len(taken) == 1 else taken[-1]._replace(earlier=taken[:-1])


def take_turn(
    t: TrainContext, turn: Turn, micro_batches: Sequence[Batch], flags: Callable[[], StepFlags]
) -> PendingMetrics:
    """Have one optimizer act in the step under way: forward, backward, norm, clip or skip, step. All ranks call."""
    strategy, world, scaler, anomalies = t.strategy, t.world, t.strategy.scale, t.anomalies
    if anomalies is not None and (known := anomalies.skipped(t.step + 1, turn.name)) is not None:
        return _skip_known(t, turn, known, flags())
    enter_phase("sync")
    objective, clip_norm, last = turn.objective, turn.section.clip_norm, len(micro_batches) - 1
    loss_scale = objective.loss_scale(world, t.recipe.batch.global_batch_size, micro_batches)
    watched = anomalies is not None and anomalies.watches
    judge = anomalies if anomalies is not None and anomalies.judges_first else None
    while True:
        restore_buffers = strategy.remember_buffers() if judge is not None or scaler is not None else _nothing
        grad_scale = scaler.scale if scaler is not None else None
        losses: list[Tensor] = []
        objective.begin_step()
        if objective.looks_ahead:  # a loss takes all samples together: each micro-batch then sees those of all
            look_ahead(t, turn, micro_batches)
        for index, batch in enumerate(micro_batches):
            batch = to_device(batch, world, again=scaler is not None or len(t.turns) > 1)
            seed_forward(t, index, turn, batch["ids"].numel())
            with strategy.micro_batch(last=index == last):
                enter_phase("forward")
                loss_sum = objective.loss_sum(strategy.wrapped, batch)
                weight = objective.as_scale(loss_scale, loss_sum)
                share = loss_sum.detach() * weight
                losses.append(share.sum() if share.dim() else share)
                if index == last:
                    loss = losses[0] if last == 0 else torch.stack(losses).sum(dtype=torch.float64)
                    agree = strategy.agree_async(loss, flags())
                enter_phase("backward")
                scale = weight if grad_scale is None else weight * grad_scale
                strategy.backward(loss_sum, scale, last=index == last)
        enter_phase("sync")
        record = agree()
        enter_phase("optimizer")
        t.local = LocalStepResult(losses, [each["ids"] for each in micro_batches])
        norm: Tensor | None = None
        if watched or grad_scale is not None or clip_norm is not None:
            norm = strategy.grad_norm(record, same_bits=watched)
            norm = norm if grad_scale is None else norm / grad_scale
        read, means, taken = record.to_host_async(world, norm), objective.means_async(world), True
        if judge is not None or scaler is not None:
            agreed_loss, agreed_norm, _ = read()  # here alone the host waits for the device
            if scaler is not None and scaler.overflows(agreed_norm, agreed_loss if judge is not None else None):
                strategy.skip()
                restore_buffers()
                continue
            taken = judge is None or judge.may_step(t.step + 1, agreed_loss, agreed_norm, t.local, turn.name)
        if taken:
            strategy.apply(_coefficient(norm, clip_norm, grad_scale))
        else:
            strategy.skip()
            restore_buffers()
        if scaler is not None:
            scaler.end_step(taken=taken)
        noise.of_nothing()
        return PendingMetrics(t.step + 1, read, turn, grad_scale, t.local, means, taken)


def _coefficient(norm: Tensor | None, clip_norm: float | None, grad_scale: float | None) -> Tensor | None:
    """Return what unscales and clips a gradient of this norm (0-d, unscaled); None where that changes nothing."""
    if norm is None:
        return None
    if clip_norm is not None and grad_scale is None and norm.device.type == "cpu" and norm.item() < 0.99 * clip_norm:
        return None  # it would be 1; on a GPU the host would wait to see that
    clip = None if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    if grad_scale is None:
        return clip
    return torch.full_like(norm, 1.0 / grad_scale) if clip is None else clip * (1.0 / grad_scale)


def _skip_known(t: TrainContext, turn: Turn, known: Anomaly, flags: StepFlags) -> PendingMetrics:
    """Have an optimizer not act in a step; the ranks still agree on their flags."""
    record = StepRecord.reduce_async(t.world, torch.zeros((), device=t.world.device), flags)()
    read, numbers = record.to_host_async(t.world, None), (known.loss, known.norm)
    return PendingMetrics(t.step + 1, lambda: (*numbers, read()[2]), turn, t.strategy.grad_scale, taken=False)


def _nothing() -> None:
    """Restore nothing: the step is taken, whatever comes of it."""
