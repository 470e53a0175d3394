"""The NVIDIA GPUs of this machine, as the driver names them. Imports no torch, and asks no GPU."""

from __future__ import annotations

from pathlib import Path


def gpu_models() -> list[str]:
    """Return the different models of GPUs that are here, such as "NVIDIA H100 80GB HBM3"; empty: none."""
    models = set()
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        models |= {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}
    return sorted(models)
