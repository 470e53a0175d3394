"""Metrics: scikit-learn's and sacrebleu's values, whatever the cut into ranks and batches."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import sacrebleu
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import logged
from sklearn import metrics as sk
from torch import nn

from distrain.config import Recipe, UserError
from distrain.config.registry import metrics
from distrain.datasets.base import DataMeta
from distrain.metrics import build_metrics, check_metrics, higher_is_better
from distrain.run.metrics_file import EVALUATION_KEYS

SETTINGS = settings(max_examples=25)


def recipe(task="classification", metrics=None, best=None, **sections):
    base = {"name": "t", "task": task, "data": "d", "model": "m", "batch": {"global": 8}, "train": {"steps": 10}}
    return Recipe.model_validate(base | {"eval": {"metrics": metrics, "best": best}} | sections)


def parts_of(count, cuts):
    """Cut 0..count-1 into ranks of batches at random places, with padding rows (-1) at the end of some."""
    generator = np.random.default_rng(cuts)
    ranks = [[] for _ in range(generator.integers(1, 4))]
    start = 0
    while start < count:
        size = int(generator.integers(1, 8))
        rows = list(range(start, min(start + size, count))) + [-1] * int(generator.integers(0, 3))
        ranks[generator.integers(len(ranks))].append(rows)
        start += size
    for rank in ranks:
        rank.insert(generator.integers(len(rank) + 1), [-1, -1])
    return ranks


def evaluate(task, metrics, outputs, targets, cuts=None, meta=None, **sections):
    """Return the values of an evaluation in one piece, or over the ranks and batches that `cuts` draws."""
    asked = recipe(task, metrics, **sections)
    meta = meta or DataMeta()
    if cuts is None:
        whole = build_metrics(asked, meta)
        whole.update(outputs, targets)
        return whole.compute(whole.sums(), whole.gather(lambda value: [value]))
    sets = []
    for batches in parts_of(len(targets), cuts):
        metric_set = build_metrics(asked, meta)
        for rows in batches:
            index = torch.tensor(rows).clamp(min=0)
            metric_set.update(outputs[index], targets[index], torch.tensor(rows) >= 0)
        sets.append(metric_set)
    total = torch.stack([each.sums() for each in sets]).sum(0)
    return sets[0].compute(total, sets[-1].gather(lambda _: [each.gathered() for each in sets]))


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(value), rtol=1e-12, atol=1e-12, err_msg=name)


# --------------------------------------------------------------------------------------------------------------------
# Against scikit-learn

SCORES = [f"{kind}_{average}" for kind in ("precision", "recall", "f1") for average in ("micro", "macro", "weighted")]
FUNCTIONS = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}


def expected_scores(truth, predicted, labels=None):
    values = {}
    for name in SCORES:
        kind, _, average = name.partition("_")
        values[name] = FUNCTIONS[kind](truth, predicted, average=average, zero_division=0)
    for kind, function in FUNCTIONS.items():
        values[f"{kind}_per_class"] = function(truth, predicted, average=None, zero_division=0, labels=labels)
    return values


@SETTINGS
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 10**6))
def test_classification_is_scikit_learns(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few of the classes occur, so that some are in neither, in one of, or in both of truth and prediction.
    outputs = torch.randn(count, classes, generator=generator) + torch.randn(classes, generator=generator) * 2
    targets = torch.randint(
        0, int(torch.randint(1, classes + 1, (1,), generator=generator)), (count,), generator=generator
    )
    truth, predicted = targets.numpy(), outputs.argmax(-1).numpy()
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "confusion_matrix": sk.confusion_matrix(truth, predicted, labels=range(classes)),
        "precision": sk.precision_score(truth, predicted, average="macro", zero_division=0),
        "balanced_accuracy": np.mean([np.mean(predicted[truth == each] == each) for each in np.unique(truth)]),
        **expected_scores(truth, predicted, range(classes)),
    }
    if classes > 2:
        expected["top_2"] = sk.top_k_accuracy_score(truth, outputs.numpy(), k=2, labels=range(classes))
    probabilities = outputs.double().softmax(-1).numpy()
    there = [each for each in range(classes) if 0 < (truth == each).sum() < count]
    expected["auroc"] = (
        np.mean([sk.roc_auc_score(truth == each, probabilities[:, each]) for each in there]) if there else math.nan
    )
    expected["average_precision"] = np.mean(
        [sk.average_precision_score(truth == each, probabilities[:, each]) for each in np.unique(truth)]
    )
    names = [{"name": "top_k", "k": 2} if name == "top_2" else name for name in expected]
    close(evaluate("classification", names, outputs, targets), expected)
    close(evaluate("classification", names, outputs, targets, cuts=seed), expected)


def test_multiclass_auroc_is_scikit_learns_own():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(60, 3, generator=generator)
    targets = torch.randint(0, 3, (60,), generator=generator)
    expected = sk.roc_auc_score(targets, outputs.double().softmax(-1), multi_class="ovr", average="macro")
    assert evaluate("classification", ["auroc"], outputs, targets)["auroc"] == pytest.approx(expected, abs=1e-12)


@SETTINGS
@given(st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([(), (1,), (2,)]))
def test_binary_is_scikit_learns(count, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, *shape, generator=generator) + torch.randn(1, generator=generator)
    targets = (torch.rand(count, generator=generator) < torch.rand(1, generator=generator)).float()
    logits = outputs[:, 1] - outputs[:, 0] if shape == (2,) else outputs.reshape(count)
    truth, predicted = targets.long().numpy(), (logits > 0).long().numpy()
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "precision": sk.precision_score(truth, predicted, zero_division=0),
        "recall": sk.recall_score(truth, predicted, zero_division=0),
        "f1": sk.f1_score(truth, predicted, zero_division=0),
        "confusion_matrix": sk.confusion_matrix(truth, predicted, labels=[0, 1]),
        "auroc": sk.roc_auc_score(truth, logits) if 0 < truth.sum() < count else math.nan,
        "average_precision": sk.average_precision_score(truth, logits) if truth.any() else 0.0,
        **expected_scores(truth, predicted, [0, 1]),
    }
    close(evaluate("binary", list(expected), outputs, targets), expected)
    close(evaluate("binary", list(expected), outputs, targets, cuts=seed), expected)


@pytest.mark.parametrize(("task", "shape"), [("binary", (60,)), ("multilabel", (60, 3))])
def test_outputs_are_probabilities_where_the_loss_takes_those(task, shape):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(shape, generator=generator), torch.randint(0, 2, shape, generator=generator).float()
    names = [
        "accuracy",
        "f1_micro",
        "auroc",
        "average_precision",
        "confusion_matrix",
        f"{task.capitalize()}CalibrationError" if task == "binary" else "MultilabelRankingLoss",
    ]
    meta = DataMeta(num_targets=3 if task == "multilabel" else None)
    of_logits = evaluate(task, names, logits.double(), targets, meta=meta)
    of_shares = evaluate(task, names, logits.double().sigmoid(), targets, meta=meta, loss="bce")
    close(of_shares, of_logits)


@SETTINGS
@given(st.integers(2, 40), st.integers(2, 4), st.integers(0, 10**6))
def test_multilabel_is_scikit_learns(count, labels, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, labels, generator=generator)
    targets = (torch.rand(count, labels, generator=generator) < torch.rand(labels, generator=generator) - 0.2).float()
    truth, predicted = targets.long().numpy(), (outputs > 0).long().numpy()
    both = [each for each in range(labels) if 0 < truth[:, each].sum() < count]
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "confusion_matrix": sk.multilabel_confusion_matrix(truth, predicted),
        "auroc": np.mean([sk.roc_auc_score(truth[:, each], outputs[:, each]) for each in both]) if both else math.nan,
        "average_precision": np.mean(
            [sk.average_precision_score(t, s) if t.any() else 0.0 for t, s in zip(truth.T, outputs.T, strict=True)]
        ),
        **expected_scores(truth, predicted),
    }
    close(evaluate("multilabel", list(expected), outputs, targets), expected)
    close(evaluate("multilabel", list(expected), outputs, targets, cuts=seed), expected)


@SETTINGS
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([(), (1,), (3,)]), st.sampled_from([0, 1e3, 1e8]))
def test_regression_is_scikit_learns_however_large_the_offset(count, seed, shape, offset):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, *shape, generator=generator, dtype=torch.float64) + offset
    outputs = targets + torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    arrays = targets.numpy(), outputs.numpy()
    expected = {
        "mae": sk.mean_absolute_error(*arrays),
        "mse": sk.mean_squared_error(*arrays),
        "rmse": sk.root_mean_squared_error(*arrays),
        "r2": sk.r2_score(*arrays),
    }
    for cuts in (None, seed):
        found = evaluate("regression", None if cuts is None else list(expected), outputs, targets, cuts)
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-10, abs=1e-10), name
    # Standardised targets are scored in their own units, from sums alone.
    columns = targets.reshape(count, -1)
    mean, std = (columns.mean(0) + 1.0, columns.std(0) * 1.5)
    meta = DataMeta(target_mean=tuple(mean.tolist()), target_std=tuple(std.tolist()))
    scaled = [((each.reshape(count, -1) - mean) / std).reshape(each.shape) for each in (outputs, targets)]
    assert not build_metrics(recipe("regression"), meta).gather(pytest.fail)
    for name, value in evaluate("regression", list(expected), *scaled, seed, meta).items():
        assert value == pytest.approx(expected[name], rel=1e-6 if offset == 1e8 else 1e-9, abs=1e-9), name


@pytest.mark.parametrize("standardised", [False, True])
def test_r2_of_targets_that_do_not_vary(standardised):
    meta = DataMeta(target_mean=(7.0,), target_std=(3.0,)) if standardised else DataMeta()
    targets = torch.full((9,), 0.1)
    assert evaluate("regression", ["r2"], targets, targets, 1, meta)["r2"] == 1.0
    assert evaluate("regression", ["r2"], targets + 0.5, targets, 1, meta)["r2"] == 0.0
    assert math.isnan(evaluate("regression", ["r2"], targets[:1], targets[:1], None, meta)["r2"])


@pytest.mark.parametrize("ignored", [-1, -100, 0])
def test_no_metric_counts_samples_whose_target_is_ignored(tmp_path, ignored):
    (tmp_path / "own.py").write_text("def own(outputs, targets):\n    return (outputs.argmax(1) == targets).float()\n")
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(50, 4, generator=generator), torch.randint(1, 4, (50,), generator=generator)
    targets[::5] = ignored
    kept = targets != ignored
    truth, guess = targets[kept], outputs.argmax(1)[kept]
    expected = {
        "accuracy": sk.accuracy_score(truth, guess),
        "Accuracy": sk.accuracy_score(truth, guess),
        "MulticlassCohenKappa": sk.cohen_kappa_score(truth, guess),
        "own": sk.accuracy_score(truth, guess),
    }
    names = [name for name in expected if name not in ("own", "Accuracy")]
    names += ["torchmetrics:Accuracy", f"{tmp_path}/own.py:own"]
    sections = {"loss": {"name": "cross_entropy", "ignore_index": ignored}}
    whole = evaluate("classification", names, outputs, targets, meta=DataMeta(num_classes=4), **sections)
    close(whole, {name: expected[name] for name in whole})
    for cuts in range(4):
        cut = evaluate("classification", names, outputs, targets, cuts, DataMeta(num_classes=4), **sections)
        close(cut, whole)


# --------------------------------------------------------------------------------------------------------------------
# Tokens and texts


@SETTINGS
@given(st.integers(1, 20), st.integers(0, 10**6))
def test_tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (count, 5), generator=generator)
    targets[torch.rand(count, 5, generator=generator) < 0.3] = -100
    targets[0, 0] = 3
    real = targets != -100
    entropy = nn.functional.cross_entropy(outputs[real].double(), targets[real]).item()
    expected = {
        "perplexity": math.exp(entropy),
        "token_accuracy": (outputs.argmax(-1) == targets)[real].double().mean().item(),
        "bits_per_byte": entropy / math.log(2) / 4.0,
        "top_3": sk.top_k_accuracy_score(targets[real], outputs[real], k=3, labels=range(7)),
    }
    meta = DataMeta(vocab_size=7, bytes_per_token=4.0)
    for sections in ({}, {"loss": {"name": "cross_entropy", "label_smoothing": 0.3}}):
        for cuts in (None, seed):
            found = evaluate("language_modeling", list(expected), outputs, targets, cuts, meta, **sections)
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-6), name


def test_the_loss_is_taken_over_only_where_it_is_the_entropy():
    outputs, targets = torch.randn(2, 3, 4), torch.randint(0, 4, (2, 3))
    given_loss = torch.tensor(12.0), torch.tensor(6.0)
    for sections, is_taken in (({}, True), ({"loss": {"name": "cross_entropy", "label_smoothing": 0.1}}, False)):
        metric_set = build_metrics(recipe("language_modeling", ["perplexity"], **sections), DataMeta())
        metric_set.update(outputs, targets, loss=given_loss)
        assert (metric_set.compute(metric_set.sums())["perplexity"] == pytest.approx(math.exp(2))) is is_taken


TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("", "something is there"),
    ("a dog, a dog!", "A dog; a dog."),
    ("exactly the same sentence as this", "exactly the same sentence as this"),
    ("one", "one two three four five"),
]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"lowercase": True, "tokenize": "char"},
        {"smooth_method": "add-k"},
        {"smooth_method": "floor", "smooth_value": 0.2},
        {"max_ngram_order": 2, "effective_order": True},
    ],
)
def test_bleu_is_sacrebleus(args):
    hypotheses, references = [list(column) for column in zip(*TEXTS, strict=True)]
    expected = sacrebleu.BLEU(**args).corpus_score(hypotheses, [references]).score
    asked = recipe("seq2seq", [{"name": "bleu", **args}])
    first, second, idle = (build_metrics(asked, DataMeta()) for _ in range(3))
    assert first.needs_text
    first.update_text(hypotheses[:2], references[:2])
    first.update_text([hypotheses[2], "padding", "more"], [references[2], "padding", "x"], [True, False, False])
    second.update_text(hypotheses[3:], references[3:], torch.tensor([True, True]))
    sums = first.sums() + second.sums() + idle.sums()
    assert first.compute(sums)["bleu"] == pytest.approx(expected, abs=1e-12)


def test_bleu_without_a_match_is_zero():
    metric_set = build_metrics(recipe("seq2seq", ["bleu"]), DataMeta())
    metric_set.update_text([""], ["a b c"])
    assert metric_set.compute(metric_set.sums())["bleu"] == 0.0


# --------------------------------------------------------------------------------------------------------------------
# torchmetrics and the user's own

TORCHMETRICS = {
    "classification": [
        "CohenKappa",
        "torchmetrics:MatthewsCorrCoef",
        {"name": "FBetaScore", "beta": 0.5, "average": "macro"},
        "CalibrationError",
        "MulticlassJaccardIndex",
        "AUROC",
        {"name": "Specificity", "average": "none"},
    ],
    "binary": ["CohenKappa", "BinaryHingeLoss", "torchmetrics:AveragePrecision"],
    "multilabel": ["HammingDistance", "MultilabelRankingLoss", "ExactMatch"],
    "regression": [
        "R2Score",
        "PearsonCorrCoef",
        "SpearmanCorrCoef",
        "ExplainedVariance",
        "MeanAbsolutePercentageError",
    ],
    "language_modeling": ["Perplexity", "Accuracy"],
}


@pytest.mark.parametrize("task", ["segmentation", "token_classification"])
@pytest.mark.parametrize("ignored", [None, 255, 2])
def test_of_places_those_that_are_not_ignored_are_counted(task, ignored):
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(20, 4, 5, 6, generator=generator)
    outputs[:, 3] -= 2.0
    targets = torch.randint(0, 3, (20, 5, 6), generator=generator)
    if task == "token_classification":  # 4 tokens of 4 classes: which is which is known by the task
        outputs, targets = outputs[:, :, :4, 0].contiguous(), targets[:, :4, 0].contiguous()
    elif ignored is not None:
        targets[:, 0] = ignored
    left_out = -100 if ignored is None else ignored
    if task == "token_classification":
        targets[::3, 1] = left_out
    scores = outputs.movedim(1, -1) if task == "segmentation" else outputs
    kept = targets != left_out
    truth, predicted = targets[kept].numpy(), scores.argmax(-1)[kept].numpy()
    accuracy = "pixel_accuracy" if task == "segmentation" else "token_accuracy"
    expected = {
        accuracy: sk.accuracy_score(truth, predicted),
        "f1_macro": sk.f1_score(truth, predicted, average="macro", zero_division=0.0),
        "recall_per_class": sk.recall_score(truth, predicted, average=None, labels=range(4), zero_division=0.0),
        "confusion_matrix": sk.confusion_matrix(truth, predicted, labels=range(4)),
        "MulticlassCohenKappa": sk.cohen_kappa_score(truth, predicted),
    }
    if task == "segmentation":
        each = {"average": None, "labels": range(4), "zero_division": 0.0}
        scored = sorted({*truth, *predicted} - {left_out})  # a class that is ignored has no score
        expected |= {
            "mean_iou": sk.jaccard_score(truth, predicted, **each)[scored].mean(),
            "iou_per_class": sk.jaccard_score(truth, predicted, **each),
            "dice": sk.f1_score(truth, predicted, **each)[scored].mean(),
        }
        index = torchmetrics.JaccardIndex("multiclass", num_classes=4, ignore_index=left_out)
        assert expected["mean_iou"] == pytest.approx(index(outputs, targets).item(), abs=1e-6)
    loss = {} if ignored is None else {"loss": {"name": "cross_entropy", "ignore_index": ignored}}
    meta = DataMeta(num_classes=4)
    for cuts in (None, 0, 1):
        close(evaluate(task, list(expected), outputs, targets, cuts, meta, **loss), expected)


@pytest.mark.parametrize("task", TORCHMETRICS)
def test_torchmetrics_do_not_depend_on_the_cut(task):
    generator = torch.Generator().manual_seed(3)
    shape = {"classification": (30, 4), "binary": (30,), "multilabel": (30, 3), "language_modeling": (30, 3, 6)}
    outputs = torch.randn(shape.get(task, (30, 2)), generator=generator)
    targets = {
        "classification": torch.randint(0, 4, (30,), generator=generator),
        "binary": torch.randint(0, 2, (30,), generator=generator).float(),
        "multilabel": torch.randint(0, 2, (30, 3), generator=generator).float(),
        "regression": torch.randn(30, 2, generator=generator),
        "language_modeling": torch.randint(0, 6, (30, 3), generator=generator),
    }[task]
    if task == "language_modeling":
        targets[::3, 1] = -100
    meta = DataMeta(num_classes=4, vocab_size=6, num_targets={"multilabel": 3, "regression": 2}.get(task))
    whole = evaluate(task, TORCHMETRICS[task], outputs, targets, None, meta)
    assert all(np.isfinite(value).all() for value in whole.values())
    for cuts in range(3):
        close(evaluate(task, TORCHMETRICS[task], outputs, targets, cuts, meta), whole)


def test_torchmetrics_values_are_its_own():
    outputs, targets = torch.randn(20, 4), torch.randint(0, 4, (20,))
    meta = DataMeta(num_classes=4)
    found = evaluate(
        "classification", ["CohenKappa", {"name": "Accuracy", "average": "macro"}], outputs, targets, 5, meta
    )
    kappa = torchmetrics.CohenKappa(task="multiclass", num_classes=4)
    macro = torchmetrics.Accuracy(task="multiclass", num_classes=4, average="macro")
    assert found["CohenKappa"] == pytest.approx(kappa(outputs, targets).item(), abs=1e-6)
    assert found["Accuracy"] == pytest.approx(macro(outputs, targets).item(), abs=1e-6)
    small = torch.full((4,), 0.1)  # logits that torchmetrics would take for probabilities
    assert evaluate("binary", ["Accuracy"], small, torch.ones(4))["Accuracy"] == 1.0


def test_torchmetrics_of_texts():
    asked = recipe("seq2seq", ["WordErrorRate", "CHRFScore", {"name": "SacreBLEUScore", "lowercase": True}])
    first, second = build_metrics(asked, DataMeta()), build_metrics(asked, DataMeta())
    hypotheses, references = [list(column) for column in zip(*TEXTS, strict=True)]
    first.update_text(hypotheses[:2], references[:2], [True, True])
    first.update_text(["x"], ["y"], [False])
    second.update_text(hypotheses[2:], references[2:])
    found = first.compute(first.sums() + second.sums())
    nested = [[each] for each in references]
    assert found["WordErrorRate"] == pytest.approx(torchmetrics.text.WordErrorRate()(hypotheses, references).item())
    assert found["CHRFScore"] == pytest.approx(torchmetrics.text.CHRFScore()(hypotheses, nested).item(), abs=1e-6)
    bleu = torchmetrics.text.SacreBLEUScore(lowercase=True)(hypotheses, nested).item()
    assert found["SacreBLEUScore"] == pytest.approx(bleu, abs=1e-6)


def test_own_metrics(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torchmetrics\n"
        "def gap(outputs, targets, power=1):\n    return (outputs - targets).abs() ** power\n"
        "gap.higher_is_better = False\n"
        "def share(outputs, targets):\n    return (outputs > targets).sum(), targets.numel()\n"
        "class Mine(torchmetrics.MeanSquaredError):\n    pass\n"
        "def bad(outputs, targets):\n    return outputs[:1]\n"
    )
    own = f"{tmp_path}/own.py"
    outputs, targets = torch.randn(25), torch.randn(25)
    metrics = [{"name": f"{own}:gap", "power": 2}, f"{own}:share", f"{own}:Mine"]
    found = evaluate("regression", metrics, outputs, targets, 4)
    assert found["gap"] == pytest.approx(sk.mean_squared_error(targets, outputs), rel=1e-6)
    assert found["Mine"] == pytest.approx(found["gap"], rel=1e-6)
    assert found["share"] == (outputs > targets).double().mean().item()
    metric_set = build_metrics(recipe("regression", metrics), DataMeta())
    assert higher_is_better("share", metric_set)
    assert not higher_is_better("gap", metric_set)
    with pytest.raises(UserError, match="for 25 samples"):
        evaluate("regression", [f"{own}:bad"], outputs, targets)
    assert "power" in check_metrics(recipe("regression", [{"name": f"{own}:gap", "pwr": 2}]))[0]


OWN_TORCHMETRICS = """
import torch, torchmetrics

