"""State that changes while a run trains and that no checkpoint holds: named in a warning while that can be mended."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.optim import canonical_name, parts_of
from distrain.optim.losses.user import UserLoss
from distrain.parallel import keeps_task
from distrain.parallel.contents import modules_with_extra_state
from distrain.system.errors import some
from distrain.training.callbacks.base import Callback
from distrain.training.callbacks.hidden_state import held_by_callback, hidden_state, hidden_weights, is_of_user
from distrain.training.context import TrainContext

logger = logging.getLogger(__name__)

_SHOWN = 5
_CLASS = " (of the class)"


class UnsavedState:
    """Compares what the task, and the user's loss, modules, optimizers and callbacks have on themselves, as it was
    after the first step.

    What is made in the first step, such as a mask that is kept, is no change. Looks after 2, 4, 8, ... steps of an
    attempt, so that what is annealed is found as well, and a long run looks a few times.
    """

    def __init__(self, t: TrainContext, callbacks: Mapping[str, Callback]):
        """`callbacks`: the user's that keep no state, by name."""
        self._t, self._start, self._callbacks = t, t.step, callbacks
        self._first: dict[str, str] | None = None
        self._named = set[str]()
        """Roots of what a warning has named."""
        self.looks_at = t.step + 1 if t.world.rank == 0 else math.inf
        """After which step to call `look`; a later one will do."""

    def look(self, step: int) -> None:
        """Warn by name of what has changed: of the task once, of the model once, and so on."""
        self.looks_at = self._start + 2 * (step - self._start)
        if self._first is None:
            self._first = self._now()
        elif changed := [path for path in self._changed(self._first) if _root(path) not in self._named]:
            self._named |= set(map(_root, changed))
            logger.warning(_warning(changed, self._t.objective.name))

    def _changed(self, first: Mapping[str, str]) -> list[str]:
        now = self._now()
        return [path for path, value in now.items() if first.get(path) != value]

    def _now(self) -> dict[str, str]:
        """Return what there is by path."""
        model, objective = self._t.strategy.model, self._t.objective
        of_loss = objective.loss.function if isinstance(objective.loss, UserLoss) else None
        known = {id(each) for each in (*model.parameters(), *model.buffers())}
        held = objective.holds if objective.loss is None and not keeps_task(model) else {}
        task = {name: each for name, each in held.items() if id(each) not in known}
        roots = {"task": task, "model": model, "loss": of_loss, "optimizer": _of_optimizers(self._t.state.optimizer)}
        roots["callback"] = {name: held_by_callback(each) for name, each in self._callbacks.items()}
        users = {canonical_name(name) for name, module in model.named_modules() if is_of_user(type(module))}
        keeping = {id(module) for module in modules_with_extra_state(model).values()}
        kept = {canonical_name(name): id(module) in keeping for name, module in model.named_modules()}
        besides = {id(each) for each in (*model.parameters(), *_computed_anew(model))}
        hidden = hidden_state(roots, files=False, besides=besides)
        found = {path: value for path, value in hidden.items() if _counts(path, users, kept)}
        return found | hidden_weights("task", task, model) | hidden_weights("loss", of_loss, model)


def _of_optimizers(optimizer: Any) -> dict[str, Any]:
    """Return the optimizers of the user's own by name, with the state of those that they hold and do not share."""
    found: dict[str, Any] = {}
    for name, part in parts_of(optimizer).items():
        if is_of_user(type(part)):
            held = {key: each for key, each in vars(part).items() if isinstance(each, Optimizer)}
            found[name] = part
            found |= {f"{name}{key}.state": each.state for key, each in held.items() if each.state is not part.state}
    return found


def _computed_anew(model: nn.Module) -> Iterator[Any]:
    """Yield what torch computes of parameters before each pass, and leaves on their modules (weight and spectral norm,
    pruning), and the lists in which recurrent layers have it."""
    for module in model.modules():
        names = {"_flat_weights"}
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                names |= {getattr(hook, "name", ""), getattr(hook, "_tensor_name", "")}
        yield from (each for name, each in vars(module).items() if name in names and each is not None)


def _counts(path: str, users: set[str], kept: Mapping[str, bool]) -> bool:
    """Whether what changed is state of the user's own, and no result that is kept to be computed once.

    `kept`: whether a module has extra state, by its name.
    """
    root, _, rest = path.removesuffix(_CLASS).partition(".")
    if rest.endswith("kept results") or (path.endswith(")") and not path.endswith((_CLASS, "not persistent)"))):
        return False
    if root != "model":
        return True
    parts = rest.partition(" ")[0].split(".")
    around = [name for end in range(len(parts)) if (name := ".".join(parts[:end])) in kept]
    return not kept[around[-1]] and any(name in users for name in around)


def _root(path: str) -> str:
    return path.removeprefix("the weights of ").partition(".")[0]


def _warning(changed: list[str], task: str) -> str:
    cures = {
        "model": "of the model in buffers (register_buffer), or by get_extra_state and set_extra_state",
        "task": f"of task {task} by its methods state_dict() and load_state_dict(state)",
        "optimizer": "of an optimizer in its state (self.state[parameter][name]) or its param_groups",
        "loss": "of a loss in a task of its own (docs/tasks.md)",
        "callback": "of a callback by its methods state_dict() and load_state_dict(state)",
    }
    roots = set(map(_root, changed))
    cure = "; ".join(each for root, each in cures.items() if root in roots)
    return (
        f"{some(changed, _SHOWN)}: changed from step to step, and no checkpoint holds it. Where a later "
        "step reads it, a run that is stopped and resumed trains or reports something else than one that is not. Keep "
        f"it: {cure}. What depends on the number of steps alone is computed from it: a task has it as self.step, a "
        "callback as run.step"
    )
