"""Loader processes: how a batch leaves one, and what is said when none comes.

A loader process pickles its batch itself, which also puts the tensors into shared memory. Left to the queue's own
thread, as PyTorch does by default, a batch that cannot be sent is printed as a traceback and lost, and the training
process waits for it for ever.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from distrain.config import UserError
from distrain.datasets import waiting
from distrain.datasets.base import Batch
from distrain.datasets.batches import Batches, Failure, Place, StreamBatches
from distrain.datasets.waiting import Wait, looked_at
from distrain.run.heartbeat import listen_in_loader, open_loader_notes

SHARED_MEMORY = Path("/dev/shm")
"""Where tensors pass from process to process."""

_SPARE_FILES = 8
"""Descriptors that sending a batch may need beside those of its tensors, among others to answer who fetches one."""

_CANNOT_TAKE = "the training process cannot take a batch from a loader process"


@dataclass(frozen=True)
class Parcel:
    """A batch as a loader process hands it over."""

    pickled: bytes
    """By torch's pickler: tensors are in shared memory, and this refers to them."""

    def open(self) -> Batch:
        """Return the batch. Raises UserError where this process cannot take what was sent."""
        try:
            batch: Batch = ForkingPickler.loads(self.pickled)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # who sent it is no longer there to answer
            raise UserError(_ended(f"its batch cannot be taken ({type(error).__name__})")) from error
        except (OSError, RuntimeError) as error:
            raise UserError(cannot_share(error, _CANNOT_TAKE)) from error
        return batch

    def pin_memory(self) -> Batch | Failure:
        """Return the batch in pinned memory. PyTorch's pinning thread calls it, whose exceptions lose their words."""
        try:
            return _pinned(self.open())
        except UserError as error:
            return Failure(str(error))


def load(
    batches: Batches | StreamBatches, places: Iterable[Place] | None, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches in order, made by `workers` processes, or here where that is 0.

    Raises UserError for what went wrong in a loader process, in the words in which it would have been raised here, and
    for processes that cannot start, end early, or cannot hand over a batch. `close()` ends the processes.
    """
    wait = Wait(workers)
    if workers == 0:
        noted = wait.noting(places or ())
        made = batches.batches() if isinstance(batches, StreamBatches) else map(batches.batch, noted)
        if pin_memory:
            made = map(_pinned, made)
        with looked_at(wait):
            while True:
                with wait.for_batch():
                    batch = next(made, None)
                if batch is None:
                    return
                yield batch
    others = set(multiprocessing.active_children())
    iterator = _started(batches, None if places is None else wait.noting(places), workers, pin_memory)
    processes = wait.processes = [each for each in multiprocessing.active_children() if each not in others]
    # They ignore SIGTERM, and at its end Python waits for all of its processes: one that hangs would keep it for ever.
    kill = Finalize(None, _kill, (processes,), exitpriority=10)
    try:
        while True:
            with wait.for_batch(), _explained():
                item = _taken(iterator, wait, kill)
                if isinstance(item, Parcel):
                    item = item.open()
            if item is None:
                return
            if isinstance(item, Failure):
                raise UserError(item.message)
            yield item
    finally:
        del iterator  # asks them to end, and waits for some seconds
        kill()


def _taken(iterator: Iterator[Any], wait: Wait, give_up: Callable[[], Any]) -> Any:
    """Return what comes next, None at the end. What a look at the wait raises ends it, after a call of `give_up`."""
    pinning = getattr(iterator, "_pin_memory_thread", None)
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            # nothing is lost: the next call waits for the same batch
            if pinning is not None and not pinning.is_alive():
                raise RuntimeError("the thread that puts batches into pinned memory ended") from error
        try:
            wait.look()
        except BaseException:
            give_up()
            raise


def _started(
    batches: Batches | StreamBatches, places: Iterable[Place] | None, workers: int, pin_memory: bool
) -> Iterator[Any]:
    open_loader_notes()
    # Forked processes share the data with this one. They never touch a GPU, so a device that is in use is no matter.
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        collate_fn=_packed,  # type: ignore[arg-type] # of one batch, as the sampler gives places of whole batches
        pin_memory=pin_memory,
        worker_init_fn=_begin_loading,
        multiprocessing_context=context,
        timeout=min(waiting.LOOK_EVERY_S, waiting.SAY_AFTER_S / 4),  # then it is looked at, and waited for again
        # A generator of its own: the default one draws from the global random state, which would then depend on this.
        generator=torch.Generator(),
    )
    # PyTorch would have a signal handler raise in whatever line the training process is in when a loader process ends,
    # be it in the middle of saving. Asked for a batch, it finds out as well, within the timeout.
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        iterator = iter(loader)
    except OSError as error:
        raise UserError(cannot_share(error, f"data.workers is {workers}, and they cannot start")) from error
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _kill(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _begin_loading(worker: int) -> None:
    # Schedulers signal every process of a job, and the one that trains decides what a signal means. A loader process
    # that died of it would end the run before the state is saved. Without its parent it ends by itself.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    listen_in_loader(worker)


def _packed(batch: Batch | Failure) -> Parcel | Failure:
    """Return what a loader process puts into the queue: something that the queue cannot fail on."""
    if isinstance(batch, Failure):
        return batch
    try:
        _check_descriptors()
        return Parcel(bytes(ForkingPickler.dumps(batch)))
    except Exception as error:  # whatever it is, the training process has to hear of it
        worker = get_worker_info()
        name = f"loader process {worker.id}" if worker is not None else "a loader process"
        return Failure(cannot_share(error, f"{name} cannot hand over a batch of {_nbytes(batch) / 2**20:.1f} MiB"))


def _check_descriptors() -> None:
    """Raise OSError where this process has hardly any file descriptors left."""
    taken: list[int] = []
    try:
        for _ in range(_SPARE_FILES):
            taken.append(os.dup(0 if not taken else taken[0]))
    finally:
        for each in taken:
            os.close(each)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(_ended(str(error))) from error
        if "Too many open files" in str(error):
            raise UserError(cannot_share(error, _CANNOT_TAKE)) from error
        raise


def _ended(why: str) -> str:
    return (
        f"a loader process ended: {why}\nit may have been killed for want of memory ({_shared_memory()}); try fewer "
        "data.workers, or 0 to see its own error"
    )


def cannot_share(error: Exception, what: str) -> str:
    """Return what is said where processes cannot share a batch, or cannot start: why, and what to do."""
    text, number = " ".join(str(error).split()), getattr(error, "errno", None)
    if number == errno.EMFILE or "Too many open files" in text or "ancdata" in text:
        cure = "this process may open too few files: raise the limit (ulimit -n), or take fewer data.workers"
    elif "shared memory" in text or number == errno.ENOSPC:
        cure = (
            f"{_shared_memory()}; enlarge it (in a container: --shm-size), take fewer data.workers or a smaller "
            "batch.micro, or data.workers=0, which needs none"
        )
    elif isinstance(error, OSError):
        cure = "the machine may allow no more processes or memory; take fewer data.workers, or 0"
    else:
        cure = "what a Dataset or transform returns must be tensors, numbers and text; data.workers=0 sends nothing"
    return f"{what}: {type(error).__name__}: {text}\n{cure}"


def _shared_memory() -> str:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"the shared memory {SHARED_MEMORY} cannot be looked at: {error.strerror}"
    free, size = (count * room.f_frsize / 2**20 for count in (room.f_bavail, room.f_blocks))
    return f"the shared memory {SHARED_MEMORY} has {free:,.0f} of {size:,.0f} MiB free"


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def _pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    return {key: _pinned(each) for key, each in value.items()} if isinstance(value, dict) else value
