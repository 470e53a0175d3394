"""Plans, batch scripts, sites, sweeps and copies of code: what `distrain submit` makes before SLURM has a part."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, cli, write_recipe
from stub_slurm import StubQueue
from typer.testing import CliRunner
from worlds import in_world

import distrain
from distrain.cli.main import app
from distrain.config import UserError
from distrain.config.yaml import load_recipe
from distrain.fingerprints.code import code_of
from distrain.launchers import LaunchPlan, configuration_file, launch_argv
from distrain.launchers.slurm import queue
from distrain.launchers.slurm.node import (
    create,
    interface_towards,
    job_name,
    node_rank,
    processes_here,
    request_of_job,
    scratch_folder,
    set_environment,
    start_node,
)
from distrain.launchers.slurm.plan import Plan, is_secret, make_plan, seconds_of
from distrain.launchers.slurm.queue import Job, passed_on
from distrain.launchers.slurm.rendering import BODY, log_pattern, render_sbatch, template
from distrain.launchers.slurm.sites import find_sites, load_site, read_site, site_lines
from distrain.launchers.slurm.snapshot import copied, differences, moved, own_package, take_snapshot, write_copy
from distrain.launchers.slurm.submitting import Prepared, Wanted, announced, prepare, submit
from distrain.launchers.slurm.tracking import job_numbers, jobs_for
from distrain.launchers.sweeps import expand, read_sweep
from distrain.run.folder import RunDir
from distrain.run.json_files import append_row

ROOT = Path(distrain.__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


def plan(**values: Any) -> Plan:
    folder = values.get("folder", "/home/me/runs/digits")
    given: dict[str, Any] = {
        "name": "digits",
        "folder": folder,
        "runs": (folder,),
        "nodes": 2,
        "processes_per_node": 2,
        "cpus_per_task": 2,
        "time": "4:00:00",
        "strategy": "ddp",
        "python": "/home/me/env/bin/python",
        "node_script": f"{folder}/submit/node.py",
    }
    return make_plan(**given | values)


PLANS = {
    "cpu": plan(),
    "gpus": plan(
        gpus_per_node=4,
        gpu_type="a100",
        processes_per_node=4,
        cpus_per_task=None,
        mem="0",
        partition="gpu,gpu-long",
        account="proj_12",
        qos="normal",
        constraint="[rack1|rack2]&ib",
        reservation="course",
        sbatch=("--exclusive", "--mail-type=END,FAIL", "--mail-user=me@example.org"),
        strategy="zero3",
        offload="optimizer",
        modules=("gcc/13.2", "cuda/12.4"),
        sources=("/home/me/it's mine.sh",),
        variables={"NCCL_DEBUG": "INFO", "GREETING": 'it\'s a "quoted" value; & more'},
        python_path=("/home/me/runs/digits/submit/code/pkg", "/home/me/runs/digits/submit/distrain"),
        interface="ib0",
        scratch="$SLURM_TMPDIR/a b",
    ),
    "apptainer": plan(
        gpus_per_node=1,
        gpu_option="gres",
        processes_per_node=1,
        container={
            "apptainer": "/images/torch.sif",
            "mounts": ["/data", "/shared:/mnt/shared:ro"],
            "python": "python3.12",
        },
    ),
    "pyxis": plan(
        folder="/home/me/my runs/x", container={"pyxis": "nvcr.io/nvidia/pytorch:26.08-py3", "mounts": ["/data:/d"]}
    ),
    "sweep": plan(
        folder="/home/me/runs/sweep",
        runs=("/home/me/runs/sweep/0-lr=1e-3", "/home/me/runs/sweep/1-lr=3e-4"),
        parallel=1,
        nodes=1,
    ),
}

# --------------------------------------------------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize("name", PLANS)
def test_scripts_are_as_they_were(name: str) -> None:
    """With UPDATE_GOLDEN=1 the files are written anew."""
    script = render_sbatch(PLANS[name])
    head = script.partition(BODY)[0]
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(head)
    assert head == file.read_text()


def assignments(head: str) -> list[str]:
    """Return the names that a script's head gives values."""
    names = []
    for line in head.splitlines():
        if line and not line.startswith("#"):
            names.append(line.split("<<<")[0].split()[-1] if line.startswith("read -ra") else line.partition("=")[0])
    return names


@pytest.mark.parametrize("name", PLANS)
def test_all_scripts_do_the_same_with_values_of_the_same_names(name: str) -> None:
    head, _, body = render_sbatch(PLANS[name]).partition(BODY)
    original_head, _, original_body = template().partition(BODY)
    assert body == original_body
    assert sorted(assignments(head)) == sorted(assignments(original_head))
    assert len(assignments(head)) > 10


