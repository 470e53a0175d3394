"""The Python API, which `import distrain` offers: `train`, `evaluate`, `predict`, `load` and the `Run` they return.

objects    what is given in Python instead of names: its place in a recipe, and what other processes get of it
recipes    a recipe from a file, a dict or a run, with what is changed
training   `train`: one attempt at a run, in this process or in several
run        `Run`: a run folder, and `load`, `evaluate` and `predict`

Imports no torch.
"""

from distrain.api.run import BestEvaluation, Run, evaluate, load, predict
from distrain.api.training import train

__all__ = ["BestEvaluation", "Run", "evaluate", "load", "predict", "train"]
