"""From a recipe to running processes.

preflight.py   what is around a start: launchers above it, GPUs, the command typed
request.py     `RunRequest`: what a command asks for, resolved once; making and taking up its run
launcher.py    `Launcher`: a kind of place where runs are started, with its jobs
local.py       this machine as one, and starting its processes: `launch_argv` and `launch`
forking.py     processes of this machine's CPUs, forked from one that has imported PyTorch
worker.py      `start` launches the processes that train, `work` is what each of them runs
evaluating.py  the same for `distrain evaluate`
predicting.py  the same for `distrain predict`
sweeps.py      sweeps: which runs they have, and what their folders hold
reporting.py   reporting why a process failed
slurm/         batch jobs: `slurm/launcher.py` is its Launcher, `slurm/job_environment.py` the variables of a job
"""

import distrain.launchers.slurm  # noqa: F401  registers itself, and its reader of job variables
from distrain.launchers.evaluating import EvaluationRequest, resolve_evaluation, work_evaluation
from distrain.launchers.forking import PortTaken
from distrain.launchers.launcher import Launcher, Submitted, find_launcher, launcher_of
from distrain.launchers.local import (
    LaunchPlan,
    LocalLauncher,
    configuration_file,
    launch,
    launch_argv,
    shared_file,
    start,
    start_evaluation,
    start_prediction,
    unsaid_failures,
)
from distrain.launchers.preflight import (
    TYPED,
    StartEnvironment,
    all_of,
    check_gpus,
    gpu_count,
    join_launcher,
    launcher_environment,
)
from distrain.launchers.reporting import reported
from distrain.launchers.request import (
    Options,
    RunRequest,
    Target,
    asked_for,
    autobatch,
    check_folder,
    check_one_owner,
    check_same_recipe,
    find_run,
    open_run,
    read_target,
    recipe_differences,
    recipe_text,
    resolve,
)
from distrain.launchers.worker import end_with_launcher, train_here, work

__all__ = [
    "TYPED",
    "EvaluationRequest",
    "LaunchPlan",
    "Launcher",
    "LocalLauncher",
    "Options",
    "PortTaken",
    "RunRequest",
    "StartEnvironment",
    "Submitted",
    "Target",
    "all_of",
    "asked_for",
    "autobatch",
    "check_folder",
    "check_gpus",
    "check_one_owner",
    "check_same_recipe",
    "configuration_file",
    "end_with_launcher",
    "find_launcher",
    "find_run",
    "gpu_count",
    "join_launcher",
    "launch",
    "launch_argv",
    "launcher_environment",
    "launcher_of",
    "open_run",
    "read_target",
    "recipe_differences",
    "recipe_text",
    "reported",
    "resolve",
    "resolve_evaluation",
    "shared_file",
    "start",
    "start_evaluation",
    "start_prediction",
    "train_here",
    "unsaid_failures",
    "work",
    "work_evaluation",
]
