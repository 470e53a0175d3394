"""What a report of runs holds, read from their folders; html/, markdown.py and pictures.py show it. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import distrain
from distrain.checkpoint import criterion_of
from distrain.config.strategies import describe_strategy
from distrain.report.attempts import AttemptPart, attempt_parts, total_seconds
from distrain.report.curves import Panel, comparing_panels, panels_of
from distrain.report.differences import Comparison, compare_runs
from distrain.report.goodput import Goodput, goodput_of
from distrain.report.history import History
from distrain.report.recipe_rows import RecipeRow, recipe_rows
from distrain.report.status import Status, status_of, statuses
from distrain.run.evaluations import best_of_evaluations, value_of
from distrain.run.folder import RunDir, describe_effect
from distrain.run.json_files import json_safe
from distrain.system.errors import UserError
from distrain.system.numbers import number
from distrain.training.callbacks.trackers import duration

POINTS = 600
"""Points of a curve of a single run; of several runs each has fewer."""

_SHARES = (
    ("forward_backward_s", "forward and backward"),
    ("optimizer_s", "optimizer"),
    ("data_s", "waiting for data"),
    ("agreement_s", "agreement of ranks"),
    ("saving_s", "saving"),
)
_FAILURE = 20_000
"""Characters of an error that are shown."""
_LISTED = 200
"""Events, files and warnings that are listed; further ones are counted."""


@dataclass(frozen=True)
class Fact:
    """One line of what is known: a name, a text, and maybe a remark."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A part of the time of a step."""

    name: str
    seconds: float
    share: float
    """Of the whole step, 0 to 1."""


@dataclass(frozen=True)
class RunReport:
    """One run."""

    name: str
    folder: str
    state: str
    """One of `distrain.report.status.STATES`."""
    message: str | None
    """What it failed of, or where it hangs or stopped."""
    headline: list[Fact]
    """What came out, what it cost, and how often it was interrupted: the first screen."""
    results: list[dict[str, Any]]
    """The last evaluation of each split: split, step, values."""
    reproduce: list[str]
    """Commands that train the same run again."""
    panels: list[Panel]
    """Curves."""
    restarts: list[int]
    """Steps that an attempt other than the first resumed from."""
    checkpoints: list[int]
    """Steps that were saved."""
    best_step: int | None
    run_time: list[Share]
    """Where the time of all attempts went, from the first one's beginning to the last sign of life."""
    step_time: list[Share]
    """Where the time of a step went, the mean of all rows; empty where it was not measured."""
    step_s: float | None
    """Seconds of a step, the mean of all rows."""
    memory: list[Fact]
    recipe: list[RecipeRow]
    recipe_text: str
    """recipe.yaml, with where each value came from; training it is the same run."""
    recipe_problem: str | None
    """Why the recipe could not be read."""
    environment: list[Fact]
    data: list[Fact]
    """What it depended on besides its recipe."""
    attempts: list[AttemptPart]
    events: list[Fact]
    """Anomalies, corrupt samples, stragglers, changes: what was not as usual."""
    failure: str = ""
    """All that FAILED.json says of a run that failed."""
    examination: dict[str, Any] | None = None
    """What its model does with a split: see `distrain.inference.examining`."""
    not_examined: str = ""
    """Why there is no examination."""


@dataclass(frozen=True)
class Report:
    """One or several runs."""

    title: str
    made: float
    """Seconds since 1970."""
    version: str
    """Of distrain."""
    runs: list[RunReport]
    comparison: Comparison | None = None
    """Of several runs."""
    panels: list[Panel] = field(default_factory=list)
    """Curves of several runs, side by side."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found: dict[str, Any] = json_safe(asdict(self))
        return found


def build_report(
    folders: Sequence[Path],
    examined: Sequence[tuple[dict[str, Any] | None, str]] | None = None,
    *,
    ended: bool = False,
) -> Report:
    """Return the report of the runs in `folders`.

    `examined`: for each the examination of its model, or None with the reason why there is none. `ended`: whether they
    are known to have ended, so that no queue is asked. Raises UserError for a folder that is no run.
    """
    if problems := [
        f"{folder} is no run folder: it has no recipe.yaml; name folders such as runs/NAME"
        for folder in folders
        if not RunDir(folder).exists
    ]:
        raise UserError("\n".join(problems))
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    points = POINTS if len(folders) == 1 else max(100, 2 * POINTS // len(folders))
    histories = [History(folder) for folder in folders]
    given = examined or [(None, "")] * len(folders)
    runs = [
        run_report(folder, history, examination, why, points=points, ended=ended)
        for folder, history, (examination, why) in zip(folders, histories, given, strict=True)
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    if len(runs) == 1:
        return Report(title, time.time(), distrain.__version__, runs)
    names = labels(folders)
    comparison = compare_runs(folders, names, histories)
    panels = comparing_panels(dict(zip(names, histories, strict=True)), points)
    return Report(title, time.time(), distrain.__version__, runs, comparison, panels)


def labels(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: as many of its last parts as tell it from the others."""
    whole = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in whole]


