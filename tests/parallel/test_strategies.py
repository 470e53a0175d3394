"""Every strategy trains every kind of model as ddp does, and its checkpoints go on under any other."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Ended, captured, last, losses, state, write_recipe
from test_matrix import create, spec, stopped_copy
from worlds import in_world

from distrain.checkpoint import Reader
from distrain.run.folder import RunDir

RECIPE = """
name: odd
task: classification
data: {name: "own_parts:Points", samples: 48, tests: 12}
model: {name: "odd_models:MODEL"}
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
schedule: {name: cosine, warmup: 2 steps}
batch: {global: 12, micro: 2}
train: {steps: 4, precision: fp32, ema: 0.9}
eval: {every: null}
checkpoint: {every: 2 steps, keep: 100, async: false}
log: {every: 1 steps}
"""
TOLERANCE = 1e-5

SGD = ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1")
MUON = ("optim.name=muon", "optim.lr=0.02", "optim.others={lr: 0.01}")
GROUPS = (
    'optim.groups=[{params: "blocks.0.*", lr_scale: 0.3, weight_decay: 0.2}, {params: "*.bias", weight_decay: 0}]',
)
FROZEN = ('optim.freeze=["into.*", "blocks.1.*", "head.bias"]',)

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "TiedHead": ("TiedHead", ()),
    "TiedHead-sgd": ("TiedHead", SGD),
    "TiedAcross": ("TiedAcross", ()),
    "TiedOut": ("TiedOut", ()),
    "FrozenBlock": ("FrozenBlock", ()),
    "frozen": ("Blocks", FROZEN),
    "frozen-groups": ("Blocks", (*FROZEN, GROUPS[0].replace("*.bias", "head.*"), *SGD)),
    "groups": ("Blocks", GROUPS),
    "groups-sgd": ("Blocks", (*GROUPS, *SGD)),
    "Idle": ("Idle", ()),
    "IdleBlock": ("IdleBlock", SGD),
    "Buffered": ("Buffered", ()),
    "Normed": ("Normed", ()),
    "Scalars": ("Scalars", ()),
    "Scalars-groups": ("Scalars", GROUPS),
    "Empty": ("Empty", ()),
    "Small": ("Small", ()),
    "Small-sgd": ("Small", SGD),
    "Strided": ("Strided", ()),
    "Single": ("Single", ()),
    "Twice": ("Twice", ()),
    "Listed": ("Listed", ()),
    "groups-muon": ("Blocks", (*GROUPS, *MUON)),
    "TiedHead-muon": ("TiedHead", MUON),
}
DEPENDS_ON_WORLD = ("Buffered", "Normed")
"""Their statistics are those of one rank's samples."""

WAYS = [
    ("single", 1),
    ("ddp", 2),
    ("ddp", 3),
    ("zero1", 2),
    ("zero1", 3),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
]
THREE_AT_A_TIME = ("batch.micro=3",)
"""Where there are four processes."""
NAMES = [f"{strategy}x{world_size}" for strategy, world_size in WAYS]


