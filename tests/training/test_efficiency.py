"""What rows say of time, memory and operations, and the profile of a few steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import losses, train, write_recipe
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from distrain.config import Recipe, UserError
from distrain.networks.flops import training_flops, without_storage
from distrain.networks.gpt import GPT
from distrain.run import heartbeat
from distrain.run.folder import RunDir
from distrain.system.peak_flops import PEAK_TFLOPS, peak_tflops
from distrain.training.step_times import PARTS, DeviceTimes, HostTimes

# --------------------------------------------------------------------------------------------------------------------
# Operations


def counted(model: nn.Module, inputs: torch.Tensor) -> int | None:
    copy = without_storage(model)
    assert copy is not None
    return counted_copy(copy, inputs)


def counted_copy(copy: nn.Module, inputs: torch.Tensor) -> int | None:
    return training_flops(copy, lambda model, batch: model(batch["inputs"]).sum(), {"inputs": inputs})


def test_the_operations_of_layers_are_those_of_the_formula() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    products = 5 * (8 * 16 + 16 * 4)
    # forward; gradients of all weights; gradients of the inputs of all layers but the first
    assert counted(layers, torch.zeros(5, 8)) == 2 * (products + products + 5 * 16 * 4)
    convolution = nn.Conv2d(3, 6, 3, padding=1)
    assert counted(convolution, torch.zeros(2, 3, 8, 8)) == 2 * (2 * 2 * 8 * 8 * 6 * 3 * 9)


def test_frozen_weights_have_no_gradients_to_compute() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    layers[0].requires_grad_(False)
    assert counted(layers, torch.zeros(5, 8)) == 2 * 5 * (8 * 16 + 2 * 16 * 4)


def test_a_language_models_operations_are_six_for_each_weight_and_token_and_its_attention() -> None:
    layers, width, length, vocabulary = 2, 32, 16, 64
    model = GPT(vocab_size=vocabulary, seq_len=length, n_layer=layers, n_head=2, d_model=width)
    inputs = torch.zeros(3, length, dtype=torch.int64)
    weights = layers * 12 * width * width + vocabulary * width  # the embeddings are looked up, the head is computed
    attention = 12 * layers * width * length
    found = counted(model, inputs)
    assert found is not None
    # flash attention computes its scores once more in the backward pass, which the counter has
    assert found == pytest.approx(3 * length * (6 * weights + attention), rel=0.05)


def test_a_model_of_transformers_that_looks_at_its_mask_is_counted() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    copy = without_storage(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
    assert copy is not None
    tokens, length = torch.zeros(3, 8, dtype=torch.int64), 8
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 32 * 16
    for mask in (None, torch.ones(3, 8, dtype=torch.int64)):
        batch: dict[str, Any] = {"inputs": tokens, "mask": mask}
        found = training_flops(
            copy, lambda model, each: model(each["inputs"], attention_mask=each["mask"]).logits.sum(), batch
        )
        assert found == pytest.approx(3 * length * (6 * weights + 12 * 2 * 16 * length), rel=0.05)


def test_counting_changes_nothing_of_the_model_and_needs_no_memory() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen += 1
            return self.layer(x)

    model, before = Counts(), torch.get_rng_state()
    assert counted(model, torch.zeros(2, 4))
    assert (model.calls, model.seen.item(), model.layer.weight.grad) == (0, 0.0, None)
    assert torch.equal(torch.get_rng_state(), before)
    copy = without_storage(model)
    assert copy is not None
    assert {tensor.device.type for tensor in (*copy.parameters(), *copy.buffers())} == {"meta"}


@pytest.mark.parametrize("kind", ["computes on what it sees", "cannot be copied", "fails"])
def test_a_model_that_cannot_be_counted_has_no_count_and_the_run_says_so(
    kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "distrain")

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.lines = (line for line in "ab") if kind == "cannot be copied" else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, x) if kind == "fails" else self.layer(x) * float(x.sum())

    copy = without_storage(Looks())
    assert copy is None or counted_copy(copy, torch.zeros(1, 4)) is None
    assert (copy is None) == (kind == "cannot be copied")
    assert [record.getMessage()[:17] for record in caplog.records] == ["rows have no mfu:"]
    assert capfd.readouterr().err == "", "and torch says nothing"


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA L40S", "bf16", 362.1),
        ("NVIDIA L4", "fp32", 30.3),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla V100-SXM2-16GB", "bf16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA A100-SXM4-80GB", "fp64", None),
        ("Some other GPU", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet(gpu: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(gpu, precision) == peak


def test_a_special_name_comes_before_the_one_that_it_holds() -> None:
    names = [*PEAK_TFLOPS]
    for place, name in enumerate(names):
        assert not [earlier for earlier in names[:place] if f" {earlier} " in f" {name} "], name


# --------------------------------------------------------------------------------------------------------------------
# Time


class Event:
    """Stands for an event of a device that takes a second between any two of them."""

    clock = 0
    done = True

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def query(self) -> bool:
        return Event.done

    def elapsed_time(self, later: Event) -> float:
        return 1000.0 * (later.at - self.at)


def enter(*phases: str) -> None:
    for phase in phases:
        heartbeat.enter_phase(phase)


STEP = ("data", "callbacks", "sync", "forward", "backward", "forward", "backward", "sync", "optimizer", "callbacks")


def test_a_device_is_asked_about_one_step_between_two_rows_and_never_waited_for() -> None:
    heartbeat.begin()
    times = DeviceTimes(Event)
    Event.clock, Event.done = 0, True
    enter(*STEP)
    assert (times.take(), Event.clock) == ({}, 0)  # the first step may compile
    enter("callbacks")
    assert Event.clock == 0  # the rest of a step that has begun
    enter(*STEP)
    assert (times.take(), Event.clock) == ({}, len(STEP))  # it has not come to its end
    enter(*STEP, *STEP)
    assert Event.clock == len(STEP) + 1  # one step, whatever follows
    Event.done = False
    assert times.take() == {}
    Event.done = True
    found = times.take()
    assert found.pop("saving_s", 0.0) == 0.0
    assert found == {"data_s": 1.0, "forward_backward_s": 4.0, "optimizer_s": 1.0, "agreement_s": 2.0}
    times.close()
    enter(*STEP)
    assert Event.clock == len(STEP) + 1


def test_the_host_counts_each_step_once_and_not_the_first() -> None:
    now = heartbeat.begin()
    times = HostTimes()
    assert times.take() == {}
    for step in (1, 2, 3):
        enter(*STEP)
        heartbeat.stepped(step)
    found = times.take()
    assert set(found) == set(PARTS)
    heartbeat.enter_phase("data")
    assert found["forward_backward_s"] <= (now.seconds["forward"] + now.seconds["backward"]) / 2
    assert times.take() == {}


def test_waiting_for_data_is_the_loops_own_wait_since_the_last_row_or_evaluation(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path), tmp_path / "run", "log.every=4 steps", "eval.every=3 steps", "train.steps=12")
    _, *rows = [row for row in RunDir(tmp_path / "run").rows() if row["event"] == "train"]
    assert [row["step"] for row in rows] == [8, 12]
    for row in rows:
        assert row["data_wait"] * row["step_s"] == pytest.approx(row["data_s"], rel=1e-6)


@pytest.mark.slow
def test_rows_of_a_language_model_have_tokens_and_the_share_of_the_peak(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "name: gpt\ntask: language_modeling\ndata: {name: python_source, seq_len: 16, max_bytes: 20_000}\n"
        "model: {name: gpt, n_layer: 1, n_head: 2, d_model: 16}\nbatch: {global: 4}\ntrain: {steps: 4}\n"
        "eval: {every: null}\nlog: {every: 2 steps, peak_tflops: 0.001}\n",
    )
    train(1, recipe, tmp_path / "run")
    rows = [row for row in RunDir(tmp_path / "run").rows() if row["event"] == "train"]
    assert len(rows) == 2
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(16 * row["samples_per_s"])
        assert row["mfu"] > 0
        assert row["step_s"] == pytest.approx(4 / row["samples_per_s"])
    shares = {row["mfu"] / row["samples_per_s"] for row in rows}
    assert max(shares) == pytest.approx(min(shares))


_LAYERS = """
name: layers
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: sequential, layers: [Flatten, {Linear: [64, 16]}, {Linear: [16, 10]}]}
batch: {global: 8}
train: {steps: 2}
eval: {every: null}
log: {every: 1 steps, peak_tflops: 0.001}
"""


def _operations(run: Path) -> set[int]:
    """Return the operations of a sample, as the rows of a run have them."""
    rows = [row for row in RunDir(run).rows() if row["event"] == "train"]
    return {round(row["mfu"] / row["samples_per_s"] * 0.001 * 1e12) for row in rows}


def test_a_run_counts_no_gradients_of_what_its_recipe_freezes(tmp_path: Path) -> None:
    train(1, write_recipe(tmp_path, _LAYERS), tmp_path / "all")
    train(1, write_recipe(tmp_path, _LAYERS), tmp_path / "head", "optim.freeze=['1.*']")
    first, head = 64 * 16, 16 * 10
    assert _operations(tmp_path / "all") == {2 * (2 * first + 3 * head)}
    assert _operations(tmp_path / "head") == {2 * (first + 2 * head)}


def test_a_loss_of_the_users_with_tensors_is_counted_and_trains(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Weighted(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('weights', torch.arange(1.0, 11.0))\n"
        "    def forward(self, outputs, targets):\n"
        "        losses = nn.functional.cross_entropy(outputs, targets, reduction='none')\n"
        "        return losses * self.weights[targets]\n"
    )
    train(1, write_recipe(tmp_path, _LAYERS + "loss: 'own.py:Weighted'\n"), tmp_path / "run")
    assert _operations(tmp_path / "run") == {2 * (2 * 64 * 16 + 3 * 16 * 10)}


def test_sequences_count_by_their_lengths(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Means(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(4, 8)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x).mean((1, 2))\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __init__(self, split):\n"
        "        pass\n"
        "    def __len__(self):\n"
        "        return 8\n"
        "    def __getitem__(self, index):\n"
        "        return torch.ones(2 + index, 4), torch.ones(())\n"
    )
    text = (
        _LAYERS.replace("classification", "regression")
        .replace("global: 8", "global: 1")
        .replace("steps: 2", "steps: 8")
    )
    text = text.replace("name: digits, split: [0.8, 0.2]", "name: 'own.py:Data'")
    text = text.replace("{name: sequential, layers: [Flatten, {Linear: [64, 16]}, {Linear: [16, 10]}]}", "own.py:Means")
    train(1, write_recipe(tmp_path, text), tmp_path / "run")
    assert _operations(tmp_path / "run") == {2 * 2 * length * 4 * 8 for length in range(2, 10)}


def test_a_loss_within_the_forward_pass_is_counted_as_one_outside(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "name: gpt\ntask: language_modeling\ndata: {name: python_source, seq_len: 16, max_bytes: 20_000}\n"
        "model: {name: gpt, n_layer: 1, n_head: 2, d_model: 16}\nbatch: {global: 4}\ntrain: {steps: 2}\n"
        "eval: {every: null}\nlog: {every: 1 steps, peak_tflops: 0.001}\n",
    )
    for chunked in ("false", "true"):
        train(1, recipe, tmp_path / chunked, f"tune.chunked_loss={chunked}")
    assert len(_operations(tmp_path / "true")) == 1
    assert _operations(tmp_path / "true") == _operations(tmp_path / "false")


@pytest.mark.parametrize("kind", ["tensor", "teacher"])
def test_a_task_of_the_users_that_keeps_a_state_is_counted_and_trains(tmp_path: Path, kind: str) -> None:
    recipe = write_recipe(
        tmp_path, _LAYERS.replace("task: classification", f"task: {{name: 'stateful_tasks:Kept', kind: {kind}}}")
    )
    train(1, recipe, tmp_path / "run")
    assert _operations(tmp_path / "run") == {2 * (2 * 64 * 16 + 3 * 16 * 10)}
    assert losses(tmp_path / "run") == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("exchange", ["all_reduce(torch.ones(()))", "barrier()", "all_gather_object([None] * 2, 1)"])
def test_a_task_whose_ranks_exchange_tensors_is_not_counted_and_trains(tmp_path: Path, exchange: str) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nimport distrain\n"
        "class Exchanging(distrain.Task):\n"
        "    def losses(self, model, batch):\n"
        f"        torch.distributed.{exchange}\n"
        "        return {'all': model(batch['inputs']).sum(1)}\n"
    )
    recipe = write_recipe(tmp_path, _LAYERS.replace("task: classification", "task: own.py:Exchanging"))
    train(2, recipe, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2
    assert "mfu" not in set().union(*RunDir(tmp_path / "run").rows())


# --------------------------------------------------------------------------------------------------------------------
# The profile

PROFILED = """
name: profiled
task: classification
data: {name: digits, split: [0.9, 0.1]}
model: {name: mlp, hidden: [8]}
batch: {global: 12}
train: {steps: 6, profile: PROFILE}
eval: {every: null}
"""


def traces(run: Path) -> dict[str, Any]:
    folder = run / "profile"
    return {path.name: json.loads(gzip.decompress(path.read_bytes())) for path in folder.glob("*.json.gz")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "section", "ranks", "optimizer_steps"),
    [
        (1, "{at: 2, steps: 3}", {0}, 3),
        (1, "{at: 5, steps: 9}", {0}, 2),  # the run ends before
        (2, "{at: 2, steps: 2}", {0}, 2),
        (2, "{at: 2, steps: 2, ranks: all}", {0, 1}, 2),
    ],
)
def test_a_profile_has_the_steps_that_were_asked_for(
    tmp_path: Path, processes: int, section: str, ranks: set[int], optimizer_steps: int
) -> None:
    recipe = write_recipe(tmp_path, PROFILED.replace("PROFILE", section))
    ended = train(processes, recipe, tmp_path / "run")
    assert not [each.err for each in ended if "ERROR" in each.err], "of a GPU that there is none"
    found = traces(tmp_path / "run")
    assert set(found) == {f"rank-{rank}.json.gz" for rank in ranks}
    for rank in ranks:
        names = [event.get("name", "") for event in found[f"rank-{rank}.json.gz"]["traceEvents"]]
        assert sum(name.startswith("Optimizer.step#") for name in names) == optimizer_steps
        table = (tmp_path / "run" / "profile" / f"rank-{rank}.txt").read_text().splitlines()
        assert len(table) == 11
        assert max(map(len, table)) <= 120


def test_a_profile_past_the_end_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, PROFILED.replace("PROFILE", "{at: 7}"))
    with pytest.raises((UserError, AssertionError), match=r"train.profile.at is 7, and the run has 6 steps"):
        train(1, recipe, tmp_path / "run")


def test_recipes_without_the_new_keys_are_stored_as_before() -> None:
    recipe = Recipe.model_validate(
        {"name": "a", "task": "classification", "data": "digits", "model": "mlp", "batch": {"global": 4},
         "train": {"steps": 1}}
    )  # fmt: skip
    stored = recipe.model_dump(mode="json", by_alias=True)
    assert "profile" not in stored["train"]
    assert "peak_tflops" not in stored["log"]