def run_report(
    folder: Path,
    history: History,
    examination: dict[str, Any] | None = None,
    why: str = "",
    *,
    points: int = POINTS,
    ended: bool = False,
) -> RunReport:
    """Return the report of one run."""
    run = RunDir(folder)
    [status] = [status_of(folder, [], ended=True)] if ended else statuses(folder)
    rows, text, problem = recipe_rows(run)
    parts = attempt_parts(run, history, status)
    effect = run.effect() or {}
    marks: dict[str, Any] = {
        "restarts": [part.step for part in parts[1:]],
        "checkpoints": history.checkpoints,
        "best_step": _best_step(run, status, history),
    }
    shares, step_s = _step_time(history)
    # without a recipe that can be read, as far as it is known
    spent = status.goodput if status.goodput is not None else goodput_of(run)
    name = next((row.value for row in rows if row.key == "name"), folder.name)
    return RunReport(
        name=name,
        folder=str(run.path),
        state=status.state,
        message=status.message,
        headline=_headline(run, status, history, parts, effect, spent),
        results=_results(history),
        reproduce=_reproduce(run),
        panels=panels_of(history, points),
        **marks,
        run_time=_run_time(spent),
        step_time=shares,
        step_s=step_s,
        memory=_memory(history, effect),
        recipe=rows,
        recipe_text=text,
        recipe_problem=problem,
        environment=_environment(run, effect, parts),
        data=_data(run),
        attempts=parts,
        events=_events(history),
        failure=_failure(run),
        examination=examination,
        not_examined=why,
    )


# --------------------------------------------------------------------------------------------------------------------


def _headline(
    run: RunDir,
    status: Status,
    history: History,
    parts: list[AttemptPart],
    effect: dict[str, Any],
    spent: Goodput | None,
) -> list[Fact]:
    finished = run.finished or {}
    facts = [Fact("state", status.state, status.message or "")]
    for event in reversed(history.events):
        if event["event"] == "final":
            metric = (status.score or {}).get("metric", "loss")
            shown = metric if metric in event else "loss"
            facts.append(
                Fact(f"{event.get('split', 'test')} {shown}", number(event.get(shown)), "of the exported model")
            )
            break
    if status.score is not None:
        what = "best" if status.state == "finished" else "last evaluation"
        facts.append(
            Fact(f"{what} {status.score['metric']}", number(status.score["value"]), f"step {status.score['step']:,}")
        )
    elif status.loss is not None:
        facts.append(Fact("training loss", number(status.loss), f"step {status.step:,}"))
    of = f"of {status.total_steps:,}" if status.total_steps and status.total_steps != status.step else ""
    facts.append(Fact("steps", f"{status.step:,}", of))
    seconds = total_seconds(parts)
    if seconds:
        unit = "GPU hours" if effect.get("device") == "cuda" else "process hours"
        worlds = sorted({part.processes for part in parts})
        on = f" on {' or '.join(map(str, worlds))}" if worlds != [1] else ""
        spent_hours = hours(sum(part.seconds * part.processes for part in parts))
        facts.append(Fact("time", duration(seconds), f"{spent_hours} {unit}{on}"))
    rate = finished.get("samples_per_s") or status.samples_per_s
    if rate:
        facts.append(Fact("samples/s", number(float(rate))))
    if spent is not None and spent.energy_wh is not None:
        facts.append(Fact("energy", f"{spent.energy_wh / 1000:.3g} kWh", "of all GPUs"))
    if spent is not None and spent.price is not None:
        facts.append(Fact("price", f"{spent.price:,.2f}", "by log.gpu_hour_price"))
    again = len(parts) - 1
    lost, idle = sum(part.lost for part in parts), sum(part.idle_s or 0.0 for part in parts)
    facts.append(
        Fact(
            "restarts", str(max(0, again)), f"{lost:,} steps trained again, {duration(idle)} idle" if again > 0 else ""
        )
    )
    return facts


