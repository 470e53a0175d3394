"""Files that others can write: what is too large is refused before it is read, and numbers are numbers."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.checkpoint import read_manifest
from distrain.checkpoints.foreign.common import read_json
from distrain.config import UserError
from distrain.datasets.tokens import load_tokenizer, read_index
from distrain.launchers.slurm.sites import load_site
from distrain.launchers.sweeps import read_sweep
from distrain.parallel import accelerate_config as configuration
from distrain.run.folder import Launch, RunDir
from distrain.run.heartbeat import read_heartbeat
from distrain.run.lease import Holder, check_free
from distrain.run.micro_batch import cached_micro_batch
from distrain.system.bounded_json import RECORD, parse_json, read_bounded
from distrain.system.job_environment import JobEnvironment

HUGE = 8 << 30


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", '{"a": [1E+400]}', "1" * 400 + ".5"),
        *("18446744073709551616", "-9223372036854775809", "1" * 5000),
        *('{"a": 1, "a": 1}', "[" * 100_000, '{"a":' * 100_000, "", "{", "\x00", "[1,]"),
    ],
)
def test_what_is_no_json_that_can_be_kept(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse_json(text.encode())
    assert len(str(refused.value)) < 200


def test_numbers_that_json_can_hold() -> None:
    values = [0, -1, 2**64 - 1, -(2**63), 1.7976931348623157e308, 5e-324, "1e999", "1" * 400]
    assert parse_json(json.dumps(values).encode()) == values
    assert parse_json(b"1e-999") == 0.0
    assert type(parse_json(b"1e308")) is float
    with pytest.raises(ValueError, match=r"decode"):
        parse_json(b'"\xff"')


# --------------------------------------------------------------------------------------------------------------------
# Every file that is read whole


def of_run(read: Callable[[RunDir], Any]) -> Callable[[Path], Any]:
    return lambda path: read(RunDir(path.parent))


READERS: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "launch.json": (of_run(RunDir.launch), "launch.json cannot be read"),
    "effect.json": (of_run(RunDir.effect), "effect.json .*cannot be read"),
    "FINISHED": (of_run(lambda run: run.finished), None),
    "FAILED.json": (of_run(lambda run: run.failed), None),
    "PREEMPTED": (of_run(lambda run: run.preempted), None),
    "metrics.jsonl": (of_run(lambda run: list(run.rows())), r"metrics\.jsonl:1 "),
    "lease.json": (of_run(lambda run: check_free(run, Holder.of_this_process(JobEnvironment()))), None),
    "heartbeat/rank-0.json": (lambda path: read_heartbeat(RunDir(path.parent.parent), 0), None),
    "micro_batch.json": (of_run(lambda run: cached_micro_batch(run, None)), None),  # type: ignore[arg-type]
    "sweep.json": (lambda path: read_sweep(path.parent), "sweep.json cannot be read"),
    "index.json": (lambda path: read_index(path.parent), "index.json is not an index of tokens"),
    "tokenizer.json": (lambda path: load_tokenizer(path, eos=False), "is not a Hugging Face tokenizer"),
    "ds.json": (
        lambda path: configuration._from_deepspeed(configuration.SourcedValue(str(path), "the command line")),
        "configuration .*cannot be read",
    ),
    "MANIFEST.json": (lambda path: read_manifest(path.parent), r"MANIFEST\.json: "),
    "model.safetensors.index.json": (read_json, r"index\.json"),
}
"""How each file is read, and what the refusal says; None: it counts as damaged, and no error comes of it."""


def refused(name: str, path: Path) -> str:
    read, says = READERS[name]
    if says is None:
        return str(read(path))
    with pytest.raises(UserError, match=says) as error:
        read(path)
    return str(error.value)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create("name: x\n", Launch.describe(1, "single"))
    run.heartbeat_path(0).parent.mkdir()
    return run


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_so_large_costs_no_memory(run: RunDir, name: str) -> None:
    path = run.path / name
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, HUGE)  # a hole, as a crash of the file system leaves
    tracemalloc.start()
    try:
        refused(name, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # of a file of rows a line can be long, and only its end tells how long it is
    assert peak < (200 << 20 if name == "metrics.jsonl" else 8 << 20)


@pytest.mark.parametrize("name", [name for name in READERS if name != "metrics.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run: RunDir, name: str) -> None:
    path = run.path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if name in ("index.json", "tokenizer.json"):
        with pytest.raises(UserError, match="there is no"):
            READERS[name][0](path)
    else:
        refused(name, path)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" * 400])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("launch.json", '{"processes": N, "strategy": "ddp", "argv": [], "versions": {}, "commit": null, "host": "x"}'),
        ("effect.json", '{"total_steps": N}'),
        ("FINISHED", '{"steps": 3, "test": {"loss": N}}'),
        ("metrics.jsonl", '{"event": "train", "step": N}\n'),
        ("metrics.jsonl", '{"event": "train", "step": 1, "loss": N}\n'),
        ("ds.json", '{"zero_optimization": {"reduce_bucket_size": N}}'),
        ("model.safetensors.index.json", '{"metadata": {"total_size": N}}'),
        ("index.json", '{"format": N}'),
    ],
)
def test_a_number_that_is_none_is_refused_where_it_is_read(run: RunDir, name: str, text: str, number: str) -> None:
    path = run.path / name
    path.write_text(text.replace("N", number))
    said = refused(name, path)
    assert "finite" in said or "number" in said, said


@pytest.mark.parametrize("field", ["processes", "strategy", "argv", "offload"])
@pytest.mark.parametrize("value", [-1, 1e30, None, True, [3], {"a": 1}])
def test_a_launch_has_values_of_their_kind(run: RunDir, field: str, value: Any) -> None:
    record = json.loads(run.launch_path.read_text())
    run.launch_path.write_text(json.dumps(record | {field: value}))
    with pytest.raises(UserError, match=rf"launch.json cannot be read: {field}"):
        run.launch()


@pytest.mark.parametrize(("key", "value"), [("step", -1), ("steps", 1e30), ("exported_step", "8"), ("steps", 10**18)])
def test_a_marker_with_an_invalid_step_is_an_error(run: RunDir, key: str, value: Any) -> None:
    (run.path / "FINISHED").write_text(json.dumps({key: value}))
    assert run.finished is not None
    assert f"FINISHED in {run.path} cannot be read: {key} is" in run.finished["error"]


@pytest.mark.parametrize(
    "row", [{"step": 1}, {"event": "train", "step": -1}, {"event": 3, "step": 1}, {"event": "train"}, [1]]
)
def test_a_row_without_its_keys_is_refused(run: RunDir, row: Any) -> None:
    run.metrics_path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl.*take that line out of the file"):
        list(run.rows())


def test_a_site_or_recipe_with_an_infinite_number(tmp_path: Path) -> None:
    from distrain.config.yaml import load_recipe

    site = tmp_path / "s.yaml"
    for text in ("notice_s: 1e999\n", "cpus_per_gpu: .inf\n"):
        site.write_text(text)
        with pytest.raises(UserError, match=r"1\.8e308|finite"):
            load_site(str(site))
    recipe = tmp_path / "r.yaml"
    sound = (
        "name: a\ntask: classification\ndata: digits\nmodel: {name: mlp, p: 1}\nbatch: {global: 4}\ntrain: {steps: 1}\n"
    )
    recipe.write_text(sound)
    for override in (
        *("optim.lr=1e999", "optim.lr=.nan", "model.p=1e999", "train.epochs=1e999", "batch.global=1e999", "seed=1e999"),
        *("checkpoint.every=1e999 steps", "train.tokens=" + "9" * 30),
    ):
        with pytest.raises(UserError, match=r"1\.8e308|finite|2\^63|1e\+?999|below|number"):
            load_recipe(recipe, [override])


def test_reading_at_most(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bounded(path, 100) == b"x" * 100
    with pytest.raises(ValueError, match="it has 100 bytes, and at most 99 are expected"):
        read_bounded(path, 99)
    with pytest.raises(ValueError, match="not a regular file"):
        read_bounded(tmp_path)
    with pytest.raises(ValueError, match="it has more than the 10 bytes"):
        read_bounded(Path("/proc/self/maps"), 10)  # says that it has none
    assert RECORD < HUGE
