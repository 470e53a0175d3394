"""Headless Chromium, driven over the DevTools protocol through a pipe, so without a further package.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:8000/", width=1280, dark=True)
        page.wait_for("document.querySelectorAll('tr').length > 3")
        page.screenshot(Path("page.png"))

    python tests/support/browser.py PAGE PICTURE.png [--width 1280] [--height 800] [--dark] [--whole]

A test asks for the fixture `browser`, which skips it with the reason where there is no Chromium.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMANDS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Any of them will do; DISTRAIN_CHROMIUM names another."""

OPTIONS = (
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--force-color-profile=srgb", "--window-size=1280,800", "--font-render-hinting=none",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of a browser, or None."""
    named = os.environ.get("DISTRAIN_CHROMIUM")
    return next((path for each in ([named] if named else COMMANDS) if (path := shutil.which(each))), None)


class BrowserError(Exception):
    """The browser has ended, does not answer, or refuses a command."""


class Browser:
    """A Chromium of its own, with a profile in a temporary folder. Not for several threads."""

    def __init__(self, *, timeout_s: float = 180):
        """`timeout_s`: how long an answer may take before that is an error."""
        path = find_chromium()
        if path is None:
            raise BrowserError(f"there is none of {', '.join(COMMANDS)}; run: sh scripts/install-chromium.sh")
        self.timeout_s = timeout_s
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        self._last_id = 0
        self._buffer = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        self._pid: int | None = None
        commands, self._commands = _high_pipe()
        self._messages, messages = _high_pipe()
        argv = [path, *OPTIONS, f"--user-data-dir={self.profile}"]
        if os.getuid() == 0:
            argv.append("--no-sandbox")  # Chromium refuses to run as root with it
        log = f"{self.profile}/stderr.txt"
        actions = [
            (os.POSIX_SPAWN_DUP2, commands, 3),  # where the option says that they are
            (os.POSIX_SPAWN_DUP2, messages, 4),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        ]
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        self._pid = os.posix_spawn(path, argv, environment, file_actions=actions, setpgroup=0)
        os.close(commands)
        os.close(messages)
        try:
            self.version = self.call("Browser.getVersion")["product"]
        except BrowserError as error:
            said = Path(log).read_text(errors="replace")[-2000:]
            self.close()
            raise BrowserError(f"{error}; it said: {said}") from None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and delete its profile."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = None
        os.close(self._commands)
        os.close(self._messages)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Give a command of the DevTools protocol and return its result; events that come before it are noted."""
        self._last_id += 1
        number = self._last_id
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        try:
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._commands, data) :]
        except BrokenPipeError:
            raise BrowserError("the browser has ended") from None
        until = time.monotonic() + self.timeout_s
        while number not in self._answers:
            if not self._read(until - time.monotonic()):
                raise BrowserError(f"no answer to {method} within {self.timeout_s} s")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _read(self, timeout_s: float) -> bool:
        """Take what has come, at most `timeout_s` from now; returns whether anything did."""
        ready, _, _ = select.select([self._messages], [], [], max(0, timeout_s))
        if not ready:
            return False
        data = os.read(self._messages, 1 << 20)
        if not data:
            raise BrowserError("the browser has ended")
        *whole, self._buffer = (self._buffer + data).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif (page := self._pages.get(message.get("sessionId", ""))) is not None:
                page._event(message["method"], message["params"])
        return True

    def open(
        self,
        address: str | Path,
        *,
        width: int = 1280,
        height: int = 800,
        dark: bool = False,
        before: str | None = None,
        timeout_s: float = 120,
    ) -> Page:
        """Open a page, a file's too, and return it once it has loaded. `before`: a script that runs before its own."""
        url = address.absolute().as_uri() if isinstance(address, Path) else address
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.dark(dark)
        if before:
            page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.go(url, timeout_s=timeout_s)
        return page


class Page:
    """A page of a browser, and what it has asked for and said."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self._target, self._session = browser, target, session
        self.requests: list[dict[str, Any]] = []
        """What it asked the network for: `url`, `method`, then `status`, `bytes` (on the wire), `failed`; in order."""
        self.said: list[str] = []
        """Its errors and warnings: exceptions, what the console says, what the browser refused."""
        self._by_id: dict[str, dict[str, Any]] = {}
        self._loaded = False
        self.size = (0, 0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of the DevTools protocol to this page."""
        return self.browser.call(method, self._session, **params)

    def _event(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                request = {"url": params["request"]["url"], "method": params["request"]["method"], "bytes": 0}
                self._by_id[params["requestId"]] = request
                self.requests.append(request)
            case "Network.webSocketCreated":
                self.requests.append({"url": params["url"], "method": "WEBSOCKET", "bytes": 0})
            case "Network.responseReceived":
                self._by_id.get(params["requestId"], {})["status"] = params["response"]["status"]
            case "Network.dataReceived" | "Network.loadingFinished":
                request = self._by_id.get(params["requestId"], {})
                if method == "Network.loadingFinished":
                    request["bytes"] = int(params["encodedDataLength"])
                else:  # of a stream that does not end
                    request["bytes"] = request.get("bytes", 0) + int(params["encodedDataLength"])
            case "Network.loadingFailed":
                self._by_id.get(params["requestId"], {})["failed"] = params["errorText"]
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.said.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.said.append(" ".join(str(each.get("value", each.get("description"))) for each in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())

    def go(self, url: str, *, timeout_s: float = 120) -> None:
        """Go to an address, and return once it has loaded."""
        self._loaded = False
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise BrowserError(f"{url}: {failed}")
        self._until(lambda: self._loaded, f"{url} has not loaded", timeout_s)

    def _until(self, holds: Callable[[], Any], otherwise: str, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        while not (found := holds()):
            if time.monotonic() > until:
                raise BrowserError(f"{otherwise} within {timeout_s:g} s; the page says {self.said}")
            self.browser._read(0.05)
        return found

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, awaited where it is a promise, as JSON holds it."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if (details := done.get("exceptionDetails")) is not None:
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return done["result"].get("value")

    def wait_for(self, expression: str, *, timeout_s: float = 120) -> Any:
        """Wait until an expression holds, and return its value."""
        return self._until(lambda: self.evaluate(expression), f"{expression} has not come true", timeout_s)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the viewport, in CSS pixels."""
        self.size = (width, height)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        """Have the page drawn for people who prefer dark colours, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def press(self, key: str, *, code: int = 0, text: str = "") -> None:
        """Press a key, such as Tab or Enter, and let it go. `code`: the key's number, where a page looks at it."""
        code = code or {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                        "ArrowDown": 40}.get(key, ord(key.upper()) if len(key) == 1 else 0)  # fmt: skip
        text = text or {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        about = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Write text into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click on the middle of the first element that a CSS selector finds."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return {x: r.x + r.width / 2, y: r.y + r.height / 2} })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Write what is seen as PNG. `whole`: the page to its end, and not only what fits the viewport."""
        width, height = self.size
        if whole:
            self.resize(width, max(height, self.evaluate("document.documentElement.scrollHeight")))
        # two frames, so that what was last changed is drawn
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        if whole:
            self.resize(width, height)
        return path

    def pdf(self, path: Path) -> Path:
        """Write the page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))
        return path

    def close(self) -> None:
        """Close the page."""
        self.browser.call("Target.closeTarget", targetId=self._target)
        self.browser._pages.pop(self._session, None)


def _high_pipe() -> tuple[int, int]:
    """Return the ends of a pipe, neither of which is one of the first few descriptors."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


def main() -> None:
    """Write a picture of a page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", help="an address, or a file of HTML")
    parser.add_argument("picture", type=Path, help="a file whose name ends with .png or .pdf")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the page to its end")
    asked = parser.parse_args()
    address = asked.page if "://" in asked.page else Path(asked.page)
    with Browser() as browser:
        page = browser.open(address, width=asked.width, height=asked.height, dark=asked.dark)
        if asked.picture.suffix == ".pdf":
            page.pdf(asked.picture)
        else:
            page.screenshot(asked.picture, whole=asked.whole)
        for line in page.said:
            print(line)


if __name__ == "__main__":
    main()
