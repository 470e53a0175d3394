"""The proof: legs one after the other, each compared with the straight run as soon as it is done."""

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
from distrain.config.yaml import load_recipe
from distrain.prove.causes import explain, explain_elsewhere, is_generator, relevant
from distrain.prove.cost import cost_in_words, turned_on
from distrain.prove.divergence import OF_STEPS, Divergence, already_differs, exact
from distrain.prove.legs import (
    CouldNotRun,
    Interruption,
    Leg,
    Placement,
    Runner,
    draw_interruptions,
    resume_between,
)
from distrain.prove.processes import Start, start_distrain
from distrain.prove.tolerance import Agreement, Tolerance, tolerance_of, within
from distrain.run.folder import RunDir

SAVES = 6
"""Checkpoints of each run, so that a resume has somewhere to go on from, and what differs is found near its step."""

FEWEST = 6
"""Steps that are needed for two saves, an interruption, and two steps after it."""


@dataclass
class LegResult:
    """A leg and what came of comparing it."""

    leg: Leg
    against: str
    """The leg that it was compared with; empty for the one that all go back to."""
    divergence: Divergence | None = None
    agreement: Agreement | None = None
    """How far it agrees, for another placement; None where it was compared to the bit."""


@dataclass
class Proof:
    """What was run and found."""

    recipe: str
    last_step: int
    total_steps: int
    precision: str
    seed: int
    tolerance: Tolerance
    results: list[LegResult] = field(default_factory=list)
    seconds: float = 0.0
    kept: Path | None = None
    """The folder with all runs and traces, where it is kept."""
    determinism: str = ""
    """What deterministic operations cost, where the proof has turned them on."""

    @property
    def divergence(self) -> Divergence | None:
        """The first difference that was found, or None."""
        return next((result.divergence for result in self.results if result.divergence is not None), None)

    @property
    def proved(self) -> bool:
        """Whether everything that was compared agrees."""
        return self.divergence is None

    def as_json(self) -> dict[str, Any]:
        """Return it in values that JSON has; infinities and NaN as text."""
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
            "legs": [_leg_as_json(result) for result in self.results],
            "divergence": None if found is None else vars(found) | {"gap": _plain(found.gap)},
        }


