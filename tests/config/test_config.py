from __future__ import annotations

import math
import multiprocessing
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import distrain.config
from distrain.config import (
    BatchSection,
    Component,
    Duration,
    Horizon,
    Recipe,
    RecipeError,
    UserError,
    close_names,
    is_object_spec,
    mix,
    resolve_object,
)
from distrain.config.agreement import Known, disagreements

VALUES = {
    "name": "x",
    "task": "classification",
    "data": "digits",
    "model": "mlp",
    "batch": {"global": 8},
    "train": {"steps": 10},
}


def test_every_name_of_the_front_door_is_there() -> None:
    for name in distrain.config.__all__:
        assert getattr(distrain.config, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Recip'"):
        _ = distrain.config.Recip


# --------------------------------------------------------------------------------------------------------------------
# Durations


@pytest.mark.parametrize(
    ("text", "amount", "unit", "written"),
    [
        ("200 steps", 200, "steps", "200 steps"),
        ("1 step", 1, "steps", "1 step"),
        ("3epochs", 3, "epochs", "3 epochs"),
        ("0.5 epochs", 0.5, "epochs", "0.5 epochs"),
        (" 1e9  Tokens ", 1e9, "tokens", "1000000000 tokens"),
        ("1_000 samples", 1000, "samples", "1000 samples"),
        ("10%", 10, "%", "10%"),
        ("12.3456789 %", 12.3456789, "%", "12.3456789%"),
        ("20 min", 20, "minutes", "20 minutes"),
        ("1 h", 1, "hours", "1 hour"),
        ("90 s", 90, "seconds", "90 seconds"),
        ("0 steps", 0, "steps", "0 steps"),
        ("1e18 tokens", 1e18, "tokens", "1e+18 tokens"),
    ],
)
def test_durations_read_and_written(text, amount, unit, written):
    duration = Duration.parse(text)
    assert duration == Duration(amount, unit)
    assert str(duration) == written
    assert Duration.parse(written) == duration
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("200", "expected a number and a unit"),
        (200, "found 200, expected a number and a unit"),
        (None, "found None"),
        ("steps", "expected a number and a unit"),
        ("3 epchs", "did you mean 'epochs'"),
        ("1e step", "expected a number and a unit"),
        ("1-2 steps", "expected a number and a unit"),
        ("nan steps", "expected a number and a unit"),
        ("1e999 steps", "expected a number and a unit"),
        ("-1 steps", "expected a duration of zero or more"),
        ("101%", "expected at most 100%"),
        ("1e19 tokens", "expected at most 1e+18 tokens"),
        ("1.5 steps", "expected a whole number of steps"),
        ("10 %%", "expected a number and a unit"),
    ],
)
def test_what_is_no_duration(text, message):
    with pytest.raises(ValueError, match="found") as caught:
        Duration.parse(text)
    assert message in str(caught.value)


@given(st.floats(0, 100), st.sampled_from(["epochs", "%", "seconds", "minutes", "hours"]))
def test_a_duration_is_written_exactly(amount, unit):
    assert Duration.parse(str(Duration(amount, unit))) == Duration(amount, unit)


def test_seconds():
    assert Duration.parse("20 min").seconds == 1200
    assert Duration.parse("1.5 hours").seconds == 5400
    assert Duration.parse("20 steps").seconds is None


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("200 steps", 200),
        ("0 epochs", 0),
        ("1 epoch", 4),  # 1000 samples in steps of 256 end within the fourth
        ("3 epochs", 12),  # 11.72
        ("0.001 epochs", 1),
        ("256 samples", 1),
        ("257 samples", 2),
        ("32768 tokens", 1),
        ("32769 tokens", 2),
        ("7%", 7),  # 7 / 100 * 100 is 7.000000000000001 in floats
        ("0.1%", 1),
        ("100%", 100),
    ],
)
def test_durations_in_steps(text, steps):
    horizon = Horizon(global_batch_size=256, samples_per_epoch=1000, tokens_per_sample=128, total_steps=100)
    assert horizon.steps(Duration.parse(text), "eval.every") == steps


