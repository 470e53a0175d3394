from __future__ import annotations

import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.config import Duration, Recipe, RecipeError
from distrain.config.yaml import dump_recipe, json_schema, load_recipe, parse_recipe, show
from distrain.config.yaml.document import _COMPONENT_LISTS, _COMPONENTS
from distrain.config.yaml.strict_yaml import Tree, to_yaml

GOOD = """\
name: digits-resnet
task: classification
data: {name: digits, split: [0.8, 0.2]}
model: {name: mlp, layers: [{p: 0.5}, {p: 0.2}]}
loss: cross_entropy
optim: {name: adamw, lr: 1e-3, weight_decay: 0.05, clip_norm: 1}
schedule: {name: cosine, warmup: 5%}
batch: {global: 256, micro: auto}
train: {epochs: 10, ema: 0.999}
eval: {every: 1 epoch, metrics: [accuracy, f1_macro], best: accuracy}
checkpoint: {every: 200 steps, async: true}
log: {wandb: off, tensorboard: true}
seed: 0
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes = GOOD) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return [line.replace(str(file), "F") for line in caught.value.problems]


# Each changes GOOD by one line (found by its key), or adds one at the end, and says what the message must be.
BAD_LINES = [
    ("optim: {lr: -1}", "F:6: optim.lr: found -1, expected a number > 0"),
    ("optim: {lr: 0}", "F:6: optim.lr: found 0, expected a number > 0"),
    ("optim: {lr: '1e-3'}", "F:6: optim.lr: found '1e-3', expected a number > 0; remove the quotes"),
    ("optim: {lr: true}", "F:6: optim.lr: found true, expected a number > 0"),
    ("optim: {lr: 1e20}", "F:6: optim.lr: found 1e+20, expected a number > 0 and ≤ 1e+18"),
    ("optim: {lr: .nan}", "F:6: optim.lr: found .nan, expected a finite number"),
    ("optim: {lr: -.INF}", "F:6: optim.lr: found -.INF, expected a finite number"),
    ("optim: {lr: nan}", "F:6: optim.lr: found 'nan', expected a number > 0"),
    ("optim: {lr: 1e999}", "F:6: optim.lr: found 1e999, expected a number below"),
    ("optim: {lr: [1, 2]}", "F:6: optim.lr: found [1, 2], expected a number > 0"),
    ("optim: {lr: 1, lr: 2}", "F:6: optim.lr: given twice, on line 6"),
    ("optim: {lr: None}", "F:6: optim.lr: found None, expected null for nothing"),
    ("optim: {clip_norm: 0}", "F:6: optim.clip_norm: found 0, expected a number > 0 or null"),
    (
        "optim: {no_decay: [nrom]}",
        "optim.no_decay.0: found 'nrom', expected one of 'norm', 'bias', 'embedding'; did you",
    ),
    ("optim: {freeze: a.*}", "F:6: optim.freeze: found 'a.*', expected a list, each item text"),
    ("optim: {groups: [{parms: a}]}", "F:6: optim.groups.0.parms: unknown key 'parms'; did you mean 'params'?"),
    ("optim: {groups: [{lr_scale: 2}]}", "F:6: optim.groups.0.params: is missing, expected text (A shell pattern"),
    ("optim: {groups: [{params: a}, {params: a}]}", "optim.groups.1: is the same as optim.groups.0"),
    ("optim: ''", "F:6: optim.name: found '', expected text"),
    (
        "optim: my.py",
        "F:6: optim.name: found 'my.py', expected a name, 'package.module:name' or 'path/to/file.py:name'",
    ),
    ("optim: 'a:b:c'", "F:6: optim.name: found 'a:b:c', expected a name"),
    ("optim: {0: a}", "F:6: optim.0: found the key 0, expected text; put it in quotes"),
    ("optim: {true: a}", "F:6: optim.true: found the key true, expected text"),
    ("optim: {[a]: b}", "F:6: optim.?: found a list or mapping as a key, expected text"),
    ("optim: !!python/object:os.system {}", "F:6: optim: found the tag tag:yaml.org,2002:python/object:os.system"),
    ("optim: !own x", "F:6: optim: found the tag !own; remove it"),
    ("optim: {name: &x adamw}", "F:6: optim.name: found the anchor &x; remove it"),
    ("optim: {name: *x}", "F:6: optim.name: found the alias *x, expected the value itself; text beginning with *"),
    ("optim: {lr: 1", "F:7: is not YAML"),
    ("optim:\n\tlr: 1", "F:7: is not YAML: found character '\\t' that cannot start any token; there is a tab; indent"),
    ("optim: lr: 1", "F:6: is not YAML: mapping values are not allowed here; there is an extra ': '"),
    ("batch: {global: 0}", "F:8: batch.global: found 0, expected a whole number ≥ 1"),
    ("batch: {global: 2.5}", "F:8: batch.global: found 2.5, expected a whole number ≥ 1"),
    ("batch: {global: true}", "F:8: batch.global: found true, expected a whole number ≥ 1"),
    ("batch: {global: 010}", "found '010', expected a whole number ≥ 1; remove the leading zero"),
    ("batch: {global: 1:30}", "F:8: batch.global: found '1:30', expected a whole number ≥ 1"),
    ("batch: {global: 3e9}", "batch.global: found 3000000000, expected a whole number ≥ 1 and ≤ 2147483648"),
    ("batch: {global: 99999999999999999999}", "expected a whole number below 2^63"),
    ("batch: {globl: 8}", "F:8: batch.globl: unknown key 'globl'; did you mean 'global'?"),
    (
        "batch: {global_batch_size: 8}",
        "batch.global_batch_size: unknown key 'global_batch_size'; did you mean 'global'?",
    ),
    ("batch: {}", "F:8: batch.global: is missing, expected a whole number ≥ 1 (Samples in one optimizer step"),
    ("batch: {global: 8, micro: 16}", "F:8: batch.micro: found 16, expected at most batch.global = 8"),
    (
        "batch: {global: 100, micro: 24}",
        "global: found 100, expected a multiple of batch.micro = 24 times the processes; one process can have 96 or",
    ),
    ("batch: {global: 8, micro: atuo}", "found 'atuo', expected a whole number ≥ 1 or 'auto'; did you mean 'auto'?"),
    ("batch: 8", "F:8: batch: found 8, expected a mapping of global, micro"),
    ("train: {}", "F:9: train: found none of epochs, steps and tokens, expected one"),
    (
        "train: {steps: 3, tokens: 4}",
        "F:9: train: found steps and tokens, expected one of them; set the others to null",
    ),
    ("train: {epochs: 2e9}", "F:9: train.epochs: found 2000000000.0, expected a number > 0 and ≤ 1000000000 or null"),
    (
        "train: {steps: 1e13}",
        "train.steps: found 10000000000000, expected a whole number ≥ 1 and ≤ 1000000000000 or null",
    ),
    (
        "train: {epochs: 1, precision: f16}",
        "found 'f16', expected one of 'auto', 'fp32', 'tf32', 'bf16', 'fp16', 'fp8', 'fp64'; did you",
    ),
    ("train: {epochs: 1, compile: yes}", "F:9: train.compile: found 'yes', expected true or false or 'auto'"),
    ("train: {epochs: 1, compile: 'true'}", "found 'true', expected true or false or 'auto'"),
    ("train: {epochs: 1, compile: {mode: fast}}", "F:9: train.compile.mode: found 'fast', expected one of 'default'"),
    (
        "train: {epochs: 1, compile: {fulgraph: true}}",
        "train.compile.fulgraph: unknown key 'fulgraph'; did you mean 'full",
    ),
    ("train: {epochs: 1, compile: [1]}", "F:9: train.compile: found [1], expected true or false or 'auto'"),
    ("train: {epochs: 1, lr: 3}", "F:9: train.lr: unknown key 'lr'; did you mean optim.lr?"),
    ("train: {epochs: 1, ema: 1}", "F:9: train.ema: found 1, expected a number > 0 and < 1 or null"),
    ("schedule: cosin", "F:7: schedule.name: found 'cosin', expected one of 'constant'"),
    ("schedule: {name: cosine, gamma: 0.5}", "F:7: schedule.gamma: does nothing in schedule 'cosine', only in step"),
    (
        "schedule: {name: constant, final: 0}",
        "F:7: schedule.final: does nothing in schedule 'constant', only in cosine and linear",
    ),
    ("schedule: {name: step, final: 0}", "F:7: schedule.final: does nothing in schedule 'step'"),
    ("schedule: {name: cosine, decay: 5%}", "F:7: schedule.decay: does nothing in schedule 'cosine'"),
    (
        "schedule: {warmup: 100%}",
        "F:7: schedule.warmup: found '100%', expected less than the length of training, '100%'",
    ),
    ("schedule: {warmup: 10 epochs}", "schedule.warmup: found '10 epochs', expected less than the length of training"),
    (
        "schedule: {name: warmup_stable_decay, warmup: 60%, decay: 50%}",
        "schedule.warmup: found '60%' + '50%', expected",
    ),
    ("schedule: {warmup: 10 min}", "F:7: schedule.warmup: found '10 minutes', but only checkpoint.every and"),
    ("schedule: {warmup: null}", "F:7: schedule.warmup: found None, expected a number and a unit"),
    ("eval: {every: 20 min}", "F:10: eval.every: found '20 minutes', but only checkpoint.every"),
    ("eval: {every: 200}", "F:10: eval.every: found 200, expected a number and a unit, as in '200 steps'"),
    ("eval: {every: 2 epoks}", "eval.every: found '2 epoks', expected a number and a unit"),
    ("eval: {every: 0 steps}", "F:10: eval.every: found '0 steps', expected more than zero"),
    ("eval: {every: 101%}", "F:10: eval.every: found '101%', expected at most 100%"),
    ("eval: {every: null, early_stop: {patience: 3}}", "F:10: eval.early_stop: can never act, as eval.every is null"),
    (
        "eval: {metrics: accuracy}",
        "F:10: eval.metrics: found 'accuracy', expected a list, each item a name or a mapping",
    ),
    ("eval: {metrics: [accuracy, accuracy]}", "F:10: eval.metrics.1: is the same as eval.metrics.0"),
    ("data: {name: d, split: 0.8}", "F:3: data.split: found 0.8, expected fractions as [0.8, 0.2], {fold: 1, of: 5}"),
    ("data: {name: d, split: [0.8, 0.3]}", "F:3: data.split: found [0.8, 0.3], which sums to 1.1, expected fractions"),
    ("data: {name: d, split: [1.0]}", "F:3: data.split: found 1 fractions, expected [train, test] or [train, valid"),
    ("data: {name: d, split: [0.8, a]}", "F:3: data.split.1: found 'a', expected a number > 0"),
    (
        "data: {name: d, split: {fold: 6, of: 5}}",
        "F:3: data.split.fold: found 6, expected a fold from 1 to data.split.of",
    ),
    ("data: {name: d, split: {fold: 1}}", "F:3: data.split.of: is missing, expected a whole number ≥ 2"),
    ("data: {name: d, split: {trian: a}}", "F:3: data.split.trian: unknown key 'trian'; did you mean 'train'?"),
    ("data: {name: d, split: {test: a}}", "F:3: data.split: found test, expected at least 'train'"),
    ("data: {name: d, stratify: true}", "F:3: data.stratify: found true, but data.split has no fractions or folds"),
    ("data: {name: d, workers: 257}", "F:3: data.workers: found 257, expected a whole number ≥ 0 and ≤ 256"),
    ("data: {name: d, prepare: get.py}", "F:3: data.prepare: found 'get.py', expected 'path/to/file.py:name'"),
    ("data: {name: d, prepare: get.py:f}", "F:3: data.prepare: is called with data.path, which is not given"),
    ("data: {name: d, transforms: {train: [{size: 3}]}}", "F:3: data.transforms.train.0.name: is missing"),
    ("data: null", "F:3: data: found null, expected a name or a mapping of name, path, split"),
    ("model: {name: m, weights_strict: false}", "F:4: model.weights_strict: does nothing without model.weights"),
    ("name: a b", "F:1: name: found 'a b', expected at most 100 letters, digits"),
    ("task: clasification", "F:2: task: found 'clasification', expected one of"),
    ("log: {wandb: of}", "F:12: log.wandb: found 'of', expected one of 'off', 'offline', 'online'; did you mean 'off'"),
    ("log: {wandb: false}", "F:12: log.wandb: found false, expected one of 'off', 'offline', 'online'"),
    ("seed: -1", "F:13: seed: found -1, expected a whole number ≥ 0"),
    ("sede: 1", "F:14: sede: unknown key 'sede'; did you mean 'seed'"),
    ("seed2:\n  a: 1", "F:14: seed2: unknown key 'seed2'; did you mean 'seed'?"),
    ("optim.lr: 3", "F:14: optim.lr: unknown key 'optim.lr'; dotted keys are for the command line"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
@pytest.mark.fault(28)
def test_what_is_wrong_is_reported_with_its_place(write, line, message):
    key = re.match("[a-z0-9_.]+", line)[0]
    changed, count = re.subn(rf"^{re.escape(key)}:.*$", lambda _: line, GOOD, flags=re.MULTILINE)
    found = problems(write(changed if count else GOOD + line + "\n"))
    assert any(message in problem for problem in found), found
    assert len(found) == 1, found
    assert not any(jargon in found[0] for jargon in ("Input should", "pydantic", "http", "Value error", "function-"))


BAD_OVERRIDES = [
    ("optim.lr=", "command line: optim.lr: found no value after '='; write optim.lr=null for nothing"),
    ("optim.lr=  ", "found no value after '='"),
    ("data.delimiter=|", "'|' is nothing in YAML; write data.delimiter=null for nothing, or text in quotes"),
    ("optim.lr=# 3", "'# 3' is nothing in YAML"),
    ("optim.lr", "command line: found 'optim.lr', expected dotted.key=value, as in optim.lr=3e-4"),
    ("=3", "command line: found '=3', expected dotted.key=value"),
    (".lr=3", "expected dotted.key=value"),
    ("optim..lr=3", "expected dotted.key=value"),
    ("optim.lr =3", "expected dotted.key=value"),
    ("model.layers[x].p=3", "expected dotted.key=value"),
    ("optim.lr=-1", "command line: optim.lr: found -1, expected a number > 0"),
    ("batch.glob=3", "command line: batch.glob: unknown key 'glob'; did you mean 'global'?"),
    ("batch.global.x=3", "command line: batch.global.x: batch.global is 256, so it has no 'x'"),
    ("name.x=3", "command line: name.x: name is 'digits-resnet', so it has no 'x'"),
    ("eval.metrics.2=recall", "eval.metrics is a list of indices 0 to 1, so it has no '2'"),
    ("eval.metrics.top=recall", "eval.metrics is a list of indices 0 to 1, so it has no 'top'"),
    ("eval.metrics.0.top_k.0.0=3", "eval.metrics.0.top_k"),
    ("optim.freeze=[*.bias]", "text beginning with * or & needs quotes"),
    ("optim.freeze=*bias", "command line: optim.freeze: found the alias *bias"),
    ("optim={lr: 1, lr: 2}", "command line: optim.lr: given twice, on line 1"),
    ("optim.lr=.inf", "command line: optim.lr: found .inf, expected a finite number"),
    ("optim.lr=[1", "command line: optim.lr: '[1' is not YAML"),
    ("optim.lr=\x00", "holds a control character"),
    ("train.steps=10", "train: found epochs and steps, expected one of them; set the others to null"),
    ("schedule.name=constant", "command line: schedule.final"),
    ("a.b.c=1", "command line: a: unknown key 'a'"),
    ("checkpoint.asynchronous=false", "unknown key 'asynchronous'; did you mean 'async'?"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[text for text, _ in BAD_OVERRIDES])
def test_a_bad_override_reports_what_to_write(write, override, message):
    overrides = (override,)
    if override == "schedule.name=constant":
        overrides = (override, "schedule.final=0.1")
    if override.startswith("eval.metrics.0.top_k"):
        overrides = ("eval.metrics.0.top_k=5", override)
    found = problems(write(), *overrides)
    assert any(message in problem for problem in found), found
    assert len(found) == 1, found


def test_all_problems_come_at_once_in_the_files_order(write):
    text = """\
