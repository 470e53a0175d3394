"""Runs on a SLURM cluster: from a recipe to a queued job, what runs on its nodes, and its queue.

plan.py        `Plan`: all that a batch script is made from, each value checked
rendering.py   `render_sbatch`: a plan as a batch script, from slurm/train.sbatch
sites.py       defaults of a site, from one YAML each
snapshot.py    the user's code, copied so that a later edit changes nothing that is queued
submitting.py  `submit`: everything checked, written and handed to sbatch
launcher.py    SLURM as a `Launcher`: submit, status, cancel
job_environment.py  what SLURM's variables tell of a process
queue.py       SLURM's own commands, and their output
node.py        what runs once on each node
"""

from distrain.launchers.slurm.job_environment import read_slurm
from distrain.launchers.slurm.launcher import SlurmLauncher

__all__ = ["SlurmLauncher", "read_slurm"]
