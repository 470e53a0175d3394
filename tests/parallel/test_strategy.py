"""The world: what a launcher said, what was asked for, how ranks agree, and the pieces of a state."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import backward_and_apply
from torch import nn
from worlds import in_world, running_world

from distrain.checkpoint import LocalCommunicator, Reader, Saver
from distrain.config import RecipeError, UserError
from distrain.optim import Ema
from distrain.parallel import (
    BuildSpec,
    Environment,
    Mesh,
    TrainingState,
    build_strategy,
    check_world,
    launcher_argv,
    load_weights,
    open_world,
    processes_asked,
)
from distrain.parallel.comm import AT_ONCE
from distrain.parallel.state import Shard, whole

# --------------------------------------------------------------------------------------------------------------------
# The world that was asked for

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
TWO = Environment(0, 0, 2, 2, launched=True)
ALONE = Environment(0, 0, 1, 1, launched=False)


def test_the_environment_is_read() -> None:
    assert Environment.read(LAUNCHED) == Environment(1, 1, 4, 2, launched=True)
    assert Environment.read({"PATH": "/bin"}) == ALONE
    assert Environment.read({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}).local_world_size == 3


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_half_an_environment_is_refused(missing: str) -> None:
    variables = {key: value for key, value in LAUNCHED.items() if key != missing}
    with pytest.raises(UserError, match=rf"but not {missing}; start with `distrain train`"):
        Environment.read(variables)


def test_an_environment_that_is_not_numeric_is_refused() -> None:
    with pytest.raises(UserError, match="expected whole numbers from the launcher, found RANK='one'"):
        Environment.read(LAUNCHED | {"RANK": "one"})


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ("accelerate launch --cpu --num_processes 2 launch/train.py r.yaml", 2),
        ("accelerate launch --num_processes=3 launch/train.py", 3),
        ("accelerate launch --num-processes 5 launch/train.py", 5),
        ("torchrun --nproc-per-node 2 launch/train.py", 2),
        ("torchrun --nproc_per_node=4 launch/train.py", 4),
        ("torchrun --nproc-per-node gpu launch/train.py", None),
        ("accelerate launch launch/train.py r.yaml", None),
        ("accelerate launch --num_processes", None),
        ("python launch/train.py r.yaml --processes 2", None),
    ],
)
def test_what_a_launchers_command_asks_for(argv: str, asked: int | None) -> None:
    assert processes_asked(argv.split()) == asked


def test_a_parent_that_is_no_launcher_asks_for_nothing() -> None:
    assert launcher_argv() == []


def test_the_right_world_is_accepted() -> None:
    check_world(ALONE, None, [])
    check_world(ALONE, 1, [])
    check_world(TWO, 2, [])
    check_world(TWO, None, ["torchrun", "--nproc-per-node", "2", "x"])
    # on two nodes torchrun's own number is that of one node
    check_world(
        Environment(0, 0, 4, 2, launched=True), None, ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", "x"]
    )


@pytest.mark.parametrize(
    ("found", "expected", "argv", "message"),
    [
        (ALONE, 2, "", "this run asks for 2 processes, found 1; nothing was written"),
        (TWO, 3, "", "this run asks for 3 processes, found 2"),
        (TWO, 1, "", "this run asks for 1 process, found 2"),
        (
            ALONE,
            None,
            "accelerate launch --cpu --num_processes 2 x",
            "the launcher's command asks for 2 processes, found 1",
        ),
    ],
)
def test_another_world_is_refused(found: Environment, expected: int | None, argv: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_world(found, expected, argv.split())
    assert message in str(caught.value)
    assert "distrain train RECIPE --processes" in str(caught.value), "what to do"


def open_other_world(size: str) -> str:
    from accelerate import PartialState

    PartialState(cpu=True)  # as in code that the user's file runs when it is imported; it stays what it is
    os.environ["WORLD_SIZE"] = size
    try:
        open_world("fp32")
    except UserError as error:
        return str(error)
    return ""


def test_a_world_that_came_up_otherwise_is_refused() -> None:
    (said,) = in_world(1, open_other_world, "2")
    assert "made this process rank 0 of 2, but it came up as rank 0 of 1" in said


# --------------------------------------------------------------------------------------------------------------------
# Agreeing


class Odd(Exception):
    """Pickled with its message alone, as exceptions are, it cannot be made again."""

    def __init__(self, what: str, where: str):
        super().__init__(f"{what} {where}")


def agree() -> dict[str, Any]:
    world = open_world("fp32")
    rank = world.rank
    found: dict[str, Any] = {"world": (rank, world.world_size, world.strategy, world.device.type)}
    found["sum"] = world.sum(torch.tensor([rank + 0.1, 1.0], dtype=torch.float64)).tolist()
    found["later"] = world.to_host_async(world.sum(torch.tensor([rank + 0.1, 1.0], dtype=torch.float64)))()
    found["gather"] = world.gather({"rank": rank})
    found["broadcast"] = world.broadcast(f"from {rank}")
    found["first"] = world.run_on_rank0(lambda: f"by {rank}")
    found["together"] = world.run_on_all(lambda: rank)
    sizes = [torch.arange(count, dtype=torch.float64) for count in (0, 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE)]
    found["summed"] = [torch.equal(world.sum_of_all(each.clone), world.world_size * each) for each in sizes]

    def attempt(name: str, how: Any) -> None:
        try:
            how()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def fail(on: int, error: Exception) -> None:
        if rank == on:
            raise error

    attempt("first fails", lambda: world.run_on_rank0(lambda: fail(0, UserError("no such file"))))
    last = world.world_size - 1
    attempt("together fails for the user", lambda: world.run_on_all(lambda: fail(last, UserError("no such file"))))
    attempt("together fails", lambda: world.run_on_all(lambda: fail(last, KeyError("x"))))
    attempt("first fails oddly", lambda: world.run_on_rank0(lambda: fail(0, Odd("no", "file"))))
    attempt("together fails oddly", lambda: world.run_on_all(lambda: fail(last, Odd("no", "file"))))
    attempt("sum fails", lambda: world.sum_of_all(lambda: fail(last, KeyError("x")) or torch.ones(5000).double()))
    attempt("recipe", lambda: world.run_on_all(lambda: fail(last, RecipeError("r.yaml", ["no name"]))))
    found["after"] = world.sum(torch.ones(1)).item()
    world.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_agree(world_size: int) -> None:
    ranks = in_world(world_size, agree)
    last = world_size - 1
    for rank, found in enumerate(ranks):
        assert found["world"] == (rank, world_size, "single" if world_size == 1 else "ddp", "cpu")
        assert found["sum"] == found["later"] == ranks[0]["sum"], "the same bits everywhere"
        assert found["sum"] == pytest.approx([sum(range(world_size)) + 0.1 * world_size, world_size])
        assert found["gather"] == [{"rank": each} for each in range(world_size)]
        assert found["broadcast"] == "from 0"
        assert found["first"] == "by 0"
        assert found["together"] == rank
        assert found["first fails"] == "UserError: no such file"
        assert found["together fails for the user"] == "UserError: no such file"
        own = "KeyError: 'x'"
        assert found["summed"] == [True] * 5
        assert (
            found["sum fails"]
            == found["together fails"]
            == (own if rank == last else f"RuntimeError: rank {last} failed: {own}")
        )
        assert "Odd: no file" in found["first fails oddly"]
        assert "Odd: no file" in found["together fails oddly"]
        assert found["recipe"] == "RecipeError: r.yaml: 1 problem\n  - no name"
        assert found["after"] == world_size, "nobody is left behind"


def wait_for_rank_0() -> str:
    world = open_world("fp32", timeout_s=1)
    said = world.run_on_rank0(lambda: time.sleep(3) or "ready")
    world.close()
    return said


def test_what_rank_0_does_for_all_may_take_longer_than_a_collective() -> None:
    assert in_world(2, wait_for_rank_0) == ["ready", "ready"]


def die_alone() -> None:
    world = open_world("fp32", timeout_s=20)
    world.sum(torch.ones(1))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.sum(torch.ones(1))
    except RuntimeError:
        os._exit(7)


def test_a_rank_that_dies_ends_the_others_waiting() -> None:
    with running_world(2, die_alone) as world:
        assert world.wait(30) == [7, -signal.SIGKILL]


# --------------------------------------------------------------------------------------------------------------------
# Pieces of a state


class Tied(nn.Module):
    """A tied weight, a buffer of whole numbers, a scalar parameter."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x))) * self.scale


