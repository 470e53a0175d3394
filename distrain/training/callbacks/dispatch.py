"""The callbacks of one attempt at a run: called in order on all ranks, and what they ask for made a decision of all.

`step_end` makes no collective call: a failure or a request is kept, and told to the other ranks with the next step's
flags. Every other hook is rare: what failed in it is raised on all ranks at once.
"""

from __future__ import annotations

import inspect
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from distrain.checkpoint import CheckpointError
from distrain.checkpoints.format import check_json
from distrain.config import UserError
from distrain.parallel import World
from distrain.run.heartbeat import mark
from distrain.system.output import error_line
from distrain.training.callbacks.base import Callback, CallbackRun, Outcome, Requests, SavedCheckpoint, StepMetrics

log = logging.getLogger("distrain")


class Callbacks:
    """All ranks call every method at the same step; `step_end`, `fail`, `flag` and `state` speak to no other rank."""

    def __init__(
        self,
        named: Mapping[str, Callback],
        world: World,
        make_run: Callable[[], CallbackRun],
        write: Callable[[dict[str, Any]], None],
        act: Callable[[Requests], None],
    ):
        """`write` adds a row to metrics.jsonl, on rank 0; `act` is given what some rank asked for, on all of them."""
        self._named, self._world, self._write, self._act = dict(named), world, write, act
        self._runs = {name: make_run() for name in self._named}
        self._stateful: dict[str, Any] = {name: each for name, each in named.items() if hasattr(each, "state_dict")}
        self._failure: Exception | None = None
        self._running = False

    def __bool__(self) -> bool:
        return bool(self._named)

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks

    def start(self) -> None:
        """Call on_start."""
        self._running = True
        for name, callback in self._named.items():
            self._call(name, "on_start", callback.on_start, self._runs[name])
        self._raise_failure()

    def step_end(self, step: int, metrics: StepMetrics) -> None:
        """Call on_step_end; what comes of it is agreed on later, see `flag`."""
        for name, callback in self._named.items():
            self._call(name, "on_step_end", callback.on_step_end, step, metrics, step=step)

    def evaluated(self, split: str, values: Mapping[str, Any]) -> None:
        """Call on_evaluate."""
        for name, callback in self._named.items():
            self._call(name, "on_evaluate", callback.on_evaluate, split, values)
        self.agree()

    def saved(self, saved: SavedCheckpoint) -> None:
        """Call on_checkpoint."""
        for name, callback in self._named.items():
            self._call(name, "on_checkpoint", callback.on_checkpoint, saved, step=saved.step)
        self._raise_failure()

    def end(self, outcome: Outcome) -> None:
        """Call on_end of a run that is finished or stopped; what is asked for then comes too late."""
        self._running = False
        for name, callback in self._named.items():
            self._call(name, "on_end", callback.on_end, outcome)
        self._raise_failure()

    def fail(self, error: BaseException, step: int) -> None:
        """Call on_end of a run that failed, unless it was called; what goes wrong in it is logged."""
        if not self._running:
            return
        self._running = False
        outcome = Outcome("failed", step, reason=error_line(error))
        for name, callback in self._named.items():
            try:
                callback.on_end(outcome)
            except Exception as problem:
                log.warning("callback %s failed in on_end after the run had failed: %s", name, error_line(problem))
        with suppress(Exception):  # what ended the run matters more
            for name in self._named:
                self._write_row(name, "on_end", step)

    def _call(self, name: str, hook: str, method: Callable[..., None], *args: Any, step: int | None = None) -> None:
        if self._failure is not None:
            return
        mark("callbacks")
        try:
            method(*args)
        except Exception as error:
            where = f"callback {name} failed in {hook}" + ("" if step is None else f" of step {step}")
            self._failure = _named_failure(error, where, method)
        self._write_row(name, hook, self._runs[name].step if step is None else step)

    def _write_row(self, name: str, hook: str, step: int) -> None:
        values = self._runs[name].take_row()
        if values:
            event = f"callback/{name}" + ("" if hook == "on_step_end" else f"/{hook.removeprefix('on_')}")
            self._write({"event": event, "step": step, **values, "time": time.time()})

    # ----------------------------------------------------------------------------------------------------------------
    # What ranks agree on

    def flag(self) -> float:
        """Return whether this rank has something to tell since ranks last agreed, as a number."""
        return float(self._failure is not None or any(run.requests != Requests() for run in self._runs.values()))

    def agree(self) -> None:
        """Raise on all ranks what failed on one, or act on what was asked for."""
        if not self._named:
            return
        self._raise_failure()
        mine = [run.take_requests() for run in self._runs.values()]
        every = [each for rank in self._world.gather(mine) for each in rank]
        stop = next((each.stop for each in every if each.stop), None)
        finish = next((each.finish for each in every if each.finish), None)
        if stop or finish:
            self._act(Requests(stop, finish))

    def _raise_failure(self) -> None:
        if not self._named:
            return
        failure, self._failure = self._failure, None

        def check() -> None:
            if failure is not None:
                raise failure

        self._world.run_on_all(check)

    # ----------------------------------------------------------------------------------------------------------------
    # State

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of them, as JSON values; speaks to no other rank."""
        found = {}
        for name, each in self._stateful.items():
            where = f"callback {name} failed in state_dict"
            try:
                found[name] = each.state_dict()
            except Exception as error:
                raise _named_failure(error, where, each.state_dict) from error
            try:
                check_json(found[name], f"state_dict() of callback {name}")
            except CheckpointError as error:
                raise UserError(f"{error}; return JSON values alone") from error
        return {"callbacks": found} if found else {}

    def load(self, scalars: Mapping[str, Any]) -> list[str]:
        """Give them back what `state` returned; returns a line for each state that has no callback, or the reverse."""
        stored = scalars.get("callbacks") or {}

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
        lacking = [name for name in self._stateful if name not in stored]
        unused = [name for name in stored if name not in self._stateful]
        return [
            *(
                f"warning: the checkpoint has no state of callback {name}, which keeps the one it has"
                for name in lacking
            ),
            *(f"warning: no callback takes the state of callback {name} in the checkpoint" for name in unused),
        ]


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
