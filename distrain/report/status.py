"""How runs are doing, read from their folders and from SLURM's queue, and how they are ended. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from distrain.config.strategies import describe_strategy
from distrain.config.yaml import load_recipe
from distrain.launchers import launcher_of
from distrain.launchers.launcher import Job, jobs_of_folders
from distrain.launchers.sweeps import STOP, RankedBy, SweepRecord, is_sweeping, read_record, read_sweep
from distrain.report.goodput import Goodput, goodput_of
from distrain.run.evaluations import Evaluations, best_of_evaluations
from distrain.run.folder import RunDir
from distrain.run.heartbeat import Heartbeat, read_heartbeats
from distrain.run.json_files import lines_backwards, parse_row
from distrain.system.errors import UserError
from distrain.system.numbers import number
from distrain.system.terminal import Table
from distrain.training.callbacks.trackers import duration

STATES = {
    "new": "made, and never started",
    "queued": "waits in SLURM's queue",
    "starting": "its job runs, and it has not begun",
    "running": "trains",
    "hanging": "runs without getting any further",
    "ending": "its job ends",
    "finished": "complete",
    "stopped": "has saved its state and stopped; the same command resumes it",
    "failed": "ended by an error",
    "pruned": "stopped by its search, as others were better by then",
    "gone": "began, and nothing of it is seen any more",
}


_CLAUSE = 600
"""Characters of an error's message that are shown."""
_LOOKED_AT = 20_000
"""Rows from the end of metrics.jsonl that are looked at."""


@dataclass(frozen=True)
class Status:
    """How a run is doing."""

    run: str
    state: str
    """One of STATES."""
    step: int = 0
    """Finished optimizer steps."""
    total_steps: int | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    """Seconds of training that are left at the present rate, while it runs."""
    loss: float | str | None = None
    """Of the last row of training numbers."""
    score: dict[str, Any] | None = None
    """Of the last evaluation, or the best of a finished run or a sweep's, None where none is: metric, value, step."""
    checkpoint: int | None = None
    """The step of the newest checkpoint."""
    starts: int = 0
    """How often it has begun."""
    processes: int | None = None
    strategy: str | None = None
    replicate: int | str = 1
    """How many replicas of what is sharded there are; auto: one for each machine."""
    job: str | None = None
    """Its latest SLURM job."""
    job_state: str | None = None
    """Its state in SLURM: PENDING, RUNNING, ..."""
    reason: str | None = None
    """Why it waits in the queue, or where it runs."""
    left: str | None = None
    """What is left of the job's time limit."""
    heartbeat_age_s: float | None = None
    """Since the ranks wrote that they are alive, of the one that did so the longest ago."""
    queue: str | None = None
    """Why SLURM could not be asked, where that is so."""
    message: str | None = None
    """What it failed of, or where it hangs or stopped."""
    goodput: Goodput | None = None
    """What the time of all attempts went to, and what it cost."""
    values: dict[str, str] = field(default_factory=dict)
    """What is its own in a sweep."""
    summary: dict[str, Any] | None = None
    """Of a finished run: what its file FINISHED holds."""
    rank: int | None = None
    """Its place among the runs of a sweep by `eval.best`, from 1; equals share one."""

    @property
    def alive(self) -> bool:
        """Whether something of it is queued or runs."""
        return self.state in ("queued", "starting", "running", "hanging", "ending")


