"""A real SLURM cluster on this machine: a login node and four compute nodes, for tests.

Each node is a set of Linux namespaces: its own processes, host name, network and /dev/shm. The nodes hang on a bridge
in the login node's network, know each other by address alone (their names do not resolve), and share the file system.
So a node can be switched off, cut from the network, or lose its slurmd, as a machine can. Nothing of it is seen on the
machine's own network, and everything ends with the process that started it: the login node's init is killed by the
kernel, and with it whatever ever ran on any node. `python tests/cluster/slurm_cluster.py` opens a shell on the login
node.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NODES = 4
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
INSTALL = "sh scripts/install-slurm.sh"

_SUBNET = "10.77.0"
_INIT = "trap : TERM INT HUP; while :; do sleep 3600 & wait; done"  # waits for whatever is orphaned, as an init must

_CONF = """
ClusterName=distrain
SlurmctldHost=login({subnet}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldDebug=verbose
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile=/run/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout={node_timeout_s}
MessageTimeout=3
InactiveLimit=0
MinJobAge=600
MaxArraySize=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class CannotRun(Exception):
    """Why this machine cannot run the cluster, and what would let it."""


def why_not() -> str | None:
    """Say what keeps this machine from running the cluster, or None."""
    if sys.platform != "linux":
        return f"the cluster is made of Linux namespaces, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "only root can make namespaces of processes, networks and mounts"
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}; `{INSTALL}` installs SLURM from Debian's packages"
    tried = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--net", "--uts", "--ipc", "true"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.strip()}"


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    """Return what `condition` returns as soon as that is true; raises AssertionError naming `what` when it is late.

    `timeout_s` is for a machine that does nothing else; one that does gets three times that.
    """
    timeout_s *= 3
    until = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < until, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.1)


@dataclass(frozen=True)
class Process:
    """A process that runs in the cluster."""

    pid: int
    """Its number as this machine sees it."""
    node: str
    command: str

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; one that has ended is none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Machine:
    """One node: namespaces held by an init process of its own."""

    def __init__(self, cluster: Cluster, name: str, address: str):
        self.cluster = cluster
        self.name = name
        self.address = address
        self._unshare: subprocess.Popen[bytes] | None = None
        self.init = 0
        self.slurmd: subprocess.Popen[bytes] | None = None

    def enter(self, *command: str) -> list[str]:
        """Return `command` as one that runs on this node."""
        return ["nsenter", "--target", str(self.init), "--all", "--wdns=/", "--", *command]

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Run a command on this node; returns what it printed."""
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)} on {self.name}: {done.stderr}{done.stdout}"
        return done.stdout

    def boot(self) -> None:
        """Make the namespaces, and the mounts in them."""
        within = self.cluster.login.enter() if self is not self.cluster.login else []
        self._unshare = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *within,
                *("unshare", "--fork", "--kill-child", "--pid", "--mount", "--mount-proc", "--net", "--uts", "--ipc"),
                *("bash", "-c", _INIT),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"]},
        )
        self.init = wait_until(self._find_init, f"the namespaces of {self.name}", 10)
        self.run("hostname", self.name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")

    def _find_init(self) -> int | None:
        # below unshare, which setpriv has become; nsenter has one child between
        assert self._unshare is not None
        pid = self._unshare.pid
        while True:
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                inside = _status(pid, "NSpid").split()
            except OSError:
                return None
            if len(inside) > 1 and inside[-1] == "1" and "trap" in _command(pid):
                return pid
            if not children:
                return None
            pid = int(children[0])

    def connect(self) -> None:
        """Join this node to the bridge."""
        bridge = ["nsenter", f"--net=/proc/{self.cluster.login.init}/ns/net"]
        _run(*bridge, "ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        _run(*bridge, "ip", "link", "set", self.name, "master", "br0", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def cut_off(self) -> None:
        """Take this node from the network; what runs on it goes on."""
        _run("nsenter", f"--net=/proc/{self.cluster.login.init}/ns/net", "ip", "link", "set", self.name, "down")

    def reconnect(self) -> None:
        """Undo `cut_off`."""
        _run("nsenter", f"--net=/proc/{self.cluster.login.init}/ns/net", "ip", "link", "set", self.name, "up")

    def switch_off(self) -> None:
        """Kill all that runs on this node, at once."""
        if self.init:
            with suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
        if self._unshare is not None:
            self._unshare.kill()
            self._unshare.wait()
        self._unshare, self.init, self.slurmd = None, 0, None

    def switch_on(self) -> None:
        """Boot this node, with its slurmd."""
        self.boot()
        self.connect()
        self.start_slurmd()

    def start_slurmd(self) -> None:
        """Start this node's daemon."""
        self.slurmd = self.cluster.daemon(self, "slurmd", "-D", "-N", self.name)

    def kill_slurmd(self) -> None:
        """Kill this node's daemon; the steps that it started go on."""
        for process in self.processes():
            if re.match(r"\S*slurmd\b", process.command):
                process.kill()
        if self.slurmd is not None:
            self.slurmd.wait()
        self.slurmd = None

    def healthy(self) -> bool:
        """Whether this node is on, connected and has a daemon."""
        return (
            bool(self.init)
            and Path(f"/proc/{self.init}").exists()
            and (self.slurmd is not None and self.slurmd.poll() is None)
        )

    def processes(self) -> list[Process]:
        """Return all that runs on this node, its init apart."""
        if not self.init:
            return []
        try:
            namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        except OSError:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.init:
                continue
            try:
                if os.readlink(entry / "ns" / "pid") != namespace or _status(int(entry.name), "State")[:1] in "ZX":
                    continue
                found.append(Process(int(entry.name), self.name, _command(int(entry.name))))
            except OSError:
                continue  # it has ended
        return [process for process in found if process.command != "sleep 3600"]