@given(st.integers(1, 100), st.integers(1, 10**12))
def test_a_share_of_the_run_is_exact_at_any_size(percent, total):
    horizon = Horizon(1, 1, 1, total_steps=total)
    assert horizon.steps(Duration(percent, "%"), "x") == math.ceil(Fraction(percent * total, 100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 epoch", "eval.every: '1 epoch' of a stream whose length is not known"),
        ("1 token", "eval.every: '1 token' needs samples of a fixed number of tokens"),
        ("1%", "eval.every: '1%' has no meaning here"),
        ("1 min", "eval.every: '1 minute' is a time; only checkpoint.every and log.every can be one"),
    ],
)
def test_durations_that_have_no_steps(text, message):
    with pytest.raises(UserError) as caught:
        Horizon(8, None, None).steps(Duration.parse(text), "eval.every")
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Recipes in memory


def test_a_recipe_from_values():
    recipe = Recipe.model_validate(VALUES)
    assert recipe.model.name == "mlp"
    assert recipe.batch == BatchSection(global_batch_size=8)
    assert recipe == Recipe.model_validate({**VALUES, "batch": BatchSection(global_batch_size=8)})
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch": {"global": 8, "micro": 3}},
            "batch.global: found 8, expected a multiple of batch.micro = 3 times the processes",
        ),
        ({"train": {"steps": 1, "epochs": 1}}, "train: found epochs and steps"),
        ({"schedule": {"name": "cosine", "gamma": 0.1}}, "schedule.gamma: does nothing"),
    ],
)
def test_a_recipe_that_disagrees_with_itself_cannot_be_made(changes, message):
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({**VALUES, **changes})
    assert message in str(caught.value)


def test_checks_whose_values_are_unknown_are_omitted():
    recipe = Recipe.model_validate({**VALUES, "batch": {"global": 8, "micro": 4}})
    sections = {key: getattr(recipe, key) for key in Recipe.model_fields}
    wrong = {**sections, "batch": BatchSection(global_batch_size=9, micro_batch_size=4)}
    assert [key for key, _ in disagreements(Known(wrong))] == ["batch.global"]
    assert not disagreements(Known(wrong, {"batch.micro"}))
    assert not disagreements(Known(wrong, {"batch"}))
    assert not disagreements(Known({}))


def test_component_arguments():
    section = Component.model_validate({"name": "a", "k": 3})
    assert section.args == {"k": 3}
    assert section.model_dump() == {"name": "a", "k": 3}
    assert Component(name="a").model_dump() == "a"


# --------------------------------------------------------------------------------------------------------------------
# Errors and seeds


def test_errors_list_their_problems():
    error = RecipeError("a.yaml", ["one", "two"])
    assert str(error) == "a.yaml: 2 problems\n  - one\n  - two"
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert str(RecipeError("a.yaml", ["one"])) == "a.yaml: 1 problem\n  - one"
    assert pickle.loads(pickle.dumps(error)).problems == ["one", "two"]


def test_close_names():
    assert close_names("cifar1", ["cifar10", "digits"]) == "; did you mean 'cifar10'?"
    assert close_names("ADAMW", ["AdamW", "Adam"]) == "; did you mean 'AdamW' or 'Adam'?"
    assert close_names("zzz", ["cifar10"]) == ""
    assert close_names("cifar1", ["cifar10"], "it has cifar10") == "; did you mean 'cifar10'? It has cifar10"
    assert close_names("zzz", ["cifar10"], "it has cifar10") == "; it has cifar10"


def test_mix_is_the_same_for_ever():
    assert mix(0, "init") == 2718509303608613306
    assert mix(1, 2, 3) == 1487399400326502518
    assert mix("a", "b") == 7071653081998898808


def test_mix_depends_on_every_part():
    numpy = pytest.importorskip("numpy")
    parts = [(), (0,), (1,), ("1",), (1, 2), (2, 1), (12,), ("a", "b"), ("a\x1fstr:b",), ("a\x1f\x1fstr:b",), ("ab",)]
    assert len({mix(*part) for part in parts}) == len(parts)
    assert mix(numpy.int64(3)) == mix(3)
    assert all(0 <= mix(seed) < 2**63 for seed in range(100))


# --------------------------------------------------------------------------------------------------------------------
# Objects from the user's files


@pytest.mark.parametrize("spec", ["a:b", "a.b:c", "a.b:C.d", "x.py:f", "/a b/x.py:f", "../x.py:f", "C:/x.py:f"])
def test_object_specs(spec):
    assert is_object_spec(spec)


