"""A search on a cluster, whose runs are the tasks of a job array: what each task does besides its training.

The tasks share the sweep's folder and nothing else. Each draws the values of its run when it first starts, makes the
run, and trains it as any other job does; a task that was queued again finds what it has drawn. With `prunes` set, rank
0 judges each evaluation.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.request import recipe_text
from distrain.launchers.slurm.rendering import PRUNES
from distrain.launchers.slurm.snapshot import Snapshot, moved
from distrain.launchers.slurm.submitting import BASE
from distrain.launchers.sweeps import SweepRun, read_record
from distrain.run.folder import Launch, RunDir
from distrain.sweep.search import import_optuna
from distrain.sweep.trials import Trials
from distrain.system.bounded_json import read_json
from distrain.training.callbacks.base import Callback, CallbackRun


def run_of_task(sweep: str | Path, number: int) -> Path | None:
    """Return the folder of run `number` of a search, which is drawn and made where it is not there yet.

    None where no values are left that were not tried. Raises UserError where it cannot be; for values that the recipe
    refuses the run is marked as failed.
    """
    trials, submitted = _submitted(Path(sweep))
    run = trials.draw(number)
    if run is None:
        return None
    folder = RunDir(run.folder)
    if not (folder.exists and folder.launch_path.exists()):
        _make(trials.folder, submitted, run)
    return folder.path


def _submitted(folder: Path) -> tuple[Trials, dict[str, Any]]:
    """Return the runs of a search that was submitted, and what its submission has written."""
    record = read_record(folder)
    if record is None or record.search is None or record.best is None:
        raise UserError(
            f"{folder} is not a search on {socket.gethostname()}: it has no sweep.json that says so. The folder of a "
            "sweep must be on a file system that all nodes share"
        )
    import_optuna()
    path = folder / "submit" / "plan.json"
    try:
        found = read_json(path)
        return Trials(folder, record, parallel=found["plan"]["parallel"] != 1), found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; submit the search again") from error


def _make(sweep: Path, submitted: Mapping[str, Any], run: SweepRun) -> None:
    """Create the folder of a run, as `distrain submit` does for one."""
    folder, plan = RunDir(run.folder), submitted["plan"]
    try:
        loaded = load_recipe(sweep / "submit" / BASE, run.overrides)
    except UserError as error:
        folder.path.mkdir(exist_ok=True)
        about = {"rank": 0, "host": socket.gethostname(), "error": type(error).__name__, "message": str(error)}
        folder.mark_failed({**about, "traceback": None, "restart": False})
        raise
    code = Snapshot(roots={Path(root): name for name, root in submitted["code"].items()})
    loaded = moved(loaded, code, sweep / "submit" / "code")
    world = plan["nodes"] * plan["processes_per_node"]
    launch = Launch.describe(world, plan["strategy"], plan["offload"], plan["replicate"], argv=list(submitted["argv"]))
    folder.create(recipe_text(loaded), launch)


class Pruning(Callback):
    """Stops a run of a search whose best evaluation is worse than the median of the others; rank 0 decides."""

    _trials: Trials | None = None

    def on_start(self, run: CallbackRun) -> None:
        """Read which search the run is of."""
        self._run = run
        if run.rank == 0:
            self._trials, _ = _submitted(run.folder.parent)
            self._judged = len(self._evaluations())

    def _evaluations(self) -> list[tuple[int, float]]:
        assert self._trials is not None
        return self._trials.evaluations(self._own())

    def _own(self) -> SweepRun:
        assert self._trials is not None
        found = next((each for each in self._trials.runs.values() if each.folder == self._run.folder), None)
        if found is None:
            raise UserError(
                f"{self._run.folder} is none of the runs that the search in {self._trials.folder} has drawn"
            )
        return found

    def on_evaluate(self, split: str, values: Mapping[str, Any]) -> None:
        """Judge an evaluation once, but for one after the last step, when there is nothing left to save."""
        if self._trials is None:
            return
        self._trials.look()
        found = self._evaluations()
        judged, self._judged = self._judged, len(found)
        if len(found) <= judged or found[-1][0] == self._run.total_steps:
            return
        if (step := self._trials.prunes(self._own(), len(found))) is not None:
            self._run.context.fence()
            RunDir(self._run.folder).mark_pruned(step)
            self._run.request_stop("its search: it is worse than the others were by then")


def callbacks_of_task() -> list[Callback]:
    """Return what a process that trains a run of a search has besides its recipe's callbacks."""
    return [Pruning()] if os.environ.get(PRUNES) else []
