"""The job whose nodes are examined: queued as `submit` queues one, or a step of the allocation that this process is in.

Either way the same batch script is run, which prepares nodes as that of a run does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import distrain
from distrain.config import UserError
from distrain.doctor.findings import Finding, Level, Report, error
from distrain.doctor.nodes.comparing import compare, on
from distrain.doctor.nodes.judging import Judged
from distrain.doctor.nodes.lines import Told
from distrain.launchers.slurm.job_environment import allocated_nodes
from distrain.launchers.slurm.plan import Plan
from distrain.launchers.slurm.queue import cancel, find_command, jobs_of, sbatch
from distrain.launchers.slurm.rendering import log_pattern, quoted, render_sbatch
from distrain.launchers.slurm.sites import Site, load_site
from distrain.launchers.slurm.snapshot import own_package
from distrain.launchers.slurm.submitting import Wanted, job_plan
from distrain.system.environment import tasks_of
from distrain.system.numbers import counted

LIMIT_S = 60.0
"""How long ranks wait for the next one to come, by default. PyTorch is imported meanwhile, from a slow disk perhaps."""
_REST_S = 600.0
"""How long all else may take."""
_GRACE_S = 5.0
"""How long nodes that have said nothing are waited for when all others are done."""
_LOG_S = 10.0
"""How long a shared folder may take to show the log of a job that has ended."""

_AFTER_RUN = "# the run\n"
"""What begins the part of slurm/train.sbatch that is a run's own."""

_SCRIPT = r"""
# what is wrong on each node and between them

nodes=$nodes_asked
names=$(scontrol show hostnames | head -n "$nodes" | paste -sd, -)
node_script=-Pmdistrain.doctor.nodes # as of a script, the folder here is not where Python looks for modules
# each node to its end, whatever has become of the others, and a number before each line
step_options+=(--label --kill-on-bad-exit=0 --wait=0)
node_options=(--names "$names" --processes "$processes" --cpus "$cpus" "${options[@]}")
if ((nodes > 1)); then node_options+=(--address "$address" --port "$(free_port 0)"); fi
if [[ $interface ]]; then node_options+=(--interface "$interface"); fi
if [[ $scratch ]]; then node_options+=(--scratch "$scratch"); fi
printf 'distrain-doctor-nodes %s %s\n' "$names" "$processes ${address:-127.0.0.1}"
on_nodes "$nodes" "${node_options[@]}" -- "${looked_at[@]}" 2>&1 &
step=$!
trap 'kill "$step" 2>/dev/null' TERM INT USR1
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
exit 0
"""


@dataclass(frozen=True)
class Request:
    """What a person asks for."""

    wanted: Wanted
    folder: Path
    """The folder that nodes are to share, absolute and there."""
    arguments: Sequence[str] = ()
    """What each node is to look at besides itself: a recipe or a run, with values that replace the recipe's."""
    run_dir: str | None = None
    limit_s: float = LIMIT_S
    """How long ranks wait for the next one to come."""
    say: Callable[[str], None] = print
    """Is called with what happens meanwhile, a line at a time."""


def examine_nodes(asked: Request) -> Report:
    """Return what is found on the nodes of a job, and between them. Raises UserError where there can be no job."""
    began = time.monotonic()
    here = allocated_nodes(os.environ)
    tasks = tasks_of("srun", os.environ)
    if here is not None and tasks > 1:
        raise UserError(
            f"srun has started this {tasks} times; start it once, without srun: it starts on each node itself"
        )
    if here is not None and asked.wanted.nodes > here:
        raise UserError(
            f"--nodes {asked.wanted.nodes}, and this allocation has {here}; ask salloc or sbatch for more, or start "
            "this outside of it, where it queues a job"
        )
    with _job_folder(asked.folder) as folder:
        plan = _plan(asked, folder)
        script = folder / "submit" / "doctor.sbatch"
        script.parent.mkdir()  # where SLURM writes what the job prints
        script.write_text(render(plan, asked), encoding="utf-8")
        told = _in_allocation(script, asked) if here is not None else _queued(script, plan, asked)
    return Report(tuple(judge(told, str(asked.folder))), time.monotonic() - began)


@contextmanager
def _job_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for the job's files, and remove it with the block."""
    try:
        made = Path(tempfile.mkdtemp(prefix="doctor-", dir=folder))
    except OSError as problem:
        raise UserError(f"cannot write into {folder}: {problem.strerror}; choose another --run-dir") from problem
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _plan(asked: Request, folder: Path) -> Plan:
    wanted = asked.wanted
    site = load_site(wanted.site) if wanted.site is not None else Site()
    if wanted.time is None and site.time is None:
        wanted = replace(wanted, time="15")
    # where this is a checkout, the Python of the site need not have it installed
    packages = [str(Path(distrain.__file__).parents[1])] if own_package() is not None else []
    return job_plan(
        wanted, site, folder, [folder], name="distrain-doctor", strategy="ddp", offload="none", replicate="1",
        processes=wanted.processes_per_node or wanted.gpus_per_node or 1, copies_package=False, packages=packages,
    )  # fmt: skip


