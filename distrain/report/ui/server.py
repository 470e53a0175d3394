"""The server of `distrain ui`: on this machine alone, for whoever has its address, and read-only.

- It listens on 127.0.0.1 and answers requests whose Host is this machine, so that a page of another site whose name
  comes to mean this machine gets nothing.
- The address holds a random token. The first page trades it for a cookie; without either everything is refused.
- It only answers GET, and names runs by the hash of their place, never by a path (see `Runs`).
- A page may load and ask for nothing but what comes from here, and run no script but those files (a policy that the
  browser enforces). Texts of runs are JSON, which the page shows as text.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from distrain.report.ui import details
from distrain.report.ui.curves import Curves, Line, aligned, by_hours, by_step
from distrain.report.ui.runs import NoSuchRun, Runs, Watch
from distrain.run.folder import RunDir
from distrain.run.json_files import json_safe
from distrain.system.errors import UserError

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)  # fmt: skip
MOST_LINES = 2000
"""Curves in one picture."""
MOST_STREAMS = 32
"""Pages that are kept up to date at a time."""
PATIENCE_S = 0.5
"""How long an answer waits for curves that are not read yet."""
SKETCHING_S = 2.0
"""How long an answer takes over sketches of those."""


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves the runs of a folder to browsers of this machine."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0):
        """Listen on `port` of 127.0.0.1 (0: any free one). Raises UserError where the folder or port is not there."""
        self.runs = Runs(folder)
        self.curves = Curves()
        self.checkpoints = details.Checkpoints()
        self.recipes = details.Recipes()
        self.watch = Watch(self.runs)
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        self.ended = threading.Event()
        # every file that there is: a request names one of them, and no path
        self.static = {
            f"/static/{path.relative_to(STATIC).as_posix()}": path for path in STATIC.rglob("*") if path.suffix in TYPES
        }
        self.token = secrets.token_urlsafe(32)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(
                f"port {port} of 127.0.0.1 cannot be used: {error.strerror or error}; choose another --port"
            ) from error
        self.cookie = f"distrain-{self.server_address[1]}"
        """Its name: cookies of one host are the same for all ports."""

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM comes."""

        def end(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, end)
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()

    def server_close(self) -> None:
        """End its threads, and let the port be used by others."""
        self.ended.set()
        self.watch.close()
        self.curves.close()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has gone away; log all else."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.exception("a request failed")


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds that a connection may be idle."""

    def version_string(self) -> str:
        """Return what the server calls itself."""
        return "distrain"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: an address may hold the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not understood."""
        self._send(code, (message or "refused").encode("ascii", "replace"), "text/plain")
        self.close_connection = True

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            self._answer()
        except Refused as refused:
            self._send(refused.status, f"{refused}\n".encode(), "text/plain")
        except NoSuchRun as error:
            self._json({"error": str(error)}, 404)
        except (UserError, ValueError) as error:
            self._json({"error": str(error)}, 400)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _answer(self) -> None:
        url = urlsplit(self.path)
        host = self.headers.get("Host", "")
        if re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", host) is None:
            raise Refused(421, "this server answers for 127.0.0.1 and localhost alone")
        query = parse_qs(url.query, max_num_fields=MOST_LINES + 20)
        if url.path == "/" and "token" in query:
            if not self._is_token(query["token"][0]):
                raise Refused(403, "this is not the address that distrain ui printed")
            self._redirect()
            return
        if not self._is_token(self._cookie()):
            raise Refused(403, "open the address that distrain ui printed, with its token")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(403, "another site may ask for nothing here")
        if url.path == "/":
            self._file(STATIC / "index.html")
        elif url.path in self.server.static:
            self._file(self.server.static[url.path])
        elif url.path == "/events":
            self._events()
        elif (answer := _ANSWERS.get(url.path)) is not None:
            self._json(answer(self.server, query))
        else:
            raise Refused(404, "there is nothing here")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode())

    def _cookie(self) -> str:
        cookies: SimpleCookie = SimpleCookie()
        with suppress(CookieError):
            cookies.load(self.headers.get("Cookie", ""))
        found = cookies.get(self.server.cookie)
        return found.value if found is not None else ""

    # ----------------------------------------------------------------------------------------------------------------

    def _head(self, status: int, kind: str, **more: str) -> None:
        self.send_response_only(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        for name, value in {**headers, **{key.replace("_", "-"): value for key, value in more.items()}}.items():
            self.send_header(name, value)

    def _send(self, status: int, content: bytes, kind: str, **more: str) -> None:
        if len(content) > 4096 and "gzip" in self.headers.get("Accept-Encoding", ""):
            packer = zlib.compressobj(1, wbits=31)
            content = packer.compress(content) + packer.flush()
            more["Content_Encoding"] = "gzip"
        self._head(status, kind, Content_Length=str(len(content)), **more)
        self.end_headers()
        self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, _dumps(value), "application/json")

    def _file(self, path: Path) -> None:
        self._send(200, path.read_bytes(), TYPES[path.suffix])

    def _redirect(self) -> None:
        """Trade the token of the address for a cookie, and leave it out of what the browser remembers."""
        cookie = f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
        self._send(303, b"", "text/plain", Location="/", Set_Cookie=cookie)

    def _events(self) -> None:
        """Send what changes, as server-sent events, for as long as the page is open."""
        if not self.server.streams.acquire(blocking=False):
            raise Refused(503, f"{MOST_STREAMS} pages are open; close one")
        try:
            self.close_connection = True
            self._head(200, "text/event-stream", Connection="close")
            self.end_headers()
            self.wfile.write(b"retry: 1000\n\n")
            for change in self.server.watch.changes(self._gone):
                self.wfile.write(b": alive\n\n" if change is None else b"data: " + _dumps(change) + b"\n\n")
        finally:
            self.server.streams.release()

    def _gone(self) -> bool:
        """Whether the page was closed, or the server is."""
        if self.server.ended.is_set():
            return True
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True


