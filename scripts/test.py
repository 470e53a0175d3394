"""Runs every test: those of the cluster, which mostly wait for SLURM, beside all others, several at a time.

    python scripts/test.py [pytest's options]

What the others print is shown as it comes, then what those of the cluster printed, and last how many tests passed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

CLUSTER = "tests/cluster"

AT_A_TIME = max(2, min(os.cpu_count() or 1, 8))
"""How many tests run at a time, beside those of the cluster: many are one process, and some wait."""


def counts(report: Path) -> Counter[str]:
    """Return how many tests of a report in JUnit's form passed, failed and were skipped; without one, one failed."""
    if not report.exists():
        return Counter(failed=1)
    found: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        failed, skipped = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
        found += Counter(passed=int(suite.get("tests", 0)) - failed - skipped, failed=failed, skipped=skipped)
    return found


def main() -> int:
    """Run both; returns the exit status, 0 only if all passed."""
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder, f"{name}.xml") for name in ("cluster", "others")}
        printed = Path(folder, "cluster.txt")
        # neighbours share what their file sets up; who is done takes from the end of another's list
        spread = ["-n", str(AT_A_TIME), "--dist", "worksteal"]
        pytest = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1"]
        with printed.open("wb") as out:
            beside = subprocess.Popen(
                [*pytest, CLUSTER, "-p", "no:cacheprovider", f"--junitxml={reports['cluster']}"],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            others = subprocess.run(
                [*pytest, f"--ignore={CLUSTER}", f"--junitxml={reports['others']}", *spread, *sys.argv[1:]], check=False
            ).returncode
            cluster = beside.wait()
        finally:
            if beside.poll() is None:
                beside.send_signal(signal.SIGINT)  # it ends its daemons
                beside.wait()
        print(printed.read_text(errors="backslashreplace"), flush=True)
        total = counts(reports["cluster"]) + counts(reports["others"])
        print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
        return others or cluster


if __name__ == "__main__":
    sys.exit(main())
