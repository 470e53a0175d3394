"""A recipe's plan: its passes are those of the run, and what is said of it is what a person and a program read."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import rows, train, write_recipe
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from distrain.checkpoint import Reader
from distrain.cli.main import app
from distrain.config import Recipe, UserError
from distrain.config.registry import optimizers
from distrain.config.yaml import parse_recipe
from distrain.data import build_data
from distrain.models import build_model
from distrain.parallel.precision import resolve
from distrain.plan.command import plan_recipe
from distrain.plan.gpus import GPUS, Gpu
from distrain.plan.planning import gpu_here, make_plan
from distrain.plan.tracing import Planned, Tracer
from distrain.training.tasks import TaskContext, build_objective

CPU = torch.device("cpu")
GPT = """
name: planned
task: language_modeling
data: {name: python_source, seq_len: 64, max_bytes: 20_000, split: [0.9, 0.1]}
model: {name: gpt, n_layer: 3, n_head: 4, d_model: 64}
optim: {name: adamw, lr: 1.0e-3, clip_norm: 1.0}
batch: {global: 32, micro: 8}
train: {steps: 100, precision: fp32}
checkpoint: {every: 10 steps, keep: 2, keep_best: 0}
"""
RESNET = """
name: planned
task: classification
data: {name: digits, split: [0.9, 0.1]}
model: {name: resnet18}
optim: {name: sgd, lr: 0.1}
batch: {global: 32, micro: 8}
train: {steps: 10, precision: fp32}
"""
SMALL = Gpu("small", 1.2, {"half": 100.0, "fp32": 10.0}, 500, 10, 1)
"""A GPU with little memory beside what CUDA takes."""


def recipe(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, "test", overrides)


def measured(given: Recipe, rows: int) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass allocate at most, and the gradients, with values."""
    data = build_data(given)
    planned = Planned.of(given, resolve("fp32", CPU), "cpu")
    batch = planned.batch(Tracer(planned, rows, checkpointing=False).feed, rows)
    objective, model = build_objective(given, data.meta), build_model(given, data.meta)
    objective.bind(model, TaskContext.of(given, data.meta, CPU, Path("unused")))
    model.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        objective.loss_sum(model, batch).backward()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("text", [GPT, RESNET], ids=["gpt", "resnet"])
def test_a_pass_without_values_is_alive_as_one_with_values(text: str) -> None:
    given = recipe(text)
    trace = Tracer(Planned.of(given, resolve("fp32", CPU), "cpu"), 8, checkpointing=False).trace(8)
    peak, gradients = measured(given, 8)
    arrived = torch.zeros(len(trace.live) + 1)
    model = build_model(given, build_data(given).meta)
    sizes = {name: each.nbytes for name, each in model.named_parameters()}
    for name, at in trace.arrivals.items():
        arrived[at] += sizes[name]
    whole = torch.from_numpy(trace.live) + arrived.cumsum(0)[:-1]
    assert sum(sizes[name] for name in trace.arrivals) == gradients
    # a convolution lays its weights out anew for the processor, which no tensor shows
    assert float(whole.max()) == pytest.approx(peak, rel=0.02 if text == GPT else 0.3)


