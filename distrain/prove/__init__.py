"""Prove that a recipe resumes to the same bits: train a baseline run, then one with kills, and compare.

    processes.py   start, interrupt and clean up processes
    traces.py      read what each rank recorded at each step (`distrain.training.callbacks.trace` writes it)
    trial_runs.py  a baseline run, or one that is interrupted and resumed; when and how it is interrupted
    divergence.py  the first difference of two runs in one topology, to the bit
    tolerance.py   what must agree between topologies, and how closely
    causes.py      the likely cause of a divergence, and what to do
    cost.py        the cost of deterministic operations
    proof.py       `prove`: the trial runs, one after the other
    report.py      the report in the terminal
    command.py     `distrain prove`

Imports no torch: it starts `distrain train` and reads its run folders and traces.
"""

from __future__ import annotations

from distrain.prove.divergence import Divergence
from distrain.prove.processes import Process, StartProcess
from distrain.prove.proof import Proof, TrialResult, prove
from distrain.prove.trial_runs import CouldNotRun, Interruption, Topology, TrialRun

__all__ = [
    "CouldNotRun",
    "Divergence",
    "Interruption",
    "Process",
    "Proof",
    "StartProcess",
    "Topology",
    "TrialResult",
    "TrialRun",
    "prove",
]
