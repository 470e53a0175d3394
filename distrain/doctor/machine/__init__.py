"""The checks of one machine, in the order in which they are shown."""

from __future__ import annotations

from distrain.doctor.checks import Check
from distrain.doctor.machine.processes import open_files

CHECKS: tuple[Check, ...] = (Check("open files", open_files),)
