"""What the recipe that is meant needs: names and files that are there, data that can be read, trackers that answer."""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from distrain.config import RecipeError, UserError
from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.system.memory import gib

if TYPE_CHECKING:
    from distrain.datasets.base import Data

_READ_S = 2.0
"""Seconds for which samples are read."""
_ANSWER_S = 5.0


def recipe(context: Context) -> Iterator[Finding]:
    """Whether the recipe can be read, and the names and arguments in it are some."""
    if not context.source:
        return
    if context.recipe is None:
        yield error(context.recipe_problem, "the run is refused", f"correct {context.source}; distrain show prints it")
        return
    from distrain.training.checks import check_recipe

    try:
        check_recipe(context.recipe, context.source)
    except RecipeError as problem:
        for each in problem.problems:
            yield error(each, "the run is refused", f"correct {context.source}")
        return
    yield ok(f"{context.source}: {context.recipe.name}")


def weights(context: Context) -> Iterator[Finding]:
    """Whether the weights to start from are there, and can be opened."""
    if context.recipe is None or context.recipe.model.weights is None:
        return
    path = Path(context.recipe.model.weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "np") as file:
                    count = len(list(file.keys()))
            except SafetensorError as problem:
                raise OSError(str(problem)) from problem
            yield ok(f"{path}: {count} tensors")
            return
        with path.open("rb") as file:
            file.read(1)
        yield ok(f"{path}: {gib(path.stat().st_size)}")
    except OSError as problem:
        yield error(
            f"model.weights: {path}: {problem.strerror or problem}",
            "the run is refused, or ends before its first step",
            "correct model.weights in the recipe, or copy the whole file there",
        )


def data(context: Context) -> Iterator[Finding]:
    """Whether the data can be read, the first samples and some in between, and how fast."""
    if context.recipe is None:
        return
    section = context.recipe.data
    if section.path is not None and not Path(section.path).exists() and section.prepare is not None:
        yield ok(f"{section.path} is not there yet: data.prepare makes it at the start")
        return
    from distrain.data import build_data

    try:
        began = time.monotonic()
        built = build_data(context.recipe)
        opened = time.monotonic() - began
        yield from _read(context, built, opened)
    except UserError as problem:
        yield error(
            str(problem),
            "the run ends before its first step, or once it comes to this",
            "correct the data, or its section",
        )


def _read(context: Context, built: Data, opened: float) -> Iterator[Finding]:
    import numpy as np

    from distrain.data import build_transform
    from distrain.datasets.base import is_stream
    from distrain.datasets.batches import Batches
    from distrain.datasets.nested import tensors_in

    recipe = context.recipe
    assert recipe is not None
    source = built.splits["train"]
    for each in (*built.warnings, *getattr(source, "warnings", ())):
        yield warning(each, "it may be meant", "see docs/data.md where it is not")
    if is_stream(source):
        yield ok(f"a stream, opened in {opened:.1f} s")
        return
    if not len(source):
        return  # building it says so
    size = micro_batch(context)
    batches = Batches(source, build_transform(recipe, "train"), recipe.data.skip_corrupt)
    generator = np.random.default_rng(0)
    count = nbytes = 0
    corrupt: dict[int, str] = {}
    began = time.monotonic()
    while count == 0 or (time.monotonic() - began < _READ_S and count < 4 * len(source)):
        ids = np.arange(size) % len(source) if count == 0 else generator.integers(0, len(source), size)
        batch = batches.batch((np.zeros(size, np.int64), ids.astype(np.int64)))
        corrupt |= batch.get("corrupt_samples", {})
        nbytes += (largest := sum(each.nbytes for each in tensors_in(batch)))
        count += size
    seconds = max(time.monotonic() - began, 1e-6)
    if corrupt:
        yield warning(
            f"{len(corrupt)} corrupt samples of {count} that were read: {next(iter(corrupt.values()))}",
            "data.skip_corrupt lets the run pass over so many; one more is an error",
            "mend the files, or take them out",
        )
    yield from _in_shared_memory(context, largest)
    speed = f"{count / seconds:,.0f} samples/s ({nbytes / seconds / 1e6:,.1f} MB/s)"
    yield ok(f"{len(source):,} samples, opened in {opened:.1f} s; one process reads {speed}")


