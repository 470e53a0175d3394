"""Scores: every sample once, in any world, and the integers of the libraries that everybody compares with."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import tokenizers
import torch
from checkpoint_state import rewrite_manifest
from evaluations import PAIRS, POINTS, evaluate_untrained, write_pairs
from own_parts import Points
from runs import Ended, captured, cli, losses, rows, state, train, write_recipe
from safetensors.numpy import load_file
from sklearn import metrics as sk
from worlds import in_world

from distrain.checkpoint import Criterion, find_best, list_checkpoints, read_manifest
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.data import build_data
from distrain.datasets.base import DataMeta
from distrain.datasets.evaluation import build_eval_loader
from distrain.diagnose.hang_diagnosis import evidence
from distrain.launchers import reported
from distrain.models import build_model
from distrain.networks.calling import forward
from distrain.run.folder import RunDir
from distrain.training import evaluation
from distrain.training.intervals import EvalHistory


@pytest.mark.parametrize("tests", [1, 5, 97])
@pytest.mark.fault(22)
def test_scores_are_those_of_scikit_learn_in_any_world(tmp_path: Path, tests: int) -> None:
    recipe = write_recipe(tmp_path, POINTS.format(tests=tests))
    points = Points("test", tests=tests)
    model = build_model(load_recipe(recipe).recipe, build_data(load_recipe(recipe).recipe).meta).eval()
    with torch.no_grad():
        logits = model(points.inputs)
    truth, guess = points.targets.numpy(), logits.argmax(1).numpy()
    for world_size in (1, 2, 3):
        ranks = in_world(world_size, evaluate_untrained, str(recipe))
        assert all(rank == ranks[0] for rank in ranks)
        found = ranks[0]
        assert found["samples"] == tests
        assert found["accuracy"] == sk.accuracy_score(truth, guess)
        assert found["confusion_matrix"] == sk.confusion_matrix(truth, guess, labels=[0, 1, 2]).tolist()
        f1 = sk.f1_score(truth, guess, average="macro", zero_division=0)
        assert found["f1_macro"] == pytest.approx(f1, abs=1e-12)
        loss = torch.nn.functional.cross_entropy(logits.double(), points.targets).item()
        assert found["loss"] == pytest.approx(loss, rel=1e-6)


BYTES = """
name: bytes
task: language_modeling
data: {{name: text, split: {{train: "{folder}/a.txt", test: "{folder}/b.txt"}}, seq_len: 4, tokenizer: {tokenizer}}}
model: {{name: gpt, n_layer: 1, n_head: 1, d_model: 8}}
batch: {{global: 2}}
train: {{steps: 2}}
eval: {{batch: 4, metrics: [bits_per_byte]}}
"""


def test_bits_per_byte_are_of_the_bytes_of_the_split(tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 9)
    (tmp_path / "b.txt").write_text("żółw 🐈\n" * 9)  # nearly a token for each byte
    recipe = write_recipe(tmp_path, BYTES.format(folder=tmp_path, tokenizer=tmp_path / "tokenizer.json"))
    (found,) = in_world(1, evaluate_untrained, str(recipe))
    tokens = len(tokenizer.encode("żółw 🐈\n" * 9).ids) + 1  # and the end of the file
    bytes_per_token = len(("żółw 🐈\n" * 9).encode()) / tokens
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) / bytes_per_token, rel=1e-6)


def evaluate_with_a_bad_sample(recipe: str) -> Ended:
    """Evaluate in a world whose last rank meets a sample that cannot be read."""

    def load_bad(*args: Any, **kwargs: Any) -> Any:
        yield from build_eval_loader(*args, **kwargs)
        if kwargs["rank"] == kwargs["world_size"] - 1:
            raise UserError("sample 7 cannot be read")

    rank = int(os.environ["RANK"])
    return captured(lambda: reported(None, rank, lambda: evaluate_untrained(recipe, load_bad)))


@pytest.mark.fault(21)
def test_a_sample_that_one_rank_cannot_read_ends_all_with_one_message(tmp_path: Path) -> None:
    ended = in_world(2, evaluate_with_a_bad_sample, str(write_recipe(tmp_path, POINTS.format(tests=5))))
    assert [rank.status for rank in ended] == [1, 1]
    assert [rank.err for rank in ended] == ["error (rank 0): sample 7 cannot be read\n", ""]


def spoiled(recipe: str, how: str) -> str:
    """Evaluate with a loader that repeats or drops samples; returns the error."""

    def load_spoiled(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(build_eval_loader(*args, **kwargs)):
            ids = batch["ids"]
            if number == 1 and kwargs["rank"] == 0:
                if how == "one dropped":
                    ids[0] = -1
                elif how == "one twice for another":
                    ids[0] = ids[1]
                elif how == "two swapped for two of the same sum":
                    ids[:2] += torch.tensor([1, -1]) * 50
            yield batch
            if how == "a batch twice" and number == 1:
                yield batch

    try:
        evaluate_untrained(recipe, load_spoiled)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "how", ["nothing", "one dropped", "one twice for another", "two swapped for two of the same sum", "a batch twice"]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_that_is_not_of_every_sample_once_is_refused(tmp_path: Path, how: str, world_size: int) -> None:
    errors = in_world(world_size, spoiled, str(write_recipe(tmp_path, POINTS.format(tests=97))), how)
    if how == "nothing":
        assert errors == [""] * world_size
        return
    for error in errors:
        assert "that are not the 97 of the data set, each once; its numbers are not reported" in error


def collectives_of_an_evaluation(folder: str, recipe: str, metrics: str, together: bool) -> int:
    """Return how many collectives this rank takes part in from the first batch on."""
    before: list[int] = []

    def collectives() -> int:
        return sum(evidence.collectives(Path(folder) / f"rank-{os.environ['RANK']}").values())

    def load(*args: Any, **kwargs: Any) -> Any:
        before.append(collectives())
        return build_eval_loader(*args, **kwargs)

    evaluate_untrained(recipe, load, [f"eval.metrics={metrics}"], together)
    return collectives() - before[0]


@pytest.mark.parametrize(
    "metrics", ["[]", "[accuracy]", "[accuracy, f1_macro, precision, recall, confusion_matrix, balanced_accuracy]"]
)
def test_one_reduction_carries_an_evaluation_whatever_its_metrics(tmp_path: Path, metrics: str) -> None:
    recipe = str(write_recipe(tmp_path, POINTS.format(tests=20)))
    assert in_world(2, collectives_of_an_evaluation, str(tmp_path), recipe, metrics, False) == [1, 1]
    # three batches of each rank, and the end: ranks agree on each before the forward pass
    assert in_world(2, collectives_of_an_evaluation, str(tmp_path), recipe, metrics, True) == [5, 5]


# --------------------------------------------------------------------------------------------------------------------
# Translations


def test_bleu_is_that_of_sacrebleu_in_any_world(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, PAIRS.format(path=write_pairs(tmp_path), steps=60))
    run = tmp_path / "run"
    train(1, recipe, run)
    (final,) = [row for row in rows(run) if row["event"] == "final"]
    for world_size in (2, 3):
        values = in_world(world_size, score_run, str(run))[0]
        assert values["bleu"] == final["bleu"]
        assert values["samples"] == 18
    hypotheses, references = in_world(1, translations, str(run))[0]
    wanted = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert 0 < wanted < 100, "neither is all wrong, nor all right"
    assert final["bleu"] == pytest.approx(wanted, abs=1e-9)


def test_a_transformers_model_writes_as_it_is_trained_to(tmp_path: Path) -> None:
    """By its own settings it would begin with another token and read the padding."""
    config = "d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, decoder_attention_heads: 2"
    config += ", max_position_embeddings: 20"
    model_key = f"model={{name: 'transformers:AutoModelForSeq2SeqLM', config: {{model_type: bart, {config}}}}}"
    recipe = write_recipe(tmp_path, PAIRS.format(path=write_pairs(tmp_path), steps=1))
    parsed = load_recipe(str(recipe), [model_key]).recipe
    data = build_data(parsed)
    meta, model = data.meta, build_model(parsed, data.meta).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # what is drawn is too small to tell sources apart
    batch = data.splits["test"].fetch(np.arange(4))
    texts, _ = evaluation.generated_texts(model, batch, meta)
    assert meta.decode is not None
    assert len(set(texts)) == 4
    for row, text in enumerate(texts):
        source, limit = batch["inputs"]["source"][row], 2 * int((batch["targets"][row] != -100).sum()) + 8
        target = [meta.bos_id]
        while len(target) <= min(limit, 19):
            inputs = {"source": source[source != meta.pad_id][None], "target": torch.tensor([target])}
            target.append(int(forward(model, inputs).logits[0, -1].argmax()))
        assert text == meta.decode(target[1:])


def test_a_row_is_generated_up_to_a_limit_of_its_own() -> None:
    """What a batch has in common would depend on the number of processes."""

    class Endless(torch.nn.Module):
        def generate(self, source: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            return torch.ones(len(source), max_new_tokens, dtype=torch.int64)

    targets = torch.full((3, 5), -100)
    for row, length in enumerate((1, 5, 3)):
        targets[row, :length] = 2
    batch = {"inputs": {"source": torch.ones(3, 4)}, "targets": targets, "references": ["a", "b", "c"]}
    hypotheses, references = evaluation.generated_texts(Endless(), batch, DataMeta(decode=lambda ids: "x" * len(ids)))
    assert [len(text) for text in hypotheses] == [10, 18, 14]
    assert references == ["a", "b", "c"]


def score_run(run: str) -> dict[str, Any]:
    from distrain.inference import evaluate_checkpoint

    return evaluate_checkpoint(run, "test")


def translations(run: str) -> tuple[list[str], list[str]]:
    """Translate one sentence after another."""
    from distrain.inference import Trained

    trained = Trained.load(run)
    source, decode = trained.data.splits["test"], trained.data.meta.decode
    assert decode is not None
    hypotheses, references = [], []
    for number in range(len(source)):
        batch = source.fetch(np.array([number]))
        limit = 2 * int((batch["targets"] != -100).sum()) + 8
        hypotheses.append(decode(trained.model.generate(batch["inputs"]["source"], max_new_tokens=limit)[0].tolist()))
        references.extend(batch["references"])
    return hypotheses, references


# --------------------------------------------------------------------------------------------------------------------
# What scores decide

NAN = math.nan

WAVERING = (
    POINTS.format(tests=40)
    .replace("every: null", "every: 1 steps")
    .replace("checkpoint: {async: false}", "checkpoint: {every: 100 steps, async: false, keep: 1}")
    + "optim: {name: sgd, lr: 3.0}\nseed: 3\n"
)
"""A rate so high that scores go up and down."""


def scored(run: Path, key: str = "accuracy") -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows(run) if row["event"] == "eval"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_best_is_exported_where_it_is_named(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    run = tmp_path / "run"
    train(world_size, recipe, run, "train.steps=12", "eval.best=accuracy")
    top = max(score for _, score in scored(run))
    first = min(step for step, score in scored(run) if score == top)
    assert 1 < first < 12, "a test of something"
    done = RunDir(run).finished
    assert done is not None
    assert done["best"] == {"metric": "accuracy", "step": first, "value": top}
    assert (done["exported_step"], done["exported"]) == (first, "best accuracy")
    assert Path(done["checkpoint"]).name == f"step-{first:08d}"
    assert done["test"]["accuracy"] == top, "the test split is the one scored in training here"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{first:08d}", "step-00000012"]
    stored = state(Path(done["checkpoint"]))
    for name, tensor in load_file(done["model"]).items():
        assert np.array_equal(tensor.reshape(-1).astype(np.float64), stored[f"model/{name}"])


def test_the_last_is_exported_otherwise(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    for name, more in (("unnamed", []), ("not kept", ["eval.best=accuracy", "checkpoint.keep_best=0"])):
        train(1, recipe, tmp_path / name, "train.steps=12", *more)
        done = RunDir(tmp_path / name).finished
        assert done is not None
        assert done["exported_step"] == 12
        assert done["exported"].startswith("last step")
        assert ("was not kept: checkpoint.keep_best" in done["exported"]) == (name == "not kept")


def test_the_best_few_are_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    run = tmp_path / "run"
    train(1, recipe, run, "train.steps=12", "eval.best=-loss", "checkpoint.keep_best=2", "checkpoint.every=1 steps")
    by_loss = sorted(scored(run, "loss"), key=lambda item: item[1])
    kept = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()}
    assert kept == {by_loss[0][0], by_loss[1][0], 12}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_stops_early_and_stays_stopped(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    options = ["train.steps=200", "eval.best=accuracy", "eval.early_stop={patience: 3, min_delta: 0.01}"]
    run = tmp_path / "run"
    ended = train(world_size, recipe, run, *options)
    scores = scored(run)
    end = scores[-1][0]
    assert end < 200
    best = EvalHistory(Criterion("accuracy", True), min_delta=0.01)
    for step, score in scores:
        assert not best.exhausted(3)
        best.add(step, score)
    assert best.exhausted(3)
    assert "has not improved by more than 0.01 in 3 evaluations" in ended[0].out
    done = RunDir(run).finished
    assert done is not None
    assert done["steps"] == end
    # as when it is killed between its last save and its end
    before = rows(run)
    (run / "FINISHED").unlink()
    train(world_size, recipe, run, *options)
    again = RunDir(run).finished
    assert again is not None
    assert (again["steps"], again["exported_step"]) == (end, done["exported_step"])
    assert rows(run) == before
    assert len(losses(run)) == len({row["step"] for row in before if row["event"] == "train"})


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "exhausted"),
    [
        ([], 1, 0.0, False),
        ([0.5], 1, 0.0, False),
        ([0.5, 0.5], 1, 0.0, True),
        ([0.5, 0.6], 1, 0.0, False),
        ([0.5, 0.55, 0.58], 2, 0.1, True),
        ([0.5, 0.55, 0.61], 2, 0.1, False),
        ([0.5, 0.4, 0.6, 0.4], 2, 0.0, False),
        ([NAN, NAN], 2, 0.0, False),
        ([NAN, NAN], 1, 0.0, True),
        ([NAN, 0.1], 1, 0.0, False),
        ([0.1, NAN, 0.2], 2, 0.0, False),
        ([0.1, NAN, 0.05], 2, 0.0, True),
        ([math.inf, 0.1, 0.2], 1, 0.0, False),
        ([NAN, 0.1, NAN, NAN], 2, 0.0, True),
    ],
)
def test_patience(scores: list[float], patience: int, min_delta: float, exhausted: bool) -> None:
    for sign, higher in ((1, True), (-1, False)):
        best = ranked(higher, [(step, sign * score) for step, score in enumerate(scores)], min_delta)
        assert best.exhausted(patience) is exhausted
        # as a start takes it up that goes on
        again = EvalHistory(best.criterion, min_delta)
        again.load(json.loads(json.dumps(best.state(), allow_nan=False)), min_delta)
        assert repr(again) == repr(best)


def ranked(higher: bool, scores: list[tuple[int, float]], min_delta: float = 0.0) -> EvalHistory:
    best = EvalHistory(Criterion("score", higher), min_delta)
    for step, score in scores:
        best.add(step, score)
    return best


def test_the_earliest_of_equals_is_best() -> None:
    best = ranked(False, [(1, 0.5), (2, 0.3), (3, NAN), (4, 0.3)])
    assert best.value() == (2, 0.3)
    assert not best.improved()
    assert ranked(False, [(1, 0.5), (2, 0.3)]).improved()
    assert ranked(False, []).value() is None


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_what_is_nan_or_infinite_is_never_the_best(higher: bool, bad: float) -> None:
    best = ranked(higher, [(1, bad), (2, bad)])
    assert best.value() is None
    assert not best.improved()
    best.add(3, 0.5)
    assert best.improved()
    best.add(4, bad)
    assert best.value() == (3, 0.5)
    assert not best.improved()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_final_score_is_that_of_evaluate(tmp_path: Path, world_size: int) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    run = tmp_path / "run"
    train(2, recipe, run, "eval.best=accuracy", "train.ema=0.5")
    done = RunDir(run).finished
    assert done is not None
    values = in_world(world_size, score_run, str(run))[0]
    assert values["processes"] == world_size
    assert values["checkpoint"] == done["checkpoint"]
    for key, value in done["test"].items():
        assert values[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert values["accuracy"] == done["test"]["accuracy"]


def test_a_best_metric_that_is_not_computed_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, POINTS.format(tests=5))
    ended = train(1, recipe, tmp_path / "run", "eval.best=auroc_macro", status=1)
    assert "eval.best" in ended[0].err
    assert "Traceback" not in ended[0].err
    assert cli("train", recipe, "eval.best=accurcy", "--run-dir", tmp_path / "other").status == 1


# --------------------------------------------------------------------------------------------------------------------
# Numbers that are none

HOLED = """
import torch
from torch.utils.data import Dataset


