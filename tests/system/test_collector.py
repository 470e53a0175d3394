"""Garbage is collected again once nobody wants it put off any more."""

from __future__ import annotations

import gc
import threading

import pytest

from distrain.system.collector import no_collection


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_after_the_last_block(on: bool) -> None:
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with no_collection():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    try:
        with no_collection():
            thread.start()
            assert inside.wait(30)
            with no_collection():
                seen.append(gc.isenabled())
            seen.append(gc.isenabled())
        seen.append(gc.isenabled())  # the other thread is still inside
        leave.set()
        thread.join()
        assert seen == [False, False, False]
        assert gc.isenabled() == on
        with pytest.raises(KeyError), no_collection():
            raise KeyError
        assert gc.isenabled() == on
    finally:
        leave.set()
        (gc.enable if was else gc.disable)()
