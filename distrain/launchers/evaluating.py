"""`distrain evaluate`, in as many processes as one likes."""

from __future__ import annotations

import json
import os

from distrain.checkpoint import find_checkpoint, read_manifest
from distrain.config import UserError
from distrain.config.yaml import parse_recipe
from distrain.launchers.local import LaunchPlan, configuration_file, end_with_launcher, launch, shared_file
from distrain.launchers.preflight import check_gpus, gpu_count, join_launcher
from distrain.launchers.reporting import reported
from distrain.launchers.request import check_one_owner
from distrain.system.environment import own_start, rank_told, say_ignored
from distrain.system.output import echo, one_line


def start_evaluation(target: str, split: str, *, processes: int, as_json: bool, changed_data: bool = False) -> int:
    """Score a run's or a checkpoint's model in that many processes of this machine; returns the exit status."""
    say_ignored(own_start(os.environ, processes if processes > 1 else None, "evaluate"))
    if processes == 1:
        return work_evaluation(target, split, processes=1, as_json=as_json, changed_data=changed_data)
    check_gpus(processes, gpu_count())
    arguments = [target, "--split", split, "--processes", str(processes), *(["--json"] if as_json else [])]
    arguments += ["--changed-data"] if changed_data else []
    script, config = shared_file("launch", "evaluate.py"), configuration_file("ddp")
    return launch(LaunchPlan(script, tuple(arguments), processes, config))


def work_evaluation(
    target: str, split: str, *, processes: int | None = None, as_json: bool = False, changed_data: bool = False
) -> int:
    """Score in this process, one of those that a launcher started; returns the exit status. All ranks call."""
    end_with_launcher()
    rank = rank_told()

    def score() -> None:
        from distrain.parallel import strategy_wishes

        environment = join_launcher(processes)
        configuration = environment.configuration
        for wish in strategy_wishes(configuration):
            if wish.strategy not in (None, "single", "ddp"):
                raise UserError(
                    f"{wish.place} asks for {wish.strategy}, and scoring has the whole model on each process, whatever "
                    "the run was trained with; start with accelerate_configs/ddp.yaml or multi_cpu.yaml"
                )
        if (precision := configuration.get("mixed_precision")) is not None:
            recipe = parse_recipe(read_manifest(find_checkpoint(target)).recipe, target)
            check_one_owner({"mixed_precision": precision}, recipe, 1, auto=environment.precision)
        from distrain.inference import evaluate_checkpoint

        values = evaluate_checkpoint(target, split, changed_data=changed_data)
        if rank != 0:
            return
        if as_json:
            print(json.dumps(values, indent=2))
            return
        for name, value in values.items():
            echo(one_line(f"{name:<20} {f'{value:.6g}' if isinstance(value, float) else value}"))

    return reported(None, rank, score)
