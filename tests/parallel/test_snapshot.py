"""How the ranges of a state come to the host, and what many small tensors cost: counted, not timed."""

from __future__ import annotations

import cProfile
import os
import pstats
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import LocalCommunicator, Piece, Reader, Saver, TensorSpec
from distrain.checkpoints.arena import LARGE
from distrain.parallel.arena import TensorArena, TensorRange
from distrain.parallel.mesh import Mesh
from distrain.parallel.nested import bytes_of
from distrain.parallel.optimizer_state import stated_groups
from distrain.parallel.snapshot import pieces_of, share_of
from distrain.parallel.state import TrainingState

CPU = torch.device("cpu")


def tensors() -> dict[str, Tensor]:
    """Return tensors of many dtypes, sizes and layouts."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 8, generator=draw)
    return {
        "plain": whole,
        "transposed": whole.T,
        "strided": whole[:, ::2],
        "channels_last": torch.randn(2, 3, 4, 5, generator=draw).to(memory_format=torch.channels_last),
        "number": torch.tensor(3.0),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(5, generator=draw).half(),
        "bfloat16": torch.randn(5, generator=draw).bfloat16(),
        "float8": torch.randn(5, generator=draw).to(torch.float8_e4m3fn),
        "other8": torch.randn(3, generator=draw).to(torch.float8_e4m3fn),
        "uint16": torch.arange(5).to(torch.uint16),
        "conjugate": torch.randn(5, dtype=torch.complex64, generator=draw).conj(),
        "negative": torch.randn(5, dtype=torch.complex64, generator=draw).conj().imag,
        "large": torch.randn(LARGE // 4 + 3, generator=draw),
        "large too": torch.randn(LARGE // 2, 2, generator=draw).T,
    }


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("cut", [0, 1])
def test_ranges_come_to_the_host_as_they_are(stay: bool, cut: int) -> None:
    """All of each tensor, and all but its first element."""
    found = sorted(tensors().items(), key=lambda item: (-item[1].element_size(), str(item[1].dtype)))
    sources = [TensorRange(each, min(cut, each.numel()), each.numel()) for _, each in found]
    views, wait = TensorArena(CPU).hold(sources, [stay] * len(sources))
    wait()
    expected = b"".join(bytes(bytes_of(each.reshape(-1)[cut:]).numpy()) for _, each in found)
    assert b"".join(views) == expected


def test_small_tensors_are_put_together_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda flats, **into: (calls.append(len(flats)), cat(flats, **into))[1])
    values = [torch.full((6,), float(i)) for i in range(1000)] + [torch.full((), i) for i in range(1000)]
    views, wait = TensorArena(CPU).hold([TensorRange(v, 0, v.numel()) for v in values], [False] * len(values))
    wait()
    assert calls == [1000, 1000], "one for each dtype"
    assert len(views) == 1


def test_ranks_expect_what_they_write() -> None:
    state = trained(37)
    held = state.held()
    for mesh in (Mesh(0, 1, 1), Mesh(1, 3, 3), Mesh(2, 3, 3), Mesh(6, 7, 7)):
        written = sum(piece.source.nbytes for piece in pieces_of(held, mesh))
        assert written <= share_of(held, mesh) <= written + 32


def fresh(count: int) -> TrainingState:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(count)])
    half = list(model.parameters())[: count // 2]
    groups: list[dict[str, Any]] = [{"params": half}, {"params": list(model.parameters())[count // 2 :], "lr": 0.5}]
    return TrainingState(model, torch.optim.AdamW(groups, lr=1e-3), None)


def trained(count: int) -> TrainingState:
    state = fresh(count)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert state.optimizer is not None
    state.optimizer.step()
    return state


class Counted(LocalCommunicator):
    """A world of one that counts what would travel."""

    calls = 0

    def broadcast(self, value: Any) -> Any:
        self.calls += 1
        return value

    def gather(self, value: Any) -> list[Any]:
        self.calls += 1
        return [value]


def counted(work: Callable[[], Any]) -> tuple[int, int]:
    """Return how many functions are called, of Python and of C, and how many files are opened."""
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # for ever, hence the flag
    profile = cProfile.Profile()
    try:
        profile.runcall(work)
    finally:
        watching = False
    return pstats.Stats(profile).total_calls, len(opened)  # type: ignore[attr-defined]


def save_counted(count: int, folder: Path) -> tuple[int, int, int, Path]:
    state, comm = trained(count), Counted()
    saver = Saver(folder, comm, asynchronous=False, arena=TensorArena(CPU))
    paths: list[Path] = []

    def save() -> None:
        found = state.snapshot()
        described: dict[str, Any] = {"scalars": found.scalars, "aliases": found.aliases, "recipe": ""}
        pieces = pieces_of(found.held, Mesh(0, 1, 1))
        paths.append(saver.save(1, found.specs, pieces, strategy="single", **described).path)

    calls, opened = counted(save)
    return calls, opened, comm.calls, paths[0]


def test_what_small_tensors_cost_is_linear_and_little(tmp_path: Path) -> None:
    """Of each parameter with two moments and a count: four tensors."""
    few, many = 100, 300
    save_counted(10, tmp_path / "warm")
    calls, opened, spoken, _ = save_counted(few, tmp_path / "few")
    more_calls, more_opened, more_spoken, path = save_counted(many, tmp_path / "many")
    assert (more_opened, more_spoken) == (opened, spoken), "files and exchanges do not grow with the tensors"
    each = (more_calls - calls) / (4 * (many - few))
    assert each <= 140, f"{each:.0f} calls for each tensor that is saved"

    restored: list[TrainingState] = []

    def load(count: int, path: Path) -> Callable[[], None]:
        state = fresh(count)

        def go() -> None:
            with Reader(path) as reader:
                state.restore(reader)
            restored.append(state)

        return go

    calls, opened = counted(load(few, tmp_path / "few" / path.name))
    more_calls, more_opened = counted(load(many, path))
    assert more_opened == opened
    each = (more_calls - calls) / (4 * (many - few))
    assert each <= 200, f"{each:.0f} calls for each tensor that is restored"
    one, other = trained(many).held(), restored[-1].held()
    assert all(torch.equal(one[name].values, other[name].values) for name in one)


def test_torch_finds_a_parameter_without_a_search() -> None:
    state = trained(10)
    assert state.optimizer is not None
    assert [group["params"] for group in stated_groups(state.optimizer)] == [range(5), range(5, 10)]

    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)

    own = Own(list(state.model.parameters()), lr=0.1)
    assert [group["params"] for group in stated_groups(own)] == [list(range(10))], "it may count on a list"


class Driver:
    """In the place of CUDA's: counts what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0):
        self.error, self.pinned, self.events, self.asked = error, [], [], 0
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self, blocking))

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked += 1
        if self.error == 0:
            self.pinned.append(address)
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        self.pinned.remove(address)


