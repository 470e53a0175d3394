"""At most 64 MiB of anonymous memory above the bare interpreter, for every format and both ways, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from places import IMPORTABLE

NUMEL = 40 << 20  # 160 MiB in one tensor: far above the bound
LIMIT = 64 << 20

_MEASURE = """
import sys
from anonymous import Peak
with Peak() as peak:
    from distrain.checkpoints.export import export, import_checkpoint
    path, out = sys.argv[1:]
    imported = import_checkpoint(path, out + "/run", step=1)
    print("import", peak.most)
    for name, dtype in (("whole.safetensors", None), ("half.safetensors", "bf16"), ("whole.pt", None)):
        export(imported.path, f"{out}/{name}", dtype=dtype)
        print("export of ours to", name, peak.most)
        export(path, f"{out}/direct-{name}", dtype=dtype)
        print("export of theirs to", name, peak.most)
assert "torch" not in sys.modules
"""


def torch_file(path: Path) -> Path:
    big = torch.arange(NUMEL, dtype=torch.float32)
    state = {"big": big.view(-1, 1024), "small": big[:10], "turned": big[: 1 << 22].view(1 << 11, 1 << 11).t()}
    torch.save({"model": state}, path / "model.pt")
    return path / "model.pt"


def safetensors_file(path: Path) -> Path:
    safetensors.torch.save_file({"big": torch.ones(NUMEL)}, path / "model.safetensors")
    return path / "model.safetensors"


def distributed(path: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    big = torch.ones(NUMEL).view(-1, 64)
    dcp.save({"model": {"big": big, "turned": big[: 1 << 16].t()}}, checkpoint_id=path / "dcp", no_dist=True)
    return path / "dcp"


def zero(path: Path, stage: int) -> Path:
    """Write in DeepSpeed's layout what two ranks would hold of one large parameter."""
    tag = path / "global_step1"
    tag.mkdir()
    (path / "latest").write_text(tag.name)
    shapes = [{"big": torch.Size((NUMEL,))}]
    head = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, "global_steps": 1}
    head |= {"ds_version": "0"}
    masters = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    states = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    for rank in range(2):
        part = torch.full((NUMEL // 2,), float(rank))
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(head, tag / name)
        optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": part, "exp_avg_sq": part.clone()}}}
        content = {"zero_stage": stage, "partition_count": 2, masters: [part.clone()], states: optimizer}
        torch.save({"optimizer_state_dict": content}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "torch": torch_file,
    "safetensors": safetensors_file,
    "distributed": distributed,
    "zero2": lambda path: zero(path, 2),
    "zero3": lambda path: zero(path, 3),
}


# zero3's pieces are read as zero2's are, and more of them
@pytest.mark.slow
@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[pytest.mark.more] if name == "zero2" else []) for name in WRITERS]
)
def test_memory_is_bounded(format, tmp_path):
    path = tmp_path / "foreign"
    path.mkdir()
    source = WRITERS[format](path)
    out = tmp_path / "out"
    out.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": IMPORTABLE},
    )
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    assert int(ran.stdout.split()[-1]) < LIMIT, ran.stdout
    whole = safetensors.torch.load_file(out / "whole.safetensors")
    for name in ("direct-whole.safetensors", "whole.pt", "direct-whole.pt"):
        other = safetensors.torch.load_file(out / name) if name.endswith("s") else torch.load(out / name)
        assert all(torch.equal(other[key], tensor) for key, tensor in whole.items())
    assert torch.equal(torch.load(out / "whole.pt", mmap=True)["big"], whole["big"])
    if format == "torch":
        assert torch.equal(whole["turned"], torch.arange(1 << 22, dtype=torch.float32).view(1 << 11, 1 << 11).t())
    half = safetensors.torch.load_file(out / "half.safetensors")
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in whole.items())
