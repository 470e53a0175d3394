"""The run folder: the only interface between the launcher, the workers and whatever reads a run. Imports no torch.

runs/NAME/
  recipe.yaml        the resolved recipe, each value with where it came from
  launch.json        how it was started: arguments, versions, git commit, and the request that its processes read
  effect.json        what took effect: engine, world, precision, the state that each rank holds
  metrics.jsonl      one row for each event, in the order written
  media/             pictures, tables and texts that rows of metrics.jsonl name (see `distrain.run.media`)
  anomalies.jsonl    steps whose loss or gradient was not as usual, and what was decided about them
  log-rank-0.txt     the log of each rank
  micro_batch.json   what `batch.micro: auto` was found to be (see `distrain.run.micro_batch`)
  checkpoints/       see `distrain.checkpoint`
  export/            the trained model as one file
  transformers/      what lay beside the weights of a transformers model
  FINISHED | PREEMPTED | FAILED.json
  PRUNED             the search that the run is of has stopped it for good
  STOP               a person asks the run to save and end
  inputs.json        what the last attempt depended on besides its recipe (see `distrain.fingerprints`)
  UPDATE             the user allows the next attempt to use what has changed
  attempts.jsonl     one row for each attempt, for how it ended, and for each update
  lease.json         which start may write (see `distrain.run.lease`); .in-use is locked by it for as long as it lives
  heartbeat/         what each rank is doing
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import distrain
from distrain.run.json_files import json_safe, metrics_row, read_rows, write_atomically, write_json
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError


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
    def has_trained(self) -> bool:
        """Whether there is a row of metrics or a checkpoint: until then nothing depends on the recipe."""
        rows = self.metrics_path
        return rows.exists() and (rows.stat().st_size > 0 or any(self.checkpoints.glob("step-*")))

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
        """The log of one rank."""
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
        """One row for each attempt; `event: ended` says how the one before came to its end, and `event: update`
        what an attempt has changed."""
        return self.path / "attempts.jsonl"

    def attempts(self) -> list[dict[str, Any]]:
        """Return the rows of attempts, in order."""
        return [row for row in read_rows(self.attempts_path) if "event" not in row]

    @property
    def update_path(self) -> Path:
        """A file by which the user allows the next attempt to use changed data or code."""
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

    def create(self, recipe_text: str, launch: Launch, *, keeps: bool = False) -> None:
        """Make the folder with its recipe and launch record; raises UserError when that cannot be written.

        `keeps`: whether the recipe that is there is kept for as long as the new one has not taken effect.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if keeps and not self._kept_recipe_path.exists():
                shutil.copyfile(self.recipe_path, self._kept_recipe_path)
            # first: it makes the folder a run, which the same command resumes wherever this is interrupted
            write_atomically(self.recipe_path, recipe_text)
            write_json(self.launch_path, launch.__dict__)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            taken = isinstance(error, FileExistsError) and not self.path.is_dir()
            raise UserError(
                f"cannot write the run folder {self.path}: {'it is a file' if taken else error.strerror or error}; "
                "choose a folder that can be written with --run-dir"
            ) from error

    def take_recipe(self) -> None:
        """Forget the one that was kept: the new one has taken effect."""
        self._kept_recipe_path.unlink(missing_ok=True)

    def put_back_recipe(self) -> None:
        """Put the one back that was kept, if any, and allow nothing else that has changed."""
        if self._kept_recipe_path.exists():
            self._kept_recipe_path.replace(self.recipe_path)
            self.update_path.unlink(missing_ok=True)

    @property
    def _kept_recipe_path(self) -> Path:
        return self.path / ".recipe-before-update.yaml"

    def write_launch(self, launch: Launch) -> None:
        """Record a start."""
        write_json(self.launch_path, launch.__dict__)

    def launch(self) -> Launch:
        """Return the recorded start; raises UserError where there is none or it cannot be read."""
        try:
            return bounded.read_record(Launch, self.launch_path)
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a run folder: it has no launch.json") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{self.launch_path} cannot be read: {error}; delete it and start the run again") from error

    def record_effect(self, effect: dict[str, Any]) -> None:
        """Rank 0: record what took effect, as read back from the objects that train; replaces the record before."""
        write_json(self.path / "effect.json", effect)

    def effect(self) -> dict[str, Any] | None:
        """Return what took effect in the last attempt; None before that."""
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
        """Rank 0: record what this attempt depends on besides its recipe."""
        write_json(self.path / "inputs.json", inputs, indent=None)

    def inputs(self) -> dict[str, Any] | None:
        """Return what the last attempt depended on; None where that is unknown."""
        try:
            found = bounded.read_json(self.path / "inputs.json", bounded.SUMMARY)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    # ----------------------------------------------------------------------------------------------------------------
    # How the run ended

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is complete, or None; its paths are of the folder where that is now."""
        found = self._marker("FINISHED")
        if found is not None and "model" in found:
            found["model"] = str(self.export_path)
        if found is not None and "checkpoint" in found:
            found["checkpoint"] = str(self.checkpoints / Path(str(found["checkpoint"])).name)
        return found

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a run that is complete, or None; raises UserError where its file cannot be read."""
        found = self.finished
        if found is not None and "error" in found:
            raise UserError(
                f"{found['error']}; delete it and start the run again, which resumes from the newest checkpoint and "
                "writes it anew"
            )
        return found

    @property
    def failed(self) -> dict[str, Any] | None:
        """What the last attempt failed of, or None."""
        return self._marker("FAILED.json")

    @property
    def preempted(self) -> dict[str, Any] | None:
        """Where a run that was asked to stop has stopped, or None."""
        return self._marker("PREEMPTED")

    @property
    def pruned(self) -> int | None:
        """The step of the evaluation at which its search stopped the run for good, or None."""
        found = self._marker("PRUNED")
        return None if found is None else int(found.get("step", 0))

    def mark_pruned(self, step: int) -> None:
        """The run's search has stopped it, as it was worse than the others at the evaluation of this step."""
        write_json(self.path / "PRUNED", {"step": step}, indent=None)

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
        write_json(self.path / "FINISHED", summary)

    def mark_preempted(self, step: int, reason: str) -> None:
        """Rank 0: the run has saved its state and stopped before its end; the same command resumes it."""
        write_json(self.path / "PREEMPTED", {"step": step, "reason": reason}, indent=None)

    def mark_failed(self, record: dict[str, Any]) -> bool:
        """Any rank: record why the attempt failed. The first record is kept; returns whether this was it."""
        try:
            handle = os.open(self.path / "FAILED.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(json_safe(record), file, indent=2)
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
        """Yield the rows of metrics.jsonl; a last line that a crash cut short is skipped."""
        for row in read_rows(self.metrics_path):
            yield metrics_row(row, self.metrics_path)


def describe_effect(effect: dict[str, Any]) -> str:
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