def hours(seconds: float) -> str:
    """Return seconds in hours, with as many digits as say something."""
    value = seconds / 3600
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _failure(run: RunDir) -> str:
    failed = run.failed
    if failed is None:
        return ""
    parts = [str(failed[key]).rstrip() for key in ("message", "error", "traceback") if failed.get(key)]
    return "\n\n".join(dict.fromkeys(parts))[:_FAILURE]


def _best_step(run: RunDir, status: Status, history: History) -> int | None:
    if status.state == "finished":
        return status.score["step"] if status.score is not None else None
    criterion = criterion_of(run.checkpoints)
    if criterion is None:
        return None
    found = [(int(row["step"]), value_of(row, criterion.metric)) for row in history.events if row["event"] == "eval"]
    best = best_of_evaluations(found, higher=criterion.higher)
    return best[0] if best is not None else None


def _results(history: History) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in history.events:
        if row["event"] in ("eval", "final"):
            split = str(row.get("split", ""))
            kept = {
                name: value
                for name, value in row.items()
                if name not in ("event", "step", "split", "time", "seconds")
                and isinstance(value, int | float | str)
                and not isinstance(value, bool)
            }
            found[split] = {"split": split, "step": row["step"], "exported": row["event"] == "final", "values": kept}
    return list(found.values())


def _reproduce(run: RunDir) -> list[str]:
    path = shlex.quote(str(run.recipe_path))
    launch = run.launch() if run.launch_path.exists() else None
    options = ""
    if launch is not None:
        options = f" --processes {launch.processes}"
        if launch.strategy not in ("single", "ddp"):
            options += f" --strategy {launch.strategy}"
        if launch.offload != "none":
            options += f" --offload {launch.offload}"
        if launch.replicate != 1:
            options += f" --replicate {launch.replicate}"
    return [f"distrain train {path} --run-dir runs/again{options}"]


def _step_time(history: History) -> tuple[list[Share], float | None]:
    import numpy as np

    def mean(name: str) -> float | None:
        values = history.series(f"train/{name}").values
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    whole = mean("step_s")
    if not whole:
        return [], None
    found = [(label, value) for name, label in _SHARES if (value := mean(name)) is not None]
    if not found:
        return [], whole
    rest = whole - sum(value for _, value in found)
    if rest > 0:
        found.append(("evaluations, callbacks, rest", rest))
    total = sum(value for _, value in found)
    return [Share(label, value, value / total) for label, value in found], whole


_PARTS = (
    ("useful", "steps that the run has"),
    ("replayed", "steps trained again"),
    ("checkpoint", "checkpoints"),
    ("evaluation", "evaluations"),
    ("start", "starting"),
    ("idle", "idle between attempts"),
    ("unknown", "unknown"),
)


def _run_time(spent: Goodput | None) -> list[Share]:
    if spent is None or spent.total_s <= 0:
        return []
    found = [(label, float(getattr(spent, f"{part}_s"))) for part, label in _PARTS]
    shares = [Share(label, value, value / spent.total_s) for label, value in found if value > 0]
    return [] if spent.unknown_s == spent.total_s else shares


def _memory(history: History, effect: dict[str, Any]) -> list[Fact]:
    facts = []
    peaks = history.series("train/peak_memory_gib").values
    if len(peaks):
        of = "the GPU" if effect.get("device") == "cuda" else "the process"
        facts.append(Fact("peak", f"{peaks.max():.3g} GiB", f"of {of} with the most"))
    for key, name in (
        ("parameter_bytes", "weights"),
        ("gradient_bytes", "gradients"),
        ("optimizer_bytes", "optimizer"),
    ):
        ranks = (effect.get(key) or {}).get("ranks") if isinstance(effect.get(key), dict) else None
        if ranks:
            full = effect[key].get("full")
            note = f"{_bytes(full)} over all ranks" if full and len(ranks) > 1 else ""
            facts.append(Fact(f"{name}, most of a rank", _bytes(max(ranks)), note))
    return facts


