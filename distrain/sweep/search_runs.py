"""The runs of a search on this machine: `SearchRuns`, drawn one after the other, and pruned by their evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distrain.config import UserError
from distrain.launchers.searches import ask_search
from distrain.launchers.slurm.tracking import queued_job
from distrain.launchers.sweeps import SweepRun, best_of
from distrain.run.folder import RunDir
from distrain.sweep.grid import Runs
from distrain.sweep.running import Share, SweepOptions, check_runs
from distrain.sweep.search import import_optuna
from distrain.sweep.trials import Trials

logger = logging.getLogger(__name__)


class SearchRuns(Runs):
    """Runs that are drawn as the results of others come."""

    def __init__(self, trials: Trials, *, wanted: int, prune: bool, retry_failed: bool):
        self.trials, self.wanted, self.prune = trials, wanted, prune
        self._exhausted = False
        runs = list(trials.runs.values())
        super().__init__(trials.folder, trials.record, runs, retry_failed=retry_failed)
        left = {run.folder for run in self.left}
        trials.failed |= {
            run.folder for run in runs if run.folder not in left and RunDir(run.folder).failed is not None
        }
        self._judged: dict[Path, int] = {}

    def pruned(self, run: SweepRun) -> int | None:
        """Return the step of the evaluation at which a run was pruned."""
        return self.trials.pruned(run)

    @property
    def count(self) -> int:
        """How many runs there will be."""
        return len(self.runs) if self._exhausted else max(self.wanted, len(self.runs))

    def next(self) -> SweepRun | None:
        """Return a run that was begun before and has not ended; otherwise draw a new one, up to the number wanted."""
        if (run := super().next()) is not None:
            return run
        if len(self.runs) >= self.wanted or self._exhausted:
            return None
        taken = self.trials.runs
        run = self.trials.draw(next(number for number in range(self.wanted) if number not in taken))
        if run is None:
            self._exhausted = True
            logger.info(f"no values are left that were not tried: the search ends with {len(self.runs)} runs")
            return None
        self.runs.append(run)
        return run

    def watch(self, run: SweepRun) -> int | None:
        """Judge each evaluation of a run once, but for one after its last step, when there is nothing left to save."""
        if not self.prune:
            return None
        found = self.trials.evaluations(run)
        total = (RunDir(run.folder).effect() or {}).get("total_steps")
        judged = self._judged.get(run.folder, 0)
        for number in range(judged + 1, len(found) + 1):
            self._judged[run.folder] = number
            if found[number - 1][0] != total and (step := self.trials.prunes(run, number)) is not None:
                RunDir(run.folder).mark_pruned(step)
                self.trials.look()
                return step
        return None

    def ended(self, run: SweepRun, *, failed: bool) -> None:
        """Note which runs fail, and end a search that has nothing to compare."""
        if failed:
            self.trials.failed.add(run.folder)
        elif RunDir(run.folder).finished is not None:
            self.trials.check_evaluated(run)


def open_search(
    target: str,
    overrides: Sequence[str],
    arrays: Sequence[str],
    options: SweepOptions,
    share: Share,
    sweep_dir: str | None,
) -> tuple[Path, SearchRuns]:
    """Return the folder and the runs of a search, new or begun before; raises UserError with all that is wrong."""
    assert options.search is not None
    asked = ask_search(target, overrides, arrays, options.search, sweep_dir, "--sweep-dir")
    import_optuna()
    recipe = check_runs(target, asked.corners(), options.launch, share, changes_names=True)
    record = asked.record(best_of(recipe, asked.axes))
    if (job := queued_job(asked.folder)) is not None:
        raise UserError(
            f"{asked.folder} is in the queue, as job {job.id} ({job.state}), whose tasks draw its runs; wait for it to "
            f"end, or `distrain cancel {asked.folder}`"
        )
    trials = Trials(asked.folder, record, asked.overrides, parallel=options.parallel > 1)
    runs = SearchRuns(trials, wanted=options.search, prune=options.prune, retry_failed=options.retry_failed)
    # also those that have ended: values are drawn by their results, and they are ranked with what comes
    if begun := list(asked.begun().values()):
        check_runs(target, begun, options.launch, share, changes_names=False)
    return asked.folder, runs
