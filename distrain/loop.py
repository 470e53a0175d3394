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

from distrain.config import UserError, mix
from distrain.config.yaml import load_recipe
from distrain.datasets.base import Batch
from distrain.diagnose.index_errors import given
from distrain.optim import set_lr
from distrain.parallel import StepFlags, World
from distrain.parallel.strategy import Numbers
from distrain.run.folder import RunDir
from distrain.run.heartbeat import mark, stepped
from distrain.run.lease import Lease
from distrain.training.callbacks.base import Callback
from distrain.training.context import PendingMetrics, TrainContext, loss_of, seed_dropout, to_device
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
    """Make one optimizer step. All ranks call.

    The gradient is that of `sum of losses / count`, both taken over all micro-batches and ranks, so it depends neither
    on how samples are spread over them nor on how many targets each holds. `flags` returns numbers of this rank, which
    are averaged over the ranks on the way: what ranks must agree on needs no reduction of its own. A step whose scaled
    gradient overflows is made again with a smaller scale, from the same samples. A step that is left out changes
    nothing but the count of steps.
    """
    if t.anomalies is not None and (known := t.anomalies.left_out(t.step + 1)) is not None:
        return _leave_out(t, known, flags())
    given(f"step {t.step + 1}", micro_batches)
    mark("sync")
    set_lr(t.strategy.optimizer, t.recipe.optim.lr * t.schedule(t.step))
    loss_scale = _loss_scale(t, micro_batches)
    while True:
        grad_scale, put_buffers_back = t.strategy.grad_scale, t.strategy.remember_buffers()
        if (numbers := _attempt(t, micro_batches, loss_scale, flags)) is not None:
            break
        put_buffers_back()
    if not t.strategy.moved:
        put_buffers_back()
    t.step += 1
    stepped(t.step)
    return PendingMetrics(t.step, numbers, grad_scale, t.own)


def _leave_out(t: TrainContext, known: Anomaly, flags: StepFlags) -> PendingMetrics:
    """Count a step without making it; what the ranks tell each other with each step, they tell."""
    means = list(flags)
    read = lambda: means  # noqa: E731
    if t.world.world_size > 1:
        read = t.world.to_host_async(t.world.sum(t.world.pack_metrics(torch.zeros(()), flags))[1:] / t.world.world_size)
    t.step += 1
    stepped(t.step)
    return PendingMetrics(t.step, lambda: (known.norm, [known.loss, *read()]), t.strategy.grad_scale)


def _loss_scale(t: TrainContext, micro_batches: Sequence[Batch]) -> float | Tensor:
    """Return what the sum of losses of a rank is multiplied by."""
    # ranks' gradients are averaged on the way, and this is to be a sum: hence the world's size above the count
    if t.loss.count_is_fixed:
        return t.world.world_size / t.loss.fixed_count(t.recipe.batch.global_batch_size, micro_batches[0]["targets"])
    counts = torch.stack([t.loss.count(batch["targets"]) for batch in micro_batches]).sum()
    return t.world.world_size / t.world.sum(counts.to(t.world.device, torch.float64))


def _seed(t: TrainContext, index: int) -> int:
    return mix(t.recipe.seed, "dropout", t.step, t.world.mesh.data_rank, index)


def _attempt(
    t: TrainContext, micro_batches: Sequence[Batch], loss_scale: float | Tensor, flags: Callable[[], StepFlags]
) -> Numbers | None:
    strategy, last = t.strategy, len(micro_batches) - 1
    losses: list[Tensor] = []
    for index, batch in enumerate(micro_batches):
        batch = to_device(batch, t.world)
        seed_dropout(t.world, _seed(t, index))
        with strategy.micro_batch(last=index == last):
            mark("forward")
            loss_sum = loss_of(t.call, t.loss, strategy.wrapped, batch)
            # handed to the backward pass: multiplied in, it would be one more operation to go back through
            if not isinstance(loss_scale, Tensor):
                # a fill: for a copy to a device the host would wait
                loss_scale = torch.full((), loss_scale, dtype=loss_sum.dtype, device=loss_sum.device)
            loss_scale = loss_scale.to(loss_sum.dtype)
            losses.append(loss_sum.detach() * loss_scale)
            mark("backward")
            if index < last:
                strategy.backward(loss_sum, loss_scale)
                continue
            loss = losses[0] if last == 0 else torch.stack(losses).sum(dtype=torch.float64)
            t.own = LocalStepResult(losses, [each["ids"] for each in micro_batches])
            return strategy.step(loss_sum, loss_scale, loss, flags())
    raise AssertionError("a step has at least one micro-batch")
