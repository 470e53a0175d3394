"""From a divergence to its likely cause, and what to do about it."""

from __future__ import annotations

from distrain.prove.divergence import WRITTEN, Divergence
from distrain.prove.legs import Leg

ROUNDING = 1e-5
"""Losses and gradients that are closer than this, relative to their size, differ as sums in another order do."""

_DATA = (
    "draw from Python's, NumPy's or PyTorch's global generators, which are seeded for each sample, or compute what is "
    "random from the index; keep nothing from one __getitem__ to the next"
)
_TRANSFORM = (
    "have it draw from Python's, NumPy's or PyTorch's global generators, which are seeded for each sample, and keep "
    "nothing from one call to the next"
)
_MODEL = (
    "register what the model remembers with register_buffer (persistent, which is the default), so that checkpoints "
    "hold it; draw random numbers from the global generators, which are seeded at each step"
)
_OPTIMIZER = (
    "keep what the optimizer remembers in self.state[parameter] (tensors or plain values) or in its param_groups: "
    "these are in checkpoints"
)
_ARITHMETIC = (
    "set torch.use_deterministic_algorithms(True) in your model's file to have PyTorch name the operation (on a GPU "
    "with CUBLAS_WORKSPACE_CONFIG=:4096:8), and look for atomics, threads and times in code of your own"
)

_ORDER = (
    "put what comes out of a set into an order of its own (sorted(...)) before anything is computed by it, and take "
    "zlib.crc32 or hashlib in the place of hash(); PYTHONHASHSEED=0 in the environment of every start hides it only"
)
_OUTSIDE = (
    "compute by nothing that training itself writes outside of its checkpoints: register what the model remembers with "
    "register_buffer, keep an optimizer's in self.state, and make files that are read before the run begins"
)

_SEEDS = "initialise from PyTorch's, NumPy's or Python's global generators, which are seeded before it is built"

_OF_DONE = (
    "one of the runs ended before the other, or left out an evaluation or its checkpoints: its data ran out, it "
    "stopped early, or its files were changed after they were written",
    "look at the runs with --keep DIR: metrics.jsonl has every evaluation and save, log-rank-0.txt why a run ended",
)


def explain(divergence: Divergence, straight: Leg, *, repeats: bool | None, by_hash: bool = False) -> None:
    """Fill in the likely cause of a divergence between runs in one placement, and what to do.

    `repeats`: whether a second straight run was the same as the first up to there; None where there was none.
    `by_hash`: whether straight runs are the same exactly where texts are hashed by the same key.
    """
    d = divergence
    resumed = d.attempt > 0 and repeats is not False
    first = relevant(d)
    d.suspects = first + [suspect for suspect in d.suspects if suspect not in first]
    named = first[0][0] if first else None
    held = f"{named} is no part of a checkpoint, and was another when the step began" if named else ""
    if by_hash:
        d.cause = (
            "the order in which a set gives texts, or their hash(): Python hashes them by another key in each process "
            "(PYTHONHASHSEED), and with the same key the runs agree"
        )
        d.advice = _ORDER
    elif (file := _outside(d)) and not (named and (resumed or is_generator(first[0]))) and not _worker_cause(d):
        d.cause = f"what is outside of the process was another: {file}, and no checkpoint holds it"
        d.advice = _OUTSIDE
    elif d.what == "start":
        d.cause, d.advice = _of_start(d, named)
    elif d.what == "ids":
        counts = straight.attempts[0].record.facts["samples"]
        d.cause = (
            "the data set gave its samples in another order, or another number of them than the "
            f"{counts if counts is not None else 'stream'} of the straight run"
        )
        d.advice = "make the data set the same each time that it is built: sort listings of files, fix every draw"
    elif d.what == "samples":
        worker = _worker_cause(d)
        d.cause = (f"{held}; or {worker}" if held and worker else held or worker) or (
            "the data set keeps hidden state: what a sample holds depends on what was read before it"
            if resumed
            else "the data set draws random numbers that are not seeded, or reads something that changes"
        )
        d.advice = _DATA
    elif d.what in ("inputs", "targets"):
        d.cause = held or (
            "the data set gave the same, so a transform of data.transforms.train has a generator or other state of its "
            "own"
            if resumed
            else "the data set gave the same, so a transform of data.transforms.train draws random numbers that are "
            "not seeded"
        )
        d.advice = _TRANSFORM
    elif d.what == "lr":
        d.cause = held or "the optimizer changes its own learning rate, which is the schedule's"
        d.advice = "leave group['lr'] alone in the optimizer; shape the rate with `schedule`"
    elif d.what in ("loss", "norm", "gradients"):
        d.cause, d.advice = _of_model(d, held, resumed)
    elif d.what in ("state", "values"):
        d.cause, d.advice = _of_update(d, held, resumed)
    elif d.what == "evaluation":
        d.cause = held or (
            "the step itself was the same, so scoring is not a function of the weights: a metric, or the model in "
            "evaluation, draws random numbers or keeps state"
        )
        d.advice = _MODEL
    elif d.what == "done":
        d.cause, d.advice = _OF_DONE
    else:
        d.cause = (
            "the state in memory was the same, and what was saved is not: the file was changed after it was written, "
            "or what an evaluation or a save changed is no function of the weights"
        )
        d.advice = "look at the tensors with `distrain checkpoint diff`, and at who else writes there"


