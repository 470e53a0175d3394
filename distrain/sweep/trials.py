"""The runs of a search with their results, as the folders have them: what is drawn next, and which are pruned."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from distrain.config import UserError
from distrain.launchers.searches import drawn_runs
from distrain.launchers.sweeps import MOST_RUNS, SweepRecord, SweepRun, add_draw, axes_of, read_record, run_of
from distrain.run.evaluations import Evaluations, best_of_evaluations
from distrain.run.folder import RunDir
from distrain.sweep.search import Result, Search


class Trials:
    """The runs that a search has drawn. Each look sees what other processes, also of other machines, have added."""

    def __init__(self, folder: Path, record: SweepRecord, overrides: tuple[str, ...] = (), *, parallel: bool):
        """`overrides` are those that all runs have; `parallel`: whether values are drawn while others run."""
        assert record.search is not None
        assert record.best is not None
        self.folder, self.record, self.overrides = folder, record, overrides
        self.metric = record.best.metric
        axes, seed = axes_of(record.search["space"]), record.search["seed"]
        self.search = Search(axes, seed, record.best.higher, parallel)
        self.failed: set[Path] = set()
        """Runs that are known to have failed for good, besides those whose folders say so."""
        self._evaluations: dict[Path, Evaluations] = {}

    @property
    def runs(self) -> dict[int, SweepRun]:
        """Those that were drawn when this last looked, by number."""
        return drawn_runs(self.folder, self.record, self.overrides)

    def look(self) -> None:
        """Take up what was drawn and pruned since."""
        found = read_record(self.folder)
        if found is not None:  # not before the first run
            self.record = found

    def draw(self, number: int, patience_s: float = 60) -> SweepRun | None:
        """Return the run of that number: as it was drawn, or drawn now; None where no other values are found.

        Several processes may call at the same time: each draws with the values of all that came before it, which a
        file system may show it only after `patience_s`. Raises UserError.
        """
        self.look()
        while True:
            if (run := self.runs.get(number)) is not None:
                return run
            values = self.search.draw([self.result(each) for each in self.runs.values()])
            if values is None:
                return None
            run = run_of(self.folder, self.record.name, self.overrides, number, values, MOST_RUNS)
            try:
                if add_draw(self.folder, self.record, run, number):
                    self.look()
                    return run
            except OSError as error:
                raise UserError(f"cannot write what was drawn into {self.folder}: {error.strerror or error}") from error
            self._await_draw(patience_s)

    def _await_draw(self, patience_s: float) -> None:
        """Return when this machine sees the draw that another process was faster with."""
        known, until = len(self.record.runs), time.monotonic() + patience_s
        while True:
            self.look()
            if len(self.record.runs) > known:
                return
            if time.monotonic() > until:
                raise UserError(
                    f"draw {known} of {self.folder} is another process's, and {socket.gethostname()} does not see it "
                    f"after {patience_s:g} s; the folder must be on a file system that all nodes share"
                )
            time.sleep(0.2)

    def evaluations(self, run: SweepRun) -> list[tuple[int, float]]:
        """Return (step, value) of each evaluation of a run up to now."""
        if run.folder not in self._evaluations:
            self._evaluations[run.folder] = Evaluations(RunDir(run.folder), self.metric)
        return self._evaluations[run.folder].read()

    def pruned(self, run: SweepRun) -> int | None:
        """Return the step of the evaluation at which a run was pruned, as of the last look."""
        return next((each.get("pruned") for each in self.record.runs if each["folder"] == run.folder.name), None)

    def result(self, run: SweepRun) -> Result:
        """Return what is known of a run. Raises UserError where it is finished without a value to compare."""
        found, pruned = self.evaluations(run), self.pruned(run)
        if pruned is not None:
            found = [each for each in found if each[0] <= pruned]
        best = best_of_evaluations(found, higher=self.search.higher)
        numbers = tuple(value for _, value in found)
        value = best[1] if best is not None else None
        if pruned is not None:
            return Result(run.values, "pruned", numbers, value)
        folder = RunDir(run.folder)
        if run.folder in self.failed:
            return Result(run.values, "failed", numbers)
        if folder.finished is not None:
            self.check_evaluated(run)
            return Result(run.values, "complete", numbers, value)
        if (folder.failed or {}).get("restart") is False:
            return Result(run.values, "failed", numbers)
        return Result(run.values, "running", numbers)

    def check_evaluated(self, run: SweepRun) -> None:
        """Raise UserError where a run that is finished was never evaluated, so that a search compares nothing."""
        if not self.evaluations(run):
            raise UserError(
                f"{run.folder.name} is finished and was never evaluated by {self.metric}, so that a search has nothing "
                "to compare; give the data a split to evaluate on, and see eval.every and eval.best"
            )

    def prunes(self, run: SweepRun, number: int) -> int | None:
        """Return the step of evaluation `number`, from 1, of a run where it is to stop there; None where it is not."""
        found = self.evaluations(run)[:number]
        others = [self.result(each) for each in self.runs.values() if each.folder != run.folder]
        pruned = self.search.prunes(others, run.values, [value for _, value in found])
        return found[-1][0] if pruned else None