def status_of(
    folder: Path,
    jobs: list[Job],
    values: dict[str, str] | None = None,
    problem: str | None = None,
    *,
    ended: bool = False,
) -> Status:
    """Return how the run in `folder` is doing. `jobs`: its jobs in SLURM; `problem`: why they are not known.

    `ended`: whether it is known to have ended, though processes of it may still write that they are alive.
    """
    run = RunDir(folder)
    job = next((each for each in reversed(jobs) if each.alive), jobs[-1] if jobs else None)
    beats = read_heartbeats(run)
    fresh = bool(beats) and not ended and all(beat.age_s() < 6 * beat.interval + 10 for beat in beats)
    fresh = fresh and not all(beat.is_of_the_past() for beat in beats)
    attempts = run.attempts()
    stalled = next((beat for beat in beats if beat.stalled is not None), None) if fresh else None
    state, message = _state(run, job, fresh and any(beat.phase != "ended" for beat in beats), bool(attempts))
    if state == "running" and job is not None and job.alive and not _begun_by(attempts, job):
        state = "starting"  # what the folder holds is of the attempt before
    if state == "running" and stalled is not None:
        state, message = "hanging", f"rank {stalled.rank} on {stalled.host} in {stalled.where()}"
    latest, score = _numbers(run)
    step = _step_of(latest, beats)
    effect = run.effect() or {}
    total = effect.get("total_steps")
    finished = run.finished
    if finished is not None:
        step = int(finished.get("steps", step))
        score = finished.get("best", score)
    rate = latest.get("samples_per_s")
    eta = None
    if state == "running" and total is not None and rate:
        eta = max(0, total - step) * load_recipe(run.recipe_path).recipe.batch.global_batch_size / rate
    launch = run.launch() if run.launch_path.exists() else None
    return Status(
        run=str(folder),
        state=state,
        step=step,
        total_steps=total,
        samples_per_s=rate,
        eta_s=eta,
        loss=latest.get("loss"),
        score=score,
        checkpoint=_newest_checkpoint(run),
        starts=len(attempts),
        processes=launch.processes if launch else None,
        strategy=launch.strategy if launch else None,
        replicate=launch.replicate if launch else 1,
        job=job.id if job else None,
        job_state=job.state if job else None,
        reason=job.reason or None if job else None,
        left=job.left or None if job else None,
        heartbeat_age_s=max(beat.age_s() for beat in beats) if beats and state in ("running", "hanging") else None,
        queue=problem,
        message=message,
        goodput=_goodput(run),
        values=values or {},
        summary=finished,
    )


def _step_of(latest: Mapping[str, Any], beats: Sequence[Heartbeat]) -> int:
    """Return the finished steps, from the last row of training numbers and what each rank has written since."""
    reached = [beat.step for beat in beats]
    if any(beat.rank == 0 and beat.steps and beat.time > latest.get("time", math.inf) for beat in beats):
        return max(reached)  # less than the row's after a rollback
    return max([int(latest.get("step", 0)), *reached])


def _goodput(run: RunDir) -> Goodput | None:
    try:
        recipe = load_recipe(run.recipe_path).recipe
        batch, price = recipe.batch.global_batch_size, recipe.log.gpu_hour_price
        return goodput_of(run, global_batch_size=batch, gpu_hour_price=price)
    except UserError:
        return None  # of a damaged file: whoever needs it raises it


def _state(run: RunDir, job: Job | None, beats: bool, began: bool) -> tuple[str, str | None]:
    if run.finished is not None:
        return "finished", None
    if job is not None and job.alive:
        match job.state:
            case "PENDING" | "REQUEUED" | "REQUEUE_HOLD" | "SPECIAL_EXIT":
                return "queued", _why_queued(job)
            case "COMPLETING" | "SIGNALING" | "STAGE_OUT":
                return "ending", None
        return "running", None
    if beats:
        return "running", None
    if (failed := run.failed) is not None:
        where = f"rank {failed['rank']}: " if "rank" in failed else ""
        return "failed", f"{where}{_clause(str(failed.get('message') or failed.get('error')))}"
    if (stopped := run.preempted) is not None:
        return "stopped", f"by {stopped.get('reason')} after step {stopped.get('step')}"
    if job is not None and not began:
        return "failed", f"job {job.id} is {job.state} and the run never began; see distrain logs {run.path}"
    return ("gone", f"job {job.id} is {job.state}" if job else None) if began else ("new", None)


def _clause(message: str) -> str:
    """Return an error's message on one line, with what its first line announces and the lines below it list."""
    first, *below = message.splitlines() or [""]
    listed = [line.strip().removeprefix("- ") for line in below if line.startswith(" ")]
    clause = f"{first.rstrip().removesuffix(':')}: {'; '.join(listed)}" if listed else first
    return clause if len(clause) <= _CLAUSE else f"{clause[: _CLAUSE - 1]}…"


def _of_sweep(status: Status, best: RankedBy | None, pruned: int | None) -> Status:
    """Return the status of a run as one of a sweep: its best evaluation up to now, and whether it was pruned."""
    if best is None:
        return status
    run, score = RunDir(status.run), status.score
    if pruned is not None and status.state != "finished":
        status = replace(status, message=f"after step {pruned}")
        status = status if status.alive else replace(status, state="pruned")
    if status.state != "finished" or (score is not None and score["metric"] != best.metric):
        found = Evaluations(run, best.metric).read()
        if status.state == "pruned":
            found = [each for each in found if pruned is None or each[0] <= pruned]
        top = best_of_evaluations(found, higher=best.higher)
        score = {"metric": best.metric, "step": top[0], "value": top[1]} if top is not None else None
    return replace(status, score=score)


