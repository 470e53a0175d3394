"""How processes find each other: names, addresses, interfaces, ports, and what earlier launchers left behind."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.doctor.machine.processes import infiniband_adapters
from distrain.system.environment import STARTERS, interfaces_here, missing_interfaces, own_start
from distrain.system.errors import UserError, some

_PORTS = 1024
"""Ports that are chosen by the kernel, below which many processes with many peers run out of them."""
_SIOCGIFFLAGS = 0x8913


def loopback(context: Context) -> Iterator[Finding]:
    """Whether processes of this machine reach each other on a port of 127.0.0.1."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=10) as ours,
            server.accept()[0] as theirs,
        ):
            theirs.sendall(b"distrain")
            ours.recv(8)
    except OSError as problem:
        yield error(
            f"a connection to 127.0.0.1 fails: {problem.strerror or problem}",
            "processes of this machine do not meet: a run with two or more of them does not start",
            "bring the interface up (ip link set lo up), and see that no firewall refuses connections to 127.0.0.1",
        )
        return
    first, last = _port_range()
    if last - first + 1 < _PORTS:
        yield warning(
            f"the kernel chooses among {last - first + 1} ports ({first} to {last})",
            "each process has a connection to each other one: with many of them ports run out",
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        )
    else:
        yield ok(f"127.0.0.1 answers; ports {first} to {last}")


def _port_range() -> tuple[int, int]:
    with suppress(OSError, ValueError):
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        return first, last
    return 32768, 60999


def host_name(context: Context) -> Iterator[Finding]:
    """Whether the name of this machine leads to an address that it has."""
    name = socket.gethostname()
    if context.nodes > 1 and (chosen := context.variables.get("GLOO_SOCKET_IFNAME")) in interfaces_here():
        yield ok(f"not asked for: Gloo takes the address of {chosen}")
        return
    say = error if context.nodes > 1 else warning
    add = f"add a line to /etc/hosts, or an entry to the DNS, that gives {name} the address of this machine's network"
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as problem:
        yield say(
            f"the name {name} has no address: {problem.strerror or problem}",
            "Gloo takes the loopback interface in its place, so that processes of other machines do not find this one",
            add,
        )
        return
    own = [each for each in found if _is_own(each)]
    if not own:
        yield say(
            f"the name {name} leads to {some(found)}, which this machine does not have",
            "others connect to another machine, and Gloo takes the loopback interface here",
            f"correct it: {add}",
        )
    elif context.nodes > 1 and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in own):
        yield error(
            f"the name {name} leads to {some(own)} alone",
            "this machine tells others an address at which each of them finds itself",
            f"take the line with {some(own)} {name} out of /etc/hosts, and {add}",
        )
    else:
        yield ok(f"{name}: {some(own)}")


def _is_own(address: str) -> bool:
    """Whether this machine has an address: one can only listen at such."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((address, 0))
        return True
    return False


def interfaces(context: Context) -> Iterator[Finding]:
    """Whether the interfaces and adapters that variables name are there, and up."""
    variables, there = context.variables, interfaces_here()
    problem = False
    for name in missing_interfaces(variables):
        problem = True
        yield (error if context.nodes > 1 else warning)(
            f"{name}={variables[name]}, and this machine has {some(there, 10)}",
            "a run on this machine ignores it; one of several is refused, as they could not reach each other",
            f"name an interface that is there, or unset {name}: `export {name}={_best(there)}`",
        )
    named = _named(variables.get("GLOO_SOCKET_IFNAME", "")) + _named(variables.get("NCCL_SOCKET_IFNAME", ""))
    for name in dict.fromkeys(each for each in named if each in there and not _is_up(each)):
        problem = True
        yield error(
            f"the interface {name} that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names is down",
            "processes wait for connections over it until they time out",
            f"ip link set {name} up, or name another: {some([each for each in there if _is_up(each)])}",
        )
    adapters = infiniband_adapters()
    asked = _named(variables.get("NCCL_IB_HCA", ""))
    if lacking := [each for each in asked if not any(own.startswith(each) for own in adapters)]:
        problem = True
        yield error(
            f"NCCL_IB_HCA={variables['NCCL_IB_HCA']}: no adapter {some(lacking)}, "
            f"{f'it has {some(adapters)}' if adapters else 'this machine has no InfiniBand'}",
            "NCCL finds no adapter and takes sockets, many times slower, or fails",
            "name an adapter that is there (ls /sys/class/infiniband), or unset NCCL_IB_HCA",
        )
    if not problem:
        up = [each for each in there if _is_up(each)]
        yield ok(f"up: {some(up, 10) or 'none'}{f'; InfiniBand {some(adapters)}' if adapters else ''}")


def _named(text: str) -> list[str]:
    """Return the names of a variable such as `=eth0,mlx5_0:1`; nothing of one that excludes some."""
    if text.startswith("^"):
        return []
    return [each.partition(":")[0] for each in text.removeprefix("=").split(",") if each.partition(":")[0]]


def _is_up(name: str) -> bool:
    with suppress(OSError), socket.socket() as any_socket:  # /sys may show the interfaces of another namespace
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sh14x", name.encode(), 0))
        return bool(struct.unpack("16sh14x", answer)[1] & 1)
    return False


def _best(there: list[str]) -> str:
    return next((each for each in there if each != "lo" and _is_up(each)), "lo")


def leftovers(context: Context) -> Iterator[Finding]:
    """Whether variables of a launcher are there that did not start this."""
    if context.nodes > 1:
        return  # this process is one of several: a launcher has set them for it
    names = set(missing_interfaces(context.variables))  # said with the interfaces
    variables = {name: value for name, value in context.variables.items() if name not in names}
    try:
        notes = own_start(variables, None)
    except UserError as problem:
        first = str(problem).splitlines()[0]
        unset = " ".join(f"-u {name}" for name in sorted(set(context.variables) & _WORLD))
        yield error(
            first,
            "a run is refused unless --processes says how many: it might be one of several that wait for each other",
            f"env {unset} distrain ...",
        )
        return
    if notes:
        yield warning(
            "; ".join(notes),
            "distrain ignores them; other programs that start here, such as accelerate, do not",
            "unset them where the shell, the container or the job sets them",
        )
    else:
        yield ok("no variables of other launchers")


_WORLD = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_WORLD.update(name for names in STARTERS.values() for name in names)


def preloaded(context: Context) -> Iterator[Finding]:
    """Whether libraries that are loaded before all others, or found before PyTorch's own, are there and belong."""
    problem = False
    for each in context.variables.get("LD_PRELOAD", "").replace(":", " ").split():
        if "/" in each and not Path(each).exists():
            problem = True
            yield warning(
                f"LD_PRELOAD={each}, and there is nothing",
                "each process prints an error when it starts, and lacks what the library was to do",
                "correct or unset LD_PRELOAD",
            )
    for folder in dict.fromkeys(context.variables.get("LD_LIBRARY_PATH", "").split(":")):
        found = sorted(each.name for kind in _OURS for each in Path(folder).glob(f"{kind}.so*")) if folder else []
        if found:
            problem = True
            yield warning(
                f"LD_LIBRARY_PATH has {folder}, with {some(found)}",
                "PyTorch may load these in place of those that it was built with: errors of CUDA, or wrong speed",
                "take the folder out of LD_LIBRARY_PATH: PyTorch brings its own",
            )
    if not problem:
        yield ok("nothing before PyTorch's own")


_OURS = ("libcudnn", "libnccl", "libtorch")
