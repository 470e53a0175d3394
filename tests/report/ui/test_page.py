"""The page of `distrain ui` in a real browser: what it shows, that it is live, and that texts of runs stay texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from made_runs import MadeRun
from serving import serving

from distrain.report.ui.server import Server

HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=2</script>\"'`${window.hacked=3}"


def page_of(browser: Browser, server: Server, **options: Any) -> Page:
    page = browser.open(server.address, **options)
    page.wait_for("document.querySelectorAll('.table tbody tr').length > 0")
    return page


def rows(page: Page) -> list[str]:
    return page.evaluate(
        "[...document.querySelectorAll('.table tbody tr')].map(row => row.innerText.replace(/\\s+/g, ' '))"
    )


def assert_sound(page: Page, server: Server) -> None:
    """Nothing was complained of, and nothing asked for but from this server."""
    assert page.said == []
    origin = f"http://127.0.0.1:{server.server_address[1]}/"
    asked = [request["url"] for request in page.requests if not request["url"].startswith("data:")]
    assert asked
    assert all(url.startswith(origin) for url in asked), asked
    assert not [request for request in page.requests if request.get("status", 200) >= 400]


@pytest.fixture
def runs(tmp_path: Path) -> list[MadeRun]:
    found = [
        MadeRun(tmp_path / "runs" / f"run-{index}", steps=5000, seed=index, lr=1e-3 * (1 + index)) for index in range(3)
    ]
    for run in found:
        run.attempt()
        run.train(2000)
        run.log(f"hello from {run.run.path.name}\n")
    found[0].attempt(1000)
    found[0].beat()
    found[1].train()
    found[1].finish()
    found[2].run.mark_failed({"rank": 1, "error": "ValueError", "message": "the loss is NaN"})
    return found


@pytest.fixture
def server(runs: list[MadeRun]) -> Iterator[Server]:
    with serving(runs[0].run.path.parent) as found:
        yield found


def test_the_list_is_filtered_sorted_and_live(browser: Browser, server: Server, runs: list[MadeRun]) -> None:
    page = page_of(browser, server)
    assert page.evaluate("location.href").endswith("/#/") or "token" not in page.evaluate("location.href")
    first = rows(page)
    assert [line.split()[0] for line in first] == ["run-0", "run-1", "run-2"]
    assert "running" in first[0]
    assert "2,000 / 5,000" in first[0]
    assert "finished" in first[1]
    assert "the loss is NaN" in first[2]
    # with the keyboard alone: the filter is the first thing to write into, then the states, then the heads
    page.evaluate("document.querySelector('input[type=search]').focus()")
    page.write("fail")
    page.wait_for("document.querySelectorAll('.table tbody tr').length === 1")
    page.evaluate("document.querySelector('input[type=search]').select()")
    page.write("run")
    page.wait_for("document.querySelectorAll('.table tbody tr').length === 3")
    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "running 1"
    page.press("Enter")
    page.wait_for("document.querySelectorAll('.table tbody tr').length === 1")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('.table tbody tr').length === 3")
    page.click("th.is-loss button")
    page.press("Enter")
    page.wait_for("document.querySelector('th.is-loss').getAttribute('aria-sort') === 'ascending'")
    assert page.evaluate("document.querySelector('tbody a').textContent") == "run-1"
    # what is trained meanwhile comes by itself
    runs[0].train(500)
    runs[0].beat()
    page.wait_for("document.body.innerText.includes('2,500 / 5,000')")
    assert_sound(page, server)
    page.close()


def test_curves_of_a_run_grow_and_are_looked_at_closer(browser: Browser, server: Server, runs: list[MadeRun]) -> None:
    page = page_of(browser, server, width=900)
    page.click("tbody a")
    page.wait_for("document.querySelectorAll('.chart canvas').length >= 2")
    titles = page.evaluate("[...document.querySelectorAll('.chart h3')].map(title => title.textContent)")
    assert titles[:2] == ["loss", "accuracy"]
    assert {"lr", "grad_norm", "samples_per_s", "time of a step (s)"} <= set(titles)
    chart = "document.querySelector('.chart').chart"
    found = page.wait_for(f"{chart}.plot && {chart}.found.lines.length === 2 && {chart}.found")
    assert [line["name"] for line in found["lines"]] == ["train/loss", "valid/loss"]
    assert len(found["x"]) <= 1202
    assert page.evaluate(f"{chart}.plot.scales.x.max") == 2000
    assert page.evaluate(f"{chart}.marks('step').starts") == [1000]
    runs[0].train(1000)
    page.wait_for(f"{chart}.plot.scales.x.max === 3000")
    # closer by the keyboard: every step is there then
    page.evaluate("document.querySelector('.plot').focus()")
    for _ in range(5):
        page.press("+")
    page.wait_for(f"{chart}.found.x.length < 200")
    assert page.evaluate(f"{chart}.found.lines[0].y.length") > 90
    page.press("ArrowRight")
    assert "train" in page.evaluate("document.querySelector('.readout').textContent")
    page.press("0")
    page.wait_for(f"{chart}.plot.scales.x.max === 3000")
    # each part of the page
    shown = {
        "ranks": "node1",
        "log": "hello from run-0",
        "checkpoints": "no checkpoints",
        "recipe": "lr: 0.001",
        "history": "2 × ddp",
    }
    for part, text in shown.items():
        page.click(f"#tab-{part}")
        page.wait_for(f"document.querySelector('.panel').innerText.includes({json.dumps(text)})")
    runs[0].log("and more\n")
    page.click("#tab-log")
    page.wait_for("document.querySelector('.panel').innerText.includes('hello')")
    runs[0].log("and then\n")
    runs[0].train(10)
    page.wait_for("document.querySelector('.panel').innerText.includes('and then')")
    assert_sound(page, server)
    page.close()


def test_runs_are_compared_by_what_differs(browser: Browser, server: Server) -> None:
    page = page_of(browser, server)
    page.click("thead input")
    page.wait_for("document.querySelector('.toolbar .button').textContent === 'compare 3'")
    page.click(".toolbar .button")
    page.wait_for("document.querySelector('.chart')?.chart.found?.lines.length === 3")
    heads = page.evaluate("[...document.querySelectorAll('thead button')].map(head => head.textContent)")
    assert heads == ["run", "optim.lr", "seed", "state", "progress", "result", "loss"]
    assert "0.002" in rows(page)[1]
    titles = "[...document.querySelectorAll('.chart h3')].map(title => title.textContent)"
    page.wait_for(f"{titles}.length === 3")
    assert page.evaluate(titles) == ["train/loss", "valid/loss", "valid/accuracy"]
    page.click(".choices summary")
    page.click(".choices label:last-child")
    page.wait_for(f"{titles}.length === 4")
    assert_sound(page, server)
    page.close()


def test_texts_of_runs_stay_texts(browser: Browser, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "∕")
    run = MadeRun(tmp_path / "runs" / name, steps=50)
    run.attempt()
    run.train()
    with run.run.metrics_path.open("a") as file:
        for event in ("train", "eval", "anomaly", HOSTILE):
            row = {
                "event": event,
                "step": 51,
                "time": 1e9,
                "split": HOSTILE,
                HOSTILE: 1.0,
                "what": HOSTILE,
                "loss": 1.0,
            }
            file.write(json.dumps(row) + "\n")
    run.run.recipe_path.write_text(
        run.run.recipe_path.read_text().replace("name: made", f"name: {json.dumps(HOSTILE)}") + f"# {HOSTILE}\n"
    )
    run.log(HOSTILE + "\n")
    run.beat(host=HOSTILE, phase=HOSTILE, work={HOSTILE: 1.0})
    run.run.mark_failed({"rank": 0, "error": HOSTILE, "message": HOSTILE})
    with serving(tmp_path / "runs") as server:
        page = page_of(browser, server)
        assert "<script>" in rows(page)[0]
        page.click("tbody a")
        page.wait_for("document.querySelectorAll('.chart canvas').length >= 2")
        for part in ("ranks", "log", "recipe", "history"):
            page.click(f"#tab-{part}")
            page.wait_for("document.querySelector('.panel').innerText.includes('onerror')")
        page.evaluate("location.hash = location.hash.split('/').slice(0, 3).join('/').replace('run', 'compare')")
        page.wait_for("document.querySelector('.chart')?.chart.found")
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.querySelectorAll('main img, main script, main iframe').length") == 0
        assert_sound(page, server)
        # and if a script of the page tried to, the browser would refuse
        refused = "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
        assert page.evaluate(refused) == "TypeError"
        page.close()


@pytest.mark.parametrize("width", [480, 1280, 1920])
def test_every_view_fits_its_window(browser: Browser, server: Server, width: int) -> None:
    page = page_of(browser, server, width=width, dark=width == 480)
    name = page.evaluate("document.querySelector('tbody a').hash.split('/')[2]")
    views = [
        "#/",
        f"#/compare/{name}",
        *(f"#/run/{name}/{part}" for part in ("curves", "ranks", "log", "recipe", "history")),
    ]
    for view in views:
        page.evaluate(f"location.hash = '{view}'")
        page.wait_for("Boolean(document.querySelector('.table, .chart canvas, .cell, pre, .panel .facts'))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 20, 25)" if width == 480 else "rgb(255, 255, 255)")
    page.close()
