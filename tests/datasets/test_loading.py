"""Loader processes that cannot hand over a batch, or are stuck, are named with the cause."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logged import logged
from runs import cli_rank, rows, train, train_rank, write_recipe
from worlds import in_world

from distrain import Callback
from distrain.config import UserError
from distrain.datasets import waiting
from distrain.datasets.base import CorruptSample
from distrain.datasets.batches import Batches, StreamBatches
from distrain.datasets.evaluation import EvalLoader, build_eval_loader
from distrain.datasets.loading import load
from distrain.run import heartbeat, stacks
from distrain.run.folder import RunDir
from distrain.system.processes import process_state


class Source:
    """Sixteen samples whose batches weigh `mib` MiB; `spoil` is called on each batch in the process that makes it."""

    def __init__(self, mib: float = 0.01, spoil: Any = None):
        self.numbers = int(mib * 2**20 / 4)
        self.spoil = spoil

    def __len__(self) -> int:
        return 16

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "inputs": torch.zeros(self.numbers),
            "targets": torch.zeros(4),
            "ids": torch.from_numpy(ids),
        }
        if self.spoil is not None:
            self.spoil(batch)
        return batch


PLACES = [(np.zeros(4, np.int64), np.arange(start, start + 4)) for start in range(0, 16, 4)]


def loaded(source: Source, workers: int = 2) -> list[Any]:
    return list(load(Batches(source, None), PLACES, workers, pin_memory=False))


def no_files_left(batch: dict[str, Any]) -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))


def unpicklable(batch: dict[str, Any]) -> None:
    batch["inputs"] = {"tree": lambda: None}


def with_a_graph(batch: dict[str, Any]) -> None:
    batch["inputs"] = batch["inputs"].requires_grad_() * 2


class Archive:
    """Sixteen numbers in a file that was opened before processes were forked; two of them read at one time."""

    def __init__(self, path: Path):
        np.arange(16).tofile(path)
        self.file = path.open("rb", buffering=0)
        path.unlink()  # also where it has no name any more
        self.file.read(8)
        self.both = multiprocessing.get_context("fork").Barrier(2)

    def __len__(self) -> int:
        return 16

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        begins = self.file.tell()
        self.file.seek(8 * int(ids[0]))
        self.both.wait(60)
        numbers = np.frombuffer(self.file.read(8 * len(ids)), np.int64)
        return {"inputs": torch.from_numpy(numbers.copy()), "begins": begins, "ids": torch.from_numpy(ids)}


def test_each_loader_process_has_its_own_place_in_an_open_file(tmp_path: Path) -> None:
    source = Archive(tmp_path / "numbers")
    found = list(load(Batches(source, None), PLACES, 2, False))
    assert [each["inputs"].tolist() for each in found] == [ids.tolist() for _, ids in PLACES]
    assert [each["begins"] for each in found[:2]] == [8, 8]
    assert source.file.tell() == 8, "nor was that of the training process moved"


class Asking(Source):
    """A stream that says whether it is read by a loader process, as far as torch tells that."""

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        return {"inputs": torch.tensor(samples)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_read_alike_in_a_loader_process(workers: int) -> None:
    def plan() -> Iterator[Any]:
        for place in PLACES:
            yield place, [torch.utils.data.get_worker_info() is None] * len(place[1])

    found = list(load(StreamBatches(plan, Asking(), None), None, workers, False))
    assert [each["inputs"].tolist() for each in found] == [[True] * 4] * len(PLACES)


def test_batches_arrive_as_they_are_made() -> None:
    ours, theirs = loaded(Source(), workers=0), loaded(Source(), workers=2)
    assert [batch["ids"].tolist() for batch in theirs] == [batch["ids"].tolist() for batch in ours]
    assert all(torch.equal(one["inputs"], other["inputs"]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(no_files_left, "ulimit -n"), (unpicklable, "must return tensors"), (with_a_graph, "must return tensors")],
)
@pytest.mark.fault(43)
def test_a_batch_that_cannot_be_sent_is_an_error(spoil: Any, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"loader process \d cannot hand over a batch") as found:
        loaded(Source(spoil=spoil))
    assert words in str(found.value)
    assert "Traceback" not in capfd.readouterr().err


def in_small_shared_memory(mib: float) -> str:
    """Load batches of `mib` where /dev/shm has 4 MiB; returns the error's words."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x00020000, 1 << 18 | 1 << 14
    if (
        libc.unshare(new_namespace)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4m")
    ):
        return f"no mount: {os.strerror(ctypes.get_errno())}"
    try:
        return f"{len(loaded(Source(mib)))} batches"
    except UserError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process a small /dev/shm")
