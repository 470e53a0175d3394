"""`RunRequest`: resolved once from what was typed and what is around it, with everything that is wrong told at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import Ended, captured, losses, train, write_recipe
from worlds import in_world

from distrain.config import UserError
from distrain.launchers import (
    EvaluationRequest,
    Options,
    RunRequest,
    StartEnvironment,
    open_run,
    read_target,
    resolve,
    resolve_evaluation,
    work,
    work_evaluation,
)
from distrain.launchers.slurm.node import request_of_job
from distrain.parallel import SourcedValue
from distrain.run.folder import RunDir
from distrain.run.json_files import append_row
from distrain.system.environment import Environment

ALONE = StartEnvironment(1, argv=("distrain", "train"))
TWO = StartEnvironment(2, here=2)
TORCHRUN = StartEnvironment(2, here=2, world=Environment(0, 0, 2, 2, launched=True))


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("environment", "options", "asked"),
    [
        (ALONE, Options(), (1, 1, "single", "none")),
        (ALONE, Options("ddp"), (1, 1, "single", "none")),
        (TWO, Options(), (2, 1, "ddp", "none")),
        (TWO, Options("zero3", "all", 2), (2, 1, "zero3", "all")),
        (TORCHRUN, Options("fsdp2", None, 2), (2, 1, "fsdp2", "none")),
        (StartEnvironment(8, 2, here=0), Options("zero2", "optimizer"), (8, 2, "zero2", "optimizer")),
    ],
)
@pytest.mark.parametrize("named", ["recipe", "run"])
def test_a_request_is_a_function_of_what_it_is_resolved_from(
    tmp_path: Path, named: str, environment: StartEnvironment, options: Options, asked: tuple[int, int, str, str]
) -> None:
    precision, batch = "train.precision=fp32", "batch.global=16"
    recipe, run = str(write_recipe(tmp_path)), str(tmp_path / "run")
    arguments: tuple[Any, ...] = (recipe, [precision, batch], run)
    if named == "run":
        made = resolve(read_target(*arguments), options, environment)
        open_run(made.run, made.given, made.launch())
        arguments = (run,)
    before = content(tmp_path)
    first, second = (resolve(read_target(*arguments), options, environment) for _ in range(2))
    assert first == second
    assert first.id == second.id
    assert content(tmp_path) == before, "nothing is written"
    assert (first.processes, first.nodes, first.strategy, first.offload) == asked
    assert (first.folder, first.is_run, first.given is None) == (run, named == "run", named == "run")
    assert first.recipe.recipe.batch.global_batch_size == 16
    back = RunRequest.from_json(first.to_json())
    assert back == first
    assert back.recipe.origins == first.recipe.origins
    assert replace(first, processes=3).id != first.id


def test_a_run_folder_holds_its_request(tmp_path: Path) -> None:
    request = resolve(read_target(str(write_recipe(tmp_path)), ["seed=3"], str(tmp_path / "run")), Options(), TWO)
    open_run(request.run, request.given, request.launch())
    found = RunRequest.of_run(RunDir(tmp_path / "run"))
    assert found is not None
    assert replace(found, recipe=request.recipe) == request
    assert found.recipe.recipe == request.recipe.recipe, "recipe.yaml is its recipe"
    assert "recipe" not in json.loads(request.run.launch_path.read_text())["request"]
    assert found.worker_arguments == (str(tmp_path / "run"), "--request", request.id)


def test_a_folder_of_an_earlier_version_holds_none_and_is_read(tmp_path: Path) -> None:
    request = resolve(read_target(str(write_recipe(tmp_path)), [], str(tmp_path / "run")), Options("fsdp2"), TWO)
    open_run(request.run, request.given, request.launch())
    record = json.loads(request.run.launch_path.read_text())
    del record["request"]
    request.run.launch_path.write_text(json.dumps(record))
    assert RunRequest.of_run(request.run) is None
    assert request_of_job(request.run, 1, 2, "auto", "auto") is None
    again = resolve(read_target(str(request.run.path)), Options(), TWO)
    assert (again.strategy, again.processes) == ("fsdp2", 2), "as it was started"


@pytest.mark.parametrize(
    ("nodes", "here", "strategy", "offload", "update", "fits"),
    [
        (1, 2, "auto", "auto", False, True),
        (1, 2, "fsdp2", "none", False, True),
        (2, 1, "auto", "auto", False, False),
        (1, 3, "auto", "auto", False, False),
        (1, 2, "zero2", "auto", False, False),
        (1, 2, "fsdp2", "all", False, False),
        (1, 2, "auto", "auto", True, False),
    ],
)
def test_a_node_takes_a_request_for_a_job_of_its_shape(
    tmp_path: Path, nodes: int, here: int, strategy: str, offload: str, update: bool, fits: bool
) -> None:
    asked = read_target(str(write_recipe(tmp_path)), [], str(tmp_path / "run"), update=update)
    request = resolve(asked, Options("fsdp2"), TWO)
    open_run(request.run, request.given, request.launch())
    assert (request_of_job(request.run, nodes, here, strategy, offload) is not None) == fits


# --------------------------------------------------------------------------------------------------------------------
# Everything that is wrong, at once

WRONG: dict[str, tuple[list[str], Options, StartEnvironment, list[str]]] = {
    "a recipe and the strategy": (
        ["model.hiden=[3]"],
        Options("single"),
        TWO,
        ["did you mean 'hidden'", "the strategy single is one process, found 2"],
    ),
    "a recipe that cannot be read, what cannot be offloaded, and GPUs": (
        ["optim.lr=-1", "seeed=1"],
        Options("ddp", "all"),
        replace(TWO, gpus=1),
        ["optim.lr", "did you mean 'seed'", "ddp cannot offload 'all'", "2 processes on this machine, which has 1 GPU"],
    ),
    "the batch, the precision and the launcher's file": (
        ["batch.global=15", "train.precision=fp64"],
        Options("zero2"),
        replace(TWO, configuration={"distributed_type": SourcedValue("FSDP", "a.yaml: distributed_type"),
                                    "fsdp_version": SourcedValue(2, "a.yaml: fsdp_version")}),
        ["zero2      --strategy", "fsdp2      a.yaml: distributed_type", "not a multiple of"],
    ),
    "processes, the recipe's names and the launcher's settings": (
        ["eval.metrics=[acuracy]"],
        Options(processes=3),
        replace(TORCHRUN, configuration={"gradient_clipping": SourcedValue(9.0, "a.yaml: gradient_clipping")}),
        ["this run asks for 3 processes, found 2", "did you mean 'accuracy'", "a.yaml: gradient_clipping is 9.0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("folder", ["new", "of others", "of another recipe"])
def test_everything_that_is_wrong_is_reported_at_once(tmp_path: Path, kind: str, folder: str) -> None:
    overrides, options, environment, said = WRONG[kind]
    recipe, run = str(write_recipe(tmp_path)), RunDir(tmp_path / "run")
    told = list(said)
    if folder == "of others":
        run.path.mkdir()
        (run.path / "thesis.tex").touch()
        told += ["holds files and is not a run"]
    elif folder == "of another recipe":
        made = resolve(read_target(recipe, ["seed=9"], str(run.path)), Options(), ALONE)
        open_run(run, made.given, made.launch())
        append_row(run.metrics_path, {"event": "train", "step": 1})
        told += ["seed: was 9, now 0"] * ("optim.lr=-1" not in overrides)  # which cannot be compared
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(read_target(recipe, overrides, str(run.path)), options, environment)
    message = str(caught.value)
    for words in told:
        assert message.count(words) == 1, (words, message)
    assert " things are wrong with this command; nothing was written.\n1. " in message
    assert content(tmp_path) == before


def test_one_thing_that_is_wrong_is_reported_as_it_is(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    with pytest.raises(UserError, match=r"\Athe strategy single is one process"):
        resolve(read_target(recipe), Options("single"), TWO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"\A.* is a folder without recipe\.yaml, so it is not a run"):
        resolve(read_target(str(tmp_path / "empty")), Options(), ALONE)


# --------------------------------------------------------------------------------------------------------------------
# Workers


def worker(run: str, request: str) -> Ended:
    """Train as a process that distrain's launcher has started."""
    return captured(lambda: work(run, request=request))