def _bytes(value: float) -> str:
    if value < 1024:
        return f"{value:,.0f} bytes"
    power = min(int(math.log(value, 1024)), 4)
    return f"{value / 1024**power:.3g} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def _environment(run: RunDir, effect: dict[str, Any], parts: list[AttemptPart]) -> list[Fact]:
    facts = []
    launch = run.launch() if run.launch_path.exists() else None
    if launch is not None:
        world = f"{launch.processes} × {describe_strategy(launch.strategy, launch.replicate)}"
        command = [Path(launch.argv[0]).name, *launch.argv[1:]] if launch.argv else []
        facts += [
            Fact("command as typed", shlex.join(command)),
            Fact("world", world),
            Fact("started on", launch.host),
            Fact("git commit", launch.commit or "no repository"),
        ]
        facts += [Fact(package, version) for package, version in launch.versions.items()]
    if hosts := sorted({part.host for part in parts if part.host}):
        facts.append(Fact("hosts of rank 0", ", ".join(hosts)))
    for key in ("device", "precision", "parameters", "trainable", "accumulation", "forward", "deterministic"):
        if key in effect:
            facts.append(Fact(key, describe_effect({key: effect[key]}).removeprefix(f"{key} ")))
    tuned = effect.get("tune")
    if isinstance(tuned, dict) and (
        on := [key for key, each in tuned.items() if isinstance(each, dict) and each.get("on")]
    ):
        facts.append(Fact("tuned", ", ".join(on)))
    compiled = effect.get("compile")
    if isinstance(compiled, dict):
        facts.append(Fact("compiled", "yes" if compiled.get("on") else "no", str(compiled.get("why", ""))))
    return facts


def _data(run: RunDir) -> list[Fact]:
    inputs = run.inputs()
    if inputs is None:
        return []
    told = json.dumps({key: inputs.get(key) for key in ("data", "folder", "splits", "items")}, sort_keys=True)
    facts = [Fact("fingerprint of the data", hashlib.sha256(told.encode()).hexdigest()[:16])]
    for name, count in (inputs.get("splits") or {}).items():
        facts.append(Fact(f"{name} samples", f"{count:,}" if isinstance(count, int) else "a stream"))
    for key, what in (
        ("data", "data files"),
        ("model", "model files"),
        ("folder", "files of folders"),
        ("code", "code"),
    ):
        if (found := _files_of(inputs.get(key))) is None:
            continue
        count, size, shown = found
        facts.append(Fact(what, f"{count:,}" + (f", {_bytes(size)}" if size else ""), shown))
    if isinstance(items := inputs.get("items"), dict):
        looked = sum(len(each) for each in items.values() if isinstance(each, dict))
        facts.append(Fact("samples fingerprinted", str(looked), "data of no known files: a few samples stand for them"))
    return facts


def _files_of(found: Any) -> tuple[int, int, str] | None:
    """Return the number of files in a part of a fingerprint, their bytes as far as known, and a few with their hash."""
    files = found.get("files", found) if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files:
        return None
    size = sum(each[0] for each in files.values() if isinstance(each, list) and each and isinstance(each[0], int))
    shown = ", ".join(str(name) for name in list(files)[:5]) + (", …" if len(files) > 5 else "")
    return len(files), size, shown


def _events(history: History) -> list[Fact]:
    found = []
    for row in history.events:
        event = row["event"]
        if event in ("eval", "final", "checkpoint"):
            continue
        said = ", ".join(
            f"{name} {number(value) if isinstance(value, int | float) else value}"
            for name, value in row.items()
            if name not in ("event", "step", "time") and value not in (None, "", [], {})
        )
        found.append(Fact(event.replace("_", " "), f"step {row['step']:,}", said[:500]))
    if len(found) > _LISTED:
        return [*found[:_LISTED], Fact("further events", f"{len(found) - _LISTED:,}", "see metrics.jsonl")]
    return found
