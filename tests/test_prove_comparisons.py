"""What `distrain prove` makes of two runs, on records and checkpoints made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.checkpoint import LocalCommunicator, Piece, Saver, TensorSpec
from distrain.prove import Divergence, Leg, Placement
from distrain.prove.causes import explain
from distrain.prove.divergence import exact
from distrain.prove.legs import Attempt
from distrain.prove.traces import Record

STEPS = 4
SAVED = (2, 4)


def record(
    world: int = 1, *, steps: Iterable[int] = range(1, STEPS + 1), start: int = 0, losses: Mapping[int, float] = {},
    samples: Mapping[int, int] = {}, rates: Mapping[int, float] = {}, drawn: Iterable[str] = (),
) -> Record:  # fmt: skip
    """Return what the ranks of one attempt noted: step s reads samples 2 s and 2 s + 1, the first half on each rank."""
    facts = {"world_size": world, "precision": "fp32", "batch_norm": [], "step": start, "hidden": {}, "state": {}}
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
