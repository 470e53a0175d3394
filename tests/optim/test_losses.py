"""Losses as sums and counts: torch's means over any partition of the data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distrain.config import Recipe, UserError
from distrain.config.registry import losses
from distrain.datasets.base import DataMeta
from distrain.optim import build_loss, check_loss


def recipe(task="classification", **sections):
    base = {"name": "t", "task": task, "data": "d", "model": "m", "batch": {"global": 8}, "train": {"steps": 10}}
    return Recipe.model_validate(base | sections)


def _case(name, rows, generator):
    """Return (task, outputs, targets, reference arguments for criterion(*...)) for a loss of torch.nn."""

    def noise(*shape):
        return torch.randn(rows, *shape, generator=generator)

    def signs(*shape):
        return torch.randint(0, 2, (rows, *shape), generator=generator) * 2.0 - 1

    labels = torch.randint(0, 5, (rows,), generator=generator)
    bits = torch.randint(0, 2, (rows, 4), generator=generator).float()
    multi = torch.tensor([[2, 0, -1, -1], [1, -1, -1, -1]])[torch.randint(0, 2, (rows,), generator=generator)]
    return {
        "cross_entropy": (noise(5), labels),
        "nll": (noise(5).log_softmax(-1), labels),
        "l1": (noise(3), noise(3)),
        "mse": (noise(), noise()),
        "smooth_l1": (noise(3), noise(3)),
        "huber": (noise(), noise()),
        "bce": (noise(4).sigmoid(), bits),
        "bce_with_logits": (noise(4), bits),
        "poisson_nll": (noise(3), noise(3).abs().round()),
        "gaussian_nll": ((noise(3), noise(3).exp()), noise(3)),
        "kl_div": (noise(3).log_softmax(-1), noise(3).softmax(-1)),
        "soft_margin": (noise(3), signs(3)),
        "hinge_embedding": (noise(3), signs(3)),
        "margin_ranking": ((noise(), noise()), signs()),
        "multi_margin": (noise(5), labels),
        "multi_label_margin": (noise(4), multi),
        "multi_label_soft_margin": (noise(4), bits),
        "cosine_embedding": ((noise(4), noise(4)), signs()),
        "triplet_margin": ((noise(4), noise(4), noise(4)), labels),
    }[name]


def _reference(name, args, outputs, targets):
    classes = {each.lower().removesuffix("loss"): each for each in vars(nn) if each.endswith("Loss")}
    criterion = getattr(nn, classes[name.replace("_", "")])(**args)
    if name == "gaussian_nll":
        return criterion(outputs[0], targets, outputs[1])
    if name == "triplet_margin":
        return criterion(*outputs)
    return criterion(*outputs, targets) if isinstance(outputs, tuple) else criterion(outputs, targets)


def _rows(value, index):
    return tuple(each[index] for each in value) if isinstance(value, tuple) else value[index]


ELEMENTWISE = [name for name in losses.names() if name != "ctc"]
WITH_ARGS = [(name, {}) for name in ELEMENTWISE] + [
    ("cross_entropy", {"weight": [0.1, 0.5, 2.0, 1.0, 0.0], "label_smoothing": 0.1}),
    ("cross_entropy", {"label_smoothing": 0.2, "ignore_index": 2}),
    ("cross_entropy", {"weight": [0.1, 0.5, 2.0, 1.0, 3.0], "ignore_index": 1}),
    ("nll", {"weight": [0.1, 0.5, 2.0, 1.0, 3.0]}),
    ("bce_with_logits", {"pos_weight": [1.0, 2.0, 3.0, 0.5]}),
    ("bce_with_logits", {"weight": [1.0, 2.0, 3.0, 0.5]}),
    ("huber", {"delta": 0.3}),
    ("gaussian_nll", {"full": True}),
    ("kl_div", {"reduction": "batchmean"}),
    ("multi_margin", {"weight": [0.1, 0.5, 2.0, 1.0, 3.0], "p": 2}),
    ("poisson_nll", {"full": True}),
]


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize(("name", "args"), WITH_ARGS)
def test_sum_over_count_is_torchs_mean_over_any_partition(name, args):
    generator = torch.Generator().manual_seed(1)
    outputs, targets = _case(name, 23, generator)
    loss = build_loss(recipe(loss={"name": name, **args}), DataMeta())
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in args.items()}
    expected = _reference(name, tensors, outputs, targets)

    total, count = loss.sum_and_count(outputs, targets)
    torch.testing.assert_close(total / count, expected.double(), rtol=2e-6, atol=1e-7)
    assert total.dim() == count.dim() == 0
    assert count.dtype == torch.float64
    torch.testing.assert_close(count, loss.count(targets), rtol=0, atol=0)
    if loss.count_is_fixed:
        assert loss.fixed_count(23, targets) == count.item()

    sums = counts = 0
    for cut in (slice(0, 1), slice(1, 9), slice(9, 23)):
        # Two padding rows in each part, whose values would be noticed.
        rows = torch.arange(23)[cut]
        padded = torch.cat([rows, rows[:1].expand(2)])
        keep = torch.tensor([True] * len(rows) + [False] * 2)
        part = _rows(outputs, padded)
        for each in part if isinstance(part, tuple) else (part,):
            each[-1] = 0.5
        total, count = loss.sum_and_count(part, targets[padded], keep)
        torch.testing.assert_close(count, loss.count(targets[padded], keep), rtol=0, atol=0)
        sums, counts = sums + total.double(), counts + count
    torch.testing.assert_close(sums / counts, expected.double(), rtol=2e-6, atol=1e-7)


ROUNDED = [
    ("cross_entropy", {"weight": [0.1, 0.7, 1.3, 0.9, 0.3], "label_smoothing": 0.1}),
    ("cross_entropy", {"weight": [0.1, 0.7, 1.3, 0.9, 0.3], "ignore_index": 2}),
    ("nll", {"weight": [0.1, 0.7, 1.3, 0.9, 0.3]}),
    ("bce", {"weight": [0.1, 0.7, 1.3, 0.9]}),
    ("bce_with_logits", {"pos_weight": [0.3, 0.7, 1.1, 2.3], "weight": [0.1, 0.7, 1.3, 0.9]}),
    ("multi_margin", {"weight": [0.1, 0.7, 1.3, 0.9, 0.3], "margin": 0.7}),
    ("multi_label_soft_margin", {"weight": [0.1, 0.7, 1.3, 0.9]}),
    ("huber", {"delta": 0.3}),
    ("smooth_l1", {"beta": 0.7}),
    ("poisson_nll", {"log_input": False, "eps": 1e-3}),
    ("triplet_margin", {"margin": 0.1}),
]
"""Losses with constants that no float32 holds."""


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(("name", "args"), ROUNDED)
def test_constants_have_the_precision_of_the_run(name, args, precision):
    generator = torch.Generator().manual_seed(1)
    single, targets = _case(name, 23, generator)
    if name == "poisson_nll":
        single = single.exp()
    dtype = torch.float64 if precision == "fp64" else torch.float32

    def to(value):
        if isinstance(value, tuple):
            return tuple(map(to, value))
        return value.to(dtype) if value.is_floating_point() else value

    made = recipe(loss={"name": name, **args}, train={"steps": 1, "precision": precision})
    loss = build_loss(made, DataMeta())
    loss.sum_and_count(single, targets)  # what came before leaves nothing behind
    total, count = loss.sum_and_count(to(single), to(targets))
    tensors = {
        key: torch.tensor(value, dtype=dtype) if isinstance(value, list) else value for key, value in args.items()
    }
    expected = _reference(name, tensors, to(single), to(targets))
    assert total.dtype == expected.dtype == dtype
    torch.testing.assert_close(total / count, expected.double(), rtol=1e-14 if precision == "fp64" else 2e-6, atol=0)
    if precision == "fp32" and not loss.count_is_fixed:
        rounded = torch.tensor(args["weight"], dtype=torch.float32).double()
        kept = targets[targets != args.get("ignore_index", -1)]
        assert count == rounded[kept].sum()


def test_a_class_of_ones_own_makes_its_constants_in_the_precision_of_the_run(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n\n\nclass Weighted(torch.nn.Module):\n"
        "    def __init__(self, weight):\n        super().__init__()\n"
        "        self.register_buffer('weight', torch.tensor(weight))\n\n"
        "    def forward(self, outputs, targets):\n        return (self.weight * (outputs - targets)).abs().mean(1)\n"
    )
    section = {"name": f"{tmp_path}/own.py:Weighted", "weight": [0.1, 0.3]}
    outputs, targets = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    for precision, weight in (("fp64", [0.1, 0.3]), ("fp32", torch.tensor([0.1, 0.3]).double().tolist())):
        loss = build_loss(recipe("regression", loss=section, train={"steps": 1, "precision": precision}), DataMeta())
        assert loss.sum_and_count(outputs, targets)[0].item() == sum(weight) / 2
        assert torch.get_default_dtype() == torch.float32


def test_padding_may_hold_anything():
    loss = build_loss(recipe("regression"), DataMeta())
    outputs, targets = torch.tensor([1.0, float("inf")]), torch.tensor([0.0, float("nan")])
    total, count = loss.sum_and_count(outputs, targets, torch.tensor([True, False]))
    assert (total.item(), count.item()) == (1.0, 1.0)


def test_token_losses_flatten_without_copying_and_skip_padding():
    loss = build_loss(recipe("language_modeling"), DataMeta())
    assert loss.is_token_entropy
    assert not loss.count_is_fixed
    logits = torch.randn(3, 5, 11, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 3:] = targets[2, :] = -100
    total, count = loss.sum_and_count(logits, targets)
    assert count.item() == 8
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close((total / count).float(), expected)
    kept, number = loss.sum_and_count(logits, targets, torch.tensor([True, False, True]))
    assert number.item() == loss.count(targets, torch.tensor([True, False, True])).item() == 3
    torch.testing.assert_close(kept, nn.functional.cross_entropy(logits[0, :3], targets[0, :3], reduction="sum"))


def test_classes_in_torchs_own_dimension_and_soft_targets():
    loss = build_loss(recipe(), DataMeta())
    logits, targets = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    total, count = loss.sum_and_count(logits, targets)
    torch.testing.assert_close((total / count).float(), nn.functional.cross_entropy(logits, targets))
    soft = torch.randn(6, 4).softmax(-1)
    logits = torch.randn(6, 4)
    total, count = loss.sum_and_count(logits, soft)
    torch.testing.assert_close((total / count).float(), nn.functional.cross_entropy(logits, soft))
    keep = torch.tensor([True] * 4 + [False] * 2)
    total, count = loss.sum_and_count(logits, soft, keep)
    assert count.item() == loss.count(soft, keep).item() == 4
    torch.testing.assert_close((total / count).float(), nn.functional.cross_entropy(logits[:4], soft[:4]))


def test_ctc_is_torchs_mean():
    loss = build_loss(recipe("seq2seq", loss="ctc"), DataMeta())
    logits = torch.randn(4, 9, 5)
    targets = torch.tensor([[1, 2, 3], [1, 1, -100], [4, -100, -100], [2, 3, -100]])
    lengths = torch.tensor([3, 2, 1, 2])
    times = torch.tensor([9, 8, 7, 9])
    expected = nn.CTCLoss()(logits.log_softmax(-1).transpose(0, 1), targets.clamp(min=0), times, lengths)
    total, count = loss.sum_and_count((logits, times), targets)
    torch.testing.assert_close((total / count).float(), expected)
    first, one = loss.sum_and_count((logits[:2], times[:2]), targets[:2], torch.tensor([True, False]))
    second, three = loss.sum_and_count((logits[1:], times[1:]), targets[1:])
    torch.testing.assert_close((first + second) / (one + three), total / count, rtol=1e-6, atol=1e-7)


def test_sums_are_fp32_for_bf16_outputs():
    for task, outputs, targets in (
        ("regression", torch.full((4096,), 1.0), torch.zeros(4096)),
        ("classification", torch.zeros(4096, 3), torch.zeros(4096, dtype=torch.long)),
    ):
        total, count = build_loss(recipe(task), DataMeta()).sum_and_count(outputs.bfloat16(), targets)
        assert total.dtype == torch.float32
        assert total.item() == pytest.approx(4096 * (1.0 if task == "regression" else math.log(3)), rel=1e-6)
        assert count.item() == 4096
    total, _ = build_loss(recipe("regression"), DataMeta()).sum_and_count(torch.ones(3).double(), torch.ones(3))
    assert total.dtype == torch.float64


def test_shapes_are_never_broadcast():
    loss = build_loss(recipe("regression"), DataMeta())
    assert loss.sum_and_count(torch.ones(5, 1), torch.zeros(5))[0].item() == 5
    with pytest.raises(UserError, match=r"\(5,\).*\(5, 1\)"):
        loss.sum_and_count(torch.ones(5), torch.zeros(5, 1))
    with pytest.raises(UserError, match=r"\(5, 2\)"):
        loss.sum_and_count(torch.ones(5, 2), torch.zeros(5))
    with pytest.raises(UserError, match="returned 2"):
        loss.sum_and_count((torch.ones(5), torch.ones(5)), torch.zeros(5))
    with pytest.raises(UserError, match="classes"):
        build_loss(recipe(), DataMeta()).sum_and_count(torch.ones(5, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(UserError, match="numbers of classes"):
        build_loss(recipe(), DataMeta()).sum_and_count(torch.ones(5, 3), torch.zeros(5))
    with pytest.raises(UserError, match="0 to 2"):
        build_loss(recipe(), DataMeta()).sum_and_count(torch.ones(5, 3), torch.full((5,), 3))
    with pytest.raises(UserError, match="ignore_index"):
        build_loss(recipe(), DataMeta()).sum_and_count(torch.ones(5, 3), torch.full((5,), -100))


def test_binary_with_two_outputs():
    loss = build_loss(recipe("binary", loss={"name": "cross_entropy", "weight": [1.0, 3.0]}), DataMeta())
    outputs, targets = torch.randn(6, 2), torch.tensor([0.0, 1, 1, 0, 1, 0])
    total, count = loss.sum_and_count(outputs, targets)
    expected = nn.functional.cross_entropy(outputs, targets.long(), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close((total / count).float(), expected)
    assert count.item() == loss.count(targets).item() == 12


@pytest.mark.parametrize("name", ["soft_margin", "hinge_embedding"])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_targets_of_0_and_1_become_the_signs_that_a_loss_takes(name, task):
    loss = build_loss(recipe(task, loss=name), DataMeta())
    bits = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    outputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    value, count = loss.sum_and_count(outputs, bits)
    torch.testing.assert_close(value / count.float(), _reference(name, {}, outputs, bits * 2 - 1))
    assert loss.sum_and_count(outputs, bits * 2 - 1)[0] == value, "and signs stay"


def test_only_bce_takes_probabilities():
    taking = [
        name for name in losses.names() if build_loss(recipe("binary", loss=name), DataMeta()).takes_probabilities
    ]
    assert taking == ["bce"]


def test_a_module_of_ones_own_is_where_outputs_will_be_before_the_first_of_them(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Weighted(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('weights', torch.ones(3))\n"
        "    def forward(self, outputs, targets):\n        return (outputs - targets).square()\n"
    )
    loss = build_loss(recipe("regression", loss=f"{tmp_path}/own.py:Weighted"), DataMeta())
    loss.prepare(torch.device("meta"), torch.float32)
    assert loss.function.weights.is_meta


def test_own_losses(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def each(outputs, targets, power=2):\n    return (outputs - targets).abs() ** power\n"
        "def mean(outputs, targets):\n    return ((outputs - targets) ** 2).mean()\n"
        "def pair(outputs, targets):\n    m = targets > 0\n    return ((outputs - targets) ** 2 * m).sum(), m.sum()\n"
        "pair.count = lambda targets: (targets > 0).sum()\n"
        "def bare(outputs, targets):\n    return (outputs - targets).sum(), 3\n"
        "def hits(outputs, targets):\n    return (outputs > targets).float()\n"
        "class Scaled(torch.nn.Module):\n    def __init__(self, scale):\n        super().__init__()\n"
        "        self.register_buffer('scale', torch.tensor(scale))\n"
        "    def forward(self, outputs, targets):\n        return (outputs - targets).abs().sum(-1) * self.scale\n"
    )
    own = f"{tmp_path}/own.py"
    outputs, targets = torch.randn(6, 3), torch.randn(6, 3)
    keep = torch.tensor([True, True, False, True, False, True])
    square = (outputs - targets) ** 2
    for name in ("each", "mean"):
        loss = build_loss(recipe("regression", loss=f"{own}:{name}"), DataMeta())
        total, count = loss.sum_and_count(outputs, targets, keep)
        assert loss.count_is_fixed
        assert count.item() == 4
        torch.testing.assert_close((total / count).float(), square[keep].mean())
        assert loss.sum_and_count(outputs, targets, keep & False)[1].item() == 0
    loss = build_loss(recipe("regression", loss=f"{own}:pair"), DataMeta())
    assert not loss.count_is_fixed
    total, count = loss.sum_and_count(outputs, targets)
    assert count.item() == loss.count(targets).item() == (targets > 0).sum().item()
    torch.testing.assert_close((total / count).float(), square[targets > 0].mean())
    with pytest.raises(UserError, match="attribute `count`"):
        build_loss(recipe("regression", loss=f"{own}:bare"), DataMeta()).sum_and_count(outputs, targets)
    hits = build_loss(recipe("regression", loss=f"{own}:hits"), DataMeta())
    hits.sum(outputs, targets)  # in an evaluation it is a number like any
    with pytest.raises(UserError, match="hits returned a tensor without a gradient, so nothing would be trained"):
        hits.sum(outputs.clone().requires_grad_(), targets)
    loss = build_loss(recipe("regression", loss={"name": f"{own}:Scaled", "scale": 2.0}), DataMeta())
    torch.testing.assert_close(loss.sum_and_count(outputs, targets)[0], 2 * (outputs - targets).abs().sum())
    assert "power" in check_loss(recipe("regression", loss={"name": f"{own}:each", "powr": 3}))[0]
    assert "scale" in check_loss(recipe("regression", loss=f"{own}:Scaled"))[0]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("cros_entropy", ["cros_entropy", "cross_entropy"]),
        ({"name": "mse", "reduction": "sum"}, ["loss.reduction", "mean is always"]),
        ({"name": "cross_entropy", "label_smothing": 0.1}, ["label_smothing", "label_smoothing"]),
        ({"name": "cross_entropy", "label_smoothing": 3.0}, ["label_smoothing"]),
        ({"name": "cross_entropy", "weight": "heavy"}, ["loss.weight", "list of numbers"]),
        ({"name": "huber", "delta": -1}, ["huber"]),
        ("linear_cross_entropy", ["belong in the model"]),
        ({"name": "mse", "reduction": "sum", "x": 1}, ["loss.reduction", "loss.x"]),
    ],
)
def test_mistakes_in_the_loss_are_explained(loss, words):
    problems = "\n".join(check_loss(recipe(loss=loss)))
    for word in words:
        assert word in problems


def test_class_weights_are_as_many_as_classes():
    bad = recipe(loss={"name": "CrossEntropyLoss", "weight": [1, 2]})
    assert check_loss(bad) == []
    with pytest.raises(UserError, match="2 numbers for 3 classes"):
        build_loss(bad, DataMeta(num_classes=3))


@pytest.mark.parametrize(
    "name", ["CrossEntropyLoss", "cross_entropy", "crossentropy", "binary_cross_entropy", "MSELoss"]
)
def test_spellings_of_a_loss(name):
    assert check_loss(recipe(loss=name)) == []


@pytest.mark.parametrize("name", ["bce_with_logits", "bce"])
def test_targets_that_are_no_probabilities_are_refused(name: str) -> None:
    loss = build_loss(recipe("binary", loss={"name": name}), DataMeta())
    with pytest.raises(UserError, match="takes targets from 0 to 1, and these are from -1 to 1; encode"):
        loss.sum_and_count(torch.tensor([0.5, 0.5]), torch.tensor([-1.0, 1.0]))
