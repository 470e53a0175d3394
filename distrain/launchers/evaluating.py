"""`EvaluationRequest`: what `distrain evaluate` asks for, resolved once; and what each of its processes does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distrain.checkpoint import find_checkpoint, read_manifest
from distrain.config import UserError
from distrain.config.strategies import strategy_imports
from distrain.config.yaml import parse_recipe
from distrain.launchers.preflight import StartEnvironment, all_of, join_launcher, worker_environment
from distrain.launchers.reporting import reported
from distrain.launchers.request import check_one_owner
from distrain.launchers.worker import end_with_launcher
from distrain.system.environment import rank_told
from distrain.system.importing import importing
from distrain.system.output import echo, one_line


@dataclass(frozen=True)
class ModelRequest:
    """A use of a trained model, resolved, by processes of this machine."""

    script: ClassVar[str]
    """What each process runs, in launch/."""
    strategy: ClassVar[str] = "ddp"
    """Each process has the whole model, whatever the run was trained with."""
    offload: ClassVar[str] = "none"

    @property
    def worker_arguments(self) -> tuple[str, ...]:
        """The arguments of the script."""
        return "--request", json.dumps(asdict(self))

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that each of its processes imports."""
        return "distrain.inference", *strategy_imports(self.strategy)


@dataclass(frozen=True)
class EvaluationRequest(ModelRequest):
    """One evaluation, resolved: which checkpoint, on which split, in how many processes."""

    checkpoint: str
    """The checkpoint's folder, absolute."""
    split: str
    """train, valid or test; or a file or folder with targets."""
    processes: int
    as_json: bool = False
    """Whether the metrics are printed as JSON."""
    changed_data: bool = False
    """Whether data that changed since the training are evaluated."""
    initial_weights: str | None = None
    """Where the weights are now that the checkpoint refers to; None: where its recipe says."""
    data: list[str] = field(default_factory=list)
    """Keys of the recipe's data section, KEY=VALUE, for reading the samples."""

    script: ClassVar[str] = "evaluate.py"


@importing()
def resolve_evaluation(
    target: str,
    split: str,
    processes: int | None,
    environment: StartEnvironment,
    **options: Any,
) -> EvaluationRequest:
    """Return the request that a command makes; raises UserError with all that is wrong with it. Writes nothing.

    `target` is a run or one of its checkpoints. `processes`: how many there must be; None: any number. `options` are
    further fields of the request.
    """
    from distrain.parallel import strategy_wishes

    problems, checkpoint = environment.problems(processes), Path()
    try:
        checkpoint = find_checkpoint(target)
        recipe = parse_recipe(read_manifest(checkpoint).recipe, target)
        if (precision := environment.configuration.get("mixed_precision")) is not None:
            check_one_owner({"mixed_precision": precision}, recipe, 1, auto=environment.precision)
        for wish in strategy_wishes(environment.configuration):
            if wish.strategy not in (None, "single", "ddp"):
                raise UserError(
                    f"{wish.place} asks for {wish.strategy}, and an evaluation has the whole model on each process, "
                    "whatever the run was trained with; start with accelerate_configs/ddp.yaml or multi_cpu.yaml"
                )
    except UserError as error:
        problems.append(error)
    if problems:
        raise all_of(problems)
    return EvaluationRequest(str(checkpoint.absolute()), split, environment.processes, **options)


def work_evaluation(
    target: str | None,
    split: str = "test",
    *,
    processes: int | None = None,
    request: str | None = None,
    **options: Any,
) -> int:
    """Evaluate in this process, one of those that a launcher started; returns the exit status. All ranks call.

    `request` is what distrain's launcher has resolved, as JSON. Without it somebody started launch/evaluate.py by hand,
    and each process resolves the same request; `options` are further fields of it.
    """
    end_with_launcher()

    def score() -> None:
        if request is None:
            assert target is not None
            found = resolve_evaluation(target, split, processes, worker_environment(), **options)
        else:
            found = EvaluationRequest(**json.loads(request))
            join_launcher(found.processes)
        print_evaluation(found)

    return reported(None, rank_told(), score)


def evaluate_here(request: EvaluationRequest) -> int:
    """Evaluate in this process alone; returns the exit status."""
    return reported(None, 0, lambda: print_evaluation(request))


def print_evaluation(request: EvaluationRequest) -> None:
    """Evaluate in this process, one of its world; rank 0 prints the metrics. All ranks call."""
    from distrain.inference import evaluate_checkpoint

    values = evaluate_checkpoint(
        request.checkpoint,
        request.split,
        data=request.data,
        changed_data=request.changed_data,
        initial_weights=request.initial_weights,
    )
    if rank_told() != 0:
        return
    if request.as_json:
        print(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        echo(one_line(f"{name:<20} {f'{value:.6g}' if isinstance(value, float) else value}"))
