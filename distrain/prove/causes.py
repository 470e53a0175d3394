"""The likely cause of a divergence, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from distrain.prove.divergence import WRITTEN_ONLY, Divergence, is_generator
from distrain.prove.trial_runs import TrialRun
from distrain.system.errors import some

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

_LEARNING_RATE = (
    "compute the schedule from its step and total_steps alone, and leave group['lr'] alone in the optimizer"
)
_LOSS = (
    "keep what a loss remembers in a task of your own, by its methods state_dict() and load_state_dict(state); draw "
    "random numbers from the global generators, which are seeded at each step"
)
_TASK = (
    "keep the task's state by its methods state_dict() and load_state_dict(state), or compute it from self.step; draw "
    "random numbers by distrain.rand_like and the like, or from the global generators, which are seeded at each step"
)
_COLLATE = (
    "make a batch in collate from its samples alone; draw from Python's, NumPy's or PyTorch's global generators, which "
    "are seeded for each batch"
)
_CALLBACK = (
    "keep the callback's state by its methods state_dict() and load_state_dict(state), or compute it from run.step; "
    "seed its random numbers from the step"
)
_METRIC = "compute a metric from what it was given since its last reset, and draw no random numbers in it"
_ADVICE = {
    "model": _MODEL, "optimizer": _OPTIMIZER, "loss": _LOSS, "task": _TASK, "callback": _CALLBACK, "metrics": _METRIC,
    "data": _DATA, "evaluated data": _DATA, "transforms": _TRANSFORM, "evaluated transforms": _TRANSFORM,
    "schedule": _LEARNING_RATE,
}  # fmt: skip
"""What to do about state, by where it is kept."""

_SAME_SAMPLE = "the data set returned the same sample, so a transform of data.transforms.train "
_OWN_RATE = "the schedule is not computed from the step alone, or the optimizer changes its own learning rate"
_EVALUATION = (
    "the step itself was the same, so evaluation is not a function of the weights: a metric, the data set of the "
    "split, or the model in evaluation draws random numbers or keeps state"
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
            _SAME_SAMPLE + "draws unseeded random numbers, or reads something that changes",
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
    if d.attempt > 0 and not resumed:  # what a resume has lost made no difference
        first = [suspect for suspect in first if is_generator(suspect)]
    d.suspects = first
    named = first[0][0] if first and (resumed or is_generator(first[0]) or explains(first[0])) else None
    hidden = f"{named} is in no checkpoint, and differed before the step" if named else ""
    callbacks = baseline.attempts[0].trace.facts.get("callbacks", [])
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
        d.cause = hidden or (when_resumed if resumed else otherwise) + _or_callbacks(
            callbacks if d.what != "samples" else ()
        )
        if d.what == "samples" and worker:
            d.cause = f"{hidden}; or {worker}" if hidden else worker
    elif d.what in ("loss", "norm", "gradients"):
        d.cause, d.advice = _cause_in_model(d, hidden, resumed, _or_callbacks(callbacks))
    elif d.what in ("state", "values"):
        d.cause, d.advice = _cause_in_update(d, hidden, resumed, _or_callbacks(callbacks))
    elif d.what == "done":
        d.cause, d.advice = _CAUSE_OF_ONE_SIDED
    else:
        d.cause = (
            "the state in memory was the same, and the checkpoint is not: its file was changed after it was written, "
            "or an evaluation or a save changed the state by more than the weights determine"
        )
        d.advice = "compare the tensors with `distrain checkpoint diff`, and find out what else writes to the folder"
    if named and named in d.cause:
        d.advice = _COLLATE if named.startswith("task.collate") else _ADVICE.get(_root(named), d.advice)
    elif first and not named and not by_hash and not resumed:
        # it may say when or where a process began, and nothing of the difference
        d.cause += f"; {first[0][0]} differed as well"


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
        d.cause = (
            "the learning rate depends on the number of processes: in the schedule, or as the optimizer changes it"
        )
        d.advice = _LEARNING_RATE
    elif d.what == "start":
        d.cause = "the model is built otherwise with another number of processes"
        d.advice = "build the model from its arguments alone: do not read RANK or WORLD_SIZE; " + _SEEDS
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


def _changed_file(d: Divergence) -> str:
    """Return a changed file that may be the cause, or an empty string; a file that is only written is none."""
    return next((path for path, _, _ in d.files if not path.endswith(WRITTEN_ONLY)), "") if d.what != "done" else ""


_ROOTS = {
    "ids": ("data",),
    "samples": ("data", "task"),
    "inputs": ("transforms", "callback"),
    "targets": ("transforms", "data", "callback"),
    "lr": ("optimizer", "schedule", "callback"),
    "loss": ("model", "loss", "task", "callback"),
    "norm": ("model", "loss", "task", "callback"),
    "gradients": ("model", "loss", "task", "callback"),
    "state": ("optimizer", "model", "callback"),
    "values": ("optimizer", "callback"),
    "evaluation": ("model", "metrics", "loss", "task", "evaluated data", "evaluated transforms", "callback"),
    "start": ("model", "optimizer", "callback"),
}
_ALL_ROOTS = {root for roots in _ROOTS.values() for root in roots}


def _root(path: str) -> str:
    """Return where state is kept; empty for that of a file, a class or a function."""
    root = path.removeprefix("the weights of ").partition(".")[0]
    return root if root in _ALL_ROOTS and (not path.endswith(")") or "(a buffer" in path) else ""


def relevant_suspects(d: Divergence) -> list[tuple[str, str, str]]:
    """Return the suspects that can affect what differs, the closest first."""
    roots = _ROOTS.get(d.what, tuple(_ALL_ROOTS))

    def distance(suspect: tuple[str, str, str]) -> int:
        return ("callback", "").index(_root(suspect[0])) + 1 if _root(suspect[0]) in ("callback", "") else 0

    # what is state of a file, a class or a function may affect everything
    return sorted((each for each in d.suspects if _root(each[0]) in ("", *roots)), key=distance)


def explains(suspect: tuple[str, str, str]) -> bool:
    """Whether state explains a difference by itself: not that of a callback, which may be a note of its own, nor a
    variable of a file."""
    return _root(suspect[0]) not in ("", "callback")


def _or_callbacks(names: Sequence[str]) -> str:
    return f", or a callback ({some(names, 3)}) does" if names else ""


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


def _cause_in_model(d: Divergence, hidden: str, resumed: bool, callbacks: str) -> tuple[str, str]:
    same, who = "weights and inputs were the same", "the model or the loss"
    return _cause_in_code(d, hidden, resumed, same, who, _MODEL, callbacks)


def _cause_in_update(d: Divergence, hidden: str, resumed: bool, callbacks: str) -> tuple[str, str]:
    if d.subject.endswith("(buffer)"):
        return hidden or "the model updates a buffer from state that no checkpoint holds", _MODEL
    return _cause_in_code(d, hidden, resumed, "gradients were the same", "the optimizer", _OPTIMIZER, callbacks)


def _cause_in_code(
    d: Divergence, hidden: str, resumed: bool, same: str, who: str, advice: str, callbacks: str
) -> tuple[str, str]:
    """Return the cause of a difference that `who` made where its inputs were the `same`."""
    if hidden:
        return hidden, advice
    if resumed:
        return f"{same}, so {who} keeps state that no checkpoint holds{callbacks}", advice
    if d.gap is not None and d.gap <= ROUNDING:
        return f"{same}, and the difference has the size of rounding: a nondeterministic operation", _DETERMINISM
    return f"{same}, so {who} draws unseeded random numbers, or reads something that changes{callbacks}", advice


def _loader_process_cause(d: Divergence) -> str:
    processes = [text.rpartition("loader process ")[2] for text in (d.baseline, d.other) if "loader process" in text]
    if len(set(processes)) < 2:
        return ""
    return (
        f"loader process {processes[0]} read the sample in the baseline run and {processes[1]} here: the data set "
        "depends on the loader process (torch.utils.data.get_worker_info, or a counter or generator in each)"
    )