def render(plan: Plan, asked: Request) -> str:
    """Return the script of the job: the nodes are prepared as for a run, and then examined. Pure but for the plan's."""
    text, marker, _ = render_sbatch(plan).partition(_AFTER_RUN)
    assert marker
    lines = [line for line in text.splitlines() if not line.startswith(("#SBATCH --requeue", "#SBATCH --signal"))]
    where = ["--run-dir", asked.run_dir] if asked.run_dir is not None else []
    options = [
        "--gpus",
        str(plan.gpus_per_node),
        "--folder",
        str(asked.folder),
        "--limit",
        f"{asked.limit_s:g}",
        *where,
    ]
    values: dict[str, str | list[str]] = {
        "nodes_asked": str(plan.nodes),
        "options": options,
        "looked_at": list(asked.arguments),
    }
    return "\n".join([*lines, *(f"{name}={quoted(value)}" for name, value in values.items()), _SCRIPT])


class _Waiting:
    """Takes up what a job prints, and says when there is nothing more to wait for."""

    def __init__(self, asked: Request):
        self.told, self.asked = Told(), asked
        self._last = self._began = time.monotonic()
        self._said = 0

    def read(self, text: str) -> None:
        """Take up whole lines."""
        if text:
            self.told.read(text.splitlines())
            self._last = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether all that have begun are done, and the others do not come; or all of it takes far too long."""
        now = time.monotonic()
        begun, done = self.told.by_node("facts"), self.told.by_node("done")
        if begun and begun.keys() <= done.keys() and now - self._last > _GRACE_S:
            return True
        return bool(begun) and now - self._began > 4 * self.asked.limit_s + _REST_S


def _in_allocation(script: Path, asked: Request) -> Told:
    """Run the script here, which starts a step on the nodes of the allocation."""
    if find_command("srun") is None:
        raise UserError("the environment names a SLURM job, and there is no srun here; look at PATH")
    waiting = _Waiting(asked)
    process = subprocess.Popen(
        ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    rest = b""
    try:
        while True:
            new = process.stdout.read() or b""
            *whole, rest = (rest + new).split(b"\n")
            waiting.read("\n".join(line.decode(errors="replace") for line in whole))
            if not new and (process.poll() is not None or waiting.over):
                break
            time.sleep(0.1)
    finally:
        _end(process)
    return waiting.told


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script with its srun, which has SLURM end the processes on the nodes."""
    for number, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return


def _queued(script: Path, plan: Plan, asked: Request) -> Told:
    """Queue the script and wait until its job has ended; it is cancelled when this process is."""
    number = sbatch(script)
    log = Path(log_pattern(plan).replace("%j", number))
    asked.say(f"job {number}: {counted(plan.nodes, 'node')}, for {plan.time} at most")
    waiting, state, at = _Waiting(asked), "", 0
    try:
        while True:
            job = next(iter((jobs_of([number]) or {}).values()), None)
            if job is not None and job.state != state:
                state = job.state
                asked.say(f"job {number}: {state}" + (f" ({job.reason})" if job.reason else ""))
            ended = job is None or not job.alive
            if ended:
                _wait_for(log)
            with suppress(OSError), log.open("rb") as file:
                file.seek(at)
                whole = file.read().rpartition(b"\n")
                at += len(whole[0]) + len(whole[1])
                waiting.read(whole[0].decode(errors="replace"))
            if ended or waiting.over:
                break
            time.sleep(1.0)
    finally:
        with suppress(UserError):
            if (job := next(iter((jobs_of([number]) or {}).values()), None)) is not None and job.alive:
                cancel(number)
    if not log.exists():
        waiting.told.read([f"job {number} has ended ({state}), and its log {log} is not seen here"])
    return waiting.told


def _wait_for(log: Path) -> None:
    """Give a shared folder some time to show the log of a job that has ended."""
    until = time.monotonic() + _LOG_S
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(0.5)  # for what was written last


