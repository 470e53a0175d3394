"""The command line: what it prints, its exit statuses, and that no mistake of a user ends in a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from runs import TINY, checkpoint, cli, train, write_recipe
from typer.testing import CliRunner
from worlds import in_world

from distrain import __version__
from distrain.cli.main import Kind, app, application
from distrain.config import registry
from distrain.config.yaml import load_recipe
from distrain.networks.builders import torchvision_names
from distrain.networks.timm_models import timm_names

COMMANDS = [
    ["train"], ["evaluate"], ["predict"], ["show"], ["schema"], ["list"], ["init"], ["submit"],
    ["status"], ["watch"], ["logs"], ["stop"], ["cancel"], ["sites"], ["ui"], ["plan"], ["doctor"], ["generate"],
    ["prove"], ["sweep"], ["report"], ["compare"], ["export"], ["data"], ["data", "tokenize"], ["checkpoint"],
    *(["checkpoint", name] for name in ("ls", "verify", "diff", "export", "import")),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three checkpoints."""
    folder = tmp_path_factory.mktemp("cli")
    train(1, write_recipe(folder), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    assert len(shown.output.splitlines()) > 5
    usage = re.split(r"\n\s*\n", shown.output.partition("Usage:")[2])[0]
    assert not re.search(r"\[\[|\{[a-z]|\.\.\.\S", usage), "arguments are in capitals, and in brackets once"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train x --strategy ddp2", "found 'ddp2', expected one of 'auto', 'single', 'ddp', 'zero1', 'zero2', 'zero3', "
         "'fsdp2'; did you mean 'ddp' or 'fsdp2'?"),
        ("train x --offload gpu", "found 'gpu', expected one of 'none', 'optimizer', 'all'"),
        ("list modles", "did you mean 'models'?"),
        ("predict x --out y.csv --output logit", "did you mean 'logits'?"),
        ("data tokenize x -o y --documents lines", "expected one of 'file', 'line'; did you mean 'line'"),
        ("train x --processes two", "found 'two', expected a whole number"),
        ("train x --processes 0", "found '0', expected a number ≥ 1"),
        ("ui --port 70000", "found '70000', expected a number ≤ 65535"),
        ("generate x --temperature hot", "found 'hot', expected a number"),
        ("checkpoint import a b --step x", "found 'x', expected a whole number"),
    ],
)  # fmt: skip
def test_a_refused_value_is_named_with_what_was_expected(typed: str, said: str) -> None:
    shown = CliRunner().invoke(app, typed.split())
    assert shown.exit_code == 2
    assert said in " ".join(re.sub(r"[^\x20-\x7e≥≤]", " ", shown.output).split())


def test_the_page_of_commands_lists_those_that_print_json() -> None:
    able = {" ".join(each) for each in COMMANDS if "--json" in CliRunner().invoke(app, [*each, "--help"]).output}
    page = Path(__file__).parents[2].joinpath("docs/commands.md").read_text()
    sentence = page.partition("`--json` prints one JSON value")[2].partition("`schema`")[0]
    assert set(re.findall(r"`([a-z]+(?: [a-z]+)?)`", sentence)) == able


@pytest.mark.parametrize("name", sorted({command[0] for command in COMMANDS}))
def test_only_the_command_that_is_called_is_built(name: str) -> None:
    assert set(typer.main.get_group(application(name)).commands) == {name}


@pytest.mark.parametrize("name", ["", "--help", "trian", "ls"])
def test_without_a_command_of_that_name_all_are_there(name: str) -> None:
    assert application(name) is app


def test_help_names_every_command() -> None:
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    named = {(command.name or command.callback.__name__,) for command in app.registered_commands if command.callback}
    for name, group in groups.items():
        named |= {(name,)} | {(name, command.name or "") for command in group.registered_commands}
    assert {tuple(command) for command in COMMANDS} == named
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(command[0] in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "none.yaml"], "none.yaml"),
        (["train", "/"], "is not a run"),
        (["show", "none.yaml"], "none.yaml"),
        (["evaluate", "/tmp"], "/tmp is not a run folder: it has no checkpoints/"),
        (["predict", "/tmp", "test", "-o", "x.csv"], "/tmp is not a run folder"),
        (["checkpoint", "ls", "/tmp"], "/tmp is not a run folder"),
        (["checkpoint", "verify", "/tmp"], "/tmp is not a run folder"),
        (["checkpoint", "diff", "/tmp", "/tmp"], "/tmp"),
        (["export", "/usr", "-o", "x.safetensors"], "/usr is not a checkpoint in a known format"),
        (["init", "/tmp"], "is not an empty folder"),
        (["data", "tokenize", "none.txt", "-o", "shards"], "none.txt"),
    ],
)
def test_what_a_user_did_is_reported_without_a_traceback(arguments: list[str], said: str) -> None:
    ended = cli(*arguments)
    assert ended.status == 1
    assert ended.err.startswith("error")
    assert said in ended.err
    assert "Traceback" not in ended.err + ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["train"],
        ["list", "everything"],
        ["train", "x", "--processes", "0"],
        ["train", ""],
        ["train", "x", "--run-dir", ""],
        ["submit", "x", "--run-dir", ""],
    ],
)
def test_a_command_that_does_not_exist_is_a_usage_error(arguments: list[str]) -> None:
    ended = cli(*arguments)
    assert ended.status == 2
    assert "Traceback" not in ended.err