@pytest.mark.parametrize("script", ["by hand", *PLANS])
def test_scripts_are_clean(script: str, tmp_path: Path) -> None:
    file = tmp_path / "train.sbatch"
    file.write_text(template() if script == "by hand" else render_sbatch(PLANS[script]))
    for command in (["bash", "-n"], [str(SHELLCHECK), "--shell=bash", "--severity=style"]):
        done = subprocess.run([*command, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    # the checker does find what is wrong
    file.write_text(file.read_text().replace('"$run/attempts.jsonl"', "$run/attempts.jsonl"))
    assert subprocess.run([str(SHELLCHECK), str(file)], capture_output=True).returncode == 1


def test_the_log_is_in_the_run_folder() -> None:
    assert log_pattern(PLANS["cpu"]) == "/home/me/runs/digits/submit/slurm-%j.log"
    assert log_pattern(PLANS["sweep"]) == "/home/me/runs/sweep/submit/slurm-%A_%a.log"


REFUSED = {
    "name": ["", "a b", "-x", "x\n#SBATCH --wrap=x", "x" * 200],
    "folder": ["runs/x", "/a\nb", '/a"b', "/a'b", "/a%jb", "/a#b", "/a$b", "/a`b", "/a\\b", "/a:b", "/a,b", "/\udc80"],
    "time": ["", "soon", "4h", "0", "-1", "1:2:3:4", "0:30", "1 day", "4:00:00\n"],
    "mem": ["64 G", "lots", "-1", "64GB"],
    "partition": ["", "a b", "-p", "a;b", "a%b", "a\nb"],
    "constraint": ["a b", "$(x)", "a;b"],
    "sbatch": [("exclusive",), ("-N4",), ("--nodes=4",), ("--node=4",), ("--wrap=ls",), ("--x=a b",), ("--x=$(y)",),
               ("--export=ALL",), ("--comment='x'",), ("--no-kill",), ("--uid=0",)],
    "modules": [("-f",), ("a b",), ("a;b",), ("$(x)",)],
    "sources": [("x.sh",), ("/x\ny",)],
    "variables": [{"A B": "x"}, {"WANDB_API_KEY": "x"}, {"HF_TOKEN": "x"}, {"PATH": "/x"}, {"LD_PRELOAD": "/x"},
                  {"SLURM_X": "1"}, {"BASH_ENV": "/x"}, {"A": "$HOME/x"}, {"A": "`x`"}, {"A": "a\nb"},
                  {"A": "https://me:pw@example.org"}],
    "interface": ["ib0,ib1", "^lo", "a b", "-x", "i" * 16],
    "scratch": ["/x\n"],
    "container": [{}, {"apptainer": "x", "pyxis": "y"}, {"apptainer": "a b"}, {"apptainer": "-x"}, {"apptainer": "a,b"},
                  {"pyxis": "x", "mounts": ["data"]}, {"pyxis": "x", "mounts": ["/a,/b"]},
                  {"pyxis": "x", "mounts": ["/a:/b:exec"]}, {"pyxis": "x", "python": "-c"}],
    "strategy": ["dpp", "auto"],
    "nodes": [0, -1, "2"],
    "notice_s": [1, 4 * 3600],
    "gpus_per_node": [1],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_slurm_or_a_shell_would_misread_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match="this cannot be submitted:\n  - ") as caught:
        plan(**{key: value} | ({"runs": (value,)} if key == "folder" else {}))
    assert key in str(caught.value) or key in ("notice_s", "gpus_per_node")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        plan(time="soon", partition="a b", mem="lots")
    for part in ("time: found 'soon', expected a time limit such as", "partition: found 'a b'", "mem: found 'lots'"):
        assert part in str(caught.value)


def test_time_limits_are_read_as_slurm_does() -> None:
    times = {"30": 1800, "90:30": 5430, "4:00:00": 14400, "1-0": 86400, "1-12:30": 131400, "2-01:02:03": 176523}
    assert {text: seconds_of(text) for text in times} == times


def test_secrets_are_known_by_their_names() -> None:
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "MY_KEY",
        "GITHUB_PAT",
        "openai_api_key",
    ):
        assert is_secret(name), name
    for name in ("NCCL_DEBUG", "KEYBOARD", "HF_HOME", "MONKEY", "TRITON_CACHE_DIR"):
        assert not is_secret(name), name


# --------------------------------------------------------------------------------------------------------------------
# What a job is given


def test_a_job_gets_what_it_needs_of_the_environment_and_no_secret() -> None:
    needed = {
        "PATH": "/bin", "HOME": "/home/me", "LD_LIBRARY_PATH": "/x", "MODULEPATH": "/m", "LMOD_PKG": "/l",
        "BASH_FUNC_module%%": "() { :; }", "CONDA_PREFIX": "/c", "VIRTUAL_ENV": "/v", "NCCL_DEBUG": "INFO",
        "WANDB_MODE": "offline", "HF_HOME": "/hf", "SLURM_CONF": "/etc/slurm.conf", "OMP_PROC_BIND": "true",
    }  # fmt: skip
    secret = {
        "WANDB_API_KEY": "canary", "HF_TOKEN": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "GITHUB_TOKEN": "canary",
        "MY_PASSWORD": "canary", "SSH_AUTH_SOCK": "canary", "DISTRAIN_SECRET": "canary", "OTHER": "canary",
        "WANDB_BASE_URL": "https://me:canary@example.org", "NCCL_API_KEY": "canary",
    }  # fmt: skip
    outer = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "1", "SBATCH_EXPORT": "ALL", "SBATCH_NO_REQUEUE": "1"}
    assert passed_on(needed | secret | outer) == needed