def _ranked(found: list[Status], best: RankedBy | None) -> list[Status]:
    """Return the runs of a sweep, the best first, and last those that have no score."""
    if best is None:
        return found
    scores = {id(each): each.score["value"] for each in found if each.score and _is_finite(each.score["value"])}
    ordered = sorted(scores.values(), reverse=best.higher)
    ranked = [replace(each, rank=ordered.index(scores[id(each)]) + 1) for each in found if id(each) in scores]
    return sorted(ranked, key=lambda each: each.rank or 0) + [each for each in found if id(each) not in scores]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _best_by(folder: Path, record: SweepRecord) -> RankedBy | None:
    """Return by what the runs of a sweep are compared; of an earlier version's what their checkpoints say, or None."""
    if record.best is not None:
        return record.best
    from distrain.checkpoint import criterion_of

    for run in record.runs:
        if (found := criterion_of(RunDir(folder / run["folder"]).checkpoints)) is not None:
            return RankedBy(found.metric, found.higher)
    return None


def _why_queued(job: Job) -> str | None:
    if job.reason == "BeginTime":
        return "SLURM starts a job that was queued again after a pause, of two minutes unless the site says otherwise"
    return None


def _begun_by(attempts: list[dict[str, Any]], job: Job) -> bool:
    """Whether the last attempt began after SLURM had started the job."""
    if job.elapsed_s is None or not attempts:
        return bool(attempts)
    return float(attempts[-1].get("time", 0)) > time.time() - job.elapsed_s - 5


def _numbers(run: RunDir) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the last row of training numbers and the last score."""
    latest: dict[str, Any] = {}
    score = None
    name = None
    for offset, line in islice(lines_backwards(run.metrics_path), _LOOKED_AT):
        if latest and b'"eval"' not in line:
            continue
        row = parse_row(line, f"{run.metrics_path} at byte {offset}")
        if row.get("event") == "train":
            latest = latest or row
        elif row.get("event") == "eval" and score is None:
            if name is None:
                name = (load_recipe(run.recipe_path).recipe.eval.best or "loss").removeprefix("-")
            if name in row:
                score = {"metric": name, "value": row[name], "step": row["step"]}
        if latest and score:
            break
    return latest, score


def _newest_checkpoint(run: RunDir) -> int | None:
    from distrain.checkpoint import newest_step

    return newest_step(run.checkpoints)


def statuses(folder: Path, look: Callable[..., Status] = status_of) -> list[Status]:
    """Return how a run, the runs of a sweep, or all runs and sweeps right below a folder are doing.

    `look`: called as `status_of` for each.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a run, or go to the folder that has runs/ in it")
    if RunDir(folder).exists or read_sweep(folder) is not None:
        places = [folder]
    else:
        places = sorted(inner for inner in folder.iterdir() if inner.is_dir())
    sweeps = {place: record for place in places if (record := read_record(place)) is not None}
    runs = [
        run
        for place in places
        for run in (
            [place / each["folder"] for each in sweeps[place].runs]
            if place in sweeps
            else [place] * RunDir(place).exists
        )
    ]
    jobs: dict[Path, list[Job]] = {}
    problem = None
    try:
        jobs = jobs_of_folders([run.absolute() for run in runs])
    except UserError as error:  # the folders hold the most of it
        problem = str(error)
    found: list[Status] = []
    for place in places:
        if (record := sweeps.get(place)) is None:
            found += [look(run, jobs.get(run.absolute(), []), None, problem) for run in runs if run == place]
            continue
        best = _best_by(place, record)
        of_sweep = []
        for each in record.runs:
            run = place / each["folder"]
            status = look(run, jobs.get(run.absolute(), []), each["values"], problem)
            of_sweep.append(_of_sweep(status, best, each.get("pruned")))
        found += _ranked(of_sweep, best)
    return found


