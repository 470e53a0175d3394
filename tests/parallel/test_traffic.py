"""What the ranks send each other in a step: the bytes and collectives of each strategy; less of it costs no bit."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import Blocks
from runs import captured, last, state, write_recipe
from test_matrix import create, spec, stopped_copy, train_in_turn
from torch import Tensor, nn
from traffic import Case, Collectives, Parameter, by_kind
from worlds import in_world

from distrain.config import UserError
from distrain.parallel import BuildSpec, StrategySpec, build_strategy, open_world
from distrain.parallel.collective_forward import GatherOrder
from distrain.parallel.comm import World
from distrain.parallel.tuning import Choice, Tuning
from distrain.run.folder import RunDir

RECIPE = """
name: traffic
task: classification
data: {name: "own_parts:Points", samples: 48, tests: 12}
model: {name: "odd_models:MODEL"}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
batch: {global: 16, micro: 2}
train: {steps: 3, precision: bf16}
eval: {every: null}
checkpoint: {every: null, async: false}
"""

Seen = dict[str, Any]


def watched(strategy: str, run_dirs: dict[str, str]) -> dict[str, Seen]:
    """Make the steps of each run in this world; returns what was sent in the last one, and what the run came to."""
    from distrain.config.yaml import load_recipe
    from distrain.loop import train_step
    from distrain.parallel.precision import resolve
    from distrain.training.run_loop import Session

    found: dict[str, Seen] = {}

    def go() -> int:
        world = open_world("fp32", spec(strategy))
        for name, run_dir in run_dirs.items():
            recipe = load_recipe(RunDir(run_dir).recipe_path).recipe
            world.mixed_precision = resolve(recipe.train.precision, world.device)
            world.precision = world.mixed_precision.name
            with Session.open(RunDir(run_dir), recipe, world) as session:
                engine = session.t.strategy
                computed: list[tuple[int, str]] = []
                for module_name, module in engine.model.named_modules():
                    if type(module).__name__.removeprefix("FSDP") == "Block":
                        module.norm.register_forward_pre_hook(
                            lambda *_, to=computed, of=module_name: to.append((len(counter.calls), of))
                        )
                for micro_batches in session.batches():
                    computed.clear()
                    with Collectives() as counter:
                        late = train_step(session.t, micro_batches, session.flags)
                    session.deliver_metrics(late)
                digest = hashlib.sha256()
                for key, held in sorted(engine.state.held().items()):
                    digest.update(key.encode() + held.values.detach().cpu().numpy().tobytes())
                found[name] = {
                    "calls": counter.calls,
                    "computed": computed,
                    "bits": digest.hexdigest(),
                    "weights": [engine.shard(p).values.detach().clone() for p in engine.model.parameters()],
                    "effect": engine.effect(),
                }
        world.close()
        return 0

    captured(go)
    return found


def run_each(folder: Path, strategy: str, ranks: int, runs: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Seen]:
    """Return what rank 0 saw of runs of (model, overrides), all in one world."""
    run_dirs = {}
    for name, (model, overrides) in runs.items():
        recipe = write_recipe(folder, RECIPE.replace("MODEL", model), f"{model}.yaml")
        run_dirs[name] = str(folder / name)
        create(folder / name, recipe, overrides, strategy, ranks)
    return in_world(ranks, watched, strategy, run_dirs, timeout_s=300)[0]


# --------------------------------------------------------------------------------------------------------------------
# Bytes and collectives

WIDTH = 400


def linear(inputs: int, outputs: int) -> list[Parameter]:
    return [Parameter((outputs, inputs), cast=True), Parameter((outputs,), cast=True)]


BLOCK = [Parameter((WIDTH,)), Parameter((WIDTH,)), *linear(WIDTH, 2 * WIDTH), *linear(2 * WIDTH, WIDTH)]
WIDE = [[*linear(5, WIDTH), *linear(WIDTH, 3)], BLOCK, BLOCK]
"""The parameters of `odd_models:Wide`."""
RANKS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2, "hsdp": 4}
SLOW = ("zero1", "zero2", "hsdp")


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RANKS]
)
def test_a_step_sends_what_theory_says(tmp_path: Path, strategy: str) -> None:
    ranks = RANKS[strategy]
    cases, runs = {}, {}
    for precision, times in itertools.product(("fp32", "bf16"), (1, 4)):
        name = f"{precision}-{times}"
        runs[name] = ("Wide", (f"train.precision={precision}", f"batch.global={2 * ranks * times}"))
        cases[name] = Case(strategy, ranks, WIDE, times, autocast=precision == "bf16")
    if strategy in ("fsdp2", "hsdp"):
        kept = ("tune.cast_before_gather=false", "tune.reduce_every_micro=true")
        runs["as-before"] = ("Wide", (f"batch.global={8 * ranks}", *kept))
        cases["as-before"] = Case(strategy, ranks, WIDE, 4, autocast=True, casts=False, every_micro=True)
    for name, seen in run_each(tmp_path, strategy, ranks, runs).items():
        theory, most = cases[name].theory(), cases[name].counts()
        found = by_kind(seen["calls"])
        assert found.keys() == theory.keys(), name
        for kind, (count, nbytes) in found.items():
            least_bytes, most_bytes = theory[kind]
            assert least_bytes <= nbytes <= most_bytes, f"{name}: {kind} of {nbytes} bytes, {theory[kind]} in theory"
            assert count <= most[kind], f"{name}: {count} of {kind}"
            if strategy in ("fsdp2", "hsdp"):
                assert count == most[kind], f"{name}: {count} of {kind}"
        if strategy in ("fsdp2", "hsdp"):
            narrow = cases[name].autocast and cases[name].casts
            assert seen["effect"]["gathered_bytes"] == (
                {"bfloat16": 2 * sum(p.numel for p in cases[name].parameters if p.cast), "float32": 4 * 4 * WIDTH}
                if narrow
                else {"float32": 4 * sum(p.numel for p in cases[name].parameters)}
            )


# --------------------------------------------------------------------------------------------------------------------
# Bits

MANY = ("batch.global=16",)
"""Four micro-batches of two ranks."""
TWICE = (*MANY, "train.steps=2")
UNCAST = ("tune.cast_before_gather=false",)
EVERY = ("tune.reduce_every_micro=true",)
MODELS = ("Mixed", "TiedHead", "Twice")


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp2", 2), pytest.param("hsdp", 4, marks=pytest.mark.more)])
def test_less_traffic_costs_no_bit(tmp_path: Path, strategy: str, ranks: int) -> None:
    runs = {}
    for model in MODELS if strategy == "fsdp2" else ("Mixed",):
        # each precision, and both ways to reduce, of one model in two processes
        whole = model == "Mixed" and strategy == "fsdp2"
        for precision in ("bf16", "fp16") if whole else ("bf16",):
            for reduces, keys in (("once", ()), ("every", EVERY)) if whole or strategy == "hsdp" else (("once", ()),):
                given = (f"train.precision={precision}", *TWICE, *keys)
                runs[f"{model}-{precision}-{reduces}"] = (model, given)
                runs[f"{model}-{precision}-{reduces}-uncast"] = (model, (*given, *UNCAST))
    runs["ahead"] = ("Mixed", (*TWICE, "tune.prefetch=true"))
    found = run_each(tmp_path, strategy, ranks, runs)
    for name in [name for name in found if name.endswith("-uncast")]:
        cast, uncast = found[name.removesuffix("-uncast")], found[name]
        assert cast["bits"] == uncast["bits"], name
        assert cast["effect"]["gathered_bytes"] != uncast["effect"]["gathered_bytes"], name
    assert found["ahead"]["bits"] == found["Mixed-bf16-once"]["bits"]


def test_one_reduction_in_a_step_gives_the_same_mean(tmp_path: Path) -> None:
    # not AdamW, which makes steps of full length of what is noise
    keys = ("train.precision=fp32", "optim.name=sgd", "optim.lr=0.1", *MANY)
    runs = {"once": ("Mixed", keys), "every": ("Mixed", (*keys, *EVERY)), "idle": ("IdleBlock", keys)}
    runs["idle-every"] = ("IdleBlock", (*keys, *EVERY))
    found = run_each(tmp_path, "fsdp2", 2, runs)
    for one, other in (("once", "every"), ("idle", "idle-every")):
        assert found[one]["bits"] != found[other]["bits"], "the order of sums"
        torch.testing.assert_close(found[one]["weights"], found[other]["weights"], rtol=1e-4, atol=1e-5)


def test_a_block_is_gathered_ahead(tmp_path: Path) -> None:
    runs = {"ahead": ("Wide", ("tune.prefetch=true",)), "not": ("Wide", ())}
    found = run_each(tmp_path, "fsdp2", 2, runs)
    # what was gathered before each block computed: what is in no block, that block, and ahead of time the next one
    assert [count for count, _ in found["ahead"]["computed"][:2]] == [3, 3]
    assert [count for count, _ in found["not"]["computed"][:2]] == [2, 3]
    assert by_kind(found["ahead"]["calls"]) == by_kind(found["not"]["calls"])


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, RECIPE.replace("MODEL", "Mixed").replace("every: null, async", "every: 1 steps, async")
    )
    straight = tmp_path / "straight"
    create(straight, recipe, (*MANY, "tune.prefetch=true"), "fsdp2", 2)
    in_world(2, train_in_turn, "fsdp2", [str(straight)], timeout_s=120)
    resumed = stopped_copy(straight, tmp_path / "resumed", 1)
    in_world(2, train_in_turn, "fsdp2", [str(resumed)], timeout_s=120)
    ours, theirs = state(last(resumed)), state(last(straight))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_gradients_are_reduced_in_bf16_where_that_is_asked_for(tmp_path: Path) -> None:
    runs = {"fp32": ("Wide", (*MANY, *EVERY)), "bf16": ("Wide", (*MANY, "tune.cast_before_reduce=true"))}
    found = run_each(tmp_path, "fsdp2", 2, runs)
    fp32, bf16 = (by_kind(found[name]["calls"])["reduce_scatter"] for name in ("fp32", "bf16"))
    assert bf16 == (fp32[0], fp32[1] // 2), "with each micro-batch too: they are added up in fp32"
    assert found["bf16"]["effect"]["gradients"] == "float32"
    assert found["bf16"]["bits"] != found["fp32"]["bits"]
    for ours, theirs in zip(found["bf16"]["weights"], found["fp32"]["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-2)  # of three steps of 0.01 at most


class Skipping(Blocks):
    """Leaves a block out where it does not train."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.into(x))
        return self.head(self.blocks[1](x) if self.training else x)