def test_operations_are_those_of_theory() -> None:
    given = recipe(RESNET.replace("resnet18", "mlp, hidden: [32, 16]"), "batch.micro=8")
    trace = Tracer(Planned.of(given, resolve("fp32", CPU), "cpu"), 8, checkpointing=False).trace(8)
    layers = (64 * 32, 32 * 16, 16 * 10)
    # forward, and the gradients of weights and of inputs, but for those of the data
    assert trace.flops.sum() == 2 * 8 * (3 * sum(layers) - layers[0])
    assert trace.samples == 8
    assert trace.batch_bytes == 8 * (64 * 4 + 8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_operations_of_attention_count_on_every_device(device: str) -> None:
    trace = Tracer(Planned.of(recipe(GPT), resolve("fp32", CPU), device), 8, checkpointing=False).trace(8)
    layers, width, length, vocabulary = 3, 64, 64, 256
    weights = layers * 12 * width * width + vocabulary * width
    # flash attention computes its scores once more in the backward pass
    assert trace.flops.sum() == pytest.approx(8 * length * (6 * weights + 12 * layers * width * length), rel=0.05)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    planned = Planned.of(recipe(GPT), resolve("fp32", CPU), "cpu")
    plain, again = (Tracer(planned, 8, checkpointing=each).trace(8) for each in (False, True))
    assert again.live.max() < 0.8 * plain.live.max()
    assert again.flops.sum() > 1.2 * plain.flops.sum()


def test_a_plan_on_several_gpus_recommends_the_simplest_that_fits() -> None:
    plan = make_plan(recipe(GPT, "batch.micro=4"), GPUS["h100"], 2, 2)
    assert {each.strategy for each in plan.options} == {"ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp"}
    assert {each.checkpointing for each in plan.options} == {True, False}
    assert all(each.fits for each in plan.options)
    assert plan.chosen is not None
    assert (plan.chosen.strategy, plan.chosen.checkpointing) == ("ddp", False)
    assert (plan.chosen.micro, plan.chosen.accumulation) == (4, 2)
    assert plan.precision == "bf16" or plan.precision == "fp32"
    assert (plan.checkpoints, plan.kept) == (10, 2)
    elements = plan.model.trained_elements
    assert plan.checkpoint_bytes == pytest.approx(12 * elements, rel=0.01)
    assert json.loads(json.dumps(plan.to_json()))["recommended_arguments"] == ["--strategy", "ddp"]


def test_a_planned_checkpoint_has_the_bytes_of_a_runs(tmp_path: Path) -> None:
    changed = ("optim.freeze=['layer[1-3].*']", "train.ema=0.9", "batch.micro=32")
    train(1, write_recipe(tmp_path, RESNET), tmp_path / "run", *changed, "train.steps=1")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    plan = make_plan(recipe(RESNET, *changed, "train.steps=45"), GPUS["h100"])
    assert plan.checkpoint_bytes == pytest.approx(stored, rel=0.01)
    assert plan.checkpoints == 10  # each 4.5 steps
    of_run = plan_recipe(str(tmp_path / "run"), ["train.steps=45"], gpu="h100")
    assert (of_run.checkpoint_bytes, of_run.checkpoints) == (plan.checkpoint_bytes, 10), "also of the run's folder"


def test_what_every_optimizer_keeps_is_known_without_values(tmp_path: Path) -> None:
    """Also of those that compute with the number in a tensor, as Adafactor, which keeps rows and columns alone."""
    text = RESNET.replace("resnet18", "mlp, hidden: [256]").replace("micro: 8", "micro: 32")
    for name in optimizers.names():
        given = recipe(text, f"optim={{name: {name}, lr: 0.001}}")
        tracer = Tracer(Planned.of(given, resolve("fp32", CPU), "cpu"), 8, checkpointing=False)
        assert tracer.facts().optimizer.measured, name
    adafactor = "optim={name: adafactor, lr: 0.001}"
    train(1, write_recipe(tmp_path, text), tmp_path / "run", adafactor, "train.steps=1")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    with Reader(folder) as reader:
        stored = sum(4 * spec.numel for spec in reader.manifest.specs.values())
    plan = make_plan(recipe(text, adafactor), gpu_here())
    assert plan.checkpoint_bytes == pytest.approx(stored, rel=0.001)


IMPROVING = """
name: improving
task: classification
data: {name: iris, split: [0.7, 0.3]}
model: {name: mlp, hidden: [4]}
optim: {name: sgd, lr: 0.01}
batch: {global: 16}
train: {steps: 20}
eval: {every: 3 steps}
checkpoint: {every: 35%}
"""


def test_the_checkpoints_of_a_plan_are_those_of_a_run_that_improves_throughout(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path, IMPROVING), tmp_path / "run")
    saved = [row["step"] for row in rows(tmp_path / "run") if row["event"] == "checkpoint"]
    plan = make_plan(recipe(IMPROVING), gpu_here())
    assert plan.checkpoints is not None
    assert (plan.checkpoints + plan.checkpoints_of_best, plan.kept) == (len(saved), 4)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= plan.kept
    assert make_plan(recipe(IMPROVING, "checkpoint.keep_best=0"), gpu_here()).checkpoints_of_best == 0
    alone = make_plan(recipe(IMPROVING, "eval.every=null", "checkpoint.every=null"), gpu_here())
    assert (alone.checkpoints, alone.checkpoints_of_best, alone.kept) == (1, 0, 1)


def test_what_does_not_fit_is_made_to_fit_or_said() -> None:
    wide = recipe(GPT, "model.d_model=256", "data.seq_len=256", "batch.micro=64", "batch.global=64")
    tight = make_plan(wide, SMALL)
    assert not tight.options[0].fits
    assert tight.chosen is not None
    assert tight.chosen.fits
    roomier = make_plan(wide, replace(SMALL, memory_gib=80))
    assert roomier.options[0].largest == 64
    none = make_plan(wide, replace(SMALL, memory_gib=0.5))
    assert none.chosen is None
    assert none.reason.startswith("nothing fits: the least is single")


def test_a_batch_that_does_not_divide_is_refused_as_a_run_refuses_it() -> None:
    with pytest.raises(UserError, match=r"batch\.global 32 is not a multiple of micro 8 × world 3"):
        make_plan(recipe(GPT), GPUS["h100"], 1, 3)


def test_the_command_prints_lines_that_fit_a_terminal(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, GPT.replace("name: planned", f"name: {'long-' * 12}"))
    done = CliRunner().invoke(app, ["plan", str(path), "--gpu", "a100", "--nodes", "2", "--gpus-per-node", "2"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("take:") for line in lines)


def test_the_command_prints_json_for_this_machine_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(write_recipe(tmp_path, GPT)), "--gpu", "cpu", "--json"])
    found = json.loads(done.stdout)
    assert found["steps"] == 100
    assert all(sum(each["bytes"].values()) == each["total_bytes"] for each in found["options"])


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, GPT)
    done = CliRunner().invoke(app, ["plan", str(path), "--gpu", "h101"])
    assert isinstance(done.exception, UserError)
    assert "did you mean 'h100'" in str(done.exception)


def test_a_step_on_a_cpu_takes_what_its_host_takes() -> None:
    """Of a model whose arithmetic takes no time; a busy machine takes longer, and none less."""
    path = Path(__file__).parents[2] / "recipes" / "iris.yaml"
    done = CliRunner().invoke(app, ["plan", str(path), "--gpu", "cpu", "--json"])
    planned = min(each["step"]["total_s"] for each in json.loads(done.stdout)["options"])
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    taken = []
    for _ in range(50):
        begun = time.perf_counter()
        torch.nn.functional.cross_entropy(model(torch.zeros(16, 4)), torch.zeros(16, dtype=torch.int64)).backward()
        optimizer.step()
        taken.append(time.perf_counter() - begun)
    assert planned > min(taken) / 2