name: a b
task: classifcation
data: {name: d, split: [0.5, 0.6], worker: 3}
model: {name: m, weights_strict: false}
optim: {lr: -1, groups: [{params: a}, {params: a}]}
schedule: {name: cosine, gamma: 0.5, warmup: 1 hour}
batch: {global: 100, micro: 24}
train: {epochs: -1, steps: 3}
eval: {every: null, early_stop: {patience: 0}}
log: {every: .nan}
log: {}
"""
    found = problems(write(text), "seed=x", "data.split.0=0.7", "=")
    assert [problem.split(": ")[:2] for problem in found] == [
        ["F:1", "name"],
        ["F:2", "task"],
        ["F:3", "data.split"],
        ["F:4", "model.weights_strict"],
        ["F:5", "optim.lr"],
        ["F:5", "optim.groups.1"],
        ["F:6", "schedule.warmup"],
        ["F:6", "schedule.gamma"],
        ["F:7", "batch.global"],
        ["F:8", "train.epochs"],
        ["F:9", "eval.early_stop.patience"],
        ["F:10", "log.every"],
        ["F:10", "log"],
        ["command line", "found '=', expected dotted.key=value, as in optim.lr=3e-4"],
        ["command line", "seed"],
    ]


def test_a_check_does_not_blame_a_value_for_one_that_could_not_be_read(write):
    text = GOOD.replace("name: cosine", "name: cosin, final: 0.5").replace("micro: auto", "micro: 1000x")
    assert [problem.split(":")[2].strip() for problem in problems(write(text))] == ["schedule.name", "batch.micro"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found nothing, expected a mapping of name, task, data"),
        (b"# only a comment\n", "found nothing"),
        (b"- a\n- b\n", "found [a, b], expected a mapping of name"),
        (b"3\n", "found 3, expected a mapping"),
        (b"&a {name: x}", "found the anchor &a"),
        (b"name: a\n---\nname: b\n", "but found another document; a recipe is one document"),
        (b"name: \xff\n", "F:1: is not UTF-8 text"),
        (b"name: a\nseed: \x01\n", "F:2: found a control character (U+0001)"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1 MiB"),
        (b"a: " + b"[" * 100_000, "F:1: is not YAML: nested more than 64 deep"),
        (b"a: 1\n  b: 2\n", "F:2: is not YAML: mapping values are not allowed here"),
    ],
)
@pytest.mark.fault(28)
def test_files_that_are_no_recipe(write, content, message):
    (found,) = problems(write(content))
    assert message in found


@pytest.mark.parametrize("escape", [r"\U00110000", r"\UFFFFFFFF", r"\ud800"])
def test_escapes_of_no_character(write, escape):
    (found,) = problems(write(GOOD.replace("log: {", f'log: {{project: "{escape}", ')))
    assert found.startswith("F:12: ")
    assert "escape" in found


@given(st.data())
@pytest.mark.fault(28)
def test_no_file_and_no_override_breaks_the_reader(tmp_path_factory, data):
    """Whatever the text, it is a recipe or a RecipeError."""
    text = GOOD
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        new = data.draw(st.text("{}[]:,#&*!|>%@-?'\"\\ \n\t\x00.01eaé~", max_size=6) | st.text(max_size=4))
        text = text[:at] + new + text[at + cut :]
    key = data.draw(st.sampled_from(["optim", "optim.lr", "model.layers.0.p", "eval.metrics", "data.split", "x.y"]))
    override = data.draw(st.none() | st.text(max_size=8).map(lambda value: f"{key}={value}") | st.text(max_size=8))
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(file, [] if override is None else [override]).recipe
    except RecipeError as error:
        assert error.problems  # noqa: PT017
    else:
        assert parse_recipe(dump_recipe(recipe), "x") == recipe


@pytest.mark.fault(28)
def test_aliases_cannot_blow_up(write):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=False))
    assert any("found the alias *a" in problem or "found the anchor &b" in problem for problem in problems(write(bomb)))


def test_a_missing_file_names_those_beside_it(write, tmp_path):
    write()
    (found,) = problems(tmp_path / "recip.yaml")
    assert found == "there is no such file; did you mean 'recipe.yaml'?"
    (found,) = problems(tmp_path / "no" / "recipe.yaml")
    assert found == "there is no such file"
    (found,) = problems(tmp_path)
    assert found == "cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e9", 1e9),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+3", 3),
        ("1_000_000", 1_000_000),
        ("1_000.5", 1000.5),
        ("0", 0),
        *[(text, text) for text in ("on", "off", "yes", "no", "Off", "y", "NO", "1:30", "010", "0x10", "0b1", "0o7")],
        *[(text, text) for text in ("2020-01-01", "2020-01-01 10:00:00", "1e", "_1", "1_", "1__0", "nan", "inf", "<<")],
        *[(text, None) for text in ("null", "~", "Null", "NULL", "")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        ("false", False),
        ("'null'", "null"),
        ('"1e-4"', "1e-4"),
        ("|\n  a\n  b\n", "a\nb\n"),
        ("[1, off, {a: 1e-4}]", [1, "off", {"a": 1e-4}]),
        ("a b: c", {"a b": "c"}),
    ],
)
@pytest.mark.fault(28)
def test_scalars_are_what_they_look_like(text, value):
    tree = Tree.parse(text)
    assert tree.value == value
    assert type(tree.value) is type(value)
    assert not tree.problems


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable, max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@given(_json)
def test_any_value_written_reads_back_as_itself(value):
    for flow in (False, True):
        tree = Tree.parse(to_yaml(value, flow=flow))
        assert not tree.problems
        assert tree.value == value
        assert repr(tree.value) == repr(value)


@given(_json)
def test_what_is_written_means_the_same_to_other_readers(value):
    text = to_yaml({"k": value})
    assert repr(yaml.safe_load(text)) == repr({"k": value})


# --------------------------------------------------------------------------------------------------------------------
# Readings


def test_a_good_recipe(write):
    recipe = load_recipe(write()).recipe
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.clip_norm == 1.0
    assert isinstance(recipe.optim.clip_norm, float)
    assert recipe.log.wandb == "off"
    assert recipe.batch.global_batch_size == 256
    assert recipe.schedule.warmup == Duration(5, "%")
    assert recipe.data.split == [0.8, 0.2]
    assert recipe.train.length == Duration(10, "epochs")
    assert recipe.loss is not None
    assert recipe.loss.name == "cross_entropy"
    assert recipe.model.args == {"layers": [{"p": 0.5}, {"p": 0.2}]}
    assert [metric.name for metric in recipe.eval.metrics or []] == ["accuracy", "f1_macro"]


def test_overrides(write):
    recipe = load_recipe(
        write(),
        [
            "optim.lr=3e-4",
            "data.split=[0.7,0.3]",
            "model.layers.1.p=0.1",
            "model.layers[0].p=0.9",
            "model.width=64",
            "eval.metrics=[recall,{name: f1, average: macro}]",
            "eval.early_stop.patience=3",
            "loss.label_smoothing=0.1",
            "batch.global=1e3",
            "checkpoint.async=false",
            "optim.clip_norm=null",
            "schedule=constant",
            "optim.groups=[{params: '*.bias', lr_scale: 2}]",
            "train.epochs=null",
            "train.steps=1_000",
            "log.project=a=b",
            "seed=1",
            "seed=2",
        ],
    ).recipe
    assert recipe.optim.lr == 3e-4
    assert recipe.optim.weight_decay == 0.05
    assert recipe.data.split == [0.7, 0.3]
    assert recipe.model.args == {"layers": [{"p": 0.9}, {"p": 0.1}], "width": 64}
    assert recipe.eval.metrics is not None
    assert [(metric.name, metric.args) for metric in recipe.eval.metrics] == [
        ("recall", {}),
        ("f1", {"average": "macro"}),
    ]
    assert recipe.eval.early_stop is not None
    assert recipe.eval.early_stop.patience == 3
    assert recipe.loss is not None
    assert (recipe.loss.name, recipe.loss.args) == ("cross_entropy", {"label_smoothing": 0.1})
    assert recipe.batch.global_batch_size == 1000
    assert recipe.checkpoint.asynchronous is False
    assert recipe.optim.clip_norm is None
    assert recipe.schedule.name == "constant"
    assert recipe.schedule.warmup == Duration(0, "steps")
    assert recipe.optim.groups[0].params == "*.bias"
    assert recipe.train.length == Duration(1000, "steps")
    assert recipe.log.project == "a=b"
    assert recipe.seed == 2


def test_where_each_value_came_from(write):
    file = write()
    loaded = load_recipe(
        file, ["optim.lr=1", "data.split.0=0.7", "data.split.1=0.3", "model.layers.0.p=0", "eval.batch=4"]
    )
    expected = {
        "name": f"{file}:1",
        "loss": f"{file}:5",
        "data.split": "command line",
        "data.workers": "default",
        "model.name": f"{file}:4",
        "model.layers.0.p": "command line",
        "model.layers.1.p": f"{file}:4",
        "optim.lr": "command line",
        "optim.clip_norm": f"{file}:6",
        "schedule.final": "default",
        "batch.global": f"{file}:8",
        "eval.metrics": f"{file}:10",
        "eval.batch": "command line",
        "checkpoint.async": f"{file}:11",
        "eval.early_stop": "default",
    }
    assert {key: loaded.origins[key] for key in expected} == expected
    assert "schedule.gamma" not in loaded.origins
    assert loaded.folder == file.parent


def test_a_bare_name_came_from_its_line(write):
    file = write(GOOD.replace("schedule: {name: cosine, warmup: 5%}", "schedule:\n  cosine"))
    assert load_recipe(file).origins["schedule.name"] == f"{file}:7"


def test_show_lists_every_key_as_an_override_would_write_it(write):
    file = write()
    loaded = load_recipe(file, ["optim.lr=3e-4"])
    rows = show(loaded)
    assert ("optim.lr", "0.0003", "command line") in rows
    assert ("log.wandb", "'off'", f"{file}:12") in rows
    assert ("checkpoint.every", "200 steps", f"{file}:11") in rows
    assert [key for key, _, _ in rows] == list(loaded.origins)
    again = load_recipe(file, [f"{key}={value}" for key, value, _ in rows])
    assert again.recipe == loaded.recipe


LIBRARY = re.compile(r"\b(should|valid [a-z]+|validation|tuple|type=|pydantic|unable to)\b", re.IGNORECASE)
"""Words of the library that checks."""


def test_no_words_of_the_library_reach_a_person(write):
    file, told = write(), []
    leaves = [key for key, _, _ in show(load_recipe(file))]
    for value in ("true", "-1", "1.5", "1e30", "''", "x", "[]", "[[3]]", "{x: 1}", "{fold: x}", "[{x: 1}]"):
        for places in (
            leaves,
            [*Recipe.model_fields],
            ["optim.groups", "eval.early_stop", "data.split", "data.prepare"],
        ):
            try:
                load_recipe(file, [f"{key}={value}" for key in places])
            except RecipeError as error:
                told += str(error).splitlines()[1:]
    assert len(told) > 300
    assert [line for line in told if LIBRARY.search(line)] == []


# --------------------------------------------------------------------------------------------------------------------
# Paths


def test_relative_paths_are_of_the_recipes_folder_and_of_the_command_lines(write, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/someone")
    text = """\
