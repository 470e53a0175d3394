"""The proof: trial runs one after the other, each compared with its baseline as soon as it ends."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.config import Recipe, UserError, close_names
from distrain.config.strategies import STRATEGIES
from distrain.config.yaml import load_recipe
from distrain.prove.causes import add_cause, add_cause_across_topologies, explains, relevant_suspects
from distrain.prove.cost import determinism_cost, determinism_turned_on
from distrain.prove.divergence import COMPARED_EACH_STEP, Divergence, already_differs, compare_exactly, is_generator
from distrain.prove.processes import StartProcess, start_distrain
from distrain.prove.tolerance import Agreement, Tolerance, compare_within, tolerance_of
from distrain.prove.trial_runs import (
    CouldNotRun,
    Interruption,
    Topology,
    TrialRun,
    TrialRunner,
    draw_interruptions,
    resume_between,
)
from distrain.run.folder import RunDir

SAVES = 6
"""Checkpoints of each run, so that there is one to resume from, and a difference is found near its step."""

MIN_STEPS = 6
"""Fewest steps with two saves, an interruption, and two steps after it."""

_STEPS_BEYOND = 20
"""Steps after a divergence that a further baseline run is compared for."""


@dataclass
class TrialResult:
    """A trial run and how it compares with another."""

    trial: TrialRun
    reference: str
    """Name of the run it was compared with; empty for the baseline run that all are compared with."""
    divergence: Divergence | None = None
    agreement: Agreement | None = None
    """How closely it agrees, for another topology; None for a comparison to the bit."""


@dataclass
class Proof:
    """The trial runs of a recipe and the result."""

    recipe: str
    last_step: int
    total_steps: int
    precision: str
    seed: int
    tolerance: Tolerance
    results: list[TrialResult] = field(default_factory=list)
    seconds: float = 0.0
    kept: Path | None = None
    """The folder with all runs and traces, if kept."""
    determinism: str = ""
    """The cost of deterministic operations, where the proof turned them on; empty otherwise."""

    @property
    def divergence(self) -> Divergence | None:
        """The first difference, or None."""
        return next((result.divergence for result in self.results if result.divergence is not None), None)

    @property
    def proved(self) -> bool:
        """Whether everything that was compared agrees."""
        return self.divergence is None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for scripts, by the keys of `--json`; infinities and NaN as text."""
        found = self.divergence
        return {
            "proved": self.proved,
            "recipe": self.recipe,
            "steps": self.last_step,
            "total_steps": self.total_steps,
            "precision": self.precision,
            "seed": self.seed,
            "tolerance": vars(self.tolerance),
            "seconds": self.seconds,
            "kept": None if self.kept is None else str(self.kept),
            "determinism": self.determinism or None,
            "legs": [_result_as_json(result) for result in self.results],
            "divergence": None if found is None else _divergence_as_json(found),
        }


def _divergence_as_json(divergence: Divergence) -> dict[str, Any]:
    # the keys of the first version, which scripts read
    keys = {"trial": "leg", "baseline": "straight"}
    values = {keys.get(name, name): value for name, value in vars(divergence).items()}
    return values | {"gap": _json_number(divergence.gap)}