def test_workers_train_what_the_folder_holds(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), RunDir(tmp_path / "run")
    environment = replace(TWO, argv=("distrain", "train", "digits.yaml"))
    request = resolve(read_target(str(recipe), [], str(run.path)), Options(), environment)
    open_run(run, request.given, request.launch())
    recipe.write_text("of no use to the workers any more")
    ended = in_world(2, worker, str(run.path), request.id)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert run.launch().argv == ["distrain", "train", "digits.yaml"]
    after = RunRequest.of_run(run)
    assert after is not None
    assert after.id == request.id, "rank 0 records its start, and keeps what was asked for"
    train(2, write_recipe(tmp_path), tmp_path / "by-hand")
    assert losses(run.path) == losses(tmp_path / "by-hand")


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_of_another_request_or_world_write_nothing(tmp_path: Path, world_size: int) -> None:
    run = RunDir(tmp_path / "run")
    request = resolve(read_target(str(write_recipe(tmp_path)), [], str(run.path)), Options(), TWO)
    open_run(run, request.given, request.launch())
    before = content(tmp_path)
    for name, said in (
        (request.id, "this run asks for 2 processes, found 1"),
        ("0" * 12, "another attempt has replaced it"),
    ):
        if world_size == 2 and name == request.id:
            continue
        first, *others = in_world(world_size, worker, str(run.path), name)
        assert first.status == 1
        assert said in first.err
        assert all((rank.status, rank.err) == (1, "") for rank in others)
    assert content(tmp_path) == before


