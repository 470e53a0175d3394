"""The checks of this machine, in order, and what `distrain doctor` does with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from distrain.doctor.checks import Check, run_checks
from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, Report
from distrain.doctor.machine import CHECKS


def examine(
    context: Context,
    checks: Sequence[Check] = CHECKS,
    *,
    show: Callable[[Finding], None] | None = None,
) -> Report:
    """Return what all checks find on this machine; `show` is called with each finding as it comes."""
    began = time.monotonic()
    findings: list[Finding] = []
    for found in run_checks(checks, context):
        findings += found
        if show is not None:
            for each in found:
                show(each)
    return Report(tuple(findings), time.monotonic() - began)
