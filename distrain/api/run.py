"""`Run`: a run folder in Python, and `load`, `evaluate` and `predict`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distrain.api.objects import KEYS, Objects
from distrain.api.surroundings import own_surroundings
from distrain.config import Recipe, UserError
from distrain.config.user_files import Given, given_key, given_objects
from distrain.config.yaml import load_recipe
from distrain.fingerprints import named_objects
from distrain.run.folder import RunDir
from distrain.system import numbers

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from distrain.checkpoints.export.exporting import Exported

Weights = Literal["best", "last"] | int | None


class BestEvaluation(NamedTuple):
    """The best evaluation of a run."""

    metric: str
    """That of `eval.best`, by default the loss."""
    step: int
    value: float


class _Stopped(str):
    """The state "stopped", which scripts may still compare with the word that there was for it."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and str.__eq__(other, "preempted"):
            warnings.warn('Run.status says "stopped" where it said "preempted"', DeprecationWarning, stacklevel=2)
            return True
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class Run:
    """A run: everything is read from its folder when it is asked for.

    `weights`, of several methods: None for those that the run exports (of a finished run with `eval.best` the best,
    otherwise the newest), "best" by `eval.best` or the loss, "last", or the step of a checkpoint. Where the recipe
    keeps an average of the weights (`train.ema`), it is that.
    """

    def __init__(self, path: str | Path, given: Mapping[str, Given] | None = None):
        """`given`: the objects that its recipe names and no other process has; `load` makes them."""
        self._folder = RunDir(path)
        if not self._folder.exists:
            raise UserError(f"{path} is no run: it has no recipe.yaml; distrain.train makes one")
        self.given = dict(given or {})
        """The objects that its recipe names, by spec."""

    def __repr__(self) -> str:
        best = self.best
        found = f", best {best.metric} {numbers.number(best.value)} at step {best.step:,}" if best is not None else ""
        return f"<Run {str(self.path)!r}: {self.status}{found}>"

    @property
    def path(self) -> Path:
        """The run's folder, absolute."""
        return self._folder.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self._folder.recipe_path).recipe

    @property
    def status(self) -> str:
        """How it is, in the words of `distrain status`: finished, stopped (with its state saved), failed, running, ….

        A stopped run was called "preempted" here, and still equals that word, with a warning.
        """
        from distrain.report.status import status_of

        state = status_of(self.path, []).state
        return _Stopped(state) if state == "stopped" else state

    @property
    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl as a table, in their order: `event` is train, eval, final, checkpoint, …

        Each event of a step is there once, as it was trained last: a run that went back to a checkpoint has trained
        some steps again.
        """
        import pandas as pd

        rows: dict[Any, dict[str, Any]] = {}
        for number, stored in enumerate(self._folder.rows()):
            # JSON has no such numbers
            row = {name: float(each) if each in ("nan", "inf", "-inf") else each for name, each in stored.items()}
            once = row["event"] in ("train", "eval", "final", "checkpoint")
            key = (row["event"], row["step"], row.get("split")) if once else number
            rows.pop(key, None)
            rows[key] = row
        return pd.DataFrame(list(rows.values()))

    @property
    def best(self) -> BestEvaluation | None:
        """The best evaluation so far; None where there was none with a finite value."""
        from distrain.checkpoint import criterion_of, list_checkpoints, read_manifest

        if (finished := self._folder.summary()) is not None:
            best = finished.get("best")
            return None if best is None else BestEvaluation(best["metric"], best["step"], best["value"])
        newest = list_checkpoints(self._folder.checkpoints)
        criterion = criterion_of(self._folder.checkpoints)
        state = (read_manifest(newest[0].path).history or {}).get("best") if newest else None
        if criterion is None or not isinstance(state, dict) or not state.get("best"):
            return None
        step, value = state["best"]
        return BestEvaluation(criterion.metric, step, value)

    # ----------------------------------------------------------------------------------------------------------------

    def checkpoint(self, weights: Weights = None) -> Path:
        """Return the folder of a checkpoint. Raises UserError where there is none."""
        from distrain.checkpoint import find_checkpoint, find_newest, list_checkpoints

        folder = self._folder.checkpoints
        if weights is None or weights == "best":
            return find_checkpoint(self.path, best=weights == "best")
        if weights == "last":
            newest, _ = find_newest(folder)
            return newest if newest is not None else find_checkpoint(self.path)
        there = [info.step for info in list_checkpoints(folder)]
        if type(weights) is not int or weights not in there:
            steps = ", ".join(map(str, sorted(there))) or "none"
            raise UserError(f"weights: found {weights!r}; expected 'best', 'last' or the step of a checkpoint: {steps}")
        return self._folder.checkpoint(weights)

    def model(self, weights: Weights = None) -> nn.Module:
        """Return the trained model: plain PyTorch, on the CPU, in eval mode, with `weights`."""
        from distrain.inference import trained_model

        checkpoint = self.checkpoint(weights)
        with self._here("task", "model"):  # without its data it may be built from its arguments alone
            return trained_model(checkpoint)

    def evaluate(self, split: str = "test", *, weights: Weights = None, changed_data: bool = False) -> dict[str, Any]:
        """Return the loss and metrics on every sample of a split, each once: what `distrain evaluate` prints.

        `split`: train, valid or test; or a file or folder with targets, as the data set reads one for a split.
        Raises UserError for data that are not those of the training; with `changed_data` the result says how they
        differ.
        """
        from distrain.inference import evaluate_checkpoint

        checkpoint = self.checkpoint(weights)
        with self._here("task", "model", "data", "loss", "metrics"):
            return evaluate_checkpoint(checkpoint, split, changed_data=changed_data)

    def predict(
        self,
        inputs: Any,
        *,
        out: str | Path | None = None,
        output: Literal["predictions", "probabilities", "logits", "embeddings", "text"] | None = None,
        layer: str | None = None,
        weights: Weights = None,
        changed_data: bool = False,
    ) -> pd.DataFrame:
        """Return the model's prediction for each sample, a row each: what `distrain predict` writes.

        `inputs`: a split ("test"); a file or folder as the data set reads it; and where the data are your own, arrays
        (a tensor (n, ...), or a dict of them) or a Dataset. `out` also writes a file, as `distrain predict -o` does;
        `output` and `layer` are its options.
        Samples that do not decode are skipped with a warning.
        """
        from distrain.inference import predict_table

        checkpoint = self.checkpoint(weights)
        with self._here("task", "model", "data", "loss"):
            return predict_table(checkpoint, inputs, out=out, output=output, layer=layer, changed_data=changed_data)

    def export(self, out: str | Path, *, weights: Weights = None, **options: Any) -> Exported:
        """Write the model as a file or a folder, as `distrain export` does; returns its files and notes.

        `options` are those of that command: format, dtype, shards, overwrite, verify, and ema, which is on where the
        recipe keeps an average of the weights.
        """
        from distrain.api.exporting import export_model

        options = {"ema": self.recipe.train.ema is not None, **options}
        checkpoint = self.checkpoint(weights)
        with self._here():
            return export_model(checkpoint, out, **options)[2]

    def resume(self, *, processes: int = 1, strategy: str = "auto", update: bool = False, **objects: Any) -> Run:
        """Resume it; returns the run. `objects`: model, data, … where its recipe names some that this process lacks."""
        from distrain.api.training import train

        run = load(self, **objects) if objects else self
        return train(run, processes=processes, strategy=strategy, update=update)

    def _here(self, *keys: str) -> ExitStack:
        """Return the context in which the recipe's objects are found; raises UserError for those of `keys` not here."""
        missing = [
            spec
            for spec in named_objects(self.recipe.model_dump(mode="json"))
            if given_key(spec) in keys and spec not in self.given
        ]
        if missing:
            passed = ", ".join(f"{given_key(spec)}=..." for spec in missing)
            raise UserError(
                f"{self.path} was trained with {' and '.join(missing)} of a Python process, which this one does not "
                f"have; pass what they were: distrain.load({str(self.path)!r}, {passed})"
            )
        around = ExitStack()
        around.enter_context(own_surroundings(computes=bool(keys)))
        around.enter_context(given_objects(self.given))
        return around


