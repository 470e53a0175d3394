"""One SLURM cluster for all tests here, as new for each of them.

Where this machine cannot run it the tests are skipped with the reason; in CI, that is with CI=true, they fail instead.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runs import train
from slurm_cluster import Cluster, running, wait_until, why_not
from submitted import RECIPE, STEPS, Project, Run, Uninterrupted

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
    with running() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with every node up and nothing on it, before and after."""
    yield running_cluster
    running_cluster.reset()


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Project:
    """A user's folder with a recipe."""
    return Project(cluster, tmp_path / "project")


@pytest.fixture(scope="session")
def uninterrupted(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The recipe, submitted to two nodes with two processes each and never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    project, run = Project(running_cluster, folder / "project"), Run(folder / "run")
    canaries = {
        name: f"canary-{name}-hunter2" for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "OF_MINE")
    }
    job = project.submit("--run-dir", run.path, each=2, environment=canaries)
    environments = set()

    def ended() -> str | None:
        for process in running_cluster.processes():
            with suppress(OSError):
                environments.add(Path(f"/proc/{process.pid}/environ").read_bytes())
        state = running_cluster.job(job)["JobState"]
        return state if state not in ("PENDING", "RUNNING", "COMPLETING") else None

    assert wait_until(ended, f"the end of job {job}", 120) == "COMPLETED", run.log()
    return Uninterrupted(project, run, job, canaries, environments)


@pytest.fixture(scope="session")
def uninterrupted_in_two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe, trained in two processes without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted-in-two")
    (folder / "paced.py").write_text((HERE / "paced.py").read_text())
    recipe = folder / "paced.yaml"
    recipe.write_text(RECIPE.format(folder=folder, steps=STEPS, wandb="off"))
    train(2, recipe, folder / "run")
    return Run(folder / "run")
