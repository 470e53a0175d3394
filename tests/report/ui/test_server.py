"""The server of `distrain ui`: who may ask, what can be read, and that nothing is written."""

from __future__ import annotations

import http.client
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import MadeRun
from serving import serving

from distrain.config import UserError
from distrain.report.ui.runs import READ
from distrain.report.ui.server import STATIC, Server
from distrain.run.json_files import append_row

SECRET = "hunter2-of-another-folder"


def ask(server: Server, path: str, method: str = "GET", **headers: str | None) -> tuple[int, str, dict[str, str]]:
    """Return the status, body and headers of an answer; the cookie is sent along unless given otherwise."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
    sent = {"Host": "127.0.0.1", "Cookie": f"{server.cookie}={server.token}"}
    sent |= {key.replace("_", "-"): value for key, value in headers.items()}  # type: ignore[misc]
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for key, value in sent.items():
        if value is not None:
            connection.putheader(key, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def got(server: Server, path: str) -> Any:
    status, body, _ = ask(server, path)
    assert status == 200, body
    return json.loads(body)


def ids(server: Server) -> dict[str, str]:
    server.runs.look()
    return {each["name"]: each["id"] for each in server.runs.since(0)["runs"]}


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    run = MadeRun(tmp_path / "runs" / "one", steps=100)
    run.attempt()
    run.train(60)
    run.beat()
    run.log("first\nsecond \x1b[2J\u202e\nunfinished")
    return run


def every_answer(server: Server, run: str) -> list[str]:
    """Return all that is said of a run."""
    paths = [f"/api/{what}?run={run}" for what in ("run", "history", "ranks", "checkpoints", "compare")]
    paths += [f"/api/log?run={run}&which={which}" for which in ("0", "job")]
    paths += [f"/api/curves?line={run}:train/loss"]
    return [ask(server, path)[1] for path in paths]


def test_only_who_has_the_address_is_answered(made: MadeRun) -> None:
    with serving(made.run.path.parent) as server:
        run = ids(server)["one"]
        paths = ["/", "/static/main.js", "/events", f"/api/run?run={run}", "/nothing"]
        for cookie in (None, f"{server.cookie}=wrong", f"other={server.token}", f"{server.cookie}=\xe9", "a=;;="):
            assert {ask(server, path, Cookie=cookie)[0] for path in paths} == {403}
        assert ask(server, "/?token=wrong", Cookie=None)[0] == 403
        status, _, headers = ask(server, server.address.removeprefix(f"http://127.0.0.1:{server.server_address[1]}"))
        assert (status, headers["Location"]) == (303, "/")
        assert re.fullmatch(rf"{server.cookie}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Strict", headers["Set-Cookie"])
        status, body, headers = ask(server, "/", Cookie=headers["Set-Cookie"].partition(";")[0])
        assert status == 200
        assert "<main" in body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert server.token not in body
    assert server.server_address[0] == "127.0.0.1"
    with serving(made.run.path.parent) as other:
        assert other.token != server.token


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "", None, "127.0.0.2"])
def test_a_name_that_comes_to_mean_this_machine_gets_nothing(made: MadeRun, host: str | None) -> None:
    with serving(made.run.path.parent) as server:
        assert ask(server, "/", Host=host)[0] == 421
        assert ask(server, f"/?token={server.token}", Host=host)[0] == 421
        assert ask(server, "/", Host="localhost:8000")[0] == 200  # by way of a tunnel


def test_other_sites_and_other_methods_are_refused(made: MadeRun) -> None:
    with serving(made.run.path.parent) as server:
        for site in ("cross-site", "same-site"):
            assert ask(server, "/api/run", Sec_Fetch_Site=site)[0] == 403
        assert ask(server, "/", Sec_Fetch_Site="same-origin")[0] == 200
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            assert ask(server, "/", method)[0] == 501


@pytest.mark.parametrize(
    "path",
    ["/static/../server.py", "/static/%2e%2e/server.py", "//etc/passwd", "/static/vendor", "/static/", "/api/",
     "/api/run",
     "/api/run?run=../one", "/api/run?run=/etc", "/api/run?run=ID&run=ID", "/api/log?run=ID&which=../../x",
     "/api/log?run=ID&which=-1", "/api/log?run=ID&which=0&begin=-1", "/api/curves?line=ID:a&points=nan",
     "/api/curves?line=ID:a&from=inf", "/api/curves?line=../x:a", "/api/log?run=ID&which=99"],
)  # fmt: skip
def test_what_is_not_there_is_refused(made: MadeRun, path: str) -> None:
    with serving(made.run.path.parent) as server:
        status, body, _ = ask(server, path.replace("ID", ids(server)["one"]))
        assert status in (400, 404)
        assert "Traceback" not in body


def test_every_answer_has_the_policy_and_no_run_is_changed(made: MadeRun) -> None:
    def tree() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in made.run.path.rglob("*")}

    before = tree()
    with serving(made.run.path.parent) as server:
        run = ids(server)["one"]
        answers = [ask(server, path) for path in ("/", "/static/main.js", f"/api/run?run={run}", "/nothing")]
        assert all("script-src 'self'" in headers["Content-Security-Policy"] for _, _, headers in answers)
        assert all(headers["X-Content-Type-Options"] == "nosniff" for _, _, headers in answers)
        assert len(every_answer(server, run)) == 8
    assert tree() == before


def lead_out(run: Path, what: str, secret: Path) -> None:
    """Make a file, or a file in a folder, of a run a link to `secret`."""
    path = run / what
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path = path / "rank-0.json"
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


@pytest.mark.parametrize("what", ["metrics.jsonl", "recipe.yaml", "heartbeat", "FAILED.json", "submit/slurm-1.log"])
def test_nothing_outside_the_folder_is_read_by_way_of_a_link(made: MadeRun, what: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"event": SECRET, "step": 1, "message": SECRET, "error": SECRET}) + "\n")
    lead_out(made.run.path, what, secret)
    with serving(made.run.path.parent) as server:
        run = ids(server)["one"]
        found = server.runs.since(0)["runs"][0]
        assert found["state"] == "outside"
        assert "leads out of" in found["message"]
        said = [*every_answer(server, run), json.dumps(server.runs.since(0))]
        assert not [each for each in said if SECRET in each]


def test_folders_logs_and_sweeps_that_lead_out_are_not_read(made: MadeRun, tmp_path: Path) -> None:
    other = MadeRun(tmp_path / "elsewhere", name=SECRET)
    other.log(SECRET)
    runs = made.run.path.parent
    (runs / "link").symlink_to(other.run.path)
    (runs / "sweep").mkdir()
    values = {"folder": "../../elsewhere", "values": {}}
    (runs / "sweep" / "sweep.json").write_text(
        json.dumps({"name": "s", "best": None, "search": None, "runs": [values]})
    )
    made.run.log_path(1).symlink_to(other.run.log_path(0))
    os.mkfifo(made.run.log_path(2))
    with serving(runs) as server:
        known = ids(server)
        assert len(known) == 3
        said = [answer for run in known.values() for answer in every_answer(server, run)]
        said += [ask(server, f"/api/log?run={known['one']}&which={rank}")[1] for rank in (1, 2)]
        assert "leads out of" in said[-2]
        assert "not a regular file" in said[-1]
        assert not [each for each in [*said, json.dumps(server.runs.since(0))] if SECRET in each]
        assert "first" in ask(server, f"/api/log?run={known['one']}&which=0")[1]
    # a folder that is itself reached by a link is shown
    (tmp_path / "shown").symlink_to(runs)
    with serving(tmp_path / "shown") as server:
        assert "first" in ask(server, f"/api/log?run={ids(server)['one']}&which=0")[1]


def test_a_log_is_read_from_its_end_further_and_back(made: MadeRun) -> None:
    with serving(made.run.path.parent) as server:
        log = f"/api/log?run={ids(server)['one']}&which=0"
        found = got(server, log)
        assert found["text"] == "first\nsecond \\x1b[2J\\u202e\n"
        made.log(" now\nmore\n")
        assert got(server, f"{log}&begin={found['end']}")["text"] == "unfinished now\nmore\n"
        lines = "".join(f"{'x' * 50} {index}\n" for index in range(5000))
        made.log(lines)
        last = got(server, log)
        assert 60_000 < len(last["text"]) <= 65_536
        assert last["text"].endswith(" 4999\n")
        assert last["text"].startswith("x" * 50)
        before = got(server, f"{log}&end={last['begin']}")
        assert lines.endswith(before["text"] + last["text"])
        made.run.log_path(0).write_text("anew\n")
        assert got(server, f"{log}&begin={last['end']}")["text"] == "anew\n"


def test_runs_curves_and_what_differs(made: MadeRun) -> None:
    other = MadeRun(made.run.path.parent / "two", lr=3e-3, steps=100)
    other.train()
    other.finish()
    append_row(other.run.metrics_path, {"event": "anomaly", "step": 100, "what": "spike"})
    with serving(made.run.path.parent) as server:
        known = ids(server)
        states = {each["name"]: (each["state"], each["step"]) for each in server.runs.since(0)["runs"]}
        assert states == {"one": ("running", 60), "two": ("finished", 100)}
        query = "&".join(f"line={run}:train/loss" for run in known.values())
        for _ in range(200):  # reading goes on behind the answers
            found = got(server, f"/api/curves?points=400&{query}")
            if not found["pending"]:
                break
        assert found["x"] == list(range(1, 101))
        assert [(each["run"], len(each["y"])) for each in found["lines"]] == [(known["one"], 60), (known["two"], 100)]
        assert len(got(server, f"/api/curves?points=20&{query}")["x"]) <= 22
        assert max(got(server, f"/api/curves?by=hours&{query}")["x"]) < 24
        compared = got(server, f"/api/compare?run={known['one']}&run={known['two']}")
        differ = {each["key"]: each["values"] for each in compared["differ"]}
        assert differ == {"optim.lr": ["0.001", "0.003"]}
        happened = got(server, f"/api/history?run={known['two']}")
        assert [each["event"] for each in happened["events"]] == ["anomaly"]
        assert {"train/loss", "valid/accuracy"} <= set(happened["names"])
        ranks = got(server, f"/api/ranks?run={known['one']}")["ranks"]
        assert [each["rank"] for each in ranks] == [0, 1]
        assert ranks[0]["work"]["data"] == pytest.approx(0.01)
        # what changes is sent alone
        version = server.runs.since(0)["version"]
        server.runs.look()
        assert server.runs.since(version)["runs"] == []
        made.train(10)
        made.beat()
        server.runs.look()
        assert [each["step"] for each in server.runs.since(version)["runs"]] == [70]


def test_events_say_what_changes_while_the_page_is_open(made: MadeRun) -> None:
    with serving(made.run.path.parent) as server:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
        connection.request("GET", "/events", headers={"Cookie": f"{server.cookie}={server.token}"})
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"

        def change() -> Any:
            while not (line := answer.readline()).startswith(b"data: "):
                assert line
            return json.loads(line.removeprefix(b"data: "))

        first = change()
        assert [each["step"] for each in first["runs"]] == [60]
        made.train(5)
        made.beat()
        while not any(each["step"] == 65 for each in first["runs"]):
            first = change()
        connection.close()


def test_a_folder_that_is_not_there_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        Server(tmp_path / "none")
    with serving(tmp_path) as server, pytest.raises(UserError, match="choose another --port"):
        Server(tmp_path, server.server_address[1])


def test_the_page_parses_no_text_as_html() -> None:
    sources = [path for path in STATIC.rglob("*.js") if "vendor" not in path.parts]
    assert len(sources) > 5
    for path in [*sources, STATIC / "index.html"]:
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?:|\bon\w+=\"", path.read_text()
        )
        assert not found, f"{path.name}: {found}"
    assert (STATIC / "vendor" / "LICENSE-uPlot.txt").read_text().startswith("The MIT License")
    assert "metrics.jsonl" in READ