def _json_number(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def _result_as_json(result: TrialResult) -> dict[str, Any]:
    agreement = result.agreement
    return {
        "name": result.trial.name,
        "against": result.reference or None,
        "seconds": result.trial.seconds,
        "attempts": [
            {
                "processes": attempt.topology.processes,
                "strategy": attempt.trace.facts["strategy"],
                "replicas": attempt.topology.replicas,
                "start_step": attempt.resumed_at,
                "interruption": None if attempt.interruption is None else vars(attempt.interruption),
            }
            for attempt in result.trial.attempts
        ],
        "same": result.divergence is None,
        "worst_loss": None if agreement is None else _json_number(agreement.worst_loss),
        "worst_tensor": None if agreement is None else _json_number(agreement.worst_tensor),
        "left_out": None if agreement is None else agreement.noise,
        "depends_on_placement": None if agreement is None else agreement.by_design,
    }


def topologies_of(
    processes: int, worlds: Sequence[int], strategies: Sequence[str], replicate: Sequence[int] = ()
) -> list[Topology]:
    """Return every requested topology; all others are compared with the first.

    One process has nothing to shard over, so it is `single` whatever `strategies` names, and comes first; every other
    strategy is combined with every number of processes above one, and fsdp2 with every number of replicas that divides
    it. Raises UserError for a strategy or a number of replicas left without any.
    """
    counts = list(dict.fromkeys(worlds)) or [processes]
    if replicate and "fsdp2" not in strategies:
        raise UserError("--replicate sets the number of replicas of fsdp2; name fsdp2 in --strategies")
    if not strategies:
        return [Topology(count) for count in counts]
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        hint = close_names(unknown[0], STRATEGIES, f"expected some of {', '.join(STRATEGIES)}")
        raise UserError(f"--strategies: no strategy {unknown[0]!r}{hint}")
    several = [count for count in counts if count > 1]
    if several and set(strategies) == {"single"}:
        raise UserError(
            f"--strategies single is one process, and --worlds names {', '.join(map(str, several))} as well; leave one "
            "of the two out, or name a strategy for several processes"
        )
    sharded = [strategy for strategy in dict.fromkeys(strategies) if strategy != "single"]
    if sharded and not several:
        raise UserError(
            f"{', '.join(sharded)}: a strategy needs several processes, found 1; name numbers of processes, "
            "as in --worlds 2,3"
        )
    single = [Topology(1, "single")] if 1 in counts or "single" in strategies else []
    replicas = {
        count: [n for n in dict.fromkeys(replicate) if n == 1 or (n < count and count % n == 0)] for count in several
    }
    for number in replicate:
        if not any(number in fitting for fitting in replicas.values()):
            raise UserError(
                f"--replicate {number}: expected a number of processes that it divides into groups of several, found "
                f"{', '.join(map(str, counts))}; name one, as in --worlds {2 * number}"
            )
    return single + [
        Topology(count, strategy, number)
        for strategy in sharded
        for count in several
        for number in (replicas[count] if replicate and STRATEGIES[strategy].replicates else [1])
    ]


def prove(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    kills: int = 3,
    steps: int = 30,
    processes: int = 1,
    worlds: Sequence[int] = (),
    strategies: Sequence[str] = (),
    replicate: Sequence[int] = (),
    seed: int | None = None,
    keep: Path | None = None,
    loss_tolerance: float | None = None,
    state_tolerance: float | None = None,
    begun: Callable[[str], None] = lambda name: None,
    done: Callable[[TrialResult], None] = lambda result: None,
    start: StartProcess = start_distrain,
) -> Proof:
    """Train the first `steps` steps of a recipe in several ways and compare them; stops at the first divergence.

    In the first topology: a baseline run, then one with `kills` interruptions. In every further one: a baseline run,
    compared with the first within a tolerance, then an interrupted run, compared with its own baseline to the bit. With
    several topologies, one more run moves from one to the next at each interruption. `begun` is called with the name of
    each run as it begins, `done` with the result of each. `keep` is a folder for all runs, absent or empty.

    Raises CouldNotRun when training itself fails, UserError for an invalid recipe or options.
    """
    stored = Path(recipe) / "recipe.yaml"
    source = str(stored) if stored.is_file() else recipe
    loaded = load_recipe(source, overrides).recipe
    if steps < MIN_STEPS:
        raise UserError(f"--steps is {steps}; a run that is interrupted and resumed needs at least {MIN_STEPS}")
    topologies = topologies_of(processes, worlds, strategies, replicate)
    if not kills and len(topologies) == 1:
        raise UserError("--kills 0 with one topology leaves nothing to compare; add --kills, --worlds or --strategies")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    save_every = max(1, min(steps, loaded.train.steps or steps) // SAVES)
    began = time.monotonic()
    folder = _folder(keep)
    try:
        settings = [
            "log.wandb=off",
            "log.tensorboard=false",
            "log.report=false",
            f"checkpoint.every={save_every} steps",
        ]
        # the user's own overrides follow and win
        overrides = [*settings, "checkpoint.keep=1000000", *overrides]
        with TrialRunner(source, overrides, folder, last_step=steps, seed=seed, start=start) as runner:
            tolerances = (loss_tolerance, state_tolerance)
            prover = _Prover(runner, kills, seed, save_every, begun, done, tolerances, keep is not None)
            proof = prover.run(loaded, topologies)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    proof.seconds, proof.kept = time.monotonic() - began, keep
    return proof


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="distrain-prove-"))
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UserError(f"--keep {keep} exists already; name a new or an empty folder")
    keep.mkdir(parents=True, exist_ok=True)
    return keep.absolute()


