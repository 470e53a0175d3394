"""`distrain prove` finds nothing in correct recipes, and in wrong ones the step, the subject and the cause."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import USER_CODE
from runs import TINY, write_recipe
from torch import nn
from worlds import _context, free_port, start_server

from distrain.checkpoint import list_checkpoints
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.prove import CouldNotRun, Divergence, Interruption, Proof, Topology, prove
from distrain.prove.command import run as run_command
from distrain.prove.cost import determinism_turned_on
from distrain.prove.divergence import compare_exactly
from distrain.prove.processes import session_processes
from distrain.prove.proof import topologies_of
from distrain.prove.report import proved_line, result_line
from distrain.prove.tolerance import Tolerance, compare_within
from distrain.prove.traces import read_trace
from distrain.prove.trial_runs import draw_interruptions, resume_between
from distrain.run.folder import RunDir
from distrain.training.callbacks.hidden_state import hidden_state
from distrain.training.callbacks.trace import changes

WRONG = USER_CODE / "wrong_parts.py"

# --------------------------------------------------------------------------------------------------------------------
# Starting runs without the time that imports take


@dataclass
class Forked:
    """A process of the server that has imported torch; the leader of a session of its own."""

    process: Any

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def forked(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Forked:
    """Start `distrain train` as `start_distrain` does, its ranks by fork."""
    start_server()
    process = _context.Process(target=_train, args=(list(arguments), dict(environment), str(output), os.getcwd()))
    process.start()
    return Forked(process)


def _train(arguments: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    count = int(arguments[arguments.index("--processes") + 1])
    port = str(free_port())
    ranks = []
    for rank in range(count) if count > 1 else []:
        if (child := os.fork()) == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os._exit(_work(arguments))
        ranks.append(child)
    os._exit(_launch(ranks) if ranks else _work(arguments))


def _launch(ranks: list[int]) -> int:
    """Wait for the ranks as a launcher does: it hands SIGTERM on, and ends the others when one fails."""

    def all_get(number: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    signal.signal(signal.SIGTERM, lambda number, frame: all_get(number))
    status = 0
    while ranks:
        pid, code = os.wait()
        ranks.remove(pid)
        if code and not status:
            status = 1
            all_get(signal.SIGKILL)
    return status


def _work(arguments: list[str]) -> int:
    from distrain.launchers import work

    target, *rest = arguments[1:]
    at = rest.index("--run-dir")
    status = work(target, rest[:at], run_dir=rest[at + 1], processes=int(rest[at + 3]))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


# --------------------------------------------------------------------------------------------------------------------
# Recipes

SMALL = """
name: small
task: classification
data: {name: "own_parts:Points"}
model: {name: mlp, hidden: [8]}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
schedule: {name: cosine, warmup: 2 steps}
batch: {global: 12}
train: {steps: 40, precision: fp32}
eval: {every: 5 steps}
checkpoint: {async: false}
"""


def small(folder: Path, text: str = SMALL) -> str:
    return str(write_recipe(folder, text.replace("own_parts:", f"{USER_CODE / 'own_parts.py'}:")))


def proof_of(recipe: str, *overrides: str, kills: int = 1, steps: int = 12, seed: int = 3, **how: Any) -> Proof:
    return prove(recipe, list(overrides), kills=kills, steps=steps, seed=seed, start=forked, **how)


def divergence_of(proof: Proof) -> Divergence:
    assert proof.divergence is not None, "nothing was found"
    assert not proof.proved
    return proof.divergence


# --------------------------------------------------------------------------------------------------------------------
# Right recipes


def test_a_right_recipe_is_proved_with_kills(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = small(tmp_path, TINY.replace("precision: fp64", "precision: fp32").replace("steps: 12,", "steps: 100,"))
    options = ["model.dropout=0.2", "model.norm=batch", "checkpoint.async=true"]
    proof = proof_of(recipe, *options, kills=3, steps=12, done=lambda result: lines.append(result_line(result)))
    assert proof.proved
    baseline, killed = proof.results
    assert baseline.trial.last_step == killed.trial.last_step == 12
    assert proof.total_steps == 100, "the schedule is that of the whole recipe"
    assert sorted(each.how for each in killed.trial.interruptions) == ["kill", "kill", "stop"]
    assert len(killed.trial.attempts) == 4
    assert any(attempt.resumed_at > 0 for attempt in killed.trial.attempts)
    # every step's ids, learning rate, loss, gradients and state were there to be compared
    for step in range(1, 13):
        noted = baseline.trial.attempts[0].trace.steps[step][0]
        assert {"ids", "samples", "inputs", "targets", "lr", "loss", "norm", "gradients", "state", "scalars"} <= set(
            noted
        )
        assert any(name.startswith("optimizer/") for name in noted["state"])
        assert any(name.startswith("ema/") for name in noted["state"])
        assert noted["drawn"] == ["torch"], "dropout draws, and nothing else does"
    assert "SIGTERM" in lines[1]
    assert "the same bits" in lines[1]
    assert proved_line(proof).startswith(
        "proved: the first 12 of 100 steps, 3 interruptions; 1 run the same to the bit"
    )


def with_determinism(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Forked:
    """Start a run as on a GPU, where a proof turns deterministic operations on."""
    on = [] if "train.deterministic=false" in arguments else ["train.deterministic=true"]
    at = list(arguments).index("--run-dir")
    return forked([*arguments[:at], *on, *arguments[at:]], environment, output)


def test_the_cost_of_deterministic_operations_is_reported(tmp_path: Path) -> None:
    recipe, keep = small(tmp_path), tmp_path / "kept"
    proof = prove(recipe, ["log.every=1 steps"], kills=1, steps=6, seed=3, keep=keep, start=with_determinism)
    assert proof.proved
    assert re.search(r"costs here: [\d,]+ samples/s with it, [\d,]+ without: [+-]\d+% time a step$", proof.determinism)
    assert proof.as_json()["determinism"] == proof.determinism
    # nobody turned it on but the recipe, or nobody at all
    baseline = RunDir(proof.results[0].trial.run_dir)
    assert determinism_turned_on(load_recipe(recipe).recipe, baseline)
    for asked in ("true", "false"):
        assert not determinism_turned_on(load_recipe(recipe, [f"train.deterministic={asked}"]).recipe, baseline)
    assert not determinism_turned_on(load_recipe(recipe).recipe, RunDir(tmp_path))


def test_topologies_agree_within_the_tolerance(tmp_path: Path) -> None:
    proof = proof_of(small(tmp_path), "batch.micro=2", kills=1, worlds=[1, 2, 3], steps=8)
    assert proof.proved, proof.divergence
    assert [result.trial.name for result in proof.results] == [
        *("baseline, 1 process", "killed, 1 process", "baseline, 2 processes", "killed, 2 processes"),
        *("baseline, 3 processes", "killed, 3 processes", "moving"),
    ]
    moving = proof.results[-1].trial
    assert [attempt.topology.processes for attempt in moving.attempts] == [1, 2, 3]
    near = [result.agreement for result in proof.results if result.agreement is not None]
    assert len(near) == 3
    assert all(0 < each.worst_loss <= 1e-6 and 0 < each.worst_tensor <= 1e-6 for each in near)
    # the comparison can fail
    first, other = proof.results[0].trial, proof.results[2].trial
    assert not other.run_dir.exists(), "nothing is left behind"
    assert first.attempts[0].trace.facts["precision"] == "fp32"


def test_a_run_that_rolls_back_is_proved(tmp_path: Path) -> None:
    spikes = "anomalies={nonfinite: rollback, spike: rollback, window: 2, factor: 1.01, max_skips: 100}"
    proof = proof_of(small(tmp_path), spikes, keep=tmp_path / "kept")
    assert proof.proved, proof.divergence
    assert sum(map(len, proof.results[0].trial.attempts[0].trace.rollbacks.values())) > 1


def test_a_rank_that_is_killed_alone(tmp_path: Path) -> None:
    proof = proof_of(small(tmp_path), kills=3, worlds=[2], seed=1)
    assert proof.proved, proof.divergence
    assert sorted(each.how for each in proof.results[1].trial.interruptions) == ["kill", "kill-rank", "stop"]


def test_the_report_names_what_depends_on_the_number_of_processes(tmp_path: Path) -> None:
    recipe = small(tmp_path, TINY)
    proof = proof_of(recipe, "model.norm=batch", "model.dropout=0.2", kills=0, worlds=[1, 2], steps=6)
    assert proof.proved
    agreement = proof.results[1].agreement
    assert agreement is not None
    assert "batch normalisation (layers.1)" in agreement.by_design
    assert "draws random numbers" in agreement.by_design
    assert "by samples and learning rates only" in proved_line(proof)


def test_another_topology_beyond_the_tolerance_is_a_divergence(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    proof = proof_of(recipe, kills=0, worlds=[1, 2], steps=6, loss_tolerance=0.0)
    found = divergence_of(proof)
    assert found.what == "loss"
    assert "tolerance 0" in found.subject
    proof = proof_of(recipe, kills=0, worlds=[1, 2], state_tolerance=0.0, keep=tmp_path / "kept")
    found = divergence_of(proof)
    assert (found.what, found.step) == ("checkpoint", 2)
    assert found.subject.startswith("model/")
    again = compare_within(proof.results[0].trial, proof.results[1].trial, Tolerance(1e-5, 1e-4, 1e-6))
    assert again.divergence is None


# --------------------------------------------------------------------------------------------------------------------
# Wrong recipes

MODEL, DATA = "model", "data"
MORE = pytest.mark.more
"""What is found as another is, by where it is kept: test_what_the_users_files_remember_is_found has each place."""


@pytest.mark.parametrize(
    ("key", "name", "what", "resumed", "says"),
    [
        pytest.param(MODEL, "UnseededModel", "loss", False, "model.noise", marks=MORE),
        (MODEL, "EntropyModel", "loss", False, "unseeded random numbers"),
        (MODEL, "UnorderedModel", "loss or gradients", False, "a nondeterministic operation"),
        (MODEL, "CountingModel", "loss", True, "model.calls"),
        pytest.param(MODEL, "GlobalModel", "loss", True, "calls (a variable of wrong_parts.py)", marks=MORE),
        (MODEL, "ForgetfulModel", "loss", True, "model.seen (a buffer that is not persistent)"),
        pytest.param(MODEL, "SeededModel", "loss", True, "model.draws", marks=MORE),
        (DATA, "UnseededData", "samples", False, "data.noise"),
        pytest.param(DATA, "CountingData", "samples", True, "data.reads", marks=MORE),
        ("optim.name", "Forgetful", "state", True, "optimizer.velocity"),
    ],
)
def test_what_users_do_wrong_is_found_and_named(
    tmp_path: Path, key: str, name: str, what: str, resumed: bool, says: str
) -> None:
    overrides = [f"{key}={WRONG}:{name}"]
    if key == "optim.name":
        overrides = [f"optim={{name: '{WRONG}:{name}', lr: 0.1}}"]
    found = divergence_of(proof_of(small(tmp_path), *overrides))
    assert found.what in what.split(" or "), found
    assert says in found.cause, found
    assert found.advice
    assert found.ranks == [0]
    assert found.baseline != found.other
    assert (found.attempt > 0) == resumed, found
    if resumed:
        # weights and inputs are the same after the resume, so the first step already differs
        assert found.step == found.resumed_at + 1
        assert f"in step {found.step}, after the resume at step {found.resumed_at}, on rank 0" in str(found)
    elif name != "UnorderedModel":  # which may round to the same now and then
        assert found.step == 1
        assert "in step 1, before any interruption" in str(found)


def test_one_step_that_agrees_by_chance_is_no_evidence(tmp_path: Path) -> None:
    runs = tmp_path / "runs-seen"
    runs.mkdir()
    found = divergence_of(proof_of(small(tmp_path), f"model={{name: '{WRONG}:LuckyModel', runs: '{runs}'}}"))
    assert (found.step, found.attempt) == (1, 0)
    assert [own.read_text() for own in sorted(runs.iterdir(), key=lambda own: own.stat().st_mtime)][:3] == list("010")
    assert "PYTHONHASHSEED" not in found.cause, found


def test_weights_that_start_otherwise(tmp_path: Path) -> None:
    found = divergence_of(proof_of(small(tmp_path), f"model={WRONG}:UnseededStart"))
    assert (found.what, found.step, found.subject) == ("start", 0, "model/head.weight")
    assert "built from unseeded random numbers" in found.cause
    assert "with 0 steps done" in str(found)


def test_an_optimizer_that_loads_less_than_it_saved(tmp_path: Path) -> None:
    optimizer = f"optim={{name: '{WRONG}:Amnesiac', lr: 0.1}}"
    found = divergence_of(proof_of(small(tmp_path), optimizer))
    assert (found.what, found.step, found.attempt) == ("start", found.resumed_at, 1)
    assert found.subject == "optimizer/layers.0.weight/momentum_buffer"
    assert found.other == "no such tensor"
    assert "loaded into the optimizer" in found.cause


def test_late_random_numbers_are_distinguished_from_lost_state(tmp_path: Path) -> None:
    # the interrupted run differs only after its resume, and a second baseline run differs as well
    found = divergence_of(proof_of(small(tmp_path), f"model={WRONG}:LateModel", seed=_late_seed()))
    assert (found.step, found.attempt) == (10, 1)
    assert "unseeded random numbers" in found.cause


def test_a_model_may_change_its_buffers_in_evaluation(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    proof = proof_of(recipe, f"model={WRONG}:CountsCalls", "eval.every=2 steps")
    assert proof.proved, proof.divergence


def test_a_transform_with_a_generator_of_its_own(tmp_path: Path) -> None:
    found = divergence_of(proof_of(small(tmp_path), f'data.transforms.train=["{WRONG}:Jitter"]'))
    assert (found.what, found.step) == ("inputs", found.resumed_at + 1)
    assert found.attempt == 1
    assert "transforms" in found.cause
    assert "draws" in found.cause
    # the data set itself is above suspicion
    assert "data.transforms" in found.advice or "global generators" in found.advice


def _late_seed() -> int:
    """Return a seed with which a run of twelve steps is killed before LateModel differs."""
    return next(seed for seed in range(100) if _first_kill(seed).step < 7)


def _first_kill(seed: int) -> Interruption:
    """Return when a run of twelve steps is killed."""
    draw, how = _draw(seed), {"last_step": 12, "save_every": 2}
    drawn = draw_interruptions(1, processes=[1], draw=draw, **how)
    return resume_between(drawn, workers=0, micro_batches=1, draw=draw, **how)[0]


def _draw(seed: int) -> random.Random:
    return random.Random(f"{seed} killed, 1 process")


def test_samples_that_depend_on_the_rank(tmp_path: Path) -> None:
    found = divergence_of(proof_of(small(tmp_path), f"data={WRONG}:RankData", kills=0, worlds=[1, 2], steps=6))
    assert (found.trial, found.what, found.step) == ("baseline, 2 processes", "samples", 1)
    assert "RANK" in found.advice


def test_a_data_set_of_another_length_each_time(tmp_path: Path) -> None:
    # orders of nearly as many samples often begin alike, with the first twelve but hardly ever with a thousand
    found = divergence_of(proof_of(small(tmp_path), f"data={WRONG}:GrowingData", "batch.global=1000"))
    assert (found.what, found.step) == ("ids", 1)
    assert "another number of them" in found.cause


def test_checkpoints_that_were_tampered_with(tmp_path: Path) -> None:
    proof = proof_of(small(tmp_path), keep=tmp_path / "kept")
    assert proof.proved
    baseline, killed = (result.trial for result in proof.results)
    checkpoints = list_checkpoints(killed.run_dir / "checkpoints")
    victim = checkpoints[1]
    file = next(victim.path.glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = compare_exactly(baseline, killed)
    assert found is not None
    assert (found.what, found.step) == ("checkpoint", victim.step)
    assert "does not verify" in found.other
    # whole, with another state: that of another step
    _replace(victim.path, checkpoints[0].path, victim.step)
    found = compare_exactly(baseline, killed)
    assert found is not None
    assert (found.what, found.step) == ("checkpoint", victim.step)
    assert found.subject.startswith("model/layers.0.")
    assert ", element " in found.subject
    assert float(found.baseline) != float(found.other), "both values"
    assert any("elements differ" in line for line in found.more)


def _replace(target: Path, source: Path, step: int) -> None:
    """Put the tensors of one checkpoint in another's place, under its step."""
    from distrain.checkpoint import LocalCommunicator, Piece, Reader, Saver

    with Reader(source) as reader:
        manifest = reader.manifest
        pieces = [
            Piece(name, 0, reader.read(name, 0, spec.numel)) for name, spec in manifest.specs.items() if spec.numel
        ]
    saver = Saver(target.parent, LocalCommunicator(), keep=1000, keep_best=0, asynchronous=False)
    saver.begin(
        step, manifest.specs, pieces, scalars=manifest.scalars, aliases=manifest.aliases, recipe=manifest.recipe,
        strategy=manifest.strategy, score=manifest.score,
    )  # fmt: skip
    saver.finish()
    saver.close()


