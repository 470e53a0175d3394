"""What nodes have told, judged: who is named, and that nobody is where all is alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distrain.doctor.findings import Finding, Level
from distrain.doctor.nodes.comparing import compare, odd_ones
from distrain.doctor.nodes.exchange import rounds
from distrain.doctor.nodes.judging import Judged, slow_nodes, slow_ranks, starved
from distrain.doctor.nodes.meeting import connected

NAMES = ["n1", "n2", "n3", "n4"]
JUDGED = Judged(NAMES, 1, "10.0.0.1", 12345)
NODE: dict[str, Any] = {
    "versions": {"Python": "3.11.7", "torch": "2.15.0", "distrain": "0.1.0", "NCCL": "2.30"},
    "environment": {"OMP_NUM_THREADS": "1"},
    "interfaces": {"lo": {"mtu": 65536}, "ib0": {"mtu": 4092}},
    "resolves": {"n1": ["10.0.0.1"], "n2": ["10.0.0.2"], "n3": ["10.0.0.3"], "n4": ["10.0.0.4"]},
    "towards": "ib0",
    "cpus": 8,
    "gpus": 4,
    "gpu_models": ["H100"],
    "asked": {"cpus": 8, "gpus": 4, "processes": 4},
}


def node(name: str, **other: Any) -> dict[str, Any]:
    """What a node says of itself, with other values in it."""
    about = NODE | {"host": name, "own": NODE["resolves"][name]}
    return about | {key: about[key] | value if isinstance(value, dict) else value for key, value in other.items()}


def bad(findings: list[Finding]) -> dict[str, tuple[str, str, str]]:
    """Return {host: (level, check, what was found)} of all that is not ok; each host has one at most."""
    found = {each.host: (each.level.value, each.check, each.found) for each in findings if each.level is not Level.ok}
    assert len(found) == sum(each.level is not Level.ok for each in findings)
    return found


def test_nodes_that_are_alike_are_ok() -> None:
    found = compare({name: node(name) for name in NAMES}, "10.0.0.1")
    assert {each.level for each in found} == {Level.ok}
    assert {each.host for each in found} == set(NAMES)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"versions": {"torch": "2.10.0"}}, ("error", "same versions", "torch 2.10.0 here, 2.15.0 on the other nodes")),
        ({"versions": {"NVIDIA driver": "570.1"}},
         ("warning", "same versions", "NVIDIA driver 570.1 here, not installed on the other nodes")),
        ({"environment": {"OMP_NUM_THREADS": "8"}},
         ("warning", "same variables", "OMP_NUM_THREADS 8 here, 1 on the other nodes")),
        ({"environment": {"NCCL_IB_DISABLE": "1"}},
         ("warning", "same variables", "NCCL_IB_DISABLE 1 here, not set on the other nodes")),
        ({"resolves": {"n1": ["127.0.1.1"]}}, ("error", "node names", "the name n1 is 127.0.1.1 here")),
        ({"resolves": {"n4": ["192.168.0.4"]}},
         ("warning", "node names", "the name n4 192.168.0.4 here, 10.0.0.4 on the other nodes")),
        ({"own": ["127.0.1.1"]},
         ("warning", "node names", "its own name n3 is 127.0.1.1 here, unlike on other nodes")),
        ({"interfaces": {"ib0": {"mtu": 2044}}},
         ("warning", "node interfaces", "MTU of the interface between nodes 2044 here, 4092 on the other nodes")),
        ({"cpus": 4}, ("error", "CPUs and GPUs", "4 CPUs, 8 were asked for")),
        ({"cpus": 16}, ("warning", "CPUs and GPUs", "CPUs 16 here, 8 on the other nodes")),
        ({"gpus": 3}, ("error", "CPUs and GPUs", "3 GPUs, 4 were asked for")),
        ({"gpu_models": ["A100"]}, ("warning", "CPUs and GPUs", "GPUs A100 here, H100 on the other nodes")),
    ],
)  # fmt: skip
def test_a_node_that_differs_is_named(other: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert bad(compare({name: node(name, **(other if name == "n3" else {})) for name in NAMES})) == {"n3": expected}


def test_of_two_nodes_that_differ_both_are_named() -> None:
    found = bad(compare({"n1": node("n1"), "n2": node("n2", versions={"torch": "2.10.0"})}))
    assert found == dict.fromkeys(("n1", "n2"), ("error", "same versions", "torch differs: 2.15.0 on n1, 2.10.0 on n2"))
    assert odd_ones({"a": 1, "b": 1, "c": 2}) == (1, ["c"])


def test_nodes_with_one_name_are_found() -> None:
    told = {name: node(name) for name in NAMES}
    told["n3"]["host"] = "n2"
    assert {host for host, (level, _, _) in bad(compare(told)).items() if level == "error"} == {"n2", "n3"}


# --------------------------------------------------------------------------------------------------------------------
# What is measured


def sees(rank: int, *others: int, **more: Any) -> dict[str, Any]:
    """What a rank has seen of the folder: the files of these others."""
    seen = {str(other): (0.001 if other in others else None) for other in range(4) if other != rank}
    near = {str(other): 0.001 for other in others}
    return {"problem": None, "seen": seen, "renamed": near, "grown": near, "made": [rank], "locked": False} | more


WHOLE = {rank: sees(rank, *({0, 1, 2, 3} - {rank})) for rank in range(4)}
ALONE = {rank: sees(rank, *({0, 1, 3} - {rank})) for rank in (0, 1, 3)} | {2: sees(2)}


@pytest.mark.parametrize(
    ("told", "level", "what", "hosts"),
    [
        (ALONE, "error", "is not the folder that the other nodes see", {"n3"}),
        (WHOLE | {2: sees(2, 0, 1, 3, problem="Permission denied")}, "error", "cannot write into /runs", {"n3"}),
        (
            WHOLE | {2: sees(2, 0, 1, 3, grown={"0": 4.0})},
            "warning",
            "the size of a file is seen here after 4 s",
            {"n3"},
        ),
        (WHOLE | {2: sees(2, 0, 1, 3, renamed={"0": None})}, "error", "a rename of /runs by another node", {"n3"}),
        (WHOLE | {2: sees(2, 0, 1, 3, locked=True)}, "warning", "could take a lock that another node held", {"n3"}),
        (WHOLE | {2: sees(2, 0, 1, 3, made=[0])}, "error", "1 of 3 files were made by several nodes", set(NAMES)),
    ],
    ids=["a folder of its own", "read-only", "late", "never", "locks", "made twice"],
)
def test_what_a_folder_does_not_do_is_found(
    told: dict[int, dict[str, Any]], level: str, what: str, hosts: set[str]
) -> None:
    found = bad(JUDGED.folder(told, "/runs", {}))
    assert set(found) == hosts
    assert all(each[0] == level and what in each[2] for each in found.values()), found


def test_of_two_nodes_with_a_folder_each_both_are_named() -> None:
    assert bad(JUDGED.folder(WHOLE, "/runs", {})) == {}
    told = {rank: sees(rank) for rank in range(2)}
    assert set(bad(JUDGED.folder(told, "/runs", {"n1": "tmpfs"}))) == {"n1", "n2"}


def test_a_clock_that_differs_is_named_and_a_slow_answer_is_no_skew() -> None:
    told = {rank: {"offset_s": 0.01 * rank, "round_trip_s": 0.002} for rank in range(4)}
    assert bad(JUDGED.clocks(told)) == {}
    told[1] = {"offset_s": -7.0, "round_trip_s": 0.002}
    assert bad(JUDGED.clocks(told))["n2"][2].startswith("its clock is 7 s behind those")
    told[1] = {"offset_s": -7.0, "round_trip_s": 20.0}
    assert bad(JUDGED.clocks(told)) == {}
    first = {rank: {"offset_s": 60.0 * (rank > 0), "round_trip_s": 0.002} for rank in range(4)}
    assert list(bad(JUDGED.clocks(first))) == ["n1"], "the clock that the others are compared with"


def test_ports_that_are_closed_are_told_with_their_nodes() -> None:
    fine = {"problem": None, "from": {}}
    told = {
        0: fine,
        1: fine,
        2: {"problem": "no answer", "from": {}},
        3: {"problem": None, "from": {"eth1": "refused"}},
    }
    found = bad(JUDGED.reach(told, None))
    assert found["n3"][2] == "n1 at 10.0.0.1 port 12345 is not reached: no answer"
    assert found["n4"][2] == "n1 is not reached from the interface eth1: refused"
    assert list(bad(JUDGED.reach({}, "Address already in use"))) == ["n1"]
    links: dict[int, dict[int, str | None]] = {
        one: {other: "refused" if 2 in (one, other) else None for other in range(4) if other != one} for one in range(4)
    }
    assert bad(JUDGED.links(links))["n3"][2] == "no connection between this node and n1, n2, n4: refused"
    assert connected(links) == [0, 1, 3]
    links = {one: {other: "refused" if (one, other) == (0, 3) else None for other in range(4)} for one in range(4)}
    assert bad(JUDGED.links(links)) == {"n1": ("error", "connections", "n4 is not reached from here: refused")}


def product(**other: Any) -> dict[str, Any]:
    return {"seconds": 1.0, "share": 1.0, "wrong_rows": 0, "rows": 320, "device": "cpu"} | other


@pytest.mark.parametrize(
    ("other", "level", "what"),
    [
        ({"seconds": 2.5}, "warning", "2.3 times as slow"),
        ({"share": 0.4}, "warning", "had a CPU for 40%"),
        ({"wrong_rows": 3}, "error", "3 of 320 rows are wrong"),
    ],
)
def test_a_rank_that_is_slow_or_wrong_is_named(other: dict[str, Any], level: str, what: str) -> None:
    alike = {rank: product(seconds=1.0 + rank / 10) for rank in range(4)}
    assert bad(JUDGED.products(alike)) == {}
    found = bad(JUDGED.products(alike | {3: product(**other)}))
    assert list(found) == ["n4"]
    assert found["n4"][0] == level
    assert what in found["n4"][2]


def test_gpus_are_held_to_less_and_a_busy_machine_starves_nobody() -> None:
    seconds = {0: 1.0, 1: 1.0, 2: 1.3}
    assert slow_ranks(seconds, "cpu") == {}
    assert slow_ranks(seconds, "cuda") == {2: 1.3}
    assert starved({rank: product(share=share) for rank, share in enumerate((0.3, 0.5, 0.1, 0.6))}) == {}


@pytest.mark.parametrize(
    ("rate", "nodes", "pairs"),
    [
        (lambda one, other: 10.0 + one, [], []),
        (lambda one, other: 1.0 if 2 in (one, other) else 10.0, [2], []),
        (lambda one, other: 1.0 if (one, other) == (0, 3) else 10.0, [], [(0, 3)]),
        (lambda one, other: 1.0 if {1, 2} & {one, other} else 10.0, [1, 2], []),
    ],
)
def test_a_slow_node_is_told_from_a_slow_pair(
    rate: Callable[[int, int], float], nodes: list[int], pairs: list[tuple[int, int]]
) -> None:
    rates = {(one, other): rate(one, other) for one in range(5) for other in range(one + 1, 5)}
    slow, slow_pairs = slow_nodes(rates)
    assert (sorted(slow), sorted(slow_pairs)) == (nodes, pairs)


def test_a_wrong_sum_is_told_with_its_collective() -> None:
    right = {"gloo": {"all-reduce": None, "broadcast": None}}
    wrong = {"gloo": {"all-reduce": "5 of 16,384 numbers are wrong"}}
    assert bad(JUDGED.collectives(dict.fromkeys(range(4), right))) == {}
    found = bad(JUDGED.collectives(dict.fromkeys(range(3), right) | {3: wrong}))
    assert found == {"n4": ("error", "collectives", "all-reduce over gloo: 5 of 16,384 numbers are wrong")}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_in_rounds_everyone_meets_everyone_once(count: int) -> None:
    met = [(one, other) for partners in rounds(count) for one, other in enumerate(partners) if other is not None]
    assert sorted(met) == sorted((one, other) for one in range(count) for other in range(count) if one != other)
    assert all(partners[other] == one for partners in rounds(count) for one, other in enumerate(partners) if other)


def test_among_many_nodes_rounds_are_few() -> None:
    assert len(rounds(100)) == 8
    assert all(sorted(other for other in partners if other is not None) == list(range(100)) for partners in rounds(100))
