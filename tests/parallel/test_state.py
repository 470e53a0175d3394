"""What cannot be saved is found before the first step, and everything else comes back to the bit."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kept_parts
import pytest
import torch
from kept_parts import Plain, Typed, Wave
from runs import captured, cli, last, rows, write_recipe
from safetensors.torch import load_file
from test_matrix import create, stopped_copy
from torch import Tensor, nn
from worlds import in_world

from distrain.checkpoint import LocalCommunicator, Reader, Saver, difference
from distrain.checkpoints.dtypes import BY_TORCH_NAME, DTYPES
from distrain.checkpoints.export import export
from distrain.config import UserError
from distrain.models import load_weights as start_from
from distrain.optim import Ema
from distrain.parallel import Mesh, TrainingState, load_weights, prepare_to_save
from distrain.parallel.nested import Unstorable, decode, encode, equal, same_bits
from distrain.run.folder import RunDir
from distrain.system.bounded_json import parse_json

MODELS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(kept_parts, name)
    for name in (
        *("Renamed", "Transposed", "Copied", "Dropped", "Detached", "OwnKey"),
        *("Counted", "CountedInDict", "CountedInBytes", "Growing", "Within", "Everything"),
        *("Expanded", "Views"),
    )
}
MODELS |= {dtype.torch: lambda name=dtype.torch: Typed(name) for dtype in DTYPES.values()}
MODELS |= {"Wave": Wave, "Wave-complex128": lambda: Wave("complex128")}
OPTIMIZERS = ("InList", "InDicts", "OtherDtypes", "TensorInGroup", "ListInGroup", "UnderOwnKey")


def begun(
    model: Callable[[], nn.Module] = Plain, optimizer: Callable[..., torch.optim.Optimizer] | None = None, seed: int = 0
) -> TrainingState:
    """Return the state of a training that begins, of a model that was made ready to be saved."""
    torch.manual_seed(seed)
    built = model()
    prepare_to_save(built, sharded=False)
    made = (optimizer or torch.optim.AdamW)(built.parameters(), lr=1e-2)
    return TrainingState(built, made, Ema(built, 0.9))


def advance(state: TrainingState, start: int, stop: int) -> TrainingState:
    """Make the steps, each with a batch of its own."""
    assert state.optimizer is not None
    assert state.ema is not None
    for step in range(start, stop):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        state.optimizer.zero_grad()
        nn.functional.cross_entropy(state.model(x), torch.arange(6) % 3).backward()
        state.optimizer.step()
        state.ema.update()
    return state


def save(state: TrainingState, folder: Path) -> Path:
    saver = Saver(folder, LocalCommunicator(), asynchronous=False)
    described = {"scalars": state.scalars(), "aliases": state.aliases(), "recipe": "", "strategy": "single"}
    return saver.save(2, state.specs(), state.pieces(Mesh(0, 1, 1)), **described).path


def resumed(state: TrainingState, path: Path) -> TrainingState:
    with Reader(path) as reader:
        state.restore(reader)
    return state


def assert_same(one: TrainingState, other: TrainingState) -> None:
    a, b = one.held(), other.held()
    assert a.keys() == b.keys()
    assert not [name for name in a if not same_bits(a[name].values, b[name].values)]
    assert one.scalars() == other.scalars()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 20).reshape(4, 5))


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_keeps_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    """Straight, resumed, filled as for an evaluation, and loaded by plain PyTorch from an export."""
    torch.manual_seed(5)
    if name in BY_TORCH_NAME and not hasattr(torch, name):
        pytest.skip("this torch has no such dtype")
    state = advance(begun(MODELS[name]), 0, 2)
    path = save(state, tmp_path)
    straight = advance(state, 2, 4)
    again = advance(resumed(begun(MODELS[name], seed=1), path), 2, 4)
    assert_same(again, straight)

    final = save(straight, tmp_path / "final")
    if name not in ("Growing", "Expanded", "Everything", "CountedInDict", "CountedInBytes", "Within", "OwnKey"):
        other = MODELS[name]()
        start_from(other, final)
        assert torch.equal(outputs(other), outputs(straight.model))
    for averaged in (False, True):
        own = copy.deepcopy(straight.model)
        with Reader(final) as reader:
            used = MODELS[name]()
            load_weights(used, reader, averaged=averaged)
            if averaged:
                load_weights(own, reader, averaged=True)
        assert torch.equal(outputs(used), outputs(own))
        # values that are no tensors are in no file of weights; plain PyTorch cannot write into an expanded buffer
        if name in ("CountedInDict", "CountedInBytes", "Within", "Everything", "OwnKey", "Dropped", "Expanded"):
            continue
        for suffix in (".safetensors", ".pt"):
            out = export(final, tmp_path / f"{averaged}{suffix}", ema=averaged).paths[0]
            content = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
            for key, tensor in straight.model.state_dict().items():
                if content[key].dim() > tensor.dim():  # safetensors has no name for its dtype
                    content[key] = content[key].view(tensor.dtype).squeeze(-1)
            plain = MODELS[name]()
            plain.load_state_dict(content, strict=True)
            assert torch.equal(outputs(plain), outputs(own))
            if suffix == ".pt" or DTYPES.get(BY_TORCH_NAME.get(name, ""), DTYPES["F32"]).pair is None:
                other = MODELS[name]()
                start_from(other, out, strict=name not in ("Growing", "Wave-complex128"))
                if name not in ("Growing", "Wave-complex128"):
                    assert torch.equal(outputs(other), outputs(own))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    optimizer = getattr(kept_parts, name)
    state = advance(begun(optimizer=optimizer), 0, 2)
    state.check()
    path = save(state, tmp_path)
    later = advance(begun(optimizer=optimizer, seed=1), 0, 1)  # a run that goes back has state of other steps
    straight = advance(state, 2, 4)
    assert_same(advance(resumed(begun(optimizer=optimizer, seed=1), path), 2, 4), straight)
    assert_same(advance(resumed(later, path), 2, 4), straight)


UNFIT = {
    "Quantized": (r"buffer table is of dtype qint8.*int_repr\(\)",),
    "SubByte": ("buffer table is of dtype float4_e2m1fn_x2, which a checkpoint cannot hold; .*persistent=False",),
    "Sparse": ("buffer table is sparse",),
    "OfParameter": (r"buffer first is a view of parameter head\.weight.*\.clone\(\)",),
    "ExpandedWeight": (r"parameter head\.weight has elements that share memory.*\.clone\(\)",),
    "Opaque": (r"_extra_state\[0\] is an object.*Opaque\.get_extra_state",),
    "WithoutSetter": ("_extra_state: WithoutSetter has get_extra_state and no set_extra_state",),
    "Wrapping": (r"_orig_mod\.body\.weight and body\.weight are both called body\.weight without",),
    "Forgetful": (r"_extra_state is tensor\(-1\) after it was given back, and was tensor\(0\); set_extra_state",),
}
UNFIT_SHARDED = {
    "Transposed": (r"head\.weight is made by a hook of state_dict.*use ddp",),
    "OwnKey": ("mean is made by a hook", "passes is made by a hook"),
    "Wave": ("parameter wave is of dtype complex64.*use ddp",),
}


@pytest.mark.parametrize(("sharded", "name"), [*((False, name) for name in UNFIT), *((True, n) for n in UNFIT_SHARDED)])
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.fault(36)
def test_what_a_checkpoint_could_not_give_back_is_refused_by_name(sharded: bool, name: str) -> None:
    with pytest.raises(UserError, match="the model has state that a checkpoint could not give back") as caught:
        prepare_to_save(getattr(kept_parts, name)(), sharded=sharded)
    for expected in (UNFIT_SHARDED if sharded else UNFIT)[name]:
        assert any(line for line in [str(caught.value).replace("\n", " ")] if re.search(expected, line))


@pytest.mark.parametrize("name", ["Reshaped", "Late"])
@pytest.mark.fault(36)
def test_buffers_that_are_others_after_a_step_are_refused_by_name(name: str) -> None:
    state = begun(getattr(kept_parts, name))
    state.ema = None
    assert state.optimizer is not None
    state.model(torch.ones(2, 5)).sum().backward()
    state.optimizer.step()
    with pytest.raises(UserError, match=r"seen: .* at the start, buffer F32 .* now\nKeep their shapes"):
        state.check()


@pytest.mark.fault(36)
def test_a_parameter_that_another_replaces_is_named_with_the_first_step() -> None:
    class Clamped(Plain):
        def forward(self, x: Tensor) -> Tensor:
            self.head.weight = nn.Parameter(self.head.weight.detach().clamp(-1, 1))
            return super().forward(x)

    with pytest.raises(UserError, match=r"another Parameter in the place of head\.weight, .*self\.weight\.clamp_"):
        advance(begun(Clamped), 0, 1).check()


KEPT_WRONG = {
    "OfObjects": r"history\[made\] is an object, in the state of (head|body)\.",
    "Shared": r"the state of \S+: count and the state of \S+: count are in the same memory.*\.clone\(\)",
    "OwnStateDict": r"its state_dict\(\) has slow besides state and param_groups",
}


@pytest.mark.parametrize("name", KEPT_WRONG)
@pytest.mark.fault(36)
def test_what_an_optimizer_keeps_and_cannot_be_stored_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=KEPT_WRONG[name]):
        advance(begun(optimizer=getattr(kept_parts, name)), 0, 1).check()


@pytest.mark.fault(36)
def test_state_that_comes_later_is_refused_by_the_save_and_not_dropped(tmp_path: Path) -> None:
    state = advance(begun(optimizer=kept_parts.LateObjects), 0, 1)
    state.check()
    advance(state, 1, 3)
    with pytest.raises(UserError, match=r"made is an object, in the state of \S+"):
        save(state, tmp_path)


def test_extra_state_that_was_stored_among_the_buffers_is_handed_back(tmp_path: Path) -> None:
    state = advance(begun(kept_parts.Counted), 0, 2)
    specs = {
        name: type(spec)(spec.shape, spec.dtype, "buffer" if spec.role == "state" else spec.role)
        for name, spec in state.specs().items()
    }
    described = {"scalars": state.scalars(), "aliases": {}, "recipe": "", "strategy": "single"}
    saver = Saver(tmp_path, LocalCommunicator(), asynchronous=False)
    path = saver.save(2, specs, state.pieces(Mesh(0, 1, 1)), **described).path
    assert resumed(begun(kept_parts.Counted, seed=1), path).model.passes == 2


def test_a_checkpoint_without_the_extra_state_is_refused(tmp_path: Path) -> None:
    path = save(begun(kept_parts.Counted), tmp_path)

    class Further(kept_parts.Counted):
        def __init__(self) -> None:
            super().__init__()
            self.inner.get_extra_state = lambda: None

    class More(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(1)

        def set_extra_state(self, state: Tensor) -> None:
            pass

    def with_more() -> nn.Module:
        model = kept_parts.Counted()
        model.inner = More(5, 3)
        return model

    with pytest.raises(UserError, match=r"holds no inner\._extra_state, which the model keeps"):
        resumed(begun(with_more), path)


VALUES: list[Any] = [
    *(None, True, 3, -0.5, "text", float("nan"), float("-inf"), 1 + 2j, b"\0\xff", 2**80),
    *([], [1, [2.5, None]], (1, "a"), {"a": {1: [torch.arange(3)]}, None: ()}, {3, 1}, torch.Size((2, 3))),
    *(torch.tensor(1.5), {"a/b": torch.ones(2, dtype=torch.bool), "a|b": torch.zeros(2)}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20].replace("\n", ""))
def test_nested_values_come_back_of_the_same_types(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    again = decode(encode(value, "value", tensors), lambda name, on_host: tensors[name].clone())
    assert equal(again, value)
    assert type(again) is type(value)
    parse_json(json.dumps(encode(value, "value", {})).encode())  # what a manifest takes
    assert not any("/" in name for name in tensors)


@pytest.mark.parametrize("value", [object(), [print], {"a": {1j: 0}}, {object(): 1}, nn.Parameter(torch.ones(1))])
def test_what_cannot_be_encoded_is_named(value: Any) -> None:
    with pytest.raises(Unstorable, match=r"^kept"):
        encode(value, "kept", {})


def test_every_dtype_of_torch_is_known_or_refused() -> None:
    """Also one that a newer torch brings: it is looked up by name, and not found."""
    for dtype in {each for each in vars(torch).values() if isinstance(each, torch.dtype)}:
        tensor = torch.empty(4, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        if name in BY_TORCH_NAME:
            assert DTYPES[BY_TORCH_NAME[name]].nbytes == dtype.itemsize
            assert encode(tensor, "kept", {}) == {"tensor": "kept"}
        else:
            with pytest.raises(Unstorable, match=f"kept is of dtype {name}, which a checkpoint cannot hold"):
                encode(tensor, "kept", {})


# --------------------------------------------------------------------------------------------------------------------
# Whole runs

RECIPE = """
name: kept
task: classification
data: {name: "own_parts:Points", samples: 48, tests: 12}
model: {name: "kept_parts:Everything"}
optim: {name: "kept_parts:InDicts", lr: 1.0e-2, weight_decay: 0}
batch: {global: 12, micro: 6}
train: {steps: 4, precision: fp32}
eval: {every: null}
checkpoint: {every: 2 steps, keep: 100, async: false}
log: {every: 1 steps}
"""


def train_all(strategy: str, run_dirs: list[str], resumed: str | None = None) -> list[str]:
    """Train each run in this world, and the first of them once more from step 2; returns the errors."""
    from distrain.loop import train
    from distrain.parallel import StrategySpec, open_world

    world = open_world("fp32", StrategySpec(strategy, False, False))
    errors: list[str] = []

    def go() -> int:
        for run_dir in [*run_dirs, *([resumed] if resumed else [])]:
            if run_dir == resumed:
                world.run_on_rank0(partial(stopped_copy, Path(run_dirs[0]), Path(run_dir), step=2))
            try:
                train(RunDir(run_dir), world)
            except UserError as error:
                errors.append(str(error))
        return 0

    try:
        captured(go)
    finally:
        world.close()
    return errors


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp2"])
def test_every_strategy_keeps_it_all(strategy: str, tmp_path: Path) -> None:
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    create(run, write_recipe(tmp_path, RECIPE), (), strategy, 2)
    assert in_world(2, train_all, strategy, [str(run)], str(resumed), timeout_s=300) == [[], []]
    found = difference(last(run), last(resumed))
    assert found.identical, found.lines()
    if strategy == "ddp":
        evaluated = cli("evaluate", run, "--split", "test", "--json")
        final = next(row["loss"] for row in rows(run) if row["event"] == "final")
        assert json.loads(evaluated.out)["loss"] == pytest.approx(final, abs=1e-6)


@pytest.mark.fault(36)
def test_a_run_stops_at_its_first_step_and_names_what_would_be_lost(tmp_path: Path) -> None:
    expected = {
        "model.name=kept_parts:PerRank": "_extra_state differ between the ranks",
        "optim.name=kept_parts:OfObjects": "history[made] is an object, in the state of ",
        "model.name=kept_parts:Opaque": "Opaque.get_extra_state",
    }
    runs = [tmp_path / str(index) for index in range(len(expected))]
    recipe = write_recipe(tmp_path, RECIPE)
    for run, override in zip(runs, expected, strict=True):
        create(run, recipe, (override,), "ddp", 2)
    for errors in in_world(2, train_all, "ddp", [str(run) for run in runs], timeout_s=300):
        assert len(errors) == len(runs)
        for error, part in zip(errors, expected.values(), strict=True):
            assert part in error
    assert all(not run.joinpath("metrics.jsonl").exists() or not rows(run) for run in runs)