class Base(torchmetrics.Metric):
    def __init__(self, registered=("total", "count")):  # none of torchmetrics' own arguments
        super().__init__()
        self.name, self.seen = "mode", None
        for name in ("total", "count"):
            zero = torch.tensor(0.0)
            self.add_state(name, zero, "sum") if name in registered else setattr(self, name, zero)
    def update(self, outputs, targets):
        self.name = "another"
        self.total = self.total + (outputs - targets).abs().sum()
        self.count = self.count + len(targets)
    def compute(self):
        return self.total / self.count

class OfBatches(Base):
    def update(self, outputs, targets):
        self.total = self.total + (outputs - targets).abs().mean()
        self.count = self.count + 1

class Around(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.inner = torchmetrics.MeanAbsoluteError()
        self.add_state("unused", torch.tensor(0.0), "sum")
    def update(self, outputs, targets):
        self.inner.update(outputs, targets)
    def compute(self):
        return self.inner.compute()
"""


@pytest.mark.parametrize(
    ("metric", "arguments", "says"),
    [
        ("Base", {}, None),
        ("Base", {"registered": []}, None),  # from all predictions
        ("Around", {}, None),
        ("Base", {"registered": ["total"]}, "update() of Base changes count, and the states that are summed"),
        ("OfBatches", {}, "metric OfBatches is no mean over samples"),
    ],
)
def test_a_torchmetric_of_ones_own_is_right_or_said_not_to_be(tmp_path, metric, arguments, says):
    (tmp_path / "own.py").write_text(OWN_TORCHMETRICS)
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(25, generator=generator), torch.randn(25, generator=generator)
    asked = [{"name": f"{tmp_path}/own.py:{metric}", **arguments}]
    with logged() as lines:
        try:
            found = evaluate("regression", asked, outputs, targets, 4)
        except UserError as error:
            lines.append(str(error))
    assert bool(lines) == (says is not None)
    assert all(says in line for line in lines)
    if says is None:
        assert found[metric] == pytest.approx((outputs - targets).abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("result", "coupled"),
    [
        ("(outputs - targets).abs()", False),
        ("(outputs - targets).abs().mean()", False),
        ("(outputs - targets).abs().mean().item()", False),
        ("(outputs > targets).sum(), len(targets)", False),
        ("targets[20].exp()", False),  # half of the batch is too small for it
        ("(outputs - targets).square().mean().sqrt()", True),
        ("(outputs > targets).sum()", True),
        ("torch.corrcoef(torch.stack((outputs, targets)))[0, 1].item()", True),
        ("outputs.std() * len(targets), len(targets)", True),
    ],
)
def test_a_metric_that_takes_the_samples_of_a_batch_together_is_warned_of_once(tmp_path, result, coupled):
    (tmp_path / "own.py").write_text(f"import torch\ndef own(outputs, targets):\n    return {result}\n")
    outputs, targets = torch.arange(24.0).sqrt(), torch.arange(24.0).cos()
    metric_set = build_metrics(recipe("regression", [f"{tmp_path}/own.py:own"]), DataMeta())
    with logged() as lines:
        for _ in range(3):
            metric_set.update(outputs, targets)
    assert ["own is no mean over samples: its value for 24" in line for line in lines] == [True] * coupled


@pytest.mark.parametrize("result", ["None", "'high'", "{'a': 1}"])
def test_a_metric_that_returns_no_number_is_named(tmp_path, result):
    (tmp_path / "own.py").write_text(f"def own(outputs, targets):\n    return {result}\n")
    with pytest.raises(UserError, match=r"own returned (None|a str|a dict) for 4 samples; expected one value"):
        evaluate("regression", [f"{tmp_path}/own.py:own"], torch.ones(4), torch.ones(4))


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ("[(outputs == targets).sum().item(), len(targets)]", "2 values"),
        ("outputs[:3]", "a tensor (3,)"),
        ("outputs.numpy()[:3]", "an array (3,)"),
        ("outputs, outputs", "2 values"),
        ("outputs.sum(), len(targets), 1", "3 values"),
    ],
)
def test_a_metric_that_returns_other_than_a_value_for_each_sample_is_never_averaged(tmp_path, result, shown):
    (tmp_path / "own.py").write_text(f"def own(outputs, targets):\n    return {result}\n")
    with pytest.raises(UserError, match=rf"own returned {re.escape(shown)} for 4 samples; expected one value"):
        evaluate("regression", [f"{tmp_path}/own.py:own"], torch.ones(4), torch.ones(4))


@pytest.mark.parametrize(
    "result", ["outputs.tolist()", "outputs.numpy()", "outputs.mean().item()", "outputs.numpy().sum(), len(targets)"]
)
def test_a_metric_may_return_numbers_of_python_and_numpy(tmp_path, result):
    (tmp_path / "own.py").write_text(f"def own(outputs, targets):\n    return {result}\n")
    values = evaluate("regression", [f"{tmp_path}/own.py:own"], torch.tensor([1.0, 2, 3, 6]), torch.ones(4))
    assert values["own"] == 3.0


# --------------------------------------------------------------------------------------------------------------------
# Names and mistakes


@pytest.mark.parametrize("name", sorted(EVALUATION_KEYS))
def test_a_metric_with_the_name_of_a_rows_own_key_is_refused(tmp_path, name):
    (tmp_path / "own.py").write_text(f"def {name}(outputs, targets):\n    return outputs\n")
    (problem,) = check_metrics(recipe("regression", [f"{tmp_path}/own.py:{name}"]))
    assert repr(name) in problem


def test_values_of_one_metric_never_replace_those_of_another(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch, torchmetrics\n"
        "class a(torchmetrics.MeanSquaredError):\n"
        "    def compute(self):\n        return {'b_c': torch.tensor(1.0), 'mae': torch.tensor(2.0)}\n"
        "class a_b(torchmetrics.MeanSquaredError):\n"
        "    def compute(self):\n        return {'c': torch.tensor(3.0)}\n"
        "class a_mae(torchmetrics.MeanAbsoluteError):\n    pass\n"
        "class sam(torchmetrics.MeanSquaredError):\n"
        "    def compute(self):\n        return {'x': torch.tensor(4.0)}\n"
    )
    own = f"{tmp_path}/own.py"
    outputs, targets = torch.zeros(4), torch.full((4,), 0.5)
    found = evaluate("regression", [f"{own}:{name}" for name in ("a", "a_b", "a_mae", "sam")], outputs, targets)
    assert found == {"a_b_c": 1.0, "a_mae_": 2.0, "a_b_c_": 3.0, "a_mae": 0.5, "sam_x": 4.0}
    assert not found.keys() & EVALUATION_KEYS


@pytest.mark.parametrize(
    ("task", "metrics", "outputs", "targets", "caveats"),
    [
        ("binary", ["auroc", "f1", "accuracy"], [-1.0, 1.0], [0.0, 0.0], ["auroc", "f1"]),
        ("binary", ["auroc", "recall", "f1_macro"], [-1.0, 1.0], [1.0, 1.0], ["auroc"]),
        ("binary", ["auroc", "f1", "recall"], [-1.0, 1.0], [0.0, 1.0], []),
        ("multilabel", ["f1_micro", "auroc"], [[-1.0, 1.0]] * 3, [[0.0, 0.0]] * 3, ["auroc", "f1_micro"]),
        ("multilabel", ["f1_micro", "f1_macro"], [[-1.0, 1.0]] * 3, [[1.0, 0.0]] * 3, []),
        ("regression", ["r2", "mae"], [1.0, 2.0], [3.0, 3.0], ["r2"]),
        ("regression", ["r2", "mae"], [1.0, 2.0], [3.0, 3.5], []),
        ("regression", ["PearsonCorrCoef"], [1.0, 2.0], [3.0, 3.0], ["PearsonCorrCoef"]),
        ("regression", ["mae", "rmse"], [math.inf, 2.0], [3.0, 3.0], ["mae", "rmse"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_that_say_nothing_are_known(task, metrics, outputs, targets, caveats):
    meta = DataMeta(num_classes=2, num_targets=2 if task == "multilabel" else None)
    metric_set = build_metrics(recipe(task, metrics), meta)
    metric_set.update(torch.tensor(outputs), torch.tensor(targets))
    metric_set.compute(metric_set.sums(), metric_set.gather(lambda each: [each]))
    assert sorted(metric_set.caveats) == caveats


@pytest.mark.parametrize(
    ("task", "metrics", "best", "words"),
    [
        ("classification", ["acuracy"], None, ["acuracy", "did you mean", "accuracy"]),
        ("classification", ["mae"], None, ["'mae' is for regression"]),
        ("classification", ["CohenKapa"], None, ["CohenKappa"]),
        ("classification", ["torchmetrics:Nothing"], None, ["no metric"]),
        ("classification", [{"name": "f1_macro", "beta": 2}], None, ["beta"]),
        ("classification", [{"name": "f1_macro", "average": "micro"}], None, ["average"]),
        ("classification", [{"name": "CohenKappa", "weight": "linear"}], None, ["weights"]),
        ("classification", [{"name": "CohenKappa", "weights": "lin"}], None, ["CohenKappa refuses"]),
        ("classification", ["top_k"], None, ["needs it"]),
        ("classification", [{"name": "top_k", "k": 0}], None, ["whole number"]),
        ("classification", ["top_2", {"name": "top_k", "k": 2}], None, ["twice"]),
        ("classification", ["loss"], None, ["twice"]),
        ("classification", ["accuracy"], "acc", ["eval.best", "accuracy"]),
        ("classification", ["accuracy"], "-accuracy", ["lowest accuracy"]),
        ("classification", ["confusion_matrix"], "confusion_matrix", ["not one number"]),
        ("classification", ["f1_per_class"], "f1_per_class", ["not one number"]),
        ("classification", ["acuracy", "mae"], None, ["acuracy", "'mae'"]),
        ("seq2seq", [{"name": "bleu", "smooth_method": "x"}], None, ["smooth_method"]),
        ("seq2seq", [{"name": "bleu", "tokenise": "13a"}], None, ["tokenize"]),
        ("classification", ["WordErrorRate"], None, ["compares texts"]),
        ("language_modeling", ["CalibrationError"], None, ["all predictions at once"]),
    ],
)
def test_mistakes_are_found_without_data(task, metrics, best, words):
    problems = "\n".join(check_metrics(recipe(task, metrics, best)))
    for word in words:
        assert word in problems


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("classification", ["accuracy", "f1_macro"]),
        ("binary", ["accuracy", "f1"]),
        ("multilabel", ["f1_micro", "f1_macro"]),
        ("regression", ["mae", "rmse", "r2"]),
        ("language_modeling", ["perplexity", "token_accuracy", "bits_per_byte"]),
        ("seq2seq", ["perplexity", "token_accuracy"]),
    ],
)
def test_every_task_has_its_usual_metrics(task, names):
    assert build_metrics(recipe(task), DataMeta(bytes_per_token=1.0)).names == names
    assert check_metrics(recipe(task)) == []


def test_what_is_best():
    metric_set = build_metrics(recipe("regression", ["mae", "r2"]), DataMeta())
    assert [higher_is_better(name, metric_set) for name in ("loss", "-loss", "mae", "-mae", "r2")] == [False] * 4 + [
        True
    ]


def test_bits_per_byte_needs_the_bytes():
    with pytest.raises(UserError, match="bytes of a token"):
        build_metrics(recipe("language_modeling", ["bits_per_byte"]), DataMeta())


def test_too_many_classes_are_asked_for():
    with pytest.raises(UserError, match="top_5 of 3 classes"):
        evaluate("classification", ["top5_accuracy"], torch.randn(4, 3), torch.zeros(4, dtype=torch.long))


def test_a_set_can_be_used_again():
    metric_set = build_metrics(recipe("classification", ["accuracy", "auroc"]), DataMeta())
    for _ in range(2):
        metric_set.reset()
        metric_set.update(torch.eye(3), torch.tensor([0, 1, 1]))
        values = metric_set.compute(metric_set.sums(), metric_set.gather(lambda value: [value]))
        assert values["accuracy"] == pytest.approx(2 / 3)


def test_every_name_is_explained():
    assert all(summary.endswith((".", ",")) and len(summary) < 120 for summary in metrics.summaries().values())
    assert {"accuracy", "f1_macro", "bleu", "top_k"} <= metrics.summaries().keys()


# --------------------------------------------------------------------------------------------------------------------
# Entities


def entities(tags):
    """Return (type, first, last) of each entity, by seqeval's definition in its default mode, tag by tag."""
    found, begin, before, kind_before = [], 0, "O", "_"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        kind = kind or "_"
        other = kind != kind_before
        ends = before in "ES" or (before == "B" and prefix in "BSO") or (before == "I" and prefix in "BSO")
        if ends or (before != "O" and other):
            found.append((kind_before, begin, place - 1))
        begins = prefix in "BS" or (before in "ESO" and prefix in "EI")
        if begins or (prefix != "O" and other):
            begin = place
        before, kind_before = prefix, kind
    return set(found)


def one_hot(rows, classes):
    """Return outputs (batch, seq, classes) that predict the tags of `rows`."""
    return torch.nn.functional.one_hot(
        torch.tensor([[classes.index(tag) for tag in row] for row in rows]), len(classes)
    )


def test_entities_are_counted_as_in_a_table_by_hand():
    classes = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    truth = ["B-PER I-PER O B-LOC O", "B-LOC I-LOC B-LOC O O", "O O O O O"]
    found = ["B-PER I-PER O B-PER O", "I-LOC I-LOC I-LOC O O", "O I-PER O O B-LOC"]
    # PER: there 1, found 3 (the B-LOC of the first row, and an I-PER of the last), right 1
    # LOC: there 3, found 2 (three tokens as one, and the last), right 0
    targets = one_hot([row.split() for row in truth], classes).argmax(-1)
    outputs = one_hot([row.split() for row in found], classes).double()
    names = [
        f"entity_{kind}{suffix}" for kind in ("precision", "recall", "f1") for suffix in ("", "_macro", "_per_type")
    ]
    meta = DataMeta(num_classes=5, class_names=classes)
    values = evaluate("token_classification", names, outputs, targets, meta=meta)
    expected = {
        "entity_precision": 1 / 5, "entity_precision_macro": 1 / 6, "entity_precision_per_type_PER": 1 / 3,
        "entity_recall": 1 / 4, "entity_recall_macro": 1 / 2, "entity_recall_per_type_PER": 1,
        "entity_f1": 2 / 9, "entity_f1_macro": 1 / 4, "entity_f1_per_type_PER": 1 / 2,
    }  # fmt: skip
    expected |= {f"entity_{kind}_per_type_LOC": 0 for kind in ("precision", "recall", "f1")}
    assert values == pytest.approx(expected)


@SETTINGS
@given(st.sampled_from(["BI", "BIES"]), st.integers(0, 2**31))
def test_entities_are_those_of_the_definition_whatever_lies_between(prefixes, seed):
    random = np.random.default_rng(seed)
    classes = ("O", *(f"{prefix}-{kind}" for kind in "XY" for prefix in prefixes), "B", "I")
    shape = (12, 7)
    targets, predicted = random.integers(0, len(classes), (2, *shape))
    predicted = np.where(random.random(shape) < 0.6, targets, predicted)
    targets[random.random(shape) < 0.25] = -100  # pieces of words, and padding
    sums = np.zeros(3)
    for row, found in zip(targets, predicted, strict=True):
        kept = np.flatnonzero(row != -100)
        there, seen = (entities([classes[each] for each in tags[kept]]) for tags in (row, found))
        sums += len(there & seen), len(seen), len(there)
    outputs = torch.nn.functional.one_hot(torch.from_numpy(predicted), len(classes)).double()
    meta = DataMeta(num_classes=len(classes), class_names=classes)
    names = ["entity_precision", "entity_recall", "entity_f1"]
    values = evaluate("token_classification", names, outputs, torch.from_numpy(targets), seed % 1000, meta)
    right, seen, there = sums
    assert values == pytest.approx(
        {"entity_precision": right / seen, "entity_recall": right / there, "entity_f1": 2 * right / (seen + there)}
    )


def test_entities_need_tags_that_mark_them():
    assert build_metrics(recipe("token_classification"), DataMeta(class_names=("O", "B-X", "I-X"))).names == [
        "token_accuracy", "f1_macro", "entity_f1",
    ]  # fmt: skip
    for names in (None, ("NN", "VB"), ("O",)):
        meta = DataMeta(num_classes=2, class_names=names)
        assert build_metrics(recipe("token_classification"), meta).names == ["token_accuracy", "f1_macro"]
        with pytest.raises(UserError, match="entity_f1 counts entities, whose tags are O, B-TYPE"):
            build_metrics(recipe("token_classification", ["entity_f1"]), meta)
