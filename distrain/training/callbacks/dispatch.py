"""The callbacks of one attempt at a run: called in order on all ranks, and what they ask for made a decision of all.

The built-in ones come first, in the order of `built_in.py`, then those of the recipe, then those given to `train`.
Hooks of a step make no collective call: what fails in a user's callback, and what one asks for, is kept, and all ranks
learn of it by the flags of the next step. Every other hook is rare: what failed in it is raised on all ranks at once.
"""

from __future__ import annotations

import inspect
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import CheckpointError
from distrain.checkpoints.format import check_json
from distrain.config import Recipe, UserError
from distrain.datasets.base import Batch
from distrain.datasets.transforms import Transform
from distrain.parallel import World
from distrain.parallel.nested import Unstorable, decode, encode
from distrain.run.heartbeat import enter_phase
from distrain.run.media import KEY, write_media
from distrain.system.output import error_line
from distrain.training.callbacks.base import (
    HOOKS,
    NOTHING,
    Callback,
    CallbackRun,
    Outcome,
    Plan,
    Requests,
    SavedCheckpoint,
    StepMetrics,
)
from distrain.training.callbacks.reused import Reuse
from distrain.training.callbacks.trace import Trace

logger = logging.getLogger(__name__)

_ENCODED = "callbacks_encoded"
"""Where a checkpoint keeps states that JSON would change."""


