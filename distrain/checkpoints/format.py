"""What a checkpoint is made of, and its manifest read strictly."""

from __future__ import annotations

import errno
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from distrain.checkpoints.dtypes import ITEM_SIZES, in_safetensors
from distrain.config import UserError
from distrain.system import bounded_json as bounded

VERSION = 1
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
    """A checkpoint that could not be written or read; the message names the rank, host, file and reason."""


@dataclass(frozen=True)
class TensorSpec:
    """What a full tensor is, whoever holds it."""

    shape: tuple[int, ...]
    """() for a single number; a 0 in it makes a tensor without elements, which has no pieces."""
    dtype: str
    """A name of `dtypes.DTYPES`: F64, F32, F16, BF16, I64, BOOL, …"""
    role: str
    """One of parameter, buffer, optimizer, ema, and state for what a model keeps besides."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZES:
            raise CheckpointError(f"dtype {self.dtype!r} is not one of {', '.join(ITEM_SIZES)}")
        if self.role not in ROLES:
            raise CheckpointError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if any(type(size) is not int or size < 0 for size in self.shape) or self.nbytes >= 2**63:
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
    """The full tensor's plain name: `model/NAME`, `optimizer/NAME/exp_avg`, `ema/NAME`."""
    start: int
    """Its first element, counted in the flattened full tensor."""
    data: memoryview | np.ndarray
    """The elements' bytes: one-dimensional, uint8, contiguous."""
    copied: bool = False
    """Whether the memory stays unchanged until the save is finished, so that it need not be copied."""


@dataclass(frozen=True)
class FileInfo:
    """One rank's file as it was written."""

    name: str
    size: int
    """Bytes."""
    xxh3_128: str


@dataclass(frozen=True)
class Tensor:
    """A full tensor in a checkpoint."""

    spec: TensorSpec
    pieces: tuple[tuple[int, int, int], ...]
    """(file, start, numel) of each piece in order of `start`: they tile the tensor exactly."""


@dataclass(frozen=True)
class Criterion:
    """What decides which checkpoint is the best. Scores by another one are no part of its ranking."""

    metric: str
    higher: bool
    """Whether the highest is the best."""
    split: str | None = None
    """What it is computed on."""
    data: str | None = None
    """A digest of what is in that split."""

    def __str__(self) -> str:
        where = f" on {self.split}" if self.split else ""
        return f"{self.metric}{where} ({'higher' if self.higher else 'lower'} is better)"


@dataclass(frozen=True)
class Evaluation:
    """What the numbers of a checkpoint's evaluation are, and what they are numbers of."""

    criterion: Criterion
    """What decided when it was saved, whether it was evaluated at that step or not."""
    values: dict[str, float]
    """The loss and each metric that is one finite number; empty where it was not evaluated."""
    higher: dict[str, bool]
    """For metrics whose direction is known: whether the highest is the best."""

    def score(self, by: Criterion) -> float | None:
        """Return the score by a criterion, higher being better; None where it is not known."""
        same = (self.criterion.split, self.criterion.data) == (by.split, by.data)
        value = self.values.get(by.metric) if same else None
        return None if value is None else value if by.higher else -value

    def described(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self.criterion), "values": self.values, "directions": self.higher}

    @classmethod
    def read(cls, content: dict[str, Any]) -> Evaluation:
        """Take up what `described` returned; raises CheckpointError."""
        metric, split, data = content.pop("metric", None), content.pop("split", None), content.pop("data", None)
        higher, values, directions = (
            content.pop("higher", None),
            take(content, "values", dict),
            content.pop("directions", {}),
        )
        if (
            type(metric) is not str
            or type(higher) is not bool
            or not all(type(x) in (str, type(None)) for x in (split, data))
        ):
            raise CheckpointError("'evaluation' does not say what its numbers are")
        numbers = all(type(each) in (int, float) for each in values.values())
        if (
            content
            or not numbers
            or type(directions) is not dict
            or not all(type(x) is bool for x in directions.values())
        ):
            raise CheckpointError("'evaluation' is not the numbers of one")
        values = {name: float(each) for name, each in values.items()}
        return cls(Criterion(metric, higher, split, data), values, directions)


