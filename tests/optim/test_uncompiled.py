"""torch's optimizers before and after something imports its compiler."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

KINDS = ("SGD", "AdamW", "RMSprop", "LBFGS")

STEPS = """
def steps(kind, count, optimizer=None):
    weights = torch.tensor([1.0, -2.0], requires_grad=True) if optimizer is None else None
    optimizer = optimizer or getattr(torch.optim, kind)([weights], lr=0.1)
    (weights,) = optimizer.param_groups[0]["params"]

    def closure():
        optimizer.zero_grad()
        loss = (weights**2).sum()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer
"""

APART = f"""
import json, sys, types
import torch
from distrain.optim.uncompiled import put_off_compiler
{STEPS}
put_off_compiler()
first = {{kind: steps(kind, 2) for kind in {KINDS!r}}}
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules

asked = []
marks = types.ModuleType("torch._dynamo")
marks.disable = lambda function, *_, **__: asked.append(function.__name__) or function
marks.graph_break = lambda: asked.append("graph_break")
sys.modules["torch._dynamo"] = torch._dynamo = marks
for kind in {KINDS!r}:
    steps(kind, 2, first[kind])
assert {{"zero_grad", "state_dict", "load_state_dict", "graph_break"}} <= set(asked), asked
put_off_compiler()
print(json.dumps({{kind: each.param_groups[0]["params"][0].tolist() for kind, each in first.items()}}))
"""


def test_optimizers_step_alike_without_the_compiler_and_have_their_marks_back_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    defined: dict = {"torch": torch}
    exec(STEPS, defined)
    for kind, weights in json.loads(done.stdout).items():
        optimizer = defined["steps"](kind, 2)
        (expected,) = defined["steps"](kind, 2, optimizer).param_groups[0]["params"]
        assert weights == expected.tolist(), kind
