"""What distrain logs, in any process: a list of lines, each with `warning: ` or `error: ` before it where it is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.lines.append(level + record.getMessage())


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yield a list, to which each line is added that distrain logs in this block."""
    logger, handler = logging.getLogger("distrain"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