class Box:
    """What an object of a user's may hold."""

    shared = 0

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.numpy = np.random.default_rng(0)
        self.python = random.Random(0)
        self.cache: dict[str, Any] = {"seen": [0, torch.zeros(2)]}
        self.itself = self
        self.large = torch.zeros(1 << 20)

    def __call__(self, x: Any) -> Any:
        return x


def counter() -> Callable[[], int]:
    count = 0

    def call() -> int:
        nonlocal count
        count += 1
        return count

    return call


def test_what_no_checkpoint_holds_is_found_wherever_it_is() -> None:
    box, call, model = Box(), counter(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    roots = {"model": model, "optimizer": optimizer, "data": functools.partial(box, call)}

    def changed_by(action: Callable[[], Any]) -> list[str]:
        before = hidden_state(roots)
        action()
        after = hidden_state(roots)
        return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))

    def train() -> None:
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()

    assert changed_by(train) == [], "what a checkpoint holds is not hidden"
    assert changed_by(lambda: torch.rand(1, generator=box.generator)) == ["data.generator"]
    assert changed_by(box.numpy.random) == ["data.numpy"]
    assert changed_by(box.python.random) == ["data.python"]
    assert changed_by(lambda: box.cache["seen"][1].add_(1)) == ["data.cache.seen.1"]
    assert changed_by(lambda: box.cache.update(new=1)) == ["data.cache.new"]
    assert changed_by(lambda: box.large.add_(1)) == ["data.large"]
    assert changed_by(lambda: setattr(Box, "shared", Box.shared + 1)) == ["Box.shared (of the class)"]
    assert changed_by(call) == ["data.count"]
    assert changed_by(lambda: setattr(model[0], "calls", 3)) == ["model.0.calls"]
    assert changed_by(lambda: setattr(model[0].weight, "momentum", 1.0)) == ["model.0.weight.momentum"]
    model[0].register_buffer("mask", torch.ones(2), persistent=False)
    assert changed_by(lambda: model[0].mask.zero_()) == ["model.0.mask (a buffer that is not persistent)"]


