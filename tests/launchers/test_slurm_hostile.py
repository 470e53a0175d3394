"""Names, paths, overrides and values of sites that would like to be commands: refused, or handed on byte for byte.

Each goes through `submit --dry-run`. A script that comes out is run by bash with stand-ins for SLURM's commands that
note what they are told; the file that every hostile value tries to make must not appear.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from runs import TINY, cli, write_recipe

from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.launchers.slurm.plan import Plan, make_plan, problems_of
from distrain.launchers.slurm.rendering import BODY
from distrain.launchers.slurm.sites import Site, read_site
from distrain.launchers.slurm.submitting import Prepared, Wanted, prepare

HOSTILE = [
    "$(touch {canary})",
    "`touch {canary}`",
    "; touch {canary}",
    "&& touch {canary} #",
    "| touch {canary}",
    "x\ntouch {canary}\n",
    "x\r\ntouch {canary}",
    "x\n#SBATCH --wrap=touch",
    "' ; touch {canary} ; '",
    '" ; touch {canary} ; "',
    "'\"$(touch {canary})\"'",
    "') ; touch {canary} ; (",
    "${{IFS}}$(touch${{IFS}}{canary})",
    "$'\\ntouch {canary}'",
    "\\$(touch {canary})",
    "<(touch {canary})",
    "x=$(touch {canary})",
    "a[$(touch {canary})]",
    "{{a,$(touch {canary})}}",
    "--wrap=touch {canary}",
    "-c touch {canary}",
    "%j%x$(touch {canary})",
    "# $(touch {canary})",
    "x\u2028touch {canary}",
    "\x1b]0;$(touch {canary})\x07",
    "x\ttouch {canary}",
    "*",
    "~",
    "!!",
    "EOF\ntouch {canary}",
]

_NOTE = """#!/bin/bash
printf '%s\\0' "$@" > {folder}/arguments
env -0 > {folder}/environment
"""
_KNOWS = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo node0 ;;
  "show node") echo "   NodeAddr=127.0.0.1 NodeHostName=node0" ;;
esac
"""


@dataclass
class Bench:
    """A folder in which scripts are run, and what they have told srun."""

    folder: Path

    def __post_init__(self) -> None:
        self.commands = self.folder / "bin"
        self.commands.mkdir()
        for name, text in (("srun", _NOTE), ("scontrol", _KNOWS)):
            (self.commands / name).write_text(text.format(folder=self.folder))
            (self.commands / name).chmod(0o755)

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def run(self, script: str) -> tuple[list[str], dict[str, str]]:
        """Run a script; returns the arguments of srun and its environment."""
        for name in ("arguments", "environment"):
            (self.folder / name).unlink(missing_ok=True)
        file = self.folder / "train.sbatch"
        file.write_text(script, encoding="utf-8")
        environment = {
            "PATH": f"{self.commands}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURMD_NODENAME": "node0",
            "MODULESHOME": str(self.folder / "modules"),
        }
        done = subprocess.run(["bash", str(file)], env=environment, cwd=self.folder, capture_output=True, timeout=300)
        assert not self.canary.exists(), script
        assert (self.folder / "arguments").exists(), done.stderr.decode()
        arguments = (self.folder / "arguments").read_bytes().decode().split("\0")[:-1]
        pairs = (self.folder / "environment").read_bytes().decode(errors="surrogateescape").split("\0")
        return arguments, dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "modules" / "init").mkdir(parents=True)
    (tmp_path / "modules" / "init" / "bash").write_text("module() { :; }\n")
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)


def header(script: str) -> list[str]:
    """Return the options of the lines that SLURM reads: those before the first that is no comment."""
    found = []
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found.append(line.removeprefix("#SBATCH ").strip('"').partition("=")[0])
    return found


def with_site(bench: Bench, **values: Any) -> Prepared:
    """Prepare a job of a site with these values."""
    (bench.folder / "site.yaml").write_text(json.dumps(values))  # JSON is YAML, and quotes everything
    return prepare(
        str(bench.folder / "recipe.yaml"),
        [],
        Wanted(2, time="10", site=str(bench.folder / "site.yaml")),
        run_dir=str(bench.folder / "run"),
    )