def _plain(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def _leg_as_json(result: LegResult) -> dict[str, Any]:
    agreement = result.agreement
    return {
        "name": result.leg.name,
        "against": result.against or None,
        "seconds": result.leg.seconds,
        "attempts": [
            {
                "processes": attempt.placement.processes,
                "strategy": attempt.record.facts["strategy"],
                "replicas": attempt.placement.replicas,
                "start_step": attempt.resumed_at,
                "interruption": None if attempt.interruption is None else vars(attempt.interruption),
            }
            for attempt in result.leg.attempts
        ],
        "same": result.divergence is None,
        "worst_loss": None if agreement is None else _plain(agreement.worst_loss),
        "worst_tensor": None if agreement is None else _plain(agreement.worst_tensor),
        "left_out": None if agreement is None else agreement.noise,
        "depends_on_placement": None if agreement is None else agreement.by_design,
    }


def placements_of(
    processes: int, worlds: Sequence[int], strategies: Sequence[str], replicate: Sequence[int] = ()
) -> list[Placement]:
    """Return every placement asked for, the first being the one that all others are compared with.

    One process has nobody to spread state over, so it is `single` whatever is named, and comes first; every other
    strategy goes with every number of processes above one, and fsdp2 with every number of replicas that these can be
    put into. Raises UserError where a strategy or a number of replicas is left without any.
    """
    counts = list(dict.fromkeys(worlds)) or [processes]
    if replicate and "fsdp2" not in strategies:
        raise UserError("--replicate says how many replicas fsdp2 makes; name it with --strategies")
    if not strategies:
        return [Placement(count) for count in counts]
    from distrain.parallel import STRATEGIES  # imports torch: only where there is something to look up

    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise UserError(
            f"--strategies: no strategy {unknown[0]!r}{close_names(unknown[0], STRATEGIES)}; expected some of "
            f"{', '.join(STRATEGIES)}"
        )
    several = [count for count in counts if count > 1]
    if several and set(strategies) == {"single"}:
        raise UserError(
            f"--strategies single is one process, and --worlds names {', '.join(map(str, several))} as well; leave one "
            "of the two out, or name another strategy for several"
        )
    spread = [strategy for strategy in dict.fromkeys(strategies) if strategy != "single"]
    if spread and not several:
        raise UserError(
            f"{', '.join(spread)}: a strategy spreads state over several processes, and there is 1; name their "
            "numbers, as with --worlds 2,3"
        )
    alone = [Placement(1, "single")] if 1 in counts or "single" in strategies else []
    replicas = {
        count: [n for n in dict.fromkeys(replicate) if n == 1 or (n < count and count % n == 0)] for count in several
    }
    for number in replicate:
        if not any(number in fitting for fitting in replicas.values()):
            raise UserError(
                f"--replicate {number}: no number of processes can be put into so many groups of several, found "
                f"{', '.join(map(str, counts))}; name one, as with --worlds {2 * number}"
            )
    return alone + [
        Placement(count, strategy, number)
        for strategy in spread
        for count in several
        for number in (replicas[count] if replicate and strategy == "fsdp2" else [1])
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
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[LegResult], None] = lambda result: None,
    start: Start = start_distrain,
) -> Proof:
    """Train a recipe's first `steps` steps straight and in other ways, and compare; stops at the first divergence.

    In the first placement: straight, then with `kills` interruptions. In every further one: straight, compared with the
    first within a tolerance, then interrupted, compared with its own to the bit. With several placements, one more run
    goes from one to the next at each interruption. `say` hears which leg begins, `done` gets each that is compared.
    `keep` is a folder for all that was run, which must not be there or be empty.

    Raises CouldNotRun when training itself fails, UserError for a recipe or options that do not fit.
    """
    source = _recipe_file(recipe)
    loaded = load_recipe(source, overrides).recipe
    if steps < FEWEST:
        raise UserError(f"--steps is {steps}; a run that is interrupted and goes on needs at least {FEWEST}")
    placements = placements_of(processes, worlds, strategies, replicate)
    if not kills and len(placements) == 1:
        raise UserError("--kills 0 with one placement leaves nothing to compare; add --kills, --worlds or --strategies")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    save_every = max(1, min(steps, loaded.train.steps or steps) // SAVES)
    began = time.monotonic()
    folder = _folder(keep)
    try:
        with Runner(
            source, [*_settings(save_every), *overrides], folder, last_step=steps, seed=seed, start=start
        ) as runner:
            tolerances = (loss_tolerance, state_tolerance)
            director = _Director(runner, kills, seed, save_every, say, done, tolerances, keep is not None)
            proof = director.direct(loaded, placements)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    proof.seconds, proof.kept = time.monotonic() - began, keep
    return proof


def _recipe_file(recipe: str) -> str:
    inside = Path(recipe) / "recipe.yaml"
    return str(inside) if Path(recipe).is_dir() and inside.is_file() else recipe


def _settings(save_every: int) -> list[str]:
    """Return what is set for the proof before the overrides of whoever asks for it, which go before."""
    return [
        "log.wandb=off",
        "log.tensorboard=false",
        f"checkpoint.every={save_every} steps",
        "checkpoint.keep=1000000",
    ]


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="distrain-prove-"))
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UserError(f"--keep {keep} is there already; name a folder that is not, or an empty one")
    keep.mkdir(parents=True, exist_ok=True)
    return keep.absolute()


