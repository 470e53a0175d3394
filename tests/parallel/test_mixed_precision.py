"""Every precision means the same under every strategy; a step whose gradient overflows leaves no trace."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import captured, checkpoint, cli, last, losses, rows, state, write_recipe
from test_matrix import NAMES, ONE_AT_A_TIME, RECIPE, create, spec, stopped_copy, train_in_turn
from test_matrix import WAYS as MATRIX
from torch import Tensor, nn
from worlds import in_world

from distrain.checkpoint import Reader
from distrain.checkpoints.export import export
from distrain.config import UserError
from distrain.run.folder import RunDir

WAYS = [("single", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)]
ZERO1 = pytest.mark.more
"""Zero1 is zero2's class, and shards the same state: zero2 stands for it."""
IDS = [strategy for strategy, _ in WAYS]
EACH = [pytest.param(strategy, marks=[ZERO1] if strategy == "zero1" else []) for strategy in IDS]


def ways(every_combination: bool) -> list[tuple[str, int]]:
    """Return the ways that are tried, with `--all` zero1 as well."""
    return [way for way in WAYS if every_combination or way[0] != "zero1"]


NORMED = """
name: normed
task: classification
data: {name: digits, split: [0.9, 0.1]}
model:
  name: sequential
  layers: [Flatten, {Linear: [64, 16]}, {BatchNorm1d: 16}, ReLU, {Linear: [16, 10]}]
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
schedule: {name: cosine, warmup: 2 steps}
batch: {global: 12, micro: 3}
train: {steps: 6, precision: fp16, ema: 0.9}
eval: {every: null}
checkpoint: {every: 2 steps, keep: 100, async: false}
log: {every: 1 steps}
"""


def open_in(strategy: str, precision: str) -> Any:
    """Join this world with a strategy, the environment as a launcher sets it."""
    from distrain.parallel import open_world

    return open_world(precision, spec(strategy))


@contextmanager
def session_of(run_dir: str, world: Any) -> Iterator[Any]:
    """Open a run as `train` does, in the precision of its recipe."""
    from distrain.config.yaml import load_recipe
    from distrain.parallel.precision import resolve
    from distrain.training.run_loop import Session

    recipe = load_recipe(RunDir(run_dir).recipe_path).recipe
    world.mixed_precision = resolve(recipe.train.precision, world.device)
    world.precision = world.mixed_precision.name
    with Session.open(RunDir(run_dir), recipe, world) as session:
        yield session


def in_silence(function: Any, *args: Any) -> Any:
    """Return what the function returns, without what it prints."""
    kept: list[Any] = []

    def run() -> int:
        kept.append(function(*args))
        return 0

    captured(run)
    return kept[0]


# --------------------------------------------------------------------------------------------------------------------
# The same in every strategy

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 1e-5, "bf16": 1e-4}
"""Of a loss, relative to ddp's. Sums are taken in another order, and then a number may round the other way."""


def look(strategy: str, run_dirs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Train each run; returns dtypes of what a linear layer computes and of what is trained, and what took effect."""

    def go() -> dict[str, dict[str, Any]]:
        from distrain import loop

        world = open_in(strategy, "fp32")
        found = {}
        try:
            for precision, run_dir in run_dirs.items():
                seen: dict[str, set[str]] = {"forward": set(), "trained": set(), "outputs": set()}

                with session_of(run_dir, world) as session:
                    engine = session.t.strategy
                    layer = next(module for module in engine.model.modules() if isinstance(module, nn.Linear))
                    layer.register_forward_hook(lambda _m, _i, out, to=seen: to["forward"].add(str(out.dtype)))
                    engine.model.register_forward_hook(lambda _m, _i, out, to=seen: to["outputs"].add(str(out.dtype)))
                    late = None
                    for micro_batches in session.batches():
                        late = loop.train_step(session.t, micro_batches, session.flags)
                        session.deliver_metrics(late)
                    for held in engine.state.held().values():
                        if held.values.is_floating_point() and held.values.dim():
                            seen["trained"].add(str(held.values.dtype))
                    session.checkpoints.save()
                found[precision] = {name: sorted(values) for name, values in seen.items()}
                found[precision]["effect"] = RunDir(run_dir).effect()
        finally:
            world.close()
        return found

    return in_silence(go)


@pytest.fixture(scope="module")
def trained(every_combination: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return, for each strategy and precision, the folder of a run and what was seen in it."""
    folder = tmp_path_factory.mktemp("precisions")
    recipe = write_recipe(folder, RECIPE)
    found: dict[str, dict[str, Any]] = {}
    for strategy, world_size in ways(every_combination):
        precisions = ("fp32", "bf16", "fp16") if strategy.startswith("zero") else ("fp32", "bf16", "fp16", "fp64")
        run_dirs = {precision: folder / f"{strategy}-{precision}" for precision in precisions}
        for precision, run_dir in run_dirs.items():
            create(run_dir, recipe, (f"train.precision={precision}",), strategy, world_size)
        names = {precision: str(run_dir) for precision, run_dir in run_dirs.items()}
        seen = in_world(world_size, look, strategy, names, timeout_s=300)[0]
        found[strategy] = {precision: {"run": run_dirs[precision], **seen[precision]} for precision in seen}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EACH)
