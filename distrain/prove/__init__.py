"""Prove that a recipe goes on to the same bits: train it straight, then with kills and resumes, and compare all of it.

    processes.py   processes that are started, interrupted, and never left behind
    traces.py      what each rank noted of each step (`distrain.training.callbacks.trace` writes it)
    legs.py        a run, straight or interrupted and resumed; when and how it is interrupted
    divergence.py  where two runs in one placement part, to the bit
    tolerance.py   what must agree between placements, and how closely
    causes.py      from a divergence to its likely cause
    proof.py       `prove`: the legs, one after the other
    report.py      what a person sees of it

Imports no torch: it starts `distrain train` and reads what that leaves.
"""

from __future__ import annotations

from distrain.prove.divergence import Divergence
from distrain.prove.legs import CouldNotRun, Interruption, Leg, Placement
from distrain.prove.processes import Process, Start
from distrain.prove.proof import LegResult, Proof, prove

__all__ = [
    "CouldNotRun",
    "Divergence",
    "Interruption",
    "Leg",
    "LegResult",
    "Placement",
    "Process",
    "Proof",
    "Start",
    "prove",
]