@pytest.mark.parametrize(
    "spec", ["", "a", "x.py", ":f", "a:", "x.py:", "a:b:c", "a:1", "1a:b", "a/b:c", "a.:b", "x.py:f()"]
)
def test_what_is_no_object_spec(spec):
    assert not is_object_spec(spec)
    with pytest.raises(UserError, match=r"is not 'package\.module:name'"):
        resolve_object(spec)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_objects_of_packages():
    assert resolve_object("math:sqrt") is math.sqrt
    assert resolve_object("distrain.config:Duration.parse")("1 step") == Duration(1, "steps")


def test_objects_of_files(folder):
    (folder / "beside_own.py").write_text("VALUE = 7\n")
    (folder / "own_model.py").write_text("import beside_own\nclass Net:\n    size = beside_own.VALUE\n")
    net = resolve_object(f"{folder}/own_model.py:Net")
    assert net.size == 7
    assert resolve_object(f"{folder}/own_model.py:Net.size") == 7
    assert resolve_object(f"{folder}/own_model.py:Net") is net
    import own_model  # what a sibling that imports it sees

    assert own_model.Net is net
    assert resolve_object(f"{folder}/beside_own.py:VALUE") is own_model.beside_own.VALUE


def test_a_file_is_found_from_the_current_folder(folder, monkeypatch):
    (folder / "own_here.py").write_text("X = 1\n")
    monkeypatch.chdir(folder)
    assert resolve_object("own_here.py:X") == 1


def test_files_of_one_name_and_of_a_librarys_name_stay_apart(folder):
    for number in (1, 2):
        (folder / f"{number}").mkdir()
        (folder / f"{number}" / "own_twin.py").write_text(f"X = {number}\n")
    (folder / "json.py").write_text("X = 3\n")
    (folder / "with-dash.py").write_text("X = 4\n")
    assert [resolve_object(f"{folder}/{number}/own_twin.py:X") for number in (1, 2, 1)] == [1, 2, 1]
    assert resolve_object(f"{folder}/json.py:X") == 3
    assert resolve_object(f"{folder}/with-dash.py:X") == 4
    import json

    assert json.loads("1") == 1


@pytest.mark.parametrize("name", ["own_pickled.py", "json.py"])
def test_objects_of_files_reach_other_processes(folder, name):
    (folder / name).write_text(
        "class Set:\n    def __init__(self, n): self.n = n\n    def double(self): return 2 * self.n\n"
    )
    made = resolve_object(f"{folder}/{name}:Set")(21)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(made.double) == 42


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("class Network: pass", "Netwrk", "has no 'Netwrk'; did you mean 'Network'?"),
        ("x = 1\ny = 1 / 0\n", "x", "own_bad.py:2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "f", "own_bad.py:1: SyntaxError"),
        ("import no_such_module_xyz\n", "f", "own_bad.py:1: No module named 'no_such_module_xyz'; is it installed"),
        ("import sys\nsys.exit(3)\n", "f", "own_bad.py:2: SystemExit: 3"),
        ("import json\n\njson.loads('{')\n", "f", "own_bad.py:3: JSONDecodeError"),
    ],
)
def test_what_is_wrong_in_a_file_is_reported_with_its_line(folder, code, name, message):
    (folder / "own_bad.py").write_text(code)
    with pytest.raises(UserError) as caught:
        resolve_object(f"{folder}/own_bad.py:{name}")
    assert message in str(caught.value)


def test_missing_files_and_modules(folder):
    (folder / "models.py").touch()
    with pytest.raises(UserError, match=r"there is no file .*/model\.py; did you mean 'models\.py'\?"):
        resolve_object(f"{folder}/model.py:Net")
    with pytest.raises(UserError, match=r"there is no file .*/none/model\.py$"):
        resolve_object(f"{folder}/none/model.py:Net")
    with pytest.raises(UserError, match=r"there is no module 'no_such_package'.*path/to/file\.py:name"):
        resolve_object("no_such_package.models:Net")
    with pytest.raises(UserError, match=r"there is no module 'json\.none'"):
        resolve_object("json.none:Net")


def test_importing_the_recipe_imports_nothing_heavy():
    heavy = ("torch", "pandas", "numpy", "accelerate", "rich", "typer", "yaml")
    code = f"import sys, distrain.config; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
