"""The contents of a checkpoint, and the strict reader of its manifest."""

from __future__ import annotations

import errno
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import xxhash

from distrain.checkpoints.arena import Bytes, Source
from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.system import bounded_json as bounded
from distrain.system.errors import UserError
from distrain.system.numbers import a_kind

if TYPE_CHECKING:
    import numpy as np

VERSION = 3
"""Of manifests that refer to frozen weights."""
RUNS_VERSION = 2
"""Of others that list runs of pieces; the rest are of version 1."""
LISTED_RUN = 8
"""Pieces that a manifest lists as one run; small worlds write what earlier versions read."""
MANIFEST = "MANIFEST.json"
MAX_MANIFEST = bounded.SUMMARY
"""Bytes: some hundred thousand tensors, or a thousand in pieces of a thousand ranks."""
ROLES = ("parameter", "buffer", "optimizer", "ema", "state")

_PREFIXES = {
    "parameter": ("model/",),
    "buffer": ("model/",),
    "optimizer": ("optimizer/", "optimizer-group/", "optimizer-key/"),
    "ema": ("ema/",),
    "state": ("model/", "state/", "exported/", "exported-ema/"),
}
_SELF_HASH = re.compile(rb'\{"xxh3_128":"([0-9a-f]{32})",')
_T = TypeVar("_T")


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names the rank, host, file and reason."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and role of a full tensor."""

    shape: tuple[int, ...]
    """() for a single number; a tensor with a 0 in its shape has no elements and no pieces."""
    dtype: str
    """A name of `dtypes.DTYPES`: F64, F32, F16, BF16, I64, BOOL, …"""
    role: str
    """parameter, buffer, optimizer, ema, or state (anything else that a model keeps)."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZES:
            raise CheckpointError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_SIZES)}")
        if self.role not in ROLES:
            raise CheckpointError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        # called for each tensor: no generator
        if (self.shape and ({*map(type, self.shape)} != {int} or min(self.shape) < 0)) or self.nbytes >= 2**63:
            raise CheckpointError(f"{self.shape!r} is not a tensor's shape")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor's elements, with its bytes."""

    name: str
    """The full tensor's canonical name: `model/NAME`, `optimizer/NAME/exp_avg`, `ema/NAME`."""
    start: int
    """Index of its first element in the flattened full tensor."""
    data: memoryview | np.ndarray | Source
    """The elements' bytes: one-dimensional, uint8, contiguous; or what knows where they are."""
    copied: bool = False
    """Whether the memory stays unchanged until the save is finished, so that it need not be copied."""

    @property
    def source(self) -> Source:
        """The elements, wherever they are."""
        data: Any = self.data
        return data if hasattr(data, "to_host") else Bytes(data)


@dataclass(frozen=True)
class FileInfo:
    """One rank's file as written."""

    name: str
    size: int
    """Bytes."""
    xxh3_128: str


Run = tuple[int, int, int, int]
"""(file, start, numel, count): `count` pieces of `numel` elements, side by side, one in each file from `file` on."""


def add_piece(runs: list[Run], file: int, start: int, numel: int, count: int = 1) -> None:
    """Add pieces, of which there may be a million, to runs: a tensor that ranks share evenly has one or two."""
    if runs:
        first, begin, each, length = runs[-1]
        if (first + length, begin + each * length, each) == (file, start, numel):
            runs[-1] = first, begin, each, length + count
            return
    runs.append((file, start, numel, count))


