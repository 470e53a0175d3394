"""What GPUs can compute at most, by their data sheets. Imports no torch."""

from __future__ import annotations

PEAK_TFLOPS = {
    # NVIDIA's data sheets, dense: half of what they state with sparsity. The more special name comes first
    "H100 PCIe": {"half": 756.0, "tf32": 378.0, "fp32": 51.0, "fp8": 1513.0},
    "H100 NVL": {"half": 835.0, "tf32": 417.5, "fp32": 60.0, "fp8": 1670.5},
    "H100": {"half": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.9},
    "H200 NVL": {"half": 835.5, "tf32": 417.5, "fp32": 60.0, "fp8": 1670.5},
    "H200": {"half": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.9},
    "GH200": {"half": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.9},
    "GB200": {"half": 2500.0, "tf32": 1250.0, "fp32": 80.0, "fp8": 5000.0},
    "B200": {"half": 2250.0, "tf32": 1125.0, "fp32": 75.0, "fp8": 4500.0},
    "A100": {"half": 312.0, "tf32": 156.0, "fp32": 19.5},
    "A30": {"half": 165.0, "tf32": 82.0, "fp32": 10.3},
    "A40": {"half": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A10G": {"half": 70.0, "tf32": 35.0, "fp32": 35.0},
    "A10": {"half": 125.0, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"half": 362.1, "tf32": 183.0, "fp32": 91.6, "fp8": 733.0},
    "L40": {"half": 181.1, "tf32": 90.5, "fp32": 90.5, "fp8": 362.0},
    "L4": {"half": 121.0, "tf32": 60.0, "fp32": 30.3, "fp8": 242.0},
    "V100": {"half": 125.0, "fp32": 15.7},
    "T4": {"half": 65.0, "fp32": 8.1},
    "RTX 4090": {"half": 165.2, "tf32": 82.6, "fp32": 82.6, "fp8": 330.3},
    "RTX 3090": {"half": 71.2, "tf32": 35.6, "fp32": 35.6},
}
"""TFLOP/s by a part of the name that the driver gives a GPU, and by kind of number."""

_KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "fp32", "fp8": "fp8"}


def peak_tflops(gpu: str, precision: str) -> float | None:
    """Return the TFLOP/s that a GPU of this name reaches at most in `train.precision`; None: not in the table."""
    words = f" {gpu.replace('-', ' ')} "
    for name, peaks in PEAK_TFLOPS.items():
        if f" {name} " in words:
            return peaks.get(_KINDS.get(precision, ""))
    return None