def test_to_look_leaves_tensors_as_they_are() -> None:
    kept, freed, hidden = torch.ones(3), torch.ones(2), torch.zeros(2)
    freed.untyped_storage().resize_(0)  # as FSDP2 does between two uses of what it gathers
    model = nn.Linear(2, 2)
    model.notes = {"kept": kept, "freed": freed}

    def wrapper(*_: Any) -> torch.Tensor:
        return hidden

    wrapper.__module__ = "torch.distributed.fsdp"
    model.register_forward_pre_hook(wrapper)
    found = hidden_state({"model": model})
    assert found["model.notes.freed"] == "a tensor (2,) without memory"
    assert not any("hidden" in path for path in found), "mechanisms of torch's are no state of the user's"
    assert kept.untyped_storage().resizable()


def _appended(kind: Any) -> None:
    kind.history = (*kind.history, 1)


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        (lambda parts: parts.COUNTS.append(1), ["COUNTS.1 (a variable of remembering_parts.py)"]),
        (lambda parts: next(parts.CYCLE), ["CYCLE (a variable of remembering_parts.py)"]),
        (lambda parts: next(parts.NUMBERS), ["NUMBERS (a variable of remembering_parts.py)"]),
        (lambda parts: parts.SEEN.add("a"), ["SEEN (a variable of remembering_parts.py)"]),
        (lambda parts: parts.LONG.reverse(), ["LONG (a variable of remembering_parts.py)"]),
        (lambda parts: parts.RECENT.append(4), ["RECENT.1 (a variable of remembering_parts.py)"]),
        (lambda parts: parts.MATRIX.fill(parts.MATRIX[0] + 1), ["MATRIX (a variable of remembering_parts.py)"]),
        (lambda parts: parts.KEPT.update({object(): 1}), ["KEPT.entry 0 (a variable of remembering_parts.py)"]),
        (lambda parts: setattr(parts.SLOTTED, "count", 2), ["SLOTTED.count (a variable of remembering_parts.py)"]),
        (lambda parts: next(parts.STEPS), ["STEPS.count (a variable of remembering_parts.py)"]),
        (
            lambda parts: parts.ramp(),
            [
                "counts.0 (a default argument of ramp in remembering_parts.py)",
                "scale.now (a default argument of ramp in remembering_parts.py)",
            ],
        ),
        (lambda parts: parts.attributed(), ["attributed.calls (of remembering_parts.py)"]),
        (lambda parts: parts.enclosed(), ["calls.0"]),
        (lambda parts: parts.cached(len(parts.COUNTS)), ["cached.kept results (of remembering_parts.py)"]),
        (lambda parts: _appended(parts.Model), ["Model.history.0 (of the class)"]),
        (lambda parts: parts.Model().smooth(), ["past.0 (a default argument of Model.smooth in remembering_parts.py)"]),
        (lambda parts: parts.Model.fixed(), ["past.0 (a default argument of Model.fixed in remembering_parts.py)"]),
    ],
)
def test_what_the_users_files_remember_is_found(change: Callable[[Any], Any], paths: list[str]) -> None:
    import remembering_parts

    importlib.reload(remembering_parts)
    roots = {"model": remembering_parts.Model()}
    before = hidden_state(roots)
    assert hidden_state(roots) == before, "to look changes nothing"
    change(remembering_parts)
    changed = {path for path, _ in changes(before, hidden_state(roots)).items()}
    assert all(any(path in found for found in changed) for path in paths), changed
    assert all("remembering_parts" in path or " (of the class)" in path for path in changed), changed


