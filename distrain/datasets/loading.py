"""Loader processes: how they hand over batches, and errors when they cannot.

A loader process pickles its batch itself, once the tensors are in shared memory. PyTorch leaves that to the queue's
thread, which prints a traceback and loses a batch that it cannot send, so the training process would wait forever.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from distrain.config import UserError
from distrain.datasets import waiting
from distrain.datasets.base import Batch
from distrain.datasets.batches import END, Batches, Failure, Place, StreamBatches
from distrain.datasets.nested import map_tensors, tensors_in
from distrain.datasets.slots import Receiver, Sent, send, start_sending
from distrain.datasets.waiting import Wait, watched
from distrain.run.heartbeat import listen_in_loader, open_loader_notes
from distrain.system.logs import EACH_RANK
from distrain.system.open_files import own_places

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches that each loader process makes ahead."""

SHARED_MEMORY = Path("/dev/shm")
"""Memory through which tensors pass between processes."""

_CANNOT_RECEIVE = "the training process cannot receive a batch from a loader process"


_receiver = Receiver()


@dataclass(frozen=True)
class Parcel:
    """A batch from a loader process."""

    sent: Sent

    def open(self) -> Batch:
        """Return the batch. Raises UserError if this process cannot receive it."""
        try:
            batch: Batch = _receiver.receive(self.sent)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # the sender is gone
            raise UserError(_ended(f"its batch cannot be received ({type(error).__name__})")) from error
        except (OSError, RuntimeError) as error:
            raise UserError(cannot_share(error, _CANNOT_RECEIVE)) from error
        return batch

    def pin_memory(self) -> Batch | Failure:
        """Return the batch in pinned memory. Called by PyTorch's pinning thread, which loses the text of exceptions."""
        try:
            return _pinned(self.open())
        except UserError as error:
            return Failure(str(error))


