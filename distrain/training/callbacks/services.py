"""MLflow and trackio, as mirrors of metrics.jsonl that a resumed run continues. Each is an extra."""

from __future__ import annotations

import contextlib
import io
import queue
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distrain.config.registry import trackers
from distrain.run.media import Media, read_table
from distrain.run.metrics_file import MetricsFile
from distrain.training.callbacks.tracker import Row, Tracker, TrackerStart, artifact_name, media_in, numbers_of

_MOST_METRICS, _MOST_PARAMS = 1000, 100
"""Of one request to MLflow."""
_MOST_VALUE = 6000
"""Characters of a parameter of MLflow."""
_WAIT_S = 120.0
"""How long the end of an attempt waits for a service to take the last rows."""


def _id_in(folder: Path, make: Any) -> tuple[str, bool]:
    """Return the service's name of the run, which the run folder keeps, and whether it is new."""
    folder.mkdir(exist_ok=True)
    file = folder / "run-id"
    if file.exists():
        return file.read_text().strip(), False
    found = str(make())
    file.write_text(f"{found}\n")
    return found, True


@trackers.register("mlflow")
class MLflow(Tracker):
    """MLflow: one run, written by rank 0, the same one after every resume; rows are sent by a thread of their own.

    A tag says how many rows of metrics.jsonl the server has: it is set with each batch of them, and a resumed run sends
    those that follow. Of a batch that a kill cut short, what is there is not sent again.
    """

    name = "mlflow"
    package = "mlflow"
    TAG = "distrain.rows"

    def __init__(self, start: TrackerStart, tracking_uri: str | None = None, experiment: str | None = None):
        """`tracking_uri`: the server or database, None for MLflow's own choice; `experiment`: None for log.project."""
        from mlflow import MlflowClient

        self._run, recipe = start.run, start.recipe
        self._client = MlflowClient(tracking_uri=tracking_uri)
        name = experiment or recipe.log.project

        def create() -> str:
            found = self._client.get_experiment_by_name(name)
            of = found.experiment_id if found is not None else self._client.create_experiment(name)
            return str(self._client.create_run(of, run_name=recipe.name).info.run_id)

        self.id, new = _id_in(start.run.path / "mlflow", create)
        if new:
            self._describe(start.config)
        else:
            self._client.update_run(self.id, status="RUNNING")
        self._held = int(self._client.get_run(self.id).data.tags.get(self.TAG, 0))
        self._checked = False
        self._finished = False
        self._error: Exception | None = None
        self._rows: queue.SimpleQueue[tuple[int, Row] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def _describe(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_key(key), str(value)[:_MOST_VALUE]) for key, value in _flat(config)]
        for begin in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self.id, params=params[begin : begin + _MOST_PARAMS])
        self._client.log_dict(self.id, config, "recipe.json")

    def missing(self, rows: MetricsFile, history: dict[str, Any]) -> Iterable[tuple[int, Row]] | None:
        return enumerate(rows.last(rows.count - self._held), self._held)

    def mark(self) -> Any:
        self._raise()

    def write(self, index: int, row: Row) -> None:
        self._raise()
        if index >= self._held:
            self._rows.put((index, row))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _send_all(self) -> None:
        """Send what is written, as much at once as there is, until None comes."""
        more = True
        while more:
            batch: list[tuple[int, Row]] = []
            item = self._rows.get()
            while item is not None:
                batch.append(item)
                if self._rows.empty() or sum(len(row) for _, row in batch) > _MOST_METRICS // 2:
                    break
                item = self._rows.get()
            more = item is not None
            try:
                if batch and self._error is None:
                    self._send(batch)
            except Exception as error:  # raised where the run writes its next row
                self._error = error

    def _send(self, batch: list[tuple[int, Row]]) -> None:
        from mlflow.entities import Metric, RunTag

        for _, row in batch:
            for _, item, path in media_in(self._run, row):
                self._client.log_artifact(self.id, str(path), str(Path(item.file).parent))
        metrics = [
            Metric(_key(name), value, int(1000 * row.get("time", 0)), row["step"])
            for _, row in batch
            for name, value in numbers_of(row).items()
        ]
        if not self._checked:
            self._checked = True
            metrics = self._not_there(metrics) if self._held else metrics
        count = batch[-1][0] + 1
        for begin in range(0, len(metrics) - _MOST_METRICS, _MOST_METRICS):
            self._client.log_batch(self.id, metrics=metrics[begin : begin + _MOST_METRICS])
        rest = (len(metrics) - 1) // _MOST_METRICS * _MOST_METRICS if metrics else 0
        self._client.log_batch(self.id, metrics=metrics[rest:], tags=[RunTag(self.TAG, str(count))])

    def _not_there(self, metrics: list[Any]) -> list[Any]:
        """Return the metrics that the server lacks; a kill may have come between those of a batch and its tag."""
        there = {
            (key, each.step, each.value)
            for key in {metric.key for metric in metrics}
            for each in self._client.get_metric_history(self.id, key)
        }
        return [each for each in metrics if (each.key, each.step, each.value) not in there]

    def finish(self, files: Mapping[str, Path]) -> None:
        self._finished = True
        for name, path in files.items():
            if path.is_dir():
                self._client.log_artifacts(self.id, str(path), f"{name}/{path.name}")
            else:
                self._client.log_artifact(self.id, str(path), name)

    def close(self) -> None:
        self._rows.put(None)
        self._thread.join(_WAIT_S)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"the server did not take the last rows within {_WAIT_S:g} s")
        # one that was stopped or failed may be resumed
        self._client.update_run(self.id, status="FINISHED" if self._finished else "SCHEDULED")


