from __future__ import annotations

import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from distrain.config import BatchSection, Recipe, UserError
from distrain.data import build_data, build_loader, build_transform
from distrain.datasets.base import TensorSource
from distrain.datasets.batch_sizes import accumulation_steps, batch_shape
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.order import SampleOrder
from distrain.datasets.preparing import prepare_data


def make_recipe(data: Any = "digits", task: str = "classification", global_batch_size: int = 24) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "task": task,
            "data": data,
            "model": "linear",
            "batch": {"global": global_batch_size},
            "train": {"steps": 10},
            "seed": 3,
        }
    )


def numbered(length: int) -> TensorSource:
    """Return a source whose inputs are the ids."""
    return TensorSource(torch.arange(length)[:, None].float(), torch.arange(length))


# ---------------------------------------------------------------------------------------------------------------------
# SampleOrder


@pytest.mark.parametrize("epoch", [0, 5])
def test_every_epoch_is_a_permutation_for_every_length(epoch: int) -> None:
    for length in [*range(1, 301), 1000, 1023, 1024, 1025, 65537, 100003]:
        epochs, ids = SampleOrder(length, seed=1).at(epoch * length, (epoch + 1) * length)
        assert (epochs == epoch).all()
        assert (np.sort(ids) == np.arange(length)).all(), length


def test_epochs_and_seeds_differ() -> None:
    first, second = SampleOrder(1000, 0).at(0, 2000)[1].reshape(2, 1000)
    other = SampleOrder(1000, 1).at(0, 1000)[1]
    assert (first == second).sum() < 20
    assert (first == other).sum() < 20
    assert (first == np.arange(1000)).sum() < 20


def test_the_order_is_the_same_everywhere_and_forever() -> None:
    # A changed order would silently change every run that is resumed after an upgrade.
    assert SampleOrder(10, 0).at(0, 20)[1].tolist() == [6, 0, 8, 2, 5, 3, 1, 4, 9, 7, 9, 8, 3, 2, 0, 5, 1, 6, 7, 4]


def test_without_shuffling_the_order_is_that_of_the_samples() -> None:
    epochs, ids = SampleOrder(3, 0, shuffle=False).at(1, 8)
    assert ids.tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert epochs.tolist() == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("length", [10**12, 2**40 + 1, 2**62])
def test_very_long_data_is_reached_anywhere(length: int) -> None:
    order = SampleOrder(length, 7)
    for start in (0, length // 3, length - 5000, 2**62 - 10000):
        epochs, ids = order.at(start, start + 10000)
        assert ids.min() >= 0
        assert ids.max() < length
        assert (epochs == np.arange(start, start + 10000) // length).all()
        for epoch in np.unique(epochs):
            within = ids[epochs == epoch]
            assert len(np.unique(within)) == len(within)


@settings(max_examples=200)
@given(
    st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 10**15), st.integers(0, 400), st.integers(0, 400)
)
def test_a_range_is_its_parts(length: int, seed: int, start: int, first: int, second: int) -> None:
    order = SampleOrder(length, seed)
    whole = order.at(start, start + first + second)
    parts = order.at(start, start + first), order.at(start + first, start + first + second)
    for index in (0, 1):
        assert (whole[index] == np.concatenate([part[index] for part in parts])).all()


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 13, 16, 17, 50])
def test_every_sample_is_as_likely_at_every_place_and_after_every_other(length: int) -> None:
    epochs = 4000
    ids = SampleOrder(length, 11).at(0, length * epochs)[1].reshape(epochs, length)
    landed = np.stack([np.bincount(column, minlength=length) for column in ids.T])
    expected = epochs / length
    assert chi2.sf(((landed - expected) ** 2 / expected).sum(), (length - 1) ** 2) > 1e-4
    pairs = np.bincount((ids[:, :-1] * length + ids[:, 1:]).ravel(), minlength=length**2).reshape(length, length)
    pairs = pairs[~np.eye(length, dtype=bool)]
    assert chi2.sf(((pairs - expected) ** 2 / expected).sum(), len(pairs) - 1) > 1e-4