# --------------------------------------------------------------------------------------------------------------------
# Evaluations


def evaluation_worker(request: str) -> Ended:
    """Evaluate as a process that distrain's launcher has started."""
    return captured(lambda: work_evaluation(None, request=request))


def test_an_evaluation_is_resolved_once_and_its_workers_read_it(tmp_path: Path) -> None:
    run, environment = tmp_path / "run", StartEnvironment(2, here=2)
    train(1, write_recipe(tmp_path), run)
    before = content(tmp_path)
    request = resolve_evaluation(str(run), "valid", 2, environment, as_json=True)
    assert Path(request.checkpoint).parent == run / "checkpoints"
    again = resolve_evaluation(request.checkpoint, "valid", None, environment, as_json=True)
    assert again == request, "a run stands for one of its checkpoints"
    option, text = request.worker_arguments
    assert EvaluationRequest(**json.loads(text)) == request
    first, second = in_world(2, evaluation_worker, text)
    assert (option, first.status, second.status, second.out) == ("--request", 0, 0, ""), first.err
    values = json.loads(first.out)
    assert (values["checkpoint"], values["split"], values["processes"]) == (request.checkpoint, "valid", 2)
    alone, *_ = in_world(1, evaluation_worker, text)
    assert (alone.status, "this run asks for 2 processes, found 1" in alone.err) == (1, True)
    assert content(tmp_path) == before


def test_all_that_is_wrong_with_an_evaluation_is_told_at_once(tmp_path: Path) -> None:
    zero = {"distributed_type": SourcedValue("DEEPSPEED", "file: distributed_type")}
    environment = StartEnvironment(2, here=2, gpus=1, configuration=zero)
    with pytest.raises(UserError) as caught:
        resolve_evaluation(str(tmp_path / "none"), "test", 2, environment)
    assert str(caught.value).startswith("2 things are wrong with this command; nothing was written.")