def best_line(folder: Path, found: list[Status]) -> str | None:
    """Return which run of a sweep is the best, and where its model is; None where `folder` is no sweep, or none is."""
    record = read_record(folder)
    first = next((each for each in found if each.rank == 1), None)
    if record is None or first is None or first.score is None:
        return None
    best = _best_by(folder, record)
    values = ", ".join(f"{key}={value}" for key, value in first.values.items())
    score = f"{first.score['metric']} {number(first.score['value'])}"
    direction = "higher" if best is not None and best.higher else "lower"
    export = RunDir(first.run).export_path
    where = str(export if export.exists() else first.run)
    exported = (first.summary or {}).get("exported_step", first.score["step"])
    where += f", which is of step {exported:,}" if exported != first.score["step"] else ""
    where += "" if first.state == "finished" else f", {first.state}"
    return f"best: {values}: {score} at step {first.score['step']:,} ({direction} is better), in {where}"


def waiting_line(folder: Path) -> str | None:
    """Return how many queued tasks of a search have drawn nothing yet; None where there are none, or no queue."""
    numbers = [job.id for job in _waiting(folder)]
    if not numbers:
        return None
    jobs = ", ".join(dict.fromkeys(number.partition("_")[0] for number in numbers))
    return f"{len(numbers)} more of job {jobs}, whose values are drawn when they start"


def _waiting(folder: Path) -> list[Job]:
    record = read_record(folder)
    if record is None or record.search is None:
        return []
    try:
        jobs = jobs_of_folders([folder.absolute()])[folder.absolute()]
    except UserError:  # the table says so
        return []
    drawn = {str(run.get("number", place)) for place, run in enumerate(record.runs)}
    return [job for job in jobs if job.alive and job.id.partition("_")[2] not in drawn]


# --------------------------------------------------------------------------------------------------------------------
# As people read it


def status_rows(status: Status) -> list[tuple[str, str]]:
    """Return the lines that describe a run, name and value."""
    of = f" of {status.total_steps:,}" if status.total_steps else ""
    said = [("state", f"{status.state}: {STATES[status.state]}")]
    if status.message:
        said.append(("", status.message))
    if status.queue:
        said.append(("queue", f"not known: {status.queue.splitlines()[0]}"))
    if status.job:
        more = [
            part for part in (status.reason, f"{status.left} left" if status.left and status.alive else None) if part
        ]
        said.append(("job", f"{status.job} {status.job_state}" + (f" ({', '.join(more)})" if more else "")))
    said.append(("step", f"{status.step:,}{of}" + (f", saved {status.checkpoint:,}" if status.checkpoint else "")))
    if status.samples_per_s:
        left = f", {duration(status.eta_s)} left" if status.eta_s is not None else ""
        said.append(("rate", f"{status.samples_per_s:,.0f} samples/s{left}"))
    if status.loss is not None:
        said.append(("loss", number(status.loss)))
    if status.score is not None:
        score = status.score
        said.append(("score", f"{score['metric']} {number(score['value'])} at step {score['step']:,}"))
    if status.starts > 1:
        said.append(("starts", str(status.starts)))
    if status.goodput is not None and (status.goodput.useful_s or not status.goodput.unknown_s):
        said += _goodput_rows(status.goodput)
    if status.processes:
        said.append(("world", f"{status.processes} x {describe_strategy(status.strategy or '?', status.replicate)}"))
    if status.heartbeat_age_s is not None:
        said.append(("alive", f"{duration(status.heartbeat_age_s)} ago"))
    return said


def _goodput_rows(found: Goodput) -> list[tuple[str, str]]:
    parts = {
        "replayed": found.replayed_s,
        "checkpoints": found.checkpoint_s,
        "starts": found.start_s,
        "evaluations": found.evaluation_s,
        "idle": found.idle_s,
        "unknown": found.unknown_s,
    }
    shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)
    rows = [("goodput", f"{found.share:.0%} of {duration(found.total_s)}" + (f"; {shown}" if shown else ""))]
    cost = [
        f"{each:.3g} {unit}"
        for each, unit in (
            (found.device_s_per_1000_samples, "device seconds"),
            (found.energy_wh_per_1000_samples, "Wh"),
            (found.price_per_1000_samples, "in money"),
        )
        if each is not None
    ]
    if cost:
        whole = f"; {found.price:,.2f} in all" if found.price is not None else ""
        rows.append(("cost", f"{', '.join(cost)} for 1,000 samples{whole}"))
    return rows