def load(
    batches: Batches | StreamBatches, places: Iterable[Place] | None, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches in order, made by `workers` processes, or in this one if that is 0.

    Raises UserError for errors in a loader process, with the text that they would have here, and for processes that
    cannot start, end early, or cannot hand over a batch. `close()` ends the processes.
    """
    if workers == 0:
        yield from _made_here(batches, places, pin_memory)
        return
    loader = LoaderProcesses(batches, places, workers, pin_memory)
    try:
        while (batch := loader.next()) is not None:
            yield batch
    finally:
        loader.close()


def _made_here(batches: Batches | StreamBatches, places: Iterable[Place] | None, pin_memory: bool) -> Iterator[Batch]:
    wait = Wait(0)
    noted = wait.noting(places or ())
    made = batches.batches() if isinstance(batches, StreamBatches) else map(batches.batch, noted)
    if pin_memory:
        made = map(_pinned, made)
    with watched(wait):
        while True:
            with wait:
                batch = next(made, None)
            if batch is None:
                return
            yield batch


class LoaderProcesses:
    """Processes that make batches in turn, until `close`."""

    def __init__(
        self, batches: Batches | StreamBatches, places: Iterable[Place] | None, workers: int, pin_memory: bool
    ):
        self._wait = wait = Wait(workers)
        others = set(multiprocessing.active_children())
        noted = None if places is None else wait.noting(places)
        self._iterator: Iterator[Any] | None = _started(batches, noted, workers, pin_memory)
        wait.processes = processes = [each for each in multiprocessing.active_children() if each not in others]
        # they ignore SIGTERM, and Python waits for its processes at exit: one that hangs would keep it forever
        self._kill = Finalize(None, _kill, (processes,), exitpriority=10)

    def next(self) -> Batch | None:
        """Return the next batch; None after the last one, and at END. Raises UserError as `load` does."""
        assert self._iterator is not None
        with self._wait, _user_errors():
            item = _received(self._iterator, self._wait, self._kill)
            if isinstance(item, Parcel):
                item = item.open()
        if isinstance(item, Failure):
            raise UserError(item.message)
        batch: Batch | None = item
        return batch

    def are_alive(self) -> bool:
        """Whether none has ended."""
        return all(process.is_alive() for process in self._wait.processes)

    def close(self) -> None:
        """End the processes."""
        self._iterator = None  # asks them to end, and waits some seconds
        self._kill()
        for process in self._wait.processes:
            if process.pid is not None:
                _receiver.forget(process.pid)


class Passes:
    """Passes over the same places, one after the other, by loader processes that stay between them.

    Between passes they have nothing to do, and nothing is loaded ahead. A pass that is left early ends them, and so
    does an error; the next pass starts others.
    """

    def __init__(self, batches: Batches, places: Sequence[Place], workers: int, pin_memory: bool):
        self._batches, self._places, self._workers, self._pin_memory = batches, places, workers, pin_memory
        self._loader: LoaderProcesses | None = None
        self._complete = True

    def start(self) -> None:
        """Start the processes, if there are none."""
        if self._loader is not None and self._complete and not self._loader.are_alive():
            logger.warning(
                f"a loader process ended while it was idle: {_shared_memory()}, and memory may be short; others start",
                extra=EACH_RANK,
            )
        if self._loader is None or not self._complete or not self._loader.are_alive():
            self.close()
            self._loader = LoaderProcesses(self._batches, self._endless(), self._workers, self._pin_memory)

    def one(self) -> Iterator[Batch]:
        """Yield the batches of a pass, as `load` does."""
        self.start()
        loader, self._complete = self._loader, False
        assert loader is not None
        try:
            for _ in range(self._ahead):
                loader.next()
            while (batch := loader.next()) is not None:
                yield batch
            self._complete = True
        finally:
            if not self._complete:
                loader.close()

    def close(self) -> None:
        """End the processes."""
        if self._loader is not None:
            self._loader.close()
        self._loader, self._complete = None, True

    @property
    def _ahead(self) -> int:
        return PREFETCH * self._workers

    def _endless(self) -> Iterator[Place]:
        """Yield the places of all passes, with as many ENDs before each as are asked for ahead of the first batch."""
        while True:
            yield from (END for _ in range(self._ahead))
            yield from self._places
            yield END


def _received(iterator: Iterator[Any], wait: Wait, give_up: Callable[[], Any]) -> Any:
    """Return the next item, None at the end. An exception of `wait.check` ends the wait, after a call of `give_up`."""
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
            wait.check()
        except BaseException:
            give_up()
            raise


def _started(
    batches: Batches | StreamBatches, places: Iterable[Place] | None, workers: int, pin_memory: bool
) -> Iterator[Any]:
    open_loader_notes()
    # forked processes share the data with this one; they never touch a GPU, so one in use does not matter
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_packed,  # type: ignore[arg-type] # gets one batch, as the sampler yields places of batches
        pin_memory=pin_memory,
        worker_init_fn=_begin_loading,
        multiprocessing_context=context,
        timeout=min(waiting.CHECK_EVERY_S, waiting.WARN_AFTER_S / 4),  # then the wait is checked and continued
        generator=torch.Generator(),  # the default one would draw from the global random state
    )
    # PyTorch's signal handler would raise in any line of the training process when a loader process ends, even in the
    # middle of saving. The next request for a batch finds out too, within the timeout.
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        iterator = iter(loader)
    except OSError as error:
        raise UserError(cannot_share(error, f"data.workers is {workers}, but they cannot start")) from error
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _kill(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _begin_loading(worker: int) -> None:
    # schedulers signal every process of a job, and the training process decides what a signal means: a loader process
    # that died of it would end the run before the state is saved; it ends by itself without its parent
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    own_places()
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, StreamBatches):
        # the only process that reads a stream: one that asks would shuffle in another way than in the training process
        torch.utils.data._utils.worker._worker_info = None
    listen_in_loader(worker)
    start_sending()


def _packed(batch: Batch | Failure | None) -> Parcel | Failure | None:
    """Return what a loader process puts into the queue, which the queue can always send."""
    if batch is None or isinstance(batch, Failure):
        return batch
    try:
        return Parcel(send(batch))
    except Exception as error:  # the training process must learn of any error
        worker = get_worker_info()
        name = f"loader process {worker.id}" if worker is not None else "a loader process"
        return Failure(
            cannot_share(
                error,
                f"{name} cannot hand over a batch of {sum(each.nbytes for each in tensors_in(batch)) / 2**20:.1f} MiB",
            )
        )


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(_ended(str(error))) from error
        if "Too many open files" in str(error):
            raise UserError(cannot_share(error, _CANNOT_RECEIVE)) from error
        raise


def _ended(why: str) -> str:
    return (
        f"a loader process ended: {why}\nit may have been killed for lack of memory ({_shared_memory()}); try fewer "
        "data.workers, or 0 to see its own error"
    )


def cannot_share(error: Exception, what: str) -> str:
    """Return the error for processes that cannot share a batch or start: the reason, and what to do."""
    text, number = " ".join(str(error).split()), getattr(error, "errno", None)
    if number == errno.EMFILE or "Too many open files" in text or "ancdata" in text:
        cure = "this process may open too few files: raise the limit (ulimit -n), or use fewer data.workers"
    elif "shared memory" in text or number == errno.ENOSPC:
        cure = (
            f"{_shared_memory()}; enlarge it (in a container: --shm-size), use fewer data.workers or a smaller "
            "batch.micro, or data.workers=0, which needs none"
        )
    elif isinstance(error, OSError):
        cure = "the machine may allow no more processes or memory; use fewer data.workers, or 0"
    else:
        cure = "a Dataset or transform must return tensors, numbers and text; data.workers=0 sends nothing"
    return f"{what}: {type(error).__name__}: {text}\n{cure}"


def _shared_memory() -> str:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return f"the shared memory {SHARED_MEMORY} cannot be read: {error.strerror}"
    free, size = (count * room.f_frsize / 2**20 for count in (room.f_bavail, room.f_blocks))
    return f"the shared memory {SHARED_MEMORY} has {free:,.0f} of {size:,.0f} MiB free"


def _pinned(batch: Batch) -> Batch:
    pinned: Batch = map_tensors(torch.Tensor.pin_memory, batch)
    return pinned
