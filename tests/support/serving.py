"""A server of `distrain ui` for as long as a test needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrain.report.ui.server import Server


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve the runs of a folder from a thread of this process."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