class _Director:
    """Runs the legs and compares each."""

    def __init__(
        self, runner: Runner, kills: int, seed: int, save_every: int, say: Callable[[str], None],
        done: Callable[[LegResult], None], tolerances: tuple[float | None, float | None], keeps: bool,
    ):  # fmt: skip
        self.runner, self.kills, self.seed, self.save_every = runner, kills, seed, save_every
        self.say, self.done = say, done
        self.tolerances, self.keeps = tolerances, keeps
        self.proof: Proof

    def direct(self, recipe: Recipe, placements: Sequence[Placement]) -> Proof:
        first = self.straight(placements[0])
        facts = first.attempts[0].record.facts
        tolerance = tolerance_of(first.attempts[0].record, *self.tolerances)
        self.proof = Proof(recipe.name, first.last_step, facts["total_steps"], facts["precision"], self.seed, tolerance)
        self.add(LegResult(first, ""))
        if turned_on(recipe, RunDir(first.run_dir)):
            self.say("what deterministic operations cost")
            without = self.runner.without_determinism(placements[0])
            self.proof.determinism = cost_in_words(RunDir(first.run_dir), RunDir(without.run_dir))
        if self.kills and not self.broken(first):
            return self.proof
        for placement in placements[1:]:
            other = self.straight(placement)
            if not self.elsewhere(first, other) or (self.kills and not self.broken(other)):
                return self.proof
            self.drop(other)
        if len(placements) > 1 and self.kills:
            self.moving(first, placements)
        return self.proof

    def add(self, result: LegResult) -> bool:
        self.proof.results.append(result)
        self.done(result)
        return result.divergence is None

    def straight(self, placement: Placement, again: str = "", **how: Any) -> Leg:
        self.say(f"straight{again}, {placement}")
        return self.runner.run(f"straight{again}, {placement}", [placement], **how)

    def broken(self, straight: Leg) -> bool:
        """Interrupt and resume a run in the placement of another; returns whether they are the same."""
        placement = straight.placement
        self.say(f"killed, {placement}")
        leg = self.interrupted(f"killed, {placement}", straight, [placement], self.kills)
        divergence = exact(straight, leg)
        if divergence is not None:
            repeats, by_hash = self.tried_again(divergence, straight, leg)
            explain(divergence, straight, repeats=repeats, by_hash=by_hash)
        self.drop(leg)
        return self.add(LegResult(leg, straight.name, divergence))

    def drop(self, leg: Leg) -> None:
        """Free the disk of a run that nothing is compared with any more."""
        if not self.keeps:
            shutil.rmtree(leg.run_dir, ignore_errors=True)

    def tried_again(self, divergence: Divergence, straight: Leg, leg: Leg) -> tuple[bool | None, bool]:
        """Return whether a straight run repeats, where that is in question, and whether it goes by hashes of texts.

        A straight run with the hash seed of the attempt that differs tells whether a resume is to blame; one with that
        of the first straight run tells whether nothing but that seed makes the difference.
        """
        d = divergence
        begun = d.attempt == 0
        if d.what not in (*OF_STEPS, "start") or (d.what == "start" and not begun):
            return None, False
        # what was remembered and lost, or a generator: it is known why it is another
        if (found := relevant(d)) and (not begun or is_generator(found[0])):
            return None, False
        seed, its_seed = straight.attempts[0].hash_seed, leg.attempts[d.attempt].hash_seed
        if seed == its_seed:
            return (None if begun else self.same(straight, d, " again", seed)), False
        if begun:
            if not self.same(straight, d, " again", seed):
                return False, False
            # that may be chance, where what is drawn makes a difference now and then
            return None, not self.same(straight, d, " once more", its_seed)
        if self.same(straight, d, " again", its_seed):
            return True, False
        return False, self.same(straight, d, " once more", seed)

    def same(self, straight: Leg, divergence: Divergence, again: str, hash_seed: str) -> bool:
        """Whether another straight run is the same as the first one up to where another has differed."""
        # an evaluation of the last step would not take place
        last_step = min(divergence.step + 1, straight.last_step)
        try:
            other = self.straight(straight.placement, again, last_step=last_step, hash_seed=hash_seed)
        except CouldNotRun:
            return False
        found = exact(straight, other)
        self.drop(other)
        return found is None or found.step > divergence.step

    def elsewhere(self, first: Leg, other: Leg) -> bool:
        """Compare a run in another placement with the first within the tolerance."""
        agreement = within(first, other, self.proof.tolerance)
        if agreement.divergence is not None:
            explain_elsewhere(agreement.divergence)
        return self.add(LegResult(other, first.name, agreement.divergence, agreement))

    def moving(self, first: Leg, placements: Sequence[Placement]) -> bool:
        """Go from one placement to the next at each interruption, at least once through all of them."""
        self.say(f"moving through {len(placements)} placements")
        count = max(self.kills, len(placements) - 1)
        leg = self.interrupted("moving", first, placements, count)
        return self.elsewhere(first, leg)

    def interrupted(self, name: str, straight: Leg, placements: Sequence[Placement], count: int) -> Leg:
        # one seed gives the same moments to a leg whatever the others are
        draw = random.Random(f"{self.seed} {name}")
        interruptions: list[Interruption] = draw_interruptions(
            count,
            last_step=straight.last_step,
            save_every=self.save_every,
            processes=[placement.processes for placement in placements],
            draw=draw,
            saved_before=len(placements) > 1,
        )
        if len(placements) == 1:
            facts = straight.attempts[0].record.facts
            interruptions = resume_between(
                interruptions,
                last_step=straight.last_step,
                save_every=self.save_every,
                workers=facts["workers"],
                micro_batches=facts["micro_batches"],
                draw=draw,
            )
        leg = self.runner.run(
            name, placements, interruptions, step_seconds=straight.step_seconds, save_seconds=straight.save_seconds,
            enough=lambda leg: len(placements) == 1 and already_differs(straight, leg),
        )  # fmt: skip
        if len(placements) == 1 and already_differs(straight, leg):
            return leg
        went_on = {attempt.placement for attempt in leg.attempts if attempt.resumed_at > 0 and attempt.record.steps}
        if len(placements) > 1 and (missing := [place for place in placements[1:] if place not in went_on]):
            raise CouldNotRun(
                f"{name}: it did not come to go on from a checkpoint in {'; '.join(map(str, missing))}; train more "
                "with --steps, or try another --seed"
            )
        if not went_on:
            raise CouldNotRun(
                f"{name}: none of {len(leg.attempts)} starts went on from a checkpoint, so nothing is proved; train "
                "more with --steps, save more often with checkpoint.every='1 step', or try another --seed"
            )
        return leg
