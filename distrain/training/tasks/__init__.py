"""What a batch means: its losses, predictions and metrics.

task.py        `Task`, which one of your own inherits from, and `LossSum`
built_in.py    the tasks by name; dpo.py: pairs of answers
objective.py   what a step and an evaluation ask of a task
"""

from distrain.training.tasks.objective import Objective, SupervisedObjective, TaskObjective, build_objective, check_task
from distrain.training.tasks.task import LossSum, Task, TaskContext

__all__ = [
    "LossSum",
    "Objective",
    "SupervisedObjective",
    "Task",
    "TaskContext",
    "TaskObjective",
    "build_objective",
    "check_task",
]
