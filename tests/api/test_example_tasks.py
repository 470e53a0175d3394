"""The tasks of the examples: the same in any world and at any micro-batch, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import assert_close, assert_same_run, last, rows, state, train, write_recipe
from safetensors.torch import save_file
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"

RECIPE = """
name: example
task: {{name: "{file}:{task}"{arguments}}}
data: {{name: "{file}:{data}"}}
model: {{name: "{file}:{model}"}}
optim: {{lr: 1.0e-2}}
batch: {{global: 16}}
train: {{steps: 4, precision: fp64}}
eval: {{every: 2 steps}}
checkpoint: {{every: 2 steps, keep: 100, async: false}}
log: {{every: 1 steps}}
"""
PARTS = {
    "diffusion": ("Diffusion", "pictures", "Denoiser"),
    "gan": ("Adversarial", "NoisyDigits", "GAN"),
    "reinforce": ("Reinforce", "Episodes", "Player"),
    "distillation": ("Distillation", "digits", "Net"),
}
MORE = ("reinforce", "gan")
"""What is tested with --all; test_examples runs their scripts."""
REPORTED = {
    "diffusion": {"late"},
    "gan": {"deceived", "slope", "accuracy"},
    "reinforce": {"reward"},
    "distillation": {"teacher_accuracy"},
}


def _teacher(path: Path, width: int) -> None:
    """Write what `examples/distillation.py` loads: its network with random weights."""
    random = torch.Generator().manual_seed(0)
    layers = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))})
    save_file({name: torch.randn(each.shape, generator=random) for name, each in layers.state_dict().items()}, path)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.more] * (n in MORE)) for n in PARTS])
def test_an_example_is_the_same_in_any_world_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    task, data, model = PARTS[name]
    arguments = ""
    if name == "distillation":
        _teacher(tmp_path / "teacher.safetensors", width=24)
        arguments = f", teacher: {tmp_path / 'teacher.safetensors'}, width: 24"
    text = RECIPE.format(file=EXAMPLES / f"{name}.py", task=task, data=data, model=model, arguments=arguments)
    if name == "gan":
        parts = (f"{part}: {{params: '{part}.*', lr: 1.0e-2}}" for part in ("discriminator", "generator"))
        text = text.replace("{lr: 1.0e-2}", f"{{{', '.join(parts)}}}", 1)
    if name == "distillation":
        text = text.replace(':Net"', ':Net", width: 8')
    recipe = write_recipe(tmp_path, text)
    one, two, cut = tmp_path / "one", tmp_path / "two", tmp_path / "cut"
    train(1, recipe, one)
    train(2, recipe, two, "batch.micro=2")
    assert_close(one, two, 1e-9)
    for event in ("train", "eval"):
        found = [[row for row in rows(run) if row["event"] == event] for run in (one, two)]
        assert len(found[0]) >= 2
        for a, b in zip(*found, strict=True):
            for key in {"loss"} | REPORTED[name]:
                assert a[key] == pytest.approx(b[key], rel=1e-9), f"{event}: {key}"
    train(1, recipe, cut, stop_after=1)  # it saves step 2
    train(1, recipe, cut)
    assert_same_run(one, cut)
    held = state(last(one))  # the student's: no tensor is of the teacher's width
    assert len(held) > 0
    if name == "distillation":
        assert all(each.size <= 8 * 64 for each in held.values())