class Holed(Dataset):
    # its training samples are sound; of the others sample 7 is not
    classes = {classes}

    def __init__(self, split):
        self.sound = str(split).endswith("train")

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.randn(4, generator=torch.Generator().manual_seed(i)) + i % 2
        y = {target}
        return ({inputs} if not self.sound and i == 7 else x), ({bad_target} if not self.sound and i == 7 else y)


def none(outputs, targets):
    return torch.tensor(float("nan")), 1
"""
HOLED_RECIPE = """
name: holed
task: {task}
data: {{name: "data.py:Holed", split: {{train: train, valid: valid}}}}
model: {{name: mlp, hidden: [4]}}
batch: {{global: 12}}
train: {{steps: 9}}
log: {{every: 9 steps}}
eval: {{every: 3 steps, batch: 5}}
checkpoint: {{every: 9 steps, keep: 1, keep_best: 1, async: false}}
"""


def write_holed(folder: Path, task: str, **changes: str) -> Path:
    given = {"target": "i % 2", "classes": "('a', 'b')"}
    if task == "regression":
        given = {"target": "torch.tensor([float(i)])", "classes": "None"}
    given |= {"inputs": "x", "bad_target": "y"} | changes
    text = HOLED
    for key, value in given.items():
        text = text.replace(f"{{{key}}}", value)
    (folder / "data.py").write_text(text)
    return write_recipe(folder, HOLED_RECIPE.format(task=task))


@pytest.mark.parametrize(
    ("world_size", "task", "changes", "where"),
    [
        (1, "classification", {"inputs": 'x * float("nan")'}, "the inputs of sample 7 are not finite"),
        (2, "classification", {"inputs": 'x + float("inf")'}, "the inputs of sample 7 are not finite"),
        (1, "regression", {"inputs": "x + 3e38"}, "not finite in a batch of samples 5, 6, 7, 8, 9"),
    ],
)
@pytest.mark.fault(38)
def test_an_evaluation_that_is_nan_or_infinite_is_an_error(
    tmp_path: Path, world_size: int, task: str, changes: dict[str, str], where: str
) -> None:
    recipe, run = write_holed(tmp_path, task, **changes), tmp_path / "run"
    ended = train(world_size, recipe, run, status=1)
    said = "".join(rank.err for rank in ended)
    for words in ("the loss on split 'valid' after step 3 is ", where, "anomalies.nonfinite"):
        assert said.count(words) == 1
    assert "Traceback" not in said
    assert [info.step for info in list_checkpoints(run / "checkpoints")] == [3], "what was trained is saved"
    assert read_manifest(run / "checkpoints" / "step-00000003").score is None
    (row,) = (row for row in rows(run) if row["event"] == "eval")
    assert where in row["nonfinite"]
    # the next start says it again, and not only that it goes on
    assert where in train(1, recipe, run, status=1)[0].err


@pytest.mark.parametrize(("patience", "best"), [(1, "loss"), (2, "accuracy"), (2, "auroc")])
@pytest.mark.fault(38)
def test_an_evaluation_that_is_nan_or_infinite_is_no_improvement(tmp_path: Path, patience: int, best: str) -> None:
    recipe, run = write_holed(tmp_path, "classification", inputs='x * float("nan")'), tmp_path / "run"
    given = [f"eval.early_stop.patience={patience}", f"eval.best={best}", "eval.metrics=[accuracy, auroc]"]
    said = train(1, recipe, run, "anomalies.nonfinite=skip", *given)[0].out
    found = [float(row["accuracy"]) for row in rows(run) if row["event"] == "eval"]
    assert all(math.isnan(each) for each in found), "the highest of scores that are NaN is the first"
    assert [row["step"] for row in rows(run) if row["event"] == "eval"] == list(range(3, 3 * patience + 4, 3))
    assert said.count("warning: the loss on split 'valid' after step 3 is nan: the inputs of sample 7") == 1
    done = RunDir(run).finished
    assert done is not None
    assert done["best"] is None
    assert done["exported"].startswith("last step; no evaluation has")


@pytest.mark.parametrize(
    ("task", "best", "changes", "why"),
    [
        ("binary", "auroc", {"target": "i % 2 if self.sound else 0"}, "not both positive and negative samples"),
        ("binary", "average_precision", {"target": "i % 2 if self.sound else 0"}, "no sample of it is positive"),
        ("binary", "f1", {"target": "i % 2 if self.sound else 0"}, "no sample of it is positive"),
        ("binary", "recall", {"target": "i % 2 if self.sound else 0"}, "no sample of it is positive"),
        ("regression", "r2", {"target": "torch.tensor([i + 0.5 if self.sound else 1.0])"}, "do not vary"),
        ("classification", "none", {}, "undefined"),
    ],
)
@pytest.mark.fault(38)
def test_a_metric_that_reports_nothing_there_decides_nothing(
    tmp_path: Path, task: str, best: str, changes: dict[str, str], why: str
) -> None:
    recipe, run = write_holed(tmp_path, task, **changes), tmp_path / "run"
    metric = f"{tmp_path}/data.py:none" if best == "none" else best
    said = train(1, recipe, run, f'eval.metrics=["{metric}"]', f"eval.best={best}")[0].out
    assert said.count(f"warning: {best} on split 'valid' after step 3") == 1
    assert why in said
    done = RunDir(run).finished
    assert done is not None
    assert done["best"] is None
    assert done["exported"].startswith("last step; no evaluation has")
    assert find_best(run / "checkpoints") is None
    assert all(math.isfinite(row["loss"]) for row in rows(run) if row["event"] == "eval")


def test_a_metric_that_is_0_throughout_is_reported(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, WAVERING), tmp_path / "run"
    (tmp_path / "own.py").write_text("def never(outputs, targets):\n    return outputs[:, 0] * 0\n")
    said = train(1, recipe, run, f'eval.metrics=["{tmp_path}/own.py:never"]', "eval.best=never")[0].out
    assert "warning: never was 0 in each of 6 evaluations" in said


# --------------------------------------------------------------------------------------------------------------------
# What a score is a number of


@pytest.mark.parametrize(
    ("first", "then", "key", "lowest"),
    [
        (["eval.best=accuracy"], ["eval.best=-loss"], "loss", True),
        (["eval.best=-loss"], ["eval.best=accuracy"], "accuracy", False),
        (["eval.metrics=[f1_macro]", "eval.best=f1_macro"], ["eval.best=loss"], "loss", True),
    ],
)
def test_the_best_by_the_metric_that_holds_now(
    tmp_path: Path, first: list[str], then: list[str], key: str, lowest: bool
) -> None:
    recipe, run = write_recipe(tmp_path, WAVERING), tmp_path / "run"
    train(1, recipe, run, *first, "train.steps=6")
    kept = {info.step for info in list_checkpoints(run / "checkpoints")}
    said = train(1, recipe, run, *then, "train.steps=14", update=True)[0].out
    assert "a new ranking begins" in said
    # what was retired cannot be the best any more
    found = [(step, score) for step, score in scored(run, key) if step > 6 or step in kept]
    top = (min if lowest else max)(score for _, score in found)
    step = min(step for step, score in found if score == top)
    done = RunDir(run).finished
    assert done is not None
    assert (done["exported_step"], done["best"]["value"]) == (step, top)
    assert find_best(run / "checkpoints") == run / "checkpoints" / f"step-{step:08d}"
    assert cli("export", run, "--best", "-o", tmp_path / "best.safetensors").status == 0


def test_the_best_after_a_change_that_trains_nothing(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, WAVERING), tmp_path / "run"
    keep_all = "checkpoint.keep_best=100"
    train(1, recipe, run, "eval.best=accuracy", keep_all)
    train(1, recipe, run, "eval.best=-loss", keep_all, update=True)
    lowest = min(scored(run, "loss"), key=lambda item: item[1])[0]
    assert find_best(run / "checkpoints") == run / "checkpoints" / f"step-{lowest:08d}"
    done = RunDir(run).finished
    assert done is not None
    assert done["exported_step"] == lowest


@pytest.mark.parametrize("change", ["data.split=[0.5, 0.5]", "seed=5"])
def test_scores_on_other_data_are_of_another_ranking(tmp_path: Path, change: str) -> None:
    text = WAVERING.replace('{name: "own_parts:Points", tests: 40}', "{name: iris, split: [0.6, 0.4]}")
    recipe, run = write_recipe(tmp_path, text), tmp_path / "run"
    train(1, recipe, run, "eval.best=accuracy", "eval.early_stop={patience: 2, min_delta: 1.0}", "train.steps=2")
    said = train(1, recipe, run, "eval.best=accuracy", "train.steps=6", change, update=True)[0].out
    assert "the best was chosen by other data: a new ranking begins" in said
    assert "warning: of the checkpoints of steps" in said
    done = RunDir(run).finished
    assert done is not None
    top = max(score for step, score in scored(run) if step > 2)
    assert done["best"]["value"] >= top
    assert done["best"]["step"] >= 2


def test_a_metric_that_was_not_computed_is_not_known(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, WAVERING), tmp_path / "run"
    train(1, recipe, run, "eval.best=accuracy", "train.steps=6", "checkpoint.keep=2", "checkpoint.every=1 steps")
    now = ["eval.metrics=[balanced_accuracy]", "eval.best=balanced_accuracy", "train.steps=10"]
    said = train(1, recipe, run, *now, update=True)[0].out
    assert "the balanced_accuracy by which the best is chosen now is not known" in said
    done = RunDir(run).finished
    assert done is not None
    assert done["best"]["step"] >= 6


def test_evaluations_of_older_runs_are_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, WAVERING)
    for then in ("accuracy", "-loss"):
        run = tmp_path / then
        train(1, recipe, run, "eval.best=accuracy", "train.steps=6")
        for info in list_checkpoints(run / "checkpoints"):
            rewrite_manifest(info.path, lambda content: [content.pop(key) for key in ("evaluation", "history")])
            assert read_manifest(info.path).metric == "accuracy"
        kept = {info.step for info in list_checkpoints(run / "checkpoints")}
        train(1, recipe, run, f"eval.best={then}", "train.steps=9", update=True)
        key = then.removeprefix("-")
        values = {step: score for step, score in scored(run, key) if step > 6 or step in kept or then == "accuracy"}
        step = min(values, key=lambda step: (values[step] if key == "loss" else -values[step], step))
        done = RunDir(run).finished
        assert done is not None
        assert done["best"]["step"] == step
        assert done["exported_step"] == step
