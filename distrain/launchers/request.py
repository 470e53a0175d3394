"""Finding, making and taking up the run that a command means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distrain.config import UserError
from distrain.config.yaml import LoadedRecipe, dump_recipe, load_recipe, show
from distrain.run.folder import Launch, RunDir


def find_run(target: str, overrides: Sequence[str], run_dir: str | None) -> tuple[RunDir, LoadedRecipe | None]:
    """Return the run folder that a command means, and the recipe when a recipe was named. Writes nothing.

    `target` is a recipe file or the folder of an existing run.
    """
    if Path(target).is_dir():
        run = RunDir(target)
        if not run.exists:
            raise UserError(
                f"{target} is a folder without recipe.yaml, so it is not a run; name a recipe or a run folder"
            )
        if run_dir is not None or overrides:
            raise UserError(
                f"{target} is a run, whose recipe is fixed: --run-dir and KEY=VALUE go with a recipe file. "
                f"To go on with other values: distrain train {run.recipe_path} KEY=VALUE --run-dir {target} --update"
            )
        return run, None
    loaded = load_recipe(target, overrides)
    return RunDir(run_dir or Path("runs") / loaded.recipe.name), loaded


def open_run(run: RunDir, loaded: LoadedRecipe | None, launch: Launch, *, update: bool = False) -> None:
    """Create the run, or take up the existing one. Raises UserError when that one has another recipe.

    With `update` the run gets the recipe, and the next start goes on with data and code that have changed.
    """
    if loaded is None:
        run.write_launch(launch)
        if update:
            run.update_path.touch()
        return
    if not run.exists and run.holds_other_files():
        raise UserError(f"{run.path} holds files and is not a run; choose another --run-dir")
    # without a row of metrics nothing was trained yet: an attempt that failed before may be mended
    if not run.exists or update or not run.metrics_path.exists():
        run.create(recipe_text(loaded), launch)
        if update:
            run.update_path.touch()
    else:
        check_same_recipe(run, loaded)
        run.write_launch(launch)


def check_same_recipe(run: RunDir, loaded: LoadedRecipe) -> None:
    """Raise UserError with every value that differs, unless the run was started with this recipe."""
    if differences := recipe_differences(load_recipe(run.recipe_path), loaded):
        raise UserError(
            f"{run.path} was started with another recipe:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --run-dir for a new run, or --update to go on with the new values."
        )


def recipe_text(loaded: LoadedRecipe) -> str:
    """Return the resolved recipe as it is stored in a run, with where each value came from."""
    return "# The resolved recipe: training it again is the same run.\n" + dump_recipe(loaded.recipe, loaded.origins)


def recipe_differences(old: LoadedRecipe, new: LoadedRecipe) -> list[str]:
    """Return a line for each key whose value differs."""
    before = {key: value for key, value, _ in show(old)}
    after = {key: value for key, value, _ in show(new)}
    return [
        f"{key}: was {before.get(key, 'absent')}, now {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
