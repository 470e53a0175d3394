"""The folders that a run writes: what their file systems can do, how much they have left, and what time they keep."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.system.memory import gib

_CHOOSE = "choose a folder on another file system with --run-dir"
_APART_S = 2.0
"""Seconds that the clocks of a machine and of its file server may differ."""
_LITTLE, _NOTHING = 2**30, 64 * 2**20
"""Bytes below which a folder is nearly full, and full, where the size of checkpoints is not known."""
_FEW_FILES = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = 64 * 2**20


def run_folder(context: Context) -> Iterator[Finding]:
    """What a checkpoint asks of the run folder's file system: atomic renames, fsync, exclusive files, locks."""
    place = context.existing
    try:
        trial = Path(tempfile.mkdtemp(prefix=".distrain-doctor-", dir=place))
    except OSError as problem:
        if problem.errno in _FULL:
            yield _full(place, problem)
            return
        yield error(
            f"{place} cannot be written: {problem.strerror or problem}",
            "a run cannot begin there",
            f"make it writable (chmod, or mount it with rw), or {_CHOOSE}",
        )
        return
    try:
        problems = [
            (what, *found) for what, trying in _TRIALS.items() if (found := _problem(trying, trial)) is not None
        ]
        for what, why, severe in problems:
            means, do = _MEANS[what]
            yield (error if severe else warning)(f"{what} does not work in {place}: {why}", means, do)
        if not problems:
            yield ok(f"{place} ({file_system(place)}): rename, fsync, exclusive files and locks work")
    except OSError as problem:
        yield _full(place, problem)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _full(place: Path, problem: OSError) -> Finding:
    return error(
        f"{place} has no space for a file of 64 KiB: {problem.strerror or problem}",
        "a run cannot write its log and its checkpoints",
        f"delete what is not needed there, ask for a larger quota, or {_CHOOSE}",
    )


def _problem(trying: Callable[[Path], str | None], trial: Path) -> tuple[str, bool] | None:
    """Return what is wrong by a trial, and whether a run ends for it: of locks that are refused it has another way.

    Raises OSError where there is no space for the trial.
    """
    try:
        why = trying(trial)
    except OSError as problem:
        if problem.errno in _FULL:
            raise
        refused = trying is _lock and problem.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
        return f"{problem.strerror or problem}", not refused
    return None if why is None else (why, True)


def _rename(trial: Path) -> str | None:
    old, new = trial / "renamed", trial / "renamed.new"
    old.write_text("old")
    new.write_text("new")
    with old.open() as held:
        new.replace(old)
        if old.read_text() != "new" or new.exists():
            return "the new file is not in the place of the old one"
        if held.read() != "old":
            return "a file that is open changed when another took its name"
    folder = trial / "step.tmp"
    folder.mkdir()
    (folder / "MANIFEST.json").write_text("{}")
    folder.rename(trial / "step")
    return None if (trial / "step" / "MANIFEST.json").is_file() else "a folder lost its files when it was renamed"