def options_of(arguments: list[str]) -> list[str]:
    """Return the arguments of launch/node.py."""
    place = next(number for number, part in enumerate(arguments) if part.endswith("/submit/node.py"))
    return arguments[place + 1 :]


Way = Callable[[Bench, str], tuple[Prepared, Callable[[list[str], dict[str, str]], bool]]]


def by_run_dir(bench: Bench, text: str) -> Any:
    folder = bench.folder / "runs" / text
    made = prepare(str(bench.folder / "recipe.yaml"), [], Wanted(2, time="10"), run_dir=str(folder))
    return made, lambda arguments, _: arguments[-1] == str(folder.absolute())


def by_override(key: str) -> Way:
    def way(bench: Bench, text: str) -> Any:
        made = prepare(
            str(bench.folder / "recipe.yaml"),
            [f"{key}={json.dumps(text)}"],
            Wanted(2, time="10"),
            run_dir=str(bench.folder / "run"),
        )
        # it is in the recipe of the run, and nowhere in the script
        stored = made.runs[0][1].recipe
        assert text in (stored.name, stored.log.project)
        return made, lambda arguments, _: arguments[-1] == str(bench.folder / "run")

    return way


def by_raw_override(bench: Bench, text: str) -> Any:
    made = prepare(str(bench.folder / "recipe.yaml"), [text], Wanted(2, time="10"), run_dir=str(bench.folder / "run"))
    return made, lambda arguments, _: False


def by_array(bench: Bench, text: str) -> Any:
    values = f"log.project={json.dumps(text)},other"
    made = prepare(
        str(bench.folder / "recipe.yaml"), [], Wanted(2, time="10"), run_dir=str(bench.folder / "run"), arrays=[values]
    )
    assert made.runs[0][1].recipe.log.project == text
    return made, lambda arguments, _: arguments[-1] == str(made.runs[0][0].path)


def by_site(key: str, wrap: Callable[[str], Any] = lambda text: text) -> Way:
    def way(bench: Bench, text: str) -> Any:
        return with_site(bench, **{key: wrap(text)}), lambda arguments, _: False

    return way


def by_environment(bench: Bench, text: str) -> Any:
    return with_site(bench, environment={"GIVEN": text}), lambda _, environment: environment["GIVEN"] == text


def by_source(bench: Bench, text: str) -> Any:
    file = bench.folder / "sources" / text / "x.sh"
    made = with_site(bench, sources=[str(file)])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("export READ=yes\n")
    return made, lambda _, environment: environment.get("READ") == "yes"


def by_scratch(bench: Bench, text: str) -> Any:
    def arrived(arguments: list[str], _: dict[str, str]) -> bool:
        options = options_of(arguments)
        return options[options.index("--scratch") + 1] == f"/{text}"

    return with_site(bench, scratch=f"/{text}"), arrived


def by_python(bench: Bench, text: str) -> Any:
    return with_site(bench, python=f"/x/{text}"), lambda arguments, _: f"/x/{text}" in arguments


def by_inner_python(bench: Bench, text: str) -> Any:
    container = {"pyxis": "image", "python": f"/x/{text}"}
    return with_site(bench, container=container), lambda arguments, _: f"/x/{text}" in arguments


def by_image(bench: Bench, text: str) -> Any:
    made = with_site(bench, container={"pyxis": f"docker://{text}"})
    return made, lambda arguments, _: f"--container-image=docker://{text}" in arguments


def by_mount(bench: Bench, text: str) -> Any:
    made = with_site(bench, container={"apptainer": "image", "mounts": [f"/{text}"]})
    return made, lambda arguments, _: arguments[arguments.index("--bind") + 1].startswith(f"/{text},")


def by_option(name: str) -> Way:
    def way(bench: Bench, text: str) -> Any:
        wanted = {"nodes": 2, "time": "10"} | {name: [text] if name == "sbatch" else text}
        return prepare(
            str(bench.folder / "recipe.yaml"), [], Wanted(**wanted), run_dir=str(bench.folder / "run")
        ), lambda arguments, _: False

    return way


