"""The table of lines of user code is that of the scripts as they are."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import user_code


def test_the_table_is_that_of_the_scripts() -> None:
    assert user_code.PAGE.read_text(encoding="utf-8") == user_code.on_page(), "run benchmarks/user_code.py --write"


def test_blank_lines_comments_and_docstrings_are_not_counted(tmp_path: Path) -> None:
    script, recipe = tmp_path / "script.py", tmp_path / "recipe.yaml"
    script.write_text(
        '"""Two\nlines."""\n\n# a comment\nx = [\n    1,  # one\n\n]\n\n'
        'def f():\n    """It."""\n    return """a\nb"""\n'
    )
    recipe.write_text("# a recipe\nname: x\n\ndata: {name: y}  # data\n")
    assert (user_code.lines(script), user_code.lines(recipe)) == (3 + 3, 2)
