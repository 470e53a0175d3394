"""How the pages of this folder become a site: `make docs`, then open docs/_build/index.html."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import errors  # noqa: E402

project = html_title = "distrain"
release = importlib.metadata.version("distrain")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
default_role = "code"
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
smartquotes = False
html_show_copyright = html_show_sourcelink = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"
suppress_warnings = ["toc.glob"]

_PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]*)">\s*<img alt="([^"]*)" src="([^"]*)">\s*</picture>')
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]*)(#[^)]*)?\)")


def read_source(app: Any, name: str, content: list[str]) -> None:
    """Give a page what it has on the site alone: the catalogue of errors, and paths for links out of this folder."""
    if name == "errors":
        content[0] = content[0].replace("<!-- catalogue -->", errors.catalogue())
    content[0] = _PICTURE.sub(lambda found: _both(found[3], found[1], found[2]), content[0])
    content[0] = _OUTSIDE.sub(lambda link: _path(link[1].strip("`"), link[2].rstrip("/")), content[0])


def _both(light: str, dark: str, about: str) -> str:
    """Return a picture in light and in dark, of which the site shows what fits its colours."""
    files = {"light": light, "dark": dark}
    return "\n".join(f":::{{image}} {file}\n:class: only-{how}\n:alt: {about}\n:::\n" for how, file in files.items())


def _path(text: str, path: str) -> str:
    return f"`{path}`" if text in path or path in text else f"{text} (`{path}`)"


def setup(app: Any) -> None:
    """Begin."""
    app.connect("source-read", read_source)