name: x
task: classification
data:
  name: table
  path: data/a.csv
  split: {train: a, test: ~/b}
  prepare: get.py:fetch
  transforms: {train: [t.py:Flip, {name: t.py:Crop, size: 3}, resize]}
model: {name: torchvision.models:resnet18, weights: /abs/w.safetensors}
loss: losses.py:focal
optim: {name: o.py:Lion}
schedule: {name: ../s.py:half, warmup: 0 steps}
eval: {metrics: [m.py:score]}
batch: {global: 8}
train: {steps: 1}
"""
    recipe = load_recipe(write(text), ["optim.name=o.py:Lion", "data.split.test=c", "eval.metrics.0=m.py:other"]).recipe
    here = str(tmp_path)
    assert recipe.data.path == f"{here}/data/a.csv"
    assert recipe.data.split == {"train": f"{here}/a", "test": f"{elsewhere}/c"}
    assert load_recipe(write(text)).recipe.data.split == {"train": f"{here}/a", "test": "/home/someone/b"}
    assert recipe.data.prepare == f"{here}/get.py:fetch"
    transforms = [item.name for item in recipe.data.transforms.train]
    assert transforms == [f"{here}/t.py:Flip", f"{here}/t.py:Crop", "resize"]
    assert recipe.model.name == "torchvision.models:resnet18"
    assert recipe.model.weights == "/abs/w.safetensors"
    assert recipe.loss is not None
    assert recipe.loss.name == f"{here}/losses.py:focal"
    assert recipe.optim.name == f"{elsewhere}/o.py:Lion"
    assert recipe.schedule.name == f"{tmp_path.parent}/s.py:half"
    assert recipe.eval.metrics is not None
    assert recipe.eval.metrics[0].name == f"{elsewhere}/m.py:other"


@pytest.mark.parametrize("own", ["data.py:Parts", "package.module:Parts"])
def test_the_users_own_code_is_given_its_arguments_as_they_are_written(write, tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path.parent)
    text = f"""\
