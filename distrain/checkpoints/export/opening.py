"""Opens a checkpoint of any format: finds out which it is, and gives its tensors their names in distrain."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.checkpoints.dtypes import FLOATS
from distrain.checkpoints.export.companion_files import FOLDER, companions_of, run_of
from distrain.checkpoints.format import MANIFEST, CheckpointError, Manifest, error_reason
from distrain.checkpoints.rank_files import Part
from distrain.checkpoints.reading import (
    OTHER_BYTES,
    Reader,
    find_checkpoint,
    is_checkpoint_name,
    not_verified,
    read_manifest,
)
from distrain.checkpoints.sources import NO_TENSORS, Check, Source, Stored
from distrain.run.folder import RunDir
from distrain.system.bounded_json import MOST_STEPS
from distrain.system.errors import UserError, close_names, some

if TYPE_CHECKING:
    import numpy as np

COUNTED = "is the optimizer's own count"
_AS_BUFFERS = "taken for buffers"
_ELEMENTWISE = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "exp_inf",
    "square_avg",
    "grad_avg",
    "sum",
    "acc_delta",
    "ax",
    "prev",
    "step_size",
)
"""The state of torch's optimizers of which each weight has one number. Their fused kernels do not look at shapes."""
_SETTINGS = ("lr", "betas", "momentum", "weight_decay", "eps")
_CHUNK = 1 << 18  # elements compared at a time
_BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")


def find_source(target: Path | str, *, best: bool = False, format: str | None = None) -> tuple[Path, str | None]:
    """Return the checkpoint that `target` names (itself, or one of a run), and its format if it is foreign.

    Raises UserError if it is neither.
    """
    path = Path(target)
    native = (path / MANIFEST).exists() or RunDir(path).checkpoints.is_dir() or not path.exists()
    if format is None and (native or is_checkpoint_name(path.name)):
        return find_checkpoint(path, best=best), None
    if best:
        raise UserError(f"{path} is not a run of distrain's; --best goes with a run folder")
    return path, format or detect(path)


def open_tensors(path: Path | str) -> tuple[Source, list[str]]:
    """Return the tensors of a run or of a checkpoint of any format, and notes on how they were understood.

    Only the model is opened, and checked against its hashes first. Raises UserError.
    """
    found, format = find_source(path)
    if format is None:
        native = open_native(found, verify=True)
        native.verify()
        averaged = any(name.startswith("ema/") for name in native.names)
        return native, [f"the weights of {found.name}, not their moving average, which an export has"] * averaged
    source = open_foreign(found, format=format, optimizer=False)
    source.verify(name for name in source.names if name.startswith("model/"))
    # which tensors are buffers does not matter to a model that knows it
    notes = [note for note in source.notes if not note.startswith(_AS_BUFFERS)]
    if any(name.startswith("ema/") for name in source.names):
        notes.append(f"the weights of {found.name}, not their moving average, which `distrain export --ema` writes")
    return source, [*notes, *(what for what in source.skipped if NO_TENSORS in what)]


