"""The report of a proof in the terminal."""

from __future__ import annotations

from distrain.prove.proof import Proof, TrialResult
from distrain.prove.trial_runs import TrialRun
from distrain.system.numbers import counted
from distrain.system.output import one_line
from distrain.system.terminal import Console, Table
from distrain.training.callbacks.trackers import duration


class Report:
    """Prints a line for each trial run; on a terminal a status line shows the one in progress."""

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

    def begun(self, trial: str) -> None:
        """Show which trial run begins."""
        if self._status is not None:
            self._status.update(one_line(trial))

    def done(self, result: TrialResult) -> None:
        """Print the result of a trial run."""
        self.console.say(f"{result.trial.name}: {result_line(result)}")


def result_line(result: TrialResult) -> str:
    """Return the result of a trial run on one line."""
    trial = result.trial
    parts = [f"{counted(trial.last_step, 'step')} in {duration(trial.seconds)}"]
    parts += [_interruptions(trial)] if trial.interruptions else []
    if not result.reference:
        return "; ".join(parts)
    if result.divergence is not None:
        parts.append(f"NOT the same as {result.reference}")
    elif (agreement := result.agreement) is None:
        parts.append(f"the same bits as {result.reference}")
    elif agreement.by_design:
        parts.append(f"the same samples and learning rates; loss and weights are not compared: {agreement.by_design}")
    else:
        parts.append(
            f"the same samples and learning rates as {result.reference}; losses within {agreement.worst_loss:.1e}, "
            f"tensors within {agreement.worst_tensor:.1e}"
        )
        if agreement.noise:
            shown = ", ".join(agreement.noise[:3]) + (", …" if len(agreement.noise) > 3 else "")
            parts.append(f"not compared, as their gradients are rounding noise: {shown}")
    return "; ".join(parts)


def _interruptions(trial: TrialRun) -> str:
    parts = []
    for attempt, following in zip(trial.attempts, [*trial.attempts[1:], None], strict=True):
        if attempt.interruption is not None and following is not None:
            moved = f" in {following.topology}" if following.topology != attempt.topology else ""
            parts.append(f"{attempt.interruption}, resumed at {following.resumed_at}{moved}")
    return "; ".join(parts)


def show(proof: Proof, console: Console) -> None:
    """Print a table of the trial runs, and the result on one line or the first divergence."""
    table = Table(title=f"{proof.recipe}: {_steps_covered(proof)}")
    for column in ("run", "attempts", "compared with", "result"):
        table.add_column(column)
    for result in proof.results:
        table.add_row(result.trial.name, str(len(result.trial.attempts)), result.reference or "-", _result_cell(result))
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
    interruptions = sum(len(result.trial.interruptions) for result in proof.results)
    identical = sum(result.agreement is None and bool(result.reference) for result in proof.results)
    close = sum(result.agreement is not None and not result.agreement.by_design for result in proof.results)
    inputs_only = sum(result.agreement is not None and bool(result.agreement.by_design) for result in proof.results)
    parts = [f"{_steps_covered(proof)}, {interruptions} interruption{'s' if interruptions != 1 else ''}"]
    if identical:
        parts.append(f"{identical} run{'s' if identical > 1 else ''} the same to the bit")
    if close:
        parts.append(
            f"{close} in other topologies within {proof.tolerance.loss:g} of the loss and {proof.tolerance.state:g} of "
            "each tensor"
        )
    if inputs_only:
        parts.append(f"{inputs_only} in other topologies by samples and learning rates only")
    return f"proved: {'; '.join(parts)} (--seed {proof.seed})"


def _steps_covered(proof: Proof) -> str:
    if proof.last_step >= proof.total_steps:
        return f"all {proof.total_steps:,} steps"
    return f"the first {proof.last_step:,} of {proof.total_steps:,} steps"


def _result_cell(result: TrialResult) -> str:
    if not result.reference:
        return "baseline of the others"
    if result.divergence is not None:
        return f"differs in step {result.divergence.step}"
    if result.agreement is None:
        return "the same bits"
    return "the same samples" if result.agreement.by_design else "within tolerance"