@pytest.mark.parametrize("mib", [0.1, 1.5, 6])
@pytest.mark.fault(43)
def test_full_shared_memory_is_an_error_that_names_it(mib: float) -> None:
    (found,) = in_world(1, in_small_shared_memory, mib, launched=False)
    if found.startswith("no mount"):
        pytest.skip(f"a small /dev/shm cannot be mounted here: {found}")
    if mib == 0.1:
        assert found == "4 batches"
    elif mib == 6:
        assert "cannot hand over a batch of 6.0 MiB" in found
        assert "the shared memory /dev/shm has" in found
        assert "data.workers" in found
    else:  # as many as happen to be under way fit, or not
        assert found == "4 batches" or "/dev/shm" in found


# --------------------------------------------------------------------------------------------------------------------
# Loader processes that stay for the next pass


class Marked:
    """Sixteen samples, of which 5 is corrupt while `broken` exists; a batch holds the process that made it."""

    def __init__(self, broken: Path):
        self.broken = broken

    def __len__(self) -> int:
        return 16

    def fetch(self, ids: np.ndarray) -> dict[str, Any]:
        if 5 in ids.tolist() and self.broken.exists():
            raise CorruptSample(5, "sample 5 cannot be decoded")
        return {"inputs": torch.full((len(ids),), os.getpid()), "ids": torch.from_numpy(ids)}


def kept(source: Marked, batch_size: int = 3, workers: int = 2, skip: int = 0) -> EvalLoader:
    options = {"rank": 0, "world_size": 1, "workers": workers, "skip_corrupt": skip, "keep": True}
    return build_eval_loader(source, batch_size=batch_size, **options)  # type: ignore[arg-type]