def ahead_of_a_change() -> tuple[list[float], list[float]]:
    """Gather a block ahead and not use it, make its weights zero, and use it; returns the outputs without and with."""
    world = open_world("fp32", StrategySpec("fsdp2"))
    world.tuning = Tuning({"prefetch": Choice(True, "for this test")})
    engine = build_strategy(
        world,
        BuildSpec(
            model=Skipping,
            optimizer=lambda built: torch.optim.SGD(built.parameters(), lr=0.1),
            loss_sum=lambda built, index: built(torch.ones(1, 5)).sum(),
            micro_batch_size=1,
            accumulation=1,
            clip_norm=None,
            ema=None,
        ),
    )
    with torch.no_grad():
        engine.model.eval()
        without = engine.model(torch.ones(1, 5))
        engine.reshard()
        for parameter in engine.model.blocks[1].parameters():
            engine.shard(parameter).values.zero_()
        engine.model.train()
        found = engine.model(torch.ones(1, 5))
        engine.reshard()
    world.close()
    return without[0].tolist(), found[0].tolist()


def test_what_was_gathered_ahead_and_not_used_is_not_used_later() -> None:
    for without, found in in_world(2, ahead_of_a_change, timeout_s=60):
        assert found == without


class Branching(Blocks):
    """Takes another way for other values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x[0, 0] > 0) else -x)


def cast_where_values_decide(asked: bool) -> dict[str, Any] | str:
    """Build a model whose parameters cannot be looked through; returns what the key came to, or the error."""
    world = open_world("bf16", StrategySpec("fsdp2"))
    world.tuning = Tuning({"cast_before_gather": Choice(True, "for this test", asked=asked)})
    plan = BuildSpec(
        model=Branching,
        optimizer=lambda built: torch.optim.SGD(built.parameters(), lr=0.1),
        loss_sum=lambda built, index: built(torch.ones(1, 5)).sum(),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=None,
        ema=None,
    )
    try:
        return build_strategy(world, plan).effect()["tune"]["cast_before_gather"]
    except UserError as error:
        return str(error)
    finally:
        world.close()


def test_a_cast_that_turns_out_impossible_is_off_or_refused() -> None:
    for found in in_world(2, cast_where_values_decide, False, timeout_s=60):
        assert found["on"] is False
        assert "is tried without values" in found["why"]
    for error in in_world(2, cast_where_values_decide, True, timeout_s=60):
        assert error.startswith("tune.cast_before_gather is true, and cannot work here: which weights are only cast to")


class Reaching(nn.Module):
    """Reaches the parts that it is given in a pass."""

    def __init__(self, world: World):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.acting = ""
        self.order = GatherOrder(world, self, lambda: self.acting)

    def forward(self, *parts: str) -> Tensor:
        for part in parts:
            self.order.reach(part)
        return self.weight.sum()


def calls_and_keys(steps: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Return how many collectives each of some steps took, and the keys in the store after it.

    A step makes its passes and then goes back: `abc` reaches these parts, `(abc)` has no gradients, and `g:abc` is in
    the turn of the optimizer g.
    """
    world = open_world("fp32", StrategySpec("fsdp2"))
    model = Reaching(world)
    store = torch.distributed.distributed_c10d._get_default_store()
    found = []
    for passes in steps:
        torch.distributed.barrier()
        with Collectives() as counter:
            for each in passes:
                model.acting, _, parts = each.rpartition(":")
                with torch.set_grad_enabled("(" not in parts):
                    model(*parts.strip("()"))
            model.order.end()
        torch.distributed.barrier()
        found.append((len(counter.calls), store.num_keys()))
    world.close()
    return found