def trained_state(optimizer: str = "AdamW", seed: int = 0, steps: int = 2, **options: Any) -> TrainingState:
    torch.manual_seed(seed)
    model = Tied(**options)
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    ema = Ema(model, 0.9)
    for step in range(steps):
        model(torch.arange(6) % (2 + step)).square().sum().backward()
        made.step()
        made.zero_grad()
        ema.update()
    return TrainingState(model, made, ema)


def save(state: TrainingState, folder: Path, ranks: int) -> Path:
    """Save the pieces of all ranks of a world, gathered into one file."""
    pieces = [piece for rank in range(ranks) for piece in state.pieces(Mesh(rank, ranks, ranks))]
    saver = Saver(folder, LocalCommunicator(), asynchronous=False)
    scalars = state.scalars() | {"data": {}}
    return saver.save(
        3, state.specs(), pieces, scalars=scalars, aliases=state.aliases(), recipe="", strategy="ddp"
    ).path


def values(state: TrainingState) -> dict[str, np.ndarray]:
    return {name: held.values.numpy().copy() for name, held in state.held().items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_the_pieces_of_all_ranks_are_the_state(ranks: int) -> None:
    state = trained_state()
    specs = state.specs()
    reached = dict.fromkeys(specs, 0)
    sizes = []
    for rank in range(ranks):
        pieces = list(state.pieces(Mesh(rank, ranks, ranks)))
        sizes.append(sum(piece.data.nbytes for piece in pieces))
        for piece in pieces:
            assert piece.start == reached[piece.name], "without gaps and overlaps, in order"
            tensor = state.held()[piece.name].values
            reached[piece.name] += piece.data.nbytes // tensor.element_size()
    assert reached == {name: spec.numel for name, spec in specs.items()}
    assert max(sizes) - min(sizes) <= 16, "each writes the same share"


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 1), (4, 2), (6, 2), (6, 3), (12, 4)])
def test_of_what_replicas_hold_each_writes_a_part(ranks: int, replicas: int) -> None:
    state = trained_state(width=40)
    specs = state.specs()
    shards = ranks // replicas
    seen = {name: np.zeros(spec.numel, np.int64) for name, spec in specs.items()}
    sizes: dict[int, list[int]] = {}
    for rank in range(ranks):
        low, high = (part * 64 // shards for part in (rank % shards, rank % shards + 1))

        def shard(parameter: torch.nn.Parameter, low: int = low, high: int = high) -> Shard:
            found = whole(parameter)
            if parameter.numel() < 64:
                return found
            rows = parameter.numel() // 64 + 1
            start, stop = (min(part * rows, parameter.numel()) for part in (low, high))
            flat = found.values.reshape(-1)[start:stop]
            return replace(found, start=start, values=flat, replicated=False, entry=None)

        own = TrainingState(state.model, None, None, shard)
        assert {held.replicated for held in own.held().values()} == {True, False}
        pieces = list(own.pieces(Mesh(rank, ranks, replicas)))
        for piece in pieces:
            numel = piece.data.nbytes // own.held()[piece.name].values.element_size()
            seen[piece.name][piece.start : piece.start + numel] += 1
        sizes.setdefault(rank % shards, []).append(sum(piece.data.nbytes for piece in pieces))
    assert all((count == 1).all() for name, count in seen.items() if name.startswith("model/"))
    for alike in sizes.values():
        assert max(alike) - min(alike) <= 32, "replicas share the writing"


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adadelta", "NAdam"])
def test_a_state_comes_back_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    state = trained_state(optimizer)
    path = save(state, tmp_path, ranks=3)
    fresh = trained_state(optimizer, seed=1, steps=0)
    with Reader(path) as reader:
        assert reader.manifest.aliases == {"model/head.weight": "model/embed.weight"}
        fresh.restore(reader)
    before, after = values(state), values(fresh)
    assert list(before) == list(after), "in the same order, so that the next save is cut alike"
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # and the next step is the same one
    for each in (state, fresh):
        each.model(torch.arange(6) % 3).square().sum().backward()
        each.optimizer.step()
    assert all(np.array_equal(values(state)[name], values(fresh)[name]) for name in before)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as some schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_comes_back(tmp_path: Path) -> None:
    def state(weight_decay: float) -> TrainingState:
        model = nn.Linear(2, 1)
        return TrainingState(model, Counting(model.parameters(), lr=0.1, weight_decay=weight_decay), None)

    old, new = state(0.1), state(0.2)
    for _ in range(3):
        old.model(torch.ones(1, 2)).sum().backward()
        old.optimizer.step()
    old.optimizer.param_groups[0]["lr"] = 0.05
    with Reader(save(old, tmp_path, ranks=1)) as reader:
        new.restore(reader)
    (group,) = new.optimizer.param_groups
    assert group["count"] == 3
    assert (group["weight_decay"], group["lr"]) == (0.2, 0.1), "what the recipe says, the recipe says"


@pytest.mark.fault(16)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(trained_state(), tmp_path, ranks=1)
    with Reader(path) as reader, pytest.raises(UserError) as caught:
        trained_state(width=6).restore(reader)
    assert "holds another model than the recipe's" in str(caught.value)
    assert "model/embed.weight" in str(caught.value)
    assert "[7, 5]" in str(caught.value)
    assert "[7, 6]" in str(caught.value)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = save(trained_state("AdamW"), tmp_path, ranks=1)
    with Reader(path) as reader, pytest.raises(UserError, match="holds the state of AdamW, the recipe asks for SGD"):
        trained_state("SGD").restore(reader)


def test_optimizer_state_of_what_is_frozen_now_is_refused(tmp_path: Path) -> None:
    path = save(trained_state(), tmp_path, ranks=1)
    state = trained_state(steps=0)
    state.optimizer = torch.optim.AdamW([p for n, p in state.model.named_parameters() if n != "scale"], lr=0.01)
    with (
        Reader(path) as reader,
        pytest.raises(UserError, match=r"for 1 parameters .* not train, such as scale"),
    ):
        state.restore(reader)


def test_a_model_can_be_filled_with_its_weights_or_their_average(tmp_path: Path) -> None:
    state = trained_state()
    path = save(state, tmp_path, ranks=2)
    for averaged, role in ((False, "model"), (True, "ema")):
        model = Tied()
        with Reader(path) as reader:
            load_weights(model, reader, averaged=averaged)
        for name in ("embed.weight", "scale", "norm.running_mean"):
            assert np.array_equal(model.state_dict()[name].numpy(), values(state)[f"{role}/{name}"])
    assert not np.array_equal(values(state)["model/embed.weight"], values(state)["ema/embed.weight"])


# --------------------------------------------------------------------------------------------------------------------
# A model among the processes


class Idle(nn.Module):
    """One layer is never used, by any rank; a buffer counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 1)
        self.unused = nn.Linear(3, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.used(x)


def prepared() -> tuple[float, bool, list[float]]:
    world = open_world("fp32")
    torch.manual_seed(0)
    model = Idle()
    engine = build_strategy(
        world,
        BuildSpec(
            model=lambda: model,
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
            loss_sum=lambda model, index: model(torch.ones(2, 3)).sum(),
            micro_batch_size=2,
            accumulation=1,
            clip_norm=None,
            ema=0.5,
        ),
    )
    passes, clean = model.passes.item(), all(p.grad is None for p in model.parameters())
    gradients: list[float] = []
    engine.optimizer.register_step_pre_hook(lambda *_: gradients.extend(model.used.weight.grad[0].tolist()))
    # each rank another input: what comes out is the mean gradient of all
    objective = engine.wrapped(torch.full((1, 3), world.rank + 1.0)).sum()
    backward_and_apply(engine, objective, torch.ones(()))
    model.passes += world.rank
    engine.state.ema.update()
    engine.broadcast_buffers()
    aligned = [model.passes.item(), engine.state.ema.tensors()["passes"].item()]
    world.close()
    return passes, clean, [*gradients, *aligned]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_preparing_leaves_no_trace_and_allows_unused_parameters(world_size: int) -> None:
    ranks = in_world(world_size, prepared)
    for passes, clean, numbers in ranks:
        assert passes == 0
        assert clean
        assert numbers[:3] == pytest.approx([(world_size + 1) / 2] * 3)
        assert numbers[3:] == ranks[0][2][3:], "rank 0's buffers, and their averages, everywhere"
