"""What ranks have measured together, judged: the node that is slow, wrong or out of reach is named. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distrain.doctor.findings import Finding, error, ok, warning
from distrain.doctor.nodes.comparing import on

_SLOW = {"cpu": 1.75, "cuda": 1.15}
"""How many times as long as its peers a rank takes that is called slow: other processes disturb those on CPUs."""
_SLOW_NETWORK, _SLOW_LINK = 0.5, 0.33
"""The share of the others' bandwidth below which a node, or a pair of nodes, is called slow."""
_OWNED, _STARVED = 0.85, 0.6
"""A CPU is a rank's own when it has it for so much of the time, and is shared with others below this part of that."""
_SKEW_S = 0.5
"""Clocks that are kept by a protocol are a hundred times closer."""
_LATE_S = 1.0
"""Seconds within which a change in a shared folder should be seen by other nodes."""


def slow_ranks(seconds: Mapping[int, float], device: str = "cpu") -> dict[int, float]:
    """Return the ranks that are slow, with how many times as long as the median of the others they take."""
    found = {}
    for rank, took in seconds.items():
        others = [other for each, other in seconds.items() if each != rank]
        if others and took > _SLOW[device] * statistics.median(others):
            found[rank] = took / statistics.median(others)
    return found


def starved(told: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Return the ranks that had a CPU for much less of the time than the others, which had one nearly always."""
    found = {}
    for rank, each in told.items():
        others = [other["share"] for key, other in told.items() if key != rank]
        if others and (usual := statistics.median(others)) > _OWNED and each["share"] < _STARVED * usual:
            found[rank] = each["share"]
    return found


def slow_nodes(rates: Mapping[tuple[int, int], float]) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """Return slow nodes and slow pairs of others, with the share of the others' bandwidth that they have.

    `rates` are of pairs in either order, once or twice.
    """
    both: dict[tuple[int, int], float] = {}
    for (one, other), rate in rates.items():
        pair = min(one, other), max(one, other)
        both[pair] = max(rate, both.get(pair, 0.0))
    nodes: dict[int, float] = {}
    left = dict(both)
    while True:
        shares = {}
        for node in {node for pair in left for node in pair}:
            own = [rate for pair, rate in left.items() if node in pair]
            others = [rate for pair, rate in left.items() if node not in pair]
            if own and others:
                shares[node] = statistics.median_high(own) / statistics.median(others)
        slowest = min(shares, key=lambda node: shares[node], default=None)
        if slowest is None or shares[slowest] >= _SLOW_NETWORK:
            break
        nodes[slowest] = shares[slowest]
        left = {pair: rate for pair, rate in left.items() if slowest not in pair}
    pairs = {}
    for pair, rate in left.items():
        others = [other for each, other in left.items() if each != pair]
        if len(others) > 1 and rate < _SLOW_LINK * statistics.median(others):
            pairs[pair] = rate / statistics.median(others)
    return nodes, pairs


class Judged:
    """What all nodes have told, with their names, from which findings are made."""

    def __init__(self, names: Sequence[str], processes: int, address: str, port: int):
        self.names, self.processes, self.address, self.port = list(names), processes, address, port

    def name(self, rank: int) -> str:
        """Return the node that a rank is on."""
        return self.names[rank // self.processes]

    def reach(self, told: Mapping[int, Mapping[str, Any]], port_problem: str | None) -> list[Finding]:
        """Whether every node reaches the first one; `told` is by rank."""
        check, first, found = "first node", self.names[0], []
        place = f"{self.address} port {self.port}"
        if port_problem is not None:
            means, do = "rank 0 cannot listen there", "try again: another port is chosen for another job"
            return on([first], check, error(f"port {self.port}: {port_problem}", means, do))
        failed = {self.name(rank): each["problem"] for rank, each in told.items() if each["problem"]}
        explained = {
            "refused": (
                "a firewall refuses this port, or nothing listens there",
                f"have the ports 10000 to 29999 opened between nodes; see {first} if other nodes fail as well",
            ),
            "no answer": (
                "a firewall drops what is sent there, or the node is cut off",
                "have the ports 10000 to 29999 opened between nodes, and look at the network of both",
            ),
        }
        for problem in dict.fromkeys(failed.values()):
            why, do = explained.get(problem, ("there is no way there", "look at routes, rules and interfaces here"))
            which = [name for name, each in failed.items() if each == problem]
            means = f"{why}; ranks of this node wait for rank 0 until they give up"
            found += on(which, check, error(f"{first} at {place} is not reached: {problem}", means, do))
        for rank, each in told.items():
            for name, problem in each.get("from", {}).items():
                if problem is not None:
                    means = f"what the environment names as the network between nodes does not lead to {first}"
                    do = "correct NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, or `interface` of the site"
                    what = f"{first} is not reached from the interface {name}: {problem}"
                    found += on([self.name(rank)], check, error(what, means, do))
        return found or on([self.name(rank) for rank in told], check, ok(f"reached at {place} from every node"))

    def links(self, told: Mapping[int, Mapping[int, str | None]]) -> list[Finding]:
        """Whether every two nodes reach each other at ports that the system chooses."""
        check = "connections"
        bad = [
            (self.name(one), self.name(int(other)), problem)
            for one, each in told.items() for other, problem in each.items() if problem is not None
        ]  # fmt: skip
        if not bad:
            return on([self.name(rank) for rank in told], check, ok("every two nodes reach each other at any port"))
        means = "gloo and NCCL use ports that the system chooses; a run hangs where it makes its process group"
        do = "have all ports opened between compute nodes (ip_local_port_range), and look at routes and interfaces"
        counts = Counter(name for one, other, _ in bad for name in {one, other})
        found, left = [], bad
        while left:
            worst, count = max(counts.items(), key=lambda item: item[1])
            if count < 2:
                break
            mine = [each for each in left if worst in each[:2]]
            others = ", ".join(sorted({one if other == worst else other for one, other, _ in mine}))
            what = f"no connection between this node and {others}: {', '.join(sorted({each[2] for each in mine}))}"
            found += on([worst], check, error(what, means, do))
            left = [each for each in left if each not in mine]
            counts = Counter(name for one, other, _ in left for name in {one, other})
        for one, other, problem in left:
            found += on([one], check, error(f"{other} is not reached from here: {problem}", means, do))
        return found

    def clocks(self, told: Mapping[int, Mapping[str, float]]) -> list[Finding]:
        """Whether the clocks agree; the median is taken for right."""
        check, found = "clocks", []
        if len(told) < 2:
            return []
        right = statistics.median_low(sorted(each["offset_s"] for each in told.values()))
        if len(told) == 2:
            right = 0.0  # the first node's
        for rank, each in told.items():
            skew, unknown = each["offset_s"] - right, each["round_trip_s"] / 2
            if abs(skew) - unknown > _SKEW_S:
                way = "ahead of" if skew > 0 else "behind"
                means = "times in logs and files do not fit one another; munge and the scheduler refuse such a node"
                do = "set the clock there, by chrony or ntpd"
                against = f"that of {self.names[0]}" if len(told) == 2 else "those of the other nodes"
                what = f"its clock is {abs(skew):.3g} s {way} {against}"
                found += on([self.name(rank)], check, warning(what, means, do))
        if found:
            return found
        most = max(abs(each["offset_s"] - right) for each in told.values())
        exact = max(each["round_trip_s"] for each in told.values()) / 2
        return on(map(self.name, told), check, ok(f"within {max(most, exact) * 1e3:.3g} ms of one another"))

    def folder(self, told: Mapping[int, Mapping[str, Any]], folder: str, mounts: Mapping[str, str]) -> list[Finding]:
        """Whether the folder is one and the same on every node, and does what a run needs of it."""
        check, found = "shared folder", []
        do = "put runs on a file system that all nodes mount (--run-dir)"
        for rank, each in told.items():
            if each["problem"]:
                means = "ranks of this node cannot write their part of a checkpoint"
                found += on(
                    [self.name(rank)], check, error(f"cannot write into {folder}: {each['problem']}", means, do)
                )
        good = {rank: each for rank, each in told.items() if not each["problem"]}
        groups = _groups(good)
        if len(groups) > 1:
            largest = max(groups, key=len)
            means = "this node has a folder of its own there: its part of every checkpoint is missing from the others"
            for group in groups:
                if group is largest and len(group) > 1:
                    continue
                for rank in group:
                    where = f" ({mounts[name]})" if mounts.get(name := self.name(rank)) else ""
                    what = f"{folder}{where} is not the folder that the other nodes see"
                    found += on([name], check, error(what, means, do))
            good = {rank: each for rank, each in good.items() if rank in largest}
        if len(good) < 2:
            return found
        found += self._semantics(good, folder)
        if found:
            return found
        slowest = max((s for each in good.values() for kind in _KINDS for s in each[kind].values()), default=0.0)
        kind = next((each for each in mounts.values() if each), "").partition(" ")[0]
        what = f"{folder}{f' ({kind})' if kind else ''} is one for all nodes; changes are seen within {slowest:.3g} s"
        return on([self.name(rank) for rank in good], check, ok(what))

    def _semantics(self, good: Mapping[int, Mapping[str, Any]], folder: str) -> list[Finding]:
        check, found = "shared folder", []
        for kind, what in _KINDS.items():
            for rank, each in good.items():
                seconds = [s for other, s in each[kind].items() if int(other) in good]
                late = [s for s in seconds if s is not None and s > _LATE_S]
                do = "mount it with attributes that are not kept so long (actimeo=1 or lookupcache=positive of NFS)"
                if None in seconds:
                    means = "a rank that waits for a checkpoint or a marker of another does not find it"
                    what_not = f"{what} of {folder} by another node is not seen here in time"
                    found += on([self.name(rank)], check, error(what_not, means, do))
                elif late:
                    means = "ranks wait so long for each other's files at every checkpoint"
                    found += on(
                        [self.name(rank)], check, warning(f"{what} is seen here after {max(late):.3g} s", means, do)
                    )
        made = Counter(number for each in good.values() for number in each["made"])
        if wrong := [number for number, count in made.items() if count != 1]:
            means = "two attempts at a run may both believe that they are alone"
            what = f"{len(wrong)} of {len(made)} files were made by several nodes at once (O_EXCL)"
            found += on(
                map(self.name, good), check, error(what, means, "use a file system that keeps what it promises")
            )
        held = [self.name(rank) for rank, each in good.items() if each["locked"]]
        means = "locks do not reach other nodes here: an attempt on another node shows by its heartbeat alone, later"
        found += on(
            held, check, warning("could take a lock that another node held", means, "mount it with locks (lock)")
        )
        return found

    def products(self, told: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
        """Whether products of matrices are right, and as quick on one rank as on the others."""
        check, found = "equal speed", []
        for rank, each in told.items():
            if each["wrong_rows"]:
                means = "this device computes wrong numbers, and a run on it trains on them"
                do = "take the node out, and have its memory and the device tested"
                what = f"{each['wrong_rows']} of {each['rows']} rows are wrong"
                found += [_at(rank, one) for one in on([self.name(rank)], check, error(what, means, do))]
        devices = {each["device"] for each in told.values()}
        device = devices.pop() if len(devices) == 1 else "cpu"
        for rank, share in starved(told).items():
            means = "every step waits for its slowest rank"
            do = "see what else runs on the node (top), and how the job binds CPUs"
            what = f"had a CPU for {share:.0%} of the time, and the others nearly always"
            found += [_at(rank, one) for one in on([self.name(rank)], check, warning(what, means, do))]
        for rank, ratio in slow_ranks({rank: each["seconds"] for rank, each in told.items()}, device).items():
            took = told[rank]["seconds"]
            means = "every step waits for its slowest rank"
            do = "look for throttling (heat, power), at the clocks of the device, and at variables that differ"
            what = f"{ratio:.1f} times as slow as the others: {took * 1e3:.3g} ms"
            found += [_at(rank, one) for one in on([self.name(rank)], check, warning(what, means, do))]
        if found:
            return found
        usual = statistics.median(each["seconds"] for each in told.values()) if told else 0.0
        which = dict.fromkeys(map(self.name, told))
        return on(which, check, ok(f"right, and alike on all ranks: {usual * 1e3:.3g} ms on {device}"))

    def collectives(self, told: Mapping[int, Mapping[str, Mapping[str, str | None]]]) -> list[Finding]:
        """Whether collectives give every rank the right numbers."""
        check, found = "collectives", []
        problems = {
            (backend, name): {rank: each[backend].get(name) for rank, each in told.items() if backend in each}
            for backend in dict.fromkeys(backend for each in told.values() for backend in each)
            for name in dict.fromkeys(name for each in told.values() for name in each.get(backend, ()))
        }
        for (backend, name), each in problems.items():
            bad = {rank: problem for rank, problem in each.items() if problem is not None}
            means = "gradients of a run are summed so: it would hang, fail or train on wrong numbers"
            do = "set NCCL_DEBUG=INFO and see what it says; look at the network and the memory of the node"
            for problem in dict.fromkeys(bad.values()):
                which = dict.fromkeys(self.name(rank) for rank, one in bad.items() if one == problem)
                found += on(which, check, error(f"{name} over {backend}: {problem}", means, do))
        if found or not told:
            return found
        done = ", ".join(f"{name} over {backend}" for backend, name in problems)
        return on(dict.fromkeys(map(self.name, told)), check, ok(f"right on all ranks: {done}"))

    def network(self, told: Mapping[int, Mapping[int, Mapping[str, float]]]) -> list[Finding]:
        """Whether every two nodes have the bandwidth of the others."""
        check, found = "bandwidth", []
        rates = {
            (one, int(other)): each["bytes_per_s"] for one, found_there in told.items()
            for other, each in found_there.items()
        }  # fmt: skip
        if not rates:
            return []
        nodes, pairs = slow_nodes(rates)
        usual = statistics.median(rates.values())
        means = "every exchange of gradients waits for it"
        do = "look at the cable, the speed and the errors of its interface (ethtool, ibstat), and who else uses it"
        for rank, share in nodes.items():
            own = statistics.median(rate for pair, rate in rates.items() if rank in pair)
            what = f"{_rate(own)} to and from it, {share:.2g} of what the other nodes have"
            found += on([self.name(rank)], check, warning(what, means, do))
        for (one, other), share in pairs.items():
            rate = max(rates.get((one, other), 0.0), rates.get((other, one), 0.0))
            what = f"{_rate(rate)} between it and {self.name(other)}, {share:.2g} of what other pairs have"
            found += on([self.name(one)], check, warning(what, means, do))
        if found:
            return found
        latency = statistics.median(each["latency_s"] for one in told.values() for each in one.values())
        what = f"{_rate(usual)} between two nodes, {latency * 1e6:.3g} µs"
        return on([self.name(rank) for rank in told], check, ok(what))


_KINDS = {"seen": "a file", "renamed": "a rename", "grown": "the size of a file"}


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"


def _at(rank: int, finding: Finding) -> Finding:
    return replace(finding, rank=rank)


def _groups(told: Mapping[int, Mapping[str, Any]]) -> list[list[int]]:
    """Return the ranks that see each other's files, together."""
    groups: list[list[int]] = []
    for rank in told:
        for group in groups:
            if any(
                told[rank]["seen"].get(str(other), None) is not None and told[other]["seen"].get(str(rank)) is not None
                for other in group
            ):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups
