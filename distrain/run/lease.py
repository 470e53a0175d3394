"""Who may write into a run folder: one attempt at a time, and of a job that runs twice the newer one.

A lock shows that another process is at work, but not every file system of a cluster has locks that reach other
machines, and after a node has failed its processes may live on beside those of the requeued job. So each attempt also
leaves its token in the folder, and reads it again before each thing that it publishes: an attempt whose token was
replaced publishes nothing more. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from distrain.run.attempts import how_it_ended
from distrain.run.folder import RunDir
from distrain.run.json_files import append_row, write_json
from distrain.system.bounded_json import as_record, parse_json, read_bounded
from distrain.system.errors import UserError
from distrain.system.job_environment import JobEnvironment, job_environment

RESTARTS = 3
"""How often a job may start again from the same step; DISTRAIN_MAX_RESTARTS replaces it."""

_FRESH_S, _WATCH_S = 60.0, 15.0
"""A heartbeat that is younger is watched for so long: a process that lives writes it every few seconds."""

_SEEN_S = 10.0
"""How long a file system that machines share may take to show a file to the others."""


class Replaced(UserError):
    """This attempt at a run was replaced by another, and may write nothing more."""


@dataclass(frozen=True)
class Holder:
    """The attempt at a run that may write."""

    token: str
    """Unlike that of any other attempt."""
    host: str
    pid: int
    job: str | None
    """The scheduler's job."""
    restart: int
    """How often the scheduler has requeued the job."""
    time: float
    """Seconds since 1970."""

    @classmethod
    def of_this_process(cls, job: JobEnvironment | None = None) -> Holder:
        """Describe an attempt of this process, now; `job` is its job, by default that of the environment."""
        job = job or job_environment()
        host = socket.gethostname()
        token = f"{job.job or host}.{job.restart}.{os.getpid()}.{secrets.token_hex(4)}"
        return cls(token, host, os.getpid(), job.job, job.restart, time.time())

    def replaces(self, other: Holder) -> bool:
        """Whether this is a later attempt of the same job, which is requeued once the other is given up."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Lease:
    """The right to write into a run, as long as no other attempt has taken it."""

    def __init__(self, run: RunDir, holder: Holder, lock: IO[str] | None = None):
        self.run, self.holder, self._lock, self._path = run, holder, lock, run.path / _FILE
        self._content: bytes | None = None
        """Of the file when it named this attempt: the same bytes name it again, and a row is written quickly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, (self.run, self.holder)  # the lock stays with the process

    def mine(self) -> bool:
        """Whether this attempt is still the one that may write."""
        content = _content(self._path)
        if content is not None and content != self._content:
            found = _parsed(content)
            if found is None or found.token != self.holder.token:
                return False
            self._content = content
        return content is not None

    def check(self) -> None:
        """Raise Replaced unless this attempt is still the one that may write."""
        if not self.mine():
            found = _holder(self.run)
            by = f"by {found}" if found is not None else "by one that has ended"
            raise Replaced(
                f"this attempt at {self.run.path} ({self.holder}) was replaced {by}; it ends and writes nothing more"
            )

    def check_seen(self, rank: int) -> None:
        """Raise UserError when this rank does not see what rank 0 has written into the run's folder."""
        until = time.monotonic() + _SEEN_S
        while not self.mine():
            if time.monotonic() > until:
                raise UserError(
                    f"rank {rank} on {socket.gethostname()} does not see what rank 0 on {self.holder.host} has written "
                    f"into {self.run.path}; all ranks must see the same run folder, on a file system they share"
                )
            time.sleep(0.05)

    def release(self, *, clean: bool) -> None:
        """Rank 0: let others take the run. After a failure the token stays, for what other ranks have to report."""
        if clean and self.mine():
            self._path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()


_FILE = "lease.json"


def _holder(run: RunDir) -> Holder | None:
    content = _content(run.path / _FILE)
    return None if content is None else _parsed(content)


