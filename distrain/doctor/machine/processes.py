"""What the operating system lets the processes of a run have: CPUs, threads, files, memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning

_FILES_OF_A_PROCESS = 256
"""Open files of a process that trains: libraries, sockets to its peers, a log, shards of data and checkpoints."""
_FILES_OF_A_WORKER = 32
"""Open files that each loader process adds to it: pipes, and tensors on their way."""


def open_files(context: Context) -> Iterator[Finding]:
    """The limit of open files of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    needed = _FILES_OF_A_PROCESS + _FILES_OF_A_WORKER * context.workers
    may = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    if soft == resource.RLIM_INFINITY or soft >= max(needed, 1024):
        yield ok(f"a process may open {most}")
        return
    raised = f"ulimit -n {may if hard != resource.RLIM_INFINITY and hard < 65536 else 65536}"
    where = f"raise it with `{raised}` before the start" if hard == resource.RLIM_INFINITY or hard > soft else (
        "have the administrator raise it (limits.conf, or LimitNOFILE of the service that starts jobs)"
    )  # fmt: skip
    found = f"a process may open {most} files, and {may} once it is raised"
    if soft < needed:
        yield error(
            found, f"a run needs about {needed}: its loaders or its checkpoints fail with 'Too many open files'", where
        )
    else:
        yield warning(found, "enough for this run; data in many files, and many processes, need more", where)