@dataclass(frozen=True)
class Tensor:
    """A full tensor in a checkpoint."""

    spec: TensorSpec
    runs: tuple[Run, ...]
    """In order of `start`: their pieces tile the tensor exactly."""

    @property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """(file, start, numel) of each piece in order of `start`: as many as there are ranks, or more."""
        return tuple(self.pieces_from(0))

    def pieces_from(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces from the one on that holds element `start`."""
        first = max(0, bisect_right(self.runs, start, key=lambda run: run[1]) - 1)
        for file, begin, numel, count in islice(self.runs, first, None):
            for index in range(min(count - 1, max(0, start - begin) // numel), count):
                yield file + index, begin + index * numel, numel

    def listed(self) -> list[tuple[int, ...]]:
        """Return the pieces as a manifest lists them: long runs as one entry."""
        found: list[tuple[int, ...]] = []
        for file, start, numel, count in self.runs:
            if count >= LISTED_RUN:
                found.append((file, start, numel, count))
            else:
                found += [(file + index, start + index * numel, numel) for index in range(count)]
        return found


@dataclass(frozen=True)
class Criterion:
    """What ranks checkpoints. Scores by another criterion are not compared."""

    metric: str
    higher: bool
    """Whether higher is better."""
    split: str | None = None
    """The split that is evaluated."""
    data: str | None = None
    """A digest of that split's content."""

    def __str__(self) -> str:
        where = f" on {self.split}" if self.split else ""
        return f"{self.metric}{where} ({'higher' if self.higher else 'lower'} is better)"


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a checkpoint, and the criterion that ranked checkpoints when it was saved."""

    criterion: Criterion
    values: dict[str, float]
    """The loss and each metric that is one finite number; empty if this step was not evaluated."""
    higher: dict[str, bool]
    """For metrics whose direction is known: whether higher is better."""

    def score(self, by: Criterion) -> float | None:
        """Return the score by a criterion, higher being better; None if unknown."""
        same = (self.criterion.split, self.criterion.data) == (by.split, by.data)
        value = self.values.get(by.metric) if same else None
        return None if value is None else value if by.higher else -value

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `from_json` reads."""
        return {**vars(self.criterion), "values": self.values, "directions": self.higher}

    @classmethod
    def from_json(cls, content: Any) -> Evaluation:
        """Return the evaluation that `to_json` wrote; raises CheckpointError."""
        text, numbers = (str, type(None)), {"values": dict, "directions": (dict, type(None))}
        known = fields(content, "'evaluation'", metric=str, higher=bool, split=text, data=text, **numbers)
        values, higher = known.pop("values"), known.pop("directions") or {}
        if {type(each) for each in values.values()} - {int, float} or {type(each) for each in higher.values()} - {bool}:
            raise CheckpointError(
                "'evaluation': expected a number for each of its values, and true or false for directions"
            )
        return cls(Criterion(**known), {name: float(each) for name, each in values.items()}, higher)


@dataclass(frozen=True)
class FrozenTensor:
    """A tensor that is not trained, and that a checkpoint refers to instead of storing it."""

    spec: TensorSpec
    xxh3_128: str
    """Of its elements in row-major order."""


@dataclass(frozen=True)
class Frozen:
    """The tensors that a checkpoint refers to: they are the initial weights of its recipe."""

    key: str
    """The recipe's key that says where they come from: model.weights, model.path, or seed."""
    path: str | None
    """The file or folder that it named; None for seed."""
    tensors: dict[str, FrozenTensor]
    """By full name, `model/NAME`."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `from_json` reads."""
        tensors = {
            name: {"shape": list(each.spec.shape), "dtype": each.spec.dtype, "xxh3_128": each.xxh3_128}
            for name, each in sorted(self.tensors.items())
        }
        return {"key": self.key, "path": self.path, "tensors": tensors}

    @classmethod
    def from_json(cls, content: Any) -> Frozen:
        """Return what `to_json` wrote; raises CheckpointError."""
        known = fields(content, "'frozen'", key=str, path=(str, type(None)), tensors=dict)
        tensors: dict[str, FrozenTensor] = {}
        for name, each in known["tensors"].items():
            found = fields(each, repr(name), shape=list, dtype=str, xxh3_128=str)
            if not name.startswith("model/"):
                raise CheckpointError(f"{name!r} is frozen; expected a name that begins with model/")
            spec = TensorSpec(tuple(found["shape"]), found["dtype"], "parameter")
            tensors[name] = FrozenTensor(spec, found["xxh3_128"])
        return cls(known["key"], known["path"], tensors)


@dataclass(frozen=True)
class Manifest:
    """The checked content of `MANIFEST.json`."""

    step: int
    """Optimizer steps taken."""
    created: str
    """UTC, ISO 8601."""
    world_size: int
    strategy: str
    score: float | None
    """What ranks checkpoints, higher being better; None if this step was not evaluated.

    `evaluation` names its metric; without one, it is `eval.best` of the recipe."""
    fingerprint: str
    """`fingerprint` of the tensors."""
    recipe: str
    """The resolved recipe's YAML text."""
    scalars: dict[str, Any]
    """The caller's JSON values: data position, parameter groups, fitted data state, …"""
    aliases: dict[str, str]
    """Tied weights: {alias: the name that the tensor is stored under}."""
    files: tuple[FileInfo, ...]
    tensors: dict[str, Tensor]
    evaluation: Evaluation | None = None
    """None in older checkpoints, which hold the value alone, and in imported ones."""
    history: dict[str, Any] | None = None
    """State of the loop that a resume would otherwise search the run's rows for."""
    frozen: Frozen | None = None
    """What it refers to and does not store; None: it stores the whole model."""

    def score_by(self, criterion: Criterion | None) -> float | None:
        """Return the score by a criterion (None: the stored one), higher being better; None if unknown."""
        if self.evaluation is not None and criterion is not None:
            return self.evaluation.score(criterion)
        return self.score if criterion is None or criterion.metric == self.metric else None

    @property
    def metric(self) -> str | None:
        """The metric that `score` is the value of; None if unknown."""
        if self.evaluation is not None:
            return self.evaluation.criterion.metric
        return best_metric(self.recipe).removeprefix("-") if self.recipe else None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Each full tensor's spec by name."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class CheckpointInfo:
    """A published checkpoint, not yet opened."""

    path: Path
    step: int


@dataclass(frozen=True)
class Saved:
    """A published save."""

    path: Path
    step: int
    nbytes: int
    """Bytes of all the files but the manifest."""
    seconds: float
    """From `begin` to the published name, on rank 0."""
    retired: tuple[str, ...]
    """Names of older checkpoints that were deleted."""
    warnings: tuple[str, ...]
    """What could not be deleted; the save itself is complete."""


class Communicator(Protocol):
    """Exchanges small picklable objects between the ranks of a save. All ranks call each method."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def broadcast(self, value: _T) -> _T:
        """Return rank 0's value on every rank."""
        ...

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value, in order of rank, on every rank."""
        ...


class LocalCommunicator:
    """A world of one."""

    rank = 0
    world_size = 1

    def broadcast(self, value: _T) -> _T:
        return value

    def gather(self, value: _T) -> list[_T]:
        return [value]


def fingerprint(specs: dict[str, TensorSpec]) -> str:
    """Hash the names, shapes and dtypes of the parameters and buffers: equal for equal models."""
    model = [[n, s.shape, s.dtype] for n, s in sorted(specs.items()) if s.role in ("parameter", "buffer")]
    return xxhash.xxh3_128_hexdigest(canonical_json(model))


def explain_difference(
    manifest: Manifest, specs: dict[str, TensorSpec], here: str = "the checkpoint", there: str = "this run"
) -> list[str]:
    """Return how the checkpoint's tensors differ from `specs`: for each kind the first 10, and how many more."""
    saved = manifest.specs
    changed = sorted(name for name in saved.keys() & specs.keys() if saved[name] != specs[name])
    kinds = {
        f"only in {here}": [f"{n} {_show(saved[n])}" for n in sorted(saved.keys() - specs.keys())],
        f"only in {there}": [f"{n} {_show(specs[n])}" for n in sorted(specs.keys() - saved.keys())],
        "different": [f"{n}: {_show(saved[n])} in {here}, {_show(specs[n])} in {there}" for n in changed],
    }
    lines = []
    for kind, found in kinds.items():
        lines += [f"{kind}: {line}" for line in found[:10]]
        if len(found) > 10:
            lines.append(f"{kind}: and {len(found) - 10} more, {len(found)} in all")
    return lines


def _show(spec: TensorSpec) -> str:
    return f"{spec.role} {spec.dtype} {list(spec.shape)}"


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii
"""Returns a text as JSON writes it."""


def _listed(numbers: Iterable[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def manifest_text(content: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Return the text of a manifest, which begins with its hash, of its `content` besides the tensors."""
    # as `canonical_json` would, and several times as fast where there are many
    listed = ",".join(
        f'{quoted(name)}:{{"dtype":"{each.spec.dtype}","pieces":[{",".join(map(_listed, each.listed()))}],'
        f'"role":"{each.spec.role}","shape":{_listed(each.spec.shape)}}}'
        for name, each in sorted(tensors.items())
    )
    parts = [
        canonical_json({key: value for key, value in content.items() if key < "tensors"})[1:-1],
        f'"tensors":{{{listed}}}'.encode(),
        canonical_json({key: value for key, value in content.items() if key > "tensors"})[1:-1],
    ]
    text = b",".join(part for part in parts if part) + b"}"
    return b'{"xxh3_128":"%s",' % xxhash.xxh3_128_hexdigest(b"{" + text).encode() + text


def piece_key(name: str, start: int | str) -> str:
    return f"{name}@{start}"


def check_json(value: Any, where: str) -> None:
    """Raise CheckpointError for values that JSON would change, such as tuples and numbers as keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{where} has the key {key!r}, and only text can be a key in JSON")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if type(item) is not str:  # which names of parameters are
                check_json(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)) or (type(value) is float and not math.isfinite(value)):
        raise CheckpointError(f"{where} is {value!r}, {a_kind(value)}, which JSON does not keep as it is")


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or lower checkpoint.keep",
    errno.EDQUOT: "the disk quota is used up; free some space or lower checkpoint.keep",
    errno.EFBIG: "the file is larger than the file-size limit (ulimit -f) or than the file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOENT: "it is not there",
    errno.EMFILE: "too many files are open (ulimit -n)",
}


def error_reason(error: BaseException) -> str:
    """Return an error as one line; those of the operating system with advice."""
    if not isinstance(error, OSError):
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    reason = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    return f"{error.filename}: {reason}" if error.filename else reason


def parse_json(raw: bytes) -> dict[str, Any]:
    try:
        value = bounded.parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"it is not the JSON that distrain writes ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError("it is not a JSON object")
    return value


def has_exactly(content: Any, kinds: dict[str, Any]) -> bool:
    """Whether a JSON object has these keys, each of its type, and no others."""
    if type(content) is not dict or len(content) != len(kinds):
        return False
    # called for each tensor: a generator would take several times as long
    for key, kind in kinds.items():  # noqa: SIM110
        if type(content.get(key)) is not kind:
            return False
    return True


def fields(content: Any, what: str, **kinds: Any) -> dict[str, Any]:
    """Return a JSON object that has these keys, each of its type, and no others; raises CheckpointError.

    A key whose type includes None may be missing.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: found {str(content)[:60]!r}, expected a JSON object")
    if unknown := content.keys() - kinds.keys():
        raise CheckpointError(f"{what} has keys that version {VERSION} does not know: {', '.join(sorted(unknown))}")
    found = {key: content.get(key) for key in kinds}
    for key, kind in kinds.items():
        if not isinstance(found[key], kind) or (found[key] is True or found[key] is False) != (kind is bool):
            raise CheckpointError(f"{what}: {key!r} is missing or of the wrong type: {str(found[key])[:60]!r}")
    return found


def best_metric(recipe: str) -> str:
    """Return the `eval.best` of a recipe's text as it is written there, `loss` where it names none."""
    from distrain.config.yaml.document import read_tree

    try:
        section = read_tree(recipe, "the recipe").value.get("eval")
    except UserError:
        section = None
    best = section.get("best") if isinstance(section, dict) else None
    return best if isinstance(best, str) else "loss"


def parse_manifest(raw: bytes) -> Manifest:
    """Return the checked manifest of these bytes; raises CheckpointError."""
    match = _SELF_HASH.match(raw)
    if match is None or xxhash.xxh3_128_hexdigest(b"{" + raw[match.end() :]) != match[1].decode():
        raise CheckpointError("its bytes are not those that were written: its hash does not match")
    content = parse_json(b"{" + raw[match.end() :])
    written = (content.pop("format", None), content.pop("version", None))
    if written not in [("distrain", known) for known in (1, RUNS_VERSION, VERSION)]:
        raise CheckpointError(f"it is in format {written}, and this distrain reads up to version {VERSION} of its own")
    found = fields(
        content, "it", step=int, created=str, world_size=int, strategy=str, score=(float, type(None)), fingerprint=str,
        recipe=str, scalars=dict, aliases=dict, files=list, tensors=dict, evaluation=(dict, type(None)),
        history=(dict, type(None)), frozen=(dict, type(None)),
    )  # fmt: skip
    found["files"] = tuple(
        FileInfo(**fields(each, "a file", name=str, size=int, xxh3_128=str)) for each in found["files"]
    )
    found["tensors"] = {name: _parse_tensor(name, each) for name, each in found["tensors"].items()}
    found["evaluation"] = found["evaluation"] and Evaluation.from_json(found["evaluation"])
    found["frozen"] = Frozen.from_json(found["frozen"]) if found["frozen"] is not None else None
    manifest = Manifest(**found)
    if problem := _manifest_problem(manifest):
        raise CheckpointError(problem)
    return manifest


_TENSOR: dict[str, Any] = {"shape": list, "dtype": str, "role": str, "pieces": list}


def _parse_tensor(name: str, content: Any) -> Tensor:
    found = content if has_exactly(content, _TENSOR) else fields(content, repr(name), **_TENSOR)
    runs: list[Run] = []
    for piece in found["pieces"]:
        if type(piece) is not list or len(piece) not in (3, 4) or {*map(type, piece)} != {int}:
            raise CheckpointError(f"{name!r}: expected pieces [file, start, elements], found {str(piece)[:60]}")
        add_piece(runs, *piece)
    spec = TensorSpec(tuple(found["shape"]), found["dtype"], found["role"])
    if not name.startswith(_PREFIXES[spec.role]):
        expected = " or ".join(_PREFIXES[spec.role])
        raise CheckpointError(f"{name!r} has the role {spec.role}, whose names begin with {expected}")
    return Tensor(spec, tuple(runs))


def _manifest_problem(manifest: Manifest) -> str | None:
    """Return how a manifest contradicts itself, or None."""
    world_size, tensors = manifest.world_size, manifest.tensors
    if not 0 <= manifest.step < bounded.MOST_STEPS:
        return f"'step' is {manifest.step}; expected 0 or more, below {bounded.MOST_STEPS:.0e}"
    if len(manifest.files) != world_size or world_size < 1:
        return f"it lists {len(manifest.files)} files for {world_size} ranks"
    for rank, info in enumerate(manifest.files):
        if info.name != rank_file_name(rank, world_size) or info.size < 8:
            return f"{info.name!r} of {info.size} bytes is not rank {rank}'s file"
    for name, tensor in tensors.items():
        check_tiling(name, tensor, world_size)
        parameter = tensors.get(f"model/{name.removeprefix('optimizer/').rpartition('/')[0]}")
        if name.startswith("optimizer/") and parameter is not None and parameter.spec.role != "parameter":
            return f"{name!r} belongs to a tensor with the role {parameter.spec.role}; expected a parameter"
    frozen = manifest.frozen.tensors if manifest.frozen is not None else {}
    if both := sorted(frozen.keys() & tensors.keys()):
        return f"{both[0]!r} is stored and referred to; expected one of them"
    for alias, stored in manifest.aliases.items():
        if not isinstance(stored, str) or alias in tensors or not (stored in tensors or stored in frozen):
            return f"{alias!r} is tied to {str(stored)[:60]!r}; expected a tensor that it lists, under another name"
    evaluation = manifest.evaluation
    if evaluation is not None and manifest.score != evaluation.score(evaluation.criterion):
        return f"its score is {manifest.score}, which is not the value of {evaluation.criterion}"
    if manifest.fingerprint != fingerprint(manifest.specs):
        return "its fingerprint is not that of the tensors it lists"
    return None


def check_tiling(name: str, tensor: Tensor, world_size: int) -> None:
    """Raise unless the pieces, in order, cover each element once."""
    reached = 0
    for file, start, numel, count in tensor.runs:
        if start != reached or numel < 1 or count < 1 or not 0 <= file <= world_size - count:
            kind = "more than once" if start < reached else "not at all"
            low, high = sorted((start, reached))
            raise CheckpointError(f"elements {low} to {high} of {name!r} are there {kind} (a piece of rank {file})")
        reached += numel * count
    if reached != tensor.spec.numel:
        raise CheckpointError(f"{name!r} has {tensor.spec.numel} elements, and its pieces hold {reached}")


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