@dataclass(frozen=True)
class Manifest:
    """What `MANIFEST.json` says, checked."""

    step: int
    """Optimizer steps done."""
    created: str
    """UTC, ISO 8601."""
    world_size: int
    strategy: str
    score: float | None
    """The evaluation that decides which checkpoints are best, higher being better; None when there was none.

    What it is a number of, `evaluation` says; where there is none, that `eval.best` of the recipe names."""
    fingerprint: str
    """`fingerprint` of the tensors."""
    recipe: str
    """The resolved recipe's YAML text."""
    scalars: dict[str, Any]
    """JSON values as the caller gave them: data position, parameter groups, fitted data state, …"""
    aliases: dict[str, str]
    """Tied weights: the further name of a tensor -> the name that it is stored under."""
    files: tuple[FileInfo, ...]
    tensors: dict[str, Tensor]
    evaluation: Evaluation | None = None
    """None in checkpoints that know a bare score alone, and in imported ones."""
    history: dict[str, Any] | None = None
    """What a resume would have to look for in the run's rows, as the session keeps it."""

    def score_by(self, criterion: Criterion | None) -> float | None:
        """Return the score by a criterion (None: the stored one), higher being better; None where it is not known."""
        if self.evaluation is not None and criterion is not None:
            return self.evaluation.score(criterion)
        return self.score if criterion is None or criterion.metric == self.metric else None

    @property
    def metric(self) -> str | None:
        """What `score` is a number of; None where that is not known."""
        if self.evaluation is not None:
            return self.evaluation.criterion.metric
        return best_metric(self.recipe).removeprefix("-") if self.recipe else None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The full tensors by name."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class CheckpointInfo:
    """A published checkpoint, not yet opened."""

    path: Path
    step: int


@dataclass(frozen=True)
class Saved:
    """A save that is published."""

    path: Path
    step: int
    nbytes: int
    """Bytes of all the files but the manifest."""
    seconds: float
    """From `begin` to the published name, on rank 0."""
    retired: tuple[str, ...]
    """Names of the older checkpoints that were deleted."""
    warnings: tuple[str, ...]
    """What could not be tidied up afterwards; the save itself is complete."""


class Communicator(Protocol):
    """How the ranks of a save speak to each other: small picklable objects. All ranks call each method."""

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
    return xxhash.xxh3_128_hexdigest(canonical(model))


def explain_difference(
    manifest: Manifest, specs: dict[str, TensorSpec], here: str = "the checkpoint", there: str = "this run"
) -> list[str]:
    """Say how the checkpoint's tensors differ from `specs`: a line for each of the first 10 of a kind, and counts."""
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


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def piece_key(name: str, start: int) -> str:
    return f"{name}@{start}"


def check_json(value: Any, where: str) -> None:
    """Refuse what JSON would change on its way back, such as tuples and numbers as keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{where} has the key {key!r}, and only text can be a key in JSON")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)) or (type(value) is float and not math.isfinite(value)):
        raise CheckpointError(f"{where} is {value!r}, a {type(value).__name__}, which JSON does not keep as it is")


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or lower checkpoint.keep",
    errno.EDQUOT: "the disk quota is used up; free some space or lower checkpoint.keep",
    errno.EFBIG: "the file is larger than the file-size limit (ulimit -f) or than the file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOENT: "it is not there",
    errno.EMFILE: "too many files are open (ulimit -n)",
}


def explain(error: BaseException) -> str:
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


def take(mapping: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = mapping.pop(key, None) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{key!r} is missing or not of the right kind")
    return value


def best_metric(recipe: str) -> str:
    """Return the `eval.best` of a recipe's text as it is written there, `loss` where it names none."""
    from distrain.config.yaml.document import read_tree

    try:
        section = read_tree(recipe, "the recipe").value.get("eval")
    except UserError:
        section = None
    best = section.get("best") if isinstance(section, dict) else None
    return best if isinstance(best, str) else "loss"


def _texts(mapping: dict[str, Any], what: str) -> dict[str, str]:
    if not all(isinstance(value, str) for value in mapping.values()):
        raise CheckpointError(f"{what} are not all text")
    return mapping


