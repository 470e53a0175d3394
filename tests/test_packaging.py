"""The wheel: what is in it, and that an installed distrain finds its own files."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("distrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("recipes", "accelerate_configs", "launch", "slurm"):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert tracked, folder
        assert {f"distrain/share/{name}" for name in tracked} <= names
    page = {path.name for path in (ROOT / "distrain/report/ui/static").rglob("*") if path.is_file()}
    assert {"index.html", "main.js", "style.css", "uPlot.iife.min.js", "LICENSE-uPlot.txt"} <= page
    assert page == {Path(name).name for name in names if name.startswith("distrain/report/ui/static/")}
    assert not any("prepared" in name or "__pycache__" in name for name in names)

    script = (
        "import json, distrain; from distrain.launchers import shared_file; "
        "print(json.dumps([distrain.__file__, str(shared_file('recipes', 'digits.yaml')), "
        "str(shared_file('accelerate_configs', 'multi_cpu.yaml')), str(shared_file('launch', 'train.py'))]))"
    )
    site = tmp_path / "site"
    # -P: the checkout must not be found by way of the current folder
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    paths = json.loads(done.stdout)
    assert all(Path(path).is_relative_to(site) and Path(path).exists() for path in paths), paths
