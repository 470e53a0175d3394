"""Run folders that an earlier version made, one for each strategy: they resume, evaluate, verify and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from places import SUPPORT
from runs import checkpoint, cli, last, losses, state, train

from distrain.checkpoint import list_checkpoints, read_manifest, verify
from distrain.run.folder import RunDir

KEPT = SUPPORT / "kept_runs"
"""Four steps on the irises, with a checkpoint after two: trained before the package got its present layout."""

NAMES = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def kept(name: str, tmp_path: Path) -> Path:
    """A copy of the run folder, which may be changed."""
    return shutil.copytree(KEPT / name, tmp_path / name)


@each
def test_it_verifies(kept: Path, name: str) -> None:
    found = list_checkpoints(kept / "checkpoints")
    assert sorted(info.step for info in found) == [2, 4]
    for info in found:
        verify(info.path)
        manifest = read_manifest(info.path)
        assert manifest.step == info.step
        assert manifest.strategy == name


@each
def test_it_evaluates_to_the_same_numbers(kept: Path, name: str) -> None:
    ended = cli("evaluate", kept, "--split", "test", "--json")
    assert ended.status == 0, ended.err
    found, expected = json.loads(ended.out), RunDir(kept).finished
    assert expected is not None
    for key in ("loss", "accuracy", "samples"):
        assert found[key] == pytest.approx(expected["test"][key], rel=1e-5)


@each
def test_it_exports_to_the_same_file(kept: Path, name: str, tmp_path: Path) -> None:
    out = tmp_path / "again.safetensors"
    ended = cli("export", kept, "-o", out, "--best", "--ema")
    assert ended.status == 0, ended.err
    assert out.read_bytes() == (kept / "export" / "model.safetensors").read_bytes()


@each
def test_it_resumes_to_the_same_end(kept: Path, name: str) -> None:
    run = RunDir(kept)
    expected, theirs = state(last(kept)), losses(kept)
    shutil.rmtree(checkpoint(kept, 4))
    shutil.rmtree(kept / "export")
    (kept / "FINISHED").unlink()
    rows = [line for line in run.metrics_path.read_text().splitlines() if json.loads(line)["step"] <= 2]
    run.metrics_path.write_text("".join(f"{line}\n" for line in rows))
    train(1 if name == "single" else 2, kept, None, strategy=name)
    assert losses(kept) == pytest.approx(theirs, rel=1e-5)
    found = state(last(kept))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
