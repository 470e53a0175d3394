"""GPUs by name and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.config import UserError
from distrain.plan.gpus import GPUS, find_gpu, known_gpu

FILE = (
    "memory_gib: 64\ntflops: {half: 181, fp32: 45}\nmemory_gb_per_s: 1600\nlink_gb_per_s: 50\nnetwork_gb_per_s: 12.5\n"
)


def test_a_name_may_be_written_as_people_write_it() -> None:
    assert find_gpu("H100") == find_gpu("h100") == GPUS["h100"]
    assert find_gpu("A100 40GB") == GPUS["a100-40gb"]


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Quadro P400", None),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(driver: str, name: str | None) -> None:
    found = known_gpu(driver)
    assert (found.name if found is not None else None) == name


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"found 'h10', expected one of b200, h200, h100.*cpu, or a file.*did you mean"):
        find_gpu("h10")


def test_a_file_describes_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    gpu = find_gpu(str(path))
    assert (gpu.name, gpu.memory, gpu.peak("half"), gpu.device_type) == ("mine", 64 * 2**30, 181e12, "cuda")
    assert gpu.peak("tf32") == gpu.peak("fp32") == 45e12, "of what it lacks, the next wider one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("memory_gib: 64\n", ""), "memory_gib: is missing, expected GiB of its memory"),
        (FILE.replace("64", "-1"), "memory_gib: found -1, expected a number above 0"),
        (FILE + "memory_gb: 3\n", "memory_gb: unknown; did you mean"),
        (FILE.replace("half", "bf16"), "tflops: found .*, expected TFLOP/s by kind of number"),
        (FILE.replace("181", "fast"), "tflops.half: found 'fast'"),
        ("- 1\n", "holds list, expected keys: memory_gib"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        find_gpu(str(path))


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        find_gpu("nowhere.yaml")