def test_neighbours_in_a_large_epoch_are_unrelated() -> None:
    length = 200_003
    ids = SampleOrder(length, 2).at(length, 2 * length)[1]
    for values in (np.diff(ids) % length, ids[: length // 50], ids[::50]):
        found = np.bincount(values * 100 // length, minlength=100)
        assert chi2.sf(((found - found.mean()) ** 2 / found.mean()).sum(), 99) > 1e-4


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        SampleOrder(0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Batch sizes


def test_accumulation_follows_from_the_sizes() -> None:
    assert accumulation_steps(96, 3, 8) == 4
    assert batch_shape(BatchSection.model_validate({"global": 96, "micro": 12}), 2) == (12, 4)
    assert batch_shape(BatchSection.model_validate({"global": 96}), 4) == (24, 1)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(UserError, match=r"batch.global 100 is not a multiple of micro 3 × world 8 = 24; try 96 or 120"):
        accumulation_steps(100, 3, 8)
    with pytest.raises(UserError, match=r"not a multiple of the 8 processes; try 96 or 104"):
        batch_shape(BatchSection.model_validate({"global": 100}), 8)
    with pytest.raises(UserError, match=r"try 8$"):
        batch_shape(BatchSection.model_validate({"global": 4}), 8)


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


def global_batches(
    source: Any, order: SampleOrder | None, world_size: int, workers: int, start: int, **options: Any
) -> list:
    """Return for each step in [start, 5) its samples in order of position, over simulated ranks."""
    recipe = make_recipe({"name": "digits", "workers": workers})
    ranks = []
    for rank in range(world_size):
        loader = build_loader(
            source,
            order,
            recipe=recipe,
            rank=rank,
            world_size=world_size,
            micro_batch_size=2,
            start_step=start,
            stop_step=5,
            **options,
        )
        ranks.append(list(loader))
    assert all(len(steps) == 5 - start for steps in ranks)
    whole = []
    for steps in zip(*ranks, strict=True):
        micros = [micro[a] for a in range(24 // 2 // world_size) for micro in steps]
        assert all(len(steps[0]) == len(each) for each in steps)
        whole.append({key: torch.cat([micro[key] for micro in micros]) for key in ("inputs", "targets", "ids")})
    return whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_consumes_the_same_samples_whatever_the_world(world_size: int, workers: int) -> None:
    recipe = make_recipe(
        {
            "name": "digits",
            "transforms": {
                "train": [{"name": "RandomCrop", "size": 8, "padding": 2}, {"name": "RandomRotation", "degrees": 20}]
            },
        }
    )
    source = build_data(recipe).splits["train"]
    order = SampleOrder(50, 3)
    source = source.select(np.arange(50))  # the five steps cross two epochs
    transform = build_transform(recipe, "train")
    reference = global_batches(source, order, 1, 0, 0, transform=transform)
    for start in (0, 3):
        found = global_batches(source, order, world_size, workers, start, transform=transform)
        for step, batch in enumerate(found, start=start):
            assert batch["ids"].tolist() == order.at(step * 24, step * 24 + 24)[1].tolist()
            for key, value in batch.items():
                assert torch.equal(value, reference[step][key])


def test_a_step_far_away_starts_at_once() -> None:
    recipe, source, order = make_recipe(), numbered(1000), SampleOrder(1000, 3)
    step = 10**13
    loader = build_loader(source, order, recipe=recipe, rank=1, world_size=2, micro_batch_size=12, start_step=step)
    [batch] = next(loader)
    assert batch["ids"].tolist() == order.at(step * 24 + 12, step * 24 + 24)[1].tolist()


def test_the_loader_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    global_batches(numbered(30), SampleOrder(30, 0), 1, 2, 0)
    assert torch.equal(before, torch.get_rng_state())


class Broken(TensorSource):
    path = Path("/data/seven.png")

    def fetch(self, ids: np.ndarray) -> Any:
        if 7 in ids:
            raise UserError(f"sample 7, {self.path}, cannot be decoded")
        return super().fetch(ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    whole = numbered(30)
    source = Broken(whole.inputs, whole.targets)
    with pytest.raises(UserError, match=r"^sample 7, /data/seven.png, cannot be decoded$"):
        global_batches(source, SampleOrder(30, 0), 1, workers, 0)


class Pid(TensorSource):
    def fetch(self, ids: np.ndarray) -> Any:
        return {**super().fetch(ids), "targets": torch.full((len(ids),), os.getpid())}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_loader_processes_outlive_the_scheduler_s_signals_and_end_with_the_loader() -> None:
    whole = numbered(30)
    recipe = make_recipe({"name": "digits", "workers": 1})
    loader = build_loader(
        Pid(whole.inputs, whole.targets),
        SampleOrder(30, 0),
        recipe=recipe,
        rank=0,
        world_size=1,
        micro_batch_size=24,
    )
    pid = int(next(loader)[0]["targets"][0])
    assert pid != os.getpid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    for _ in range(10):
        assert int(next(loader)[0]["targets"][0]) == pid
    loader.close()  # type: ignore[attr-defined]
    assert not alive(pid)


def test_a_loader_process_that_is_killed_is_an_error() -> None:
    whole = numbered(30)
    loader = build_loader(
        Pid(whole.inputs, whole.targets),
        SampleOrder(30, 0),
        recipe=make_recipe({"name": "digits", "workers": 1}),
        rank=0,
        world_size=1,
        micro_batch_size=24,
    )
    os.kill(int(next(loader)[0]["targets"][0]), signal.SIGKILL)
    time.sleep(0.2)  # no line but the next may raise
    with pytest.raises(UserError, match="a loader process ended"):
        list(itertools.islice(loader, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_can_be_pinned_and_loaded_while_a_gpu_is_in_use(workers: int) -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.get_rng_state()
    plain = global_batches(numbered(50), SampleOrder(50, 3), 1, 0, 0)
    for [batch], expected in zip(
        build_loader(
            numbered(50),
            SampleOrder(50, 3),
            recipe=make_recipe({"name": "digits", "workers": workers}),
            rank=0,
            world_size=1,
            micro_batch_size=24,
            stop_step=5,
            pin_memory=True,
        ),
        plain,
        strict=True,
    ):
        assert all(tensor.is_pinned() for tensor in batch.values())
        assert torch.equal(batch["inputs"].cuda().cpu(), expected["inputs"])
    assert torch.equal(before, torch.cuda.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Stream:
    """17 samples in the first pass, 18 in the second, and so on."""

    def __init__(self, length: int = 17, growing: bool = True):
        self.length = length
        self.growing = growing
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for index in range(self.length + (self.epoch if self.growing else 0)):
            yield torch.tensor([self.epoch * 1000.0 + index]), torch.tensor(index)

    def collate(self, samples: Any) -> Any:
        inputs, targets = zip(*samples, strict=True)
        return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_gives_the_same_samples_whatever_the_world(world_size: int, workers: int) -> None:
    expected = [epoch * 1000 + index for epoch in range(10) for index in range(17 + epoch)]
    for start in (0, 2):
        for step, batch in enumerate(global_batches(Stream(), None, world_size, workers, start), start=start):
            assert batch["inputs"][:, 0].int().tolist() == expected[step * 24 : step * 24 + 24]
            assert (batch["ids"] == batch["targets"]).all()


def test_a_stream_is_read_by_one_process_and_must_start_anew() -> None:
    with pytest.raises(UserError, match=r"data.workers is 2.*set it to 1 or 0"):
        global_batches(Stream(), None, 1, 2, 0)
    with pytest.raises(UserError, match="gave no sample"):
        global_batches(Stream(0, growing=False), None, 1, 0, 0)
    with pytest.raises(UserError, match="gave no sample"):
        global_batches(Stream(0, growing=False), None, 1, 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("kind", ["source", "workers", "stream"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5, 97])
@pytest.mark.fault(22)
def test_every_sample_is_evaluated_once(length: int, world_size: int, kind: str) -> None:
    source: Any = Stream(length, growing=False) if kind == "stream" else numbered(length)
    ranks = []
    for rank in range(world_size):
        loader = build_eval_loader(
            source, rank=rank, world_size=world_size, batch_size=8, workers=2 if kind == "workers" else 0
        )
        passes = [list(loader), list(loader)]
        assert [b["ids"].tolist() for b in passes[0]] == [b["ids"].tolist() for b in passes[1]]
        if kind != "stream":
            assert len(loader) == len(passes[0])
        ranks.append(passes[0])
    assert len({tuple(len(batch["ids"]) for batch in batches) for batches in ranks}) == 1
    ids = torch.cat([batch["ids"] for batches in ranks for batch in batches])
    inputs = torch.cat([batch["inputs"][:, 0] for batches in ranks for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(length))
    assert (inputs[ids >= 0] == ids[ids >= 0]).all()
    assert (inputs[ids < 0] == length - 1).all()
    assert (ids < 0).sum() < world_size


@pytest.mark.parametrize("source", [numbered(0), Stream(0, growing=False)], ids=["source", "stream"])
def test_a_split_without_samples_is_refused(source: Any) -> None:
    with pytest.raises(UserError, match="the split 'valid' has no samples"):
        list(build_eval_loader(source, rank=0, world_size=1, batch_size=8, split="valid"))


# ---------------------------------------------------------------------------------------------------------------------
# A recipe's data


def test_the_input_shape_is_that_after_the_transforms() -> None:
    data = build_data(
        make_recipe({"name": "digits", "transforms": {"train": [{"name": "CenterCrop", "size": [4, 6]}]}})
    )
    assert data.meta.input_shape == (1, 4, 6)


def test_transforms_that_fail_do_so_before_training() -> None:
    bad = {"name": "Normalize", "mean": [0.1, 0.2], "std": [1.0, 1.0]}
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=f"data.transforms.{split}: Normalize failed on inputs"):
            build_data(make_recipe({"name": "digits", "transforms": {split: [bad]}}))


def test_an_unknown_data_set_gets_the_close_names() -> None:
    with pytest.raises(UserError, match="no data set 'digit'; did you mean 'digits'"):
        build_data(make_recipe("digit"))


PREPARE = """
from pathlib import Path
def good(path):
    path = Path(path)
    path.mkdir()
    (path / "a.txt").write_text("a")
def idle(path):
    pass
def interrupted(path):
    Path(path).mkdir()
    raise RuntimeError("the disk is full")
def overtaken(path):
    good(path)
    theirs = Path(path).parents[1] / "data"
    theirs.mkdir()
    (theirs / "b.txt").write_text("b")
"""


def test_data_is_prepared_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PREPARE)
    target = tmp_path / "made" / "data"
    recipe = make_recipe({"name": "digits", "path": str(target), "prepare": f"{tmp_path / 'mine.py'}:good"})
    assert prepare_data(recipe)
    assert (target / "a.txt").read_text() == "a"
    assert not prepare_data(recipe)
    assert [path.name for path in target.parent.iterdir()] == ["data"]


def test_what_an_interrupted_preparation_leaves_is_not_taken_for_the_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PREPARE)
    target = tmp_path / "data"
    for name, message in (
        ("interrupted", "RuntimeError: the disk is full"),
        ("idle", "returned without writing to the path"),
    ):
        section = {"name": "digits", "path": str(target), "prepare": f"{tmp_path / 'mine.py'}:{name}"}
        with pytest.raises(UserError, match=message):
            prepare_data(make_recipe(section))
        assert not target.exists()
    assert prepare_data(make_recipe({**section, "prepare": f"{tmp_path / 'mine.py'}:good"}))


def test_of_two_runs_that_prepare_the_same_data_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PREPARE)
    section = {"name": "digits", "path": str(tmp_path / "data"), "prepare": f"{tmp_path / 'mine.py'}:overtaken"}
    assert prepare_data(make_recipe(section))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["b.txt"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) in (["data"], ["__pycache__", "data"])


def test_nothing_is_prepared_unasked() -> None:
    assert not prepare_data(make_recipe())


def test_every_step_of_an_epoch_covers_it_once() -> None:
    recipe, source, order = make_recipe(global_batch_size=10), numbered(100), SampleOrder(100, 5)
    loader = build_loader(source, order, recipe=recipe, rank=0, world_size=1, micro_batch_size=5)
    ids = [batch["ids"] for step in itertools.islice(loader, 10) for batch in step]
    assert sorted(torch.cat(ids).tolist()) == list(range(100))


@pytest.mark.parametrize(
    ("train", "evaluation", "said"),
    [
        ([{"name": "Normalize", "mean": [0.5], "std": [0.5]}], [], "train has Normalize .*, and .*eval none of these"),
        ([], [{"name": "Normalize", "mean": [0.5], "std": [0.5]}], "train has none of these, and .*eval Normalize"),
        ([{"name": "RandomCrop", "size": 8, "padding": 1}], [], ""),
        ([{"name": "ToDtype", "dtype": "float32"}], [], ""),  # these images are floats
    ],
)
def test_transforms_of_another_scale_in_evaluation_are_told(train: Any, evaluation: Any, said: str) -> None:
    made = make_recipe({"name": "digits", "transforms": {"train": train, "eval": evaluation}})
    assert bool(re.search(said or "another scale", " ".join(build_data(made).warnings))) is bool(said)
