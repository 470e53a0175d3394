from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrain.config import Recipe, UserError
from distrain.data import build_data, build_loader
from distrain.datasets.base import Data, is_stream
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.order import SampleOrder

CODE = """
import random
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

class Numbers(Dataset):
    classes = ["even", "odd"]
    def __init__(self, count=20, path=None):
        self.count, self.path = count, path
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return np.array([index, index + 1], dtype=np.float64), index % 2
    def read(self, path):
        return [(np.array([7.0, 8.0]),)]

class Halves(Numbers):
    def __init__(self, split, count=20):
        super().__init__(count if split == "train" else 5)

class Augmented(Numbers):
    def __getitem__(self, index):
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor(noise), index % 2

class Broken(Numbers):
    def __getitem__(self, index):
        if index == 3:
            return {}["nowhere"]
        return super().__getitem__(index)

class Words:
    meta = {"pad_id": 9, "vocab_size": 10}
    def __len__(self):
        return 6
    def __getitem__(self, index):
        tokens = torch.arange(index + 1)
        return {"inputs": tokens, "targets": tokens + 1}

class Pictures:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return Image.new("RGB", (8 + index, 6), (255, 0, 0)), index % 2

class Walk(IterableDataset):
    def __init__(self, count=10):
        self.count, self.epoch = count, 0
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __iter__(self):
        for index in range(self.count):
            yield [float(index), float(self.epoch)], index % 2

def generated(count=10):
    for index in range(count):
        yield {"inputs": [float(index)], "targets": index % 2}

def parts():
    return {"train": Numbers(8), "valid": Numbers(3)}

def named(split):
    return Numbers({"big": 30, "small": 2}[split])

def odd_items(kind):
    return {"triple": [(1, 2, 3)], "dict": [{"x": 1}], "number": [5], "words": [("a", 1)], "none": []}[kind]

def floats():
    return [([1.0], 0.5), ([2.0], 1.5)]

def vectors():
    return [([1.0], [0.5, 1.0]), ([2.0], [1.5, 2.0])]

def listed(items, meta=None, classes=None):
    made = Listed(items)
    made.meta, made.classes = meta or {}, classes
    return {"train": made, "test": made}

class Listed(list):
    pass

def streamed(items, classes=None):
    made = Streamed()
    made.items, made.classes = items, classes
    return made

def once():
    return streamed(iter([(torch.zeros(2), n % 2) for n in range(9)]), ("a", "b"))

class Streamed(IterableDataset):
    def __iter__(self):
        return iter(self.items)

def ragged(key, values, meta=None, task_targets=False):
    made = Listed()
    for length in (1, 3):
        row = torch.tensor([values] * length)
        made.append((torch.zeros(2), row) if task_targets else ({key: row} if key != "inputs" else row, 1))
    made.meta, made.classes = meta or {}, ("a", "b")
    return {"train": made, "test": made}

def doubles():
    made = torch.tensor([0.1, 0.2], dtype=torch.float64)
    return {"train": [([0.1, 0.2], 0.3), (np.array([0.1, 0.2]), np.float64(0.3)), (made, 0.3)], "test": [(made, 0.3)]}

def failing():
    raise RuntimeError("no such table")

value = 3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    (tmp_path / "mine.py").write_text(CODE)

    def make(name: str, task: str = "classification", **keys: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "test",
                "task": task,
                "data": {"name": f"{tmp_path / 'mine.py'}:{name}", **keys},
                "model": "m",
                "batch": {"global": 4},
                "train": {"steps": 1},
            }
        )

    return make


def sizes(data: Data) -> dict[str, int]:
    return {name: len(source) for name, source in data.splits.items() if not is_stream(source)}


def test_one_data_set_is_cut(recipe: Any) -> None:
    data = build_data(recipe("Numbers", split=[0.5, 0.25, 0.25], stratify=True))
    assert sizes(data) == {"train": 10, "valid": 5, "test": 5}
    assert data.meta.class_names == ("even", "odd")
    assert data.meta.input_shape == (2,)
    seen = []
    for source in data.splits.values():
        batch = source.fetch(np.arange(len(source)))  # type: ignore[union-attr, arg-type]
        assert batch["inputs"].dtype == torch.float32
        assert torch.equal(batch["inputs"][:, 0].long() % 2, batch["targets"])
        seen += batch["inputs"][:, 0].int().tolist()
    assert sorted(seen) == list(range(20))
    assert data.read is not None
    assert data.read(Path("x")).fetch(np.array([0]))["inputs"].tolist() == [[7.0, 8.0]]


def test_splits_of_one_s_own(recipe: Any) -> None:
    assert sizes(build_data(recipe("Halves", count=12))) == {"train": 12, "test": 5}
    assert sizes(build_data(recipe("parts"))) == {"train": 8, "valid": 3}
    assert sizes(build_data(recipe("named", split={"train": "big", "valid": "small"}))) == {"train": 30, "valid": 2}
    with pytest.raises(UserError, match="gives its splits itself, and cannot be cut"):
        build_data(recipe("parts", split=[0.5, 0.5]))
    with pytest.raises(UserError, match="takes no argument 'split' for a, b"):
        build_data(recipe("Numbers", split={"train": "a", "test": "b"}))


def test_what_a_data_set_draws_depends_on_seed_epoch_and_sample_alone(recipe: Any) -> None:
    plain = recipe("Augmented", count=8, split=[0.5, 0.5])
    data = build_data(plain)
    source: Any = data.splits["train"]

    def drawn(world_size: int, workers: int) -> list:
        made = recipe("Augmented", count=8, split=[0.5, 0.5], workers=workers)
        ranks = [
            build_loader(
                source,
                SampleOrder(4, 0),
                recipe=made,
                rank=rank,
                world_size=world_size,
                micro_batch_size=4 // world_size,
                stop_step=2,
            )
            for rank in range(world_size)
        ]
        return [torch.cat([step[0]["inputs"] for step in steps]) for steps in zip(*ranks, strict=True)]

    before = torch.get_rng_state()
    reference = drawn(1, 0)
    assert len(torch.cat(reference).unique()) == 24
    for world_size, workers in ((2, 0), (1, 2), (4, 2)):
        for mine, theirs in zip(reference, drawn(world_size, workers), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(before, torch.get_rng_state())


def test_sequences_are_padded(recipe: Any) -> None:
    data = build_data(recipe("Words", task="language_modeling", split={"fold": 1, "of": 6}))
    batch = data.splits["train"].fetch(np.array([0, 4]))  # type: ignore[union-attr]
    lengths = batch["targets"].ge(0).sum(1).tolist()
    assert lengths[0] < lengths[1]
    assert batch["inputs"][0, lengths[0] :].unique().tolist() == [9]
    assert batch["targets"][0, lengths[0] :].unique().tolist() == [-100]
    assert batch["targets"].dtype == torch.int64
    assert data.meta.vocab_size == 10
    assert data.meta.input_shape is None


def test_pictures_become_tensors(recipe: Any) -> None:
    made = recipe(
        "Pictures", split=[0.5, 0.5], transforms={k: [{"name": "CenterCrop", "size": 4}] for k in ("train", "eval")}
    )
    assert build_data(made).meta.input_shape == (3, 4, 4)


def test_a_stream_that_cannot_begin_again_is_refused(recipe: Any) -> None:
    """Its first sample, whose shape is looked at, would be missing from training without a word."""
    with pytest.raises(UserError, match=r"mine\.py:once: __iter__ gave one iterator twice"):
        list(build_data(recipe("once")).splits["train"])  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["Walk", "generated"])
def test_streams_are_walked(recipe: Any, name: str) -> None:
    made = recipe(name)
    data = build_data(made)
    source = data.splits["train"]
    assert is_stream(source)
    steps = build_loader(source, None, recipe=made, rank=0, world_size=1, micro_batch_size=4, start_step=1, stop_step=5)
    batches = [step[0] for step in steps]
    assert [batch["inputs"][:, 0].int().tolist() for batch in batches] == [
        [4, 5, 6, 7],
        [8, 9, 0, 1],
        [2, 3, 4, 5],
        [6, 7, 8, 9],
    ]
    if name == "Walk":
        assert batches[1]["inputs"][:, 1].tolist() == [0, 0, 1, 1]
    loader = build_eval_loader(source, rank=1, world_size=2, batch_size=3)
    for _ in range(2):
        assert [batch["ids"].tolist() for batch in loader] == [[3, 4, 5], [8, 9]]
    with pytest.raises(UserError, match="is a stream, and cannot be cut"):
        build_data(recipe(name, split=[0.5, 0.5]))
    with pytest.raises(UserError, match="has no samples"):
        build_data(recipe(name, count=0))
    with pytest.raises(
        UserError, match=r"data\.skip_corrupt is 1, and samples of an iterable data set have no numbers"
    ):
        build_data(recipe(name, skip_corrupt=1))


def test_targets_have_the_type_of_the_task(recipe: Any) -> None:
    data = build_data(recipe("floats", task="regression", split=[0.5, 0.5]))
    batch = data.splits["train"].fetch(np.array([0]))  # type: ignore[union-attr]
    assert batch["targets"].dtype == torch.float32
    assert batch["targets"].shape == (1,)
    assert data.meta.num_targets == 1
    assert build_data(recipe("vectors", task="regression", split=[0.5, 0.5])).meta.num_targets == 2
    with pytest.raises(UserError, match=r"targets are torch.float32; task classification expects whole numbers"):
        build_data(recipe("floats"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.fault(21)
def test_an_item_that_fails_is_named_with_the_line(recipe: Any, workers: int) -> None:
    made = recipe("Broken", split=[0.5, 0.5], workers=workers)
    data = build_data(made)
    split = next(name for name, source in data.splits.items() if 3 in source.indices)  # type: ignore[union-attr]
    loader = build_eval_loader(data.splits[split], rank=0, world_size=1, batch_size=4, workers=workers)
    with pytest.raises(
        UserError, match=r"mine.py:Broken: item 3 cannot be read: KeyError: 'nowhere' \(.*mine.py:\d+\)$"
    ):
        list(loader)
    tolerant = build_eval_loader(
        data.splits[split], rank=0, world_size=1, batch_size=4, workers=workers, skip_corrupt=1
    )
    number = data.splits[split].indices.tolist().index(3)  # type: ignore[union-attr]
    for _ in range(2):
        batches = list(tolerant)
        ids = [each for batch in batches for each in batch["ids"].tolist()]
        assert sorted(ids) == sorted({-1, *range(len(data.splits[split]))} - {number})
        assert [list(batch["corrupt_samples"]) for batch in batches if "corrupt_samples" in batch] == [[number]]


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("Numbers", {"cuont": 3}, "data.cuont: .* has no argument 'cuont'; did you mean 'count'"),
        ("Numbers", {"worker": 3}, "did you mean 'workers'"),
        ("parts", {"path": "x"}, "takes no argument 'path'"),
        ("odd_items", {}, "data.kind: .* needs it"),
        ("odd_items", {"kind": "dict"}, "item 0 is a dict of x, expected .inputs, targets"),
        ("odd_items", {"kind": "dict"}, "item 0 is a dict of x, expected"),
        ("odd_items", {"kind": "number"}, "item 0 is an int, expected"),
        ("odd_items", {"kind": "words"}, "a str cannot become a tensor.*of a label the number of its class"),
        ("odd_items", {"kind": "none"}, "no samples"),
        ("failing", {}, r"failed: RuntimeError: no such table \(.*mine.py:\d+\)"),
        ("value", {}, "is an int; expected a class, or a function"),
        ("Number", {}, "did you mean 'Numbers'"),
    ],
)
def test_what_does_not_fit_is_reported(recipe: Any, name: str, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_data(recipe(name, **keys))


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ("['even', 'even']", ("even (0)", "even (1)")),
        ("{'odd': 1, 'even': 0}", ("even", "odd")),
        ("{1: 'odd', 0: 'even'}", ("even", "odd")),
        ("np.array(['even', 'odd'])", ("even", "odd")),
        ("{'even': 1, 'odd': 2}", "no number from 0 to 1"),
        ("{'even', 'odd'}", "classes is a set; expected a list"),
        ("'eo'", "classes is a str; expected a list"),
        ("2", "classes is an int; expected a list"),
    ],
)
def test_names_of_classes_go_by_their_numbers(recipe: Any, classes: str, names: Any) -> None:
    made = recipe("Numbers")
    Path(made.data.name.partition(":")[0]).write_text(f"{CODE}\nNumbers.classes = {classes}\n")
    if isinstance(names, str):
        with pytest.raises(UserError, match=names):
            build_data(made)
    else:
        assert build_data(made).meta.class_names == names


# --------------------------------------------------------------------------------------------------------------------
# Padding


@pytest.mark.parametrize(
    ("key", "value", "meta", "wanted"),
    [
        ("inputs", 3, {"pad_id": 50256}, 50256),
        ("inputs", 3, {}, 0),
        ("inputs", 0.5, {"pad_id": 1}, 0),
        ("input_ids", 3, {"pad_id": 1}, 1),
        ("decoder_input_ids", 3, {"pad_id": 1}, 1),
        ("attention_mask", 1, {"pad_id": 1}, 0),
        ("attention_mask", True, {"pad_id": 1}, False),
        ("attention_mask", 1.0, {"pad_id": 1}, 0),
        ("token_type_ids", 1, {"pad_id": 50256}, 0),
        ("position_ids", 4, {"pad_id": 1}, 0),
        ("special_tokens_mask", 0, {"pad_id": 0}, 1),
        ("labels", 4, {"pad_id": 1}, -100),
        ("weights", 0.25, {"pad_id": 1}, 0),
        ("key_padding_mask", False, {"padding": {"key_padding_mask": True}}, True),
        ("speakers", 4, {"pad_id": 1, "padding": {"speakers": 7}}, 7),
        ("attention_mask", -1.5, {"padding": {"attention_mask": -10000.0}}, -10000),
        ("inputs", 0, {"padding": {"inputs": 5}}, 5),
    ],
)
def test_each_key_is_padded_by_what_it_is(recipe: Any, key: str, value: Any, meta: dict, wanted: Any) -> None:
    data = build_data(recipe("ragged", key=key, values=value, meta=meta))
    inputs = data.splits["train"].fetch(np.array([0, 1]))["inputs"]  # type: ignore[union-attr]
    found = inputs if key == "inputs" else inputs[key]
    assert found.tolist() == [[value, wanted, wanted], [value] * 3]


@pytest.mark.parametrize(
    ("key", "value", "meta", "message"),
    [
        ("speakers", 4, {"pad_id": 1}, r"inputs 'speakers' of one batch .* their padding is unknown.*{'speakers': 0}"),
        ("key_padding_mask", False, {"pad_id": 1}, r"their padding is unknown \(torch.bool\)"),
        ("is_real", True, {"pad_id": 1}, "their padding is unknown"),
        ("attention_mask", -1.5, {}, r"values below 0, like an additive mask.*{'attention_mask': -10000}"),
        ("inputs", 0, {}, r"their values include 0, the padding; .*{'pad_id': 0}"),
        ("input_ids", 0, {}, r"their values include 0, the padding"),
        ("inputs", 3, {"padding": 5}, "meta's padding is 5; expected a dict of a number for each key"),
        ("inputs", 3, {"paddings": {}}, "unknown key 'paddings'; did you mean 'padding'"),
    ],
)
def test_what_pads_must_be_known(recipe: Any, key: str, value: Any, meta: dict, message: str) -> None:
    def padded() -> None:
        source: Any = build_data(recipe("ragged", key=key, values=value, meta=meta)).splits["train"]
        source.fetch(np.array([0, 1]))

    with pytest.raises(UserError, match=message):
        padded()


@pytest.mark.parametrize(
    ("task", "value", "loss", "meta", "wanted"),
    [
        ("language_modeling", 4, None, {}, -100),
        ("language_modeling", 4, {"name": "cross_entropy", "ignore_index": -1}, {}, -1),
        ("classification", 1, {"name": "cross_entropy", "ignore_index": -100}, {}, -100),
        ("classification", 1, None, {}, None),
        ("regression", 0.5, None, {}, None),
        ("multilabel", 1.0, None, {}, None),
        ("regression", 0.5, None, {"padding": {"targets": 0}}, 0),
    ],
)
def test_targets_are_padded_with_what_the_loss_ignores(
    recipe: Any, task: str, value: Any, loss: Any, meta: dict, wanted: Any
) -> None:
    made = recipe("ragged", task, key="", values=value, meta=meta, task_targets=True)
    made = made.model_validate(made.model_dump(by_alias=True) | {"loss": loss})
    source: Any = build_data(made).splits["train"]
    if wanted is None:
        with pytest.raises(
            UserError, match=r"targets of one batch have different lengths, and the loss has no ignore_index"
        ):
            source.fetch(np.array([0, 1]))
        return
    assert source.fetch(np.array([0, 1]))["targets"][0].tolist() == [value, wanted, wanted]


# --------------------------------------------------------------------------------------------------------------------
# Targets that are none


BAD = [
    ("classification", [0, 1, 2], r"a target is 2, expected 0 to 1$"),
    ("classification", [0, 1, -1], r"a target is -1, expected 0 to 1$"),
    ("binary", [0.0, 1.0, 2.0], r"a target is 2.0, expected 0 or 1$"),
    ("binary", [0, 1, -1], r"a target is -1.0, expected 0 or 1$"),
    ("multilabel", [[0.0, 1.0], [1.0, 1.0], [0.0, 3.0]], r"a target is 3.0, expected 0 or 1$"),
    ("multilabel", [[0.0, 1.0], [1.0, 1.0], [0.0, float("nan")]], r"a target is nan, expected a finite number$"),
    ("regression", [0.5, 1e6, float("nan")], r"a target is nan, expected a finite number$"),
    ("regression", [0.5, 1e6, float("-inf")], r"a target is -inf, expected a finite number$"),
    ("language_modeling", [[1, 1], [1, -100], [1, 9]], r"a target is 9, expected 0 to 8, or -100 to ignore it$"),
]


@pytest.mark.parametrize(("task", "targets", "message"), BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_target_that_is_none_is_named(recipe: Any, task: str, targets: list, message: str, split: str) -> None:
    inputs: Any = [1, 1] if task == "language_modeling" else [0.5]
    meta = {"vocab_size": 9} if task == "language_modeling" else {}
    classes = None if task in ("regression", "language_modeling") else ["a", "b"]
    items = [[inputs, each] for each in targets]
    data = build_data(recipe("listed", task, items=items, meta=meta, classes=classes))
    source: Any = data.splits[split]
    assert source.fetch(np.array([0, 1]))["targets"].shape[0] == 2
    message = message.replace("$", "; correct or remove the item$")
    with pytest.raises(UserError, match=r"mine.py:listed: item 2, sample 2 of its split: " + message):
        source.fetch(np.array([1, 2]))
    if task == "classification":
        stream: Any = build_data(recipe("streamed", task, items=items, classes=classes)).splits["train"]
        walk = list(stream)
        assert stream.collate(walk[:2])["targets"].tolist() == [0, 1]
        with pytest.raises(UserError, match=r"mine.py:streamed: item 2 of the stream: " + message):
            stream.collate(walk[1:])


def with_sections(made: Recipe, **sections: Any) -> Recipe:
    return Recipe.model_validate(made.model_dump(by_alias=True) | sections)


def test_targets_that_the_recipe_allows(recipe: Any) -> None:
    items = [[[0.5], 0], [[0.5], -1]]
    made = recipe("listed", items=items, classes=["a", "b"])
    for loss in ({"name": "cross_entropy", "ignore_index": -1}, {"name": "losses.py:mine"}):
        source: Any = build_data(with_sections(made, loss=loss)).splits["train"]
        assert source.fetch(np.array([0, 1]))["targets"].tolist() == [0, -1]
    items = [[[0.5], 0.0], [[0.5], float("nan")]]
    made = with_sections(recipe("listed", "regression", items=items), anomalies={"nonfinite": "skip"})
    data = build_data(made)
    train, test = data.splits["train"], data.splits["test"]
    assert train.fetch(np.array([1]))["targets"].isnan().all()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="a target is nan"):  # there is no step to leave out
        test.fetch(np.array([1]))  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------------------
# float64


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32)])
def test_numbers_are_double_where_the_run_is(recipe: Any, precision: str, dtype: torch.dtype) -> None:
    made = with_sections(recipe("doubles", "regression"), train={"steps": 1, "precision": precision})
    batch = build_data(made).splits["train"].fetch(np.arange(3))  # type: ignore[union-attr]
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (dtype, dtype)
    assert torch.equal(batch["inputs"], torch.tensor([[0.1, 0.2]] * 3, dtype=torch.float64).to(dtype))
    assert torch.equal(batch["targets"], torch.tensor([0.3] * 3, dtype=torch.float64).to(dtype))
