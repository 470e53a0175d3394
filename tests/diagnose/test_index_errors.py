"""Indices out of range, on a CPU and as a GPU tells of them, and operations without a deterministic form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import IMPORTABLE
from runs import TINY, assert_same_run, train, train_rank, write_recipe
from torch import nn
from worlds import running_world

from distrain.config import UserError
from distrain.diagnose import index_errors as indices
from distrain.diagnose.index_errors import DeviceLost, explaining_errors, given
from distrain.parallel import determinism
from distrain.run.folder import RunDir

RECIPE = """
name: ranged
task: {task}
data: {{name: "ranged_parts:{data}"{more}}}
model: {model}
batch: {{global: 12, micro: 6}}
train: {{steps: 4}}
eval: {{every: null}}
"""
GPT = "{name: gpt, n_layer: 1, n_head: 2, d_model: 16, seq_len: 16}"
CASES = {
    "label": (("classification", "Digits", "", '"ranged_parts:Chosen"'), "targets hold 12, ", "classes 0 to 9"),
    "token": (("language_modeling", "Tokens", "", GPT), "inputs hold 80, ", "embedding 'tokens' has rows for 0 to 63"),
    "named": (
        ("classification", "Named", "", '"ranged_parts:Lookup"'),
        "inputs 'place' hold 9, ",
        "'places' has rows for 0 to 4",
    ),
}  # fmt: skip


@pytest.mark.fault(39)
@pytest.mark.parametrize("case", CASES)
def test_an_index_out_of_range_is_reported_with_its_sample(tmp_path: Path, case: str) -> None:
    (task, data, more, model), what, fits = CASES[case]
    recipe = write_recipe(tmp_path, RECIPE.format(task=task, data=data, more=more, model=model))
    (ended,) = train(1, recipe, tmp_path / "run", status=1)
    line = next(line for line in ended.err.splitlines() if line.startswith("error"))
    assert re.match(rf"error: (step \d|the first step): the {re.escape(what)}in sample 7, and the ", line), line
    assert fits in line
    assert "Traceback" not in ended.err
    failed = RunDir(tmp_path / "run").failed
    assert failed is not None
    assert failed["restart"] is False


# --------------------------------------------------------------------------------------------------------------------
# As a GPU tells of it

ASSERTED = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


class Loss:
    classes, ignore_index = 10, -100


@pytest.fixture
def noted() -> Iterator[None]:
    indices._given.clear()
    yield
    indices._given.clear()


def batch(ids: list[int], targets: list[int], tokens: list[list[int]] | None = None) -> dict[str, Any]:
    inputs = torch.zeros(len(ids), 3) if tokens is None else torch.tensor(tokens)
    return {"inputs": inputs, "targets": torch.tensor(targets), "ids": torch.tensor(ids)}


def told(error: Exception, model: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as caught, explaining_errors(lambda: (model, Loss())):  # type: ignore[arg-type, return-value]
        raise error
    assert isinstance(caught.value, DeviceLost)
    return str(caught.value)


@pytest.mark.usefixtures("noted")
def test_what_a_lost_gpu_was_given_is_looked_through_on_the_host() -> None:
    given("step 3", [batch([4, 5], [0, 9]), batch([6, 7], [-100, 12])])
    given("step 4", [batch([8, 9], [1, 2])])
    asserted = RuntimeError(ASSERTED)
    assert told(asserted).startswith(
        "step 3: the targets hold 12, in sample 7, and the model has outputs for the classes"
    )
    given("step 5", [batch([10, -1], [1, 99]), batch([1, 2], [3, 4], [[0, 1], [70, -1]])])
    model = nn.Sequential(nn.Embedding(8, 2), nn.Embedding(64, 2))
    wrong = (
        "step 5: the inputs hold 70, in sample 2 (1 more such, from -1 to 70), and the embedding '1' has rows for 0 to"
    )
    assert told(asserted, model).startswith(f"{wrong} 63")
    given("step 6", [batch([3, 4], [3, 4])])
    given("step 7", [batch([5, 6], [5, 6])])
    text = told(asserted, model)
    assert text.startswith(
        "a kernel failed on the GPU in step 6 or step 7, with the samples 3, 4, 5, 6: CUDA error: device-"
    )
    assert "asynchronously" not in text
    # errors of the model's own are left as they are
    with pytest.raises(IndexError), explaining_errors(lambda: (model, Loss())):  # type: ignore[arg-type, return-value]
        raise IndexError("list index out of range")


@pytest.mark.fault(39)
def test_a_process_that_has_lost_its_gpu_reports_once_and_ends(tmp_path: Path) -> None:
    model = 'model: {name: "ranged_parts:Chosen", how: assert}'
    recipe = write_recipe(tmp_path, TINY.replace("model: {name: mlp, hidden: [16]}", model))
    with running_world(1, train_rank, str(recipe), [], str(tmp_path / "run"), None, False) as world:
        assert world.wait() == [1]
    failed = RunDir(tmp_path / "run").failed
    assert failed is not None
    assert (failed["error"], failed["restart"], failed["traceback"]) == ("DeviceLost", False, None)
    assert re.match(r"a kernel failed on the GPU in step 1 or step 2, with the samples \d+, ", failed["message"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["label", "token"])
@pytest.mark.parametrize("more", [(), ("train.precision=bf16",), ("train.compile=true",)], ids=str)
def test_on_a_gpu(tmp_path: Path, case: str, more: tuple[str, ...]) -> None:
    from places import SCRIPT
    from runs import typed

    (task, data, args, model), what, fits = CASES[case]
    recipe = write_recipe(tmp_path, RECIPE.format(task=task, data=data, more=args, model=model))
    path = {"PYTHONPATH": f"{IMPORTABLE}:{Path(__file__).parent}"}
    done = typed("python", SCRIPT, recipe, *more, "--run-dir", tmp_path / "run", folder=tmp_path, **path)
    assert done.returncode == 1
    assert f"the {what}in sample 7" in done.stderr
    assert fits in done.stderr
    assert "frame #" not in done.stderr
    failed = RunDir(tmp_path / "run").failed
    assert failed is not None
    assert failed["restart"] is False


# --------------------------------------------------------------------------------------------------------------------
# Deterministic operations

PUT = TINY.replace("model: {name: mlp, hidden: [16]}", 'model: {name: "ranged_parts:Chosen", how: put}')


def test_an_operation_without_a_deterministic_form_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, PUT)
    (ended,) = train(1, recipe, tmp_path / "run", "train.deterministic=true", status=1)
    assert "error: put_ has no deterministic form in PyTorch" in ended.err
    assert "train.deterministic: false" in ended.err
    assert "Traceback" not in ended.err
    train(1, recipe, tmp_path / "other", "train.steps=4")


def test_deterministic_operations_are_the_same_on_a_cpu(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for asked in ("auto", "true"):
        (ended,) = train(1, recipe, tmp_path / asked, f"train.deterministic={asked}")
        effect = RunDir(tmp_path / asked).effect()
        assert effect is not None
        assert effect["deterministic"] is (asked == "true")
        assert ("  bits     the same in each start" in ended.out) == (asked == "true")
    assert_same_run(tmp_path / "auto", tmp_path / "true")


def test_auto_is_for_proofs_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    wants = determinism.wants_determinism
    assert not wants("auto", on_cpu=False)
    monkeypatch.setenv(determinism.PROOF, "a mark")
    assert wants("auto", on_cpu=False)
    assert not wants("auto", on_cpu=True)
    assert not wants(False, on_cpu=False)
    assert wants(True, on_cpu=True)


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_what_is_turned_on(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    if before is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    try:
        assert not determinism.is_on()
        determinism.turn_on()
        assert determinism.is_on()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        os.environ.pop("TORCHINDUCTOR_DETERMINISTIC", None)


def test_operations_are_found_in_errors() -> None:
    found = determinism.refused_operation
    torch_says = RuntimeError(
        "scatter_add_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_deterministic_…"
    )
    assert found(torch_says) == "scatter_add_cuda_kernel"
    wrapped = RuntimeError("backend='inductor' raised")
    wrapped.__cause__ = torch_says
    assert found(wrapped) == "scatter_add_cuda_kernel"
    cublas = (
        "Deterministic behavior was enabled with … but this operation is not deterministic because it uses CuBLAS and"
    )
    assert "CUBLAS_WORKSPACE_CONFIG" in (found(RuntimeError(cublas)) or "")
    assert found(RuntimeError("CUDA error: out of memory")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("more", [("train.precision=fp32",), ("train.precision=fp32", "train.compile=true")], ids=str)
def test_the_same_bits_on_a_gpu(tmp_path: Path, more: tuple[str, ...]) -> None:
    from places import SCRIPT
    from runs import typed

    text = TINY.replace("model: {name: mlp, hidden: [16]}", "model: {name: cnn}").replace("precision: fp64, ", "")
    for name in ("one", "other"):
        command = ("python", SCRIPT, write_recipe(tmp_path, text), "train.deterministic=true", *more)
        done = typed(*command, "--run-dir", tmp_path / name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "one", tmp_path / "other")
