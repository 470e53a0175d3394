"""Reporting why a process failed: on the terminal, in the rank's log, in FAILED.json."""

from __future__ import annotations

import logging
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from distrain.config import UserError
from distrain.run.folder import RunDir
from distrain.run.lease import Lease
from distrain.system.environment import under_torch_launcher
from distrain.system.logs import EACH_RANK, FILE_ALONE, show_on_terminal
from distrain.system.output import lines

logger = logging.getLogger(__name__)


def reported(
    run: RunDir | None,
    rank: int,
    action: Callable[[], Any],
    lease: Lease | None = None,
    failures: list[BaseException] | None = None,
) -> int:
    """Run `action`; returns 0, or 1 after reporting why it failed: on the terminal, in the rank's log, in FAILED.json.

    When several ranks fail only the first to record it reports, so that one cause is one message; a rank that failed
    because of another leaves it to that one. Without a run, rank 0 reports, and every rank with a traceback.
    An attempt whose `lease` was replaced leaves no FAILED.json in what is now another's run. A list of `failures` gets
    the exception, for a caller that raises it again: then the terminal shows nothing here.
    """
    show_on_terminal()
    try:
        action()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        report(run, rank, error, lease, shown=failures is None)
        if failures is not None:
            failures.append(error)
        return 1


def report(
    run: RunDir | None, rank: int, error: BaseException, lease: Lease | None = None, *, shown: bool = True
) -> None:
    """Report why this process failed, as `reported` does; on the terminal only where it is `shown` there."""
    teaches = isinstance(error, UserError)
    text = str(error) if teaches else "".join(traceback.format_exception(error))
    if not teaches and (faults := gpu_faults_behind(error)):
        text += "the driver reports: " + "; ".join(faults) + "\n"
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "error": type(error).__name__,
        "message": lines(error),
        "traceback": None if teaches else lines(text),
        # another attempt would meet again what the user has to mend
        "restart": getattr(error, "restart", not teaches),
    }
    told = getattr(error, "of_another_rank", False)
    first = rank == 0 or not (teaches or told) or getattr(error, "of_each_process", False)
    if run is not None and run.exists and (lease is None or lease.mine()):
        try:
            first = not told and run.mark_failed(record)
        except OSError as disk:
            logger.warning("FAILED.json could not be written: %s", disk, extra=EACH_RANK)
    logger.error("%s", text if teaches else f"\n{text}", extra=EACH_RANK if first and shown else FILE_ALONE)
    if not first and run is None and not told:
        leave_to_rank_0(rank, error)


def gpu_faults_behind(error: BaseException) -> list[str]:
    """Return what the driver reports of this machine's GPUs, where an error can come of that."""
    words = ("CUDA", "NCCL", "CUBLAS", "CUDNN")
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in words):
        return []
    from distrain.diagnose.hang_diagnosis import gpu_faults

    return gpu_faults()


def leave_to_rank_0(rank: int, error: BaseException) -> None:
    """Let rank 0 report what every rank has found; report it where rank 0 has not.

    torch's launchers end all processes as soon as one has left: rank 0 too, before it has come so far.
    """
    if under_torch_launcher():
        time.sleep(30)
        logger.error("%s", error, extra=EACH_RANK)