def train_each(strategy: str, run_dirs: dict[str, str], offloads: tuple[bool, bool] = (False, False)) -> dict[str, str]:
    """Train or go on with each of the runs in this world, one after the other; returns what went wrong, by name."""
    from distrain.loop import train
    from distrain.parallel import open_world

    offload_optimizer, offload_parameters = offloads
    asked = replace(spec(strategy), offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
    world = open_world("fp32", asked)
    wrong: dict[str, str] = {}

    def go() -> int:
        for name, run_dir in run_dirs.items():
            try:
                train(RunDir(run_dir), world)
            except Exception:
                wrong[name] = traceback.format_exc()
        return 0

    try:
        captured(go)
    finally:
        world.close()
    return wrong


def run_all(
    strategy: str, world_size: int, runs: dict[str, Path], offloads: tuple[bool, bool] = (False, False)
) -> dict[str, str]:
    """Return {case: what went wrong}, said by all ranks alike."""
    dirs = {name: str(run) for name, run in runs.items()}
    ranks = in_world(world_size, train_each, strategy, dirs, offloads, timeout_s=300)
    assert all(wrong.keys() == ranks[0].keys() for wrong in ranks), ranks
    return ranks[0]


QUICK = ("ddpx2", "zero2x2", "zero3x2", "fsdp2x2")
"""One way for each class of strategy: enough while one works on them."""


TAKEN: dict[str, Callable[[int], bool]] = {
    "ddpx3": lambda index: False,
    "zero1x2": lambda index: index % 4 == 1,
    "zero1x3": lambda index: index % 4 == 0,
    "zero2x2": lambda index: index % 4 >= 2,
    "zero3x2": lambda index: index % 2 == 1,
    "zero3x3": lambda index: index % 2 == 0,
    "fsdp2x2": lambda index: index % 2 == 1,
    "fsdp2x3": lambda index: index % 2 == 0,
    "hsdpx4": lambda index: index % 4 == 1,
}
"""Which cases of the list a way takes: all between the ways of a class, and those that resumes start from."""


def stands_for_others(way: str, case: str) -> bool:
    """Whether a case is one of those that stand for all."""
    return CASES[case][0] in DEPENDS_ON_WORLD or TAKEN.get(way, lambda _: True)(list(CASES).index(case))


def test_each_class_of_strategy_takes_every_case_and_resumes_start_from_what_is_taken() -> None:
    classes = (["zero1x2", "zero1x3", "zero2x2"], ["zero3x2", "zero3x3"], ["fsdp2x2", "fsdp2x3", "hsdpx4"])
    for ways in (["singlex1"], ["ddpx2"], *classes):
        assert all(any(stands_for_others(way, case) for way in ways) for case in CASES), ways
    for name, source in CHAIN.items():
        assert all(stands_for_others(source, case) for case in resumed_cases(name, every_combination=False)), name


def marks_of(way: str, case: str) -> list[pytest.MarkDecorator]:
    return [
        *([] if way in QUICK else [pytest.mark.slow]),
        *([] if stands_for_others(way, case) else [pytest.mark.more]),
    ]


REFUSED = {("Empty", "zero3"): "parameter nothing has no elements (its shape is (0,)), and ZeRO-3 cannot gather"}


class Straight:
    """The uninterrupted runs of each way, made when they are first asked for."""

    def __init__(self, folder: Path, every_combination: bool):
        self.folder = folder
        self.every_combination = every_combination
        self.made: dict[str, dict[str, str]] = {}

    def run(self, way: str, case: str) -> Path:
        """Return the folder of a run that went well."""
        self._make(way)
        assert case not in self.made[way], self.made[way][case]
        return self.folder / way / case

    def _make(self, way: str) -> None:
        if way not in self.made:
            strategy, _, count = way.rpartition("x")
            world_size = int(count)
            runs = {}
            for name, (model, overrides) in CASES.items():
                if way == "ddpx4" and model not in DEPENDS_ON_WORLD:  # there to be compared with
                    continue
                if not (self.every_combination or stands_for_others(way, name)):
                    continue
                recipe = write_recipe(self.folder, RECIPE.replace("MODEL", model), f"{name}.yaml")
                runs[name] = self.folder / way / name
                runs[name].parent.mkdir(exist_ok=True)
                micro = THREE_AT_A_TIME if world_size == 4 else ()
                create(runs[name], recipe, (*overrides, *micro), strategy, world_size)
            self.made[way] = run_all(strategy, world_size, runs)

    def wrong(self, way: str, case: str) -> str:
        """Return how a run failed."""
        self._make(way)
        return self.made[way][case]


@pytest.fixture(scope="module")
def straight(every_combination: bool, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("engines"), every_combination)


def assert_agrees(found: Path, expected: Path) -> None:
    """The losses, every tensor of the last checkpoint and the names of two runs agree."""
    assert losses(found) == pytest.approx(losses(expected), rel=TOLERANCE)
    ours, theirs = state(last(found)), state(last(expected))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        gap = np.abs(value - theirs[name]).max(initial=0.0)
        assert gap <= TOLERANCE * max(np.abs(theirs[name]).max(initial=0.0), 1.0), f"{name}: {gap}"
    with Reader(last(found)) as a, Reader(last(expected)) as b:
        assert a.manifest.aliases == b.manifest.aliases
        assert a.manifest.scalars["optimizer_values"] == b.manifest.scalars["optimizer_values"]


def expected(case: str, way: str) -> str:
    """Return the way that a run is compared with."""
    model, _ = CASES[case]
    return f"ddpx{way[-1]}" if model in DEPENDS_ON_WORLD else "ddpx2"


@pytest.mark.parametrize(
    ("way", "case"),
    [
        pytest.param(way, case, id=f"{way}-{case}", marks=marks_of(way, case))
        for way, case in itertools.product(NAMES, CASES)
    ],
)
def test_every_strategy_trains_as_ddp_does(straight: Straight, way: str, case: str) -> None:
    model, _ = CASES[case]
    if model in DEPENDS_ON_WORLD and way == "singlex1":
        return
    if said := REFUSED.get((model, way[:5])):
        assert said in straight.wrong(way, case)
        return
    assert_agrees(straight.run(way, case), straight.run(expected(case, way), case))


CHAIN = {
    "singlex1": "fsdp2x3",
    "ddpx2": "hsdpx4",
    "zero1x2": "fsdp2x2",
    "zero2x2": "zero3x2",
    "zero3x2": "fsdp2x3",
    "zero3x3": "zero1x2",
    "fsdp2x2": "zero3x3",
    "fsdp2x3": "zero2x2",
    "hsdpx4": "zero1x3",
}
"""From which run each resumes."""


def resumed_cases(name: str, *, every_combination: bool) -> list[str]:
    """Return the cases with which a way resumes: of what its source takes, those of these remainders by four."""
    turns = {
        "singlex1": (0,),
        "ddpx2": (1,),
        "zero1x2": (3,),
        "zero2x2": (1,),
        "zero3x2": (2,),
        "zero3x3": (1,),
        "fsdp2x2": (2,),
        "fsdp2x3": (3,),
        "hsdpx4": (0,),
    }[name]
    return [
        case
        for index, (case, (model, _)) in enumerate(CASES.items())
        if (every_combination or index % 4 in turns)
        and model not in DEPENDS_ON_WORLD
        and not {(model, name[:5]), (model, CHAIN[name][:5])} & REFUSED.keys()
    ]


RESUMED = ("singlex1", "ddpx2", "zero2x2", "zero3x3", "fsdp2x3")
"""One way for each class of strategy; test_matrix resumes on all."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in RESUMED else [pytest.mark.more]) for name in CHAIN]
)
def test_every_strategy_resumes_from_another(
    straight: Straight, name: str, every_combination: bool, tmp_path: Path
) -> None:
    strategy, world_size = WAYS[NAMES.index(name)]
    cases = resumed_cases(name, every_combination=every_combination)
    micro = 3 if world_size == 4 else None
    resumed = {case: stopped_copy(straight.run(CHAIN[name], case), tmp_path / case, 2, micro) for case in cases}
    assert run_all(strategy, world_size, resumed) == {}
    for case, run in resumed.items():
        assert_agrees(run, straight.run("ddpx2", case))


OFFLOADS = {
    "zero1": ("zero1", (True, False)),
    "zero2": ("zero2", (True, False)),
    "zero3-all": ("zero3", (True, True)),
    "zero3-optimizer": ("zero3", (True, False)),
    "fsdp2": ("fsdp2", (True, True)),
}
OFFLOADED = ("TiedHead", "TiedHead-sgd", "TiedHead-muon", "frozen-groups", "Idle", "Scalars", "Small")


MORE_ZERO1 = pytest.param("zero1", marks=pytest.mark.more)
"""Zero1 is zero2's class, and shards the same state: zero2 stands for it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [MORE_ZERO1, "zero2", pytest.param("zero3-optimizer", marks=pytest.mark.more), "zero3-all", "fsdp2"]
)
def test_what_is_offloaded_trains_alike_and_resumes_with_and_without(
    straight: Straight, name: str, every_combination: bool, tmp_path: Path
) -> None:
    strategy, offloads = OFFLOADS[name]
    # two ways between them take every case
    own = OFFLOADED if every_combination else OFFLOADED[list(OFFLOADS).index(name) % 2 :: 2]
    runs = {case: tmp_path / case for case in own}
    for case, run in runs.items():
        model, overrides = CASES[case]
        create(run, write_recipe(tmp_path, RECIPE.replace("MODEL", model)), overrides, strategy, 2)
    # onto the half of a run without, and then without from the half of what was offloaded: one case each, or all both
    from_without, to_without = (own, own) if every_combination else (own[:1], own[1:2])
    taken = {
        f"{case} taken": stopped_copy(straight.run("ddpx2", case), tmp_path / f"{case}-2", step=2)
        for case in from_without
    }
    assert run_all(strategy, 2, runs | taken, offloads) == {}
    left = {f"{case} left": stopped_copy(runs[case], tmp_path / f"{case}-3", step=2) for case in to_without}
    assert run_all(strategy, 2, left) == {}
    for case, run in (runs | taken | left).items():
        assert_agrees(run, straight.run("ddpx2", case.split()[0]))


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


