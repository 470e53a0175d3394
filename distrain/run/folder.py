"""The run folder: the only interface between the launcher, the workers and whatever reads a run. Imports no torch.

runs/NAME/
  recipe.yaml        the resolved recipe, each value with where it came from
  launch.json        how it was started: arguments, versions, git commit, and the request that its processes read
  effect.json        what took effect: engine, world, precision, the state that each rank holds
  metrics.jsonl      one row for each event, in the order written
  anomalies.jsonl    steps whose loss or gradient was not as usual, and what was decided about them
  log-rank-0.txt     what each rank has to say
  micro_batch.json   what `batch.micro: auto` was found to be (see `distrain.run.micro_batch`)
  checkpoints/       see `distrain.checkpoint`
  export/            the trained model as one file
  transformers/      what lay beside the weights of a transformers model
  FINISHED | PREEMPTED | FAILED.json
  STOP               a person asks the run to save and end
  inputs.json        what the last start depended on besides its recipe (see `distrain.fingerprints`)
  UPDATE             a person lets the next start go on with what has changed
  attempts.jsonl     one row for each start, and for each update
  lease.json         which start may write (see `distrain.run.lease`); .in-use is locked by it for as long as it lives
  heartbeat/         what each rank is doing
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import distrain
from distrain.config import UserError
from distrain.system import bounded_json as bounded
from distrain.system.output import in_utf8


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old content or the new, never a part of it."""
    # a folder may be shared by machines whose processes have the same numbers
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


EVALUATION_KEYS = frozenset(
    (
        "event",
        "step",
        "split",
        "loss",
        "samples",
        "seconds",
        "time",
        "undecodable",
        "nonfinite",
        "checkpoint",
        "processes",
        "changed_data",
    )
)
"""What an evaluation's row in metrics.jsonl and its summary say besides metrics, whose names are others."""