def test_an_order_that_has_changed_is_checked_by_each_rank_alone_again() -> None:
    passes = ("abc", "abc", "ab", "ab", "ab", "abc", "abc", "cb", "cb", "ab", "cb", "abc")
    for found in in_world(2, calls_and_keys, [[each] for each in passes], timeout_s=60):
        calls, keys = zip(*found, strict=True)
        assert calls[0] > 0
        assert calls[7] > 0, "a part comes where another was known"
        known = [at for at in range(len(calls)) if at not in (0, 7)]
        assert [calls[at] for at in known] == [0] * len(known), calls
        assert max(keys) <= min(keys) + 2, "one of each rank, from the last change on"


@pytest.mark.parametrize(
    "step",
    [("ab", "cb"), ("ab", "(c)", "(bc)"), ("(c)", "ab", "cab"), ("d:ab", "g:cab"), ("d:ab", "d:b", "g:b", "g:ab")],
    ids=" ".join,
)
def test_each_pass_of_a_step_has_an_order_of_its_own(step: tuple[str, ...]) -> None:
    for found in in_world(2, calls_and_keys, [step] * 4, timeout_s=60):
        (first, keys), *others = found
        assert first > 0
        assert others == [(0, keys)] * 3


def take_orders_in_turn(passes: Sequence[Sequence[str]]) -> list[str]:
    """Make passes in known orders, at the end each rank its own; returns what each rank says."""
    world = open_world("fp32", StrategySpec("fsdp2"))
    model = Reaching(world)
    said = ""
    for _ in range(2):
        model("a", "b")
        model("a", "c")
        model.order.end()
    try:
        for parts in passes[world.rank]:
            model(*parts)
    except UserError as error:
        said = str(error)
    found = world.gather(said)  # where what it gathers would make a rank wait
    world.close()
    return found


def test_ranks_that_take_known_orders_in_other_places_are_found() -> None:
    for first, second in in_world(2, take_orders_in_turn, [["ac", "ab"], ["ab", "ac"]], timeout_s=60):
        assert "is not used by all ranks in the same place: rank 0 reaches c where rank 1 reaches b" in first
        assert second == ""