# --------------------------------------------------------------------------------------------------------------------
# Sites


def test_sites_that_come_along_are_valid_and_listed() -> None:
    names = {site.name for site in find_sites()}
    assert {"generic-cpu", "generic-gpu", "generic-apptainer", "generic-pyxis"} <= names
    for path in (ROOT / "slurm" / "sites").glob("*.yaml"):
        assert read_site(path).description
    listed = cli("sites").out
    assert all(name in listed for name in names)
    assert "cpus_per_gpu: 8" in cli("sites", "generic-gpu").out


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder of sites; the current folder is one without any."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "config" / "distrain" / "sites"
    folder.mkdir(parents=True)
    return folder


def test_a_site_of_ones_own_goes_before_one_that_comes_along(config: Path) -> None:
    (config / "generic-gpu.yaml").write_text("partition: mine\n")
    assert load_site("generic-gpu").partition == "mine"
    hidden = [site for site in find_sites() if site.hidden_by is not None]
    assert [(site.name, site.hidden_by) for site in hidden] == [("generic-gpu", config / "generic-gpu.yaml")]
    project = Path.cwd() / "slurm" / "sites"
    project.mkdir(parents=True)
    (project / "generic-gpu.yaml").write_text("partition: ours\n")
    assert load_site("generic-gpu").partition == "ours"
    assert load_site(str(config / "generic-gpu.yaml")).partition == "mine"


def test_a_site_that_is_not_there_gets_the_close_names(config: Path) -> None:
    with pytest.raises(UserError, match="no site 'generic-gpus'; did you mean 'generic-gpu'") as caught:
        load_site("generic-gpus")
    assert str(config) in str(caught.value)


WRONG_SITE = """partiton: gpu
qos: "a b"
time: 60
mem: 64G
mem: 32G
modules: [cuda, 12]
environment: {WANDB_API_KEY: abc}
container: {apptaner: x}
sources: [env.sh]
sbatch: [--nodes=3]
"""


