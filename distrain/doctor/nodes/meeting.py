"""How ranks meet: at the address of the first node, as those of a run do, and nobody is waited for without end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

STEP_S = 60.0
"""How long ranks that have met wait for each other between two steps."""
CONNECT_S = 5.0
"""How long an attempt to connect may take."""


@dataclass(frozen=True)
class Place:
    """Which rank this is, and where it meets the others."""

    rank: int
    node: int
    nodes: int
    processes: int
    """On each node."""
    address: str
    """Of the first node, as the others reach it."""
    port: int
    limit_s: float
    """How long a rank waits for the next one to come."""

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.processes

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.rank % self.processes == 0


class Absent(Exception):
    """Ranks that had come, and did not come to a later step."""

    def __init__(self, step: str, ranks: Sequence[int]):
        super().__init__(step)
        self.step, self.ranks = step, list(ranks)


class Meeting:
    """Ranks that have met, and speak through the store of rank 0. Every method is called by all `members`."""

    def __init__(self, store: Store, rank: int, members: Sequence[int], name: str = "all", step_s: float = STEP_S):
        self.store, self.rank, self.members, self.name, self.step_s = store, rank, list(members), name, step_s

    def of(self, members: Sequence[int], name: str) -> Meeting:
        """Return those of the members that are named; `name` is no other meeting's."""
        return Meeting(self.store, self.rank, members, name, self.step_s)

    @property
    def index(self) -> int:
        """The number of this rank among the members."""
        return self.members.index(self.rank)

    def share(self, step: str, value: Any = None) -> dict[int, Any]:
        """Return what every member gives for this step, by rank. Raises Absent for those that do not come to it."""
        keys = {rank: f"{self.name}/{step}/{rank}" for rank in self.members}
        self.store.set(keys[self.rank], json.dumps(value))
        wait_for(self.store, keys, step, self.step_s)
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items()}


def wait_for(store: Store, keys: Mapping[int, str], step: str, limit_s: float) -> None:
    """Wait until each rank has set its key; raises Absent with those that have not within the limit."""
    try:
        store.wait(list(keys.values()), timedelta(seconds=limit_s))
    except RuntimeError as error:  # of which torch's own errors are
        missing = []
        for rank, key in keys.items():
            try:
                if not store.check([key]):
                    missing.append(rank)
            except RuntimeError:  # with rank 0 the store has gone
                raise Absent(step, [0]) from error
        raise Absent(step, missing) from error


def connect(address: str, port: int, until: float, source: str | None = None) -> dict[str, Any]:
    """Try to connect until that is possible, or the time `until` (of time.monotonic) has come.

    Returns how that went: `problem` is None, `refused`, `no answer`, or what the system said; `own` is the address of
    this side.
    """
    began, problem = time.monotonic(), "no answer"
    while True:
        left = until - time.monotonic()
        try:
            with socket.create_connection(
                (address, port), max(0.1, min(CONNECT_S, left)), (source, 0) if source else None
            ) as made:
                return {"problem": None, "own": made.getsockname()[0], "seconds": time.monotonic() - began}
        except TimeoutError:
            problem = "no answer"
        except ConnectionRefusedError:
            problem = "refused"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() + 0.2 > until:
            return {"problem": problem, "own": None, "seconds": time.monotonic() - began}
        time.sleep(0.2)


def arrive(store: Store, place: Place) -> list[int]:
    """Return the ranks that have come, the same on each of them; the others came too late, or never.

    Rank 0 waits for the next one `limit_s` at most. Raises Absent where rank 0 does not tell.
    """
    store.set(f"here/{place.rank}", "")
    if place.rank != 0:
        wait_for(store, {0: "members"}, "arrival", place.limit_s * 4 + STEP_S)
        members: list[int] = json.loads(store.get("members"))
        return members
    came, last = {0}, time.monotonic()
    while len(came) < place.world_size and time.monotonic() - last < place.limit_s:
        new = {rank for rank in set(range(place.world_size)) - came if store.check([f"here/{rank}"])}
        if new:
            came |= new
            last = time.monotonic()
        else:
            time.sleep(0.05)
    store.set("members", json.dumps(sorted(came)))
    return sorted(came)


def connect_all(team: Meeting, own: str) -> dict[int, str | None]:
    """Connect to every other rank of the team, at a port that the system chooses; `own` is where others reach this one.

    Returns what was wrong with each connection, None: nothing. It is such ports that collectives use.
    """
    with socket.create_server(("", 0), backlog=len(team.members) + 8) as server:
        ended = threading.Event()

        def accept() -> None:
            server.settimeout(0.2)
            while not ended.is_set():
                with suppress(OSError):
                    server.accept()[0].close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        places = team.share("listening", [own, server.getsockname()[1]])
        others = [rank for rank in team.members if rank != team.rank]
        until = time.monotonic() + CONNECT_S
        with ThreadPoolExecutor(max_workers=32) as pool:
            found = pool.map(lambda rank: connect(places[rank][0], places[rank][1], until)["problem"], others)
            problems = dict(zip(others, found, strict=True))
        team.share("connected")
        ended.set()
        thread.join()
    return problems


def connected(problems: Mapping[int, Mapping[int, str | None]]) -> list[int]:
    """Return the largest part of a team, as it is found quickly, in which all reach each other. Pure.

    `problems` has for each rank what was wrong with its connections.
    """
    left = sorted(problems)
    while True:
        failing = {
            one: sum(1 for other in left if problems[one].get(other) or problems[other].get(one)) for one in left
        }
        worst = max(left, key=lambda one: (failing[one], one))
        if not failing[worst]:
            return left
        left.remove(worst)
