"""The recipe of a run, value by value, each with where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.yaml import load_recipe, show
from distrain.run.folder import RunDir
from distrain.system.errors import UserError

_LARGEST = 1 << 20
"""Characters of recipe.yaml that are shown."""


@dataclass(frozen=True)
class RecipeRow:
    """One value of a recipe."""

    key: str
    """Dotted, as an override names it."""
    value: str
    """As an override writes it."""
    origin: str
    """default, command line, or FILE:LINE."""

    @property
    def is_default(self) -> bool:
        """Whether nobody has set it."""
        return self.origin == "default"


def recipe_rows(run: RunDir) -> tuple[list[RecipeRow], str, str | None]:
    """Return the values of a run's recipe, its text, and why it could not be read, if so."""
    text = ""
    try:
        text = run.recipe_path.read_text(encoding="utf-8", errors="backslashreplace")[:_LARGEST]
        loaded = load_recipe(run.recipe_path)
    except (UserError, OSError) as error:
        return [], text, str(error)
    lines = text.splitlines()
    rows = []
    for key, value, place in show(loaded):
        origin = place
        number = place.rpartition(":")[2]
        if number.isdecimal() and 0 < int(number) <= len(lines):
            # the run's copy has the origin of each value in a comment behind it
            origin = lines[int(number) - 1].rpartition("  # ")[2] if "  # " in lines[int(number) - 1] else place
        rows.append(RecipeRow(key, value, origin))
    return rows, text, None
