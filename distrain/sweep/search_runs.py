"""The runs of a search: `SearchRuns`, drawn one after the other, and pruned by their evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.sweeps import (
    MOST_RUNS,
    Axes,
    Range,
    SweepRecord,
    SweepRun,
    best_of,
    check_new,
    parse_axes,
    read_record,
    run_of,
)
from distrain.run.evaluations import Evaluations, best_of_evaluations
from distrain.run.folder import RunDir
from distrain.sweep.grid import Runs
from distrain.sweep.running import Share, SweepOptions, check_runs
from distrain.sweep.search import Result, Search, import_optuna

logger = logging.getLogger(__name__)


class SearchRuns(Runs):
    """Runs that are drawn as the results of others come."""

    def __init__(
        self,
        folder: Path,
        record: SweepRecord,
        search: Search,
        overrides: Sequence[str],
        *,
        wanted: int,
        prune: bool,
        retry_failed: bool,
    ):
        self.search, self.overrides, self.wanted, self.prune = search, overrides, wanted, prune
        self._exhausted = False
        self._failed: set[Path] = set()
        runs = [self._run(record, folder, number, each["values"]) for number, each in enumerate(record.runs)]
        super().__init__(folder, record, runs, retry_failed=retry_failed)
        assert record.best is not None
        self.metric = record.best.metric
        self._evaluations = {run.folder: Evaluations(RunDir(run.folder), self.metric) for run in runs}
        left = {run.folder for run in self.left}
        self._failed = {run.folder for run in runs if run.folder not in left and RunDir(run.folder).failed is not None}
        self._judged: dict[Path, int] = {}

    @property
    def count(self) -> int:
        """How many runs there will be."""
        return len(self.runs) if self._exhausted else max(self.wanted, len(self.runs))

    def _run(self, record: SweepRecord, folder: Path, number: int, values: dict[str, str]) -> SweepRun:
        return run_of(folder, record.name, self.overrides, number, values, MOST_RUNS)

    def next(self) -> SweepRun | None:
        """Return a run that was begun before and has not ended; otherwise draw a new one, up to the number wanted."""
        if (run := super().next()) is not None:
            return run
        if len(self.runs) >= self.wanted or self._exhausted:
            return None
        values = self.search.draw([self._result(run) for run in self.runs])
        if values is None:
            self._exhausted = True
            logger.info(f"no values are left that were not tried: the search ends with {len(self.runs)} runs")
            return None
        run = self._run(self.record, self.folder, len(self.runs), values)
        self.runs.append(run)
        self._evaluations[run.folder] = Evaluations(RunDir(run.folder), self.metric)
        self.record.runs.append({"folder": run.folder.name, "values": values})
        self.record.write(self.folder)  # before it begins: whatever comes between, it is the run of these values
        return run

    def watch(self, run: SweepRun) -> int | None:
        """Judge each evaluation of a run once, but for one after its last step, when there is nothing left to save."""
        if not self.prune:
            return None
        found = self._evaluations[run.folder].read()
        total = (RunDir(run.folder).effect() or {}).get("total_steps")
        judged = self._judged.get(run.folder, 0)
        for number in range(judged + 1, len(found) + 1):
            self._judged[run.folder] = number
            step = found[number - 1][0]
            others = [self._result(each) for each in self.runs if each.folder != run.folder]
            values = [value for _, value in found[:number]]
            if step != total and self.search.prunes(others, run.values, values):
                next(each for each in self.record.runs if each["folder"] == run.folder.name)["pruned"] = step
                self.record.write(self.folder)
                return step
        return None

    def ended(self, run: SweepRun, *, failed: bool) -> None:
        """Note which runs fail, and end a search that has nothing to compare."""
        if failed:
            self._failed.add(run.folder)
        elif RunDir(run.folder).finished is not None and not self._evaluations[run.folder].read():
            raise UserError(
                f"{run.folder.name} is finished and was never evaluated by {self.metric}, so that a search has nothing "
                "to compare; give the data a split to evaluate on, and see eval.every and eval.best"
            )

    def _result(self, run: SweepRun) -> Result:
        found = self._evaluations[run.folder].read()
        pruned = self.pruned(run)
        if pruned is not None:
            found = [each for each in found if each[0] <= pruned]
        best = best_of_evaluations(found, higher=self.search.higher)
        numbers = tuple(value for _, value in found)
        value = best[1] if best is not None else None
        if pruned is not None:
            return Result(run.values, "pruned", numbers, value)
        if run.folder in self._failed:
            return Result(run.values, "failed", numbers)
        if RunDir(run.folder).finished is not None:
            return Result(run.values, "complete", numbers, value)
        return Result(run.values, "running", numbers)


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
    if options.search > MOST_RUNS:
        raise UserError(f"--search {options.search:,} is more than {MOST_RUNS:,} runs; take fewer")
    import_optuna()
    axes = parse_axes(target, overrides, arrays)
    base = load_recipe(target, overrides).recipe
    folder = Path(sweep_dir or Path("runs") / base.name).absolute()
    tried = [run_of(folder, base.name, overrides, 0, values, MOST_RUNS) for values in _corners(axes)]
    recipe = check_runs(target, tried, options.launch, share, changes_names=True)
    best = best_of(recipe)
    space = {text.partition("=")[0]: text.partition("=")[2] for text in arrays}
    record = SweepRecord(base.name, [], best, {"space": space, "seed": base.seed})
    if (earlier := read_record(folder)) is not None:
        if earlier.search != record.search or earlier.best != best:
            raise UserError(
                f"{folder} is a sweep of other values ({earlier.search or 'no search'}) than {record.search}; choose "
                "another --sweep-dir"
            )
        record = earlier
    else:
        check_new(folder, "--sweep-dir")
    search = Search(axes, base.seed, best.higher, options.parallel > 1)
    runs = SearchRuns(
        folder,
        record,
        search,
        overrides,
        wanted=options.search,
        prune=options.prune,
        retry_failed=options.retry_failed,
    )
    if runs.left:
        check_runs(target, runs.left, options.launch, share, changes_names=False)
    return folder, runs


def _corners(axes: Axes) -> list[dict[str, str]]:
    """Return combinations in which each value, and each end of a range, is there at least once."""
    ends = {
        key: [axis.text(axis.low), axis.text(axis.high)] if isinstance(axis, Range) else axis
        for key, axis in axes.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    return [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]