def test_files_of_the_users_code_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("1")
    library = tmp_path / "site-packages" / "noting_library.py"
    library.parent.mkdir()
    library.write_text(
        "from pathlib import Path\nhere = Path(__file__).parent\nopen(here / 'cache.txt', 'a+').close()\n"
        "def read():\n    open(here / 'given.txt', 'a+').close()\n"
    )
    code = tmp_path / "noting.py"
    code.write_text(
        f"import sys\nsys.path.append({str(library.parent)!r})\nimport noting_library\nnoting_library.read()\n"
        "import os\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        "(here / 'note.txt').read_text()\n(here / 'new.tmp').write_text('2')\n"
        "os.replace(here / 'new.tmp', here / 'note.txt')\nopen(here / 'log.txt', 'a').close()\nos.listdir(here)\n"
        "exec(compile(\"open(here / 'kernel.txt', 'a+').close()\", '/lib/torch/_inductor/codecache.py', 'exec'))\n"
    )
    (tmp_path / "trace").mkdir()
    command = (
        "import sys; from distrain.training.callbacks.outside_files import note_files; note_files(); "
        "from distrain.config.yaml import load_recipe; load_recipe('recipe.yaml'); "
        f"sys.path.append({str(tmp_path)!r}); import noting"
    )
    write_recipe(tmp_path)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_noting, args=(command, str(tmp_path)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    (tmp_path / "trace" / "rank-0.jsonl").write_text(json.dumps({"at": "start", "step": 0}) + "\n")
    trace = read_trace(tmp_path / "trace")
    assert trace is not None
    found = {Path(path).name: noted for path, noted in trace.files.items()}
    assert found["note.txt"][0].startswith("1 bytes, written at ")
    assert found["note.txt"][1], "by what was put in its place"
    assert found["log.txt"] == (None, True), "what is only added to is not read"
    assert found[tmp_path.name][0].split()[1] == "entries"
    assert "recipe.yaml" not in found, "distrain opened it"
    assert "given.txt" in found, "a library opened it for the user's code"
    assert "cache.txt" not in found, "a library opened it when it was imported"
    assert "kernel.txt" not in found, "the compiler opened it for the user's code"


def _noting(command: str, folder: str) -> None:
    os.chdir(folder)
    os.environ["DISTRAIN_TRACE"] = json.dumps({"folder": str(Path(folder) / "trace")})
    exec(compile(command, "<command>", "exec"), {})


@pytest.mark.parametrize(
    ("part", "overrides", "what", "says"),
    [
        (
            "model=CountsEvaluationsInSecret",
            ["eval.every=3 steps"],
            "loss",
            "model.evaluations (a buffer that is not persistent)",
        ),
        pytest.param("model=Ramped", [], "loss", "(a default argument of ramp in wrong_parts.py)", marks=MORE),
        pytest.param("optim.name=Slowing", [], "lr or state", "STEPS.0 (a variable of wrong_parts.py)", marks=MORE),
        ("data=HashedData", [], "samples", "the iteration order of a set of strings"),
        ("model=Noted", [], "loss", "note.txt, which training writes and reads"),
        ("data=WorkerData", ["data.workers=2", "checkpoint.every=2 steps"], "samples", "get_worker_info"),
        ("data=CountingData", ["data.workers=1"], "samples", "data.reads"),
    ],
)
def test_what_is_remembered_elsewhere_is_named(
    tmp_path: Path, part: str, overrides: list[str], what: str, says: str
) -> None:
    parts = tmp_path / "wrong_parts.py"  # which writes a file beside it
    parts.write_text(WRONG.read_text())
    key, _, name = part.partition("=")
    value = f"{key.removesuffix('.name')}={{name: '{parts}:{name}'{', lr: 0.1' if key == 'optim.name' else ''}}}"
    found = divergence_of(proof_of(small(tmp_path), value, *overrides))
    assert found.what in what.split(" or "), found
    assert says in found.cause, found


PLACES = USER_CODE / "wrong_places.py"


@pytest.mark.parametrize(
    ("override", "what", "named", "advice"),
    [
        ("loss=CountingLoss", "loss", "loss.calls", "a loss remembers in a task of your own"),
        ("task=CountingTask", "loss", "task.calls", "the task's state by its methods state_dict()"),
        ("task=CountingCollate", "samples", "task.collate.batches", "a batch in collate from its samples alone"),
        ("callbacks=Decay", "state", "callback.Decay.calls", "the callback's state by its methods state_dict()"),
        ("callbacks=Brightens", "inputs", "callback.Brightens.calls", "the callback's state by its methods"),
        ("data=CountingStream", "evaluation", "evaluated data.test.given", "keep no state from one __getitem__"),
        ("data=DrawsToEvaluate", "evaluation", "evaluated data.test.noise", "keep no state from one __getitem__"),
    ],
)
def test_the_advice_is_for_what_keeps_the_state(
    tmp_path: Path, override: str, what: str, named: str, advice: str
) -> None:
    key, _, name = override.partition("=")
    value = f"'{PLACES}:{name}'"
    found = divergence_of(proof_of(small(tmp_path), f"{key}=[{value}]" if key == "callbacks" else f"{key}={value}"))
    assert found.what == what, found
    assert found.cause == f"{named} is in no checkpoint, and differed before the step"
    assert advice in found.advice
    began = "BEGAN (a variable of wrong_places.py)" if found.attempt == 0 else named
    assert {path for path, _, _ in found.suspects} <= {named, began}, "nothing else is under suspicion"


def test_what_differs_in_each_process_is_not_blamed(tmp_path: Path) -> None:
    """An instant that a file notes, and a callback's notes."""
    callbacks = f"callbacks=['{PLACES}:Notes']"
    found = divergence_of(proof_of(small(tmp_path), f"model={PLACES}:EntropyModel", callbacks))
    assert found.cause == (
        "weights and inputs were the same, so the model or the loss draws unseeded random numbers, or reads something "
        "that changes, or a callback (Notes) does; BEGAN (a variable of wrong_places.py) differed as well"
    )
    lost = divergence_of(proof_of(small(tmp_path), f"model={WRONG}:CountingModel", callbacks))
    assert lost.cause.startswith("model.calls is in no checkpoint")
    found = divergence_of(proof_of(small(tmp_path), f"model={WRONG}:LateModel", callbacks, seed=_late_seed()))
    assert "unseeded random numbers" in found.cause, "a further baseline run differs as well"


@pytest.mark.parametrize("cold", [True, False])
def test_files_that_a_data_set_keeps_are_not_blamed(tmp_path: Path, cold: bool) -> None:
    """Whether the baseline run makes them, or both find them."""
    parts = tmp_path / "wrong_places.py"  # which writes files beside it
    parts.write_text(PLACES.read_text())
    data = f"data={parts}:CachesOnDisk"
    if not cold:
        assert proof_of(small(tmp_path), data).proved
    found = divergence_of(proof_of(small(tmp_path), data, f"model={parts}:EntropyModel"))
    assert "so the model or the loss draws unseeded random numbers" in found.cause, found
    assert not found.files


@pytest.mark.parametrize("override", ["callbacks=['{}:KeptDecay']", "task={}:DrawingCollate"])
def test_what_looks_like_state_and_is_none_is_proved(tmp_path: Path, override: str) -> None:
    proof = proof_of(small(tmp_path), override.format(PLACES), "eval.every=2 steps", kills=2)
    assert proof.proved, proof.divergence


def test_weights_that_begin_otherwise_in_another_world(tmp_path: Path) -> None:
    found = divergence_of(proof_of(small(tmp_path), f"model={PLACES}:WorldModel", kills=0, worlds=[1, 2], steps=6))
    assert (found.what, found.step, found.subject) == ("start", 0, "model/head.weight")
    assert "WORLD_SIZE" in found.advice


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("last_step", [6, 12, 30])
def test_one_resume_is_between_loader_processes(workers: int, count: int, last_step: int) -> None:
    for seed, micro_batches in itertools.product(range(5), (1, 3)):
        drawn = draw_interruptions(count, last_step=last_step, save_every=2, processes=[1], draw=_draw(seed))

        def moved(seed: int = seed, drawn: list[Interruption] = drawn, made: int = micro_batches) -> list[Interruption]:
            how: dict[str, Any] = {"workers": workers, "micro_batches": made, "draw": _draw(seed)}
            return resume_between(drawn, last_step=last_step, save_every=2, **how)

        assert moved() == moved(), "the seed says which"
        (exact_one,) = [each for each in moved() if each.exact]
        assert 1 <= exact_one.step <= last_step - 2
        assert [each for each in moved() if not each.exact] == [d for d in drawn if d in moved()]
        if workers > 1 and micro_batches % workers:
            assert exact_one.step * micro_batches % workers, "another process reads than in a baseline run"


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_exit_status_is_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(tmp_path)

    def command(*overrides: str, **how: Any) -> tuple[int, str, str]:
        options: dict[str, Any] = {
            **dict.fromkeys(("processes", "keep", "loss_tolerance", "state_tolerance")),
            **dict.fromkeys(("worlds", "strategies", "replicate"), ""),
            "kills": 1,
            "steps": 12,
            "seed": 3,
            "as_json": False,
            "start": forked,
        }
        status = run_command(recipe, list(overrides), **(options | how))
        return status, *capsys.readouterr()

    status, out, err = command(as_json=True)
    assert status == 0
    report = json.loads(out)
    assert report["proved"] is True
    assert [len(trial["attempts"]) for trial in report["legs"]] == [1, 2]
    assert "proved: " in err

    status, out, err = command(f"model={WRONG}:CountingModel")
    assert status == 1
    assert "first divergence: in step" in out
    assert "likely cause" in out
    assert "model.calls" in out
    print(out)

    status, out, err = command("model=own_parts.py:Nothing")
    assert status == 2
    assert "own_parts.py" in err, "training's own error is shown"

    status, out, err = command(worlds="1,x")
    assert status == 2
    assert "--worlds: found 'x'" in err


def test_what_cannot_be_run(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    with pytest.raises(UserError, match=r"batch\.glob"):
        prove(recipe, ["batch.glob=3"])
    with pytest.raises(UserError, match="nothing to compare"):
        proof_of(recipe, kills=0)
    with pytest.raises(CouldNotRun, match="is nan"):
        proof_of(recipe, "optim.lr=1e18")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        proof_of(recipe, keep=tmp_path / "full")
    with pytest.raises(UserError, match="zero3: a strategy needs several processes"):
        topologies_of(1, [1], ["zero3"])


def test_topologies() -> None:
    assert topologies_of(2, [], []) == [Topology(2)]
    assert topologies_of(2, [1, 3], []) == [Topology(1), Topology(3)]
    assert topologies_of(1, [1, 2, 3], ["single", "zero3", "zero3"]) == [
        Topology(1, "single"),
        Topology(2, "zero3"),
        Topology(3, "zero3"),
    ]
    assert topologies_of(1, [2], ["single", "ddp"]) == [Topology(1, "single"), Topology(2, "ddp")]
    found = topologies_of(1, [2, 4, 6], ["ddp", "fsdp2"], [1, 2, 3])
    assert [(each.processes, each.replicas) for each in found if each.strategy == "ddp"] == [(2, 1), (4, 1), (6, 1)]
    hybrid = [(each.processes, each.replicas) for each in found if each.strategy == "fsdp2"]
    assert hybrid == [(2, 1), (4, 1), (4, 2), (6, 1), (6, 2), (6, 3)]
    assert str(found[-1]) == "6 processes, fsdp2, 3 replicas"
    assert found[-1].arguments == ["--processes", "6", "--strategy", "fsdp2", "--replicate", "3"]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_interruptions_are_spread_and_can_be_repeated(count: int) -> None:
    def drawn(seed: int) -> list[Any]:
        return draw_interruptions(count, last_step=30, save_every=5, processes=[1, 2], draw=_draw(seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    kills = [each.step for each in drawn(1) if each.how != "stop"]
    assert kills == sorted(kills)
    assert all(0 <= each.step + (4 if each.how == "stop" else 2) < 30 for each in drawn(1)), "two steps are left"
    assert drawn(1)[0].saving or count > 30, "the first comes with a save where one is near"


def test_an_interruption_leaves_steps_to_resume_for(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    for seed in range(2):
        found = divergence_of(proof_of(recipe, f"model={WRONG}:CountingModel", steps=6, seed=seed))
        assert found.attempt == 1, seed
    # a run that is shorter than what is to be proved
    with pytest.raises(CouldNotRun, match="none of"):
        proof_of(recipe, "train.steps=1", "schedule.warmup=0 steps", steps=8)
    with pytest.raises(UserError, match="at least 6"):
        proof_of(recipe, steps=5)


def left_behind(mark: str) -> list[int]:
    return session_processes(-1, mark)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, number: int) -> None:
    recipe = small(tmp_path, SMALL.replace("steps: 40", "steps: 1000000"))
    mark = f"PROVE_TEST={tmp_path}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "distrain", "prove", recipe, "--steps", "1000000", "--processes", "2"]
    process = subprocess.Popen(
        [*command, "--keep", str(tmp_path / "kept")],
        env={**os.environ, name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _until(lambda: any((tmp_path / "kept").glob("traces/*/*/rank-1.jsonl")), 120)
    assert len(left_behind(mark)) >= 3, "the command, its launcher and the ranks"
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 2
        assert "interrupted" in err
        assert left_behind(mark) == []
    _until(lambda: left_behind(mark) == [], 30)


@pytest.mark.slow
@pytest.mark.more
def test_the_command_as_people_type_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distrain", "prove", small(tmp_path), "--steps", "6", "--kills", "1"),
            *("--worlds", "1", "--seed", "0", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [trial["name"] for trial in report["legs"]] == ["baseline, 1 process", "killed, 1 process"]
    assert report["legs"][1]["attempts"][0]["interruption"]["how"] == "kill"


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