class Callbacks:
    """All ranks call every method at the same step. Those of a step, `fail`, `close`, `flag`, `row` and `state` make no
    collective call."""

    def __init__(self, built_in: Sequence[Callback], named: Mapping[str, Callback], recipe: Recipe, world: World):
        # no name that a user's can have
        self._built_in = {f"distrain.{type(each).__name__}": each for each in built_in}
        self._named, self._world = dict(named), world
        everyone = {**self._built_in, **self._named}
        self._traces = [each for each in built_in if isinstance(each, Trace)]
        # a hook that a callback does not define costs a step nothing
        self._own = {hook: _defining(hook, self._built_in) for hook in HOOKS}
        self._users = {hook: _defining(hook, self._named) for hook in HOOKS}
        self._wanting = [
            (name, each.wants_step_end if name in self._built_in else partial(self._wants, name), each.on_step_end)
            for name, each in everyone.items()
            if _defines("on_step_end", each)
        ]
        self._askers = [name for name, each in everyone.items() if each.asks]
        self._stateful: dict[str, Any] = {name: each for name, each in named.items() if hasattr(each, "state_dict")}
        self.plan, self._reuse = Plan(), Reuse(self._named)
        self._failure: Exception | None = None
        self._running = self._closed = False
        self._started: set[str] = set()
        """Users' callbacks whose on_start was called: rows of before are not for them."""
        self._runs: dict[str, CallbackRun] = {}
        self._resumes = False
        self._recorded = recipe.model_dump(mode="json").get("callbacks", [])
        self.ended = False
        """Whether a callback of the user's has ended training, here or before the checkpoint that is resumed from."""

    def attach(self, make_run: Callable[[], CallbackRun], act: Callable[[Requests], None]) -> None:
        """Give each its view of the run. `act` is called with what some rank asked for, on all of them."""
        self._runs, self._act = {name: make_run() for name in (*self._built_in, *self._named)}, act

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks

    def wrap_transform(self, transform: Transform) -> Transform:
        """Return what transforms the samples of the training split."""
        for each in self._built_in.values():
            transform = each.wrap_transform(transform)
        for name, each in self._named.items():
            try:
                transform = each.wrap_transform(transform)
            except Exception as error:
                raise _named_failure(error, f"callback {name} failed in wrap_transform", each.wrap_transform) from error
        return transform

    def start_built_in(self) -> None:
        """Call on_start of the built-in ones, after which rows can be written."""
        self._running = True
        for name, method in self._own["on_start"]:
            try:
                method(self._runs[name])
            except Exception as error:  # of rank 0, which alone opens files
                self._failure = error
            self._raise_failure()

    def start(self) -> None:
        """Call on_start of the others, and do what is asked for there."""
        for name, callback in self._named.items():
            self._call(name, "on_start", callback.on_start, self._runs[name])
            self._started.add(name)
        self._raise_failure()
        self._reuse.began(resumes=self._resumes)
        if self._askers:
            self.agree()

    def step_start(self, step: int) -> None:
        """Call on_step_start."""
        self._call_all("on_step_start", step, step=step)

    def batches(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Call on_batches."""
        self._call_all("on_batches", step, micro_batches, step=step)
        for trace in self._traces:  # of what the users' have made of them
            trace.note_batches(step, micro_batches)

    def step_taken(self, step: int) -> None:
        """Call on_step_taken."""
        self._call_all("on_step_taken", step, step=step)
        for trace in self._traces:
            trace.note_step(step)

    def step_end(self, step: int, metrics: Callable[[], StepMetrics]) -> None:
        """Call on_step_end where one wants it; what comes of it is agreed on later, see `flag`."""
        enter_phase("callbacks")  # also where none wants it: all ranks enter the same phases
        wanted = [(name, method) for name, wants, method in self._wanting if wants(step)]
        if not wanted:
            return
        found = metrics()
        for name, method in wanted:
            if name in self._named:
                self._call(name, "on_step_end", method, step, found, step=step)
            else:
                method(step, found)

    def _wants(self, name: str, step: int) -> bool:
        callback = self._named[name]
        try:
            return callback.wants_step_end(step)
        except Exception as error:
            where = f"callback {name} failed in wants_step_end of step {step}"
            self._failure = self._failure or _named_failure(error, where, callback.wants_step_end)
            return False

    def row(self, row: dict[str, Any]) -> None:
        """Call on_row with a row for metrics.jsonl, on rank 0."""
        if self._world.rank != 0:
            return
        row = row if "time" in row else {**row, "time": time.time()}
        for _, method in self._own["on_row"]:
            method(row)
        for name, method in self._users["on_row"]:
            if name in self._started:
                self._call(name, "on_row", method, row)

    def evaluated(self, split: str, values: Mapping[str, Any]) -> None:
        """Call on_evaluate."""
        self._call_all("on_evaluate", split, values)
        if self._askers:
            self.agree()

    def saved(self, saved: SavedCheckpoint) -> None:
        """Call on_checkpoint."""
        self._call_all("on_checkpoint", saved, step=saved.step)
        if self._askers:
            self._raise_failure()

    def rolled_back(self, step: int) -> None:
        """Call on_rollback, without what was given to `gather` in the steps that are made again."""
        for run in self._runs.values():
            run.drop_values()
        self._call_all("on_rollback", step)

    def end(self, outcome: Outcome) -> None:
        """Call on_end of a run that is finished or stopped; what is asked for then comes too late."""
        self._running = False
        self._call_all("on_end", outcome)
        if self._named:
            self._raise_failure()

    def fail(self, error: BaseException, step: int) -> Outcome:
        """Call on_end of a run that failed, unless it was called; what goes wrong in it is logged."""
        outcome = Outcome("failed", step, reason=error_line(error))
        if not self._running:
            return outcome
        self._running = False
        for name, method in (*self._own["on_end"], *self._users["on_end"]):
            try:
                method(outcome)
            except Exception as problem:
                logger.warning("callback %s failed in on_end after the run had failed: %s", name, error_line(problem))
        with suppress(Exception):  # what ended the run matters more
            for name in self._named:
                self._write_row(name, "on_end", step)
        return outcome

    def close(self, outcome: Outcome) -> None:
        """Call on_close, once, the last first; what goes wrong in it is logged."""
        if self._closed:
            return
        self._closed = True
        self._reuse.ended()
        for name, method in reversed([*self._own["on_close"], *self._users["on_close"]]):
            try:
                method(outcome)
            except Exception as problem:
                logger.warning("callback %s failed in on_close: %s", name, error_line(problem))

    def summary(self) -> dict[str, Any]:
        """Return what callbacks add to the summary of the run."""
        return {key: value for run in self._runs.values() for key, value in run.summary.items()}

    def _call_all(self, hook: str, *args: Any, step: int | None = None) -> None:
        if own := self._own[hook]:
            enter_phase("callbacks")
        for _, method in own:
            method(*args)
        for name, method in self._users[hook]:
            self._call(name, hook, method, *args, step=step)

    def _call(self, name: str, hook: str, method: Callable[..., None], *args: Any, step: int | None = None) -> None:
        if self._failure is not None:
            return
        enter_phase("callbacks")
        try:
            method(*args)
        except Exception as error:
            where = f"callback {name} failed in {hook}" + ("" if step is None else f" of step {step}")
            self._failure = _named_failure(error, where, method)
        if hook != "on_row":  # a row that wrote a row would have no end
            self._write_row(name, hook, self._runs[name].step if step is None else step)

    def _write_row(self, name: str, hook: str, step: int) -> None:
        run = self._runs[name]
        values: dict[str, Any] = run.take_row()
        media = run.take_media()
        if values or media:
            event = f"callback/{name}" + ("" if hook == "on_step_end" else f"/{hook.removeprefix('on_')}")
            if media:
                values[KEY] = write_media(run.folder, step, event, media, run.context.fence)
            self.row({"event": event, "step": step, **values})

    # ----------------------------------------------------------------------------------------------------------------
    # What ranks agree on

    @property
    def asks(self) -> bool:
        """Whether ranks have to agree on anything before an evaluation or a checkpoint; alike on all ranks."""
        return bool(self._askers)

    def flag(self) -> float:
        """Return 1 where a callback of this rank has failed, or asked for something that the others do not know of."""
        if self._failure is not None:
            return 1.0
        for name in self._askers:
            if self._runs[name].requests is not NOTHING:
                return 1.0
        return 0.0

    def agree(self) -> None:
        """Raise on all ranks what failed on one; deliver what was gathered, and act on what was asked for."""
        self._raise_failure()
        mine = {name: self._runs[name].take_requests() for name in self._askers}
        ranks: list[dict[str, Requests]] = self._world.gather(mine)
        for hooks, own in ((self._own, True), (self._users, False)):
            for name, method in hooks["on_gather"]:
                values = [rank[name].values for rank in ranks if name in rank]
                if any(values):
                    method(values) if own else self._call(name, "on_gather", method, values)
        if self._users["on_gather"]:
            self._raise_failure()
        every = [(name, each) for rank in ranks for name, each in rank.items()]
        stop = next((each.stop for _, each in every if each.stop), None)
        finish = next((each.finish for _, each in every if each.finish), None)
        self.ended = self.ended or any(each.finish for name, each in every if name in self._named)
        if stop or finish:
            self._act(Requests(stop, finish))

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None

        def check() -> None:
            if failure is not None:
                raise failure

        self._world.run_on_all(check)

    # ----------------------------------------------------------------------------------------------------------------
    # State

    @property
    def users(self) -> Mapping[str, Callback]:
        """The user's, by name."""
        return self._named

    @property
    def without_state(self) -> dict[str, Callback]:
        """The user's of which checkpoints keep nothing."""
        return {name: each for name, each in self._named.items() if name not in self._stateful}

    def history(self) -> dict[str, Any]:
        """Rank 0: return what a checkpoint keeps of the built-in ones, as JSON values."""
        found: dict[str, Any] = {}
        for each in self._built_in.values():
            if hasattr(each, "state_dict"):
                found |= each.state_dict()
        return found

    def load_history(self, history: Mapping[str, Any]) -> None:
        """Give the built-in ones what `history` returned, or what an older version kept; each takes what is its own."""
        for each in self._built_in.values():
            if hasattr(each, "load_state_dict"):
                each.load_state_dict(history)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of them, as JSON values; speaks to no other rank."""
        found, encoded = {}, {}
        for name, each in self._stateful.items():
            where, tensors = f"state_dict() of callback {name}", dict[str, Tensor]()
            try:
                kept = each.state_dict()
            except Exception as error:
                raise _named_failure(error, f"callback {name} failed in state_dict", each.state_dict) from error
            try:
                check_json(kept, where)
                found[name] = kept
            except CheckpointError:  # infinity, NaN, tuples
                try:
                    encoded[name] = encode(kept, where, tensors)
                    if tensors:
                        raise Unstorable(f"{next(iter(tensors))} is a tensor")
                except Unstorable as error:
                    raise UserError(
                        f"{error}; return numbers, text, None, and lists, tuples, sets and dicts of these"
                    ) from error
        ended = {"ended": self._recorded} if self.ended else {}
        return {key: each for key, each in (("callbacks", found), (_ENCODED, encoded)) if each} | ended

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Give them back what `state` returned; warns of each state that has no callback, and the reverse."""
        encoded = {name: decode(each, _no_tensor) for name, each in scalars.get(_ENCODED, {}).items()}
        stored, self._resumes = (scalars.get("callbacks") or {}) | encoded, True
        # under changed callbacks it continues
        self.ended = bool(self._named) and scalars.get("ended") == self._recorded

        def give() -> None:
            for name, each in self._stateful.items():
                if name in stored:
                    try:
                        each.load_state_dict(stored[name])
                    except Exception as error:
                        where = f"callback {name} failed in load_state_dict"
                        raise _named_failure(error, where, each.load_state_dict) from error

        if self._stateful:
            self._world.run_on_all(give)
        for name in self._stateful:
            if name not in stored:
                logger.warning(f"the checkpoint has no state of callback {name}, which keeps the one it has")
        for name in stored:
            if name not in self._stateful:
                logger.warning(f"no callback takes the state of callback {name} in the checkpoint")


def _no_tensor(name: str, on_host: bool) -> Tensor:
    raise CheckpointError(f"the state of a callback holds a tensor, {name}; expected values alone")


def _defines(hook: str, callback: Callback) -> bool:
    method = getattr(callback, hook)
    return getattr(method, "__func__", method) is not getattr(Callback, hook)


def _defining(hook: str, callbacks: Mapping[str, Callback]) -> list[tuple[str, Callable[..., Any]]]:
    """Return the methods of the callbacks that define a hook, by their names."""
    return [(name, getattr(each, hook)) for name, each in callbacks.items() if _defines(hook, each)]


def _named_failure(error: Exception, where: str, method: Callable[..., Any]) -> Exception:
    """Return the error with the callback's name, and the line of its file that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        error.add_note(where)  # by its type it is told what to do
        return error
    if isinstance(error, UserError):
        named = UserError(f"{where}: {error}")
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == inspect.getsourcefile(method)]
        place = (own or frames)[-1]
        named = UserError(f"{where}: {place.filename}:{place.lineno}: {error_line(error)}")
    named.__cause__ = error
    return named