@dataclass
class _Prover:
    """Runs the trial runs and compares each."""

    runner: TrialRunner
    kills: int
    seed: int
    save_every: int
    begun: Callable[[str], None]
    done: Callable[[TrialResult], None]
    tolerances: tuple[float | None, float | None]
    keeps: bool
    proof: Proof = field(init=False)

    def run(self, recipe: Recipe, topologies: Sequence[Topology]) -> Proof:
        first = self.run_baseline(topologies[0])
        facts = first.attempts[0].trace.facts
        tolerance = tolerance_of(first.attempts[0].trace, *self.tolerances)
        self.proof = Proof(recipe.name, first.last_step, facts["total_steps"], facts["precision"], self.seed, tolerance)
        self.add_result(TrialResult(first, ""))
        if determinism_turned_on(recipe, RunDir(first.run_dir)):
            self.begun("cost of deterministic operations")
            without = self.runner.without_determinism(topologies[0])
            self.proof.determinism = determinism_cost(RunDir(first.run_dir), RunDir(without.run_dir))
        if self.kills and not self.check_resume(first):
            return self.proof
        for topology in topologies[1:]:
            other = self.run_baseline(topology)
            if not self.check_topology(first, other) or (self.kills and not self.check_resume(other)):
                return self.proof
            self.delete_run(other)
        if len(topologies) > 1 and self.kills:
            self.check_moving(first, topologies)
        return self.proof

    def add_result(self, result: TrialResult) -> bool:
        self.proof.results.append(result)
        self.done(result)
        return result.divergence is None

    def run_baseline(self, topology: Topology, again: str = "", **how: Any) -> TrialRun:
        self.begun(f"baseline{again}, {topology}")
        return self.runner.run(f"baseline{again}, {topology}", [topology], **how)

    def check_resume(self, baseline: TrialRun) -> bool:
        """Interrupt and resume a run in the topology of its baseline; returns whether they are the same."""
        topology = baseline.topology
        self.begun(f"killed, {topology}")
        trial = self.run_interrupted(f"killed, {topology}", baseline, [topology], self.kills)
        divergence = compare_exactly(baseline, trial)
        if divergence is not None:
            repeats, by_hash = self.check_repeats(divergence, baseline, trial)
            add_cause(divergence, baseline, repeats=repeats, by_hash=by_hash)
        self.delete_run(trial)
        return self.add_result(TrialResult(trial, baseline.name, divergence))

    def delete_run(self, trial: TrialRun) -> None:
        """Delete the folder of a run that no later one is compared with, unless runs are kept."""
        if not self.keeps:
            shutil.rmtree(trial.run_dir, ignore_errors=True)

    def check_repeats(self, divergence: Divergence, baseline: TrialRun, trial: TrialRun) -> tuple[bool | None, bool]:
        """Return whether a baseline run repeats, None where that is known or unknown, and whether it depends on hashes.

        A further baseline run with the hash seed of the attempt that differs shows whether the resume is to blame; one
        with the hash seed of the first baseline run shows whether that seed alone makes the difference.
        """
        d = divergence
        uninterrupted = d.attempt == 0
        if d.what not in (*COMPARED_EACH_STEP, "start") or (d.what == "start" and not uninterrupted):
            return None, False
        # lost state or a generator: the cause is known
        if (found := relevant_suspects(d)) and (is_generator(found[0]) or (not uninterrupted and explains(found[0]))):
            return None, False
        seed, other_seed = baseline.attempts[0].hash_seed, trial.attempts[d.attempt].hash_seed
        if seed == other_seed:
            return (None if uninterrupted else self.baseline_repeats(baseline, trial, d, " again", seed)), False
        if uninterrupted:
            if not self.baseline_repeats(baseline, trial, d, " again", seed):
                return False, False
            # that may be chance, where random numbers make a difference now and then
            return None, not self.baseline_repeats(baseline, trial, d, " once more", other_seed)
        if self.baseline_repeats(baseline, trial, d, " again", other_seed):
            return True, False
        return False, self.baseline_repeats(baseline, trial, d, " once more", seed)

    def baseline_repeats(
        self, baseline: TrialRun, trial: TrialRun, divergence: Divergence, again: str, hash_seed: str
    ) -> bool:
        """Whether another baseline run is the same as the first up to a divergence and for some steps after it.

        Sums in another order round to the same now and then: one step that agrees is no evidence. A file that this run
        has found as `trial` did, which is not the same, is no longer suspected.
        """
        last_step = min(divergence.step + _STEPS_BEYOND, baseline.last_step)
        try:
            other = self.run_baseline(baseline.topology, again, last_step=last_step, hash_seed=hash_seed)
        except CouldNotRun:
            return False
        found, here = compare_exactly(baseline, other), compare_exactly(other, trial)
        if here is not None and here.step <= divergence.step:
            differing = {path for path, _, _ in here.files}
            divergence.files = [file for file in divergence.files if file[0] in differing]
        self.delete_run(other)
        # an evaluation of the last step would not take place
        return found is None or found.step > max(divergence.step, last_step - 1)

    def check_topology(self, first: TrialRun, other: TrialRun) -> bool:
        """Compare a run in another topology with the first within the tolerance; returns whether it agrees."""
        agreement = compare_within(first, other, self.proof.tolerance)
        if agreement.divergence is not None:
            add_cause_across_topologies(agreement.divergence)
        return self.add_result(TrialResult(other, first.name, agreement.divergence, agreement))

    def check_moving(self, first: TrialRun, topologies: Sequence[Topology]) -> bool:
        """Move to the next topology at each interruption, at least once through all; returns whether the run agrees."""
        self.begun(f"moving through {len(topologies)} topologies")
        count = max(self.kills, len(topologies) - 1)
        trial = self.run_interrupted("moving", first, topologies, count)
        return self.check_topology(first, trial)

    def run_interrupted(self, name: str, baseline: TrialRun, topologies: Sequence[Topology], count: int) -> TrialRun:
        # a seed draws the same interruptions for a run whatever the other runs are
        draw = random.Random(f"{self.seed} {name}")
        interruptions: list[Interruption] = draw_interruptions(
            count,
            last_step=baseline.last_step,
            save_every=self.save_every,
            processes=[topology.processes for topology in topologies],
            draw=draw,
            saved_before=len(topologies) > 1,
        )
        if len(topologies) == 1:
            facts = baseline.attempts[0].trace.facts
            interruptions = resume_between(
                interruptions,
                last_step=baseline.last_step,
                save_every=self.save_every,
                workers=facts["workers"],
                micro_batches=facts["micro_batches"],
                draw=draw,
            )
        trial = self.runner.run(
            name, topologies, interruptions, step_seconds=baseline.step_seconds, save_seconds=baseline.save_seconds,
            stop_when=lambda trial: len(topologies) == 1 and already_differs(baseline, trial),
        )  # fmt: skip
        if len(topologies) == 1 and already_differs(baseline, trial):
            return trial
        resumed_in = {attempt.topology for attempt in trial.attempts if attempt.resumed_at > 0 and attempt.trace.steps}
        if len(topologies) > 1 and (missing := [topology for topology in topologies[1:] if topology not in resumed_in]):
            raise CouldNotRun(
                f"{name}: never resumed from a checkpoint in {'; '.join(map(str, missing))}; train more steps "
                "with --steps, or try another --seed"
            )
        if not resumed_in:
            raise CouldNotRun(
                f"{name}: none of {len(trial.attempts)} attempts resumed from a checkpoint, so nothing is proved; "
                "train more steps with --steps, save more often with checkpoint.every='1 step', or try another --seed"
            )
        return trial
