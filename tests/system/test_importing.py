"""What the collector of garbage does while large libraries are imported, and what it looks at afterwards."""

import json
import subprocess
import sys

import pytest

IMPORTED = """
import gc, json, sys, types
from distrain.system.importing import importing
there, at_first = sys.argv[1] == "there", gc.get_freeze_count()
if there:
    sys.modules["torch"] = types.ModuleType("torch")
if sys.argv[2] == "off":
    gc.disable()
with importing():
    off = not gc.isenabled()
    with importing():
        sys.modules["torch"] = types.ModuleType("torch")
    within, frozen = not gc.isenabled(), gc.get_freeze_count()
    later = [[] for _ in range(1000)]
with importing():
    later.append([])
print(json.dumps([off, within, gc.isenabled(), frozen > at_first, gc.get_freeze_count() <= frozen]))
"""


@pytest.mark.parametrize("torch", ["there", "not there"])
@pytest.mark.parametrize("collects", ["on", "off"])
def test_only_what_is_there_once_torch_is_imported_is_never_looked_at_again(torch: str, collects: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, torch, collects], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [True, True, collects == "on", torch == "not there", True]


ENDED = """
import atexit, gc, sys, types
from distrain.system.importing import freeze
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # after what is registered later
freeze()
for name in sys.argv[1:]:
    sys.modules[name] = types.ModuleType(name)
"""


@pytest.mark.parametrize("modules", [[], ["triton"]])
def test_libraries_that_print_what_is_left_at_the_end_of_a_process_find_all_collected(modules: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED, *modules], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{not modules}\n"