name: x
task: classification
data: {{name: "{own}", path: here, split: {{train: train, test: ./test}}, root: ./a, more: {{b: [../c, d]}}}}
model: {{name: "{own}", weights: w.pt, act: ./relu}}
schedule: {{name: "{own}", final: ./x, every: 3, gamma: [1]}}
batch: {{global: 8}}
train: {{steps: 1}}
"""
    file = write(text)
    for recipe in (
        load_recipe(file).recipe,
        load_recipe(file, ["data.split={train: train, test: ./test}", "data.root=./a"]).recipe,
        parse_recipe(dump_recipe(load_recipe(file).recipe), "stored"),
    ):
        assert recipe.data.split == {"train": "train", "test": "./test"}
        assert recipe.data.args == {"root": "./a", "more": {"b": ["../c", "d"]}}
        assert recipe.model.args == {"act": "./relu"}
        assert recipe.schedule.args == {"final": "./x", "every": 3, "gamma": [1]}
        assert recipe.data.path == str(tmp_path / "here"), "what is declared to be a path"
        assert recipe.model.weights == str(tmp_path / "w.pt")


# --------------------------------------------------------------------------------------------------------------------
# Round trips

_names = st.from_regex(r"[A-Za-z][a-z_0-9]{0,8}", fullmatch=True)
_paths = st.from_regex(r"/[a-z #':é]{1,6}[a-z]", fullmatch=True)
_floats = st.floats(1e-12, 1e6)
_durations = st.builds(
    lambda amount, unit: str(Duration(float(amount), unit)),
    st.integers(1, 10**15),
    st.sampled_from(["steps", "samples", "tokens"]),
) | st.builds(lambda amount, unit: str(Duration(amount, unit)), st.floats(1e-6, 49), st.sampled_from(["epochs", "%"]))
_times = st.sampled_from(["20 min", "0.1 h", "1 second"])
_patterns = st.text("*.a[]?!&-: #", min_size=1)
_args = st.dictionaries(_names.map(lambda name: f"arg_{name}"), _json, max_size=3)
_component = _names | st.builds(lambda name, args: {**args, "name": name}, _names, _args)
_schedules = st.one_of(
    st.fixed_dictionaries({"name": st.just("constant")}, optional={"warmup": st.just("3%")}),
    st.fixed_dictionaries({"name": st.just("step")}, optional={"every": _durations, "gamma": st.floats(0.1, 1)}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["cosine", "linear", "one_cycle"])}, optional={"final": st.floats(0, 1)}
    ),
    st.fixed_dictionaries({"name": st.just("warmup_stable_decay")}, optional={"decay": st.just("20%")}),
)
_recipes = st.fixed_dictionaries(
    {
        "name": _names,
        "task": st.sampled_from(["classification", "regression", "language_modeling"]),
        "data": st.builds(
            lambda name, args, more: {**args, **more, "name": name},
            _names,
            _args,
            st.fixed_dictionaries(
                {},
                optional={
                    "path": _paths,
                    "split": st.just([0.1, 0.2, 0.7])
                    | st.just({"fold": 1, "of": 3})
                    | st.fixed_dictionaries({"train": _paths}, optional={"test": _paths}),
                    "transforms": st.fixed_dictionaries({"train": st.lists(_component, max_size=2)}),
                    "workers": st.integers(0, 256),
                },
            ),
        ),
        "model": _component,
        "batch": st.integers(1, 64).map(lambda micro: {"global": 4 * micro, "micro": micro}),
        "train": st.one_of(
            st.fixed_dictionaries({"epochs": _floats.map(lambda x: x + 50)}, optional={"ema": st.floats(0.01, 0.99)}),
            st.fixed_dictionaries({"steps": st.integers(1, 10**12)}, optional={"compile": st.booleans()}),
        ),
    },
    optional={
        "loss": st.none() | _component,
        "optim": st.fixed_dictionaries({"lr": _floats}, optional={"freeze": st.lists(_patterns)}),
        "schedule": _schedules,
        "eval": st.fixed_dictionaries(
            {}, optional={"every": st.none() | _durations, "metrics": st.lists(_component, max_size=2, unique_by=str)}
        ),
        "checkpoint": st.fixed_dictionaries({}, optional={"every": _times | _durations, "async": st.booleans()}),
        "seed": st.integers(0, 2**63 - 1),
    },
)  # fmt: skip


@settings(max_examples=50)
@given(_recipes)
def test_a_dumped_recipe_is_the_same_recipe(tmp_path_factory, values):
    recipe = Recipe.model_validate(values)
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    loaded = load_recipe(file)
    assert loaded.recipe == recipe
    assert dump_recipe(loaded.recipe) == dump_recipe(recipe)
    file.write_text(dump_recipe(recipe, loaded.origins), encoding="utf-8")
    assert load_recipe(file).recipe == recipe
    assert parse_recipe(dump_recipe(recipe), "a checkpoint") == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_stored_recipe_that_is_wrong_names_its_source():
    with pytest.raises(RecipeError) as caught:
        parse_recipe("name: a\nseed: -1\n", "the recipe in step-00000010")
    assert "the recipe in step-00000010:2: seed: found -1, expected a whole number ≥ 0" in caught.value.problems
    assert "the recipe in step-00000010: batch: is missing, expected a mapping" in str(caught.value)
    with pytest.raises(RecipeError, match="found nothing"):
        parse_recipe("", "the recipe in step-00000010")


def test_the_dump_is_in_the_sections_order_with_what_a_user_would_write(write):
    loaded = load_recipe(write(), ["checkpoint.every=20 min"])
    text = dump_recipe(loaded.recipe, loaded.origins)
    keys = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert keys == [key for key in Recipe.model_fields if key != "callbacks"], "left away where there are none"
    assert "  split: [0.8, 0.2]  # " in text
    assert "  global: 256  # " in text
    assert "  every: 20 minutes  # command line\n" in text
    assert "  stratify: false  # default\n" in text
    assert "loss: cross_entropy" in text
    assert "gamma" not in text


# --------------------------------------------------------------------------------------------------------------------
# The schema


def _resolve(schema, node):
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _fits(schema, node, value) -> bool:
    """As much of JSON Schema as a recipe's uses."""
    node = _resolve(schema, node)
    for variants in ("anyOf", "oneOf"):
        if variants in node:
            return any(_fits(schema, variant, value) for variant in node[variants])
    if "const" in node:
        return value == node["const"]
    if "enum" in node and value not in node["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if not isinstance(value, kinds[node["type"]]) or (isinstance(value, bool) and node["type"] != "boolean"):
        return False
    if isinstance(value, str):
        return re.search(node.get("pattern", ""), value) is not None
    if isinstance(value, list):
        return all(_fits(schema, node["items"], item) for item in value)
    if isinstance(value, dict):
        if not set(node.get("required", [])) <= value.keys():
            return False
        extra = node.get("additionalProperties", True)
        named = {
            key: inner
            for pattern, inner in node.get("patternProperties", {}).items()
            for key in value
            if re.search(pattern, key)
        } | node.get("properties", {})
        return all(
            _fits(schema, named[key], item)
            if key in named
            else extra is True or (isinstance(extra, dict) and _fits(schema, extra, item))
            for key, item in value.items()
        )
    return value is None or (
        node.get("minimum", value) <= value <= node.get("maximum", value) and value > node.get("exclusiveMinimum", -1)
    )


def test_the_schema_takes_what_is_good_and_says_a_sentence_about_every_key(write):
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    good = Tree.parse(GOOD).value
    assert _fits(schema, schema, good)
    assert _fits(schema, schema, load_recipe(write()).recipe.model_dump(mode="json"))
    assert _fits(schema, schema, {**good, "optim": {"g": {"params": ["g.*"], "every": 2}, "d": {"params": "d.*"}}})
    for change in (
        {"batch": {}},
        {"optim": {"lr": 0}},
        {"optim": {"a b": {"params": "*"}, "lr": 0}},
        {"eval": {"every": "3"}},
        {"seed": 0.5},
        {"bath": 3},
        {"model": 3},
    ):
        assert not _fits(schema, schema, {**good, **change})
    for section in [schema, *schema["$defs"].values()]:
        for key, node in section["properties"].items():
            assert node.get("description") or _resolve(schema, node)["description"], key
    assert schema["$defs"]["ScheduleSection"]["properties"]["decay"]["default"] == "10%"


def test_every_component_is_known_to_the_reader():
    """A bare name stands for a mapping exactly where the document says so."""
    schema = json_schema()
    found = set()

    def walk(node, place):
        variants = [_resolve(schema, item) for item in node.get("anyOf", [node])]
        if any(variant.get("title") == "a name" for variant in variants):
            found.add(place)
        for variant in variants:
            if variant.get("type") == "array":
                walk(variant["items"], (*place, 0))
            for key, inner in variant.get("properties", {}).items():
                walk(inner, (*place, key))

    walk(schema, ())
    assert found == _COMPONENTS | {(*place, 0) for place in _COMPONENT_LISTS}


def test_importing_the_recipe_imports_nothing_heavy():
    heavy = ("torch", "pandas", "numpy", "accelerate", "rich", "typer")
    code = f"import sys, distrain.config.yaml; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_argument_that_begins_like_a_path_is_resolved_against_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    file = tmp_path / "recipes" / "text.yaml"
    file.write_text(
        "name: a\ntask: language_modeling\n"
        "data: {name: text, path: corpus.txt, tokenizer: ./tok.json, labels: [../a.csv, plain]}\n"
        "model: gpt\nbatch: {global: 4}\ntrain: {steps: 2}\n"
    )
    args = load_recipe(file).recipe.data.args
    assert args == {
        "tokenizer": str(tmp_path / "recipes" / "tok.json"),
        "labels": [str(tmp_path / "a.csv"), "plain"],
    }


# --------------------------------------------------------------------------------------------------------------------
# Keys that had other names

RENAMED = [("data", "skip_corrupt", "skip_undecodable"), ("anomalies", "max_skips", "most")]


def with_keys(section: str, keys: str) -> str:
    """Return a recipe with further keys, as `a: 1, b: 2`, in `data` or `anomalies`."""
    text = f"{GOOD}anomalies: {{nonfinite: skip}}\n"
    return re.sub(rf"^{section}: {{", f"{section}: {{{keys}, ", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("section", "name", "earlier"), RENAMED)
def test_a_key_is_read_by_its_earlier_name(write, section: str, name: str, earlier: str) -> None:
    file = write(with_keys(section, f"{earlier}: 3"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if earlier in text)
    for overrides, value, origin in (
        ([], "3", f"{file}:{line}"),
        ([f"{section}.{earlier}=4"], "4", "command line"),
        ([f"{section}.{name}=5"], "5", "command line"),
        ([f"{section}.{name}=5", f"{section}.{earlier}=6"], "6", "command line"),
    ):
        loaded = load_recipe(file, overrides)
        assert (f"{section}.{name}", value, origin) in show(loaded)
        assert earlier not in dump_recipe(loaded.recipe)
    assert problems(write(with_keys(section, f"{earlier}: 3, {name}: 3"))) == [
        f"F:{line}: {section}.{earlier}: is the earlier name of '{name}', which is there as well; remove it"
    ]
    (said,) = problems(write(with_keys(section, f"{earlier}: x")))
    assert said.startswith(f"F:{line}: {section}.{name}: found 'x', expected a whole number")
