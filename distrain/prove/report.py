"""What a person sees of a proof."""

from __future__ import annotations

from distrain.prove.legs import Leg
from distrain.prove.proof import LegResult, Proof
from distrain.system.output import one_line
from distrain.system.terminal import Console, Table
from distrain.training.callbacks.trackers import duration


class Report:
    """Tells of each leg as it begins and ends; on a terminal the one under way is shown meanwhile."""

    def __init__(self, console: Console):
        self.console = console
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Report:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, leg: str) -> None:
        """A leg begins."""
        if self._status is not None:
            self._status.update(one_line(leg))

    def done(self, result: LegResult) -> None:
        """A leg was compared."""
        self.console.say(f"{result.leg.name}: {in_words(result)}")


def in_words(result: LegResult) -> str:
    """Return how a leg went, on a line."""
    leg = result.leg
    parts = [f"{leg.last_step:,} steps in {duration(leg.seconds)}"]
    parts += [_interruptions(leg)] if leg.interruptions else []
    if not result.against:
        return "; ".join(parts)
    if result.divergence is not None:
        parts.append(f"NOT the same as {result.against}")
    elif (agreement := result.agreement) is None:
        parts.append(f"the same bits as {result.against}")
    elif agreement.by_design:
        parts.append(f"the same samples and learning rates; loss and weights are not compared: {agreement.by_design}")
    else:
        parts.append(
            f"the same samples and learning rates as {result.against}; losses within {agreement.worst_loss:.1e}, "
            f"tensors within {agreement.worst_tensor:.1e}"
        )
        if agreement.noise:
            shown = ", ".join(agreement.noise[:3]) + (", …" if len(agreement.noise) > 3 else "")
            parts.append(f"left out, as rounding alone decides them: {shown}")
    return "; ".join(parts)


def _interruptions(leg: Leg) -> str:
    told = []
    for attempt, following in zip(leg.attempts, [*leg.attempts[1:], None], strict=True):
        if attempt.interruption is not None and following is not None:
            moved = f" in {following.placement}" if following.placement != attempt.placement else ""
            told.append(f"{attempt.interruption}, resumed at {following.resumed_at}{moved}")
    return "; ".join(told)


def show(proof: Proof, console: Console) -> None:
    """Print what came of it: a table of the legs, and one line, or the first divergence."""
    table = Table(title=f"{proof.recipe}: {_extent(proof)}")
    for column in ("leg", "starts", "compared with", "result"):
        table.add_column(column)
    for result in proof.results:
        table.add_row(result.leg.name, str(len(result.leg.attempts)), result.against or "-", _verdict(result))
    console.print(table)
    if proof.divergence is not None:
        console.print(str(proof.divergence), soft_wrap=True)
    else:
        console.say(proved_line(proof))
    if proof.determinism:
        console.say(proof.determinism)
    if proof.kept is not None:
        console.say(f"all runs and traces: {proof.kept}")


def proved_line(proof: Proof) -> str:
    """Return the last line of a proof that holds."""
    interruptions = sum(len(result.leg.interruptions) for result in proof.results)
    exact = sum(result.agreement is None and bool(result.against) for result in proof.results)
    near = sum(result.agreement is not None and not result.agreement.by_design for result in proof.results)
    open_ = sum(result.agreement is not None and bool(result.agreement.by_design) for result in proof.results)
    parts = [f"{_extent(proof)}, {interruptions} interruption{'s' if interruptions != 1 else ''}"]
    if exact:
        parts.append(f"{exact} run{'s' if exact > 1 else ''} the same to the bit")
    if near:
        parts.append(
            f"{near} in other placements within {proof.tolerance.loss:g} of the loss and {proof.tolerance.state:g} of "
            "each tensor"
        )
    if open_:
        parts.append(f"{open_} in other placements only as to samples and learning rates")
    return f"proved: {'; '.join(parts)} (--seed {proof.seed})"


def _extent(proof: Proof) -> str:
    if proof.last_step >= proof.total_steps:
        return f"all {proof.total_steps:,} steps"
    return f"the first {proof.last_step:,} of {proof.total_steps:,} steps"


def _verdict(result: LegResult) -> str:
    if not result.against:
        return "what others are compared with"
    if result.divergence is not None:
        return f"differs in step {result.divergence.step}"
    if result.agreement is None:
        return "the same bits"
    return "the same samples" if result.agreement.by_design else "within tolerance"