def parse_manifest(raw: bytes) -> Manifest:
    match = _SELF_HASH.match(raw)
    if match is None or xxhash.xxh3_128_hexdigest(b"{" + raw[match.end() :]) != match[1].decode():
        raise CheckpointError("its bytes are not those that were written: its hash does not match")
    top = parse_json(b"{" + raw[match.end() :])
    written = (take(top, "format", str), take(top, "version", int))
    if written != ("distrain", VERSION):
        raise CheckpointError(f"it is in format {written}, and this distrain reads version {VERSION} of its own")
    world_size = take(top, "world_size", int)
    files: list[FileInfo] = []
    for item in take(top, "files", list):
        info = FileInfo(take(item, "name", str), take(item, "size", int), take(item, "xxh3_128", str))
        if item or info.name != rank_file_name(len(files), world_size) or info.size < 8:
            raise CheckpointError(f"{info.name!r} is not the name and size of rank {len(files)}'s file")
        files.append(info)
    if len(files) != world_size or world_size < 1:
        raise CheckpointError(f"it lists {len(files)} files for {world_size} ranks")
    tensors = {}
    for name, item in take(top, "tensors", dict).items():
        shape, dtype, role = take(item, "shape", list), take(item, "dtype", str), take(item, "role", str)
        pieces = take(item, "pieces", list)
        if item or not all(isinstance(p, list) and len(p) == 3 and all(type(n) is int for n in p) for p in pieces):
            raise CheckpointError(f"{name!r} is not described as a tensor is")
        tensors[name] = Tensor(TensorSpec(tuple(shape), dtype, role), tuple((f, s, n) for f, s, n in pieces))
        check_tiling(name, tensors[name], world_size)
        if not name.startswith(_PREFIXES[role]):
            raise CheckpointError(
                f"{name!r} is said to be of the role {role}, whose names begin with {' or '.join(_PREFIXES[role])}"
            )
    aliases = _texts(take(top, "aliases", dict), "aliases")
    for alias, name in aliases.items():
        if alias in tensors or name not in tensors:
            raise CheckpointError(f"{alias!r} is tied to {name!r}, which is not so in its list of tensors")
    for name in tensors:
        parameter = tensors.get(f"model/{name.removeprefix('optimizer/').rpartition('/')[0]}")
        if name.startswith("optimizer/") and parameter is not None and parameter.spec.role != "parameter":
            raise CheckpointError(f"{name!r} is of a tensor whose role is {parameter.spec.role}, and not parameter")
    score = top.pop("score", None)
    if score is not None and type(score) is not float:
        raise CheckpointError("'score' is not a number")
    described = top.pop("evaluation", None)
    evaluation = Evaluation.read(described) if isinstance(described, dict) else None
    history = top.pop("history", None)
    for key, value in (("evaluation", described), ("history", history)):
        if not isinstance(value, dict | None):
            raise CheckpointError(f"{key!r} is not of the right kind")
    step = take(top, "step", int)
    if not 0 <= step < bounded.MOST_STEPS:
        raise CheckpointError(f"'step' is {step}, which is no number of steps")
    manifest = Manifest(
        step=step,
        created=take(top, "created", str),
        world_size=world_size,
        strategy=take(top, "strategy", str),
        score=score,
        fingerprint=take(top, "fingerprint", str),
        recipe=take(top, "recipe", str),
        scalars=take(top, "scalars", dict),
        aliases=aliases,
        files=tuple(files),
        tensors=tensors,
        evaluation=evaluation,
        history=history,
    )
    if evaluation is not None and score != evaluation.score(evaluation.criterion):
        raise CheckpointError(f"its score is {score}, and {evaluation.criterion} says another number")
    if top:
        raise CheckpointError(f"it has keys that version {VERSION} does not know: {', '.join(map(repr, top))}")
    if manifest.fingerprint != fingerprint(manifest.specs):
        raise CheckpointError("its fingerprint is not that of the tensors it lists")
    return manifest


def check_tiling(name: str, tensor: Tensor, world_size: int) -> None:
    """Raise unless the pieces, in order, cover each element once."""
    reached = 0
    for file, start, numel in tensor.pieces:
        if start != reached or numel < 1 or not 0 <= file < world_size:
            kind = "more than once" if start < reached else "not at all"
            low, high = sorted((start, reached))
            raise CheckpointError(f"elements {low} to {high} of {name!r} are there {kind} (a piece of rank {file})")
        reached += numel
    if reached != tensor.spec.numel:
        raise CheckpointError(f"{name!r} has {tensor.spec.numel} elements, and its pieces hold {reached}")


def pack_header(header: dict[str, Any]) -> bytes:
    """Return what a safetensors file begins with: the header and its length, padded so that the data is aligned."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def keys_by_file(manifest: Manifest) -> list[dict[str, tuple[str, int]]]:
    """For each file, {key: (dtype, numel)} of the pieces that the manifest places in it, as its header names them."""
    found: list[dict[str, tuple[str, int]]] = [{} for _ in manifest.files]
    for name, tensor in manifest.tensors.items():
        for file, start, numel in tensor.pieces:
            dtype, shape = in_safetensors(tensor.spec.dtype, (numel,))
            found[file][piece_key(name, start)] = (dtype, math.prod(shape))
    return found
