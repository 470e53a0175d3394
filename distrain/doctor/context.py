"""What checks are given: the run that is meant, and the machine as this process sees it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.system.errors import UserError

if TYPE_CHECKING:
    from distrain.config import Recipe


@dataclass(frozen=True)
class Context:
    """What a check may look at."""

    folder: Path
    """The run folder that is meant, absolute; it need not be there. Without a recipe the folder that holds runs."""
    processes: int = 1
    """Processes of a run on this machine."""
    nodes: int = 1
    """Machines of a run."""
    gpus: int = 0
    """GPUs of this machine that the processes may use."""
    recipe: Recipe | None = None
    """The recipe of the run that is meant; None: none was named, or it could not be read."""
    source: str = ""
    """The recipe's file; empty: none was named."""
    recipe_problem: str = ""
    """Why the recipe could not be read."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The environment variables, as they were before distrain took out what has no part in this start."""
    host: str = field(default_factory=socket.gethostname)
    """The name of this machine."""

    @property
    def workers(self) -> int:
        """Loader processes of each process of the run."""
        return 0 if self.recipe is None else self.recipe.data.workers

    @property
    def existing(self) -> Path:
        """The run folder, or the nearest folder above it that is there."""
        return next(each for each in (self.folder, *self.folder.parents) if each.is_dir())


def make_context(
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    processes: int | None = None,
    nodes: int = 1,
    variables: Mapping[str, str] = os.environ,
) -> Context:
    """Return the context of a command on this machine; `source` is a recipe file or a run's folder, None: neither.

    `processes` is of this machine, None: one for each GPU, else 1. What is wrong with the recipe is kept for its check.
    """
    from distrain.launchers.preflight import gpu_count

    gpus = gpu_count(variables)
    folder = Path(run_dir or "runs").absolute()
    recipe, problem = None, ""
    if source is not None:
        from distrain.config.yaml import load_recipe
        from distrain.launchers.request import find_run

        try:
            run, loaded = find_run(source, overrides, run_dir)
            folder = run.path
            recipe = (loaded or load_recipe(run.recipe_path)).recipe
        except (UserError, OSError) as error:
            problem = str(error)
    return Context(
        folder, processes or max(gpus, 1), nodes, gpus, recipe, source or "", problem, variables=dict(variables)
    )