def test_every_precision_is_the_same_under_every_strategy(trained: dict[str, Any], strategy: str) -> None:
    forward = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
    for precision, seen in trained[strategy].items():
        kept = "float64" if precision == "fp64" else "float32"
        assert seen["forward"] == [f"torch.{forward[precision]}"]
        assert seen["outputs"] == seen["trained"] == [f"torch.{kept}"]
        assert seen["effect"]["weights"] == seen["effect"]["gradients"] == seen["effect"]["optimizer_state"] == kept
        assert seen["effect"]["precision"] == precision
        with Reader(last(seen["run"])) as reader:
            stored = {spec.dtype for spec in reader.manifest.specs.values() if spec.shape}
            assert stored == {"F64" if precision == "fp64" else "F32"}
            assert ("loss_scale" in reader.manifest.scalars) == (precision == "fp16")
        ours, theirs = losses(seen["run"]), losses(trained["ddp"][precision]["run"])
        gap = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        print(f"{strategy} {precision}: losses differ from ddp's by {gap:.1e} at most")
        assert len(ours) == 6
        assert gap <= TOLERANCE[precision]
    curves = {precision: tuple(losses(seen["run"])) for precision, seen in trained[strategy].items()}
    assert len(set(curves.values())) == len(curves), "each computes with numbers of its own"


@pytest.mark.slow
def test_the_scale_of_the_loss_is_in_the_rows_of_fp16_alone(trained: dict[str, Any]) -> None:
    for precision in ("bf16", "fp16"):
        steps = [row for row in rows(trained["zero3"][precision]["run"]) if row["event"] == "train"]
        assert [row.get("loss_scale") for row in steps] == [65536.0 if precision == "fp16" else None] * 6


def refusal(strategy: str, precision: str) -> str:
    """Return what is said of what cannot be."""

    def go() -> str:
        try:
            open_in(strategy, precision)
        except UserError as error:
            return str(error)
        return "nothing"

    return in_silence(go)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp2"])
@pytest.mark.parametrize(
    ("precision", "message"), [("tf32", "tf32 needs an NVIDIA GPU"), ("fp8", "fp8 needs a GPU of compute capability")]
)
def test_what_a_cpu_cannot_is_refused(strategy: str, precision: str, message: str) -> None:
    assert message in in_world(1, refusal, strategy, precision)[0]


@pytest.mark.slow
def test_fp64_under_deepspeed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert "DeepSpeed keeps what it trains in fp32" in in_world(1, refusal, "zero1", "fp64")[0]
    recipe = write_recipe(tmp_path, RECIPE.replace("fp32", "fp64"))
    run = tmp_path / "run"
    for processes in (1, 2):
        ended = cli("train", recipe, "--run-dir", run, "--strategy", "zero3", "--processes", processes)
        assert ended.status == 1
        assert "train.precision is fp64 and the strategy zero3" in ended.err
        assert not run.exists()


# --------------------------------------------------------------------------------------------------------------------
# Overflow