class NativeSource(Source):
    """The tensors of a checkpoint of distrain's own: what lies in a file is listed when the file's turn comes."""

    def __init__(self, path: Path, verify: bool):
        super().__init__(path, "distrain")
        self._reader = Reader(path, verify, contents=False)
        self._reading = threading.Lock()
        manifest = self.manifest = self._reader.manifest
        self.files = [(path / info.name, info.size) for info in manifest.files]
        self.aliases = manifest.aliases
        self.tensors = {
            name: Stored(tensor.spec, tensor.spec.dtype, (tensor.spec.numel,), ())
            for name, tensor in manifest.tensors.items()
        }

    def in_runs(self, name: str) -> bool:
        """All its tensors do."""
        return name in self.tensors

    def parts(self, names: Collection[str]) -> dict[int, Callable[[], list[Part]]]:
        """Return, for each file that these tensors lie in, what lists their parts in the order of the file."""
        files: set[int] = set()
        for first, _, _, count in {run for name in names for run in self.manifest.tensors[name].runs}:
            files.update(range(first, first + count))
        return {file: partial(self._parts, file, names) for file in sorted(files)}

    def _parts(self, file: int, names: Collection[str]) -> list[Part]:
        return [part for part in self._reader.listed(file) if part[2] in names]

    def count_parts(self, names: Iterable[str]) -> int:
        """Return how many there are in all files."""
        return sum(run[3] for name in names for run in self.manifest.tensors[name].runs)

    def gather(self, name: str, start: int, numel: int) -> np.ndarray:
        """Return the bytes (uint8) of elements [start, start + numel); threads may share the source."""
        with self._reading:
            return self._reader.read(name, start, numel)

    def checks(self, names: Iterable[str] | None = None) -> list[Check]:
        """Return the hash of each file, whatever the tensors."""
        return [Check(file, 0, info.size, info.xxh3_128) for file, info in enumerate(self.manifest.files)]

    def damage(self, bad: Iterable[Check]) -> UserError:
        """Return the error for files whose hashes do not hold."""
        return not_verified(self.path, [f"{self.files[check.file][0].name}: {OTHER_BYTES}" for check in bad])

    def close(self) -> None:
        """Close all files."""
        self._reader.close()
        super().close()


def open_native(path: Path, verify: bool) -> Source:
    """Open a checkpoint of distrain's own; raises CheckpointError.

    `verify` looks at which files there are, and not at their bytes, which `Source.checks` are for.
    """
    source = NativeSource(path, verify)
    if "meta" in source.manifest.scalars:
        source.close()
        raise CheckpointError(
            f"{path} has adapters, or refers to weights that it does not store: it is no model in itself. Export it "
            "(distrain export), and take that file"
        )
    describe(source, source.manifest)
    return source


def is_built(checkpoint: Path) -> bool:
    """Whether the model of a checkpoint must be built to be exported: it has adapters, or refers to frozen weights.

    Raises CheckpointError.
    """
    return (checkpoint / MANIFEST).exists() and "meta" in read_manifest(checkpoint).scalars


def describe(source: Source, manifest: Manifest) -> Source:
    """Add to a source what a checkpoint says of its model besides the tensors; returns it."""
    path = source.path
    source.renamed = set(manifest.scalars.get("model_renamed", []))
    config = manifest.scalars.get("transformers_config")
    folder = run_of(path) / FOLDER
    kept = companions_of(folder)[0]
    if isinstance(config, str):
        source.config, source.companions = config, kept
    expected = manifest.scalars.get("transformers_files")
    if isinstance(expected, list) and (missing := sorted(set(expected) - kept.keys())):
        source.notes.append(f"skipped: {some(missing)}, which are not in {folder}")
    if values := sorted(manifest.scalars.get("model_state", {})):
        source.notes.append(f"not in the file, because they are not tensors: {some(values)}; load it with strict=False")
    return source


def open_foreign(
    path: Path | str,
    *,
    format: str | None = None,
    trust: bool = False,
    tied: Mapping[str, str] | None = None,
    buffers: Sequence[str] = (),
    optimizer: bool = True,
) -> Source:
    """Open a foreign checkpoint, a file or a folder; reads its listings and none of its tensors.

    `format` is a name in the registry of formats, or `path/to/file.py:NAME` or `package.module:NAME` of a function
    (source, path, *, trust) that adds to the source; None detects it. `trust` lets a process of its own run the code
    in pickles that hold more than tensors. `tied` {alias: name} names tensors that are the same, for formats that
    store both. `buffers`: patterns of buffers' names, for formats that do not tell them from parameters.
    `optimizer=False` skips the optimizer's state. Raises UserError: the format is unknown, or the checkpoint is
    damaged, incomplete, or holds code.
    """
    from distrain.config.registry import formats  # with the whole recipe: opening one's own needs none

    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    path = path.resolve()  # the user named it; what it contains may not lead elsewhere
    entry = formats.find(format or detect(path))
    expected = entry.about or f"what {entry.name} opens"
    if not callable(entry.value):
        raise UserError(f"--format: {entry.name!r} is {entry.value!r}; expected a function (source, path, *, trust)")
    if trust and not entry.metadata.get("pickles", True):
        raise UserError(f"{path}: --trust changes nothing for {expected}, which runs no code; remove it")
    if entry.registered and entry.metadata.get("folder", True) and not path.is_dir():
        raise UserError(f"{path} is a file; expected {expected}")
    source = Source(path, expected.partition(",")[0], wants_optimizer=optimizer)
    try:
        with _refusing(path, expected):
            entry.value(source, path, trust=trust)
            _tie(source, tied or {})
            _name_buffers(source, buffers)
            _fit_average(source)
            source.check()
            if source.step is None:
                _find_step(source)
            if source.config is not None and path.is_dir():
                source.companions = companions_of(path)[0]
    except BaseException:
        source.close()
        raise
    return source