def test_an_unknown_key_gets_the_close_one(tmp_path: Path) -> None:
    ended = cli("show", write_recipe(tmp_path), "optim.learning_rat=1", "btach.global=2")
    assert ended.status == 1
    assert "batch" in ended.err


# --------------------------------------------------------------------------------------------------------------------
# Recipes and names


def test_show_prints_every_value_with_its_origin(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    ended = cli("show", recipe, "optim.lr=0.5")
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    assert lines["optim.lr"].split()[1:] == ["0.5", "command", "line"]
    assert lines["optim.clip_norm"].split()[1] == "0.5"
    assert lines["optim.clip_norm"].endswith("recipe.yaml:6")
    assert lines["seed"].split()[1:] == ["0", "default"]
    as_json = json.loads(cli("show", recipe, "optim.lr=0.5", "--json").out)
    assert {"key": "optim.lr", "value": "0.5", "from": "command line"} in as_json
    assert {row["key"] for row in as_json} == set(lines)


def test_show_gives_overrides_that_make_the_same_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    rows = json.loads(cli("show", recipe, "--json").out)
    bare = write_recipe(tmp_path, "{}", "bare.yaml")
    again = load_recipe(bare, [f"{row['key']}={row['value']}" for row in rows if row["from"] != "default"])
    assert again.recipe == load_recipe(recipe).recipe


def test_the_schema_is_one() -> None:
    schema = json.loads(cli("schema").out)
    assert {"name", "data", "model", "optim", "batch", "train"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("models", ["mlp", "cnn", "gpt"]),
        ("datasets", ["digits", "breast_cancer", "diabetes"]),
        ("optimizers", ["adamw", "sgd"]),
        ("losses", ["cross_entropy", "mse"]),
        ("metrics", ["accuracy", "f1_macro", "bleu"]),
    ],
)
def test_list(kind: str, some: list[str]) -> None:
    ended = cli("list", kind)
    assert ended.status == 0, ended.err
    listed = {line.split()[0]: line for line in ended.out.splitlines()}
    assert set(some) <= set(listed)
    assert all(len(listed[name].split()) > 2 for name in some), "each with a line about it"
    assert kind in {each.value for each in Kind}


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoint_ls(run: Path) -> None:
    lines = cli("checkpoint", "ls", run).out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000012", "step-00000008", "step-00000004"]
    assert "1 x single" in lines[0]
    listed = json.loads(cli("checkpoint", "ls", run, "--json").out)
    assert [row["step"] for row in listed] == [12, 8, 4]
    assert all(row["bytes"] > 1000 and row["score"] < 0 for row in listed)


