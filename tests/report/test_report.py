"""A report of runs: what it holds, and that it is one file which runs nothing of what a run says."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from runs import TINY, train, write_recipe
from typer.testing import CliRunner

from distrain.checkpoint import criterion_of
from distrain.cli.main import app
from distrain.config import UserError, registry
from distrain.config.yaml import parse_recipe
from distrain.launchers.worker import ends_here, write_report
from distrain.metrics import decides_best
from distrain.report.contents import Report, build_report, labels
from distrain.report.curves import panels_of
from distrain.report.differences import comparison_lines
from distrain.report.history import History
from distrain.report.html import render
from distrain.report.html.charts import log_ticks, nice_ticks, tick_label
from distrain.report.markdown import render as as_markdown
from distrain.run.folder import Launch, RunDir
from distrain.run.json_files import append_row
from distrain.system.terminal import Console

HOSTILE = "</script><script>hacked=1</script><img src=//evil.example/x onerror=hacked=1>`|*\x1b[31m"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 5 and resumed, with `log.report`; stopped.html is what it wrote first."""
    folder = tmp_path_factory.mktemp("runs")
    recipe, run = write_recipe(folder), folder / "resumed"
    train(1, recipe, run, "optim.lr=0.02", "log.report=true", stop_after=5)
    (run / "report.html").rename(run / "stopped.html")
    [ended] = train(1, recipe, run, "optim.lr=0.02", "log.report=true")
    assert f"wrote {run / 'report.html'}" in ended.out + ended.err
    return run


