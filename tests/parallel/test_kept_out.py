"""torch's compiler kept out of a process, and there with all of its marks as soon as something asks for it."""

from __future__ import annotations

import subprocess
import sys

KEPT_OUT = """
import sys
import torch
from distrain.parallel.uncompiled import compiling_when_called
from distrain.system.compiler import compiler_imported, without_compiler

with without_compiler():
    from torch._dynamo.utils import is_compile_supported

    @torch.compiler.disable
    def left_alone(value):
        return value + 1

with compiling_when_called():
    compiled = torch.compile(lambda value: value * 2, backend="eager", fullgraph=True)
assert left_alone(torch.ones(1)).item() == 2
assert not [name for name in sys.modules if name.startswith("torch._dynamo")] and not compiler_imported()

finders = list(sys.meta_path)
with without_compiler():
    assert not compiler_imported()
    import torch._dynamo.config  # more than there is a stand-in for

    assert compiler_imported()
    assert torch._dynamo.config.__spec__.loader.get_source("torch._dynamo.config")
    assert torch._dynamo.config.suppress_errors is False
assert sys.meta_path == finders and torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert is_compile_supported("cpu") is torch._dynamo.utils.is_compile_supported("cpu")
assert compiled(torch.ones(1)).item() == 2
assert left_alone(torch.ones(1)).item() == 2
try:
    torch.compile(lambda value: left_alone(value) * 2, backend="eager", fullgraph=True)(torch.ones(1))
except torch._dynamo.exc.Unsupported:
    print("marked")
"""


def test_the_compiler_is_kept_out_until_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT_OUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "marked\n"
