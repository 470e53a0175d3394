"""What a batch means: its losses, predictions and metrics.

task.py        `Task`, which one of your own inherits from, and `LossSum`
built_in.py    the tasks by name; dpo.py: pairs of answers
objective.py   what a step and an evaluation ask of a task
gathering.py   `gather`, for losses that couple samples
coupled.py     how a step and an evaluation see all that they couple
building.py    builds what a recipe trains
"""

from distrain.training.tasks.building import build_objective, check_task
from distrain.training.tasks.gathering import gather
from distrain.training.tasks.objective import Means, Objective, SupervisedObjective, TaskObjective
from distrain.training.tasks.task import LossSum, Task, TaskContext

__all__ = [
    "LossSum",
    "Means",
    "Objective",
    "SupervisedObjective",
    "Task",
    "TaskContext",
    "TaskObjective",
    "build_objective",
    "check_task",
    "gather",
]
