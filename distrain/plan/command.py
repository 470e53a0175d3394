"""What `distrain plan` does: reads a recipe, finds the GPU that is meant, and plans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distrain.config import Recipe, UserError
from distrain.config.yaml import load_recipe
from distrain.datasets.preparing import prepare_data
from distrain.plan.gpus import CPU, GPUS, Gpu, find_gpu, known_gpu
from distrain.plan.planning import CannotTrace, Plan, gpu_here, make_plan
from distrain.system.gpus import gpu_models

logger = logging.getLogger(__name__)


def plan_recipe(
    path: str, overrides: Sequence[str] = (), *, gpu: str | None = None, nodes: int = 1, per_node: int = 1
) -> Plan:
    """Return the plan of a recipe file, or of a run's folder.

    `gpu`: a name, a file, or cpu; None takes what this machine has.

    Has `data.prepare` make the data where they are not there. Raises UserError for what a run would refuse, an unknown
    GPU, and a model that cannot be traced.
    """
    from distrain.training.checks import check_recipe

    stored = Path(path) / "recipe.yaml"
    path = str(stored) if stored.is_file() else path
    loaded = load_recipe(path, overrides)
    check_recipe(loaded.recipe, path)
    found = gpu_meant(gpu)
    if prepare_data(loaded.recipe):
        logger.info(f"data.prepare has made {loaded.recipe.data.path}")
    return plan_of(loaded.recipe, found, nodes, per_node)


def plan_of(recipe: Recipe, gpu: Gpu, nodes: int, per_node: int) -> Plan:
    """Return the plan of a recipe that was read; raises UserError as `plan_recipe` does."""
    try:
        return make_plan(recipe, gpu, nodes, per_node)
    except CannotTrace as error:
        raise UserError(
            f"{error}. A plan needs the shapes alone; `batch.micro: auto` finds the largest micro-batch by trying"
        ) from error


def gpu_meant(given: str | None) -> Gpu:
    """Return the GPU of a name or a file; of None this machine's, else its CPUs."""
    if given is not None and given.lower() != CPU:
        return find_gpu(given)
    models = gpu_models() if given is None else []
    if not models:
        return gpu_here()
    found = known_gpu(models[0])
    if found is None:
        raise UserError(
            f"this machine's GPU, {models[0]}, is not in the table; name one that is like it with --gpu, of "
            f"{', '.join(GPUS)}, or a file that describes it (docs/plan.md)"
        )
    return found