WAYS: dict[str, Way] = {
    "the run's folder": by_run_dir,
    "the run's name": by_override("name"),
    "an override's value": by_override("log.project"),
    "an override": by_raw_override,
    "a value of a sweep": by_array,
    **{f"--{name}": by_option(name) for name in ("time", "mem", "partition", "account", "qos", "sbatch")},
    **{
        f"a site's {key}": by_site(key)
        for key in (
            *("partition", "account", "qos", "constraint", "reservation", "gpu_type", "mem", "time", "interface"),
            *("gpu_option", "description"),
        )
    },
    "a site's sbatch": by_site("sbatch", lambda text: [f"--comment={text}"]),
    "a site's modules": by_site("modules", lambda text: [text]),
    "a site's variable": by_site("environment", lambda text: {text: "x"}),
    "a site's image": by_site("container", lambda text: {"apptainer": text}),
    "a site's other image": by_image,
    "a site's key": by_site("environment", lambda text: {f"A;{text}": "x"}),
    "a site's environment": by_environment,
    "a site's sources": by_source,
    "a site's scratch": by_scratch,
    "a site's python": by_python,
    "a container's python": by_inner_python,
    "a site's mounts": by_mount,
}
USED_NOWHERE = ("a site's description", "a site's sbatch")
"""What no launcher is told."""
ADDED = {"a value of a sweep": "--array", "a site's sbatch": "--comment"}
"""The option of sbatch that a way adds."""
REFUSED_ALWAYS = {
    *("an override", "a site's modules", "a site's variable", "a site's key", "a site's interface"),
    *("--time", "--mem", "--sbatch", "a site's gpu_option", "the run's name"),
}
"""Ways that none of these values can go."""


LIKE_OTHERS = {
    *("--account", "--qos", "a site's account", "a site's qos", "a site's constraint", "a site's reservation"),
    *("a site's other image", "a container's python"),
}
"""Ways that go where another one goes that is left."""


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.more] if way in LIKE_OTHERS else []) for way in WAYS]
)
def test_what_is_hostile_is_refused_or_arrives_byte_for_byte(
    bench: Bench, way: str, record_property: Callable[[str, Any], None]
) -> None:
    write_recipe(bench.folder, TINY)
    usual = header(prepare(str(bench.folder / "recipe.yaml"), [], Wanted(2, time="10")).script)
    assert len(usual) >= 8
    refused = 0
    told: list[str] = []
    for pattern in HOSTILE:
        text = pattern.format(canary=bench.canary)
        try:
            prepared, arrived = WAYS[way](bench, text)
        except UserError as error:
            refused += 1
            told.append(str(error))
            continue
        found = header(prepared.script)
        own = ADDED.get(way)
        assert [name for name in found if name != own] == usual, f"{text!r} changed what SLURM is asked for"
        assert prepared.script.count(BODY) == 1
        arguments, environment = bench.run(prepared.script)
        if way not in USED_NOWHERE:
            assert arrived(arguments, environment), f"{text!r} arrived as {arguments}"
        assert not bench.canary.exists()
    assert all(len(text) > 20 for text in told)
    if way in REFUSED_ALWAYS:
        assert refused == len(HOSTILE)
    else:
        assert refused < len(HOSTILE) or way.startswith(("a site's", "--"))
    record_property("trials", len(HOSTILE))


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) * len(WAYS) >= 900


def test_the_canary_can_sing(bench: Bench) -> None:
    """What is expected of each script does happen in one that quotes nothing."""
    write_recipe(bench.folder, TINY)
    script = prepare(str(bench.folder / "recipe.yaml"), [], Wanted(2, time="10")).script
    with pytest.raises(AssertionError):
        bench.run(script.replace("scratch=''", f"scratch=$(touch {bench.canary})"))
    assert bench.canary.exists()


