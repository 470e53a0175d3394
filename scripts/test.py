"""Runs the tests: those of the cluster, which mostly wait for SLURM, beside all others, several at a time.

    python scripts/test.py [pytest's options]
    python scripts/test.py --all [pytest's options]
    python scripts/test.py --changed [pytest's options]

The first runs the tests that a merge must pass, the second also every combination of which they take a set that covers
them. What the others print is shown as it comes, then what those of the cluster printed, and last
how many tests passed. The third runs the quick ones of the rooms in which files differ from the main branch.
"""

from __future__ import annotations

import compileall
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
CLUSTER = "tests/cluster"
PYTEST = [sys.executable, "-m", "pytest"]

AT_A_TIME = min((os.cpu_count() or 1) + 1, 8)
"""How many tests run at a time, beside those of the cluster: one more than there are cores, for some wait."""

# neighbours share what their file sets up; who is done takes from the end of another's list
SPREAD = ["-n", str(AT_A_TIME), "--dist", "worksteal"]

BEHIND = {"loop.py": "training", "data.py": "datasets", "models.py": "networks", "checkpoint.py": "checkpoints"}
"""The room that tests what is behind a front door."""


def counts(report: Path) -> Counter[str]:
    """Return how many tests of a report in JUnit's form passed, failed and were skipped; without one, one failed."""
    if not report.exists():
        return Counter(failed=1)
    found: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        failed, skipped = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
        found += Counter(passed=int(suite.get("tests", 0)) - failed - skipped, failed=failed, skipped=skipped)
    return found


def every_test(options: list[str]) -> int:
    """Run those of a merge, or more by the options; returns the exit status, 0 only if all passed."""
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder, f"{name}.xml") for name in ("cluster", "others")}
        printed = Path(folder, "cluster.txt")
        pytest = [*PYTEST, "-o", "junit_family=xunit1"]
        every = [option for option in options if option == "--all"]
        with printed.open("wb") as out:
            beside = subprocess.Popen(
                [*pytest, CLUSTER, *every, "-p", "no:cacheprovider", f"--junitxml={reports['cluster']}"],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            others = subprocess.run(
                [*pytest, f"--ignore={CLUSTER}", f"--junitxml={reports['others']}", *SPREAD, *options], check=False
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


def git(*arguments: str) -> list[str]:
    """Return the lines that a git command prints; none where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files() -> list[str]:
    """Return the files that differ from where this branch left the main one."""
    base = git("merge-base", "HEAD", "main") or git("merge-base", "HEAD", "origin/main") or ["HEAD"]
    return [*git("diff", "--name-only", base[0]), *git("ls-files", "--others", "--exclude-standard")]


def tests_of(files: list[str]) -> list[str]:
    """Return the folders and files of tests that hold these files, and the test of the house."""
    found = {"tests/test_architecture.py"}
    for file in files:
        top, _, rest = file.partition("/")
        if top == "distrain":
            room = rest.partition("/")[0]
            found.add(f"tests/{BEHIND.get(room, room.removesuffix('.py'))}")
        elif top == "tests" and Path(file).name.startswith("test_"):
            found.add(file)
        elif top == "recipes":
            found.add("tests/test_recipes.py")
    return sorted(each for each in found if (ROOT / each).exists())


def main() -> int:
    """Run what is asked for; returns the exit status."""
    options = sys.argv[1:]
    # once, for the thousands of processes that import them where Python is told to write no bytecode
    for folder in ("distrain", "tests", "benchmarks"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    if "--changed" not in options:
        return every_test(options)
    options.remove("--changed")
    chosen = tests_of(changed_files())
    print("testing", *chosen, flush=True)
    return subprocess.run([*PYTEST, "-m", "not slow", *SPREAD, *chosen, *options], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