def processes_of(batches: list[dict[str, Any]]) -> list[int]:
    return [int(batch["inputs"][0]) for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_processes_make_every_pass(tmp_path: Path, batch_size: int, workers: int) -> None:
    loader = kept(Marked(tmp_path / "none"), batch_size, workers)
    loader.start()
    started = {each.pid for each in multiprocessing.active_children()}
    for _ in range(3):
        batches = list(loader)
        assert [each for batch in batches for each in batch["ids"].tolist() if each >= 0] == list(range(16))
        assert set(processes_of(batches)) <= started
    assert {each.pid for each in multiprocessing.active_children()} == started
    assert len(started) == workers
    loader.close()
    assert not multiprocessing.active_children()


def test_a_pass_that_is_left_ends_its_processes_and_the_next_is_whole(tmp_path: Path) -> None:
    loader = kept(Marked(tmp_path / "none"))
    first = list(loader)
    begun = iter(loader)
    next(begun)
    del begun
    assert not multiprocessing.active_children()
    begun = iter(loader)
    next(begun)  # and is never ended
    second = list(loader)
    assert [batch["ids"].tolist() for batch in second] == [batch["ids"].tolist() for batch in first]
    assert not set(processes_of(second)) & set(processes_of(first))
    loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.fault(21)
def test_corrupt_samples_are_found_anew_in_each_pass(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    loader = kept(Marked(broken), skip=1)
    found = []
    for there in (True, True, False, True):
        broken.touch() if there else broken.unlink()
        found.append([batch["corrupt_samples"] for batch in loader if "corrupt_samples" in batch])
    assert found == [[{5: "sample 5 cannot be decoded"}]] * 2 + [[]] + [[{5: "sample 5 cannot be decoded"}]]
    loader.close()
    strict = kept(Marked(broken))
    for _ in range(2):
        with pytest.raises(UserError, match=r"^sample 5 cannot be decoded$"):
            list(strict)
        assert not multiprocessing.active_children()


@pytest.mark.fault(43)
def test_a_process_that_ends_between_passes_is_replaced(tmp_path: Path) -> None:
    loader = kept(Marked(tmp_path / "none"))
    first = list(loader)
    os.kill(processes_of(first)[0], signal.SIGKILL)
    for each in multiprocessing.active_children():
        if each.pid == processes_of(first)[0]:
            each.join(30)
    with logged() as messages:
        second = list(loader)
    assert [batch["ids"].tolist() for batch in second] == [batch["ids"].tolist() for batch in first]
    (said,) = messages
    assert said.startswith("warning: a loader process ended while it was idle")
    loader.close()


class Written:
    """Points whose test samples write down which process reads them, in the folder READERS."""

    classes = ("a", "b")

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        folder = Path(os.environ["READERS"])
        (folder / f"{self.split}-{os.getpid()}-{os.getppid()}").touch()  # the process and its parent
        return torch.ones(3) * index, index % 2


KEPT = """
name: kept
task: classification
data: {name: "test_loading:Written", workers: 2}
model: {name: mlp, hidden: [2]}
batch: {global: 4}
train: {steps: 3}
eval: {every: 1 steps}
"""


class Broken(Callback):
    """Fails after a step."""

    def on_step_end(self, step: int, metrics: Any) -> None:
        if step == 2:
            raise RuntimeError("no such metric")


def train_and_look(recipe: str, folder: str, how: str) -> tuple[int, int]:
    """Return the status, and how many children are left."""
    os.environ["READERS"], run = folder, str(Path(folder).with_suffix(".run"))
    stop_after = 2 if how == "asked to stop" else None
    ended = train_rank(recipe, [], run, stop_after, False, callbacks=[Broken()] if how == "failed" else [])
    children = multiprocessing.active_children()
    for each in children:
        each.join(30)
    (Path(folder) / "trained").write_text(str(os.getpid()))
    return ended.status, sum(each.is_alive() for each in children)


@pytest.mark.parametrize(
    ("how", "status", "evaluations"), [("finished", 0, 3), ("asked to stop", 0, 1), ("failed", 1, 1)]
)
def test_evaluations_start_one_set_of_loader_processes_that_ends_with_the_run(
    tmp_path: Path, how: str, status: int, evaluations: int
) -> None:
    recipe, readers = write_recipe(tmp_path, KEPT), tmp_path / "readers"
    readers.mkdir()
    assert in_world(1, train_and_look, str(recipe), str(readers), how, launched=False) == [(status, 0)]
    evaluated = [row for row in rows(readers.with_suffix(".run")) if row["event"] == "eval"]
    assert len(evaluated) == evaluations
    trained = (readers / "trained").read_text()
    loaders = [path.name.split("-")[0] for path in readers.iterdir() if path.name.endswith(f"-{trained}")]
    assert sorted(loaders) == ["test"] * 2 + ["train"] * 2


# --------------------------------------------------------------------------------------------------------------------
# Loader processes that are stuck

LOCK = threading.Lock()


def sleep_for_ever(batch: dict[str, Any]) -> None:
    time.sleep(10**6)


def take_lock(batch: dict[str, Any]) -> None:
    with LOCK:
        pass


def stop_itself(batch: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def read_of_a_pipe(batch: dict[str, Any]) -> None:
    os.read(os.pipe()[0], 1)


def compute_for_ever(batch: dict[str, Any]) -> None:
    while True:
        pass


class StuckAtTwo:
    """Is stuck at the batch of sample 2, which is the first: no other is waited for."""

    def __init__(self, how: Any):
        self.how = how

    def __call__(self, batch: dict[str, Any]) -> None:
        if 2 in batch["ids"].tolist():
            self.how(batch)

    def is_met(self) -> bool:
        """Whether a loader process of this one is stuck there."""
        pids = [pid for pid, _ in stacks.loaders()]
        if self.how is stop_itself:
            return any(process_state(pid, 0) == "T" for pid in pids)
        found = [stacks.loader_stack(pid) or [] for pid in pids]
        return any(frame.function == self.how.__name__ for stack in found for frame in stack)


@pytest.fixture
def once_stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[StuckAtTwo], heartbeat.Now]]:
    """Have a wait reported as soon as a loader process is stuck."""
    monkeypatch.setattr(waiting, "WARN_AFTER_S", 1000.0)
    monkeypatch.setattr(waiting, "CHECK_EVERY_S", 0.1)
    looks: list[Callable[[float], None]] = []

    def begin(stuck: StuckAtTwo) -> heartbeat.Now:
        def look(waited_s: float) -> None:
            if stuck.is_met():
                monkeypatch.setattr(waiting, "WARN_AFTER_S", 0.0)

        looks.append(look)
        waiting.while_waiting.append(look)
        return heartbeat.begin()

    heartbeat.begin()
    yield begin
    for look in looks:
        waiting.while_waiting.remove(look)
    heartbeat.begin()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (sleep_for_ever, "sleeps or waits, at\n    .*test_loading.py:[0-9]+ in sleep_for_ever: time.sleep"),
        (take_lock, "sleeps or waits, at\n    .*test_loading.py:[0-9]+ in take_lock: with LOCK"),
        (read_of_a_pipe, "sleeps or waits, at\n    .*test_loading.py:[0-9]+ in read_of_a_pipe: os.read"),
        (compute_for_ever, "(computes|sleeps or waits), at\n    .*test_loading.py:[0-9]+ in compute_for_ever: "),
        (stop_itself, "is stopped, by SIGSTOP: kill -CONT [0-9]+ "),
    ],
)
@pytest.mark.fault(44)
def test_a_loader_process_that_is_stuck_is_named_with_its_line(how: Any, words: str, once_stuck: Any) -> None:
    stuck = StuckAtTwo(how)
    with logged() as messages:
        once_stuck(stuck).limit = lambda: 0.0 if messages else 1000.0
        with LOCK, pytest.raises(UserError, match="the recipe's watchdog section allows") as found:
            loaded(Source(spoil=stuck))
    (said,) = messages
    owes = "without a batch; loader process 0 of 2 owes the batch of the samples 0, 1, 2, 3: process [0-9]+ "
    assert re.match(rf"warning: [0-9.]+ s {owes}{words}", said)
    assert re.match(rf"[0-9.]+ s {owes}{words}", str(found.value))
    assert "the recipe's watchdog section ends it after 16.7 minutes" in said
    for text in (said, str(found.value)):
        assert "data.workers=0 shows" in text
        assert "A fork copies locks" in text
    assert all("torch/" not in line and "/multiprocessing/" not in line for line in said.splitlines())
    for process in multiprocessing.active_children():
        process.join(30)
        assert not process.is_alive()