@pytest.mark.slow
@pytest.mark.fault(29)
def test_the_command_line_is_as_careful(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    recipe, canary = write_recipe(tmp_path), tmp_path / "canary"
    for pattern in HOSTILE[:12]:
        text = pattern.format(canary=canary)
        arguments = ["submit", recipe, "--time", "10", "--dry-run", "--run-dir", f"{tmp_path}/{text}"]
        ended = cli(*arguments)
        assert "Traceback" not in ended.err
        assert ended.status in (0, 1)
        if ended.status == 0:
            done = subprocess.run(["bash", "-n"], input=ended.out, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
    assert not canary.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    record_property("trials", 12)


@pytest.mark.fault(30)
def test_no_secret_of_the_environment_is_in_a_script_or_a_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(bench.folder, TINY)
    told = bench.folder / "sbatch-environment"
    (bench.commands / "sbatch").write_text(f"#!/bin/bash\nenv > {told}\necho 17\n")
    (bench.commands / "sbatch").chmod(0o755)
    (bench.commands / "squeue").write_text("#!/bin/bash\n")
    (bench.commands / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bench.commands}:{os.environ['PATH']}")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "UNKNOWN"):
        monkeypatch.setenv(name, "canary-5f1e")
    ended = cli_here(
        "submit", str(bench.folder / "recipe.yaml"), "--time", "10", "--run-dir", str(bench.folder / "run")
    )
    assert "job 17" in ended
    texts = [file.read_text(errors="replace") for file in (bench.folder / "run").rglob("*") if file.is_file()]
    assert len(texts) > 5
    assert not [text for text in [*texts, ended, told.read_text()] if "canary-5f1e" in text]
    assert "PATH=" in told.read_text()
    assert load_recipe(bench.folder / "run" / "recipe.yaml").recipe.name == "tiny"


def cli_here(*arguments: str) -> str:
    """Run the command in this process, with its environment; returns what it printed."""
    from typer.testing import CliRunner

    from distrain.cli.main import app

    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# --------------------------------------------------------------------------------------------------------------------
# What is said of them

LIBRARY = re.compile(r"\b(should|valid|validation|input|tuple|type=|pydantic|unable to parse)\b", re.IGNORECASE)
"""Words of the library that checks."""


def refused(**values: Any) -> list[str]:
    """Return the lines that a plan of these values is refused with."""
    folder = values.get("folder", "/runs/tiny")
    usual = {
        "name": "tiny", "folder": folder, "runs": (folder,), "nodes": 1, "processes_per_node": 1, "time": "30",
        "strategy": "ddp", "python": "/usr/bin/python", "node_script": f"{folder}/submit/node.py",
        "python_path": (f"{folder}/submit/code/own", f"{folder}/submit/distrain"),
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        make_plan(**usual | values)
    first, *lines = str(caught.value).splitlines()
    assert first == "this cannot be submitted:"
    assert not LIBRARY.search("\n".join(lines))
    return lines


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("\t", "control character U+0009"),
        ("\n", "control character U+000A"),
        ("\u202e", "control character U+202E"),
        ("\udce9", r"the byte \xe9"),
        *((letter, f"found {letter} in the path") for letter in "\"'`\\$%#"),
        *((letter, f"found {letter!r} in the path") for letter in ",:"),
    ],
)
def test_one_wrong_path_is_reported_once(part: str, said: str) -> None:
    (alone,) = refused(folder=f"/a{part}b/runs")
    assert said in alone
    assert alone.startswith("  - folder: ")
    (sweep,) = refused(folder=f"/a{part}b/runs", runs=[f"/a{part}b/runs/{number}" for number in range(100)])
    assert sweep == alone


def test_of_many_wrong_items_the_first_are_reported() -> None:
    lines = refused(runs=[f"/runs/{number}%" for number in range(100)])
    assert [line.partition(": ")[0] for line in lines] == ["  - runs.0", "  - runs.1", "  - runs.2", "  - runs"]
    assert lines[-1] == "  - runs: 97 more like these"


WRONG: list[Any] = [None, True, "", "x y\x1b", -1, 1.5, 10**9, [], [3], {}, {"x y": 1}, {"pyxis": ""}]


def test_no_words_of_the_library_reach_a_person(tmp_path: Path) -> None:
    told = []
    file = tmp_path / "site.yaml"
    for value in WRONG:
        for key in Plan.model_fields:
            try:
                Plan.model_validate({key: value})
            except ValidationError as error:
                told += [line for line in problems_of(error) if line.startswith(key)]
        for key in Site.model_fields:
            file.write_text(json.dumps({key: value}))
            try:
                read_site(file)
            except UserError as error:
                told += str(error).splitlines()[1:]
    assert len(told) > 300
    assert [line for line in told if LIBRARY.search(line) or "something else" in line] == []