def judge(told: Told, folder: str) -> list[Finding]:
    """Return all findings of what nodes have told, those that concern nodes as a whole first. Pure."""
    names, processes, address = _header(told)
    facts = told.by_node("facts")
    if not names or not facts:
        said = list(told.words.get(None, ())) + [word for key, words in told.words.items() if key is not None
                                                 for word in words]  # fmt: skip
        lines = [line for line in said if "error" in line.lower()] or said
        means = "a run of the same site and options would end in the same way"
        what = f"no node has begun: {' | '.join(lines[-3:]) or 'the job has printed nothing'}"
        return on(["job"], "nodes", error(what, means, "mend what it says, then ask again"))
    judged = Judged(names, processes, address, _port(told))
    found = _who_came(told, names, processes)
    versions = {node: each["versions"] for node, each in told.by_node("torch").items() if not each["problem"]}
    towards = {node: _towards(each, told, processes, node) for node, each in facts.items()}
    known = {
        names[node]: each | {"versions": each["versions"] | versions.get(node, {}), "towards": towards[node]}
        for node, each in sorted(facts.items())
    }
    found += compare(known, address)
    for node, each in told.by_node("environment").items():
        means = "a run ends on this node at its start"
        found += on([names[node]], "same variables", error(each, means, "see what it says"))
    found += judged.reach(told.by_rank("reach"), next(iter(told.by_rank("port").values()), None))
    if links := told.by_rank("links"):
        found += judged.links(links)
    found += judged.clocks(told.by_rank("clock"))
    mounts = {names[node]: each["mount"] for node, each in facts.items()}
    found += judged.folder(told.by_rank("folder"), folder, mounts)
    found += judged.products(told.by_rank("product"))
    found += judged.collectives(told.by_rank("collectives"))
    found += judged.network(told.by_rank("pairs"))
    own = sorted(told.of("finding"), key=lambda each: each["node"])
    return found + [replace(Finding.from_json(each["value"]), host=names[each["node"]]) for each in own]


def _header(told: Told) -> tuple[list[str], int, str]:
    for line in told.words.get(None, ()):
        if line.startswith("distrain-doctor-nodes "):
            names, processes, address = line.split(" ")[1:4]
            return names.split(","), _processes(told, processes), address
    return [], 1, ""


def _processes(told: Told, asked: str) -> int:
    return (
        int(asked) if asked.isdecimal() else max(each["asked"]["processes"] for each in told.by_node("facts").values())
    )


def _port(told: Told) -> int:
    return next((each["port"] for each in told.by_node("facts").values() if each.get("port")), 0)


def _towards(facts: Mapping[str, object], told: Told, processes: int, node: int) -> str | None:
    """Return the interface that a node reaches the first one over; None: not known."""
    own = (told.by_rank("reach").get(node * processes) or {}).get("own")
    interfaces = facts["interfaces"]
    assert isinstance(interfaces, Mapping)
    return next((name for name, each in interfaces.items() if own in each["addresses"]), None) if node else None


def _who_came(told: Told, names: Sequence[str], processes: int) -> list[Finding]:
    """Which nodes and ranks did not come, or not to the end."""
    check, found = "nodes", []
    facts, done, torch = told.by_node("facts"), told.by_node("done"), told.by_node("torch")
    came = ", ".join(names[node] for node in sorted(facts))
    for node, name in enumerate(names):
        words = list(told.words.get(node, ()))
        last = f": {' | '.join(words[-2:])}" if words else ""
        if node not in facts:
            means = "a run would wait for its ranks until it gives up"
            do = "start the same Python there by hand (srun --nodelist); look at its file systems and at dmesg"
            found += on([name], check, error(f"did not begin{last}; there came {came}", means, do))
        elif (problem := (torch.get(node) or {}).get("problem")) is not None:
            means = "no run starts there"
            found += on([name], check, error(f"cannot import torch: {problem}", means, "install it there again"))
        elif node not in done:
            last_kind = next((each["kind"] for each in reversed(told.messages) if each["node"] == node), "")
            means = "a run would hang with this node"
            do = "see what its processes wait for, and its dmesg"
            found += on([name], check, error(f"began and did not end (after {last_kind}){last}", means, do))
    explained = {each.host for each in found} | {
        names[rank // processes] for rank, each in told.by_rank("reach").items() if each["problem"]
    }
    for kind, how in (("failed", "{}"), ("died", "ended with exit code {}")):
        for rank, value in told.by_rank(kind).items():
            means = "a rank of a run would end so as well"
            what = f"a rank failed: {how.format(value)}"
            each = on([names[rank // processes]], check, error(what, means, "mend what it says"))
            found += [replace(one, rank=rank) for one in each]
    arrived = told.by_rank("arrived").get(0)
    if arrived is not None:
        late = [rank for rank in range(len(names) * processes) if rank not in arrived]
        for name in dict.fromkeys(names[rank // processes] for rank in late):
            if name not in explained:
                means = "a run would wait for them, and give up"
                which = ", ".join(str(rank) for rank in late if names[rank // processes] == name)
                found += on([name], check, error(f"rank {which} did not come in time", means, "see what it waits for"))
    for value in told.by_rank("absent").values():
        for name in dict.fromkeys(names[rank // processes] for rank in value["ranks"]):
            if name not in {each.host for each in found}:
                means = "a run would hang with it"
                what = f"did not come to the step '{value['step']}'"
                found += on([name], check, error(what, means, "see what its processes wait for"))
    if not found:
        found = on(names, check, Finding(Level.ok, f"all {len(names) * processes} ranks came, and ended well"))
    return found