class Event:
    def __init__(self, driver: Driver, blocking: bool):
        assert blocking, "the thread that waits takes no core"
        self.driver = driver

    def record(self, stream: str) -> None:
        self.driver.events.append(stream)

    def synchronize(self) -> None:
        self.driver.events.append(threading.current_thread().name)


def saved_thrice(folder: Path) -> TensorArena:
    state, arena = trained(7), TensorArena(torch.device("cuda", 3))
    held, mesh = state.held(), Mesh(0, 1, 1)
    saver = Saver(folder, LocalCommunicator(), arena=arena)
    arena.reserve(share_of(held, mesh))
    for step in (1, 2, 3):
        found = state.snapshot()
        described: dict[str, Any] = {"scalars": found.scalars, "aliases": found.aliases, "recipe": ""}
        saver.begin(step, found.specs, pieces_of(held, mesh), strategy="single", **described)
    assert saver.finish() is not None
    return arena


def test_memory_is_pinned_once_and_only_the_writing_thread_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(monkeypatch)
    arena = saved_thrice(tmp_path)
    assert (driver.asked, len(driver.pinned), arena.allocations) == (1, 1, 1)
    assert driver.events == [what for step in (1, 2, 3) for what in ("stream of cuda:3", f"checkpoint-{step}")]
    arena.close()
    assert driver.pinned == []


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(monkeypatch, error=2)
    arena = saved_thrice(tmp_path)
    assert (driver.asked, driver.events, arena.allocations) == (1, [], 1)
    assert "could not be pinned (CUDA error 2)" in caplog.text
    arena.close()


@pytest.mark.gpu
def test_a_save_on_a_gpu_waits_for_nothing_and_is_of_its_moment(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = {f"model/{i}": torch.full((size,), 1.0, device=device) for i, size in enumerate((3, 5, LARGE, 7))}
    specs = {name: TensorSpec(tuple(each.shape), "F32", "parameter") for name, each in values.items()}
    saver = Saver(tmp_path, LocalCommunicator(), arena=TensorArena(device))
    saver.arena.reserve(sum(spec.nbytes for spec in specs.values()))
    described: dict[str, Any] = {"scalars": {}, "aliases": {}, "recipe": "", "strategy": "single"}
    for step in (1, 2):
        pieces = [Piece(name, 0, TensorRange(each, 0, each.numel())) for name, each in values.items()]
        saver.arena._join()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(50_000_000)  # the step before is still at work
            saver.begin(step, specs, pieces, **described)
            for each in values.values():
                each.add_(1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        saved = saver.finish()
        assert saved is not None
        with Reader(saved.path) as reader:
            for name, spec in specs.items():
                stored = torch.from_numpy(reader.read(name, 0, spec.numel)).view(torch.float32)
                assert (stored == float(step)).all(), name
    assert saver.arena.allocations == 1
    assert saver.arena.pinned  # type: ignore[attr-defined]
    saver.close()
    assert os.listdir(tmp_path)
