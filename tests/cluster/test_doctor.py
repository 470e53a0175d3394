"""`distrain doctor` on nodes of the cluster: nothing on sound ones, and what is planted is found where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster
from submitted import DISTRAIN

BETWEEN = {
    "nodes", "same versions", "same variables", "node names", "node interfaces", "CPUs and GPUs", "first node",
    "connections", "clocks", "shared folder", "equal speed", "collectives", "bandwidth",
}  # fmt: skip

_CLOCK = """
import time
right = time.time
time.time = lambda: right() + 90
"""


class Folder:
    """A user's folder, with a Python that first does what is planted on its node."""

    def __init__(self, cluster: Cluster, path: Path):
        self.cluster, self.path, self.runs = cluster, path, path / "runs"
        self.runs.mkdir(parents=True)
        python = path / "python"
        python.write_text(f'#!/bin/bash\nif [ -e {path}/$(hostname).sh ]; then . {path}/$(hostname).sh; fi\n'
                          f'exec {sys.executable} "$@"\n')  # fmt: skip
        python.chmod(0o755)
        self.site = path / "site.yaml"
        self.site.write_text(f"python: {python}\n")

    def plant(self, node: str, *lines: str) -> None:
        """Have Python on a node start with these lines of a shell before it."""
        (self.path / f"{node}.sh").write_text("\n".join(lines) + "\n")

    def doctor(self, *options: object, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the report of a command on the login node, with `found`: {(check, host): what} of all but ok."""
        words = [*prefix, DISTRAIN, "doctor", "--json", "--site", self.site, *options]
        done = self.cluster.run(*map(str, words), cwd=self.path, check=False, timeout_s=400)
        assert done.stdout.startswith("{"), done.stderr + done.stdout
        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (1 if report["errors"] else 0)
        bad = [each for each in report["findings"] if each["level"] != "ok"]
        assert all(each["means"] and each["do"] for each in bad)
        report["found"] = {(each["check"], each["host"]): each["found"] for each in bad}
        return report

    def in_allocation(self, *options: object) -> dict[str, Any]:
        """Return the same of four nodes that `salloc` has given."""
        return self.doctor(*options, prefix=("salloc", "--quiet", "--nodes=4", "--exclusive"))


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Folder:
    """A user's folder."""
    return Folder(cluster, tmp_path / "project")


@contextmanager
def planted(cluster: Cluster, node: str, do: str, undo: str) -> Iterator[None]:
    """Have a node as a command makes it while the block runs."""
    machine = cluster.node(node)
    machine.run(*do.split(" "))
    try:
        yield
    finally:
        machine.run(*undo.split(" "))


def test_nothing_is_found_on_sound_nodes(cluster: Cluster, folder: Folder) -> None:
    report = folder.doctor("--nodes", 3, "--partition", "high")
    assert report["found"] == {}
    assert report["sound"]
    assert report["hosts"] == ["n1", "n2", "n3"]
    checks = {(each["check"], each["host"]) for each in report["findings"]}
    assert checks >= {(check, host) for check in BETWEEN for host in ("n1", "n2", "n3")}
    assert list(folder.runs.iterdir()) == []
    cluster.wait_for_no_processes()


def test_what_is_planted_on_a_node_is_found_there(cluster: Cluster, folder: Folder) -> None:
    (folder.path / "numpy-1.0.dist-info").mkdir()
    (folder.path / "numpy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    (folder.path / "sitecustomize.py").write_text(_CLOCK)
    (folder.path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 n1\n")
    folder.plant("n2", f"export PYTHONPATH={folder.path}:$PYTHONPATH")
    folder.plant("n3", "export NCCL_SOCKET_IFNAME=ib9", "ulimit -n 128")
    folder.plant("n4", "export MKL_CBWR=COMPATIBLE")  # arithmetic of the oldest CPUs
    with ExitStack() as stack:
        for node, do, undo in (
            ("n2", f"mount --bind {folder.path}/hosts /etc/hosts", "umount /etc/hosts"),
            ("n2", "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
            ("n3", f"mount -t tmpfs tmpfs {folder.runs}", f"umount {folder.runs}"),
            ("n3", "mount -o remount,size=1m /dev/shm", "mount -o remount,size=50% /dev/shm"),
            (
                "n4",
                "tc qdisc add dev eth0 root tbf rate 100mbit burst 32kb latency 400ms",
                "tc qdisc del dev eth0 root",
            ),
        ):
            stack.enter_context(planted(cluster, node, do, undo))
        report = folder.in_allocation("--limit", 30)
    found = report["found"]
    assert "numpy 1.0 here" in found.pop(("same versions", "n2"))
    assert "PYTHONPATH" in found.pop(("same variables", "n2"))
    assert found.pop(("node names", "n2")) == "the name n1 is 127.0.1.1 here"
    assert "1400 here, 1500 on the other nodes" in found.pop(("node interfaces", "n2"))
    assert "90 s ahead of those of the other nodes" in found.pop(("clocks", "n2"))
    assert "NCCL_SOCKET_IFNAME ib9 here" in found.pop(("same variables", "n3"))
    assert "NCCL_SOCKET_IFNAME=ib9" in found.pop(("interfaces", "n3"))
    assert "is not the folder that the other nodes see" in found.pop(("shared folder", "n3"))
    assert "may open 128 files" in found.pop(("open files", "n3"))
    assert "1.0 MiB" in found.pop(("shared memory", "n3"))
    assert "MKL_CBWR" in found.pop(("same variables", "n4"))
    assert "times as slow as the others" in found.pop(("equal speed", "n4"))
    assert "of what the other nodes have" in found.pop(("bandwidth", "n4"))
    # the machine's own checks say more of what is planted there, and nothing of a node without
    assert {host for _, host in found} <= {"n2", "n3"}, found
    assert not {check for check, _ in found} & BETWEEN, found
    cluster.wait_for_no_processes()


def test_nodes_that_do_not_come_and_ports_that_are_closed_are_named_without_a_hang(
    cluster: Cluster, folder: Folder
) -> None:
    folder.plant("n4", "sleep 1000")
    closed = "ipproto tcp sport 10000-29999 to 10.77.0.3 blackhole"  # answers of the first node are dropped
    system_ports = "ipproto tcp dport 32768-60999 to 10.77.0.1 prohibit"
    with ExitStack() as stack:
        for node, rule in (("n1", closed), ("n2", system_ports)):
            stack.enter_context(planted(cluster, node, f"ip rule add {rule}", f"ip rule del {rule}"))
        found = folder.in_allocation("--limit", 12)["found"]
    assert found.pop(("nodes", "n4")).startswith("did not begin")
    said = found.pop(("first node", "n3"))
    assert said.startswith("n1 at 10.77.0.1 port ")
    assert said.endswith("is not reached: no answer")
    assert ("connections", "n1") in found or ("connections", "n2") in found
    assert {check for check, _ in found} == {"connections"}, found
    cluster.wait_for_no_processes()
