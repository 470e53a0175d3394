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
import pictures  # noqa: E402


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


def test_each_picture_is_there_named_and_made_by_a_script() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"[(\"](?:docs/)?images/([\w.-]+)[)\"]", page.read_text())}
    there = {path.name: path.stat().st_size for path in pictures.IMAGES.iterdir()}
    assert named == set(there)
    assert {*(file for each in pictures.PICTURES for file in pictures.files(each.name)), "house.svg"} == set(there)
    assert sum(there.values()) < 1_500_000
    assert [name for name, size in there.items() if size > (100_000 if name.endswith(".svg") else 150_000)] == []


def test_pictures_show_nothing_of_the_machine_that_made_them() -> None:
    for path in pictures.IMAGES.glob("*.svg"):
        text = html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)", path.read_text())))
        paths = set(re.findall(r"(?<!\S)/\w+/\w+(?:/\w+)?", text))
        assert paths <= {pictures.FOLDER, str(Path(pictures.FOLDER).parent), "/etc/hosts", "/dev/shm"}, path.name
        assert "url(http" not in path.read_text()


def test_the_site_shows_what_fits_its_colours(site: Path) -> None:
    for page in site.glob("*.html"):
        shown = re.findall(r'<img\b[^>]*class="only-(light|dark)"[^>]*src="([^"]*)"', page.read_text())
        assert "<picture>" not in page.read_text()
        assert [how for how, _ in shown] == ["light", "dark"] * (len(shown) // 2)
        assert [name for how, name in shown if f"-{how}." not in name or not (site / name).is_file()] == []
    assert 'class="only-dark"' in (site / "ui.html").read_text()


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("a\r\nb\r\n", ["a", "b"]),
        ("\x1b[?25lone\r\x1b[2Ktwo \x1b[1m3\x1b[0m\n", ["two \x1b[1m3\x1b[0m"]),
        ("step 1\r\x1b[2Ksaid\r\nstep 1\r\x1b[2Kstep 2", ["said", "step 2"]),
        ("a\nb\n\r\x1b[1A\x1b[2Kc", ["a", "c"]),
    ],
    ids=["lines", "colours", "a line of progress", "cursor up"],
)
def test_a_terminal_shows_of_a_line_what_was_last_written(written: str, lines: list[str]) -> None:
    assert pictures.screen(written) == lines


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
