"""From a recipe to running processes.

request.py     finding, making and taking up the run that a command means
preflight.py   what was asked for, in all the places where that can be, and whether it agrees
local.py       starting the processes of a machine: `launch_argv` says how, `launch` does it
worker.py      `start` launches the processes that train, `work` is what each of them runs
evaluating.py  the same for `distrain evaluate`
reporting.py   what is said of a process that fails, and where
slurm/         batch jobs
"""

import distrain.launchers.slurm.job_environment  # noqa: F401  registers what is asked of SLURM
from distrain.launchers.evaluating import start_evaluation, work_evaluation
from distrain.launchers.local import (
    TYPED,
    LaunchPlan,
    check_gpus,
    configuration_file,
    end_with_launcher,
    gpu_count,
    launch,
    launch_argv,
    shared_file,
    unsaid_failures,
)
from distrain.launchers.preflight import asked_for, check_one_owner, join_launcher
from distrain.launchers.reporting import reported
from distrain.launchers.request import check_same_recipe, find_run, open_run, recipe_differences, recipe_text
from distrain.launchers.worker import probed, start, work

__all__ = [
    "TYPED",
    "LaunchPlan",
    "asked_for",
    "check_gpus",
    "check_one_owner",
    "check_same_recipe",
    "configuration_file",
    "end_with_launcher",
    "find_run",
    "gpu_count",
    "join_launcher",
    "launch",
    "launch_argv",
    "open_run",
    "probed",
    "recipe_differences",
    "recipe_text",
    "reported",
    "shared_file",
    "start",
    "start_evaluation",
    "unsaid_failures",
    "work",
    "work_evaluation",
]