@dataclass(frozen=True)
class Launch:
    """How a run is started, written by the launcher and checked by every worker."""

    processes: int
    """The number of processes over all nodes; a world of another size is an error."""
    strategy: str
    """How state is spread over the processes: single, ddp, zero1, zero2, zero3 or fsdp2."""
    argv: list[str]
    """The command as typed."""
    versions: dict[str, str]
    """Of distrain, Python and the packages that decide the numbers."""
    commit: str | None
    """The git commit of the working directory, with '+changes' where files differ from it."""
    host: str
    """The machine that the run was started on."""
    offload: str = "none"
    """What is kept in the memory of the CPU: none, optimizer or all."""
    request: dict[str, Any] | None = None
    """What was asked for, resolved (see `distrain.launchers.request`); None in folders of earlier versions."""
    replicate: int | Literal["auto"] = 1
    """How many replicas of what is sharded there are; auto: one for each machine."""

    @classmethod
    def describe(
        cls,
        processes: int,
        strategy: str,
        offload: str = "none",
        replicate: int | Literal["auto"] = 1,
        *,
        argv: list[str] | None = None,
        request: dict[str, Any] | None = None,
    ) -> Launch:
        """Describe a start from this process, now; `argv` is the command as typed where it was another process's."""
        from importlib.metadata import PackageNotFoundError, version

        versions = {"distrain": distrain.__version__, "python": sys.version.split()[0]}
        for package in ("torch", "torchvision", "accelerate", "deepspeed"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return cls(
            processes,
            strategy,
            argv or list(sys.argv),
            versions,
            _git_commit(),
            socket.gethostname(),
            offload,
            request,
            replicate,
        )


def _git_commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


class RunDir:
    """One run's folder. Paths are properties; nothing is created before `create`."""

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def launch_path(self) -> Path:
        """How the run was started."""
        return self.path / "launch.json"

    @property
    def metrics_path(self) -> Path:
        """The rows of numbers."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    @property
    def micro_batch_path(self) -> Path:
        """What `batch.micro: auto` was found to be."""
        return self.path / "micro_batch.json"

    @property
    def export_path(self) -> Path:
        """The trained model as one safetensors file."""
        return self.path / "export" / "model.safetensors"

    def log_path(self, rank: int) -> Path:
        """What one rank has to say."""
        return self.path / f"log-rank-{rank}.txt"

    def heartbeat_path(self, rank: int) -> Path:
        """What one rank is doing."""
        return self.path / "heartbeat" / f"rank-{rank}.json"

    @property
    def stop_path(self) -> Path:
        """A file by which a person asks the run to save and end."""
        return self.path / "STOP"

    @property
    def attempts_path(self) -> Path:
        """One row for each start, and one with `event: update` for each start that changed something."""
        return self.path / "attempts.jsonl"

    def attempts(self) -> list[dict[str, Any]]:
        """Return the rows of starts, in order."""
        return [row for row in read_rows(self.attempts_path) if "event" not in row]

    @property
    def update_path(self) -> Path:
        """A file by which a person lets the next start go on with changed data or code."""
        return self.path / "UPDATE"

    @property
    def exists(self) -> bool:
        """Whether a run was created here."""
        return self.recipe_path.is_file()

    def holds_other_files(self) -> bool:
        """Whether there is a folder with more in it than what may come before a run, and an interrupted `create` left.

        Before it may come imported checkpoints, with what lay beside their weights, and a size of micro-batch that was
        found for another run.
        """
        unfinished = f".{self.recipe_path.name}."
        before = (self.checkpoints, self.path / "transformers", self.micro_batch_path)
        return self.path.is_dir() and any(
            not entry.name.startswith(unfinished) and entry not in before for entry in self.path.iterdir()
        )

    def create(self, recipe_text: str, launch: Launch) -> None:
        """Make the folder with its recipe and launch record; raises UserError when that cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # first: it makes the folder a run, which the same command takes up wherever this is interrupted
            write_atomically(self.recipe_path, recipe_text)
            self.write_launch(launch)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror or error}; "
                "choose a folder that can be written with --run-dir"
            ) from error

    def write_launch(self, launch: Launch) -> None:
        """Record a start."""
        write_atomically(self.launch_path, json.dumps(_plain(launch.__dict__), indent=2) + "\n")

    def launch(self) -> Launch:
        """Return the recorded start; raises UserError where there is none or it cannot be read."""
        try:
            return bounded.read_record(Launch, self.launch_path)
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a run folder: it has no launch.json") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{self.launch_path} cannot be read: {error}; delete it and start the run again") from error

    def record_effect(self, effect: dict[str, Any]) -> None:
        """Rank 0: record what took effect, as read back from the objects that train; the last start's is kept."""
        write_atomically(self.path / "effect.json", json.dumps(_plain(effect), indent=2) + "\n")

    def effect(self) -> dict[str, Any] | None:
        """Return what took effect in the last start, or None where none has come so far."""
        try:
            found = bounded.read_json(self.path / "effect.json", bounded.SUMMARY)
            if not isinstance(found, dict) or not isinstance(found.get("total_steps"), int | None):
                raise ValueError("it does not say what took effect")
            return found
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise UserError(f"effect.json in {self.path} cannot be read: {error}; delete it") from error

    def record_inputs(self, inputs: dict[str, Any]) -> None:
        """Rank 0: record what this start depends on besides its recipe."""
        write_atomically(self.path / "inputs.json", json.dumps(inputs) + "\n")

    def inputs(self) -> dict[str, Any] | None:
        """Return what the last start depended on; None where that is not known."""
        try:
            found = bounded.read_json(self.path / "inputs.json", bounded.SUMMARY)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    # ----------------------------------------------------------------------------------------------------------------
    # How the run ended

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is complete, or None."""
        return self._marker("FINISHED")

    @property
    def failed(self) -> dict[str, Any] | None:
        """What the last attempt failed of, or None."""
        return self._marker("FAILED.json")

    @property
    def preempted(self) -> dict[str, Any] | None:
        """Where a run that was asked to stop has stopped, or None."""
        return self._marker("PREEMPTED")

    def _marker(self, name: str) -> dict[str, Any] | None:
        try:
            found = bounded.read_json(self.path / name, bounded.SUMMARY)
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
            for key in found.keys() & {"step", "steps", "exported_step", "rank"}:
                if type(found[key]) is not int or not 0 <= found[key] < bounded.MOST_STEPS:
                    raise ValueError(f"{key} is {str(found[key])[:40]}, which is no count")
            return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError) as error:
            return {"error": f"{name} in {self.path} cannot be read: {error}"}

    def mark_finished(self, summary: dict[str, Any]) -> None:
        """Rank 0: the run is complete."""
        write_atomically(self.path / "FINISHED", json.dumps(_plain(summary), indent=2) + "\n")

    def mark_preempted(self, step: int, reason: str) -> None:
        """Rank 0: the run has saved its state and stopped before its end; the same command goes on."""
        write_atomically(self.path / "PREEMPTED", json.dumps({"step": step, "reason": reason}) + "\n")

    def mark_failed(self, record: dict[str, Any]) -> bool:
        """Any rank: record why the attempt failed. The first to say so is kept; returns whether this was it."""
        try:
            handle = os.open(self.path / "FAILED.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_plain(record), file, indent=2)
        return True

    def clear_markers(self, *, requeued: bool = False) -> None:
        """Rank 0, before the others start: forget how the last attempt ended.

        Unless SLURM starts it, `requeued`, who starts the run again has changed their mind about STOP.
        """
        for name in ("FAILED.json", "PREEMPTED", "FINISHED", *([] if requeued else ["STOP"])):
            (self.path / name).unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------------------------
    # Rows of numbers

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl; a last line that a crash cut short is left out."""
        for row in read_rows(self.metrics_path):
            yield _metrics_row(row, self.metrics_path)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, none where there is no file; a last line without its end is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        number = 0
        while (line := file.readline(bounded.ROW + 1)).endswith(b"\n"):
            number += 1
            yield _row(line, f"{path}:{number}")
        if len(line) > bounded.ROW:
            raise UserError(f"{path}:{number + 1} has more than {bounded.ROW:,} bytes; take that line out of the file")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = bounded.parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; take that line out of the file") from error
    return row