def detect(path: Path) -> str:
    """Return the format of `path`, from its content; raises UserError."""
    with _refusing(path, "a known checkpoint format"):
        return _detect(path)


@contextmanager
def _refusing(path: Path, expected: str) -> Iterator[None]:
    """Raise UserError, naming the file, for whatever a damaged or unknown file leads to."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise UserError(f"{path}: {error_reason(error)}") from error
    except UserError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
        raise UserError(f"{path} is damaged, or not {expected} ({reason})") from error


def _detect(path: Path) -> str:
    from distrain.config.registry import formats

    # the more particular formats first: a folder of DeepSpeed's may hold a safetensors file besides
    known = sorted(formats.entries(), key=lambda entry: entry.metadata.get("order", math.inf))
    for entry in known:
        if (found := entry.metadata.get("found")) is not None and found(path):
            return entry.name
    expected = "; ".join(entry.about for entry in formats.entries())
    if path.is_file():
        raise UserError(f"{path} is neither a safetensors file nor one of torch.save; expected {expected}")
    inside = sorted(entry.name for entry in path.iterdir())
    shown = f"it holds {', '.join(inside[:5])}" if inside else "it is empty"
    raise UserError(f"{path} is not a checkpoint in a known format: {shown}; expected {expected}")


def _tie(source: Source, tied: Mapping[str, str]) -> None:
    for alias, name in tied.items():
        one, other = f"model/{alias}", f"model/{name}"
        names = [name.removeprefix("model/") for name in source.names if name.startswith("model/")]
        for each in (alias, name):
            if each not in names:
                raise UserError(f"{source.path} has no tensor {each!r}{close_names(each, names)}")
        if not _equal(source, one, other):
            raise UserError(f"{alias} and {name} are not tied: their elements differ")
        del source.tensors[one]
        source.aliases[one] = other
        for full in [n for n in source.names if n == f"ema/{alias}" or n.rpartition("/")[0] == f"optimizer/{alias}"]:
            del source.tensors[full]


def _equal(source: Source, one: str, other: str) -> bool:
    spec = source.spec(one)
    if source.spec(other) != spec or source.tensors[one].dtype != source.tensors[other].dtype:
        return False
    return all(
        source.gather(one, start, count).data == source.gather(other, start, count).data
        for start in range(0, spec.numel, _CHUNK)
        if (count := min(_CHUNK, spec.numel - start))
    )


def _name_buffers(source: Source, patterns: Sequence[str]) -> None:
    """Give buffers their role: by the format, by the patterns, or else by their usual names and dtypes."""
    usual, found = [], set(source.buffers or ())
    trained = {name.removeprefix("optimizer/").rpartition("/")[0] for name in source.names if name.startswith("opt")}
    for full in source.names:
        plain = full.removeprefix("model/")
        if not full.startswith("model/") or plain in trained:
            continue
        if any(fnmatchcase(plain, pattern) for pattern in patterns):
            found.add(plain)
        elif source.buffers is None:
            floating = source.spec(full).dtype in FLOATS
            if not floating or any(fnmatchcase(plain, pattern) for pattern in _BUFFERS):
                usual.append(plain)
    for pattern in patterns:
        if not any(fnmatchcase(name.removeprefix("model/"), pattern) for name in source.names):
            raise UserError(f"--buffers {pattern!r} matches no tensor of {source.path}")
    for plain in [*found, *usual]:
        stored = source.tensors[f"model/{plain}"]
        source.tensors[f"model/{plain}"] = replace(stored, spec=replace(stored.spec, role="buffer"))
    if usual:
        source.notes.append(f"{_AS_BUFFERS}, by name or dtype: {some(sorted(usual))}; --buffers names others")


def _fit_average(source: Source) -> None:
    """Drop what an average has of tied weights a second time."""
    for full in [full for full in source.names if full.startswith("ema/")]:
        other = source.aliases.get(f"model/{full.removeprefix('ema/')}", "").replace("model/", "ema/", 1)
        if other in source.tensors and _equal(source, full, other):
            del source.tensors[full]
    source.aliases = {alias: name for alias, name in source.aliases.items() if name in source.tensors}


def _find_step(source: Source) -> None:
    """Set the step to the one that is recorded, or to the optimizer's own count; note where these differ."""
    count, recorded = _count_steps(source), source.steps
    if count is not None and (not recorded or count in recorded.values()):
        source.step = count
        source.notes += [] if recorded else [f"step {count} {COUNTED}"]
        return
    source.step = next(iter(recorded.values()), None)
    if len(set(recorded.values()) | ({count} - {None})) > 1:
        said = " and ".join(f"{key} {value}" for key, value in recorded.items())
        source.doubt = f"it records {said}" + (
            f", and its optimizer counted {count} steps" if count is not None else ""
        )


