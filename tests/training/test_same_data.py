"""All ranks have the same data: what is shuffled has one order, and what is split by process is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from logged import logged
from worlds import in_world

from distrain.config import Recipe, UserError
from distrain.data import build_data
from distrain.datasets.base import is_stream
from distrain.parallel import open_world
from distrain.training.same_data import check_same_data

CODE = """
import os, random
import numpy as np
from torch.utils.data import Dataset, IterableDataset

class Numbers(Dataset):
    def __init__(self, order):
        self.order = list(order)
    def __len__(self):
        return len(self.order)
    def __getitem__(self, index):
        return [float(self.order[index])], self.order[index] % 2

def shuffled(split):  # by the global generators, before it is cut
    order = list(range(40))
    random.shuffle(order)
    order = np.random.permutation(order).tolist()
    return Numbers(order[:30] if split == "train" else order[30:])

def shuffled_by_its_own():
    return Numbers(random.Random().sample(range(40), 40))

def part():
    return Numbers(range(int(os.environ["RANK"]), 40, 2))

def part_of_another_length():
    return Numbers(range(40 - int(os.environ["RANK"])))

class Walk(IterableDataset):
    def __init__(self, how):
        self.how = how
    def __iter__(self):
        order = list(range(40))
        if self.how == "part":
            order = order[int(os.environ["RANK"]) :: 2]
        elif self.how == "shuffled by its own":
            order = random.Random().sample(order, 40)
        elif self.how == "a kept generator":
            self.kept = getattr(self, "kept", None) or random.Random(0)
            self.kept.shuffle(order)
        elif self.how == "shuffled":
            random.shuffle(order)
        for number in order:
            yield [float(number), np.random.rand()], number % 2

def walked(how="shuffled"):
    return {"train": Walk(how), "test": Walk(how)}
"""


def recipe_of(folder: str, name: str, **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "task": "classification",
            "data": {"name": f"{folder}/mine.py:{name}", **keys},
            "model": "m",
            "batch": {"global": 4},
            "train": {"steps": 1},
        }
    )


def read(folder: str, *cases: tuple[str, dict[str, Any]]) -> list[tuple[str, str, list[float]]]:
    """Return for each case the error, the warnings, and the first numbers of the training split, of this rank."""
    world, found = open_world("fp32"), []
    for name, keys in cases:
        with logged() as lines:
            data = build_data(recipe_of(folder, name, **keys))
            try:
                check_same_data(world, data)
                error = ""
            except UserError as refused:
                error = str(refused)
        source = data.splits["train"]
        items = [each[0] for each in source] if is_stream(source) else [source.made.dataset[n][0] for n in range(8)]  # type: ignore[attr-defined]
        found.append((error, " ".join(lines), [number for item in items[:8] for number in item]))
    world.close()
    return found


@pytest.mark.fault(18)
def test_ranks_have_the_same_data_or_none_trains(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("shuffled", {}),
        ("walked", {}),
        ("shuffled_by_its_own", {"split": [0.5, 0.5]}),
        ("part", {"split": [0.5, 0.5]}),
        ("part_of_another_length", {"split": [0.5, 0.5]}),
        ("walked", {"how": "part"}),
        ("walked", {"how": "shuffled by its own"}),
        ("walked", {"how": "a kept generator"}),
    ]
    ranks = in_world(2, read, str(tmp_path), *cases)
    for one, other in zip(*(rank[:2] for rank in ranks), strict=True):
        assert one == other
        assert one[:2] == ("", "")
        assert one[2] != sorted(one[2]), "it is shuffled"
    errors = [error for error, _, _ in ranks[1]]
    assert [error for error, _, _ in ranks[0]] == errors
    # of two orders that are drawn, single places may have the same sample
    assert re.match(r"rank 1 of 2 has other data than rank 0: sample \d+ of split 't\w+' is another one\. ", errors[2])
    assert errors[3].startswith("rank 1 of 2 has other data than rank 0: sample 0 of split 'train' is another one. ")
    assert errors[4].startswith("rank 1 of 2 has other data than rank 0: 19 samples of split 'test' in place of 20. ")
    assert errors[5].startswith("ranks read different samples of the stream of split train and test. Give every")
    assert errors[6:] == ["", ""]
    alone = in_world(1, read, str(tmp_path), cases[-1])[0]
    for warned in (*ranks[0][6:], *alone):
        assert "gives other samples each time that it is read" in warned[1]


def test_what_the_global_generators_shuffle_has_one_order(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    data = [build_data(recipe_of(str(tmp_path), "shuffled")) for _ in range(2)]
    orders = [{name: each.made.dataset.order for name, each in one.splits.items()} for one in data]  # type: ignore[union-attr]
    assert orders[0] == orders[1]
    assert sorted(orders[0]["train"] + orders[0]["test"]) == list(range(40)), "a sample of both splits would be leaked"
    stream: Any = build_data(recipe_of(str(tmp_path), "walked")).splits["train"]
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([item[0] for item in stream])
    assert epochs[0] == epochs[2] != epochs[1]
    assert len({draw for _, draw in epochs[0]}) == 40