def _metrics_row(row: dict[str, Any], path: Path) -> dict[str, Any]:
    step = row.get("step")
    if not isinstance(row.get("event"), str) or type(step) is not int or not 0 <= step < bounded.MOST_STEPS:
        raise UserError(
            f"{path}: a row says event {str(row.get('event'))[:40]!r} and step {str(step)[:40]}; expected a word and a "
            "number of steps; take that line out of the file"
        )
    return row


_BLOCK = 1 << 16


def _lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the lines of a file, the last one first; a last line without its end is left out.

    No more is read than is asked for.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position, carry = file.seek(0, os.SEEK_END), b""
        while position:
            step = min(position, max(_BLOCK, len(carry)))
            position -= step
            data = os.pread(file.fileno(), step, position) + carry
            *parts, torn = data.split(b"\n")
            if not parts:
                carry = data
            else:
                end = position + len(data) - len(torn)
                while len(parts) > 1:
                    line = parts.pop() + b"\n"
                    end -= len(line)
                    yield end, line
                carry = parts[0] + b"\n"
            if len(carry) > bounded.ROW:
                raise UserError(f"{path} has a line of more than {bounded.ROW:,} bytes; take it out of the file")
        if carry.endswith(b"\n"):
            yield 0, carry


def rows_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, the last one first, reading no more than is asked for."""
    for offset, line in _lines_backwards(path):
        yield _row(line, f"{path} at byte {offset}")


def _end_of_rows(path: Path) -> int:
    """Return the bytes of a file up to the end of its last whole line."""
    offset, line = next(_lines_backwards(path), (0, b""))
    return offset + len(line)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines, on disk when this returns; what a crash left of a last line is cut off."""
    with path.open("ab") as file:
        file.truncate(_end_of_rows(path))
        file.write(json.dumps(_plain(row)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def strategy_in_words(strategy: str, replicate: int | str = 1) -> str:
    """Return a strategy with its replicas, where there are several."""
    if replicate == 1:
        return strategy
    return f"{strategy}, " + ("one replica for each machine" if replicate == "auto" else f"{replicate} replicas")


def effect_in_words(effect: dict[str, Any]) -> str:
    """Return what took effect on one line; of values for each rank the least and the greatest."""

    def words(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
            return f"{min(value):,}" if min(value) == max(value) else f"{min(value):,} to {max(value):,}"
        if isinstance(value, dict):
            return " ".join(f"{name} {words(item)}" for name, item in value.items())
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return ", ".join(f"{name.replace('_', ' ')} {words(value)}" for name, value in effect.items())


class MetricsFile:
    """Appends rows to metrics.jsonl, each `(event, step)` once however often a run is killed and resumed.

    Rows are in the order of their steps, so what a resume has to look at is at the end: it reads backwards until all
    rows are of steps before the one that it goes on from, however many there are.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        resume_step: int | None = None,
        finals: Sequence[int] = (),
        counted: object = None,
        fence: Callable[[], None] = lambda: None,
    ):
        """`resume_step`: rows of later steps are taken out, as these are trained again, maybe by a changed recipe.

        `finals`: steps of which a `final` row is known to be there; such a row may be of any step. `counted`: the
        `rows` of what `settled` returned when the state of `resume_step` was saved. `fence` is called before anything
        is written, and raises when this process may write no more.
        """
        self._path, self._fence = run.metrics_path, fence
        self.step = self._floor = 0 if resume_step is None else resume_step
        self._seen = {("final", step) for step in finals}
        self._count: int | None = None
        self.recent: list[dict[str, Any]] = []
        """The last rows: all of `resume_step` and later ones, and some of before."""
        self._take_over()
        self._cut(resume_step)
        self._latest = max((row["step"] for row in self.recent), default=0)
        self._file = run.metrics_path.open("ab")
        self._counted = self._still_there(counted)

    def _still_there(self, counted: object) -> tuple[int, int] | None:
        """Return (rows, their bytes) of those that were there when the state was saved, or None."""
        size = self._path.stat().st_size
        if not size:
            return 0, 0
        if not isinstance(counted, dict):
            return None
        count, end = counted.get("count"), counted.get("bytes")
        if type(count) is not int or type(end) is not int or not 0 < count <= end <= size:
            return None
        with self._path.open("rb") as file:
            return (count, end) if os.pread(file.fileno(), 1, end - 1) == b"\n" else None

    @property
    def kept(self) -> int:
        """How many rows are the same, and in the same order, as when the state was saved; 0 where that is unknown."""
        return self._counted[0] if self._counted is not None else 0

    @property
    def count(self) -> int:
        """The number of rows; counting them reads the file once, of counted rows only what follows."""
        if self._count is None:
            self._count, end = self._counted or (0, 0)
            with self._path.open("rb") as file:
                file.seek(end)
                self._count += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return self._count

    def last(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield the last `number` rows, the oldest first; reads no others."""
        if number <= 0:
            return
        offsets = (offset for offset, _ in islice(_lines_backwards(self._path), number))
        with self._path.open("rb") as file:
            file.seek(0 if number >= self.count else min(offsets))
            while (line := file.readline(bounded.ROW + 1)).endswith(b"\n"):
                yield _metrics_row(_row(line, f"{self._path} before byte {file.tell()}"), self._path)

    @property
    def finals(self) -> list[int]:
        """Steps of `final` rows, as far as they are known."""
        return sorted(step for event, step in self._seen if event == "final")

    def _cut(self, resume_step: int | None) -> None:
        """Take out what a crash left of a last line and rows of later steps, and note which rows are there."""
        kept: list[tuple[int, bytes]] = []
        first: int | None = None
        older = 0
        end = _end_of_rows(self._path)
        for offset, line in _lines_backwards(self._path):
            row = _metrics_row(_row(line, f"{self._path} at byte {offset}"), self._path)
            if resume_step is not None and row["step"] > resume_step:
                first, older = offset, 0
                continue
            if row["step"] >= self._floor or row["event"] == "final":
                self._seen.add((row["event"], row["step"]))
            older = 0 if row["step"] >= self._floor else older + len(line)
            self.recent.append(row)
            kept.append((offset, line))
            # a row may come a little later than others of its step
            if older > _BLOCK:
                break
        self.recent.reverse()
        if not self._path.exists():
            return
        self._fence()
        if first is None:
            os.truncate(self._path, end)
            return
        behind = b"".join(line for offset, line in reversed(kept) if offset > first)
        if behind:  # between the two steps a crash must lose neither
            self._beside.write_bytes(b"%d\n" % first + behind)
            descriptor = os.open(self._beside, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            self._beside.replace(self._moved)
            self._take_over()
        else:
            os.truncate(self._path, first)

    @property
    def _beside(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tail.new")

    @property
    def _moved(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tail")

    def _take_over(self) -> None:
        """Put rows that are to follow others in their place; again where a crash came between."""
        if not self._moved.exists():
            return
        self._fence()
        where, _, rows = self._moved.read_bytes().partition(b"\n")
        with self._path.open("r+b") as file:
            file.truncate(int(where))
            file.seek(0, os.SEEK_END)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self._moved.unlink()

    def append(self, row: dict[str, Any]) -> bool:
        """Write one row, durable against a crash of the process; returns False when it is already there."""
        event, step = key = (row["event"], row["step"])
        if event not in _EACH_TIME and (key in self._seen or (step < self._floor and event in _IN_ORDER)):
            return False
        line = json.dumps(_plain(row)).encode() + b"\n"
        if len(line) > bounded.ROW:
            raise UserError(
                f"the row {event!r} of step {step} has {len(line):,} bytes, and a line may have {bounded.ROW:,}; take "
                "the metric that returns so much out of eval.metrics"
            )
        count = self.count if self._count is not None else None
        self._fence()
        self._file.write(line)
        self._file.flush()
        self._seen.add(key)
        self._latest = max(self._latest, step)
        if count is not None:
            self._count = count + 1
        return True

    def settled(self, step: int) -> dict[str, Any]:
        """Note that the run saves its state after `step`, and return what a start that goes on from there must know.

        Rows of steps before are not thought of any more.
        """
        self._floor = step
        self._seen = {key for key in self._seen if key[1] >= step or key[0] == "final"}
        found: dict[str, Any] = {
            "finals": self.finals,
            "events": sorted(event for event, at in self._seen if at == step),
        }
        # of a run that has gone back, rows of later steps lie before what follows
        if self._latest <= step and not (self._count is None and self._counted is None):
            found["rows"] = {"count": self.count, "bytes": os.fstat(self._file.fileno()).st_size}
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_EACH_TIME = ("update",)
"""Events of a start, of which several may go on from one step."""
_IN_ORDER = ("train", "eval", "checkpoint", "anomaly", "undecodable")
"""Events that a run writes once for a step, and again only where it has gone back."""


def _plain(value: Any) -> Any:
    """Return `value` with what JSON cannot hold as text that every reader takes: NaN, infinities, half characters."""
    if isinstance(value, dict):
        return {in_utf8(key) if isinstance(key, str) else key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return in_utf8(value) if isinstance(value, str) else value


def now() -> float:
    """Seconds since 1970, for people; durations are measured with a monotonic clock."""
    return time.time()
