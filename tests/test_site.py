"""The pages as a site: built without a warning, it loads nothing from elsewhere, and lists every error."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import errors  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(out)]
    done = subprocess.run(sphinx, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    menu = (site / "index.html").read_text()
    assert {page for page in pages - {"index"} if f'href="{page}.html"' not in menu} == set(), "what no menu leads to"
    for path in site.glob("*.html"):
        text = path.read_text()
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=[\"'](?:https?:)?//[^\"']*", text)
        assert loaded == [], path.name


def test_the_reference_has_what_distrain_offers(site: Path) -> None:
    import distrain

    reference = (site / "reference.html").read_text()
    assert [name for name in distrain.__all__ if f'id="distrain.{name}"' not in reference] == []


def test_the_catalogue_lists_every_error(site: Path) -> None:
    catalogue = html.unescape(re.sub(r"<[^>]+>", "", (site / "errors.html").read_text()))
    catalogue = "".join(catalogue.split())
    listed = errors.messages()
    missing = [each for each in listed if "".join(each.text.split()) not in catalogue]
    assert missing == []
    # counted by other means than the catalogue is made by
    call = re.compile(rf"\b(?:{'|'.join(errors.error_classes(errors.parsed()))})\(")
    raised = sum(
        len(call.findall(line))
        for path in errors.PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if not re.match(r"\s*(class |#|\"\"\"|except |isinstance)", line)
    )
    assert len(listed) >= raised * 0.97
