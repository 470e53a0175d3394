"""What nodes say of themselves, compared: the one that differs is named. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distrain.doctor.findings import Finding, error, ok, warning

_ERRORS = ("Python", "torch", "torch, imported", "distrain", "distrain's code", "NCCL", "CUDA of torch", "accelerate",
           "deepspeed")  # fmt: skip
"""Versions that ranks must have the same of: they send each other what another version may not read."""


def on(names: Iterable[str], check: str, finding: Finding) -> list[Finding]:
    """Return a finding once for each node that it is of."""
    return [replace(finding, check=check, host=name) for name in names]


def odd_ones(values: Mapping[str, Hashable]) -> tuple[Any, list[str]]:
    """Return what more than half of the nodes have, and the nodes that have something else.

    Where no value is that of so many: None, and all nodes.
    """
    value, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        return None, list(values)
    return value, [name for name, each in values.items() if each != value]


def differences(
    values: Mapping[str, Hashable], check: str, what: str, make: Any, means: str, do: str, missing: str = "none"
) -> list[Finding]:
    """Return a finding for each value of `what` that is not that of most nodes; `make` is error or warning."""
    if len(set(values.values())) < 2:
        return []
    usual, odd = odd_ones(values)
    shown = {name: missing if value in (None, "") else str(value) for name, value in values.items()}
    if usual is None and len(odd) == len(values):
        each = ", ".join(f"{value} on {name}" for name, value in shown.items())
        return on(odd, check, make(f"{what} differs: {each}", means, do))
    most = missing if usual in (None, "") else usual
    found = []
    for value in dict.fromkeys(shown[name] for name in odd):
        which = [name for name in odd if shown[name] == value]
        found += on(which, check, make(f"{what} {value} here, {most} on the other nodes", means, do))
    return found


def compare(told: Mapping[str, Mapping[str, Any]], address: str = "") -> list[Finding]:
    """Return what differs between nodes that should not; `told` has the facts of each by its name, the first first.

    `address` is where the first node is reached.
    """
    if not told:
        return []
    return [*_versions(told), *_environment(told), *_names(told, address), *_interfaces(told), *_share(told)]


def _versions(told: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    check, found = "same versions", []
    names = dict.fromkeys(key for each in told.values() for key in each["versions"])
    for key in names:
        values = {name: each["versions"].get(key) for name, each in told.items()}
        make = error if key in _ERRORS else warning
        found += differences(
            values,
            check,
            key,
            make,
            "ranks of one run would compute or speak in different ways: it fails, hangs, or differs by where it runs",
            "install the same on every node, or a folder that all share; look for PYTHONPATH and modules of this node",
            missing="not installed",
        )
    if not found:
        shown = [f"{key} {next(iter(told.values()))['versions'].get(key)}" for key in ("Python", "torch", "distrain")]
        found = on(told, check, ok(f"the same on all nodes: {', '.join(shown)}"))
    return found


def _environment(told: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    check, found = "same variables", []
    for key in sorted({key for each in told.values() for key in each["environment"]}):
        values = {name: each["environment"].get(key) for name, each in told.items()}
        found += differences(
            values,
            check,
            key,
            warning,
            "libraries of this node do something else than on the others; what it is shows late, or as a hang",
            "set it for all nodes (`environment` of a site), or look for what sets it here: a profile, a prolog",
            missing="not set",
        )
    return found or on(told, check, ok("the same variables for libraries on all nodes"))


def is_loopback(address: str) -> bool:
    """Whether an address is of the machine that uses it, whichever that is."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _names(told: Mapping[str, Mapping[str, Any]], address: str) -> list[Finding]:
    check, found = "node names", []
    hosts = Counter(each["host"] for each in told.values())
    for host, count in hosts.items():
        if count > 1:
            which = [name for name, each in told.items() if each["host"] == host]
            means = "logs, heartbeats and the lease of a run name nodes by it, and take them for one machine"
            found += on(
                which, check, error(f"{count} nodes call themselves {host}", means, "name each node differently")
            )
    do = "correct /etc/hosts or the name service of this node"
    wrong: set[str] = set()
    for target in dict.fromkeys(key for each in told.values() for key in each["resolves"]):
        # a node may take its own name for itself
        others = {
            name: tuple(each["resolves"].get(target, ()))
            for name, each in told.items()
            if target not in (name, each["host"])
        }
        loops = [name for name, there in others.items() if any(map(is_loopback, there)) and not is_loopback(target)]
        first = next(iter(told)) if target == address else target
        means = f"what runs here looks for {first} on this machine, and never finds it"
        for name in loops:
            found += on([name], check, error(f"the name {target} is {_shown(others[name])} here", means, do))
        wrong |= set(loops)
        rest = {name: each for name, each in others.items() if name not in loops}
        if len(rest) > 1:
            shown = {name: _shown(each) for name, each in rest.items()}
            means = "ranks that are looked for by name are found from some nodes only, or on another network"
            found += differences(shown, check, f"the name {target}", warning, means, do)
    own = {name: any(map(is_loopback, each["own"])) for name, each in told.items()}
    if len(set(own.values())) > 1:
        which = [name for name, loop in own.items() if loop and name not in wrong]
        means = "gloo without GLOO_SOCKET_IFNAME tells the others this address, where they find themselves"
        for name in which:
            said = f"its own name {told[name]['host']} is {_shown(told[name]['own'])} here, unlike on other nodes"
            found += on([name], check, warning(said, means, do))
    return found or on(told, check, ok("the names of nodes mean the same on all of them"))