def table(found: list[Status], below: Path, holds: Callable[[Table], bool] = lambda table: True) -> Table:
    """Return a table of runs; of a sweep with what differs between them.

    Columns in which nothing is said are not shown. Where `holds` says that it is too wide, columns are dropped, those
    first that matter least.
    """
    keys = list(dict.fromkeys(key for status in found for key in status.values))
    metrics = {status.score["metric"] for status in found if status.score}
    scored = f"eval {' '.join(metrics)}" if len(metrics) == 1 else "eval"

    def name(status: Status) -> str:
        path = Path(status.run)
        return str(path.relative_to(below) if path.is_relative_to(below) and path != below else path)

    def step(status: Status) -> str:
        return f"{status.step:,}" + (f"/{status.total_steps:,}" if status.total_steps else "")

    def score(status: Status) -> str:
        if not status.score:
            return ""
        value = number(status.score["value"])
        return value if len(metrics) == 1 else f"{status.score['metric']} {value}"

    columns: dict[str, Callable[[Status], str]] = {
        "run": name,
        **{key: lambda status, key=key: status.values.get(key, "") for key in keys},  # type: ignore[misc]
        "state": lambda status: status.state,
        "step": step,
        "left": lambda status: duration(status.eta_s) if status.eta_s is not None else "",
        "loss": lambda status: number(status.loss) if status.loss is not None else "",
        scored: score,
        "starts": lambda status: str(status.starts),
        "job": lambda status: f"{status.job} {status.job_state}" if status.job else "",
    }
    for column in ("left", "loss", scored, "job"):
        if not any(columns[column](status) for status in found):
            del columns[column]
    least = [name for name in ("starts", "job", "loss", *reversed(keys), "left", scored) if name in columns]
    while True:
        shown = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            shown.add_column(column, justify="left" if column in ("run", *keys, "state", "job") else "right")
        for status in found:
            shown.add_row(*(cell(status) for cell in columns.values()))
        if not least or holds(shown):
            return shown
        del columns[least.pop(0)]


def as_json(status: Status) -> dict[str, Any]:
    """Return everything that is known of a run."""
    return asdict(status)


# --------------------------------------------------------------------------------------------------------------------
# Ending runs


def cancel_jobs(folder: Path) -> list[str]:
    """Cancel every job of a run or a sweep; returns the lines to print. SLURM does not queue them again."""
    folder = folder.absolute()
    cancelled = launcher_of(folder).cancel(folder)
    if not cancelled:
        known = ", ".join(f"{job.id} {job.state}" for job in jobs_of_folders([folder])[folder])
        return [f"no job of {folder} is queued or runs" + (f" ({known})" if known else "")]
    said = [f"cancelled job {job.id}, which was {job.state}; it is not queued again" for job in cancelled]
    again = "the same `distrain submit`" if read_sweep(folder) is not None else f"`distrain submit {folder}`"
    return [*said, f"{again} resumes from the newest checkpoint"]


def stop_run(folder: Path) -> list[str]:
    """Ask a run, or each run of a sweep, to save and end; returns the lines to print."""
    folder = folder.absolute()
    found = statuses(folder)
    if not RunDir(folder).exists and read_sweep(folder) is None:
        raise UserError(f"{folder} is neither a run nor a sweep")
    said = []
    if is_sweeping(folder):
        (folder / STOP).touch()
        said.append(f"{folder}: STOP is written; `distrain sweep` starts no further run, and ends")
    if waiting := _waiting(folder):
        (folder / STOP).touch()
        said.append(
            f"{folder}: STOP is written; tasks that have drawn nothing yet ({len(waiting)}) end when they start"
        )
    for status in found:
        path = Path(status.run)
        match status.state:
            case "queued":
                launcher_of(path).cancel(path)
                where = f"from step {status.checkpoint}" if status.checkpoint else "from its beginning"
                said.append(f"{path} was waiting in the queue: job {status.job} is cancelled; it would resume {where}")
            case "starting" | "running" | "hanging" | "ending":
                RunDir(path).stop_path.touch()
                said.append(
                    f"{path}: STOP is written; within a step all ranks agree, save and end, and the job is not queued "
                    f"again. `distrain {'submit' if status.job else 'train'} {path}` resumes it"
                )
            case _:
                said.append(f"{path} does not run: {status.state}, {STATES[status.state]}")
    return said