def _count_steps(source: Source) -> int | None:
    """Return the optimizer's own count, if all parameters agree on it."""
    counts = {source.number(name) for name in source.names if name.startswith("optimizer/") and name.endswith("/step")}
    kept = [values["step"] for values in source.optimizer_values.values() if "step" in values]
    if all(isinstance(value, int | float) for value in kept):
        counts |= set(kept)
    else:
        counts.add(None)
    count = counts.pop() if len(counts) == 1 else None
    # neither NaN nor infinite
    return int(count) if count is not None and 0 <= count < MOST_STEPS and count == int(count) else None


def check_optimizer(source: Source) -> None:
    """Raise UserError where state is not of its parameter's shape; note parameters without state, and the settings.

    State in 16 bits gets its parameter's dtype.
    """
    if source.optimizer_problem:
        raise UserError(f"{source.path}: {source.optimizer_problem}; drop its state with --no-optimizer")
    stored: dict[str, set[str]] = {}
    for full in source.names:
        if not full.startswith("optimizer/"):
            continue
        name, _, key = full.removeprefix("optimizer/").rpartition("/")
        stored.setdefault(name, set()).add(key)
        model = source.aliases.get(f"model/{name}", f"model/{name}")
        if model not in source.tensors or key not in _ELEMENTWISE:
            continue
        found, needed = source.spec(full), source.spec(model)
        if found.shape != needed.shape:
            raise UserError(
                f"{source.path}: the optimizer's {key} of {name} has the shape {list(found.shape)}, and {name} has "
                f"{list(needed.shape)}: its state is in another order than the names; leave it out with --no-optimizer"
            )
        if found.dtype in ("F16", "BF16") and needed.dtype in FLOATS:  # as torch's load_state_dict does
            source.tensors[full] = replace(source.tensors[full], spec=replace(found, dtype=needed.dtype))
    kept = {*stored, *source.optimizer_values}
    without = [
        name.removeprefix("model/")
        for name in source.names
        if name.startswith("model/")
        and source.spec(name).role == "parameter"
        and name.removeprefix("model/") not in kept
    ]
    if without and kept:
        source.notes.append(f"no state of the optimizer for {some(without)}: frozen, or it starts anew")
    settings = {
        f"{key} {value}" for group in source.optimizer_groups for key, value in group.items() if key in _SETTINGS
    }
    if settings:
        source.notes.append(f"its optimizer had {some(sorted(settings), 9)}: a run takes those of its recipe")