def _dumps(value: Any) -> bytes:
    return json.dumps(json_safe(value), ensure_ascii=True, separators=(",", ":")).encode()


# --------------------------------------------------------------------------------------------------------------------
# What may be asked for

Query = dict[str, list[str]]


def _one(query: Query, name: str) -> str:
    if len(found := query.get(name, [])) != 1:
        raise ValueError(f"{name}: expected once")
    return found[0]


def _number(query: Query, name: str) -> float | None:
    if name not in query:
        return None
    value = float(_one(query, name))
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number")
    return value


def _count(query: Query, name: str) -> int | None:
    value = _number(query, name)
    if value is not None and not 0 <= value < 2**53:
        raise ValueError(f"{name}: expected a count")
    return None if value is None else int(value)


def _run(server: Server, query: Query) -> dict[str, Any]:
    run = RunDir(server.runs.path(_one(query, "run")))
    return {**details.about(run), "logs": details.logs_of(run)}


def _history(server: Server, query: Query) -> dict[str, Any]:
    return server.curves.of_history(server.runs.path(_one(query, "run")), details.happened)


def _ranks(server: Server, query: Query) -> dict[str, Any]:
    return {"ranks": details.ranks(RunDir(server.runs.path(_one(query, "run"))))}


def _checkpoints(server: Server, query: Query) -> dict[str, Any]:
    return server.checkpoints.of(RunDir(server.runs.path(_one(query, "run"))))


def _log(server: Server, query: Query) -> dict[str, Any]:
    run = server.runs.path(_one(query, "run"))
    return details.log(
        server.runs, run, _one(query, "which"), begin=_count(query, "begin"), end=_count(query, "end")
    )  # fmt: skip


def _compare(server: Server, query: Query) -> dict[str, Any]:
    recipes: list[dict[str, str]] = []
    names: list[str] = []
    problems: dict[str, str] = {}
    for name in query.get("run", []):
        try:
            recipes.append(server.recipes.values(server.runs.path(name)))
            names.append(name)
        except (UserError, OSError, ValueError) as error:
            problems[name] = str(error)
    return {"runs": names, "differ": details.differing(recipes), "problems": problems}


def _curves(server: Server, query: Query) -> dict[str, Any]:
    """Return lines on shared points; `pending` names runs that are still being read, of which lines are sketches."""
    points = min(4000, max(8, _count(query, "points") or 600))
    hours = query.get("by", ["step"])[0] == "hours"
    asked: dict[Path, list[str]] = {}
    wanted: list[tuple[str, Path, str]] = []
    for line in query.get("line", [])[:MOST_LINES]:
        name, _, curve = line.partition(":")
        run = server.runs.path(name)
        asked.setdefault(run, []).append(curve)
        wanted.append((name, run, curve))
    read = server.curves.series_by(time.monotonic() + PATIENCE_S, asked)
    until = time.monotonic() + SKETCHING_S
    axes = {run: by_hours(_start(run)) if hours else by_step for run in asked}
    cut: list[tuple[np.ndarray, np.ndarray]] = []
    lines: list[dict[str, Any]] = []
    pending: list[str] = []
    problems: dict[str, str] = {}
    for name, run, curve in wanted:
        match read[run]:
            case None:
                pending.append(name)
                rough = server.curves.sketch(run, curve) if time.monotonic() < until else None
                if rough is not None:
                    cut.append((axes[run](rough), rough.values))
                    lines.append({"run": name, "name": curve, "count": None})
            case Exception() as error:
                problems[name] = str(error)
            case found:
                series = found[curve]
                cut.append((axes[run](series), series.values))
                lines.append({"run": name, "name": curve, "count": len(series.steps)})
    x, on = aligned(cut, points, _number(query, "from"), _number(query, "to"), means="means" in query)
    return {
        "x": _digits(x, 9),
        "lines": [{**line, **_line(each)} for line, each in zip(lines, on, strict=True)],
        "pending": sorted(set(pending)),
        "problems": problems,
    }


def _start(run: Path) -> float | None:
    first = next(iter(RunDir(run).attempts()), {})
    return float(first["time"]) if isinstance(first.get("time"), int | float) else None


def _line(line: Line) -> dict[str, Any]:
    index = None if line.index is None else line.index.tolist()
    return {"i": index, "y": _digits(line.values, 6), "nonfinite": line.nonfinite}


def _digits(values: Any, digits: int) -> list[float | int | None]:
    """Return numbers as short as that many digits allow."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if value != value:
            found.append(None)
        else:
            short = float(f"{value:.{digits}g}")
            found.append(int(short) if short.is_integer() and abs(short) < 1e15 else short)
    return found


_ANSWERS: dict[str, Callable[[Server, Query], dict[str, Any]]] = {
    "/api/run": _run,
    "/api/history": _history,
    "/api/ranks": _ranks,
    "/api/checkpoints": _checkpoints,
    "/api/log": _log,
    "/api/compare": _compare,
    "/api/curves": _curves,
}