def _key(name: str) -> str:
    """Return a name as MLflow takes it."""
    return re.sub(r"[^\w\-./ ]", "_", name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@trackers.register("trackio")
class Trackio(Tracker):
    """trackio: one run, written by rank 0, the same one after every resume; trackio sends its rows by a thread.

    trackio's own step is the line number in metrics.jsonl, as wandb's: a line that is there is not sent again.
    """

    name = "trackio"
    package = "trackio"

    def __init__(
        self,
        start: TrackerStart,
        project: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
    ):
        """`project`: None for log.project; `space_id`, `server_url`: where to, None for this machine's own folder."""
        import trackio

        self._folder, recipe = start.run, start.recipe
        run_id, _ = _id_in(start.run.path / "trackio", lambda: f"{recipe.name}-{secrets.token_hex(4)}")
        places = {"space_id": space_id, "server_url": server_url}
        with _quiet():
            self._run = trackio.init(
                project=project or recipe.log.project,
                name=run_id,
                config=start.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                **{key: value for key, value in places.items() if value is not None},
            )
        self._held = int(self._run._next_step)  # the only place that has it for a server as well

    def missing(self, rows: MetricsFile, history: dict[str, Any]) -> Iterable[tuple[int, Row]] | None:
        return enumerate(rows.last(rows.count - self._held), self._held)

    def write(self, index: int, row: Row) -> None:
        if index < self._held:
            return
        media = {name: self._shown(item, path) for name, item, path in media_in(self._folder, row)}
        # `step` is trackio's own
        self._run.log({"event": row["event"], "optimizer_step": row["step"], **numbers_of(row), **media}, step=index)

    def _shown(self, item: Media, path: Path) -> Any:
        import trackio

        match item.kind:
            case "image":
                return trackio.Image(str(path), caption=item.caption or None)
            case "table":
                import pandas as pd

                columns, rows = read_table(path)
                return trackio.Table(dataframe=pd.DataFrame(rows, columns=columns))
            case _:
                lines = "\n".join(f"    {line}" for line in path.read_text("utf-8").split("\n"))
                return trackio.Markdown(f"{item.caption}\n\n{lines}" if item.caption else lines)

    def finish(self, files: Mapping[str, Path]) -> None:
        with _quiet():
            for name, path in files.items():
                self._run.log_artifact(str(path), name=artifact_name(self._folder, name), type="model", aliases=[name])

    def close(self) -> None:
        import trackio

        with _quiet():
            trackio.finish()  # the run, and that the end of the process finishes it once more


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a library prints off the terminal, where the line of progress is."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
