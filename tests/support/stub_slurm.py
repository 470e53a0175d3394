"""SLURM's commands, for tests of what distrain and its batch script do with them on one machine.

`StubSlurm` is what a batch script sees: srun starts one process for each node and passes signals on as SLURM's does;
scontrol knows the nodes, the job's state and requeues; what they were told is noted. `StubQueue` is what a person sees:
sbatch takes every script, squeue shows the jobs that a test puts there, scancel cancels them. The real ones are in
tests/cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from distrain.launchers.launcher import Job

_SRUN = """#!{python}
import json, os, signal, subprocess, sys

arguments, options = sys.argv[1:], {{}}
while arguments and arguments[0].startswith("--"):
    name, _, value = arguments.pop(0)[2:].partition("=")
    options[name] = value
with open({folder!r} + "/srun.jsonl", "a") as file:
    file.write(json.dumps({{"options": options, "command": arguments, "environment": dict(os.environ)}}) + "\\n")
if os.path.exists({folder!r} + "/srun-dry"):
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
children = [
    subprocess.Popen(
        arguments,
        env={{**os.environ, "SLURM_NODEID": str(node), "SLURM_CPUS_PER_TASK": options["cpus-per-task"]}},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]),
    )
    for node in range(int(options["nodes"]))
]

def send(number):
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, number)

def end(number, frame):
    send(signal.SIGKILL)

signal.signal(signal.SIGTERM, end)
while any(child.poll() is None for child in children):
    if signal.sigtimedwait([signal.SIGUSR1], 0.05):
        send(signal.SIGUSR1)
    if any(child.poll() for child in children):
        send(signal.SIGKILL)
sys.exit(max(child.wait() if child.wait() >= 0 else 128 - child.wait() for child in children))
"""

_SCONTROL = """#!/bin/bash
printf '%s\\n' "$*" >> {folder}/scontrol.log
case "$1 $2" in
  "show hostnames") printf 'node%s\\n' 0 1 2 3 ;;
  "show node") printf 'NodeName=%s Arch=x86_64\\n   NodeAddr=127.0.0.1 NodeHostName=%s Version=22.05\\n' "$3" "$3" ;;
  "show job") printf 'JobId=%s JobName=x\\n   JobState=%s Reason=None\\n   Requeue=1 Restarts=%s BatchFlag=1\\n' "$3" \\
    "$(cat {folder}/state)" "${{SLURM_RESTART_COUNT:-0}}" ;;
  requeue*) [[ ! -e {folder}/no-requeue ]] ;;
  *) exit 1 ;;
esac
"""


@dataclass
class StubSlurm:
    """A folder with the commands, and jobs that are run there."""

    folder: Path
    nodes: int = 2
    variables: dict[str, str] = field(default_factory=dict)
    """Further environment of jobs."""

    def __post_init__(self) -> None:
        self.commands = self.folder / "bin"
        self.commands.mkdir(parents=True)
        self.set_state("RUNNING")
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (self.commands / name).write_text(text.format(python=sys.executable, folder=str(self.folder)))
            (self.commands / name).chmod(0o755)

    def set_state(self, state: str) -> None:
        """Say what scontrol shows of the job."""
        (self.folder / "state").write_text(state)

    def set_dry(self) -> None:
        """Have srun note what it was told, and start nothing."""
        (self.folder / "srun-dry").touch()

    def environment(self, job: int = 17, restarts: int = 0, task: int | None = None) -> dict[str, str]:
        """Return the environment that SLURM gives to a batch script."""
        given = {
            "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_JOB_NODELIST": f"node[0-{self.nodes - 1}]",
            "SLURM_JOB_CPUS_PER_NODE": f"2(x{self.nodes})",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURMD_NODENAME": "node0",
            "OMP_NUM_THREADS": "1",
        }
        if restarts:
            given["SLURM_RESTART_COUNT"] = str(restarts)
        if task is not None:
            given |= {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(task)}
        return given | self.variables

    def start(self, script: Path, *arguments: str, **about: int) -> subprocess.Popen[str]:
        """Start a batch script as slurmd does."""
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env=self.environment(**about),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: Path, *arguments: str, timeout_s: float = 120, **about: int) -> tuple[int, str]:
        """Run a batch script to its end; returns its exit status and what it printed."""
        process = self.start(script, *arguments, **about)
        try:
            out, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, out

    def steps(self) -> list[dict[str, object]]:
        """Return what srun was told each time: options, command, environment."""
        file = self.folder / "srun.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def requeued(self) -> list[str]:
        """Return the jobs that the script has queued again."""
        file = self.folder / "scontrol.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith("requeue")]


_COMMANDS = {
    "sbatch": 'number=$(cat {folder}/next); echo $((number + 1)) > {folder}/next; echo "$number"',
    "squeue": "if [ -e {folder}/refusal ]; then cat {folder}/refusal >&2; exit 1; fi; cat {folder}/queue",
    "scancel": 'sed -i "s/^$1|[A-Z]*|/$1|CANCELLED|/" {folder}/queue',
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
}


class StubQueue(MutableMapping[str, Job]):
    """SLURM's queue as jobs by their numbers, with the commands that show and change it in `folder`/bin."""

    def __init__(self, folder: Path):
        self._queue, self._refusal = folder / "queue", folder / "refusal"
        self.commands = folder / "bin"
        self.commands.mkdir(parents=True)
        self._queue.touch()
        (folder / "next").write_text("100\n")
        for name, text in _COMMANDS.items():
            (self.commands / name).write_text(f"#!/bin/sh\n{text.format(folder=folder)}\n")
            (self.commands / name).chmod(0o755)

    def refuse(self, error: str) -> None:
        """Have squeue fail with this text."""
        self._refusal.write_text(error)

    def _read(self) -> dict[str, Job]:
        jobs = (Job(*line.split("|")) for line in self._queue.read_text().splitlines())
        return {job.id: job for job in jobs}

    def _write(self, jobs: dict[str, Job]) -> None:
        lines = (f"{job.id}|{job.state}|{job.reason}|{job.elapsed}|{job.left}\n" for job in jobs.values())
        self._queue.write_text("".join(lines))

    def __getitem__(self, number: str) -> Job:
        return self._read()[number]

    def __setitem__(self, number: str, job: Job) -> None:
        self._write(self._read() | {number: job})

    def __delitem__(self, number: str) -> None:
        jobs = self._read()
        del jobs[number]
        self._write(jobs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())
