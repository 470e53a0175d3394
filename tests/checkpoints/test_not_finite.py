"""Weights that are not finite are never published: every dtype, any cut into pieces, on any rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_state import DESCRIBED, SPECS, ThreadWorld, cut, make_state

from distrain.checkpoint import LocalCommunicator, Piece, Saver, TensorSpec
from distrain.checkpoints.arena import LARGE
from distrain.checkpoints.dtypes import DTYPES
from distrain.checkpoints.floats import all_finite
from distrain.checkpoints.writing import NotFiniteError

WEIGHTS = [name for name, spec in SPECS.items() if spec.role == "parameter"]
FLOATS = {
    name: dtype
    for name, each in DTYPES.items()
    if (dtype := getattr(torch, each.torch, None)) is not None and (dtype.is_floating_point or dtype.is_complex)
}


@pytest.mark.filterwarnings("ignore:.*support is experimental")
@pytest.mark.parametrize("name", FLOATS)
def test_each_element_of_each_dtype_is_judged_as_torch_does(name: str) -> None:
    size = DTYPES[name].nbytes
    if size <= 2:  # all that there are
        raw = np.arange(256**size, dtype=f"u{size}").view(np.uint8)
    else:
        largest = torch.finfo(FLOATS[name]).max
        parts = torch.tensor([0.0, -0.0, 1.0, largest, -largest, math.inf, -math.inf, math.nan], dtype=torch.float64)
        values = torch.complex(*torch.meshgrid(parts, parts, indexing="ij")) if FLOATS[name].is_complex else parts
        raw = values.flatten().to(FLOATS[name]).view(torch.uint8).numpy()
    elements = torch.from_numpy(raw.copy()).view(FLOATS[name])
    real = torch.view_as_real(elements).double() if FLOATS[name].is_complex else elements.double().unsqueeze(-1)
    expected = real.isfinite().all(-1).tolist()
    assert [all_finite(raw[at : at + size], name) for at in range(0, raw.nbytes, size)] == expected
    assert all_finite(raw, name) is False
    assert all_finite(
        np.concatenate([raw[at * size : (at + 1) * size] for at, fine in enumerate(expected) if fine]), name
    )


def test_numbers_of_whatever_size_are_finite() -> None:
    assert all_finite(np.full(1000, 3e38, np.float32).view(np.uint8), "F32"), "their sum is not"
    assert all_finite(np.full(9, 255, np.uint8), "U8")


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_element_of_one_rank_is_enough(tmp_path: Path, weight: str, world_size: int) -> None:
    state = make_state(4)
    infinite = torch.tensor([math.inf], dtype=FLOATS[SPECS[weight].dtype]).view(torch.uint8).numpy()
    state[weight][-len(infinite) :] = infinite

    def rank(comm: Any) -> int | None:
        saver = Saver(tmp_path / "checkpoints", comm)
        saver.save(3, SPECS, cut(make_state(3), world_size)[comm.rank], finite=WEIGHTS, **DESCRIBED)
        saver.begin(4, SPECS, cut(state, world_size)[comm.rank], finite=WEIGHTS, **DESCRIBED)
        name = weight.removeprefix("model/")
        with pytest.raises(NotFiniteError, match=rf"after step 4 the model has weights .* not finite, in {name};"):
            saver.finish()
        return saver.in_flight

    assert ThreadWorld(world_size).run(rank) == [None] * world_size
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_is_no_weight_may_be_infinite(tmp_path: Path) -> None:
    state = make_state(4)
    for name in ("optimizer/layer.weight/exp_avg", "ema/layer.weight"):
        state[name].view(np.float32)[5] = math.inf
    saver = Saver(tmp_path, LocalCommunicator())
    assert saver.save(4, SPECS, cut(state, 1)[0], finite=WEIGHTS, **DESCRIBED).step == 4


@pytest.mark.parametrize("background", [False, True])
def test_tensors_of_any_size_are_looked_at_to_their_end(tmp_path: Path, background: bool) -> None:
    sizes = {"a": 3, "b": 2 * LARGE, "c": 1, "d": LARGE // 4}
    specs = {f"model/{name}": TensorSpec((numel,), "F32", "parameter") for name, numel in sizes.items()}
    for name in specs:
        for at in (0, -1):
            state = {each: np.zeros(spec.numel, np.float32) for each, spec in specs.items()}
            state[name][at] = math.nan
            pieces = [Piece(each, 0, values.view(np.uint8)) for each, values in state.items()]
            saver = Saver(tmp_path, LocalCommunicator())
            saver.begin(1, specs, pieces, finite=specs, background=background, **(DESCRIBED | {"aliases": {}}))
            with pytest.raises(NotFiniteError, match=f"in {name[-1]};"):
                saver.finish()
            saver.close()
    assert list(tmp_path.iterdir()) == []
