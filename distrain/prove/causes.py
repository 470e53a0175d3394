"""The likely cause of a divergence, and what to do about it."""

from __future__ import annotations

from distrain.prove.divergence import WRITTEN_ONLY, Divergence
from distrain.prove.trial_runs import TrialRun

ROUNDING = 1e-5
"""Losses and gradients with a smaller relative difference differ by rounding, as sums in another order do."""

_DATA = (
    "draw from Python's, NumPy's or PyTorch's global generators, which are seeded for each sample, or seed a generator "
    "from the index; keep no state from one __getitem__ to the next"
)
_TRANSFORM = (
    "draw from Python's, NumPy's or PyTorch's global generators, which are seeded for each sample, and keep no state "
    "from one call to the next"
)
_MODEL = (
    "register the model's state with register_buffer (persistent, which is the default), so that checkpoints hold it; "
    "draw random numbers from the global generators, which are seeded at each step"
)
_OPTIMIZER = (
    "keep the optimizer's state in self.state[parameter] (tensors or plain values) or in its param_groups: checkpoints "
    "hold these"
)
_DETERMINISM = (
    "set torch.use_deterministic_algorithms(True) in your model's file to have PyTorch name the operation (on a GPU "
    "with CUBLAS_WORKSPACE_CONFIG=:4096:8), and look for atomics, threads and timing in your own code"
)

_HASHES = (
    "sort what comes out of a set (sorted(...)) before computing with it, and use zlib.crc32 or hashlib instead of "
    "hash(); PYTHONHASHSEED=0 in the environment of every attempt only hides the problem"
)
_FILES = (
    "read nothing that training itself writes outside of its checkpoints: register the model's state with "
    "register_buffer, keep the optimizer's in self.state, and write files that training reads before the run begins"
)

_SEEDS = "initialise from PyTorch's, NumPy's or Python's global generators, which are seeded before the model is built"

_LEARNING_RATE = "leave group['lr'] alone in the optimizer; shape the rate with `schedule`"

_SAME_SAMPLE = "the data set returned the same sample, so a transform of data.transforms.train "
_OWN_RATE = "the optimizer changes its own learning rate, which the schedule sets"
_EVALUATION = (
    "the step itself was the same, so evaluation is not a function of the weights: a metric, or the model in "
    "evaluation, draws random numbers or keeps state"
)
_CAUSES = {
    "samples": (
        "the data set keeps hidden state: a sample depends on which samples were read before it",
        "the data set draws unseeded random numbers, or reads something that changes",
        _DATA,
    ),
    **dict.fromkeys(
        ("inputs", "targets"),
        (
            _SAME_SAMPLE + "has its own generator or other state",
            _SAME_SAMPLE + "draws unseeded random numbers",
            _TRANSFORM,
        ),
    ),
    "lr": (_OWN_RATE, _OWN_RATE, _LEARNING_RATE),
    "evaluation": (_EVALUATION, _EVALUATION, _MODEL),
}
"""By what differs: the cause after a resume, the cause otherwise, the advice."""

_CAUSE_OF_ONE_SIDED = (
    "one of the runs ended before the other, or lacks an evaluation or checkpoints: its data ran out, it stopped "
    "early, or its files were changed after they were written",
    "keep the runs with --keep DIR: metrics.jsonl lists every evaluation and save, log-rank-0.txt says why a run ended",
)


def add_cause(divergence: Divergence, baseline: TrialRun, *, repeats: bool | None, by_hash: bool = False) -> None:
    """Set the cause and advice of a divergence between runs in one topology.

    `repeats`: whether a second baseline run was the same up to the divergence; None without a second run.
    `by_hash`: whether baseline runs agree exactly when PYTHONHASHSEED does.
    """
    d = divergence
    resumed = d.attempt > 0 and repeats is not False
    first = relevant_suspects(d)
    d.suspects = first + [suspect for suspect in d.suspects if suspect not in first]
    named = first[0][0] if first else None
    hidden = f"{named} is in no checkpoint, and differed before the step" if named else ""
    worker = _loader_process_cause(d)
    if by_hash:
        d.cause = (
            "the iteration order of a set of strings, or hash() of a string: Python seeds these differently in each "
            "process (PYTHONHASHSEED), and with the same seed the runs agree"
        )
        d.advice = _HASHES
    elif (file := _changed_file(d)) and not (named and (resumed or is_generator(first[0]))) and not worker:
        d.cause = f"a file differed that no checkpoint holds: {file}"
        d.advice = _FILES
    elif d.what == "start":
        d.cause, d.advice = _cause_at_start(d, named)
    elif d.what == "ids":
        counts = baseline.attempts[0].trace.facts["samples"]
        d.cause = (
            "the data set has another order of samples, or another number of them than the "
            f"{counts if counts is not None else 'stream'} of the baseline run"
        )
        d.advice = "build the same data set each time: sort listings of files, seed every random choice"
    elif d.what in _CAUSES:
        when_resumed, otherwise, d.advice = _CAUSES[d.what]
        d.cause = hidden or (when_resumed if resumed else otherwise)
        if d.what == "samples" and worker:
            d.cause = f"{hidden}; or {worker}" if hidden else worker
    elif d.what in ("loss", "norm", "gradients"):
        d.cause, d.advice = _cause_in_model(d, hidden, resumed)
    elif d.what in ("state", "values"):
        d.cause, d.advice = _cause_in_update(d, hidden, resumed)
    elif d.what == "done":
        d.cause, d.advice = _CAUSE_OF_ONE_SIDED
    else:
        d.cause = (
            "the state in memory was the same, and the checkpoint is not: its file was changed after it was written, "
            "or an evaluation or a save changed the state by more than the weights determine"
        )
        d.advice = "compare the tensors with `distrain checkpoint diff`, and find out what else writes to the folder"