def held_by(engine: Any, *roles: str) -> dict[str, Tensor]:
    """Return copies of what this rank holds."""
    return {name: held.values.clone() for name, held in engine.state.held().items() if held.role in roles}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def attempts_of(session: Any, bad: dict[int, int], scales: list[float] | None, grows_after: int) -> dict[str, Any]:
    """Train a session's steps, noting each attempt at one.

    `bad`: the number of first attempts at a step that give the last rank an infinite gradient. `scales`: what the loss
    of each step is to be scaled by, instead of what its overflows make of it.
    """
    from distrain.loop import train_step

    t, engine = session.t, session.t.strategy
    is_last = t.world.rank == t.world.world_size - 1
    attempts: list[dict[str, Any]] = []
    tries: dict[int, int] = {}
    passes = [0]
    before: dict[str, Tensor] = {}
    engine.scale.grows_after = grows_after

    def note(step: int, *, taken: bool) -> None:
        attempts.append(
            {
                "step": step,
                "taken": taken,
                "unchanged": same(before, held_by(engine, "parameter", "optimizer", "ema")),
                "scale": engine.scale.scale,
                "good_steps": engine.scale.good_steps,
                "lr": engine.optimizer.param_groups[0]["lr"],
            }
        )

    def begin(*_: Any) -> None:
        if passes[0] == 0:
            tries[t.step] = tries.get(t.step, 0) + 1
            if tries[t.step] > 1:
                note(t.step, taken=False)
        passes[0] = (passes[0] + 1) % t.strategy.accumulation

    def overflow(_module: nn.Module, _inputs: Any, outputs: Tensor) -> None:
        if is_last and tries[t.step] <= bad.get(t.step, 0):
            outputs.register_hook(lambda gradient: torch.full_like(gradient, math.inf))

    # before those of a strategy, which gather weights
    handles = [
        engine.model.register_forward_pre_hook(begin, prepend=True),
        engine.model.register_forward_hook(overflow),
    ]
    for micro_batches in session.batches():
        before = held_by(engine, "parameter", "optimizer", "ema")
        if scales is not None:
            engine.scale.scale, engine.scale.good_steps = scales[t.step], 0
        numbers = train_step(t, micro_batches, session.flags)
        note(t.step - 1, taken=True)
        session.deliver_metrics(numbers)
        if session.checkpoints.due():
            session.checkpoints.save()
    for handle in handles:
        handle.remove()
    state = {name: value.tolist() for name, value in held_by(engine, "parameter", "optimizer", "ema", "buffer").items()}
    return {"attempts": attempts, "state": state, "effect": engine.effect()}


GROWS_AFTER = 2
BAD = {1: 1, 4: 2}
SCALES = [65536.0, 32768.0, 32768.0, 65536.0, 16384.0, 16384.0]
"""Of the attempt at each step that is taken, with what is bad and when it grows."""


def overflow(strategy: str, run_dir: str, calm_dir: str, never_dir: str) -> dict[str, Any]:
    """Train with overflows, then without but with the scales that these led to, then with nothing else."""

    def go() -> dict[str, Any]:
        world = open_in(strategy, "fp16")
        found: dict[str, Any] = {}
        try:
            with session_of(run_dir, world) as session:
                found["rough"] = attempts_of(session, BAD, None, GROWS_AFTER)
            with session_of(calm_dir, world) as session:
                found["calm"] = attempts_of(session, {}, SCALES, 2000)
            try:
                with session_of(never_dir, world) as session:
                    found["never"] = attempts_of(session, {0: 1000}, None, 2000)
            except UserError:
                found["never"] = traceback.format_exc()
        finally:
            world.close()
        return found

    return in_silence(go)


def continued(strategy: str, run_dirs: list[str]) -> list[dict[str, Any]]:
    """Return the scale with which each run goes on."""

    def go() -> list[dict[str, Any]]:
        world = open_in(strategy, "fp16")
        found = []
        try:
            for run_dir in run_dirs:
                with session_of(run_dir, world) as session:
                    found.append({"step": session.t.step} | session.t.strategy.scale.state())
        finally:
            world.close()
        return found

    return in_silence(go)