def _shown(addresses: Sequence[str]) -> str:
    return ", ".join(addresses) or "not known"


def _interfaces(told: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    check = "node interfaces"
    used = {name: str(each["towards"]) for name, each in told.items() if each.get("towards")}
    mtu = {name: each["interfaces"][used[name]]["mtu"] for name, each in told.items() if name in used}
    means = "large messages are dropped or cut on the way, so that a run starts and hangs in its first exchange"
    found = differences(mtu, check, "MTU of the interface between nodes", warning, means, "give all the same MTU")
    return found or on(told, check, ok(", ".join(dict.fromkeys(used.values())) or "nothing named, nothing missing"))


def _share(told: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What a node gives to its ranks, against what was asked for and what the others give."""
    check, found = "CPUs and GPUs", []
    for name, each in told.items():
        asked = each["asked"]
        if each["cpus"] < asked["cpus"]:
            means = "ranks share CPUs that they do not have, so that every step waits for this node"
            do = "look at the CPU binding of the job (--cpu-bind, cgroups) and at what else runs here"
            found += on([name], check, error(f"{each['cpus']} CPUs, {asked['cpus']} were asked for", means, do))
        elif each["cpus"] < asked["processes"]:
            means = "ranks take turns on a CPU"
            do = "ask for more: --cpus-per-task"
            what = f"{each['cpus']} CPUs for {asked['processes']} ranks"
            found += on([name], check, warning(what, means, do))
        if each["gpus"] < asked["gpus"]:
            means = "a run ends here at its start"
            do = "see nvidia-smi and CUDA_VISIBLE_DEVICES there; have the node drained if a GPU has fallen off"
            found += on([name], check, error(f"{each['gpus']} GPUs, {asked['gpus']} were asked for", means, do))
    named = {each.host for each in found}
    left = {name: each for name, each in told.items() if name not in named}
    if len(left) > 1:
        cpus = {name: each["cpus"] for name, each in left.items()}
        means, do = (
            "the ranks of a step wait for the node with the fewest",
            "choose nodes that are alike (--constraint)",
        )
        found += differences(cpus, check, "CPUs", warning, means, do)
        models = {name: ", ".join(each["gpu_models"]) for name, each in left.items()}
        found += differences(models, check, "GPUs", warning, means, do)
    return found or on(told, check, ok("as asked for, and the same on all nodes"))