def test_checkpoint_verify(run: Path, tmp_path: Path) -> None:
    ended = cli("checkpoint", "verify", run)
    assert ended.status == 0
    assert ended.out.count("whole") == 3
    copy = tmp_path / "step-00000004"
    shutil.copytree(checkpoint(run, 4), copy)
    assert cli("checkpoint", "verify", copy).status == 0
    (file,) = copy.glob("rank-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ended = cli("checkpoint", "verify", copy)
    assert ended.status == 1
    assert "damaged" in ended.out
    assert file.name in ended.out
    found = json.loads(cli("checkpoint", "verify", copy, "--json").out)
    assert list(found) == [copy.name]
    assert file.name in found[copy.name][0]


def test_checkpoint_diff(run: Path) -> None:
    same = cli("checkpoint", "diff", checkpoint(run, 4), checkpoint(run, 4))
    assert same.status == 0
    assert "identical, bit for bit" in same.out
    other = cli("checkpoint", "diff", checkpoint(run, 4), checkpoint(run, 8))
    assert other.status == 1
    assert "model/layers.0.weight" in other.out
    assert "step: 4 in the first, 8 in the second" in other.out
    found = json.loads(cli("checkpoint", "diff", checkpoint(run, 4), checkpoint(run, 8), "--json").out)
    assert not found["identical"]
    assert "model/layers.0.weight" in [each["name"] for each in found["tensors"]]


def test_one_command_exports_under_both_of_its_names(run: Path, tmp_path: Path, monkeypatch) -> None:
    found = {
        command.callback
        for group in (app, *(each.typer_instance for each in app.registered_groups))
        for command in group.registered_commands
        if (command.name or command.callback.__name__) == "export"
    }
    assert len(found) == 1
    assert "export" not in CliRunner().invoke(app, ["checkpoint", "--help"]).output.split("Commands")[1]
    monkeypatch.chdir(tmp_path)
    assert cli("export", run).out.startswith("wrote run-safetensors from step-")
    assert cli("checkpoint", "export", checkpoint(run, 4), "--format", "pt").out.startswith(
        "wrote run-step-00000004-pt "
    )
    assert sorted(path.name for path in Path("run-step-00000004-pt").iterdir()) == [
        "README.md", "config.json", "model.pt", "recipe.yaml",
    ]  # fmt: skip
    # what another trainer wrote: --from, or as scripts say it
    file = "run-step-00000004-pt/model.pt"
    for name, words in {"a": ["--from", "torch"], "b": ["--format", "torch"], "c": []}.items():
        assert cli("export", file, "-o", f"{name}.safetensors", *words).status == 0
    assert (
        Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes() == Path("c.safetensors").read_bytes()
    )
    assert cli("export", "a.safetensors", "-o", "a.pt", "--format", "safetensors").status == 0
    wrong = cli("export", file, "--from", "torch", "--format", "deepspeed")
    assert "no format 'deepspeed'; a model is written as safetensors, pt" in wrong.err


def test_export(run: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "model.safetensors"
    ended = cli("export", run, "-o", out, "--ema", "--dtype", "fp32")
    assert ended.status == 0, ended.err
    assert "step-00000012" in ended.out
    tensors = load_file(out)
    assert tensors["layers.0.weight"].shape == (16, 64)
    assert tensors["layers.0.weight"].dtype == "float32"
    refused = cli("export", run, "-o", out)
    assert refused.status == 1
    assert "exists already; choose another name" in refused.err
    assert cli("export", run, "-o", out, "--best", "--overwrite").status == 0
    assert cli("export", checkpoint(run, 4), "-o", tmp_path / "x.pt").status == 0
    wrong = cli("export", checkpoint(run, 4), "-o", tmp_path / "y.safetensors", "--best")
    assert "is one checkpoint; --best goes with a run folder" in wrong.err


# --------------------------------------------------------------------------------------------------------------------
# A run from beginning to end


def test_evaluate(run: Path) -> None:
    values = json.loads(cli("evaluate", run, "--json").out)
    assert (values["split"], values["processes"], values["samples"]) == ("test", 1, 269)
    done = json.loads((run / "FINISHED").read_text())
    assert values["accuracy"] == done["test"]["accuracy"]
    assert values["loss"] == pytest.approx(done["test"]["loss"], abs=1e-12)
    table = cli("evaluate", checkpoint(run, 4), "--split", "valid").out
    assert dict(line.split(maxsplit=1) for line in table.splitlines())["samples"] == "270"
    wrong = cli("evaluate", run, "--split", "validation")
    assert wrong.status == 1
    assert "has no split 'validation'; it has train, valid, test" in wrong.err


def test_a_run_is_trained_stopped_and_shown(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY)
    first = cli("train", recipe, "train.steps=5", "--run-dir", tmp_path / "run")
    assert first.status == 0, first.err
    assert "step 5/5" in first.out
    assert "test accuracy" in first.out
    again = cli("train", tmp_path / "run")
    assert again.status == 0
    assert "is finished" in again.out
    other = cli("train", recipe, "train.steps=6", "--run-dir", tmp_path / "run")
    assert other.status == 1
    assert "train.steps: was 5, now 6" in other.err
    assert cli("train", recipe, "train.steps=6", "--run-dir", tmp_path / "run", "--update").status == 0


def test_what_a_program_reads_is_all_that_is_printed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TINY)
    asked = ["train", recipe, "train.steps=4"]
    quiet = cli(*asked, "--processes", 2, "--run-dir", tmp_path / "quiet", "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")
    assert "step" in (tmp_path / "quiet/log-rank-0.txt").read_text(), "its log has what was not printed"
    trained = cli(*asked, "--run-dir", tmp_path / "run", "--json")
    told = json.loads(trained.out)
    assert (told["state"], told["step"], told["processes"]) == ("finished", 4, 1)
    assert told["summary"]["test"] == json.loads((tmp_path / "run/FINISHED").read_text())["test"]
    again = json.loads(cli("train", tmp_path / "run", "--json").out)
    assert again["summary"] == told["summary"]
    assert json.loads(cli("status", tmp_path / "run", "--json").out)["summary"] == told["summary"]
    broken = cli("train", recipe, "optim.lr=1.0e+18", "optim.name=sgd", "--run-dir", tmp_path / "broken", "--json")
    assert broken.status == 1
    assert "error" in broken.err, broken.out
    assert json.loads(broken.out)["state"] == "failed"
    wrong = cli("train", recipe, "optim.speed=1", "--json")
    assert (wrong.status, wrong.out) == (1, "")
    assert "optim.speed" in wrong.err


def run_in(folder: str, arguments: list[str]) -> object:
    import os

    from runs import cli_rank

    os.chdir(folder)
    return cli_rank(arguments)


def test_a_new_project_trains_at_once(tmp_path: Path) -> None:
    made = cli("init", tmp_path / "mine")
    assert made.status == 0
    assert "distrain train" in made.out
    # from another folder than its own: what its recipe names is found beside it
    (ended,) = in_world(
        1, run_in, str(tmp_path), ["train", "mine/recipe.yaml", "train.epochs=2", "data.samples=400"], launched=False
    )
    assert ended.status == 0, ended.err
    assert (tmp_path / "runs" / "spirals" / "FINISHED").exists()
    assert cli("init", tmp_path / "mine").status == 1


def commands(found: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each command with its name."""
    if hasattr(found, "commands"):
        for name, inner in found.commands.items():
            yield from commands(inner, (*names, name))
    else:
        yield " ".join(names), found


def test_the_help_of_each_option_reports_what_happens_without_it() -> None:
    told = 0
    for name, command in commands(typer.main.get_command(app)):
        for option in command.params:
            if option.param_type_name != "option" or option.required or option.name == "help":
                continue
            told += 1
            where = f"distrain {name} {option.opts[0]}: {option.help!r}"
            if option.is_flag:
                assert "without" in option.help.lower() or "otherwise" in option.help, where
            elif option.default in (None, "", []):
                assert isinstance(option.show_default, str), where
    assert told > 50


def test_the_version_is_printed() -> None:
    ended = cli("--version")
    assert (ended.status, ended.out) == (0, f"distrain {__version__}\n")


@pytest.mark.parametrize("finished", [True, False])
def test_export_takes_what_its_help_says(tmp_path: Path, finished: bool) -> None:
    (tmp_path / "metric.py").write_text(
        "def sure(outputs, targets):\n    return outputs.softmax(1).max(1).values\n\n\nsure.higher_is_better = False\n"
    )
    text = TINY.replace("metrics: [accuracy]", 'metrics: ["metric.py:sure"], best: sure')
    run = tmp_path / "run"
    train(1, write_recipe(tmp_path, text), run, stop_after=None if finished else 8)
    out = tmp_path / "model.safetensors"
    taken = [cli("export", run, "-o", out, "--overwrite", *best).out for best in ([], ["--best"])]
    steps = [re.findall(r"step-0*(\d+)", text)[-1] for text in taken]
    assert steps[1] == "4", "the least sure, which is the first"
    assert steps[0] == ("4" if finished else "8")


# --------------------------------------------------------------------------------------------------------------------
# Names


def test_every_kind_is_listed() -> None:
    found = {name: value for name, value in vars(registry).items() if isinstance(value, registry.Registry)}
    tables = {name for name, value in found.items() if value.group is not None}  # others are not named by anybody
    assert {kind.value for kind in Kind} == tables


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_a_list_has_a_line_for_each_name(kind: str) -> None:
    listed = CliRunner().invoke(app, ["list", kind])
    assert listed.exit_code == 0, listed.output
    names = getattr(registry, kind).names()
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(names)]] == names
    assert all(line.split(maxsplit=1)[1:] for line in lines), "each with what it is"
    assert bool(names) or f"no {getattr(registry, kind).kind} is built in" in listed.output
    assert set(names) <= set(json.loads(CliRunner().invoke(app, ["list", kind, "--json"]).stdout))


def test_a_list_is_read_from_the_sources_and_is_what_is_registered() -> None:
    code = "import json, sys; from distrain.config import registry; from distrain.cli.main import Kind\n"
    code += "print(json.dumps({kind: getattr(registry, kind).summaries() for kind in Kind}))\n"
    code += "assert not {'torch', 'torchvision', 'timm', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind, found in json.loads(done.stdout).items():
        expected = {entry.name: entry.summary for entry in getattr(registry, kind).entries()}
        if kind == "models":
            expected |= dict.fromkeys(torchvision_names(), "torchvision.models") | dict.fromkeys(timm_names(), "timm")
        assert found == expected, kind


def test_a_list_of_a_part_has_the_names_with_it_in_them() -> None:
    whole, part, none = (cli("list", "models", *part) for part in ([], ["RESNET1"], ["zzz"]))
    assert "alexnet ... " in whole.out
    assert "resnet18" not in whole.out, "a library is one line"
    assert {"resnet18", "resnet101", "timm:resnet18"} <= {line.split()[0] for line in part.out.splitlines()}
    assert all("resnet1" in line for line in part.out.splitlines())
    assert (none.out, none.status) == ("", 0)
    assert "no model with 'zzz' in its name" in none.err