def work_rank(recipe: str, run_dir: str, strategy: str, overrides: list[str]) -> tuple[Ended, float]:
    """Train as `distrain train` does in each process; also returns the seconds that it took."""
    from distrain.launchers import work

    began = time.monotonic()
    return captured(lambda: work(recipe, overrides, run_dir=run_dir, strategy=strategy)), time.monotonic() - began


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_on_one_rank_ends_all_and_is_reported_once(strategy: str, where: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "Failing"))
    ranks = in_world(2, work_rank, str(recipe), str(tmp_path / "run"), strategy, [f"model.where={where}"], timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert said.count("error (rank") == 1
    assert said.count("ArithmeticError: the model broke") == 1
    assert "error (rank 1)" in said
    assert (RunDir(tmp_path / "run").failed or {})["rank"] == 1


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_what_is_used_later_alone_is_handled_or_named(strategy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "Changing"))
    ranks = in_world(2, work_rank, str(recipe), str(tmp_path / "run"), strategy, [], timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    if strategy in ("ddp", "fsdp2"):
        assert [ended.status for ended, _ in ranks] == [0, 0], said
        return
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert said.count("error (rank") == 1
    assert "parameter late." in said
    assert "got no gradient from the first batch and gets one now" in said


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
@pytest.mark.fault(37)
def test_a_parameter_that_a_later_step_does_not_use_is_named(strategy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "Leaving"))
    ranks = in_world(2, work_rank, str(recipe), str(tmp_path / "run"), strategy, [], timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert said.count("error (rank") == 1
    assert "parameter late." in said
    assert "Use ddp, " in said


SOMETIMES = ("Routed", "Headed", "Dropped", "Leaving", "Growing")
"""Parameters that some micro-batches, ranks or steps use."""
TRAINED_SOMETIMES = {
    "ddp": SOMETIMES,
    "zero1": ("Routed", "Headed", "Dropped"),
    "zero2": ("Routed", "Headed", "Dropped"),
    "fsdp2": ("Routed", "Growing"),
    "hsdp": ("Growing",),
}


def sometimes(folder: Path, strategy: str, world_size: int, models: tuple[str, ...]) -> dict[str, Path]:
    """Return finished runs of these models, by their names."""
    runs = {}
    for model in models:
        runs[model] = folder / f"{strategy}-{model}"
        args = (RECIPE.replace("MODEL", model), f"{strategy}-{model}.yaml")
        # passes are counted by the model: as many micro-batches come before a step on one process as on several
        fits = {1: 4, 2: 2, 4: 1}[world_size] if model in ("Leaving", "Growing") or world_size == 4 else 2
        micro = (f"batch.micro={fits}",)
        create(runs[model], write_recipe(folder, *args), micro, strategy, world_size)
    assert run_all(strategy, world_size, runs) == {}
    return runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sometimes(tmp_path_factory.mktemp("alone"), "single", 1, SOMETIMES)


@pytest.mark.parametrize("strategy", TRAINED_SOMETIMES)
@pytest.mark.fault(37)
def test_what_is_used_sometimes_is_trained_as_in_one_process(
    alone: dict[str, Path], strategy: str, tmp_path: Path
) -> None:
    world_size = 4 if strategy == "hsdp" else 2
    for model, run in sometimes(tmp_path, strategy, world_size, TRAINED_SOMETIMES[strategy]).items():
        assert_agrees(run, alone[model])


def impatient_rank(*args: Any) -> tuple[Ended, float]:
    """Wait for ranks that use other parts of the model for a second only."""
    from distrain.parallel import collective_forward as gather_order

    gather_order._PATIENCE_S = 1.0
    return work_rank(*args)


@pytest.mark.parametrize(
    ("strategy", "model", "parameter"),
    [
        ("zero3", "Routed", "route.weight"),
        ("zero3", "Dropped", "blocks.1."),
        ("fsdp2", "Dropped", "blocks.1."),
        ("fsdp2", "Headed", "blocks."),  # of which the gradient is not wanted
        ("fsdp2", "Expert", "blocks."),  # once the order is known
    ],
)
@pytest.mark.fault(37)
def test_parts_that_ranks_do_not_all_use_are_named_before_one_waits(
    strategy: str, model: str, parameter: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", model))
    ranks = in_world(2, impatient_rank, str(recipe), str(tmp_path / "run"), strategy, [], timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert said.count("error (rank") == 1
    assert f"parameter {parameter}" in said
    assert "is not used by all ranks in the same place" in said
    assert "Use ddp or zero2" in said


UNCLIPPED = ("optim.weight_decay=0", "optim.clip_norm=null")
SPARSE: dict[str, tuple[str, ...]] = {
    "adagrad": ("optim.name=adagrad", *UNCLIPPED),
    "sgd": ("optim.name=sgd", *UNCLIPPED),
    "adagrad-clipped": ("optim.name=adagrad", "optim.weight_decay=0"),
    "adamw": UNCLIPPED,
}
"""Optimizers that take sparse gradients and one that does not, with an average, and with clipping."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return runs in one process, whose embeddings are sparse where that can be."""
    return train_sparse(tmp_path_factory.mktemp("sparse"), "single", 1)


def train_sparse(folder: Path, strategy: str, world_size: int) -> dict[str, Path]:
    runs = {name: folder / f"{strategy}-{name}" for name in SPARSE}
    for name, run in runs.items():
        recipe = write_recipe(folder, RECIPE.replace("MODEL", "Sparse"), f"{name}.yaml")
        create(run, recipe, SPARSE[name], strategy, world_size)
    assert run_all(strategy, world_size, runs) == {}
    return runs


@pytest.mark.parametrize("strategy", ["ddp", MORE_ZERO1, "zero3", "fsdp2"])
def test_embeddings_with_sparse_gradients_train_as_in_one_process(
    dense: dict[str, Path], strategy: str, tmp_path: Path
) -> None:
    for name, run in train_sparse(tmp_path, strategy, 2).items():
        assert_agrees(run, dense[name])


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_sparse_gradient_that_no_layer_reports_of_is_named(strategy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "Sparse"))
    ranks = in_world(2, work_rank, str(recipe), str(tmp_path / "run"), strategy, ["model.by_hand=true"], timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert said.count("error (rank") == 1
    assert "the gradient of parameter table is sparse" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (1, ("norm=BatchNorm1d",), ("layer norm (BatchNorm1d) needs more than one value per channel", "batch.global")),
        (2, ("norm=BatchNorm2d", "spatial=2"), ("layer norm (BatchNorm2d) needs more than one value", "batch.micro")),
        (1, ("norm=InstanceNorm2d", "spatial=2"), ("layer norm (InstanceNorm2d) has a single value", "1, 8, 1, 1")),
        (2, ("norm=SyncBatchNorm",), ("layer norm is a SyncBatchNorm, which torch has for GPUs only", "on the CPU")),
    ],
)
def test_layers_that_need_more_than_a_micro_batch_has_are_named(
    world_size: int, overrides: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "NormedBy"))
    options = ["batch.micro=1", *(f"model.{each}" for each in overrides)]
    strategy = "single" if world_size == 1 else "ddp"
    ranks = in_world(world_size, work_rank, str(recipe), str(tmp_path / "run"), strategy, options, timeout_s=60)
    said = "".join(ended.err for ended, _ in ranks)
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_an_error_of_the_forward_pass_reports_how_many_samples_it_had(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "Misshapen"))
    ((ended, _),) = in_world(1, work_rank, str(recipe), str(tmp_path / "run"), "single", ["batch.micro=4"])
    assert "Traceback" in ended.err
    assert "in the forward pass of a micro-batch of 4 samples (batch.micro)" in ended.err


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_parameters_in_the_same_memory_are_refused(strategy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE.replace("MODEL", "SameMemory"))
    ranks = in_world(2, work_rank, str(recipe), str(tmp_path / "run"), strategy, [], timeout_s=60)
    assert [ended.status for ended, _ in ranks] == [1, 1]
    assert "the parameters blocks.0.up.weight and head.weight are two tensors in the same memory" in "".join(
        ended.err for ended, _ in ranks
    )