def _fsync(trial: Path) -> str | None:
    with (trial / "synced").open("wb") as file:
        file.write(b"x" * 65536)
        file.flush()
        os.fsync(file.fileno())
    handle = os.open(trial, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return None if (trial / "synced").stat().st_size == 65536 else "a file is shorter than what was written"


def _exclusive(trial: Path) -> str | None:
    path = trial / "exclusive"
    for attempt in range(2):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return None if attempt else "a new file was there already"
    return "two processes may both create the same file"


def _lock(trial: Path) -> str | None:
    with (trial / "locked").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _in_other_process(_try_lock, trial / "locked"):
            return "two processes hold the same lock"
    return None if _in_other_process(_try_lock, trial / "locked") else "a lock stays when its holder is gone"


def _try_lock(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _in_other_process(function: Callable[[Path], Any], path: Path) -> Any:
    forks = multiprocessing.get_context("fork")
    ours, theirs = forks.Pipe(duplex=False)
    process = forks.Process(target=lambda: theirs.send(function(path)))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def _times(trial: Path) -> str | None:
    path = trial / "times"
    path.touch()
    before = path.stat().st_mtime
    os.utime(path, (before + 10, before + 10))
    return None if abs(path.stat().st_mtime - before - 10) < 1 else "the time of a file does not change when it is set"


_TRIALS = {
    "renaming over a file": _rename,
    "fsync": _fsync,
    "creating a file exclusively": _exclusive,
    "locking": _lock,
    "setting a file's time": _times,
}
_MEANS = {
    "renaming over a file": ("a checkpoint that is published may be incomplete, or the run ends", _CHOOSE),
    "fsync": (
        "a checkpoint counts as saved before it is on disk, so that a crash of the machine loses it; or the run ends",
        f"look at the disk and its mount options, or {_CHOOSE}",
    ),
    "creating a file exclusively": ("two ranks may both write the reason of a failure, and one is lost", _CHOOSE),
    "locking": (
        "only their heartbeats show that two attempts are at the same run, which takes 15 s at a start",
        "mount the file system with locks (NFS without nolock, Lustre with -o flock)",
    ),
    "setting a file's time": ("whether another attempt lives is read from the times of its heartbeat", _CHOOSE),
}


def file_system(place: Path) -> str:
    """Return the kind of file system that a folder is on, such as ext4 or nfs4."""
    place = place.resolve()
    best, kind = -1, "unknown"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            mount = Path(before.split()[4].replace("\\040", " "))
            if place.is_relative_to(mount) and len(mount.parts) >= best:
                best, kind = len(mount.parts), after.split()[0]
    return kind


# --------------------------------------------------------------------------------------------------------------------
# Space


def space(context: Context) -> Iterator[Finding]:
    """The space and the number of files that are left where the run is, against its checkpoints."""
    place = context.existing
    free, total, files = _left(place)
    said = f"{gib(free)} of {gib(total)} free in {place}"
    if files is not None and files < _FEW_FILES:
        yield error(
            f"{files} more files may be made in {place}",
            "a checkpoint has a file for each rank, and a run some dozens: it ends with 'No space left on device'",
            f"delete small files there, or {_CHOOSE}",
        )
    predicted = _predicted(context)
    if isinstance(predicted, str):
        said += f"; {predicted}" if predicted else ""
        clear = f"delete what is not needed there, or {_CHOOSE}"
        if free < _NOTHING:
            yield error(said, "a run has no space for its log and a checkpoint", clear)
        elif free < _LITTLE:
            yield warning(
                said, "checkpoints hold the model and twice its size of optimizer state, several times", clear
            )
        else:
            yield ok(said)
        return
    each, kept, needed = predicted
    from distrain.plan.showing import size_text

    there = _size(context.folder)
    told = f"{said}; {kept} checkpoints of {size_text(each)} and the export take {size_text(needed)}"
    if free + there < needed:
        yield error(
            told,
            "a checkpoint that cannot be written ends the run (checkpoint.on_failure)",
            f"delete what is not needed there, keep fewer (checkpoint.keep, checkpoint.keep_best), or {_CHOOSE}",
        )
    elif free + there < 1.2 * needed:
        yield warning(told, "logs and what others write may take the rest", f"delete what is not needed, or {_CHOOSE}")
    else:
        yield ok(told)


def _left(place: Path) -> tuple[int, int, int | None]:
    """Return bytes that are free and in all, and how many files may be made; None: as many as fit."""
    status = os.statvfs(place)
    files = status.f_favail if status.f_files else None
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, files


def _size(folder: Path) -> int:
    """Return the bytes of the checkpoints and exports that a run has already, and replaces."""
    files = (each for name in ("checkpoints", "export") for each in (folder / name).rglob("*") if each.is_file())
    return sum(each.stat().st_size for each in files)


def _predicted(context: Context) -> tuple[int, int, int] | str:
    """Return bytes of a checkpoint, how many are there at most at a time, and bytes of all with the export; or why not.

    One more than are kept: the oldest goes when the newest is whole.
    """
    recipe = context.recipe
    if recipe is None:
        return ""
    if recipe.data.path is not None and not Path(recipe.data.path).exists():
        return "the size of its checkpoints is not known without its data"
    from distrain.config import UserError
    from distrain.plan.command import plan_of
    from distrain.plan.planning import gpu_here

    try:
        plan = plan_of(recipe, gpu_here(), context.nodes, context.processes)
    except UserError as problem:
        return f"the size of its checkpoints is not known: {problem}"
    kept = plan.kept + 1 if plan.checkpoints is None or plan.checkpoints > plan.kept else plan.kept
    return plan.checkpoint_bytes, kept, kept * plan.checkpoint_bytes + plan.model.nbytes


# --------------------------------------------------------------------------------------------------------------------
# Other folders


def temporary_folder(context: Context) -> Iterator[Finding]:
    """The folder for temporary files."""
    try:
        place = Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(prefix="distrain-doctor-"):
            pass
    except OSError as problem:
        yield error(
            f"no temporary file can be made: {problem.strerror or problem}",
            "PyTorch, loader processes and compilers need some: they end with an error",
            "point TMPDIR to a folder that can be written",
        )
        return
    free, total, _ = _left(place)
    if free < _TEMPORARY:
        yield warning(
            f"{gib(free)} of {gib(total)} are free in {place}",
            "sockets of loader processes and what compilers write go there: a run may end in the middle",
            "clear it, or point TMPDIR to another folder",
        )
    elif os.statvfs(place).f_flag & os.ST_NOEXEC:
        compiles = context.recipe is not None and bool(context.recipe.train.compile)
        yield (error if compiles else warning)(
            f"{place} is mounted without exec",
            "train.compile and kernels that are built at the start are loaded from there: 'failed to map segment'",
            "point TMPDIR and TORCHINDUCTOR_CACHE_DIR to a folder from which programs may run",
        )
    else:
        yield ok(f"{gib(free)} of {gib(total)} free in {place}")


def caches(context: Context) -> Iterator[Finding]:
    """The folders in which libraries keep what they download and compile."""
    home = context.variables.get("HOME") or os.path.expanduser("~")
    places = {
        "HOME": home,
        "HF_HOME": context.variables.get("HF_HOME", os.path.join(home, ".cache", "huggingface")),
        "TRITON_CACHE_DIR": context.variables.get("TRITON_CACHE_DIR", os.path.join(home, ".triton")),
        "TORCHINDUCTOR_CACHE_DIR": context.variables.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()),
    }
    problems: dict[Path, list[str]] = {}
    why: dict[Path, str] = {}
    for name, place in places.items():
        folder = Path(place)
        there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
        try:
            with tempfile.NamedTemporaryFile(prefix=".distrain-doctor-", dir=there):
                pass
        except OSError as problem:
            problems.setdefault(there, []).append(name)
            why[there] = problem.strerror or str(problem)
    for there, names in problems.items():
        yield warning(
            f"{there} cannot be written: {why[there]}; {' and '.join(names)} lead{'s' * (len(names) == 1)} there",
            "weights are downloaded and kernels compiled anew by each process, or they fail to be",
            f"export {' '.join(f'{name}=FOLDER' for name in names)}, on a file system that can be written",
        )
    if not problems:
        yield ok(f"{home} and the caches of Hugging Face, Triton and PyTorch can be written")


def clock(context: Context) -> Iterator[Finding]:
    """This machine's clock, against the time that the run folder's file system gives to files."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".distrain-doctor-", dir=context.existing) as file:
            before = time.time()
            os.utime(file.name)  # a server's time, where there is one
            after = time.time()
            given = os.stat(file.name).st_mtime
    except OSError:
        return  # said with the run folder
    ahead = given - after if given > after else min(given - before, 0.0)
    if abs(ahead) > _APART_S:
        yield warning(
            f"{context.existing} is {abs(ahead):,.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's clock",
            "the times of logs and of files disagree, and what is newest by its time is not",
            "have both keep time by NTP (chronyc tracking, timedatectl set-ntp true)",
        )
        return
    newest = Path(__file__).stat().st_mtime
    if newest > after + 86400:
        yield warning(
            f"this machine's clock says {time.strftime('%Y-%m-%d %H:%M')}, before distrain was installed",
            "certificates are not yet valid, and files that are written now look old",
            "set the clock (timedatectl set-ntp true)",
        )
        return
    yield ok(f"the same as that of {context.existing}, within {max(abs(ahead), 0.01):.2f} s")
