"""What `distrain prove` makes of two runs, on records and checkpoints made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import cli, write_recipe

from distrain.checkpoint import LocalCommunicator, Piece, Reader, Saver, TensorSpec, list_checkpoints
from distrain.config import UserError
from distrain.prove import Divergence, Leg, Placement
from distrain.prove.causes import explain
from distrain.prove.divergence import exact
from distrain.prove.legs import Attempt
from distrain.prove.proof import placements_of
from distrain.prove.tolerance import TOLERANCES, distance, within
from distrain.prove.traces import Record

STEPS = 4
SAVED = (2, 4)


def record(
    world: int = 1, *, steps: Iterable[int] = range(1, STEPS + 1), start: int = 0, losses: Mapping[int, float] = {},
    samples: Mapping[int, int] = {}, rates: Mapping[int, float] = {}, drawn: Iterable[str] = (),
) -> Record:  # fmt: skip
    """Return what the ranks of one attempt noted: step s reads samples 2 s and 2 s + 1, the first half on each rank."""
    facts = {
        "world_size": world,
        "precision": "fp32",
        "total_steps": STEPS,
        "batch_norm": [],
        "step": start,
        "hidden": {},
        "state": {},
    }
    made = Record({rank: dict(facts) for rank in range(world)})
    for step in steps:
        ids = [samples.get(step, 2 * step), 2 * step + 1]
        for rank, own in enumerate([ids] if world == 1 else [ids[:1], ids[1:]]):
            bits = [[f"bits of {sample}" for sample in own]]
            made.steps.setdefault(step, {})[rank] = {
                "ids": [own], "samples": bits, "inputs": bits, "targets": bits, "shapes": [[3]], "workers": [None],
                "lr": [rates.get(step, 0.1)], "loss": losses.get(step, 1.0 / step), "norm": 1.0, "state": {},
                "gradients": {"weight": ["bits", 1.0]}, "drawn": list(drawn), "scalars": {}, "hidden": {},
            }  # fmt: skip
    return made


def leg(
    folder: Path, *records: Record, scored: Iterable[int] = (2, 4), final: int | None = 4,
    saved: Mapping[int, Mapping[str, Any]] | None = None,
) -> Leg:  # fmt: skip
    """Return a run of these attempts, with its evaluations and its checkpoints: tensors by name, by step."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    rows = [{"event": "eval", "step": step, "split": "valid", "loss": 1.0} for step in scored]
    rows += [] if final is None else [{"event": "final", "step": final, "split": "test", "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, tensors in ({step: {"weight": np.ones(3)} for step in SAVED} if saved is None else saved).items():
        save(run / "checkpoints", step, {f"model/{name}": np.asarray(values) for name, values in tensors.items()})
    attempts = [Attempt(Placement(each.facts["world_size"]), each, None) for each in records]
    return Leg(folder.name, run, attempts)


def save(folder: Path, step: int, tensors: Mapping[str, np.ndarray]) -> None:
    kinds = {"float64": "F64", "float32": "F32", "int64": "I64"}
    specs = {name: TensorSpec(value.shape, kinds[value.dtype.name], "buffer") for name, value in tensors.items()}
    pieces = [Piece(name, 0, np.ascontiguousarray(value).reshape(-1).view(np.uint8)) for name, value in tensors.items()]
    saver = Saver(folder, LocalCommunicator(), keep=100, keep_best=0, asynchronous=False)
    saver.begin(step, specs, pieces, scalars={}, aliases={}, recipe="name: made", strategy="single", score=None)
    saver.finish()
    saver.close()


def found_in(divergence: Divergence | None) -> Divergence:
    assert divergence is not None, "nothing was found"
    return divergence


# --------------------------------------------------------------------------------------------------------------------
# A run that did less


def test_runs_that_did_the_same_agree_though_steps_were_taken_twice(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record())
    assert exact(straight, leg(tmp_path / "killed", record(steps=[1, 2, 3]), record(start=2, steps=[3, 4]))) is None


def test_a_run_with_fewer_steps_is_a_divergence(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record())
    short = leg(tmp_path / "short", record(steps=[1]), scored=(), final=None, saved={})
    found = found_in(exact(straight, short))
    assert (found.what, found.step) == ("done", 2)
    assert (found.straight, found.other) == ("4 steps, with step 2", "1 steps, without step 2")
    assert found.more == ["and 2 more steps that only one of the runs took"]
    explain(found, straight, repeats=None)
    assert "ended before the other" in str(found)
    # whichever of them it is
    assert found_in(exact(short, straight)).straight == "1 steps, without step 2"


def test_a_step_counts_where_every_rank_noted_it(tmp_path: Path) -> None:
    straight, partial = leg(tmp_path / "straight", record(2)), record(2)
    del partial.steps[3][1]
    found = found_in(exact(straight, leg(tmp_path / "partial", partial)))
    assert (found.what, found.step) == ("done", 3)


@pytest.mark.parametrize(("scored", "final", "step"), [((2,), 4, 4), ((2, 3, 4), 4, 3), ((2, 4), None, 4)])
def test_an_evaluation_that_only_one_has(tmp_path: Path, scored: tuple[int, ...], final: int | None, step: int) -> None:
    straight = leg(tmp_path / "straight", record())
    found = found_in(exact(straight, leg(tmp_path / "other", record(), scored=scored, final=final)))
    assert (found.what, found.step) == ("done", step)
    assert "evaluation" in found.subject
    assert {found.straight, found.other} == {"scored after this step", "not scored"}


def test_runs_without_a_checkpoint_in_common(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record())
    found = found_in(exact(straight, leg(tmp_path / "other", record(), saved={3: {"weight": np.ones(3)}})))
    assert (found.what, found.step) == ("done", STEPS)
    assert (found.straight, found.other) == ("checkpoints of the steps 2, 4", "checkpoints of the steps 3")


# --------------------------------------------------------------------------------------------------------------------
# Other placements

FP32 = TOLERANCES["fp32"]
OTHER_LOSSES = dict.fromkeys(range(1, STEPS + 1), 3.0)


def moved_leg(folder: Path, *, world: int = 2, losses: Mapping[int, float] = OTHER_LOSSES, **what: Any) -> Leg:
    return leg(folder, record(world, losses=losses, drawn=["torch"], **what))


def test_with_dropout_losses_may_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record(drawn=["torch"]))
    saved = {step: {"weight": np.full(3, 2.0)} for step in SAVED}
    found = within(straight, leg(tmp_path / "other", record(2, losses=OTHER_LOSSES), saved=saved), FP32)
    assert found.divergence is None
    assert "dropout" in found.by_design
    assert found.worst_tensor == pytest.approx(0.5)


@pytest.mark.parametrize(("what", "changes"), [("ids", {"samples": {3: 99}}), ("lr", {"rates": {4: 0.3}})])
def test_what_is_read_is_compared_to_the_end_though_losses_depend(
    tmp_path: Path, what: str, changes: dict[str, Any]
) -> None:
    straight = leg(tmp_path / "straight", record(drawn=["torch"]))
    found = found_in(within(straight, moved_leg(tmp_path / "other", **changes), FP32).divergence)
    assert (found.what, found.step) == (what, 3 if what == "ids" else 4)


def test_with_as_many_processes_dropout_excuses_nothing(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record(2, drawn=["torch"]))
    found = within(straight, moved_leg(tmp_path / "other"), FP32)
    assert (found_in(found.divergence).what, found.by_design) == ("loss", "")
    # nor before a run moves to another number of them, and after it goes back it has inherited what was made there
    first = record(2, steps=[1, 2], losses={1: 3.0})
    moving = leg(tmp_path / "moving", first, record(1, start=2, steps=[3, 4], losses=OTHER_LOSSES))
    assert found_in(within(straight, moving, FP32).divergence).step == 1
    three = [record(2, steps=[1, 2]), record(1, start=2, steps=[3]), record(2, start=3, steps=[4], losses={4: 3.0})]
    back = within(straight, leg(tmp_path / "back", *three), FP32)
    assert back.divergence is None
    assert back.by_design


def test_a_running_mean_follows_a_bias_that_is_rounding(tmp_path: Path) -> None:
    one, other = record(2), record(2)
    for each in (one, other):
        each.facts["batch_norm"] = ["norm"]
    tensors = [{"norm.running_mean": np.full(3, value), "norm.running_var": np.ones(3)} for value in (1.0, 1.01)]
    legs = [
        leg(tmp_path / name, each, saved=dict.fromkeys(SAVED, held))
        for name, each, held in zip(("straight", "other"), (one, other), tensors, strict=True)
    ]
    found = within(*legs, FP32)
    assert found_in(found.divergence).subject.startswith("model/norm.running_mean"), "where no such bias is"
    one = record(2)
    one.facts["batch_norm"] = ["norm"]
    one.steps[1][0]["gradients"]["layer.bias"] = ["bits", 1e-9]
    legs[0].attempts[0].record = one
    found = within(*legs, FP32)
    assert found.divergence is None
    assert found.noise == ["layer.bias", "norm.running_mean"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_never_by_design(tmp_path: Path, loss: float) -> None:
    straight = leg(tmp_path / "straight", record(drawn=["torch"]))
    found = within(straight, moved_leg(tmp_path / "other", losses=OTHER_LOSSES | {2: loss}), FP32)
    assert (found_in(found.divergence).what, found_in(found.divergence).step) == ("loss", 2)
    assert found.worst_loss == float("inf")


@pytest.mark.parametrize(
    "tensors", [{"bias": np.ones(3)}, {"weight": np.ones(4)}, {"weight": np.array([1, np.nan, 1])}]
)
def test_a_tensor_that_is_missing_or_not_finite_is_never_by_design(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    straight = leg(tmp_path / "straight", record(drawn=["torch"]))
    saved = {2: {"weight": np.full(3, 2.0)}, 4: tensors}
    other = leg(tmp_path / "other", record(2, losses=OTHER_LOSSES), saved=saved)
    found = found_in(within(straight, other, FP32).divergence)
    assert (found.what, found.step) == ("checkpoint", 4)


def test_a_run_elsewhere_with_fewer_steps_is_a_divergence(tmp_path: Path) -> None:
    straight = leg(tmp_path / "straight", record(drawn=["torch"]))
    short = leg(tmp_path / "short", record(2, steps=[1]), scored=(), final=None, saved={})
    assert found_in(within(straight, short, FP32).divergence).what == "done"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([0.0, 0.0], [0.0, np.nan], np.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.5 / (9 + 4.5**2) ** 0.5),
        ([1.0, np.inf], [1.0, 2.0], np.inf),
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([0.0, 1e200], [0.0, -1e200], np.inf),
    ],
)
def test_how_far_tensors_are_apart(tmp_path: Path, one: list[float], other: list[float], expected: float) -> None:
    paths = []
    for number, values in enumerate((one, other)):
        (tmp_path / str(number)).mkdir()
        save(tmp_path / str(number), 1, {"model/weight": np.array(values)})
        paths.append(list_checkpoints(tmp_path / str(number))[0].path)
    with Reader(paths[0]) as a, Reader(paths[1]) as b:
        assert distance(a, b, "model/weight") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("worlds", "strategies", "replicate", "said"),
    [
        ([2], ["zero5"], [], "no strategy 'zero5'"),
        ([1, 2], ["single"], [], "--strategies single is one process"),
        ([1], ["ddp"], [], "a strategy spreads state over several processes"),
        ([4], ["zero3"], [2], "--replicate says how many replicas fsdp2 makes"),
        ([2, 3], ["fsdp2"], [2], "--replicate 2: no number of processes can be put .*, found 2, 3; .* --worlds 4"),
    ],
)
def test_placements_that_would_be_ignored_are_refused(
    worlds: list[int], strategies: list[str], replicate: list[int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        placements_of(1, worlds, strategies, replicate)


def test_processes_and_worlds_are_refused_together(tmp_path: Path) -> None:
    ended = cli("prove", write_recipe(tmp_path), "--processes", 2, "--worlds", "1,2")
    assert ended.status == 2
    assert "--processes and --worlds both say how many" in ended.err
