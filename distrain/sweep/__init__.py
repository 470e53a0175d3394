"""`distrain sweep`: the runs of a sweep, started on this machine.

running.py     starts the runs, several at a time, each on its share of the GPUs; stops and resumes them
grid.py        which runs there are: every combination of values
search.py      what Optuna draws and prunes, given the results of the runs before
trials.py      the runs of a search with their results, as the folders have them
search_runs.py a search on this machine
tasks.py       a search on a cluster: each task of an array draws its run, and prunes it
"""

from distrain.sweep.running import SweepOptions, run_sweep

__all__ = ["SweepOptions", "run_sweep"]