# --------------------------------------------------------------------------------------------------------------------
# Language models, compiled and of transformers

TEXT = """
name: text
task: language_modeling
data: {name: python_source, seq_len: 8, max_bytes: 4_000, split: [0.9, 0.1]}
model: MODEL
optim: {name: adamw, lr: 1.0e-2, weight_decay: 0.05, clip_norm: 0.5}
batch: {global: 8, micro: 2}
train: {steps: 3, precision: fp32, ema: 0.9}
eval: {every: null, batch: 64}
checkpoint: {every: 3 steps, async: false}
log: {every: 1 steps}
"""
CAUSAL = '"transformers:AutoModelForCausalLM"'
TEXT_MODELS = {
    "gpt": "{name: gpt, n_layer: 2, n_head: 2, d_model: 12}",
    "gpt2": f"{{name: {CAUSAL}, config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 16, "
    "resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}",
    "llama": f"{{name: {CAUSAL}, config: {{model_type: llama, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, hidden_size: 16, intermediate_size: 24}}",
}


def train_texts(folder: Path, strategy: str, world_size: int, *overrides: str) -> dict[str, Path]:
    """Return finished runs of the language models, by their names."""
    runs = {}
    for name, model in TEXT_MODELS.items():
        if "train.compile=true" in overrides and name != "gpt":
            continue
        runs[name] = folder / f"{strategy}-{name}"
        create(runs[name], write_recipe(folder, TEXT.replace("MODEL", model)), overrides, strategy, world_size)
    assert run_all(strategy, world_size, runs) == {}
    return runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_texts(tmp_path_factory.mktemp("texts"), "single", 1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3", "fsdp2"])
def test_language_models_train_alike(texts: dict[str, Path], strategy: str, tmp_path: Path) -> None:
    for name, run in train_texts(tmp_path, strategy, 2).items():
        assert_agrees(run, texts[name])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", MORE_ZERO1, pytest.param("zero3", marks=pytest.mark.more), "fsdp2"])
def test_what_is_compiled_trains_alike(texts: dict[str, Path], strategy: str, tmp_path: Path) -> None:
    (run,) = train_texts(tmp_path, strategy, 2, "train.compile=true", "tune.chunked_loss=true").values()
    assert_agrees(run, texts["gpt"])


@pytest.mark.parametrize(
    "strategy", ["ddp", MORE_ZERO1, pytest.param("zero2", marks=pytest.mark.more), "zero3", "fsdp2"]
)
def test_a_loss_in_chunks_trains_alike(texts: dict[str, Path], strategy: str, tmp_path: Path) -> None:
    runs = train_texts(tmp_path, strategy, 2, "tune.chunked_loss=true", "train.activation_checkpointing=true")
    for name, run in runs.items():
        assert_agrees(run, texts[name])
        effect = RunDir(run).effect()
        assert effect is not None
        assert effect["tune"]["chunked_loss"]["on"]
