"""Builds what a recipe trains."""

from __future__ import annotations

import inspect

from distrain.config import Recipe, UserError
from distrain.config.arguments import argument_problems
from distrain.config.registry import tasks
from distrain.datasets.base import DataMeta
from distrain.optim import build_loss, check_loss
from distrain.training.tasks.built_in import Supervised
from distrain.training.tasks.coupled import CoupledObjective
from distrain.training.tasks.objective import Objective, SupervisedObjective, TaskObjective
from distrain.training.tasks.task import Task


def build_task(recipe: Recipe) -> Task:
    """Return the recipe's task. Raises UserError for what is none, and for arguments that it does not take."""
    name, args = recipe.task.name, recipe.task.args
    found = tasks.find(name).value
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise UserError(f"task: {name!r} is {found!r}; expected a class that inherits from distrain.Task")
    if problems := argument_problems(found, args, "task", repr(name)):
        raise UserError("\n".join(problems))
    try:
        return found(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"task: {name!r} refuses its arguments: {error}") from error


def check_task(recipe: Recipe) -> list[str]:
    """Return one line for each problem of the recipe's task that shows without data."""
    try:
        task = build_task(recipe)
    except UserError as error:
        return str(error).split("\n")
    problems = _optimizer_problems(recipe, task)
    both = [name for name in ("state_dict", "load_state_dict") if hasattr(task, name)]
    if len(both) == 1:
        problems.append(
            f"task: {recipe.task.name!r} has {both[0]} alone; expected state_dict and load_state_dict, or neither"
        )
    if isinstance(task, Supervised):
        return problems + check_loss(recipe)
    if recipe.loss is not None:
        problems.append(f"loss: task {recipe.task.name!r} computes its losses itself; remove it")
    return problems


def _optimizer_problems(recipe: Recipe, task: Task) -> list[str]:
    """Return what is wrong with the names of optimizers: those of the recipe are those that the losses train."""
    wanted, found = [*task.optimizers], [name for name in recipe.optimizers if name]
    if sorted(wanted) == sorted(found):
        return []
    trains = f"the losses of task {recipe.task.name!r} train"
    if not found:
        return [
            f"optim: {trains} the optimizers {' and '.join(wanted)}, and the recipe has one for all parameters; write "
            f"optim: {{{', '.join(f'{name}: {{params: …}}' for name in wanted)}}}, in the order in which they act"
        ]
    if not wanted:
        return [
            f"optim: {' and '.join(found)} need losses of their own, and {trains} all parameters at once; take a task "
            "whose class names its `optimizers` (docs/tasks.md), or one optimizer, with optim.groups for other "
            "learning rates"
        ]
    return [f"optim: found the optimizers {' and '.join(found)}, and {trains} {' and '.join(wanted)}; name them alike"]


def is_supervised(task: Task) -> bool:
    """Whether the recipe's loss is all that a task trains and predicts by, so that nothing else of it is called."""
    kind = type(task)
    if kind.couples_samples or kind.optimizers or hasattr(task, "state_dict") or task.weights is not Task.weights:
        return False
    called = ("losses", "count", "predictions", "measure", "show", "outputs", "prepare", "step_taken")
    return isinstance(task, Supervised) and all(getattr(kind, each) is getattr(Supervised, each) for each in called)


def build_objective(recipe: Recipe, meta: DataMeta) -> Objective:
    """Return what the recipe trains; `bind` gives it the model. Raises UserError."""
    task = build_task(recipe)
    if is_supervised(task):
        return SupervisedObjective(build_loss(recipe, meta))
    if isinstance(task, Supervised):
        task.loss = build_loss(recipe, meta)
    kind = CoupledObjective if task.couples_samples else TaskObjective
    return kind(task, recipe.task.name.rpartition(":")[2])