def made(folder: Path, rows: list[dict[str, Any]], text: str = TINY) -> Path:
    """Make a run with these rows, without training it."""
    RunDir(folder).create(text, Launch.describe(1, "single", argv=["distrain", "train", "x.yaml"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"event": "train", "step": step, "time": 1e9 + step, "loss": 2 / step, **more} for step in range(1, count + 1)
    ]


class Page(HTMLParser):
    """The elements of a page, and what they refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


# --------------------------------------------------------------------------------------------------------------------
# What it holds


def test_a_report_holds_what_the_run_did(resumed: Path) -> None:
    report = build_report([resumed])
    [run] = report.runs
    at = RunDir(resumed).attempts()[1]["step"]
    assert 5 <= at < 12
    assert [(part.step, part.kept, part.ended) for part in run.attempts] == [
        (0, at, f"interrupted; resumed from step {at}"),
        (at, 12, "finished"),
    ]
    assert run.restarts == [at]
    assert {share.name for share in run.run_time} >= {"steps that the run has", "idle between attempts"}
    assert abs(sum(share.share for share in run.run_time) - 1) < 1e-9
    assert run.checkpoints == sorted({4, at, 8, 12})
    origins = {row.key: (row.value, row.origin) for row in run.recipe}
    assert origins["optim.lr"] == ("0.02", "command line")
    assert origins["data.workers"] == ("0", "default")
    assert re.fullmatch(r".*recipe\.yaml:\d+", origins["batch.global"][1])
    panels = {panel.title: panel for panel in run.panels}
    curves = {curve.name: (curve.steps, curve.values) for curve in panels["Loss"].curves}
    there = History(resumed).series("train/loss")
    assert curves["train"][0] == list(range(1, 13))
    np.testing.assert_allclose(np.array(curves["train"][1], float), there.values, rtol=1e-5)
    assert curves["valid"][0] == [4, 8, 12]
    assert {"accuracy", "Learning rate", "Gradient norm", "Throughput", "Time of a step"} <= panels.keys()
    assert abs(sum(share.share for share in run.step_time) - 1) < 1e-9
    [test] = [each for each in run.results if each["split"] == "test"]
    assert test["values"]["accuracy"] == (RunDir(resumed).finished or {})["test"]["accuracy"]
    assert {fact.name: fact.value for fact in run.headline}["restarts"] == "1"
    command = run.reproduce[0].split()
    assert command[:3] == ["distrain", "train", str(resumed / "recipe.yaml")]


def test_json_markdown_and_html_say_the_same(resumed: Path) -> None:
    report = build_report([resumed])
    told = json.loads(json.dumps(report.to_json()))
    assert told["runs"][0]["attempts"][1]["reached"] == 12
    page, text = render(report), as_markdown(report)
    for said in ("interrupted; resumed from step", "command line"):
        assert said in page
        assert said in text
    assert page.count("<path class=restart d=") == 1 + sum(panel.marks for panel in report.runs[0].panels)


@pytest.mark.parametrize(
    ("rows", "titles"),
    [([], []), (train_rows(1), []), (train_rows(2), ["Loss"]), (train_rows(3, loss="nan"), [])],
    ids=["no row", "one row", "two rows", "nothing finite"],
)
def test_no_chart_is_empty(rows: list[dict[str, Any]], titles: list[str], tmp_path: Path) -> None:
    run = made(tmp_path / "run", rows)
    report = build_report([run])
    assert [panel.title for panel in report.runs[0].panels] == titles
    assert Page(render(report)).tags.count("figure") == len(titles)


def test_a_recipe_that_cannot_be_read_is_shown_with_its_problem(tmp_path: Path) -> None:
    run = made(tmp_path / "run", train_rows(3), TINY)
    (run / "recipe.yaml").write_text(TINY.replace("task: classification", "task: <b>none</b>"))
    with_problem = build_report([run]).runs[0]
    assert with_problem.recipe == []
    assert "none" in (with_problem.recipe_problem or "")
    assert "task: &lt;b&gt;none&lt;/b&gt;" in render(build_report([run]))


def test_the_size_of_a_report_does_not_grow_with_the_run(tmp_path: Path) -> None:
    steps = 8_000
    rows = train_rows(steps, lr=0.1, grad_norm=1.0, samples_per_s=10.0)
    rows[5_123]["loss"] = 777.25
    history = History(made(tmp_path / "run", rows))
    loss = next(panel for panel in panels_of(history, 600) if panel.title == "Loss").curves[0]
    assert len(loss.steps) <= 600
    assert max(value for value in loss.values if value is not None) == 777.25  # what stands out is kept
    assert loss.trend is not None
    assert max(loss.trend[1]) < 1
    assert len(render(build_report([tmp_path / "run"]))) < 200_000


# --------------------------------------------------------------------------------------------------------------------
# One file, which runs nothing of what a run says


def examined(name: str = "cat") -> dict[str, Any]:
    """What `distrain.inference.examine` returns, with a name in every place where a run can put one."""
    sample = {
        "row": 3, "loss": 1.5, "keys": {"file": name}, "prediction": name, "target": name, "confidence": 0.5,
        "right": False, "text": name, "picture": f"data:image/png;base64,x{name}", "features": [[name, name]],
    }  # fmt: skip
    rates = {"precision": 0.5, "recall": None, "f1": 0.5}
    return {
        "split": name, "checkpoint": name, "task": name, "samples": 4, "of": 8, "notes": [name],
        "classes": [name, "b"], "confusion": [[1, 1], [0, 2]],
        "confused": [{"true": name, "predicted": "b", "count": 1}],
        "per_class": [{"name": name, "support": 2, "predicted": 1, **rates}],
        "calibration": {
            "bins": [{"low": 0.4, "high": 0.5, "count": 4, "confidence": 0.45, "accuracy": 1.0}], "error": 0.1,
        },
        "scatter": {"target": [0.0, 1.0], "prediction": [0.5, 0.75], "numbers": {name: 1.0}},
        "worst": [sample], "best": [sample], "generations": [{"prompt": name, "text": name, "reference": name}],
    }  # fmt: skip


def report_with(name: str, folder: Path) -> Report:
    """A report of a run in which everything that has a name has this one."""
    rows = [
        *train_rows(3, **{name: 1.0}),
        *({"event": "eval", "step": step, "time": 1e9, "split": name, "loss": 1.0, name: 0.5} for step in (1, 2, 3)),
        {"event": name, "step": 2, "what": name},
    ]
    run = made(folder, rows)
    RunDir(run).mark_failed({"message": name, "traceback": f"{name}\n{name}", "rank": 0})
    (run / "attempts.jsonl").write_text(
        json.dumps({"host": name, "time": 1e9, "step": 0, "strategy": name, "job": name})
    )
    with (run / "attempts.jsonl").open("a") as file:
        file.write("\n")
    launch = json.loads((run / "launch.json").read_text())
    launch |= {"argv": ["distrain", name], "host": name, "commit": name, "versions": {name: name}}
    (run / "launch.json").write_text(json.dumps(launch))
    RunDir(run).record_effect(
        {"device": name, "precision": name, "total_steps": 3, "compile": {"on": False, "why": name}}
    )
    RunDir(run).record_inputs({"splits": {name: 4}, "data": {name: [1, name]}})
    report = build_report([run], [(examined(name), "")])
    return replace(report, title=name, runs=[replace(report.runs[0], name=name, reproduce=[name])])


def test_a_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    text = render(report_with("cat", tmp_path / "run"))
    page = Page(text)
    for name, value in page.attributes:
        assert not name.startswith("on"), f"{name}={value}"
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "url(" not in text
    assert "@import" not in text
    [policy] = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    assert f"sha256-{base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()}" in policy


def test_nothing_that_a_run_says_is_markup(tmp_path: Path) -> None:
    harmless, hostile = (
        Page(render(report_with(name, tmp_path / f"run{place}"))) for place, name in enumerate(("cat", HOSTILE))
    )
    assert [tag for tag in hostile.tags if tag != "img"] == [tag for tag in harmless.tags if tag != "img"]
    assert {name for name, _ in hostile.attributes} <= {name for name, _ in harmless.attributes} | {"title"}
    assert "img" not in hostile.tags  # a picture that is no PNG in base64 is not shown
    raw = render(report_with(HOSTILE, tmp_path / "raw"))
    assert HOSTILE not in raw
    assert "\x1b" not in raw
    assert "<script>hacked" not in raw
    text = as_markdown(report_with(HOSTILE, tmp_path / "text"))
    assert not [line for line in text.splitlines() if re.search(r"(?<![\\`])<(script|img)", line) and "`" not in line]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", line)) >= 4 for line in tables)


def test_in_a_browser_a_hostile_report_is_quiet_and_fits(tmp_path: Path, browser: Browser) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(report_with(HOSTILE, tmp_path / "run")), encoding="utf-8")
    page = browser.open(path, width=480, dark=True)
    assert page.evaluate("typeof hacked") == "undefined"
    assert [each["url"] for each in page.requests] == [path.as_uri()]
    assert page.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    shown = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shown)
    page.click("#theme")
    assert page.evaluate(shown) != dark
    over = "document.querySelector('.plot').dispatchEvent(new PointerEvent('pointermove', {clientX: 240}))"
    page.evaluate(over)
    assert "at step" in page.evaluate("document.querySelector('.tip').textContent")


# --------------------------------------------------------------------------------------------------------------------
# Several runs


def test_runs_are_compared_by_what_differs_and_what_came_out(resumed: Path, tmp_path: Path) -> None:
    rows = [
        *train_rows(20),
        *({"event": "eval", "step": s, "split": "valid", "loss": 9.0, "accuracy": 0.25, "time": 1e9} for s in (4, 8)),
    ]
    other = made(tmp_path / "other", rows, TINY.replace("[16]", "[32]"))
    report = build_report([resumed, other])
    found = report.comparison
    assert found is not None
    assert found.runs == ["resumed", "other"]
    differing = {each.key: each.values for each in found.differences}
    assert differing["model.hidden"] == ["[16]", "[32]"]
    assert differing["optim.lr"] == ["0.02", "0.01"]
    assert "batch.global" not in differing
    outcomes = {each.name: each for each in found.outcomes}
    assert outcomes["best loss"].best == [0]  # 9.0 is worse
    assert outcomes["steps"].values == [12, 20]
    assert outcomes["test accuracy"].values[1] is None
    assert outcomes["test accuracy"].best == [], "of one alone none is the best"
    assert [panel.title for panel in report.panels][:2] == ["Training loss", "valid loss"]
    assert [curve.name for curve in report.panels[0].curves] == ["resumed", "other"]
    page = Page(render(report))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("count", [2, 9])
def test_a_comparison_fits_a_terminal_of_80_columns(count: int, tmp_path: Path) -> None:
    folders = [
        made(tmp_path / f"run-with-a-long-name-{place}", train_rows(5), TINY.replace("1.0e-2", f"{place + 1}.0e-2"))
        for place in range(count)
    ]
    found = build_report(folders).comparison
    assert found is not None
    with (tmp_path / "out").open("w+") as file:
        console = Console(file=file, width=80)
        for each in comparison_lines(found, console.holds):
            console.print(each)
        file.seek(0)
        shown = file.read()
    assert max(map(len, shown.splitlines())) <= 80
    for place in range(count):
        assert f"run-with-a-long-name-{place}" in shown
        assert f"{(place + 1) / 100:g}" in shown


def test_runs_are_named_by_the_parts_of_their_paths_that_differ() -> None:
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/1/x"), Path("/a/2/x")]) == ["1/x", "2/x"]


# --------------------------------------------------------------------------------------------------------------------
# The commands


def invoked(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["-o", "x.html"], b"<!doctype html>"),
        (["-o", "x.md"], b"# tiny"),
        (["--json", "-o", "x.json"], b"{"),
        (["-o", "x.png"], b"\x89PNG"),
    ],
)
def test_a_report_is_written_as_its_name_says(
    options: list[str], begins: bytes, resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoked("report", resumed, *options).startswith("wrote x.")
    assert (tmp_path / options[-1]).read_bytes().startswith(begins)


def test_what_is_printed_can_be_read_by_programs(resumed: Path, tmp_path: Path) -> None:
    assert json.loads(invoked("report", resumed, "--json"))["runs"][0]["name"] == "tiny"
    other = made(tmp_path / "other", train_rows(3))
    found = json.loads(invoked("compare", resumed, other, "--json"))
    assert {each["key"] for each in found["differences"]} >= {"optim.lr"}
    assert "optim.lr" in invoked("compare", resumed, other)


# --------------------------------------------------------------------------------------------------------------------
# At the end of a run


def test_a_run_that_has_ended_has_the_report_that_the_command_writes(resumed: Path, tmp_path: Path) -> None:
    def page(path: Path) -> str:
        return re.sub(r"<footer>Written.*", "", path.read_text())

    invoked("report", resumed, "-o", tmp_path / "again.html")
    assert page(resumed / "report.html") == page(tmp_path / "again.html")
    assert f"by SIGTERM after step {RunDir(resumed).attempts()[1]['step']}" in page(resumed / "stopped.html")


@pytest.mark.parametrize("damage", ["report.html/", "metrics.jsonl/", "no recipe.yaml"])
def test_a_report_that_cannot_be_written_is_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = made(tmp_path / "run", train_rows(3))
    name = damage.removeprefix("no ").removesuffix("/")
    (run / name).unlink(missing_ok=True)
    if damage.endswith("/"):
        (run / name).mkdir()
    write_report(RunDir(run))
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.message.startswith("log.report: the report could not be written: ")
    assert warning.message.endswith(f"`distrain report {run}` writes it")


@pytest.mark.parametrize(
    ("marks", "job", "ends"),
    [
        ("FINISHED", True, True), ("PREEMPTED", False, True), ("PREEMPTED", True, False),
        ("PREEMPTED STOP", True, True), ("FAILED.json", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_a_run_that_a_queue_starts_again_has_not_ended(
    marks: str, job: bool, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run", [])
    for name in marks.split():
        (run / name).write_text("{}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert ends_here(RunDir(run)) == ends


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["report", "RUN", "-o", "x.pdf"], "expected one of .html"),
        (["report", "RUN", "-o", "x.html", "--png"], "asks for another"),
        (["report", "RUN", "--md", "--json"], "name one"),
        (["report", "RUN", "--split", "dev"], "expected one of train, valid, test"),
        (["report", "EMPTY"], "is no run folder and holds none"),
        (["report", "NONE"], "there is no folder"),
        (["compare", "RUN"], "is one run; name another"),
    ],
)
def test_what_cannot_be_reported_is_said(arguments: list[str], problem: str, resumed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(resumed), "EMPTY": str(tmp_path / "empty"), "NONE": str(tmp_path / "none")}
    with pytest.raises(UserError, match=re.escape(problem)):
        invoked(*(places.get(each, each) for each in arguments))


def test_hours_are_those_of_each_attempts_processes(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", [{**row, "time": 1000.0 + row["step"]} for row in train_rows(9)])
    for began, step, processes in ((1000.0, 0, 1), (5000.0, 9, 4)):
        about = {"time": began, "step": step, "processes": processes, "token": str(processes)}
        append_row(folder / "attempts.jsonl", about)
        append_row(
            folder / "attempts.jsonl", {"event": "ended", "steps": 9, "phases": {}} | about | {"time": began + 3600}
        )
    [time] = [fact for fact in build_report([folder]).runs[0].headline if fact.name == "time"]
    assert (time.value, time.note) == ("2h00m", "5 process hours on 1 or 4")


def test_runs_of_a_sweep_that_have_not_begun_are_left_out(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name in ("0", "1"):
        made(sweep / name, train_rows(3))
    runs = [{"folder": name, "values": {"seed": name}} for name in ("0", "1", "2")]
    (sweep / "sweep.json").write_text(json.dumps({"name": "sweep", "runs": runs}))
    assert json.loads(invoked("compare", str(sweep), "--json"))["runs"] == ["0", "1"]
    shown = CliRunner().invoke(app, ["report", str(sweep), "--json"])
    assert [each["name"] for each in json.loads(shown.stdout)["runs"]] == ["tiny", "tiny"]
    assert f"1 of the 3 runs of {sweep} has not begun" in shown.stderr


# --------------------------------------------------------------------------------------------------------------------
# Axes


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.92, 1.0), (0, 394), (3e-9, 4e-9), (-5, 1e7), (0.0029, 0.0031)])
def test_ticks_are_round_and_told_apart(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-9 * abs(high) <= ticks[0] < ticks[-1] <= high + 1e-9 * abs(high)
    gaps = np.diff(ticks)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
    told = [tick_label(tick, ticks) for tick in ticks]
    assert len(set(told)) == len(told)
    assert max(map(len, told)) <= 7


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.005, 2, ["0.01", "0.1", "1"]),
        (1e-6, 1, ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]),
        (2, 150, ["10", "100"]),
        (1.5, 40, ["2", "5", "10", "20"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, told: list[str]) -> None:
    ticks = log_ticks(low, high)
    assert [tick_label(tick, ticks, log=True) for tick in ticks] == told


@pytest.mark.parametrize(
    ("best", "higher"),
    [("null", False), ("loss", False), ("-loss", False), ("accuracy", True), ("-error", False), ("mae", False)],
)
def test_a_run_without_checkpoints_is_ranked_as_its_recipe_says(tmp_path: Path, best: str, higher: bool) -> None:
    text = re.sub(r"^eval:.*\n", "", TINY, flags=re.MULTILINE) + f"eval: {{best: {best}}}\n"
    made(tmp_path / "run", [], text)
    found = criterion_of(tmp_path / "run/checkpoints")
    assert found is not None
    assert (found.metric, found.higher) == ("loss" if best == "null" else best.removeprefix("-"), higher)


def test_a_run_without_checkpoints_is_ranked_as_its_metrics_say(tmp_path: Path) -> None:
    seen = {}
    for task in ("classification", "regression", "language_modeling"):
        for name in registry.metrics.names():
            text = re.sub(r"^eval:.*\n", "", TINY, flags=re.MULTILINE).replace("classification", task)
            text += f"eval: {{metrics: [{name}], best: {name}}}\n"
            try:
                said = decides_best(parse_recipe(text, "recipe.yaml"))
            except UserError:
                continue  # not of this task, or not one number
            run = tmp_path / task / name
            made(run, [], text)
            found = criterion_of(run / "checkpoints")
            assert found is not None
            assert (found.metric, found.higher) == said, name
            seen[name] = found.higher
    assert {*seen.values()} == {True, False}
    assert {"accuracy", "mae", "perplexity"} <= {*seen}