# --------------------------------------------------------------------------------------------------------------------


def load(
    run: str | Path | Run,
    *,
    task: Any = None,
    model: Any = None,
    data: Any = None,
    loss: Any = None,
    metrics: Sequence[Any] | None = None,
    callbacks: Sequence[Any] | None = None,
    optim: Any = None,
    schedule: Any = None,
) -> Run:
    """Return a run by its folder, whoever trained it.

    Where its recipe names objects of another Python process (`object.model:Net`), pass them again, as to `train`: the
    class of the model, the data. Raises UserError for a folder that is no run, and for an object that it does not name.
    """
    passed = dict(zip(KEYS, (task, model, data, loss, metrics, callbacks, optim, schedule), strict=True))
    found = run if isinstance(run, Run) else Run(run)
    objects = Objects(found.given)
    objects.fill(found.recipe, {key: value for key, value in passed.items() if value is not None})
    return Run(found.path, objects.given)


def evaluate(run: str | Path | Run, split: str = "test", **options: Any) -> dict[str, Any]:
    """Return the loss and metrics of a run's model on a split: `load(run).evaluate(split, ...)`."""
    return _loaded(run).evaluate(split, **options)


def predict(run: str | Path | Run, inputs: Any, **options: Any) -> pd.DataFrame:
    """Return the predictions of a run's model: `load(run).predict(inputs, ...)`."""
    return _loaded(run).predict(inputs, **options)


def _loaded(run: str | Path | Run) -> Run:
    return run if isinstance(run, Run) else load(run)
