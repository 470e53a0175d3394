"""What each rank does together with the others, in order. Each finding is sent at once: a later step may not end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from distrain.doctor.nodes.exchange import check_collectives, clock_offset, measure_pairs, multiply
from distrain.doctor.nodes.judging import slow_nodes, slow_ranks, starved
from distrain.doctor.nodes.lines import Teller
from distrain.doctor.nodes.meeting import Absent, Meeting, Place, arrive, connect, connect_all, connected
from distrain.doctor.nodes.shared import SEEN_S, examine_folder

_COLLECTIVE_S = 30.0
"""How long a collective may take."""
_TRIES = 3
"""How often what looks slow is measured: it is, where it is each time."""


def run_rank(place: Place, folder: Path, teller: Teller) -> None:
    """Do all steps of this rank; a step that fails is sent as a finding, and ends them."""
    from torch.distributed import PrefixStore, TCPStore

    try:
        server = None
        if place.rank == 0:
            try:
                server = TCPStore("127.0.0.1", place.port, None, True, timedelta(seconds=60), wait_for_workers=False)
            except RuntimeError as error:
                teller.tell("port", str(error).splitlines()[0])
                return
        found = _reach(place)
        if place.leads:
            teller.tell("reach", found)
        if found["problem"] is not None:
            return
        if server is None:
            waits = timedelta(seconds=place.limit_s + 60)
            server = TCPStore(place.address, place.port, None, False, waits, wait_for_workers=False)
        store = PrefixStore("doctor", server)
        members = arrive(store, place)
        if place.rank == 0:
            teller.tell("arrived", members)
        if place.rank not in members:
            teller.tell("late")
            return
        _together(Meeting(store, place.rank, members), place, folder, teller)
    except Absent as absent:
        teller.tell("absent", {"step": absent.step, "ranks": absent.ranks})
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        teller.tell("failed", f"{type(error).__name__}: {text.splitlines()[0][:300]}")


def _reach(place: Place) -> dict[str, Any]:
    """Connect to rank 0 as the system would, and from each interface that the environment names."""
    until = time.monotonic() + place.limit_s
    found = connect(place.address, place.port, until)
    found["from"] = {}
    if found["problem"] is None and place.node and place.leads:
        import psutil

        known = psutil.net_if_addrs()
        names = {os.environ.get(each, "") for each in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        for name in sorted(names & set(known)):
            own = next((each.address for each in known[name] if each.family == socket.AF_INET), None)
            problem = "has no address"
            if own is not None:
                problem = connect(place.address, place.port, time.monotonic() + 3, own)["problem"]
            found["from"][name] = problem
    return found


def _together(all_ranks: Meeting, place: Place, folder: Path, teller: Teller) -> None:
    leaders = [rank for rank in all_ranks.members if rank % place.processes == 0]
    team = all_ranks.of(leaders, "leaders")
    links: Mapping[int, str | None] = {}
    if place.rank in leaders:
        links = connect_all(team, _own_address(place))
        teller.tell("links", links)
    told = all_ranks.share("links", links)
    good = {rank // place.processes for rank in connected({rank: _of_ranks(told[rank]) for rank in leaders})}

    if place.rank in leaders:
        teller.tell("clock", clock_offset(team))
        teller.tell("folder", examine_folder(team, folder, min(SEEN_S, place.limit_s)))
    all_ranks.share("folder")

    _multiply(all_ranks, place, teller)

    usable = [rank for rank in all_ranks.members if rank // place.processes in good]
    if place.rank in usable:
        _exchange(all_ranks.of(usable, "usable"), place, teller)
    all_ranks.share("end")
    if place.rank == 0:
        time.sleep(0.5)  # with this process the store ends, and others may still read of this step


def _of_ranks(found: Mapping[Any, str | None]) -> dict[int, str | None]:
    return {int(rank): problem for rank, problem in found.items()}  # JSON has no numbers as keys


def _own_address(place: Place) -> str:
    """Return where the other nodes reach this one."""
    with socket.create_connection((place.address, place.port), 10) as probe:
        return str(probe.getsockname()[0]) if place.node else place.address


def _device(place: Place) -> Any:
    import torch

    local = place.rank % place.processes
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def _multiply(all_ranks: Meeting, place: Place, teller: Teller) -> None:
    device = _device(place)
    best: dict[str, Any] = {}
    for number in range(_TRIES):
        all_ranks.share(f"multiply {number}")  # all at the same time, as in a step
        found = multiply(device)
        before = best or found
        best = found | {
            "seconds": min(found["seconds"], before["seconds"]),
            "share": max(found["share"], before["share"]),
            "wrong_rows": max(found["wrong_rows"], before["wrong_rows"]),
        }
        told = all_ranks.share(f"product {number}", best)
        if not slow_ranks({rank: each["seconds"] for rank, each in told.items()}, device.type) and not starved(told):
            break
    teller.tell("product", best)


def _exchange(team: Meeting, place: Place, teller: Teller) -> None:
    import torch
    import torch.distributed as dist

    from distrain.launchers.slurm.node import interface_towards

    if place.nodes > 1 and not os.environ.get("GLOO_SOCKET_IFNAME") and (name := interface_towards(place.address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    indices = {rank: number for number, rank in enumerate(team.members)}
    device, cpu = _device(place), torch.device("cpu")
    waits = timedelta(seconds=_COLLECTIVE_S)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", team.store), rank=team.index, world_size=len(team.members),
        timeout=waits,
    )  # fmt: skip
    kinds = team.share("devices", device.type)
    found = {"gloo": check_collectives(team.index, len(team.members), cpu)}
    group, between = None, cpu
    if set(kinds.values()) == {"cuda"} and len(team.members) > 1:
        group, between = dist.new_group(backend="nccl", timeout=waits), device
        found["nccl"] = check_collectives(team.index, len(team.members), device, group)
    teller.tell("collectives", found)
    sound = team.share("collectives", not any(problem for each in found.values() for problem in each.values()))
    if all(sound.values()):
        _bandwidth(team, place, indices, between, group, teller)
    team.share("exchanged")
    dist.destroy_process_group()


def _bandwidth(
    team: Meeting, place: Place, indices: Mapping[int, int], device: Any, group: Any, teller: Teller
) -> None:
    leaders = [rank for rank in team.members if rank % place.processes == 0]
    if len(leaders) < 2 or place.rank not in leaders:
        return
    each = team.of(leaders, "pairs")
    best: dict[int, dict[str, float]] = {}
    for number in range(_TRIES):
        for other, found in measure_pairs(each, indices, device, group, f"pairs {number}").items():
            kept = best.setdefault(other, found)
            kept["bytes_per_s"] = max(kept["bytes_per_s"], found["bytes_per_s"])
            kept["latency_s"] = min(kept["latency_s"], found["latency_s"])
        told = each.share(f"measured {number}", {str(other): found["bytes_per_s"] for other, found in best.items()})
        rates = {(one, int(other)): rate for one, rates in told.items() for other, rate in rates.items()}
        if slow_nodes(rates) == ({}, {}):
            break
    teller.tell("pairs", best)
