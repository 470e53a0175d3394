"""What runs once on each node: it tells what the node is, starts the ranks, and then checks the machine."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from distrain.config import UserError
from distrain.doctor.command import examine
from distrain.doctor.context import make_context
from distrain.doctor.nodes.facts import facts
from distrain.doctor.nodes.lines import Teller
from distrain.doctor.nodes.meeting import Place
from distrain.doctor.nodes.rank import run_rank
from distrain.launchers.slurm.node import node_rank, processes_here, scratch_folder, set_environment
from distrain.system.environment import forget_launchers, use_interfaces
from distrain.system.importing import importing
from distrain.system.output import error_line
from distrain.system.processes import end_with_parent

_RANKS_S = 300.0
"""How long ranks may take beyond the time in which they wait for each other to come."""


def run_node(options: argparse.Namespace) -> int:
    """Do all that is done on this node; returns the exit status, 0 also where much is wrong."""
    names = [each for each in options.names.split(",") if each] or [socket.gethostname()]
    node = node_rank(len(names), os.environ)
    teller = Teller(node)
    given = dict(os.environ)
    forget_launchers(os.environ)
    processes = processes_here(options.processes)
    address = options.address if len(names) > 1 else "127.0.0.1"
    asked = {"cpus": options.cpus, "gpus": options.gpus, "processes": processes}
    told = facts(names, options.address if len(names) > 1 else "", options.folder, given)
    teller.tell("facts", told | {"asked": asked, "port": options.port})
    use_interfaces(os.environ, alone=True)  # a wrong name is told by the facts; here it would end the rest
    with ExitStack() as stack:
        try:
            stack.enter_context(scratch_folder(options.scratch or None, os.environ))
            set_environment(os.environ, processes, address if len(names) > 1 else "", options.interface or None)
        except UserError as error:
            teller.tell("environment", str(error))
        if _import_torch(teller):
            port = options.port or _free_port()
            _run_ranks(Place(0, node, len(names), processes, address, port, options.limit), options.folder)
        if name := os.environ.get("GLOO_SOCKET_IFNAME"):  # as a run has it
            given.setdefault("GLOO_SOCKET_IFNAME", name)
        source, overrides = next(iter(options.looked_at), None), options.looked_at[1:]
        run_dir = options.run_dir or (str(options.folder) if source is None else None)
        context = make_context(
            source, overrides, run_dir=run_dir, processes=processes, nodes=len(names), variables=given
        )
        for each in examine(context).findings:
            teller.tell("finding", each.to_json())
    teller.tell("done")
    return 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@importing()
def _import_torch(teller: Teller) -> bool:
    """Import once what all ranks need, and tell what it was built with."""
    try:
        import torch
        import torch.distributed
    except Exception as error:
        teller.tell("torch", {"problem": error_line(error)})
        return False
    versions = {"CUDA of torch": torch.version.cuda or "none"}
    with suppress(Exception):  # asked of a library that a build for CPUs does not have
        if torch.distributed.is_nccl_available():
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    teller.tell("torch", {"problem": None, "versions": versions | {"torch, imported": torch.__version__}})
    return True


def _run_ranks(first: Place, folder: Path) -> None:
    """Fork the ranks of this node and wait for them; one that does not end is killed."""
    running: dict[int, int] = {}
    for local in range(first.processes):
        place = replace(first, rank=first.node * first.processes + local)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_rank(place, folder)
        running[pid] = place.rank
    until = time.monotonic() + 5 * first.limit_s + _RANKS_S
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            code, rank = os.waitstatus_to_exitcode(status), running.pop(pid)
            if code:
                Teller(first.node, rank).tell("died", code)
        elif time.monotonic() > until:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until += 5.0
        else:
            time.sleep(0.05)


def _be_rank(place: Place, folder: Path) -> None:
    """Be a rank, in a process of its own, to its end."""
    code = 1
    try:
        end_with_parent(signal.SIGKILL)
        run_rank(place, folder, Teller(place.node, place.rank))
        code = 0
    finally:
        os._exit(code)
