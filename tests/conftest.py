"""What every test shares: one thread for each process, no network, and no GPU but in tests marked `gpu`."""

import os

# before torch is imported anywhere
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
# the driver is asked how many GPUs there are, without CUDA being started: what is forked later could not use it
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import functools
import gc
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.testing
from browser import Browser, find_chromium
from hypothesis import settings
from reliability import Reliability
from worlds import share_server

from distrain.system.importing import freeze

# each of a thousand calls would build the whole command line anew
typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]

# what is imported and collected stays: Python would look through all of it again and again, a fifth of the time
gc.disable()

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine takes any time for an example
settings.load_profile("untimed")

# a test may run in a process that was told to ignore SIGINT, and what it starts would ignore it as well
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
HAS_GPU = torch.cuda.is_available()
# what tests compile is kept for those to come, but not among what the user's own runs have compiled
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/distrain-tests-{os.getuid()}")
# tests say what CPUs compute, and several at a time would not fit into a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Collect garbage from here on, which nothing is that is there by now."""
    freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def gpus_where_they_are_meant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show a test marked `gpu`, and what it starts, the GPUs of this machine."""
    if request.node.get_closest_marker("gpu") is None:
        return
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


@pytest.fixture(scope="session")
def every_combination(request: pytest.FixtureRequest) -> bool:
    """Return whether every combination is asked for, and not only a set that covers them."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return a headless Chromium; tests that ask for it are skipped where there is none."""
    if find_chromium() is None:
        pytest.skip("needs Chromium, which `sh scripts/install-chromium.sh` installs")
    with Browser() as found:
        yield found


@pytest.fixture(autouse=True)
def blocked_signals_as_before() -> Iterator[None]:
    """Give this process back the signals that it blocks where it trains; what it starts would inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    while signal.sigpending() - before:
        signal.sigwait(signal.sigpending())
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Take down what a command has set up for lines of the log."""
    yield
    if (logs := sys.modules.get("distrain.system.logs")) is not None:
        logs.reset()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes the page of faults, and the one for every combination."""
    parser.addoption("--reliability", type=Path, metavar="PAGE", help="put what tests of faults find into this page")
    parser.addoption("--all", action="store_true", help="test every combination where a covering set stands for them")


def pytest_configure(config: pytest.Config) -> None:
    """Collect what tests of faults find; of several processes that test, start what they fork from."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        share_server()
    config.pluginmanager.register(Reliability(config.getoption("--reliability")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `more`, unless asked for; skip those marked `gpu` where there is none, with the reason."""
    if not config.getoption("--all"):
        more = [item for item in items if _is_marked(item, "more")]
        config.hook.pytest_deselected(items=more)
        items[:] = [item for item in items if not _is_marked(item, "more")]
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU and this machine has none")
    for item in items:
        if _is_marked(item, "gpu"):
            item.add_marker(skip)


def _is_marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None  # its keywords also hold the folder that the tests are in
