"""The anonymous memory of a process, for scripts that tests run in fresh interpreters; imports next to nothing."""

import threading
import time


def anonymous() -> int:
    """Return this process's anonymous resident memory in bytes: without the pages of libraries and files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


class Peak:
    """Samples memory every millisecond within a `with` block. `most` is the growth since its start, in bytes."""

    def __init__(self) -> None:
        self.start = anonymous()
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, anonymous() - self.start)
            time.sleep(0.001)

    def next_phase(self) -> int:
        """Begin to look for the most anew; returns what it was so far."""
        before, self.most = self.most, 0
        return before

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