def add_cause_across_topologies(divergence: Divergence) -> None:
    """Set the cause and advice of a divergence between runs in different topologies."""
    d = divergence
    if d.what == "ids":
        d.cause = "the data set has another length or order with another number of processes"
        d.advice = "build the same data set on every rank: do not shard it by rank"
    elif d.what == "samples":
        d.cause = "a sample depends on the process that reads it, or on what that process read before"
        d.advice = "do not read RANK or torch.utils.data.get_worker_info() in the data set; " + _DATA
    elif d.what in ("inputs", "targets"):
        d.cause = (
            "the data set returned the same sample, and a transform changed it differently: it depends on the process, "
            "on the other samples, or on earlier calls"
        )
        d.advice = _TRANSFORM
    elif d.what == "lr":
        d.cause = "the optimizer's learning rate depends on the number of processes"
        d.advice = _LEARNING_RATE
    elif d.what == "done":
        d.cause, d.advice = _CAUSE_OF_ONE_SIDED
    else:
        d.cause = (
            "samples and learning rates are the same, so the loss of a sample depends on the other samples of "
            "its micro-batch or on the rank, or rounding grows faster than the tolerance allows"
        )
        d.advice = (
            "try train.precision=fp64: rounding becomes far smaller, any other cause stays; if it is rounding, set "
            "your own --loss-tolerance and --state-tolerance"
        )


def is_generator(suspect: tuple[str, str, str]) -> bool:
    """Whether a suspect is a random number generator, which is enough to explain a difference."""
    return any("in state" in value for value in suspect[1:])


def _changed_file(d: Divergence) -> str:
    """Return a changed file that may be the cause, or an empty string; a file that is only written is none."""
    return next((path for path, _, _ in d.files if not path.endswith(WRITTEN_ONLY)), "") if d.what != "done" else ""


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


def relevant_suspects(d: Divergence) -> list[tuple[str, str, str]]:
    """Return the suspects that can affect what differs."""
    roots = _ROOTS.get(d.what, ())
    found = [suspect for suspect in d.suspects if suspect[0].partition(".")[0] in roots]
    # state of a file, a class or a function has no root, and may affect everything
    return found + [suspect for suspect in d.suspects if suspect[0].partition(".")[0] not in _ALL_ROOTS]


def _cause_at_start(d: Divergence, named: str | None) -> tuple[str, str]:
    if d.step == 0 and named:
        return f"the model is built from {named}, which differs in each process", _SEEDS
    if d.step == 0:
        return "the model is built from unseeded random numbers, or from something that changes", _SEEDS
    if d.subject.startswith("optimizer/"):
        return "the state loaded into the optimizer is not the state that was saved", _OPTIMIZER
    return (
        "the state loaded is not the model's state at the end of the step: a tensor was changed between the step and "
        "its save, or in loading",
        "check hooks of state_dict and load_state_dict, and whether the model changes its buffers in evaluation",
    )


def _cause_in_model(d: Divergence, hidden: str, resumed: bool) -> tuple[str, str]:
    return _cause_in_code(d, hidden, resumed, "weights and inputs were the same", "the model or the loss", _MODEL)


def _cause_in_update(d: Divergence, hidden: str, resumed: bool) -> tuple[str, str]:
    if d.subject.endswith("(buffer)"):
        return hidden or "the model updates a buffer from state that no checkpoint holds", _MODEL
    return _cause_in_code(d, hidden, resumed, "gradients were the same", "the optimizer", _OPTIMIZER)


def _cause_in_code(d: Divergence, hidden: str, resumed: bool, same: str, who: str, advice: str) -> tuple[str, str]:
    """Return the cause of a difference that `who` made where its inputs were the `same`."""
    if hidden:
        return hidden, advice
    if resumed:
        return f"{same}, so {who} keeps state that no checkpoint holds", advice
    if d.gap is not None and d.gap <= ROUNDING:
        return f"{same}, and the difference has the size of rounding: a nondeterministic operation", _DETERMINISM
    return f"{same}, so {who} draws unseeded random numbers", advice


def _loader_process_cause(d: Divergence) -> str:
    processes = [text.rpartition("loader process ")[2] for text in (d.baseline, d.other) if "loader process" in text]
    if len(set(processes)) < 2:
        return ""
    return (
        f"loader process {processes[0]} read the sample in the baseline run and {processes[1]} here: the data set "
        "depends on the loader process (torch.utils.data.get_worker_info, or a counter or generator in each)"
    )
