"""How `distrain prove` compares two runs, on traces and checkpoints made by hand."""

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
from distrain.prove import Divergence, Topology, TrialRun
from distrain.prove.causes import add_cause
from distrain.prove.divergence import compare_exactly
from distrain.prove.proof import topologies_of
from distrain.prove.tolerance import TOLERANCES, compare_within, distance
from distrain.prove.traces import AttemptTrace, read_trace
from distrain.prove.trial_runs import Attempt

STEPS = 4
SAVED = (2, 4)


def attempt_trace(
    world: int = 1, *, steps: Iterable[int] = range(1, STEPS + 1), start: int = 0, losses: Mapping[int, float] = {},
    samples: Mapping[int, int] = {}, rates: Mapping[int, float] = {}, drawn: Iterable[str] = (),
) -> AttemptTrace:  # fmt: skip
    """Return the trace of one attempt: step s reads samples 2 s and 2 s + 1, the first half on each rank."""
    facts = {
        "world_size": world,
        "precision": "fp32",
        "total_steps": STEPS,
        "batch_norm": [],
        "step": start,
        "hidden": {},
        "state": {},
    }
    made = AttemptTrace({rank: dict(facts) for rank in range(world)})
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


def trial_run(
    folder: Path, *traces: AttemptTrace, evaluated: Iterable[int] = (2, 4), final: int | None = 4,
    saved: Mapping[int, Mapping[str, Any]] | None = None,
) -> TrialRun:  # fmt: skip
    """Return a run of these attempts, with its evaluations and its checkpoints: tensors by name, by step."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    rows = [{"event": "eval", "step": step, "split": "valid", "loss": 1.0} for step in evaluated]
    rows += [] if final is None else [{"event": "final", "step": final, "split": "test", "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, tensors in ({step: {"weight": np.ones(3)} for step in SAVED} if saved is None else saved).items():
        save(run / "checkpoints", step, {f"model/{name}": np.asarray(values) for name, values in tensors.items()})
    attempts = [Attempt(Topology(each.facts["world_size"]), each, None) for each in traces]
    return TrialRun(folder.name, run, attempts)


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
    baseline = trial_run(tmp_path / "baseline", attempt_trace())
    assert (
        compare_exactly(
            baseline,
            trial_run(tmp_path / "killed", attempt_trace(steps=[1, 2, 3]), attempt_trace(start=2, steps=[3, 4])),
        )
        is None
    )


def written(folder: Path, *passes: AttemptTrace) -> AttemptTrace:
    """Return the trace of an attempt that wrote those of `passes`, each after a rollback to where it starts."""
    folder.mkdir(parents=True)
    with (folder / "rank-0.jsonl").open("w") as file:
        for each in passes:
            lines = [("start", each.start_step, each.starts[0])]
            lines += [("state", step, ranks[0]) for step, ranks in each.steps.items()]
            file.writelines(json.dumps(entry | {"at": at, "step": step}) + "\n" for at, step, entry in lines)
    found = read_trace(folder)
    assert found is not None
    return found


def rolled_back(folder: Path, state: str = "b", loss: float = 9.0) -> AttemptTrace:
    """Return the trace of an attempt that takes steps 1 to 3, returns to step 2 and takes 3 otherwise, and 4."""
    first, then = attempt_trace(steps=[1, 2, 3], losses={3: loss}), attempt_trace(start=2, steps=[3, 4])
    first.steps[2][0]["state"], then.starts[0]["state"] = {"weight": ["b", 1.0]}, {"weight": [state, 1.0]}
    then.starts[0]["hidden"] = {"model.calls": "3"}
    return written(folder, first, then)


def test_a_run_that_rolls_back_is_the_same_killed_or_not(tmp_path: Path) -> None:
    reference = rolled_back(tmp_path / "traces")
    assert (reference.start_step, reference.last_step, len(reference.records(3, 0))) == (0, 4, 2)
    assert [reference.hidden_before(step) for step in (2, 3)] == [{}, {"model.calls": "3"}]
    baseline = trial_run(tmp_path / "baseline", reference)
    # killed before it rolls back, or behind: the step that was undone is as in the first pass, or is not made at all
    before, after = attempt_trace(steps=[1, 2, 3], losses={3: 9.0}), attempt_trace(start=2, steps=[3, 4])
    before.steps[2][0]["state"] = after.starts[0]["state"] = {"weight": ["b", 1.0]}
    assert compare_exactly(baseline, trial_run(tmp_path / "killed", before, after)) is None
    again = rolled_back(tmp_path / "again")
    assert compare_exactly(baseline, trial_run(tmp_path / "whole", again)) is None


@pytest.mark.parametrize(
    ("otherwise", "what", "step"), [({"state": "c"}, "start", 2), ({"loss": 8.0}, "loss", 3)], ids=["state", "undone"]
)
def test_a_rollback_that_differs_is_found(tmp_path: Path, otherwise: dict[str, Any], what: str, step: int) -> None:
    baseline = trial_run(tmp_path / "baseline", rolled_back(tmp_path / "traces"))
    other = trial_run(tmp_path / "other", rolled_back(tmp_path / "differing", **otherwise))
    found = found_in(compare_exactly(baseline, other))
    assert (found.what, found.step) == (what, step)


def test_a_run_with_fewer_steps_is_a_divergence(tmp_path: Path) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace())
    short = trial_run(tmp_path / "short", attempt_trace(steps=[1]), evaluated=(), final=None, saved={})
    found = found_in(compare_exactly(baseline, short))
    assert (found.what, found.step) == ("done", 2)
    assert (found.baseline, found.other) == ("4 steps, with step 2", "1 step, without step 2")
    assert found.more == ["and 2 more steps that only one of the runs took"]
    add_cause(found, baseline, repeats=None)
    assert "ended before the other" in str(found)
    # whichever of them it is
    assert found_in(compare_exactly(short, baseline)).baseline == "1 step, without step 2"


def test_a_step_counts_where_every_rank_recorded_it(tmp_path: Path) -> None:
    baseline, partial = trial_run(tmp_path / "baseline", attempt_trace(2)), attempt_trace(2)
    del partial.steps[3][1]
    found = found_in(compare_exactly(baseline, trial_run(tmp_path / "partial", partial)))
    assert (found.what, found.step) == ("done", 3)


@pytest.mark.parametrize(("evaluated", "final", "step"), [((2,), 4, 4), ((2, 3, 4), 4, 3), ((2, 4), None, 4)])
def test_an_evaluation_that_only_one_has(
    tmp_path: Path, evaluated: tuple[int, ...], final: int | None, step: int
) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace())
    found = found_in(
        compare_exactly(baseline, trial_run(tmp_path / "other", attempt_trace(), evaluated=evaluated, final=final))
    )
    assert (found.what, found.step) == ("done", step)
    assert "evaluation" in found.subject
    assert {found.baseline, found.other} == {"evaluated after this step", "not evaluated"}


def test_runs_without_a_checkpoint_in_common(tmp_path: Path) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace())
    found = found_in(
        compare_exactly(baseline, trial_run(tmp_path / "other", attempt_trace(), saved={3: {"weight": np.ones(3)}}))
    )
    assert (found.what, found.step) == ("done", STEPS)
    assert (found.baseline, found.other) == ("checkpoints of the steps 2, 4", "checkpoints of the steps 3")


# --------------------------------------------------------------------------------------------------------------------
# Other topologies

FP32 = TOLERANCES["fp32"]
OTHER_LOSSES = dict.fromkeys(range(1, STEPS + 1), 3.0)


def moved_run(folder: Path, *, world: int = 2, losses: Mapping[int, float] = OTHER_LOSSES, **what: Any) -> TrialRun:
    return trial_run(folder, attempt_trace(world, losses=losses, drawn=["torch"], **what))


def test_with_dropout_losses_may_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(drawn=["torch"]))
    saved = {step: {"weight": np.full(3, 2.0)} for step in SAVED}
    found = compare_within(
        baseline, trial_run(tmp_path / "other", attempt_trace(2, losses=OTHER_LOSSES), saved=saved), FP32
    )
    assert found.divergence is None
    assert "dropout" in found.by_design
    assert found.worst_tensor == pytest.approx(0.5)


@pytest.mark.parametrize(("what", "changes"), [("ids", {"samples": {3: 99}}), ("lr", {"rates": {4: 0.3}})])
def test_what_is_read_is_compared_to_the_end_though_losses_depend(
    tmp_path: Path, what: str, changes: dict[str, Any]
) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(drawn=["torch"]))
    found = found_in(compare_within(baseline, moved_run(tmp_path / "other", **changes), FP32).divergence)
    assert (found.what, found.step) == (what, 3 if what == "ids" else 4)


def test_with_as_many_processes_dropout_excuses_nothing(tmp_path: Path) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(2, drawn=["torch"]))
    found = compare_within(baseline, moved_run(tmp_path / "other"), FP32)
    assert (found_in(found.divergence).what, found.by_design) == ("loss", "")
    # nor before a run moves to another number of them, and after it goes back it has inherited what was made there
    first = attempt_trace(2, steps=[1, 2], losses={1: 3.0})
    moving = trial_run(tmp_path / "moving", first, attempt_trace(1, start=2, steps=[3, 4], losses=OTHER_LOSSES))
    assert found_in(compare_within(baseline, moving, FP32).divergence).step == 1
    three = [
        attempt_trace(2, steps=[1, 2]),
        attempt_trace(1, start=2, steps=[3]),
        attempt_trace(2, start=3, steps=[4], losses={4: 3.0}),
    ]
    back = compare_within(baseline, trial_run(tmp_path / "back", *three), FP32)
    assert back.divergence is None
    assert back.by_design


def test_a_running_mean_follows_a_bias_that_is_rounding(tmp_path: Path) -> None:
    one, other = attempt_trace(2), attempt_trace(2)
    for each in (one, other):
        each.facts["batch_norm"] = ["norm"]
    tensors = [{"norm.running_mean": np.full(3, value), "norm.running_var": np.ones(3)} for value in (1.0, 1.01)]
    trials = [
        trial_run(tmp_path / name, each, saved=dict.fromkeys(SAVED, held))
        for name, each, held in zip(("baseline", "other"), (one, other), tensors, strict=True)
    ]
    found = compare_within(*trials, FP32)
    assert found_in(found.divergence).subject.startswith("model/norm.running_mean"), "where no such bias is"
    one = attempt_trace(2)
    one.facts["batch_norm"] = ["norm"]
    one.steps[1][0]["gradients"]["layer.bias"] = ["bits", 1e-9]
    trials[0].attempts[0].trace = one
    found = compare_within(*trials, FP32)
    assert found.divergence is None
    assert found.noise == ["layer.bias", "norm.running_mean"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_never_by_design(tmp_path: Path, loss: float) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(drawn=["torch"]))
    found = compare_within(baseline, moved_run(tmp_path / "other", losses=OTHER_LOSSES | {2: loss}), FP32)
    assert (found_in(found.divergence).what, found_in(found.divergence).step) == ("loss", 2)
    assert found.worst_loss == float("inf")


@pytest.mark.parametrize(
    "tensors", [{"bias": np.ones(3)}, {"weight": np.ones(4)}, {"weight": np.array([1, np.nan, 1])}]
)
def test_a_tensor_that_is_missing_or_not_finite_is_never_by_design(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(drawn=["torch"]))
    saved = {2: {"weight": np.full(3, 2.0)}, 4: tensors}
    other = trial_run(tmp_path / "other", attempt_trace(2, losses=OTHER_LOSSES), saved=saved)
    found = found_in(compare_within(baseline, other, FP32).divergence)
    assert (found.what, found.step) == ("checkpoint", 4)


def test_a_run_elsewhere_with_fewer_steps_is_a_divergence(tmp_path: Path) -> None:
    baseline = trial_run(tmp_path / "baseline", attempt_trace(drawn=["torch"]))
    short = trial_run(tmp_path / "short", attempt_trace(2, steps=[1]), evaluated=(), final=None, saved={})
    assert found_in(compare_within(baseline, short, FP32).divergence).what == "done"


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
    ("worlds", "strategies", "replicate", "message"),
    [
        ([2], ["zero5"], [], "no strategy 'zero5'"),
        ([1, 2], ["single"], [], "--strategies single is one process"),
        ([1], ["ddp"], [], "a strategy needs several processes"),
        ([4], ["zero3"], [2], "--replicate sets the number of replicas of fsdp2"),
        ([2, 3], ["fsdp2"], [2], "--replicate 2: expected a number of processes .*, found 2, 3; .* --worlds 4"),
    ],
)
def test_topologies_that_would_be_ignored_are_refused(
    worlds: list[int], strategies: list[str], replicate: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        topologies_of(1, worlds, strategies, replicate)


def test_processes_and_worlds_are_refused_together(tmp_path: Path) -> None:
    ended = cli("prove", write_recipe(tmp_path), "--processes", 2, "--worlds", "1,2")
    assert ended.status == 2
    assert "--processes and --worlds both set the number" in ended.err
