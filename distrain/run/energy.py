"""The energy that this process's GPU has taken, as NVML tells it. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class EnergyMeter:
    """Reads the counter of one GPU, or its power now and then where it has no counter. Called by one thread."""

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.monotonic):
        """`nvml` is the module `pynvml`, initialised; raises its error where the GPU tells neither."""
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._joules = 0.0
        try:
            self._before: float | None = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:
            self._before = None
            self._at, self._watts = clock(), nvml.nvmlDeviceGetPowerUsage(handle) / 1e3

    def read_wh(self) -> float:
        """Return the watt-hours since it was made; the last known where NVML fails."""
        nvml = self._nvml
        with suppress(nvml.NVMLError):
            if self._before is not None:
                self._joules = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3 - self._before
            else:
                now, watts = self._clock(), nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
                self._joules += (now - self._at) * (watts + self._watts) / 2
                self._at, self._watts = now, watts
        return self._joules / 3600


def meter_of_this_process(local_rank: int) -> EnergyMeter | None:
    """Return the meter of the GPU that this process computes on; None where there is none, or no `pynvml`.

    None also before torch has a GPU at work in this process, which imports nothing and starts nothing for this.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        device = torch.cuda.get_device_properties(local_rank % torch.cuda.device_count())
        return EnergyMeter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid}"))
    except (pynvml.NVMLError, AttributeError):
        return None