def test_everything_wrong_with_a_site_is_reported_with_its_line(config: Path) -> None:
    (config / "wrong.yaml").write_text(WRONG_SITE)
    with pytest.raises(UserError) as caught:
        load_site("wrong")
    file, said = config / "wrong.yaml", str(caught.value)
    for line, text in (
        (1, "partiton: unknown key; did you mean 'partition'?"),
        (2, "qos: found 'a b', expected the name of a quality of service"),
        (3, "time: found 60, expected text; put it in quotes"),
        (4, "mem: given twice, on lines 4 and 5"),
        (6, "modules.1: found 12, expected text; put it in quotes"),
        (7, "environment.WANDB_API_KEY: WANDB_API_KEY is the name of a secret"),
        (8, "container.apptaner: unknown key; did you mean 'apptainer'?"),
        (9, "sources.0: found 'env.sh', expected an absolute path"),
        (10, "sbatch.0: --nodes is set from other values here"),
    ):
        assert f"{file}:{line}: {text}" in said
    assert any(line.startswith("wrong ") and "9 problems" in line for line in site_lines()), "listed all the same"


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "\tx: 1", "x: !!python/object 1", "&a {}", "\x00", "name"])
def test_files_that_are_no_sites_are_refused(config: Path, text: str) -> None:
    (config / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml|the site x"):
        load_site("x")


def test_a_site_gives_what_the_command_line_leaves_open(config: Path, tmp_path: Path) -> None:
    (config / "big.yaml").write_text(
        'partition: gpu\naccount: proj\nqos: q\ntime: "2:00:00"\ncpus_per_gpu: 6\ngpu_type: h100\nmem: 0\n'.replace(
            "mem: 0", 'mem: "0"'
        )
        + "modules: [cuda/12]\nenvironment: {NCCL_DEBUG: INFO}\ninterface: ib0\nscratch: $SCRATCH\nnotice_s: 300\n"
        + "sbatch: [--exclusive]\npython: /opt/py/bin/python\n"
    )
    recipe = str(write_recipe(tmp_path, TINY.replace("global: 12", "global: 16")))
    made = prepare(recipe, [], Wanted(2, 4, site="big")).plan
    assert (made.partition, made.account, made.qos, made.time, made.cpus_per_task, made.mem) == (
        "gpu", "proj", "q", "2:00:00", 24, "0",
    )  # fmt: skip
    assert (made.processes_per_node, made.world_size, made.notice_s, made.gpu_type) == (4, 8, 300, "h100")
    own = Wanted(
        1, 4, processes_per_node=2, time="30", cpus_per_task=3, mem="1G", partition="p", site="big", notice_s=60
    )
    made = prepare(recipe, [], own).plan
    assert (made.partition, made.time, made.cpus_per_task, made.mem, made.notice_s) == ("p", "30", 3, "1G", 60)
    assert made.account == "proj"
    script = prepare(recipe, [], own).script
    for line in ("#SBATCH --partition=p", "#SBATCH --exclusive", "modules=(cuda/12)", "variables=(NCCL_DEBUG=INFO"):
        assert line in script


# --------------------------------------------------------------------------------------------------------------------
# Submitting


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubQueue:
    """SLURM's commands, and its queue; sbatch takes everything, as jobs 100, 101, ..."""
    jobs = StubQueue(tmp_path / "slurm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{jobs.commands}{os.pathsep}{os.environ['PATH']}")
    return jobs


def submitted(recipe: Path, *overrides: str, **about: Any) -> tuple[Prepared, str]:
    wanted = Wanted(2, processes_per_node=2, time="10")
    prepared = prepare(str(recipe), overrides, about.pop("wanted", wanted), **about)
    return prepared, submit(prepared)


def test_a_submitted_run_is_made_with_all_that_the_job_needs(cluster: StubQueue, tmp_path: Path) -> None:
    prepared, number = submitted(write_recipe(tmp_path), "optim.lr=0.5")
    run = RunDir(prepared.plan.folder)
    assert run.path.parent == tmp_path / "runs"
    assert load_recipe(run.recipe_path).recipe.optim.lr == 0.5
    assert (run.launch().processes, run.launch().strategy) == (4, "ddp")
    request = request_of_job(run, 2, 2, "ddp", "none")
    assert request is not None
    assert (request.nodes, request.processes, request.update) == (2, 4, False)
    submit_folder = run.path / "submit"
    assert (submit_folder / "train.sbatch").read_text() == prepared.script
    assert json.loads((submit_folder / "plan.json").read_text())["plan"] == prepared.plan.model_dump(mode="json")
    assert (submit_folder / "node.py").read_text() == (ROOT / "launch" / "node.py").read_text()
    assert job_numbers(run.path) == [number] == ["100"]
    told = "\n".join(announced(prepared, number))
    for part in ("job 100", "4 processes", f"{submit_folder}/slurm-100.log", "distrain status"):
        assert part in told
    # distrain is run from a checkout here, so it is copied as well, and the copy comes first
    assert prepared.plan.python_path == (str(submit_folder / "distrain"),)
    code = "import distrain; from distrain.launchers import shared_file; print(shared_file('launch', 'train.py'))"
    environment = {**os.environ, "PYTHONPATH": str(submit_folder / "distrain")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert out.stdout.strip() == str(submit_folder / "distrain" / "launch" / "train.py"), out.stderr


def test_of_distrain_its_code_and_configurations_are_copied_and_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    for name in ("distrain/a.py", "distrain/room/b.py", "distrain/notes.txt", "launch/train.py", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "distrain" / ".#a.py").symlink_to("me@machine.17")  # an editor's lock
    found = own_package(tmp_path / "distrain")
    assert found is not None
    assert [*found.files] == ["distrain/a.py", "distrain/room/b.py", "launch/train.py"]
    (tmp_path / "distrain" / "share").mkdir()
    assert own_package(tmp_path / "distrain") is None, "it is installed"


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # nor does it need SLURM
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["submit", str(recipe), "--time", "10", "--run-dir", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert ended.exit_code == 0
    assert ended.output.startswith("#!/bin/bash\n")
    assert f"runs=({tmp_path}/run)" in ended.output
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"there is no sbatch here.*--dry-run"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "wanted", "said"),
    [
        (["model.name=mpl"], Wanted(time="10"), "did you mean 'mlp'"),
        (["optim.lr=-1"], Wanted(time="10"), "optim.lr"),
        (["batch.global=30"], Wanted(2, processes_per_node=4, time="10"), "not a multiple of the 8 processes"),
        ([], Wanted(2, time="10", strategy="single"), "single is one process, found 2"),
        ([], Wanted(2, time="10", strategy="zero3"), "train.precision is fp64"),
        ([], Wanted(2, time="10", strategy="ddp", offload="all"), "ddp cannot offload 'all'"),
        ([], Wanted(2), "give --time"),
        ([], Wanted(1, 2, 3, time="10"), "3 processes on a node with 2 GPUs"),
        ([], Wanted(time="10", sbatch=["--nodes=3"]), "--nodes is set from other values here"),
        ([], Wanted(time="10", site="none"), "no site 'none'"),
    ],
)
def test_what_cannot_train_is_refused_before_it_waits_in_a_queue(
    tmp_path: Path, overrides: list[str], wanted: Wanted, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(str(write_recipe(tmp_path)), overrides, wanted, run_dir=str(tmp_path / "run"))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_queued_once(cluster: StubQueue, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    prepared, number = submitted(recipe)
    cluster[number] = Job(number, "PENDING", "Priority")
    with pytest.raises(UserError, match=r"is in the queue already, as job 100 \(PENDING\)"):
        submitted(recipe)
    assert job_numbers(Path(prepared.plan.folder)) == ["100"]
    cluster[number] = Job(number, "COMPLETED")
    assert submitted(recipe)[1] == "101"
    assert [job.id for job in jobs_for(Path(prepared.plan.folder)) or []] == ["100"]


def test_another_recipe_for_a_run_that_has_trained_is_refused(cluster: StubQueue, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    prepared, _ = submitted(recipe)
    run = RunDir(prepared.plan.folder)
    submitted(recipe, "optim.lr=0.25")  # nothing was trained yet
    append_row(run.metrics_path, {"event": "train", "step": 1})
    with pytest.raises(UserError, match=r"optim\.lr: was 0\.25, now 0\.5"):
        submitted(recipe, "optim.lr=0.5")
    assert not run.update_path.exists()
    submitted(recipe, "optim.lr=0.5", update=True)
    assert run.update_path.exists(), "the job goes on with changed data as well"
    assert load_recipe(run.recipe_path).recipe.optim.lr == 0.5
    run.mark_finished({})
    with pytest.raises(UserError, match="is finished; choose another --run-dir"):
        submitted(run.path)
    run.stop_path.touch()
    submitted(run.path, update=True)
    assert run.finished is None
    assert not run.stop_path.exists()


def test_a_folder_with_other_files_is_refused(cluster: StubQueue, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files and is not a run"):
        submitted(write_recipe(tmp_path), run_dir=str(tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------------------
# The user's code

OWN = """
name: own
task: classification
data: {name: digits}
model: {name: "net.py:Net"}
batch: {global: 8}
train: {steps: 2}
"""
NET = """
from helper import WIDTH
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(64, WIDTH)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with code, data, secrets and runs."""
    folder = tmp_path / "project"
    for name, text in {
        "recipe.yaml": OWN,
        "net.py": NET,
        "helper.py": "WIDTH = 10\n",
        "layers/__init__.py": "",
        "layers/block.py": "x = 1\n",
        ".env": "WANDB_API_KEY=canary",
        ".netrc": "canary",
        "service-credentials.json": "canary",
        "id_rsa": "canary",
        "data/train.csv": "1,2\n",
        "huge.py": "#" * (1 << 20) + "#\n",
        "runs/old/recipe.yaml": "",
        "runs/old/launch.json": "",
        "runs/old/submit/code/net.py": "old",
        "env/pyvenv.cfg": "",
        "env/lib/x.py": "",
        ".hidden/x.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "outside.py").symlink_to("/etc/passwd")
    return folder


def snapshot_names(folder: Path) -> set[str]:
    snapshot = take_snapshot(load_recipe(folder / "recipe.yaml").recipe)
    return {name.removeprefix("project/") for name in snapshot.files}


def test_the_copy_is_the_code_and_neither_data_nor_secrets(project: Path) -> None:
    assert snapshot_names(project) == {"net.py", "helper.py", "layers/__init__.py", "layers/block.py"}
    snapshot = take_snapshot(load_recipe(project / "recipe.yaml").recipe)
    assert any("huge.py is larger than 1 MiB" in note for note in snapshot.notes)
    assert any("outside.py is a link out of its folder" in note for note in snapshot.notes)


def test_in_a_repository_the_copy_is_what_git_knows_and_new_code(project: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(project), *arguments], check=True, capture_output=True)

    (project / "vocabulary.json").write_text("{}")
    (project / ".gitignore").write_text("ignored.py\nenv/\nruns/\n.hidden/\n")
    (project / "ignored.py").write_text("")
    (project / "new.py").write_text("")
    (project / "notes.txt").write_text("")
    git("init", "-q")
    git("add", "-f", "net.py", "helper.py", "vocabulary.json", ".env", "id_rsa", "service-credentials.json", "data")
    assert snapshot_names(project) == {
        "net.py", "helper.py", "layers/__init__.py", "layers/block.py", "new.py", "vocabulary.json", "data/train.csv",
    }  # fmt: skip


def test_too_much_code_is_none(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(OWN)
    (tmp_path / "net.py").write_text(NET)
    for number in range(5_001):
        (tmp_path / f"m{number}.py").touch()
    with pytest.raises(UserError, match="put the code into a folder of its own"):
        snapshot_names(tmp_path)


def test_a_later_edit_changes_nothing_that_is_queued(cluster: StubQueue, project: Path) -> None:
    prepared, _ = submitted(project / "recipe.yaml")
    run = RunDir(prepared.plan.folder)
    code = run.path / "submit" / "code"
    stored = load_recipe(run.recipe_path).recipe
    assert stored.model.name == f"{code}/project/net.py:Net"
    # for a run that began without the copy, it is the same code
    assert code_of(stored) == code_of(load_recipe(project / "recipe.yaml").recipe)
    assert set(code_of(stored)) == {"net.py", "helper.py"}
    (project / "helper.py").write_text("WIDTH = 11\n")
    (project / "net.py").unlink()
    probe = (
        "from distrain.config.yaml import load_recipe; from distrain.config import resolve_object\n"
        f"made = resolve_object(load_recipe({str(run.recipe_path)!r}).recipe.model.name)()\n"
        "print(made.out_features)"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd="/")
    assert out.stdout.strip() == "10", out.stderr
    assert "canary" not in "".join(p.read_text(errors="replace") for p in run.path.rglob("*") if p.is_file())


def test_other_code_for_a_run_that_has_trained_is_refused(cluster: StubQueue, project: Path) -> None:
    prepared, _ = submitted(project / "recipe.yaml")
    run = RunDir(prepared.plan.folder)
    copy = run.path / "submit" / "code" / "project" / "helper.py"
    append_row(run.metrics_path, {"event": "train", "step": 1})
    submitted(project / "recipe.yaml")  # the same
    (project / "helper.py").write_text("WIDTH = 11\n")
    with pytest.raises(UserError, match=r"started with other code, which differs in project/helper\.py"):
        submitted(project / "recipe.yaml")
    kept, _ = submitted(run.path)  # the run itself goes on with its copy
    assert kept.keeps_code
    assert copy.read_text() == "WIDTH = 10\n"
    submitted(project / "recipe.yaml", update=True)
    assert copy.read_text() == "WIDTH = 11\n"


def test_packages_that_are_not_installed_are_copied(
    cluster: StubQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "elsewhere" / "mypackage"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text(NET.replace("helper", "mypackage.helper"))
    (package / "helper.py").write_text("WIDTH = 10\n")
    (tmp_path / "elsewhere" / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    recipe = write_recipe(tmp_path, OWN.replace("net.py:Net", "mypackage.net:Net"))
    prepared, _ = submitted(recipe)
    code = Path(prepared.plan.folder) / "submit" / "code"
    assert set(copied(code)) == {f"elsewhere/mypackage/{name}.py" for name in ("__init__", "net", "helper")}
    assert prepared.plan.python_path[0] == str(code / "elsewhere")
    again = submitted(RunDir(prepared.plan.folder).path)[0]
    assert str(code / "elsewhere") in again.plan.python_path


def test_a_copy_is_replaced_whole(project: Path, tmp_path: Path) -> None:
    loaded = load_recipe(project / "recipe.yaml")
    code = tmp_path / "copy" / "code"
    write_copy(take_snapshot(loaded.recipe), code)
    assert differences(code, take_snapshot(loaded.recipe)) == []
    (project / "layers" / "block.py").unlink()
    assert differences(code, take_snapshot(loaded.recipe)) == ["project/layers/block.py"]
    write_copy(take_snapshot(loaded.recipe), code)
    assert not (code / "project/layers/block.py").exists()
    assert [path.name for path in code.parent.iterdir()] == ["code"]
    assert moved(loaded, take_snapshot(loaded.recipe), code).recipe.model.name == f"{code}/project/net.py:Net"


# --------------------------------------------------------------------------------------------------------------------
# Sweeps


def test_a_sweep_has_a_run_for_each_combination(cluster: StubQueue, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    arrays = ["optim.lr=1e-3,3e-4", "model.hidden=[16],[32, 8]"]
    prepared, number = submitted(recipe, arrays=arrays, run_dir=str(tmp_path / "sweep"))
    names = [run.path.name for run, _ in prepared.runs]
    assert names == ["0-lr=1e-3_hidden=_16", "1-lr=1e-3_hidden=_32_8", "2-lr=3e-4_hidden=_16", "3-lr=3e-4_hidden=_32_8"]
    for run, loaded in prepared.runs:
        assert load_recipe(run.recipe_path).recipe == loaded.recipe
    assert [loaded.recipe.optim.lr for _, loaded in prepared.runs] == [1e-3, 1e-3, 3e-4, 3e-4]
    assert prepared.runs[1][1].recipe.model.args["hidden"] == [32, 8]
    assert [loaded.recipe.name[-2:] for _, loaded in prepared.runs] == ["-0", "-1", "-2", "-3"]
    assert "#SBATCH --array=0-3\n" in prepared.script
    noted = read_sweep(tmp_path / "sweep")
    assert noted is not None
    assert noted[0]["values"] == {"optim.lr": "1e-3", "model.hidden": "[16]"}
    cluster.update({f"{number}_{task}": Job(f"{number}_{task}", "RUNNING") for task in range(4)})
    assert [job.id for job in jobs_for(prepared.runs[2][0].path) or []] == [f"{number}_2"]
    with pytest.raises(UserError, match="is in the queue already"):
        submitted(recipe, arrays=arrays, run_dir=str(tmp_path / "sweep"))
    cluster.clear()
    submitted(recipe, arrays=arrays, run_dir=str(tmp_path / "sweep"))
    with pytest.raises(UserError, match="is a sweep of 4 runs over other values than these 2"):
        submitted(recipe, arrays=arrays[:1], run_dir=str(tmp_path / "sweep"))


@pytest.mark.parametrize(
    ("arrays", "overrides", "said"),
    [
        (["optim.lr"], [], "expected key=value,value"),
        (["optim.lr="], [], "expected key=value,value"),
        (["optim.lr=1,,2"], [], "expected key=value,value"),
        (["optim.lr=1,1"], [], "is there twice"),
        (["optim.lr=1", "optim.lr=2"], [], "given twice"),
        (["optim.lr=1,2"], ["optim.lr=3"], "one value on the command line"),
        (["name=a,b"], [], "named after the recipe's name"),
        (["seed=" + ",".join(map(str, range(1001)))], [], "more than 1,000 runs"),
        (["optim.lr=1,x"], [], "optim.lr"),
        (["optm.lr=1,2"], [], "did you mean 'optim'"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, arrays: list[str], overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(str(write_recipe(tmp_path)), overrides, Wanted(time="10"), arrays=arrays, run_dir=str(tmp_path / "s"))
    assert said in str(caught.value)


def test_runs_of_a_sweep_have_names_of_their_own(tmp_path: Path) -> None:
    sweep = expand(str(write_recipe(tmp_path)), [], ["seed=" + ",".join(map(str, range(12)))], None)
    assert [run.folder.name for run in sweep.runs][:2] == ["00-seed=0", "01-seed=1"]
    assert len({run.overrides[-1] for run in sweep.runs}) == 12


# --------------------------------------------------------------------------------------------------------------------
# On a node


def test_the_arguments_for_several_machines() -> None:
    several = LaunchPlan(
        Path("/t.py"), ("R",), 2, Path("/c.yaml"), nodes=3, node_rank=1, address="10.0.0.1", port=12345
    )
    assert launch_argv(several) == [
        "--config_file", "/c.yaml", "--num_processes", "6", "--num_machines", "3", "--machine_rank", "1",
        "--rdzv_backend", "static", "--main_process_ip", "10.0.0.1", "--main_process_port", "12345", "/t.py", "R",
    ]  # fmt: skip
    assert configuration_file("zero2", 3).name == "zero2_multinode.yaml"
    assert configuration_file("zero2").name == "zero2.yaml"


def test_a_node_knows_its_rank_from_srun() -> None:
    assert node_rank(1, {}) == 0
    assert node_rank(3, {"SLURM_NODEID": "2"}) == 2
    for told in ({}, {"SLURM_NODEID": "3"}, {"SLURM_NODEID": "x"}):
        with pytest.raises(UserError, match="srun sets it"):
            node_rank(3, told)
    assert job_name({"SLURM_JOB_ID": "17"}) == "17"
    assert job_name({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}) == "17_2"
    assert processes_here("3") == 3


def test_threads_are_the_cpus_over_the_processes() -> None:
    cpus = len(os.sched_getaffinity(0))
    for told, processes, threads in (("1", 1, 1), ("1", 4, 1), (str(cpus), 1, cpus), ("1000", 1, cpus)):
        variables = {"SLURM_CPUS_PER_TASK": told}
        set_environment(variables, processes)
        assert variables["OMP_NUM_THREADS"] == str(threads)
    variables = {"OMP_NUM_THREADS": "7"}
    set_environment(variables, 1)
    assert variables["OMP_NUM_THREADS"] == "7", "what is set already stays"


def test_processes_talk_over_the_interface_that_leads_to_the_first_node() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    variables: dict[str, str] = {}
    set_environment(variables, 1, "127.0.0.1")
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in variables
    variables = {}
    set_environment(variables, 1, "127.0.0.1", "lo")
    assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    with pytest.raises(UserError, match=r"has no network interface 'ib7', it has .*lo"):
        set_environment({}, 1, "", "ib7")


def started_on_port(recipe: str, folder: str, port: int, forked: bool) -> tuple[int, list[str]]:
    """Start the first of two nodes; returns its exit status, and what it started."""
    os.environ |= {"SLURM_JOB_ID": "17", "SLURM_NODEID": "0"}
    create(recipe, [], nodes=2, processes="1", strategy="ddp", offload="auto", run_dir=folder)
    if not forked:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in ("os.fork", "subprocess.Popen") else None)
    return start_node(folder, nodes=2, processes="1", address="127.0.0.1", port=port), started


@pytest.mark.fault(25)
@pytest.mark.parametrize("forked", [True, False])
def test_a_taken_port_is_passed_to_the_batch_script(tmp_path: Path, forked: bool) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path, TINY)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        place = (str(recipe), str(folder), port, forked)
        assert in_world(1, started_on_port, *place, launched=False) == [(1, [])]
    assert (folder / "submit" / "port-taken-17-0").read_text() == f"{port}\n"


def test_temporary_files_are_in_the_scratch_folder_and_go(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "17", "SLURM_NODEID": "1"}
    with scratch_folder(str(tmp_path), variables):
        temporary = Path(variables["TMPDIR"])
        assert temporary == tmp_path / f"distrain-{os.getuid()}" / "job-17-1"
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        (temporary / "x").touch()
        assert Path(variables["TRITON_CACHE_DIR"]).is_relative_to(temporary.parent)
    assert not temporary.exists()
    shutil.rmtree(temporary.parent)
    temporary.parent.mkdir()
    temporary.parent.chmod(0o777)  # as of somebody who waits for what is compiled there
    with pytest.raises(UserError, match="not a folder that only you can write"), scratch_folder(str(tmp_path), {}):
        pass
    with pytest.raises(UserError, match="variables in it must be set there"), scratch_folder("$NOT_SET_X/y", {}):
        pass
    with scratch_folder(None, variables):
        pass


def test_what_slurm_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "sbatch"
    script.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="sbatch refused: invalid partition specified: x"):
        queue.sbatch(tmp_path / "x")
    script.write_text('#!/bin/sh\nenv > "$0.env"; echo "$@" > "$0.args"; echo "123;cluster"\n')
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert queue.sbatch(tmp_path / "x") == "123"
    assert (tmp_path / "sbatch.args").read_text() == f"--parsable --export=ALL {tmp_path}/x\n"
    assert "canary" not in (tmp_path / "sbatch.env").read_text()


def test_a_jobs_time_is_read() -> None:
    for elapsed, seconds in (("0:05", 5), ("1:02:03", 3723), ("2-01:00:00", 176400), ("", None), ("INVALID", None)):
        assert Job("1", "RUNNING", elapsed=elapsed).elapsed_s == seconds