def micro_batch(context: Context) -> int:
    """Return the samples of a micro-batch: as stated, or for auto at most 32 of a process's share."""
    batch = context.recipe.batch  # type: ignore[union-attr]
    share = max(1, batch.global_batch_size // (context.processes * context.nodes))
    return min(share, 32) if batch.micro_batch_size == "auto" else int(batch.micro_batch_size)


def _in_shared_memory(context: Context, nbytes: int) -> Iterator[Finding]:
    """Yield an error where the batches of all loader processes do not fit into shared memory."""
    from distrain.datasets.loading import PREFETCH, SHARED_MEMORY

    needed = context.processes * context.workers * (PREFETCH + 1) * nbytes
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return  # said with the shared memory
    free = status.f_bavail * status.f_frsize
    if needed > free:
        yield error(
            f"batches of {gib(nbytes)} of {context.processes * context.workers} loader processes take {gib(needed)} of "
            f"shared memory, and {gib(free)} are free in {SHARED_MEMORY}",
            "loader processes end with a bus error",
            "make it larger (docker run --shm-size), or take fewer data.workers or a smaller batch.micro",
        )


def trackers(context: Context) -> Iterator[Finding]:
    """Whether the trackers of the recipe are installed, and those that send to a service can reach it."""
    if context.recipe is None:
        return
    log, variables = context.recipe.log, context.variables
    names = {each.name for each in log.trackers} | ({"wandb"} if log.wandb != "off" else set())
    found: list[Finding] = []
    for name in sorted(names & {"wandb", "mlflow", "trackio"}):
        if importlib.util.find_spec(name) is None:
            found.append(
                error(
                    f"{name} is not installed, and the recipe logs to it",
                    "the run has no such tracker",
                    f"pip install 'distrain[{name}]', or take it out of the recipe",
                )
            )
    if "wandb" in names and log.wandb == "online":
        found += _wandb(variables)
    address = variables.get("MLFLOW_TRACKING_URI", "")
    if "mlflow" in names and urlparse(address).scheme in ("http", "https"):
        found += _reached("mlflow", address, "unset MLFLOW_TRACKING_URI to write into a folder")
    yield from found
    if names and not found:
        yield ok(", ".join(sorted(names)))


def _wandb(variables: Any) -> list[Finding]:
    if variables.get("WANDB_MODE") in ("offline", "disabled"):
        return []
    address = variables.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    found = _reached("wandb", address, "take log.wandb: offline, and send the runs later (wandb sync)")
    host = urlparse(address).hostname or ""
    netrc = Path(variables.get("NETRC") or Path(variables.get("HOME", "/")) / ".netrc")
    if not variables.get("WANDB_API_KEY") and not (netrc.is_file() and host in netrc.read_text(errors="replace")):
        found.append(
            error(
                f"wandb has no key for {host}",
                "the run cannot log in, and goes on without this tracker",
                "wandb login, or export WANDB_API_KEY; or take log.wandb: offline",
            )
        )
    return found


def _reached(name: str, address: str, otherwise: str) -> list[Finding]:
    told = urlparse(address)
    port = told.port or (443 if told.scheme == "https" else 80)
    try:
        socket.create_connection((told.hostname or "", port), timeout=_ANSWER_S).close()
    except OSError as problem:
        return [
            warning(
                f"{name}: {told.hostname}:{port} does not answer: {problem.strerror or problem}",
                "the run waits for it at the start, and then goes on without this tracker",
                f"open the network or set a proxy, or {otherwise}",
            )
        ]
    return []
