"""One SLURM cluster for all tests here, as new for each of them.

Where this machine cannot run it the tests are skipped with the reason; in CI, that is with CI=true, they fail instead.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, why_not

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what SLURM has logged beside a failure."""
    outcome: Any = yield
    report, cluster = outcome.get_result(), getattr(item, "funcargs", {}).get("cluster")
    if report.failed and report.when == "call" and cluster is not None:
        report.sections.append(("SLURM", cluster.words()))


def needs_cluster() -> None:
    """Skip, or in CI fail, where this machine cannot run a cluster."""
    if (reason := why_not()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the tests of the cluster: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """The cluster, from the first test that asks for it to the end of the session."""
    needs_cluster()
    # not below pytest's own folder: daemons have paths that must stay short and that every user may pass through
    folder = Path(tempfile.mkdtemp(prefix="distrain-cluster-"))
    folder.chmod(0o755)
    running = Cluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node up and nothing on it, before and after."""
    yield running_cluster
    running_cluster.reset()