class Cluster:
    """The login node with SLURM's controller, and the compute nodes n1 to n4."""

    def __init__(self, folder: Path, *, grace_s: int = 20, kill_wait_s: int = 5, node_timeout_s: int = 6):
        """`folder` is where all of its files go; the rest are SLURM's GraceTime, KillWait and SlurmdTimeout."""
        self.folder = folder
        self._settings = {"grace_s": grace_s, "kill_wait_s": kill_wait_s, "node_timeout_s": node_timeout_s}
        self.login = Machine(self, "login", f"{_SUBNET}.254")
        self.nodes = [Machine(self, f"n{index}", f"{_SUBNET}.{index}") for index in range(1, NODES + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def node(self, name: str) -> Machine:
        """Return a compute node by its name."""
        return next(node for node in self.nodes if node.name == name)

    def start(self) -> None:
        """Start everything and wait for all nodes; raises CannotRun with the daemons' own words."""
        if reason := why_not():
            raise CannotRun(reason)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        etc = self.folder / "etc"
        for path in (etc, self.folder / "state", *(self.folder / f"spool-{node.name}" for node in self.nodes)):
            path.mkdir(parents=True)
        nodes = "\n".join(f"NodeName={node.name} NodeAddr={node.address} CPUs=2 RealMemory=8000" for node in self.nodes)
        conf = _CONF.format(folder=self.folder, subnet=_SUBNET, nodes=nodes, **self._settings)
        (etc / "slurm.conf").write_text(conf.lstrip())
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

        self.login.boot()
        for command in (
            ("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"),
            ("mkdir", "-p", "/etc/slurm", "/run/munge", "/run/lock"),
            ("mount", "--bind", str(etc), "/etc/slurm"),
            ("ip", "link", "add", "br0", "type", "bridge"),
            ("ip", "address", "add", f"{self.login.address}/24", "dev", "br0"),
            ("ip", "link", "set", "br0", "up"),
        ):
            self.login.run(*command)
        files = [f"--{name}-file=/run/munge/{name}" for name in ("pid", "log", "seed")]
        self.daemon(self.login, "munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_until(
            lambda: self.login.run("sh", "-c", "test -S /run/munge/munge.socket.2 && echo yes || :"), "munged", 15
        )
        for node in self.nodes:
            node.boot()
            node.connect()
        self.controller = self.daemon(self.login, "slurmctld", "-D")
        for node in self.nodes:
            node.start_slurmd()
        self.wait_for_nodes(30)

    def daemon(self, machine: Machine, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground on a machine."""
        with (self.folder / f"{command[0]}-{machine.name}.out").open("ab") as out:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *machine.enter(*command)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root")},
            )
        self._daemons.append(process)
        return process

    def stop(self) -> None:
        """End all that ever ran on any node."""
        self.login.switch_off()  # its processes are above those of the nodes
        for node in self.nodes:
            node.switch_off()
        for process in self._daemons:
            process.kill()
            process.wait()

    # ----------------------------------------------------------------------------------------------------------------
    # Using it

    def run(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node; with `check`, one that fails is an error that says what it printed."""
        whole = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        whole.update(environment or {})
        inside = ["nsenter", "--target", str(self.login.init), "--all", f"--wdns={cwd or '/'}", "--"]
        words = [str(word) for word in command]
        done = subprocess.run([*inside, *words], capture_output=True, text=True, timeout=timeout_s, env=whole)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
        return done

    def sbatch(self, *arguments: str | Path, **options: Any) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **options).stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def nodes_of(self, job_id: str) -> list[Machine]:
        """Return the nodes that a job has, in SLURM's order."""
        names = self.run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).stdout.split()
        return [self.node(name) for name in names]

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of these states; returns what SLURM says of it."""
        last = ""

        def there() -> dict[str, str] | None:
            nonlocal last
            job = self.job(job_id)
            last = job["JobState"]
            return job if last in states else None

        try:
            return wait_until(there, f"job {job_id} {' or '.join(states)}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {last}: {self.job(job_id)}") from None

    def wait_for_restart(self, job_id: str, restarts: int = 1, timeout_s: float = 90) -> None:
        """Wait until SLURM has queued a job again so many times."""
        wait_until(lambda: self.job(job_id)["Restarts"] == str(restarts), f"restart {restarts} of {job_id}", timeout_s)

    def wait_for_nodes(self, timeout_s: float = 30) -> None:
        """Wait until every node is up and has nothing to do."""
        said = ""

        def idle() -> bool:
            nonlocal said
            done = self.run("sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%N %T", check=False)
            said = done.stdout + done.stderr
            lines = done.stdout.split("\n")[:-1]
            return len(lines) == NODES and all(line.split()[1] == "idle" for line in lines)

        try:
            wait_until(idle, "all nodes idle", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; they are:\n{said}\n{self.words()}") from None

    def processes(self) -> list[Process]:
        """Return what runs on the compute nodes, the daemons of SLURM apart."""
        found = [process for node in self.nodes for process in node.processes()]
        return [process for process in found if not re.match(r"\S*slurmd\b|\S*nsenter\b", process.command)]

    def wait_for_no_processes(self, timeout_s: float = 10) -> None:
        """Return when nothing runs on the compute nodes: a moment after SLURM calls a job done."""

        def gone() -> bool:
            nonlocal left
            left = self.processes()
            return not left

        left: list[Process] = []
        try:
            wait_until(gone, "the end of all processes", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; there are: {left}") from None

    def reset(self) -> None:
        """Make it as new, whatever a test has done: no job, no process, every node up."""
        self.run("scancel", "--full", "--user", "root", check=False)
        for node in self.nodes:
            if not node.init or not Path(f"/proc/{node.init}").exists():
                node.switch_off()
                node.switch_on()
            node.reconnect()
            if not node.healthy():
                node.start_slurmd()
        until = time.monotonic() + 10
        while self.processes() and time.monotonic() < until:
            time.sleep(0.1)
        for process in self.processes():
            process.kill()
        self.run("scontrol", "update", "nodename=n[1-4]", "state=resume", check=False)
        self.wait_for_nodes(60)

    def words(self, lines: int = 12) -> str:
        """Return the end of what each daemon has logged."""
        files: Sequence[Path] = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) for file in files
        )


def _status(pid: int, field: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster that runs; raises CannotRun with the daemons' own words."""
    # not below pytest's own folder: daemons have paths that must stay short and that every user may pass through
    folder = Path(tempfile.mkdtemp(prefix="distrain-cluster-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with running() as cluster:
        print(
            f"a login node; SLURM has {NODES} nodes of 2 CPUs. exit, or the end of input, ends the cluster", flush=True
        )
        inside = ["nsenter", "--target", str(cluster.login.init), "--all", f"--wdns={Path.cwd()}", "--"]
        status = subprocess.run([*inside, *(sys.argv[1:] or ["bash"])]).returncode
    sys.exit(status)
