"""Random numbers of a sample: the same in any world, independent, and of the distributions that they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import assert_close, assert_same_run, rows, train, write_recipe
from scipy import stats
from torch.utils.checkpoint import checkpoint

import distrain
from distrain import UserError
from distrain.training import noise

DRAWS = {
    "normal": distrain.randn_like,
    "uniform": distrain.rand_like,
    "integers": lambda x: distrain.randint_like(x, -3, 1000),
    "bernoulli": lambda x: distrain.bernoulli(torch.full_like(x, 0.3)),
}


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    yield
    noise.of_nothing()


def drawn(kind: str, count: int, *shape: int, first: int = 0, step: int = 5, seed: int = 0, draws: int = 1):  # type: ignore[no-untyped-def]
    noise.of_step(seed, step, first, count)
    return [DRAWS[kind](torch.empty(count, *shape, dtype=torch.float64)) for _ in range(draws)][-1]


def test_the_generator_is_that_of_its_authors() -> None:
    # the known answers of Random123 for philox4x32-10
    cases = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, answer in cases:
        numbers = [torch.tensor([int(each, 16)]) for each in counter.split()]
        left, right = (int(each, 16) for each in key.split())
        found = noise.philox((numbers[0], numbers[1], numbers[2], numbers[3]), (left, right))
        assert [f"{each.item():08x}" for each in found] == answer.split()


@pytest.mark.parametrize("kind", DRAWS)
def test_a_sample_draws_by_its_place_alone(kind: str) -> None:
    whole = drawn(kind, 12, 3, 5)
    for first, count in ((0, 1), (4, 3), (8, 4)):
        assert torch.allclose(drawn(kind, count, 3, 5, first=first), whole[first : first + count], atol=1e-15)
    longer = drawn(kind, 12, 7, 5)
    assert torch.allclose(longer[:, :3], whole, atol=1e-15)  # rows that are padded to another length
    for other in ({"step": 6}, {"seed": 1}, {"draws": 2}, {"first": 12}):
        assert not torch.equal(drawn(kind, 12, 3, 5, **other), whole)  # type: ignore[arg-type]
    assert torch.equal(drawn(kind, 12, 3, 5), whole)
    assert drawn(kind, 12).shape == (12,)
    assert drawn(kind, 0, 4).shape == (0, 4)


def test_the_kinds_are_of_their_distributions() -> None:
    normal, uniform, integers, hits = (drawn(kind, 400, 250).flatten() for kind in DRAWS)
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of normal numbers to that power
        assert abs((normal**power).mean().item() - mean) < 4 * (variance / len(normal)) ** 0.5
    assert (uniform >= 0).all()
    assert (uniform < 1).all()
    assert (integers.min(), integers.max(), integers.dtype) == (-3, 999, torch.int64)
    assert stats.chisquare(torch.bincount(integers + 3).numpy()).pvalue > 1e-3
    assert set(hits.unique().tolist()) == {0.0, 1.0}
    assert hits.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 1e5) ** 0.5)
    single = drawn("normal", 4, 9)
    noise.of_step(0, 5, 0, 4)
    assert torch.allclose(distrain.randn_like(torch.empty(4, 9)).double(), single, atol=1e-5)  # of fp32 and fp64


def test_samples_steps_draws_and_places_are_independent() -> None:
    def correlations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).mean(-1) * a.shape[-1] ** 0.5  # standard normal each, where there is none

    x = drawn("normal", 200, 1000)
    others = [drawn("normal", 200, 1000, **each) for each in ({"step": 6}, {"seed": 1}, {"draws": 2}, {"first": 200})]  # type: ignore[arg-type]
    pairs = [(x, each) for each in others]
    pairs += [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, 2:], x[:, :-2]), (x[1:].square() - 1, x[:-1].square() - 1)]
    for a, b in pairs[:-1]:
        assert stats.kstest(correlations(a, b).numpy(), "norm").pvalue > 1e-3
    squared = correlations(*pairs[-1]) / 2
    assert squared.abs().max() < 5
    among = torch.corrcoef(x)[~torch.eye(200, dtype=torch.bool)]
    assert among.abs().max() < 5.5 / 1000**0.5


def test_an_evaluation_draws_by_the_id_of_a_sample() -> None:
    x = torch.empty(4, 6)
    found = {}
    for name, ids in (("all", [7, 2, 9, 4]), ("some", [9, 4, 4, -1])):
        with noise.evaluating(0, torch.tensor(ids)):
            found[name] = distrain.randn_like(x)
    assert torch.equal(found["some"][0], found["all"][2])
    assert torch.equal(found["some"][1], found["some"][2])
    assert not torch.equal(found["all"][0], found["all"][1])


def test_a_pass_that_is_made_again_for_gradients_draws_the_same() -> None:
    seen = []

    def noisy(x: torch.Tensor) -> torch.Tensor:
        seen.append(distrain.randn_like(x))
        return x * seen[-1]

    noise.of_step(0, 1, 0, 3)
    x = torch.ones(3, 4, requires_grad=True)
    y = checkpoint(noisy, noisy(x), use_reentrant=False)
    y.sum().backward()
    first, second, again = seen
    assert torch.equal(second, again)
    assert not torch.equal(first, second)
    assert x.grad is not None
    assert torch.equal(x.grad, first * second)


def test_outside_of_a_run_they_are_those_of_torch() -> None:
    x = torch.empty(3, 2)
    torch.manual_seed(0)
    found = [
        distrain.randn_like(x),
        distrain.rand_like(x),
        distrain.randint_like(x, 5),
        distrain.bernoulli(x.fill_(0.5)),
    ]
    torch.manual_seed(0)
    wanted = [torch.randn_like(x), torch.rand_like(x), torch.randint_like(x, 5, dtype=torch.int64), torch.bernoulli(x)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_has_no_row_for_each_sample_is_refused() -> None:
    noise.of_step(0, 1, 0, 4)
    for wrong in (torch.empty(3, 2), torch.empty(())):
        with pytest.raises(UserError, match="for 4 samples; expected one with a row for each"):
            distrain.randn_like(wrong)
    with pytest.raises(UserError, match=r"was given torch\.int64"):
        distrain.randn_like(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="from 5 to below 5 there are 0 numbers"):
        distrain.randint_like(torch.empty(4), 5, 5)


TASKS = '''
import torch
from torch import nn
import distrain

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 8), nn.Linear(4, 64)

    def forward(self, x):
        mean, log_std = self.encoder(x.flatten(1)).chunk(2, 1)
        return self.decoder(mean + distrain.randn_like(mean) * log_std.exp()), mean, log_std

class Noisy(distrain.Task):
    """Noise in the model and in the losses, of each kind."""

    def losses(self, model, batch):
        x = batch["inputs"].flatten(1)
        kept = distrain.bernoulli(torch.full_like(x, 0.9))
        found, mean, log_std = model(x * kept + 0.1 * distrain.rand_like(x))
        level = distrain.randint_like(x[:, 0], 1, 4)
        self.log("level", level.sum())
        return {"square": ((found - x).square().mean(1) * level), "kl": mean.square().sum(1)}

class Coupled(Noisy):
    couples_samples = True

    def losses(self, model, batch):
        x = batch["inputs"].flatten(1)
        code = distrain.gather(model(x + distrain.randn_like(x))[1])
        near = code @ code.T
        return {"spread": near.logsumexp(1)}
'''
RECIPE = """
name: noisy
task: "tasks.py:{task}"
data: digits
model: "tasks.py:Net"
optim: {{lr: 1.0e-2}}
batch: {{global: 16}}
train: {{steps: 4, precision: fp64}}
eval: {{every: 2 steps, batch: 8}}
checkpoint: {{every: 2 steps, keep: 9, async: false}}
log: {{every: 1 steps}}
"""


@pytest.mark.parametrize("task", ["Noisy", "Coupled"])
def test_noise_is_the_same_in_any_world_and_after_a_resume(task: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    recipe = write_recipe(tmp_path, RECIPE.format(task=task))
    one = tmp_path / "one"
    train(1, recipe, one)
    for world_size, micro in ((2, 4), (4, 4), (1, 2))[: 3 if task == "Noisy" else 1]:
        other = tmp_path / f"{world_size}-{micro}"
        train(world_size, recipe, other, f"batch.micro={micro}")
        assert_close(one, other, 1e-9)
        found = [[row for row in rows(run) if row["event"] in ("train", "eval")] for run in (one, other)]
        for a, b in zip(*found, strict=True):
            for key in a.keys() & {"loss", "square", "kl", "level", "spread"}:
                assert a[key] == pytest.approx(b[key], rel=1e-9), key
    train(1, recipe, tmp_path / "cut", stop_after=1)
    train(1, recipe, tmp_path / "cut")
    assert_same_run(one, tmp_path / "cut")


DRAWING = '''
import random
import numpy as np
import torch
from torch import nn

class Drawing(nn.Module):
    """Draws in an evaluation as well, from the generators of PyTorch, Python and NumPy."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x):
        drawn = torch.randn(len(x), 1, dtype=x.dtype) + random.random() + np.random.rand()
        return self.layer(x.flatten(1) + drawn)
'''
DRAWN = """
name: drawn
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: "drawing.py:Drawing"
batch: {global: 12}
train: {steps: 4}
eval: {every: 2 steps, batch: 100, metrics: [accuracy]}
checkpoint: {every: 2 steps, keep: 100}
"""


def test_an_evaluation_draws_the_same_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "drawing.py").write_text(DRAWING)
    recipe, whole, cut = write_recipe(tmp_path, DRAWN), tmp_path / "whole", tmp_path / "cut"
    train(1, recipe, whole)
    train(1, recipe, cut, stop_after=2)  # before the evaluation, which the next attempt makes up for
    assert not [row for row in rows(cut) if row["event"] == "eval"]
    train(1, recipe, cut)
    assert_same_run(whole, cut)