def test_a_slow_loader_is_reported_and_continues(once_stuck: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = multiprocessing.get_context("fork").Semaphore(0)

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.release()

    def take_its_time(batch: dict[str, Any]) -> None:
        told.acquire()

    monkeypatch.setattr(waiting.logger, "handlers", [Release()])
    stuck = StuckAtTwo(take_its_time)
    once_stuck(stuck)
    with logged() as messages:
        found = loaded(Source(spoil=stuck))
    assert [batch["ids"].tolist() for batch in found] == [ids.tolist() for _, ids in PLACES]
    said = messages[0]
    assert "without a batch; loader process 0 of 2 owes the batch of the samples 0, 1, 2, 3" in said
    assert "this wait has no limit" in said


def test_a_loader_that_is_always_slow_is_reported_less_and_less(once_stuck: Any) -> None:
    wait, said = waiting.Wait(0), []
    for number in range(1, 20):
        with wait:
            wait._waited_s = waiting.WARN_AFTER_S
            with logged() as messages:
                wait.check()
                wait.check()
        said += [number] if messages else []
    assert said == [1, 2, 4, 8, 16]


class Stuck:
    """Points that cannot be read in a loader process where STUCK is set, and in any after STUCK_AFTER of them."""

    classes = ("a", "b")
    reads = 0
    """Of this process."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        Stuck.reads += 1
        in_loader = "STUCK" in os.environ and torch.utils.data.get_worker_info() is not None
        after = os.environ.get("STUCK_AFTER")
        if in_loader or (after is not None and Stuck.reads > int(after)):
            Path(os.environ["STUCK"]).touch()
            threading.Event().wait()
        return torch.ones(3) * index, index % 2


RECIPE = """
name: stuck
task: classification
data: {name: "test_loading:Stuck", split: [0.75, 0.25], workers: 1}
model: {name: mlp, hidden: [2]}
batch: {global: 4}
train: {steps: 4}
eval: {every: null}
"""


def stop_while_stuck(recipe: str, run: str) -> Any:
    from distrain.training import intervals

    intervals.PATIENCE_S, waiting.WARN_AFTER_S = 1.0, 0.2
    os.environ["STUCK"] = str(Path(run).with_name("stuck"))

    def stop() -> None:
        log = RunDir(run).log_path(0)
        while not (log.exists() and "in __getitem__" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return train_rank(recipe, [], run, None, False)


@pytest.mark.fault(44)
def test_a_stop_is_heeded_while_loader_processes_hang(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    (ended,) = in_world(1, stop_while_stuck, str(recipe), str(tmp_path / "run"), launched=False)
    assert ended.status == 1
    assert "SIGTERM asks the run to stop, and its loader processes have given no batch" in ended.err
    failed = RunDir(tmp_path / "run").failed
    assert failed is not None
    assert failed["restart"] is True
    for said in (ended.err, RunDir(tmp_path / "run").log_path(0).read_text()):
        assert "without a batch; loader process 0 of 1 owes the batch of the samples" in said
        assert "in __getitem__: " in said
        assert "the recipe's watchdog section ends it after 30 minutes" in said


def while_stuck(variables: dict[str, str], *arguments: str) -> Any:
    """Run a command whose wait for data is reported as soon as it is in vain, and then ended."""
    os.environ.update(variables)
    waiting.WARN_AFTER_S, waiting.CHECK_EVERY_S = 1000.0, 0.1
    stuck = Path(variables["STUCK"])  # accelerate empties the environment for a moment while it starts

    def report() -> None:
        while not stuck.exists():
            time.sleep(0.02)
        waiting.WARN_AFTER_S = 0.0

    class End(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heartbeat.now().limit = lambda: 0.0

    threading.Thread(target=report, daemon=True).start()
    waiting.logger.addHandler(End())
    return cli_rank(list(arguments))


@pytest.mark.fault(44)
def test_scoring_and_predicting_end_where_data_never_come(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "predicted.csv"
    train(1, write_recipe(tmp_path, RECIPE), run)
    loader = "without a batch; loader process 0 of 1 owes the batch of the samples 0, 1, 2, 3: process "
    here = "this process has been reading the "
    evaluate, predict = ["evaluate", str(run), "--split", "test"], ["predict", str(run), "train", "-o", str(out)]
    for number, (arguments, after, words) in enumerate(
        [
            (evaluate, None, loader),
            (evaluate, "0", here + "data set for "),
            (predict, "2", here + "data set for "),
            (predict, "46", "owes the batch of the samples "),
        ]
    ):
        variables = {"STUCK": str(tmp_path / f"stuck-{number}")} | ({} if after is None else {"STUCK_AFTER": after})
        (ended,) = in_world(1, while_stuck, variables, *arguments, launched=False)
        assert ended.status == 1
        assert ended.err.startswith("warning: "), ended.err
        warning, error = ended.err.split("error:")
        for said in (warning, error):
            assert words in said
            assert "in __getitem__: " in said
        assert "Traceback" not in ended.err
        assert "the recipe's watchdog section allows 0 s" in error
        assert not out.exists()
