from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from distrain.config import DataSection, UserError
from distrain.datasets.base import Data, DataRequest, warnings_of
from distrain.datasets.table_numbers import parse_numbers
from distrain.datasets.user import named_data


def build(
    base: Path,
    task: Any = "classification",
    state: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **section: Any,
) -> Data:
    return named_data(
        DataRequest(DataSection(name="table", **section), task, seed=0, base=base, state=state, dtype=dtype)
    )


def two_files(folder: Path, train: str, test: str) -> dict[str, Any]:
    (folder / "train.csv").write_text(train)
    (folder / "test.csv").write_text(test)
    return {"split": {"train": "train.csv", "test": "test.csv"}}


def everything(data: Data, split: str) -> dict[str, Any]:
    source: Any = data.splits[split]
    return source.fetch(np.arange(len(source)))


def test_numbers_are_standardised_by_the_training_rows_alone(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,b,y\n1,5,x\n3,5,z\n", "a,b,y\n101,7,z\n")
    data = build(tmp_path, target="y", **split)
    assert everything(data, "train")["inputs"].tolist() == [[-1, 0], [1, 0]]
    assert everything(data, "test")["inputs"].tolist() == [[99, 2]]
    assert data.meta.feature_names == ("a", "b")
    assert data.meta.input_shape == (2,)


def test_statistics_come_from_the_training_part_of_one_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(3, 10, 200)
    pd.DataFrame({"a": values, "y": np.arange(200) % 2}).to_csv(tmp_path / "all.csv", index=False)
    data = build(tmp_path, path="all.csv", target="y", split=[0.7, 0.3])
    train = everything(data, "train")["inputs"].double()
    assert len(train) == 140
    assert abs(train.mean().item()) < 1e-6
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert abs(everything(data, "test")["inputs"].mean().item()) > 1e-3


@pytest.mark.parametrize(("missing", "fill"), [("mean", 4.0), ("median", 2.0)])
def test_missing_numbers_are_filled_from_training_rows(tmp_path: Path, missing: str, fill: float) -> None:
    split = two_files(tmp_path, "a,y\n1,x\n2,z\nNA,x\n9,z\n", "a,y\n,x\n4,z\n")
    data = build(tmp_path, target="y", missing=missing, missing_indicator=True, **split)
    present = np.array([1, 2, 9])
    scaled = (fill - present.mean()) / present.std()
    assert everything(data, "train")["inputs"][2].tolist() == pytest.approx([scaled, 1])
    assert everything(data, "test")["inputs"][:, 1].tolist() == [1, 0]
    assert everything(data, "test")["inputs"][0, 0].item() == pytest.approx(scaled)
    assert data.meta.feature_names == ("a", "a is missing")


def test_missing_numbers_can_be_an_error(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,y\n1,x\n2,z\n", "a,y\n3,x\n,z\n")
    with pytest.raises(UserError, match=r"column 'a' has no value at .*test\.csv, row 2"):
        build(tmp_path, target="y", missing="error", **split)


def test_categories_are_those_of_training_and_others_are_unknown(tmp_path: Path) -> None:
    split = two_files(tmp_path, 'c,y\nred,x\n"a, b",z\n,x\nred,z\n', "c,y\nblue,x\n,z\nred,x\n")
    data = build(tmp_path, target="y", **split)
    assert data.meta.feature_names == ("c=a, b", "c=red", "c=(missing)")
    assert everything(data, "train")["inputs"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert everything(data, "test")["inputs"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]

    data = build(tmp_path, target="y", encode="index", **split)
    inputs = everything(data, "test")["inputs"]
    assert inputs["categorical"].tolist() == [[0], [3], [2]]
    assert inputs["categorical"].dtype == torch.int64
    assert inputs["numeric"].shape == (3, 0)
    assert data.meta.cardinalities == (4,)


def test_a_column_is_understood_as_in_training(tmp_path: Path) -> None:
    split = two_files(tmp_path, "code,flag,y\n01,True,x\nA,False,z\n", "code,flag,y\n01,False,x\n1,True,z\n")
    data = build(tmp_path, target="y", **split)
    assert data.meta.feature_names == ("code=01", "code=A", "flag=False", "flag=True")
    assert everything(data, "test")["inputs"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]


def test_parquet_json_lines_and_csv_give_the_same(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "n": pd.array([1, None, 3, 4], dtype="Int64"),
            "f": [0.5, 1.5, None, 2.5],
            "c": pd.Categorical(["u", "v", None, "u"]),
            "b": [True, False, True, True],
            "y": [3, 10, 3, 10],
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for encode in ("one_hot", "index"):
        first, *others = (
            build(tmp_path, path=f"t.{kind}", target="y", split=[1.0], encode=encode)
            for kind in ("csv", "parquet", "jsonl")
        )
        for other in others:
            assert first.state == other.state
            assert str(everything(first, "train")) == str(everything(other, "train"))
    assert first.meta.class_names == ("3", "10")


def test_the_state_is_json_and_is_never_fitted_again(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,c,y\n1,u,x\n3,v,z\n,,z\n", "a,c,y\n5,w,x\n")
    fitted = build(tmp_path, target="y", missing_indicator=True, **split)
    state = json.loads(json.dumps(fitted.state))
    (tmp_path / "train.csv").write_text("a,c,y\n100,w,x\n200,w,x\n")
    again = build(tmp_path, target="y", state=state, **split)
    assert again.state == fitted.state
    assert again.meta == fitted.meta
    assert torch.equal(everything(again, "test")["inputs"], everything(fitted, "test")["inputs"])
    assert everything(again, "train")["inputs"][0, 0].item() == 98


def test_reading_for_prediction(tmp_path: Path) -> None:
    data = build(tmp_path, target="y", **two_files(tmp_path, "a,c,y\n1,u,x\n3,v,z\n", "a,c,y\n1,u,x\n"))
    assert data.read is not None
    (tmp_path / "new.csv").write_text("extra,c,a\n?,v,5\n")
    batch = data.read(tmp_path / "new.csv").fetch(np.array([0]))
    assert batch["inputs"].tolist() == [[3, 0, 1]]
    assert "targets" not in batch
    (tmp_path / "new.csv").write_text("a,c,y\n5,v,\n")
    assert "targets" not in data.read(tmp_path / "new.csv").fetch(np.array([0]))
    (tmp_path / "new.csv").write_text("a,c,y\n5,v,z\n")
    assert data.read(tmp_path / "new.csv").fetch(np.array([0]))["targets"].tolist() == [1]
    (tmp_path / "new.csv").write_text("a,y\n5,x\n")
    with pytest.raises(UserError, match="lacks 'c'"):
        data.read(tmp_path / "new.csv")
    (tmp_path / "new.csv").write_text("a,c\nfive,x\n")
    with pytest.raises(UserError, match=r"'a' should hold numbers, and .*new\.csv, row 1 holds 'five'"):
        data.read(tmp_path / "new.csv")


def test_classes_are_sorted_and_fitted_on_training_rows(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,y\n1,10\n2,9\n3,10\n", "a,y\n1,9\n")
    data = build(tmp_path, target="y", **split)
    assert data.meta.class_names == ("9", "10")
    assert data.meta.num_classes == 2
    assert everything(data, "train")["targets"].tolist() == [1, 0, 1]
    assert everything(data, "train")["targets"].dtype == torch.int64
    (tmp_path / "test.csv").write_text("a,y\n1,9\n2,11\n")
    with pytest.raises(UserError, match=r"holds '11' at .*test\.csv, row 2"):
        build(tmp_path, target="y", **split)


@pytest.mark.parametrize(("positive", "expected"), [(None, [1.0, 0.0]), ("yes", [1.0, 0.0]), ("no", [0.0, 1.0])])
def test_binary(tmp_path: Path, positive: str | None, expected: list[float]) -> None:
    split = two_files(tmp_path, "a,y\n1,yes\n2,no\n", "a,y\n1,yes\n")
    data = build(tmp_path, "binary", target="y", positive=positive, **split)
    targets = everything(data, "train")["targets"]
    assert targets.tolist() == expected
    assert targets.dtype == torch.float32
    assert data.meta.class_names is not None
    assert data.meta.class_names[1] == (positive or "yes")


def test_binary_needs_two_classes(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,y\n1,u\n2,v\n3,w\n", "a,y\n1,u\n")
    with pytest.raises(UserError, match="has 3 classes"):
        build(tmp_path, "binary", target="y", **split)


def test_multilabel(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,p,q\n1,0,1\n2,1,True\n", "a,p,q\n1,0,0\n")
    data = build(tmp_path, "multilabel", target=["p", "q"], **split)
    assert everything(data, "train")["targets"].tolist() == [[0, 1], [1, 1]]
    assert (data.meta.num_targets, data.meta.class_names) == (2, ("p", "q"))
    (tmp_path / "test.csv").write_text("a,p,q\n1,0,2\n")
    with pytest.raises(UserError, match="'q' should hold 0 and 1"):
        build(tmp_path, "multilabel", target=["p", "q"], **split)


def test_regression(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,p,q\n1,0,1\n2,4,1\n", "a,p,q\n1,6,3\n")
    assert everything(build(tmp_path, "regression", target="p", drop=["q"], **split), "train")["targets"].tolist() == [
        0,
        4,
    ]
    data = build(tmp_path, "regression", target=["p", "q"], standardize_target=True, **split)
    assert everything(data, "test")["targets"].tolist() == [[2, 2]]
    assert (data.meta.target_mean, data.meta.target_std) == ((2, 1), (2, 1))
    assert data.meta.num_targets == 2
    (tmp_path / "test.csv").write_text("a,p,q\n1,,3\n1,2,2\n1,,3\n")
    with pytest.raises(UserError, match=r"'p' has no value at .*row 1; .*row 3"):
        build(tmp_path, "regression", target=["p", "q"], **split)


def test_stratified_split(tmp_path: Path) -> None:
    pd.DataFrame({"a": range(100), "y": [0] * 90 + [1] * 10}).to_csv(tmp_path / "t.csv", index=False)
    data = build(tmp_path, path="t.csv", target="y", split=[0.8, 0.2], stratify=True)
    assert everything(data, "test")["targets"].sum().item() == 2


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "2.csv").write_text("y,a\nx,2\n")
    (folder / "1.csv").write_text("a,y\n1,z\n0,x\n")
    (folder / "readme.txt").write_text("not a table")
    data = build(tmp_path, "regression", path="parts", target="a", categorical=["y"], split=[1.0])
    assert everything(data, "train")["targets"].tolist() == [1, 0, 2]
    (folder / "2.csv").write_text("y,a\nx,two\n")
    with pytest.raises(UserError, match=r"2\.csv, row 1 holds 'two'"):
        build(tmp_path, "regression", path="parts", target="a", split=[1.0])
    (folder / "2.csv").write_text("y,b\nx,2\n")
    with pytest.raises(UserError, match="should have the same columns, but differ in 'a', 'b'"):
        build(tmp_path, "regression", path="parts", target="a", split=[1.0])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_as_found_in_the_wild(tmp_path: Path, newline: str) -> None:
    lines = ["größe;c;y", '1;"two', 'lines";ä', '3;"say ""hi""; now";ö', ""]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + newline.join(lines).encode())
    data = build(tmp_path, path="t.csv", target="y", delimiter=";", split=[1.0])
    assert data.meta.class_names == ("ä", "ö")
    assert data.meta.feature_names == ("größe", 'c=say "hi"; now', f"c=two{newline}lines")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,y\n", "has no rows"),
        ("a,a,y\n1,2,x\n", "names 'a' more than once"),
        ("a,y\n1,x\n1,x,7\n", "cannot be read.*row 2: Expected 2 columns, got 3"),
        ("a,y\n1,x\n1\n", "cannot be read.*row 2: Expected 2 columns, got 1"),
        ("a,y\ninf,x\n2,z\n", "column 'a' is infinite at .*row 1"),
        ("a,b,y\n1,,x\n2,,z\n", "column 'b' has no value in any training row"),
        ("a,y\n1,x\n2,\n", "target column 'y' has no value at .*row 2"),
        ("a,y\n1,x\n2,x\n", "has only the class 'x' .*; expected two or more: is data.target the column"),
        ("y\nx\n", "no column is left"),
        ("a,yy\n1,x\n", re.escape("data.target: ") + ".* has no column 'y'"),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        build(tmp_path, path="t.csv", target="y", split=[1.0])


def test_a_table_in_another_encoding_says_which_to_use(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a,y\n1,nä\n2,ja\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.csv is not UTF-8 text: .*xe4'; save it as UTF-8"):
        build(tmp_path, path="t.csv", target="y", split=[1.0])


def test_the_row_of_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1, "y": "x"}\n{"a": 2 "y": "z"}\n')
    with pytest.raises(UserError, match=r"cannot be read.* in row 2$"):
        build(tmp_path, path="t.jsonl", target="y", split=[1.0])


def test_a_target_of_words_is_no_input_to_drop(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n1,2\n2,many\n")
    with pytest.raises(UserError, match="row 2 holds 'many'; correct it, or choose a task that takes labels") as caught:
        build(tmp_path, "regression", path="t.csv", target="y", split=[1.0])
    assert "drop" not in str(caught.value)


def test_every_wrong_name_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("height,width,y\n1,2,x\n2,3,z\n")
    with pytest.raises(UserError) as caught:
        build(tmp_path, path="t.csv", target="y", features=["hight", "width"], drop=["width", "gone"], split=[1.0])
    message = str(caught.value)
    assert "data.features" in message
    assert "did you mean 'height'?" in message
    assert "no column 'gone'" in message
    assert "'width' is also in data.drop" in message


def test_huge_categories_are_refused_for_one_hot_and_fine_as_indices(tmp_path: Path) -> None:
    count = 3000
    pd.DataFrame({"id": [f"user {i}" for i in range(count)], "y": np.arange(count) % 2}).to_csv(
        tmp_path / "t.csv", index=False
    )
    with pytest.raises(UserError, match="'id' has 3000 different values in 3000 training rows"):
        build(tmp_path, path="t.csv", target="y", split=[1.0])
    data = build(tmp_path, path="t.csv", target="y", split=[1.0], encode="index")
    assert data.meta.cardinalities == (count + 1,)
    assert sorted(everything(data, "train")["inputs"]["categorical"][:, 0].tolist()) == list(range(1, count + 1))


def test_options_of_other_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n1,2\n2,3\n")
    with pytest.raises(UserError, match=r"data\.positive is for task binary"):
        build(tmp_path, path="t.csv", target="y", positive="3", split=[1.0])
    with pytest.raises(UserError, match=r"data\.standardize_target is for task regression"):
        build(tmp_path, path="t.csv", target="y", standardize_target=True, split=[1.0])
    with pytest.raises(UserError, match="did you mean 'missing'"):
        build(tmp_path, path="t.csv", target="y", mising="mean", split=[1.0])


# --------------------------------------------------------------------------------------------------------------------
# Numbers of any size

STAMP = 1_700_000_000_000_000_000  # nanoseconds, of which float64 holds every 256th


def exactly(values: list[Any]) -> np.ndarray:
    """Standardise without rounding on the way; None is left out."""
    numbers = [Fraction(value) for value in values if value is not None]
    mean = sum(numbers) / len(numbers)
    largest = max(abs(number - mean) for number in numbers)
    parts = np.array([float((number - mean) / largest) for number in numbers])
    return parts / np.sqrt(np.mean(parts**2))


DRAWN = np.random.default_rng(0)
SIZES: dict[str, list[Any]] = {
    "ordinary": (3 + DRAWN.normal(size=50)).tolist(),
    "small": ((3 + DRAWN.normal(size=50)) * 1e-21).tolist(),
    "so small that squares are 0": (DRAWN.normal(size=50) * 1e-200).tolist(),
    "so large that squares are infinite": (DRAWN.normal(size=50) * 1e200).tolist(),
    "close": (1e9 + DRAWN.normal(size=50) * 1e-5).tolist(),
    "stamps": [STAMP + int(each) for each in DRAWN.integers(0, 300, 50)],
    "neighbours": [2**60, 2**60 + 1] * 25,
    "unsigned": [2**63 + int(each) for each in DRAWN.integers(0, 9, 50)],
    "with holes": [None if at % 7 == 3 else STAMP + at % 5 for at in range(50)],
}


def test_a_text_is_the_number_that_is_closest_to_it() -> None:
    drawn = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-300, 300, 0.3)
    texts = [
        *map(repr, drawn.tolist()),
        " +1.5\t",
        "5.",
        "-.5e+2",
        "007",
        "1e400",
        "-iNf",
        "0.12345678901234567890123",
        None,
    ]
    nothing = ["", "-", "+-1", "e5", "1e", "1_0", "0x1F", "nan", "1,5", "1\n2", "18.E 8", "true"]
    found = parse_numbers(pa.chunked_array([[*texts, *nothing]]))
    expected = [math.nan if each is None else float(each) for each in texts]
    np.testing.assert_array_equal(found, [*expected, *[math.nan] * len(nothing)])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("values", SIZES.values(), ids=SIZES)
def test_numbers_of_any_size_are_standardised(tmp_path: Path, values: list[Any], kind: str) -> None:
    whole = all(value is None or isinstance(value, int) for value in values)
    dtype = "UInt64" if values[0] is not None and values[0] >= 2**63 and whole else "Int64"
    column = pd.array(values, dtype=dtype) if whole else values
    frame = pd.DataFrame({"a": column, "y": ["u", "v"] * 25})
    frame.to_csv(tmp_path / "t.csv", index=False) if kind == "csv" else frame.to_parquet(tmp_path / "t.parquet")
    path, rows = f"t.{kind}", [at for at, value in enumerate(values) if value is not None]
    data = build(tmp_path, path=path, target="y", split=[1.0], dtype=torch.float64)
    found = everything(data, "train")["inputs"]
    assert found.dtype == torch.float64
    assert np.abs(found[rows, 0].numpy() - exactly(values)).max() < 1e-9
    again = build(tmp_path, path=path, target="y", split=[1.0], state=json.loads(json.dumps(data.state)))
    assert torch.equal(everything(again, "train")["inputs"], found.float())
    if len(rows) == len(values):
        wanted = build(tmp_path, "regression", path=path, target="a", split=[1.0], standardize_target=True)
        assert np.abs(everything(wanted, "train")["targets"].numpy() - exactly(values)).max() < 1e-5
        assert wanted.meta.target_mean is not None
        assert wanted.meta.target_mean[0] == pytest.approx(float(sum(map(Fraction, values)) / 50))


@pytest.mark.parametrize(
    "values",
    [[0.1 + 0.2, 0.3], [STAMP + 1, STAMP + 1], [1e-21, 1e-21], [1e200, 1e200], [0, 0], [0.1, 0.1], [2.5e15, 2.5e15]],
)
def test_a_constant_column_stays_at_nothing(tmp_path: Path, values: list[float]) -> None:
    rows = [*values, *values[:1]]  # three times a tenth is not three tenths
    pd.DataFrame({"a": rows, "b": [1, 2, 3], "y": ["u", "v", "u"]}).to_csv(tmp_path / "t.csv", index=False)
    inputs = everything(build(tmp_path, path="t.csv", target="y", split=[1.0]), "train")["inputs"]
    assert inputs[:, 0].abs().max() < 1e-15
    data = build(tmp_path, "regression", path="t.csv", target="a", drop=["y"], split=[1.0], standardize_target=True)
    assert everything(data, "train")["targets"].abs().max() < 1e-15
    assert data.meta.target_std == (1,)


def test_ordinary_columns_are_standardised_by_the_plain_formula(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(3, 10, 101)
    pd.DataFrame({"a": values, "y": np.arange(101) % 2}).to_parquet(tmp_path / "t.parquet")
    data = build(tmp_path, path="t.parquet", target="y", split=[1.0])
    plain = ((values - values.mean()) / values.std()).astype(np.float32)
    assert everything(data, "train")["inputs"][:, 0].tolist() == plain.tolist()
    wanted = build(tmp_path, "regression", path="t.parquet", target=["a"], split=[1.0], standardize_target=True)
    stacked = values[:, None]
    plain = ((stacked - stacked.mean(axis=0)) / stacked.std(axis=0)).astype(np.float32)
    assert everything(wanted, "train")["targets"].tolist() == plain.tolist()


def test_what_a_float_cannot_hold_is_an_error(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,y\n1e-21,x\n3e-21,z\n", "a,y\n1e-21,z\n1e30,x\n")
    with pytest.raises(UserError, match=r"column 'a' becomes 1e\+51 at .*test\.csv, row 2, which float32 cannot hold"):
        build(tmp_path, target="y", **split)
    assert everything(build(tmp_path, target="y", dtype=torch.float64, **split), "test")["inputs"][1, 0] > 1e50
    (tmp_path / "train.csv").write_text("a,y\n1,1e39\n2,3\n")
    with pytest.raises(UserError, match=r"target column 'y' becomes 1e\+39 at .*train\.csv, row 1"):
        build(tmp_path, "regression", target="y", **split)


@pytest.mark.parametrize(("task", "target"), [("regression", "a"), ("binary", "y"), ("multilabel", ["p", "q"])])
def test_tables_are_double_where_the_run_is(tmp_path: Path, task: str, target: Any) -> None:
    split = two_files(tmp_path, "a,c,y,p,q\n0.1,u,0,0,1\n0.7,v,1,1,1\n", "a,c,y,p,q\n0.3,u,1,0,0\n")
    data = build(tmp_path, task, target=target, categorical=["c"], dtype=torch.float64, **split)
    batch = everything(data, "test")
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (torch.float64, torch.float64)
    if task == "regression":
        assert batch["targets"].tolist() == [0.3]
    else:
        assert batch["inputs"][0, 0] == (0.3 - np.mean([0.1, 0.7])) / np.std([0.1, 0.7])


# --------------------------------------------------------------------------------------------------------------------
# Categories that training never saw


def test_unknown_categories_are_counted_and_named(tmp_path: Path) -> None:
    split = two_files(
        tmp_path,
        "c,d,y\nred,u,x\nblue,v,z\n",
        "c,d,y\nred,u,x\ngreen,v,z\ngreen,,z\npink,u,z\n",
    )
    data = build(tmp_path, target="y", **split)
    assert warnings_of(data.splits["train"]) == ()
    assert warnings_of(data.splits["test"]) == (
        "column 'c': 3 of 4 rows of the split 'test' have a category that no training row has, and count as unknown: "
        "'green', 'pink'",
        "column 'd': 1 of 4 rows of the split 'test' have a category that no training row has, and count as unknown: "
        "(missing)",
    )
    assert data.read is not None
    (tmp_path / "new.csv").write_text("c,d\n" + "".join(f"{each},u\n" for each in "abcdefg"))
    (said,) = warnings_of(data.read(tmp_path / "new.csv"))
    assert f"7 of 7 rows of {tmp_path / 'new.csv'} have a category that no training row has" in said
    assert said.endswith("'a', 'b', 'c', 'd', 'e' and 2 more")


@pytest.mark.parametrize("encode", ["one_hot", "index"])
def test_a_column_of_unknown_categories_alone_is_refused(tmp_path: Path, encode: str) -> None:
    split = two_files(tmp_path, "c,y\n10.0,x\n11.0,z\n,z\n", "c,y\n10,x\n11,z\n")
    with pytest.raises(
        UserError,
        match=r"column 'c': 2 of 2 rows of the split 'test' .*: '10', '11'; '10' here is '10.0' in the training rows",
    ):
        build(tmp_path, target="y", categorical=["c"], encode=encode, **split)
    (tmp_path / "test.csv").write_text("c,y\n10.0,x\n11.0,z\n")
    fitted = build(tmp_path, target="y", categorical=["c"], encode=encode, **split)
    (tmp_path / "test.csv").write_text("c,y\n10,x\n11,z\n")
    again = build(tmp_path, target="y", categorical=["c"], encode=encode, state=fitted.state, **split)
    assert "2 of 2 rows" in warnings_of(again.splits["test"])[0]  # an existing run resumes


def test_a_column_of_numbers_without_values_is_refused(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,b,y\n1,5,x\n2,,z\n", "a,b,y\n,7,x\n,,z\n")
    with pytest.raises(UserError, match=r"column 'a': none of the 2 rows of the split 'test' has a value"):
        build(tmp_path, target="y", **split)
    (tmp_path / "test.csv").write_text("a,b,y\n,7,x\n3,,z\n")
    fitted = build(tmp_path, target="y", **split)
    assert warnings_of(fitted.splits["test"]) == ()
    assert fitted.read is not None
    (tmp_path / "new.csv").write_text("a,b\n,1\n,2\n")
    assert ["rows' mean stands in" in each for each in warnings_of(fitted.read(tmp_path / "new.csv"))] == [True]


def test_one_value_in_two_spellings_is_warned_of(tmp_path: Path) -> None:
    split = two_files(tmp_path, "c,d,y\nred,1,1\nred ,2,1.0\nRED,x,2\n", "c,d,y\nred,1,1\n")
    assert build(tmp_path, target="y", **split).warnings == (
        "column 'c': 'RED' and 'red', 'RED' and 'red ' differ only in how they are written, and count as different "
        "values; write them alike if they are one",
        "target column 'y': '1' and '1.0' differ only in how they are written, and count as different values; write "
        "them alike if they are one",
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_that_are_one_as_a_float_are_refused(tmp_path: Path, kind: str) -> None:
    numbers = [Decimal(10**25 + each) for each in (0, 1, 0, 1)]
    table = pd.DataFrame({"a": numbers, "y": ["x", "z", "x", "z"]})
    getattr(table, f"to_{kind}")(tmp_path / f"t.{kind}", index=False)
    with pytest.raises(UserError, match=r"column 'a' holds 1\d+ and 1\d+, which float64 cannot tell apart"):
        build(tmp_path, path=f"t.{kind}", target="y", split=[1.0])
    data = build(tmp_path, path=f"t.{kind}", target="y", split=[1.0], categorical=["a"])
    assert data.meta.input_shape == (2,)


@pytest.mark.parametrize("delimiter", list(",;\t|"))
def test_the_first_line_of_a_csv_file_tells_its_delimiter(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "t.csv").write_text("a,b,y\n1,5,x\n3,6,z\n".replace(",", delimiter))
    assert build(tmp_path, path="t.csv", target="y", split=[1.0]).meta.feature_names == ("a", "b")


COMMAS = ["1,5", "-0,25", "1.234,5", "1,234,567.5", "1,5e-3"]
SIGNS = ["12.5%", "3 %", "$1,200.50", "-€5", "7 €", "−3", "1 234", "1_000", "(1.5)", "1'234.5"]


@pytest.mark.parametrize("number", [*COMMAS, *SIGNS])
def test_numbers_with_more_than_digits_are_no_categories(tmp_path: Path, number: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"a;b;y\n{number};2;x\n3;4;z\n{number};;x\n")
    with pytest.raises(UserError, match=f"column 'a' of .*t.csv holds numbers such as {re.escape(repr(number))}"):
        build(tmp_path, path="t.csv", target="y", split=[1.0])
    assert build(tmp_path, path="t.csv", target="y", split=[1.0], categorical=["a"]).meta.input_shape == (3,)
    path.write_text("a;b;y\n" + f"{number};2;x\n3;4;z\n" * 20 + "unknown;4;z\n")
    with pytest.raises(UserError, match="holds numbers such as"):
        build(tmp_path, path="t.csv", target="y", split=[1.0])
    for other in ("1,2,3", "2024-01-01", "10:30", "20-30", "1.2.3", "5kg", "A1", "555-1234", "0x1f"):
        path.write_text(f"a;b;y\n{number};2;x\n{other};4;z\n")
        assert build(tmp_path, path="t.csv", target="y", split=[1.0]).meta.input_shape == (3,)


def test_files_that_are_called_as_splits_and_joined_are_told(tmp_path: Path) -> None:
    split = two_files(tmp_path, "a,y\n1.5,x\n3,z\n", "a,y\n2.5,x\n5,z\n")
    (said,) = build(tmp_path, path=".", target="y", split=[0.5, 0.5]).warnings
    assert "test.csv, train.csv" in said
    assert "data.split cuts them anew" in said
    assert not build(tmp_path, target="y", **split).warnings
    (tmp_path / "train.csv").rename(tmp_path / "first.csv")
    (tmp_path / "test.csv").rename(tmp_path / "second.csv")
    assert not build(tmp_path, path=".", target="y", split=[0.5, 0.5]).warnings


def test_a_column_that_a_few_values_make_categories_is_told(tmp_path: Path) -> None:
    rows = [f"{row % 17}.5,{'a' if row % 2 else 'b'}" for row in range(30)]
    rows[7] = "12o,a"
    (tmp_path / "t.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    (said,) = build(tmp_path, path="t.csv", target="y", split=[1.0]).warnings
    assert re.search(r"column 'x' of .*t.csv holds numbers but for '12o' at .*row 8.* counts as 18 categories", said)
    for silent in ({"categorical": ["x"]}, {"missing_values": ["12o"]}):
        assert not build(tmp_path, path="t.csv", target="y", split=[1.0], **silent).warnings
    rows[:7] = [f"id{row},a" for row in range(7)]  # a column of names, some of which look like numbers
    (tmp_path / "t.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    assert not build(tmp_path, path="t.csv", target="y", split=[1.0]).warnings


DAYS = ["2024-01-01", "2024-02-01"]


@pytest.mark.parametrize("train", ["csv", "parquet", "times.parquet", "jsonl", "words.jsonl"])
@pytest.mark.parametrize("read", ["csv", "parquet", "times.parquet", "jsonl", "words.jsonl"])
def test_days_and_truths_are_the_same_in_every_format(tmp_path: Path, train: str, read: str) -> None:
    frame = pd.DataFrame({"d": DAYS * 2, "t": [True, False] * 2, "y": ["a", "b"] * 2})
    days = pd.to_datetime(frame["d"])
    text = frame.assign(t=["true", "false"] * 2)
    text.to_csv(tmp_path / "t.csv", index=False)
    frame.assign(d=days.dt.date).to_parquet(tmp_path / "t.parquet")
    frame.assign(d=days).to_parquet(tmp_path / "t.times.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)  # pyarrow reads such texts as times
    pd.concat([frame, frame[:1].assign(d="unknown", y="b")]).to_json(
        tmp_path / "t.words.jsonl", orient="records", lines=True
    )
    data = build(tmp_path, path=f"t.{train}", target="y", split=[1.0])
    source: Any = data.read(tmp_path / f"t.{read}")  # type: ignore[misc]
    wanted: Any = data.splits["train"]
    assert torch.equal(source.inputs[:4], wanted.inputs[:4])
    assert bool(source.warnings) == ("words" in read and "words" not in train), "that one is unknown"


# --------------------------------------------------------------------------------------------------------------------
# Columns that nobody named


def noise(rows: int = 30) -> pd.DataFrame:
    """Rows of two measurements, sorted by class, of which the index has gaps."""
    draw = np.random.default_rng(2)
    frame = pd.DataFrame({"u": draw.normal(size=rows), "v": draw.normal(size=rows)})
    frame["label"] = np.repeat(["a", "b", "c"], rows // 3)
    return frame.drop(index=[3, 4])


WRITERS: dict[str, tuple[Callable[[pd.DataFrame, Path], None], str]] = {
    "parquet": (lambda frame, path: frame.to_parquet(path), "__index_level_0__"),
    "parquet, named": (lambda frame, path: frame.rename_axis("patient").to_parquet(path), "patient"),
    "parquet, of words": (
        lambda frame, path: frame.set_axis(map("r{}".format, frame.index)).to_parquet(path),
        "__inde",
    ),
    "parquet, two levels": (
        lambda frame, path: frame.set_index([frame.index, frame.index // 2]).to_parquet(path),
        "__index_level_1__",
    ),
    "parquet, read from CSV": (
        lambda frame, path: frame.reset_index(names="Unnamed: 0").to_parquet(path, index=False),
        "Unnamed: 0",
    ),
    "csv": (lambda frame, path: frame.to_csv(path), "''"),
    "csv, two levels": (
        lambda frame, path: frame.set_index([frame.index, frame.index // 2]).to_csv(path),
        "Unnamed: 1",
    ),
    "csv, twice": (
        lambda frame, path: frame.reset_index(names="Unnamed: 0").set_index(frame.index * 2).to_csv(path),
        "Unnamed: 0",
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_nobody_named_are_no_inputs(tmp_path: Path, kind: str) -> None:
    write, name = WRITERS[kind]
    path = tmp_path / ("t.parquet" if kind.startswith("parquet") else "t.csv")
    write(noise(), path)
    data = build(tmp_path, path=path.name, target="label", split=[0.8, 0.2])
    assert data.meta.feature_names == ("u", "v")
    assert any(name in each and "is skipped" in each and str(path) in each for each in data.warnings)
    bare = build(tmp_path, path=path.name, target="label", split=[0.8, 0.2], features=["u", "v"])
    assert bare.warnings == ()
    assert torch.equal(everything(bare, "test")["inputs"], everything(data, "test")["inputs"])
    # a file for prediction may have them or not
    noise().to_csv(tmp_path / "bare.csv", index=False)
    assert data.read is not None
    inputs = [data.read(each).fetch(np.arange(28))["inputs"] for each in (path, tmp_path / "bare.csv")]
    assert torch.equal(*inputs)


def test_an_index_that_the_recipe_names_is_used(tmp_path: Path) -> None:
    noise().rename_axis("site").to_parquet(tmp_path / "t.parquet")
    data = build(tmp_path, path="t.parquet", target="label", split=[1.0], features=["site", "u"])
    assert (data.meta.feature_names, data.warnings) == (("site", "u"), ())
    data = build(tmp_path, path="t.parquet", target="label", split=[1.0], categorical=["site"])
    assert len(data.meta.feature_names or ()) == 2 + 28
    assert data.warnings == ()
    data = build(tmp_path, "regression", path="t.parquet", target="site", drop=["label"], split=[1.0])
    assert (data.meta.feature_names, data.warnings) == (("u", "v"), ())
    assert build(tmp_path, path="t.parquet", target="label", split=[1.0], drop=["site"]).warnings == ()


def test_a_run_that_was_trained_on_an_index_is_read_as_before(tmp_path: Path) -> None:
    noise().to_csv(tmp_path / "t.csv")
    state = build(tmp_path, path="t.csv", target="label", split=[1.0], features=["", "u"]).state
    data = build(tmp_path, path="t.csv", target="label", split=[1.0], state=state)
    assert data.meta.feature_names == ("", "u")


def test_files_of_a_folder_with_and_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    noise().to_parquet(tmp_path / "parts" / "1.parquet")
    noise().reset_index(drop=True).to_parquet(tmp_path / "parts" / "2.parquet")
    data = build(tmp_path, path="parts", target="label", split=[1.0])
    assert (data.meta.feature_names, len(everything(data, "train")["targets"])) == (("u", "v"), 56)


def test_columns_that_training_lacks_are_named(tmp_path: Path) -> None:
    table = noise()
    table.to_csv(tmp_path / "train.csv", index=False)
    table.assign(V=table["v"]).drop(columns="label").assign(label=table["label"]).to_csv(tmp_path / "valid.csv")
    keys: dict[str, Any] = {"target": "label", "split": {"train": "train.csv", "valid": "valid.csv"}}
    (warning,) = build(tmp_path, **keys).warnings
    assert "valid.csv has columns that" in warning
    assert "has not, and that are no inputs: 'V'; spell them as there" in warning
    assert build(tmp_path, **keys, features=["u", "v"]).warnings == ()


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("row", lambda n: np.arange(n), "numbers the rows (0 to 27)"),
        ("row", lambda n: np.arange(n) + 1, "numbers the rows (1 to 28)"),
        ("row", lambda n: np.random.default_rng(0).permutation(n), "numbers the rows (0 to 27)"),
        ("index", lambda n: np.arange(n) * 3 + 7, "is named like an index"),
        ("level_1", lambda n: np.arange(n) * 3 + 7, "is named like an index"),
        ("user_id", lambda n: np.arange(n) + 10**15, "or an identifier"),
        ("PassengerId", lambda n: np.arange(n) * 3 + 7, "or an identifier"),
        ("index", lambda n: np.arange(n) % 5, None),
        ("user_id", lambda n: np.arange(n) % 5, None),
        ("grid", lambda n: np.arange(n) + 1990, None),
        ("year", lambda n: np.arange(n) + 1990, None),
        ("age", lambda n: np.arange(n) % 20, None),
        ("height", lambda n: np.arange(n) / 2, None),
    ],
)
def test_a_column_that_numbers_the_rows_is_warned_of(tmp_path: Path, name: str, make: Any, says: str | None) -> None:
    table = noise()
    table[name] = make(len(table))
    table.to_csv(tmp_path / "t.csv", index=False)
    keys: dict[str, Any] = {"path": "t.csv", "target": "label", "split": [0.8, 0.2]}
    data = build(tmp_path, **keys)
    assert data.meta.feature_names == ("u", "v", name)
    assert [each for each in data.warnings if says is None or says not in each] == []
    assert len(data.warnings) == (says is not None)
    assert build(tmp_path, **keys, features=["u", name]).warnings == ()
    assert build(tmp_path, **keys, drop=[name]).warnings == ()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["0012", "12", "7"], "leading zeros, such as '0012'"),
        (["0", "0.5", "-0.1"], None),
        (["1e0", "10", "100"], None),
    ],
)
def test_codes_that_are_read_as_numbers_are_warned_of(tmp_path: Path, values: list[str], says: str | None) -> None:
    table = noise()
    table["code"] = np.resize(values, len(table))
    table.to_csv(tmp_path / "t.csv", index=False)
    keys: dict[str, Any] = {"path": "t.csv", "target": "label", "split": [0.8, 0.2]}
    data = build(tmp_path, **keys)
    assert [says in each for each in data.warnings] == [True] * (says is not None)
    assert build(tmp_path, **keys, features=["u", "code"]).warnings == ()
    if says is not None:  # one number, and two codes
        named = build(tmp_path, **keys, categorical=["code"]).meta.feature_names
        assert len(named or ()) > len(data.meta.feature_names or ())


def test_rows_that_are_numbered_in_each_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in (1, 2):
        noise().reset_index(drop=True).rename_axis("id").to_csv(tmp_path / "parts" / f"{number}.csv")
    data = build(tmp_path, path="parts", target="label", split=[0.7, 0.3])
    assert [each[:28] for each in data.warnings] == [f"column 'id' of {tmp_path / 'parts'}"[:28]]
