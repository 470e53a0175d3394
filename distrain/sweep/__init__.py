"""`distrain sweep`: the runs of a sweep, started on this machine.

running.py     starts the runs, several at a time, each on its share of the GPUs; stops and resumes them
grid.py        which runs there are: every combination of values
search.py      the same, drawn by Optuna from ranges, with pruning
"""

from distrain.sweep.running import SweepOptions, run_sweep

__all__ = ["SweepOptions", "run_sweep"]