def _content(path: Path) -> bytes | None:
    try:
        return read_bounded(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # no file, or one that is far too large: not this attempt's, at any rate
        return None


def _parsed(content: bytes) -> Holder | None:
    try:
        return as_record(Holder, parse_json(content))
    except ValueError:  # of another version, or damaged: not this attempt's, at any rate
        return None


def check_free(run: RunDir, holder: Holder) -> None:
    """Raise UserError, naming who is at work, when `holder` may not take the run."""
    lock = _lock(run, holder)
    if lock is not None:
        lock.close()


def take_lease(
    run: RunDir, holder: Holder, *, step: int, processes: int, strategy: str, restarts: int | None = None
) -> Lease:
    """Rank 0: take the run for this attempt, which resumes from `step`, and note that it began.

    Raises UserError when another attempt is at work, and when this job was requeued `restarts` times without
    progress.
    """
    lock = _lock(run, holder)
    try:
        write_json(run.path / _FILE, asdict(holder), indent=None)
        earlier = run.attempts()
        if earlier:
            # what is damaged in metrics.jsonl is an error where its rows are taken up; here their times are unknown
            with suppress(UserError, KeyError, TypeError, ValueError):
                append_row(run.attempts_path, how_it_ended(run, earlier[-1]))
        row: dict[str, Any] = {
            **asdict(holder),
            "step": step,
            "processes": processes,
            "strategy": strategy,
        }
        append_row(run.attempts_path, row)
        _check_progress(run, holder, earlier, step, restarts)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return Lease(run, holder, lock)


def _check_progress(
    run: RunDir, holder: Holder, earlier: list[dict[str, Any]], step: int, restarts: int | None
) -> None:
    if holder.job is None or holder.restart == 0:
        return  # a person has started it, who may try as often as they like
    limit = _asked_restarts() if restarts is None else restarts
    in_vain = 0
    for row in reversed(earlier):
        if row["job"] != holder.job or row["step"] != step:
            break
        in_vain += 1
    if in_vain > limit:
        message = (
            f"{run.path} was started {in_vain} times from step {step} by job {holder.job} without "
            f"progress; it is not started again. What went wrong is in {run.path}/log-rank-*.txt; mend it "
            "and submit the run again"
        )
        run.clear_markers(requeued=True)
        # for the batch script, which would queue the job again
        record = {"rank": 0, "host": holder.host, "error": "UserError", "message": message, "restart": False}
        run.mark_failed({**record, "traceback": None})
        raise UserError(message)


def _asked_restarts() -> int:
    text = os.environ.get("DISTRAIN_MAX_RESTARTS", str(RESTARTS))
    if not text.isdecimal():
        raise UserError(f"DISTRAIN_MAX_RESTARTS is {text!r}, expected a whole number such as {RESTARTS}")
    return int(text)


def _lock(run: RunDir, holder: Holder) -> IO[str] | None:
    """Lock the run for as long as the returned file is open; None where locks are of no use."""
    other = _holder(run)
    file = (run.path / ".in-use").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            who = file.read().strip()
            file.close()
            if other is not None and holder.replaces(other):
                return None  # of processes that the scheduler has given up, and which may not have ended
            raise _in_use(run, who or str(other or "another process")) from None
        file.close()
        locked = None
    else:
        locked = file
    if other is not None and other.host != holder.host and not holder.replaces(other) and _beats(run):
        if locked is not None:
            locked.close()
        raise _in_use(run, str(other))
    if locked is not None:
        locked.truncate(0)
        locked.write(f"{holder}\n")
        locked.flush()
    return locked


def _in_use(run: RunDir, who: str) -> UserError:
    return UserError(
        f"{run.path} is in use by {who}; wait for that run to end, stop it (distrain stop {run.path}), or choose "
        "another --run-dir"
    )


def _beats(run: RunDir) -> bool:
    """Whether rank 0 of an attempt on another machine, whose locks may not reach this one, writes its heartbeat."""
    path = run.heartbeat_path(0)
    probe = run.path / f".now.{socket.gethostname()}.{os.getpid()}"
    try:
        before = path.stat().st_mtime
        probe.touch()  # the time of the file system, which may not be that of this machine
        fresh = probe.stat().st_mtime - before < _FRESH_S
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    until = time.monotonic() + _WATCH_S
    while fresh and time.monotonic() < until:
        time.sleep(0.5)
        try:
            if path.stat().st_mtime != before:
                return True
        except OSError:
            return False
    return False
