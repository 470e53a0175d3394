"""Asks for a plan in a process of its own: what starts a run has run no code of its user. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distrain.config import Recipe
from distrain.config.yaml import dump_recipe
from distrain.system.output import error_line, one_line

logger = logging.getLogger(__name__)

_TIMEOUT_S = 300.0
_COMMAND = "import sys; from distrain.plan.asking import main; main(sys.argv[1])"
"""With -c Python imports modules from the current folder, as in the run itself."""


def ask(recipe: Recipe, gpu: str, *, nodes: int, per_node: int) -> dict[str, Any] | None:
    """Return `Plan.to_json` of a recipe on `nodes` machines with `per_node` GPUs of this name each.

    Returns None, after logging why, where it cannot be planned. Takes as long as importing torch, and some seconds.
    """
    with tempfile.TemporaryDirectory(prefix="distrain-plan-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (folder / "asked.json").write_text(json.dumps({"gpu": gpu, "nodes": nodes, "per_node": per_node}))
        variables = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _COMMAND, str(folder)], env={**variables, "CUDA_VISIBLE_DEVICES": ""},
                capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            found: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            found = {"problem": error_line(error)}
        else:
            if done.returncode and "problem" not in found:
                found = {"problem": f"exit code {done.returncode}"}
    if "problem" in found:
        logger.info(f"plan: none could be made: {one_line(found['problem'])}")
        return None
    return found


def largest_of(plan: dict[str, Any], strategy: str, *, checkpointing: bool) -> int | None:
    """Return the largest micro-batch that a plan has for a strategy; None where none fits, or it has none."""
    for each in plan["options"]:
        if (each["strategy"], each["activation_checkpointing"]) == (strategy, checkpointing):
            largest: int | None = each["largest_micro_batch_size"]
            return largest
    return None


def main(place: str) -> None:
    """Make the plan that is asked for in a folder, and write it there."""
    folder = Path(place)
    try:
        from distrain.config.yaml import load_recipe
        from distrain.datasets.preparing import prepare_data
        from distrain.plan.gpus import find_gpu
        from distrain.plan.planning import make_plan

        asked = json.loads((folder / "asked.json").read_text())
        recipe = load_recipe(folder / "recipe.yaml").recipe
        prepare_data(recipe)  # as the run that follows would
        found = make_plan(recipe, find_gpu(asked["gpu"]), asked["nodes"], asked["per_node"]).to_json()
    except Exception as error:
        found = {"problem": error_line(error)}
    (folder / "plan.json").write_text(json.dumps(found), encoding="utf-8")