@pytest.fixture(scope="module")
def overflowed(every_combination: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what was noted on each rank under each strategy, and the folder of the run."""
    folder = tmp_path_factory.mktemp("overflow")
    recipe = write_recipe(folder, NORMED)
    found = {}
    for strategy, world_size in ways(every_combination):
        runs = [folder / f"{strategy}-{kind}" for kind in ("rough", "calm", "never")]
        for run in runs:
            create(run, recipe, (), strategy, world_size)
        ranks = in_world(world_size, overflow, strategy, *map(str, runs), timeout_s=300)
        found[strategy] = {"ranks": ranks, "run": runs[0]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EACH)
def test_a_step_that_overflows_is_made_again_on_all_ranks(overflowed: dict[str, Any], strategy: str) -> None:
    first, *others = [rank["rough"]["attempts"] for rank in overflowed[strategy]["ranks"]]
    assert all(other == first for other in others), "the ranks agree"
    assert [(each["step"], each["taken"]) for each in first] == [
        (0, True), (1, False), (1, True), (2, True), (3, True), (4, False), (4, False), (4, True), (5, True)
    ]  # fmt: skip
    assert [each["unchanged"] for each in first] == [not each["taken"] for each in first], "to the bit"
    assert [(each["scale"], each["good_steps"]) for each in first] == [
        (65536, 1), (32768, 0), (32768, 1), (65536, 0), (65536, 1), (32768, 0), (16384, 0), (16384, 1), (32768, 0)
    ]  # fmt: skip
    lr = {each["step"]: each["lr"] for each in first if each["taken"]}
    assert all(each["lr"] == lr[each["step"]] for each in first)
    taken = [row for row in rows(overflowed[strategy]["run"]) if row["event"] == "train"]
    assert [row["step"] for row in taken] == [1, 2, 3, 4, 5, 6]
    assert [row["loss_scale"] for row in taken] == SCALES
    assert [row["samples"] for row in taken] == [12, 24, 36, 48, 60, 72]
    cosine = [0.01 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert list(lr.values()) == pytest.approx([0.005, *cosine]), "the schedule advances with what is taken"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EACH)
def test_an_overflow_and_growth_leave_no_trace(overflowed: dict[str, Any], strategy: str) -> None:
    """In weights, optimizer, average and buffers: as with those scales from the start, whatever led to them."""
    for rank in overflowed[strategy]["ranks"]:
        rough, calm = rank["rough"]["state"], rank["calm"]["state"]
        assert any("running_mean" in name for name in rough)
        assert [name for name in rough if rough[name] != calm[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EACH)
def test_a_gradient_that_is_never_finite_ends_the_run_on_all_ranks(overflowed: dict[str, Any], strategy: str) -> None:
    for rank in overflowed[strategy]["ranks"]:
        assert "UserError: the gradients are not finite whatever the loss is scaled by" in rank["never"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [pytest.param(*way, marks=[ZERO1] if way[0] == "zero1" else [], id=way[0]) for way in WAYS],
)
def test_the_loss_scale_is_resumed_under_every_strategy(
    overflowed: dict[str, Any], strategy: str, world_size: int, every_combination: bool, tmp_path: Path
) -> None:
    names = list(overflowed)
    at = names.index(strategy)
    # its own, and another's, each another
    sources = names if every_combination else [strategy, names[(at + 2) % len(names)]]
    copies = [str(stopped_copy(overflowed[source]["run"], tmp_path / source, step=2)) for source in sources]
    for found in in_world(world_size, continued, strategy, copies, timeout_s=300):
        assert found == [{"step": 2, "scale": 32768.0, "good_steps": 1}] * len(copies)


# --------------------------------------------------------------------------------------------------------------------
# What took effect, and the same file from every strategy


def reopen(strategy: str, run_dir: str, out: str) -> dict[str, Any]:
    """Restore a run's checkpoint, save it again elsewhere without a step, and look at what holds it."""

    def go() -> dict[str, Any]:
        from torch.distributed.tensor import DTensor

        from distrain.checkpoint import Saver

        world = open_in(strategy, "fp32")
        try:
            with session_of(run_dir, world) as session:
                engine = session.t.strategy
                storages = {}
                for held in engine.state.held().values():
                    if held.role in ("parameter", "optimizer") and held.values.dim():
                        storage = held.values.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
                found = {
                    "effect": engine.effect(),
                    "recorded": RunDir(run_dir).effect(),
                    "engine": type(engine.wrapped).__name__,
                    "dtensors": all(isinstance(parameter, DTensor) for parameter in engine.model.parameters()),
                    "bytes": sum(storages.values()),
                }
                session.checkpoints.saver = Saver(Path(out), world, asynchronous=False)
                session.state.saved_step = -1
                session.checkpoints.save()
        finally:
            world.close()
        return found

    return in_silence(go)


@pytest.fixture(scope="module")
def reopened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return, for each way of the matrix, what each rank found and the folder of what it saved again."""
    folder = tmp_path_factory.mktemp("reopened")
    recipe = write_recipe(folder, RECIPE)
    source = folder / "source"
    create(source, recipe, ("model.d_model=24",), "single", 1)
    in_world(1, train_in_turn, "single", [str(source)], timeout_s=300)
    found = {}
    for name, (strategy, world_size) in zip(NAMES, MATRIX, strict=True):
        # two at a time do not fit four processes
        copy, out = stopped_copy(source, folder / name, 3, 1 if world_size == 4 else None), folder / f"{name}-again"
        found[name] = {
            "ranks": in_world(world_size, reopen, strategy, str(copy), str(out), timeout_s=300),
            "checkpoint": out / "step-00000003",
            "source": checkpoint(source, 3),
        }
    return found


@pytest.mark.slow
def test_every_strategy_s_state_exports_to_the_same_bytes(reopened: dict[str, Any], tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"ema": True}, {"dtype": "bf16"}, {"ema": True, "dtype": "bf16"}]
    expected = []
    for index, option in enumerate(options):
        path = tmp_path / f"source-{index}.safetensors"
        export(reopened["singlex1"]["source"], path, **option)
        expected.append(path.read_bytes())
    assert len(set(expected)) == len(options)
    for name, each in reopened.items():
        for index, option in enumerate(options):
            path = tmp_path / f"{name}-{index}.safetensors"
            export(each["checkpoint"], path, **option)
            assert path.read_bytes() == expected[index], f"{name} {option}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), zip(NAMES, MATRIX, strict=True), ids=NAMES)
def test_what_took_effect_is_what_was_asked_for(reopened: dict[str, Any], name: str, way: tuple[str, int]) -> None:
    strategy, world_size = way
    hybrid, strategy = strategy == "hsdp", spec(strategy).strategy
    sharded, copies = strategy not in ("single", "ddp"), 2 if hybrid else 1
    for rank in reopened[name]["ranks"]:
        effect = rank["effect"]
        known = {key: rank["recorded"][key] for key in ("parameters", "trainable", "total_steps", "compile")}
        assert known["parameters"] == known["trainable"] > 0
        assert rank["recorded"] == effect | known, "the folder tells the same"
        assert (effect["strategy"], effect["processes"]) == (strategy, world_size)
        assert effect["replicas"] == (copies if sharded else world_size)
        placements = "(Replicate(), Shard(dim=0))" if hybrid else "(Shard(dim=0),)"
        assert effect.get("placements") == (placements if strategy == "fsdp2" else None)
        engine = {"single": "GPT", "ddp": "DistributedDataParallel", "fsdp2": "FSDPModule"}
        assert effect["engine"] == engine.get(strategy, "DeepSpeedEngine")
        assert rank["engine"] == engine.get(strategy, "DeepSpeedEngine").replace("FSDPModule", "FSDPGPT")
        assert effect.get("stage") == (int(strategy[-1]) if strategy.startswith("zero") else None)
        assert rank["dtensors"] == (strategy == "fsdp2")
        assert (strategy == "fsdp2") == ("DeviceMesh" in effect.get("mesh", ""))
        assert (effect["sharded"], effect["offload"], effect["forward"]) == (sharded, "none", "as stored")
        assert (effect["accumulation"], effect["clip_norm"]) == (3 if hybrid else 12 // 2 // world_size, 0.5)
        assert ("deepspeed" in effect["versions"]) == strategy.startswith("zero")
        for kind in ("parameter_bytes", "optimizer_bytes"):
            full, ranks = effect[kind]["full"], effect[kind]["ranks"]
            assert len(ranks) == world_size
            if sharded:
                # each element once, but for the counters of steps, which every rank has
                assert sum(ranks) == pytest.approx(copies * full, rel=0.02)
                assert max(ranks) <= 1.1 * copies * full / world_size
            else:
                assert ranks == [full] * world_size
        state = 3 * effect["parameter_bytes"]["full"] / (world_size // copies if sharded else 1)
        print(f"{name}: {rank['bytes']} bytes of memory for a share of {state:.0f}")
        assert 0.9 * state <= rank["bytes"] <= 1.1 * state


def broken(strategy: str, folder: str) -> dict[str, str]:
    """Break each thing that a strategy stands on; returns what is said of it."""

    def go() -> dict[str, str]:
        from accelerate import DistributedType

        world = open_in(strategy, "fp32")
        accelerator = world.accelerator
        said = {}

        def attempt(kind: str, owner: Any = None, name: str = "", value: Any = None) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if isinstance(owner, dict):
                    patch.setitem(owner, name, value)
                elif owner is not None:
                    patch.setattr(owner, name, value)
                try:
                    with session_of(f"{folder}/{strategy}-{kind}", world):
                        said[kind] = "nothing"
                except RuntimeError as error:
                    said[kind] = str(error)

        if strategy == "ddp":
            attempt("unwrapped", accelerator, "prepare_model", lambda model: model)
        elif strategy == "fsdp2":
            from distrain.parallel import fsdp2

            attempt("unsharded", fsdp2, "fully_shard", lambda module, **_: module)
        elif strategy == "hsdp":
            from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

            attempt("flat", DeviceMesh, "from_group", lambda _, device, *__, **___: init_device_mesh(device, (4,)))
        else:
            config, prepare = accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.prepare

            def clipping(*args: Any) -> Any:
                config["gradient_clipping"] = 9.0
                return prepare(*args)

            attempt("clipping", accelerator, "prepare", clipping)
            attempt("stage", config["zero_optimization"], "stage", 1)
            attempt("fallback", accelerator.state._shared_state, "distributed_type", DistributedType.MULTI_CPU)
        world.close()
        return said

    return in_silence(go)


BROKEN = {
    "ddp": {"unwrapped": "the model that trains is a _Carrier"},
    "fsdp2": {"unsharded": "are not sharded over 2 ranks"},
    "hsdp": {"flat": "fsdp2, 2 replicas was asked for and did not take effect: tokens.weight and 16"},
    "zero2": {
        "clipping": "DeepSpeed accumulates 6 and clips to 9.0",
        "stage": "zero2 was asked for and did not take effect: DeepSpeed runs ZeRO stage 1",
        "fallback": "zero2 was asked for and did not take effect: Accelerate has prepared for MULTI_CPU",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", BROKEN)
def test_what_did_not_take_effect_is_refused(strategy: str, tmp_path: Path) -> None:
    recipe, world_size = write_recipe(tmp_path, RECIPE), 4 if strategy == "hsdp" else 2
    for kind in BROKEN[strategy]:
        create(tmp_path / f"{strategy}-{kind}", recipe, ONE_AT_A_TIME, strategy, world_size)
    for said in in_world(world_size, broken, strategy, str(tmp_path), timeout_s=300):
        assert said.keys() == BROKEN[strategy].keys()
        for kind, message in BROKEN[strategy].items():
            assert message in said[kind]
            assert "did not take effect" in said[kind]
            assert "Nothing was trained" in said[kind]


# --------------------------------------------------------------------------------------------------------------------
# Memory

WIDE = NORMED.replace("16]}, {BatchNorm1d: 16}, ReLU, {Linear: [16,", "8192]}, ReLU, {Linear: [8192,").replace(
    "fp16", "fp32"
)
"""Its first weight is larger than what DeepSpeed is told to send at once."""


@pytest.mark.slow
def test_a_weight_larger_than_what_is_sent_at_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WIDE)
    runs = {}
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        runs[strategy] = tmp_path / strategy
        create(runs[strategy], recipe, ("train.steps=3",), strategy, 2)
        in_world(2, train_in_turn, strategy, [str(runs[strategy])], timeout_s=300)
    expected = state(last(runs["ddp"]))
    assert max(value.size for value in expected.values()) == 64 * 8192 > 2**18
    for run in runs.values():
        assert losses(run) == pytest.approx(losses(runs["ddp"]), rel=1e-5)
        for name, value in state(last(run)).items():
            assert abs(value - expected[name]).max() <= 1e-5 * max(abs(expected[name]).max(), 1.0), name


@pytest.mark.slow
def test_blocks_computed_again_keep_the_same_tensors_under_zero3(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    options = ("train.activation_checkpointing=true", "train.precision=bf16", "train.steps=3")
    for strategy in ("ddp", "zero3"):
        create(tmp_path / strategy, recipe, options, strategy, 2)
        in_world(2, train_in_turn, strategy, [str(tmp_path / strategy)], timeout_s=300)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "ddp"), rel=TOLERANCE["bf16"])
