"""GPUs by name, and from a file: memory, operations and bytes per second, links. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distrain.config import UserError, close_names
from distrain.system.memory import GIB
from distrain.system.output import error_line
from distrain.system.peak_flops import PEAK_TFLOPS

CPU = "cpu"


@dataclass(frozen=True)
class Gpu:
    """What one GPU can, by its data sheet."""

    name: str
    memory_gib: float
    """That its driver shows."""
    tflops: Mapping[str, float]
    """TFLOP/s at most, dense, by kind of number: half (bf16, fp16), tf32, fp32, fp8."""
    memory_gb_per_s: float
    """GB/s of its memory."""
    link_gb_per_s: float
    """GB/s that it sends to the others of its node, in one direction."""
    network_gb_per_s: float
    """GB/s that it sends to other nodes; assumed: one adapter for each GPU, as is usual for its kind."""
    bf16: bool = True
    """Whether it computes with bf16."""

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)

    def peak(self, kind: str) -> float:
        """Return its FLOP/s at most for a kind of number; of one that it lacks, those of the next wider one."""
        order = ("fp8", "half", "tf32", "fp32")
        for name in order[order.index(kind) :]:
            if name in self.tflops:
                return self.tflops[name] * 1e12
        return min(self.tflops.values()) * 1e12

    @property
    def device_type(self) -> str:
        """cuda, or cpu for the processors of this machine."""
        return "cpu" if self.name == CPU else "cuda"


def _of(name: str, key: str, memory_gib: float, memory: float, link: float, network: float, **more: Any) -> Gpu:
    return Gpu(name, memory_gib, PEAK_TFLOPS[key], memory, link, network, **more)


GPUS = {
    each.name: each
    for each in (
        # memory as the driver shows it; NVLink and PCIe in one direction, by NVIDIA's data sheets
        _of("b200", "B200", 178.3, 8000, 900, 50),
        _of("h200", "H200", 139.8, 4800, 450, 50),
        _of("h100", "H100", 79.1, 3350, 450, 50),
        _of("h100-nvl", "H100 NVL", 93.1, 3900, 300, 25),
        _of("h100-pcie", "H100 PCIe", 79.1, 2000, 64, 25),
        _of("a100", "A100", 79.2, 2039, 300, 25),
        _of("a100-40gb", "A100", 39.4, 1555, 300, 25),
        _of("l40s", "L40S", 44.4, 864, 32, 25),
        _of("l4", "L4", 22.0, 300, 32, 12.5),
        _of("a10g", "A10G", 22.1, 600, 32, 12.5),
        _of("v100", "V100", 31.7, 900, 150, 12.5, bf16=False),
        _of("t4", "T4", 14.6, 320, 16, 6.25, bf16=False),
        _of("rtx4090", "RTX 4090", 23.5, 1008, 32, 12.5),
        _of("rtx3090", "RTX 3090", 23.7, 936, 32, 12.5),
    )
}


def find_gpu(given: str) -> Gpu:
    """Return the GPU of that name, or that a file describes; raises UserError naming those that are known."""
    name = given.lower().replace(" ", "-").replace("_", "-")
    if name in GPUS:
        return GPUS[name]
    if Path(given).suffix in (".yaml", ".yml", ".json") or Path(given).is_file():
        return _from_file(Path(given))
    raise UserError(
        f"--gpu: found {given!r}, expected one of {', '.join(GPUS)}, cpu, or a file that describes a GPU "
        f"(docs/plan.md){close_names(name, GPUS)}"
    )


def known_gpu(driver_name: str) -> Gpu | None:
    """Return the GPU that a driver calls so, such as "NVIDIA H100 80GB HBM3"; None where it is not in the table."""
    words = driver_name.lower().replace("-", " ").split()
    joined = "".join(words)
    found = [each for each in GPUS.values() if all(part in joined for part in each.name.split("-"))]
    return max(found, key=lambda each: len(each.name), default=None)


_KEYS = {
    "memory_gib": "GiB of its memory",
    "tflops": "TFLOP/s by kind of number, such as {half: 312, tf32: 156, fp32: 19.5}",
    "memory_gb_per_s": "GB/s of its memory",
    "link_gb_per_s": "GB/s that it sends to the others of its node",
    "network_gb_per_s": "GB/s that it sends to other nodes",
}
_KINDS = ("half", "tf32", "fp32", "fp8")


def _from_file(path: Path) -> Gpu:
    import yaml

    from distrain.config.yaml.strict_yaml import Tree, dotted

    try:
        tree = Tree.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--gpu: {path} cannot be read: {error_line(error)}") from error
    values = tree.value
    problems = [f"{dotted(place)}: {problem}" for place, problem in tree.problems]
    if not isinstance(values, dict):
        raise UserError(f"--gpu: {path} holds {type(values).__name__}, expected keys: {', '.join(_KEYS)}")
    names = {each.name for each in fields(Gpu)}
    problems += [f"{key}: unknown{close_names(str(key), names)}" for key in values if key not in names]
    problems += [f"{key}: is missing, expected {what}" for key, what in _KEYS.items() if key not in values]
    numbers = {key: values[key] for key in _KEYS if key in values and key != "tflops"}
    tflops = values.get("tflops", {})
    if not isinstance(tflops, dict) or not tflops or any(kind not in _KINDS for kind in tflops):
        problems += [f"tflops: found {tflops!r}, expected {_KEYS['tflops']}"] if "tflops" in values else []
    else:
        numbers |= {f"tflops.{kind}": value for kind, value in tflops.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            problems.append(f"{key}: found {value!r}, expected a number above 0")
    if problems:
        raise UserError(f"--gpu: {path}: " + "; ".join(problems))
    known = {key: value for key, value in values.items() if key in names}
    return Gpu(**{"name": path.stem, **known})