def explain_elsewhere(divergence: Divergence) -> None:
    """Fill in the likely cause of a divergence between runs in different placements."""
    d = divergence
    if d.what == "ids":
        d.cause = "the data set has another length or order with another number of processes"
        d.advice = "build the same data set on every rank: let it not cut itself up by rank"
    elif d.what == "samples":
        d.cause = "what a sample holds depends on the process that reads it, or on what that has read before"
        d.advice = "let the data set not look at RANK or torch.utils.data.get_worker_info(); " + _DATA
    elif d.what in ("inputs", "targets"):
        d.cause = (
            "the data set gave the same, and a transform made another thing of it: it depends on the process, on the "
            "samples beside it, or on what it did before"
        )
        d.advice = _TRANSFORM
    elif d.what == "lr":
        d.cause = "the optimizer's learning rate depends on the number of processes"
        d.advice = "leave group['lr'] alone in the optimizer; shape the rate with `schedule`"
    elif d.what == "done":
        d.cause, d.advice = _OF_DONE
    else:
        d.cause = (
            "samples and learning rates are the same, so the model's loss for a sample depends on the samples beside "
            "it or on the rank, or rounding grows faster than the tolerance allows"
        )
        d.advice = (
            "try train.precision=fp64: rounding becomes far smaller, any other cause stays; where it is rounding, "
            "state your own --loss-tolerance and --state-tolerance"
        )


def is_generator(suspect: tuple[str, str, str]) -> bool:
    """Whether a suspect is a generator of random numbers: it says all of why runs differ."""
    return any("in state" in value for value in suspect[1:])


def _outside(d: Divergence) -> str:
    """Return a file that may make just this another; what is only written is none."""
    return next((path for path, _, _ in d.files if not path.endswith(WRITTEN)), "") if d.what != "done" else ""


_ROOTS = {
    "ids": ("data",),
    "samples": ("data",),
    "inputs": ("transforms",),
    "targets": ("transforms", "data"),
    "lr": ("optimizer", "schedule"),
    "loss": ("model", "loss"),
    "norm": ("model", "loss"),
    "gradients": ("model", "loss"),
    "state": ("optimizer", "model"),
    "values": ("optimizer",),
    "evaluation": ("model", "metrics", "loss", "evaluated data", "evaluated transforms"),
    "start": ("model", "optimizer"),
}
_ALL_ROOTS = {root for roots in _ROOTS.values() for root in roots}


def relevant(d: Divergence) -> list[tuple[str, str, str]]:
    """Return those of the suspects that may be what makes just this another."""
    roots = _ROOTS.get(d.what, ())
    own = [suspect for suspect in d.suspects if suspect[0].partition(".")[0] in roots]
    # what belongs to a file, a class or a function is under no root, and may matter to all
    return own + [suspect for suspect in d.suspects if suspect[0].partition(".")[0] not in _ALL_ROOTS]


def _of_start(d: Divergence, named: str | None) -> tuple[str, str]:
    if d.step == 0 and named:
        return f"the model is built while {named} is another in each process", _SEEDS
    if d.step == 0:
        return (
            "the model is built with random numbers that are not seeded, or from something that changes",
            _SEEDS,
        )
    if d.subject.startswith("optimizer/"):
        return "what was loaded into the optimizer is not what it held when it was saved", _OPTIMIZER
    return (
        "what was loaded is not what the model held when the step ended: a tensor is changed between the step and its "
        "save, or while it is loaded",
        "look at hooks of state_dict and load_state_dict, and at what the model does to its buffers in evaluation",
    )


def _of_model(d: Divergence, held: str, resumed: bool) -> tuple[str, str]:
    if held:
        return held, _MODEL
    same = "weights and inputs were the same"
    if not resumed:
        if d.gap is not None and d.gap <= ROUNDING:
            return f"{same}, and the numbers differ as rounding does: arithmetic that is not deterministic", _ARITHMETIC
        return f"{same}, so the model or the loss draws random numbers that are not seeded", _MODEL
    return f"{same}, so the model or the loss keeps state that no checkpoint holds", _MODEL


def _of_update(d: Divergence, held: str, resumed: bool) -> tuple[str, str]:
    if d.subject.endswith("(buffer)"):
        return held or "the model changes a buffer by something that no checkpoint holds", _MODEL
    if held:
        return held, _OPTIMIZER
    if d.gap is not None and d.gap <= ROUNDING and not resumed:
        return (
            "gradients were the same, and the numbers differ as rounding does: arithmetic that is not deterministic",
            (_ARITHMETIC),
        )
    if resumed:
        return "gradients were the same, so the optimizer steps by state that no checkpoint holds", _OPTIMIZER
    return "gradients were the same, so the optimizer draws random numbers that are not seeded", _OPTIMIZER


def _worker_cause(d: Divergence) -> str:
    processes = [text.rpartition("loader process ")[2] for text in (d.straight, d.other) if "loader process" in text]
    if len(set(processes)) < 2:
        return ""
    return (
        f"the sample was read by loader process {processes[0]} in the straight run and by {processes[1]} here: the "
        "data set depends on which one reads (torch.utils.data.get_worker_info, a counter or generator in each)"
    )
