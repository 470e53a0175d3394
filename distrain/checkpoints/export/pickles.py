"""Pickles read as data: a machine for the opcodes that calls nothing.

A pickle is a program. This one's every operation builds plain values, and where the program would look up or call
something of Python's, what it names is written down: a `Named` for the thing, a `Made` for the call. The few calls that
make tensors and mappings in torch's files are then understood by name. What is named must be on a list, because a file
that names anything else was not written by the trainers that are read here. Without a call there is nothing that a
malicious file could run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distrain.checkpoints.dtypes import BY_TORCH_NAME, DTYPES
from distrain.config import UserError


class PickleRefused(UserError):
    """The pickle names something that is not allowed, or is damaged."""


@dataclass(frozen=True, slots=True)
class Named:
    """Something of Python's that a pickle names: `torch.float32`, `collections.OrderedDict`."""

    path: str


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle would have made by a call, or as an instance of a class."""

    kind: str
    args: tuple[Any, ...]
    state: Any = None

    def __getitem__(self, key: str) -> Any:
        """Return an attribute, as the state has it."""
        return self.state[key] if isinstance(self.state, dict) and key in self.state else None


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a record that tensors are views of."""

    key: str
    dtype: str | None
    """As safetensors names it; None: bytes whose tensors say it themselves."""
    numel: int
    """Elements, or bytes where there is no dtype."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: a strided view of a storage. `offset` and `strides` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_NAMES = BY_TORCH_NAME | {
    "double": "F64", "float": "F32", "half": "F16", "long": "I64", "int": "I32", "short": "I16",
}  # fmt: skip
"""Dtypes by what torch calls them, with its further names for some."""
_STORAGE_DTYPES: dict[str, str | None] = {
    **{f"torch.{known.storage}Storage": name for name, known in DTYPES.items() if known.storage},
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_DISTRIBUTED = "torch.distributed.checkpoint"
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_HARMLESS = {
    *_STORAGE_DTYPES, *_MAPPINGS, *_TENSOR_TYPES, *(f"torch.{name}" for name in _NAMES),
    "torch.Size", "torch.device", "torch.strided", "torch.contiguous_format", "torch.serialization._get_layout",
    "builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "builtins.bytearray", "builtins.complex",
    "builtins.slice", "builtins.range", "builtins.int", "builtins.float", "builtins.bool", "builtins.str",
    "_codecs.encode", "copyreg._reconstructor", "builtins.object", "argparse.Namespace", "types.SimpleNamespace",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "datetime.timedelta",
    "datetime.datetime", "datetime.date", "datetime.timezone", "fractions.Fraction", "decimal.Decimal", "uuid.UUID",
    "collections.deque", "functools.partial", "typing.Any", "torch.torch_version.TorchVersion",
    "numpy.dtype", "numpy.ndarray", *(f"{m}.{name}" for m in _NUMPY for name in ("_reconstruct", "scalar")),
    *(f"{_DISTRIBUTED}.metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    f"{_DISTRIBUTED}.filesystem._StorageInfo", f"{_DISTRIBUTED}.filesystem._StoragePrefix",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.config.DeepSpeedConfig",
}  # fmt: skip

_MOST_OPERATIONS = 10_000_000
"""Of one pickle: each may make an object of a hundred bytes, and a tensor takes some forty."""
_SETTINGS = {"lightning", "lightning_fabric", "pytorch_lightning", "omegaconf"}
"""Packages of which files hold settings and states of trainers, as hyper-parameters and callbacks have them."""
_MAX_INTEGER = 255  # bytes; a longer one is nobody's number, and slow to handle


def _tensor_v2(args: tuple[Any, ...]) -> View:
    storage, offset, shape, strides, *rest = args
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise PickleRefused("a tensor is not a view of a storage with a dtype")
    if len(rest) > 2 and rest[2]:
        raise PickleRefused("a tensor is a conjugate or negative view, which is not read here")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(args: tuple[Any, ...]) -> View:
    storage, offset, shape, strides, _, _, dtype, *rest = args
    if not isinstance(storage, Storage) or not isinstance(dtype, Named):
        raise PickleRefused("a tensor is not a view of a storage")
    if rest and rest[0]:
        raise PickleRefused("a tensor is a conjugate or negative view, which is not read here")
    return _view(storage, _dtype(dtype), offset, shape, strides)


def _dtype(named: Any) -> str:
    short = named.path.removeprefix("torch.") if isinstance(named, Named) else ""
    if short not in _NAMES:
        raise PickleRefused(f"{getattr(named, 'path', type(named).__name__)} is not a dtype that is read here")
    return _NAMES[short]


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> View:
    for value in (shape, strides):
        if not isinstance(value, tuple) or len(value) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            raise PickleRefused("a tensor's shape or strides are not sizes")
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise PickleRefused("a tensor's offset, shape and strides do not belong together")
    return View(storage, dtype, offset, shape, strides)


def _of_type(args: tuple[Any, ...]) -> Any:
    function, kind, inner, _ = args
    made = _CALLS.get(function.path) if isinstance(function, Named) else None
    if made is None or not isinstance(kind, Named) or kind.path not in _TENSOR_TYPES:
        name = kind.path if isinstance(kind, Named) else "something else"
        raise PickleRefused(f"a tensor is of the class {name}, which is not read here")
    return made(inner)


def _mapping(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = next((arg for arg in args if isinstance(arg, dict | list | tuple)), ())
    return _fill({}, pairs.items() if isinstance(pairs, dict) else pairs)


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], tuple | list) else ()


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda args: args[0],
    "torch._utils._rebuild_parameter_with_state": lambda args: args[0],
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "builtins.set": _size,
    **dict.fromkeys(_MAPPINGS, _mapping),
}


def _is_key(value: Any) -> bool:
    # tuples in tuples could take for ever to hash
    plain = isinstance(value, str | int | float | bytes | bool | Made | Named | None)
    return plain or (isinstance(value, tuple) and all(not isinstance(v, tuple) and _is_key(v) for v in value))


def _fill(target: dict[Any, Any], pairs: Any) -> dict[Any, Any]:
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not _is_key(pair[0]):
            raise PickleRefused("a mapping has a key that is no plain value")
        target[pair[0]] = pair[1]
    return target


_MARK = object()


@dataclass
class _Machine:
    data: bytes
    position: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.data):
            raise PickleRefused("it ends in the middle")
        return self.data[start : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise PickleRefused("it ends in the middle")
        return self.take(end + 1 - self.position)[:-1]

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefused("its operations do not fit together")
        return value

    def since_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                found = self.stack[index + 1 :]
                del self.stack[index:]
                return found
        raise PickleRefused("its operations do not fit together")

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise PickleRefused("its operations do not fit together")
        return value

    # What looks things up, and what would call them

    def named(self, module: Any, name: Any) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefused("it names something by no text")
        # the names of Python 2, which pickles of protocol 2 are written with
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        path = f"{module}.{name}"
        if path not in _HARMLESS and path not in _CALLS and module.partition(".")[0] not in _SETTINGS:
            raise PickleRefused(f"it names {path[:200]}, which is no part of tensors")
        return Named(path)

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Named) or not isinstance(args, tuple):
            raise PickleRefused("it calls what is no name")
        known = _CALLS.get(function.path)
        try:
            return known(args) if known else Made(function.path, args)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            if isinstance(error, PickleRefused):
                raise
            raise PickleRefused(f"it calls {function.path} with other arguments than torch does") from error

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, dict | View):  # attributes of mappings and tensors carry no state of training
            raise PickleRefused("it gives attributes to a plain value")

    def storage(self, reference: Any) -> Storage:
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise PickleRefused("it refers to something that is no storage")
        _, kind, key, _, numel = reference
        if not isinstance(kind, Named) or kind.path not in _STORAGE_DTYPES:
            raise PickleRefused(f"{getattr(kind, 'path', 'what it names')} is not a storage that is read here")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**62:
            raise PickleRefused("a storage's key or size is none")
        return Storage(key, _STORAGE_DTYPES[kind.path], numel)


def _unicode(machine: _Machine, size: int) -> str:
    return machine.take(size).decode("utf-8", "surrogatepass")


def _integer(machine: _Machine, size: int) -> int:
    if size > _MAX_INTEGER:
        raise PickleRefused(f"it has a number of {size} bytes")
    return int.from_bytes(machine.take(size), "little", signed=True)


def _text_integer(machine: _Machine) -> int | bool:
    line = machine.line()
    if line in (b"00", b"01"):
        return line == b"01"
    if len(line) > _MAX_INTEGER:
        raise PickleRefused("it has a number of too many digits")
    return int(line.rstrip(b"L"))


def _memorise(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _set_items(machine: _Machine, flat: list[Any]) -> None:
    if len(flat) % 2:
        raise PickleRefused("a mapping has a key without a value")
    target = machine.stack[-1]
    if isinstance(target, Made):  # a mapping of a class that is kept as it was called
        return
    _fill(machine.top(dict), zip(flat[::2], flat[1::2], strict=True))


def _append(machine: _Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Made | tuple):
        raise PickleRefused("its operations do not fit together")


def _tuple(machine: _Machine, size: int) -> None:
    found = tuple(machine.pop() for _ in range(size))
    machine.stack.append(found[::-1])


def _reduce(machine: _Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.stack.append(machine.call(function, args))


def _new_object(machine: _Machine, with_keywords: bool) -> None:
    if with_keywords:
        machine.pop()
    args, kind = machine.pop(), machine.pop()
    machine.stack.append(machine.call(kind, args))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(machine.named(module, name))


_Step = Callable[[_Machine], Any]


def _pushes(value: _Step) -> _Step:
    return lambda m: m.stack.append(value(m))


_STEPS: dict[int, _Step] = {
    ord(key): step
    for key, step in {
        "\x80": lambda m: m.take(1),
        "\x95": lambda m: m.take(8),
        "(": lambda m: m.stack.append(_MARK),
        "0": lambda m: m.pop(),
        "1": lambda m: m.since_mark(),
        "2": lambda m: m.stack.append(m.stack[-1]),
        "N": lambda m: m.stack.append(None),
        "\x88": lambda m: m.stack.append(True),
        "\x89": lambda m: m.stack.append(False),
        "}": lambda m: m.stack.append({}),
        "]": lambda m: m.stack.append([]),
        ")": lambda m: m.stack.append(()),
        "\x8f": lambda m: m.stack.append([]),
        "K": _pushes(lambda m: m.number(1)),
        "M": _pushes(lambda m: m.number(2)),
        "J": _pushes(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
        "I": _pushes(_text_integer),
        "L": _pushes(_text_integer),
        "\x8a": _pushes(lambda m: _integer(m, m.number(1))),
        "\x8b": _pushes(lambda m: _integer(m, m.number(4))),
        "G": _pushes(lambda m: struct.unpack(">d", m.take(8))[0]),
        "F": _pushes(lambda m: float(m.line())),
        "X": _pushes(lambda m: _unicode(m, m.number(4))),
        "\x8c": _pushes(lambda m: _unicode(m, m.number(1))),
        "\x8d": _pushes(lambda m: _unicode(m, m.number(8))),
        "U": _pushes(lambda m: m.take(m.number(1))),
        "T": _pushes(lambda m: m.take(m.number(4))),
        "C": _pushes(lambda m: m.take(m.number(1))),
        "B": _pushes(lambda m: m.take(m.number(4))),
        "\x8e": _pushes(lambda m: m.take(m.number(8))),
        "q": lambda m: _memorise(m, m.number(1)),
        "r": lambda m: _memorise(m, m.number(4)),
        "\x94": lambda m: _memorise(m, len(m.memo)),
        "h": _pushes(lambda m: m.memo[m.number(1)]),
        "j": _pushes(lambda m: m.memo[m.number(4)]),
        "t": _pushes(lambda m: tuple(m.since_mark())),
        "l": _pushes(lambda m: m.since_mark()),
        "d": _pushes(lambda m: _fill({}, list(zip(*[iter(m.since_mark())] * 2, strict=True)))),
        "\x91": _pushes(lambda m: tuple(m.since_mark())),
        "\x85": lambda m: _tuple(m, 1),
        "\x86": lambda m: _tuple(m, 2),
        "\x87": lambda m: _tuple(m, 3),
        "a": lambda m: _append(m, [m.pop()]),
        "e": lambda m: _append(m, m.since_mark()),
        "\x90": lambda m: _append(m, m.since_mark()),
        "s": lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),
        "u": lambda m: _set_items(m, m.since_mark()),
        "c": _pushes(lambda m: m.named(m.line().decode(), m.line().decode())),
        "\x93": _stack_global,
        "R": _reduce,
        "\x81": lambda m: _new_object(m, with_keywords=False),
        "\x92": lambda m: _new_object(m, with_keywords=True),
        "b": lambda m: m.build(),
        "Q": _pushes(lambda m: m.storage(m.pop())),
    }.items()
}  # fmt: skip
_STOP = ord(".")


def read_pickle(data: bytes) -> Any:
    """Return what the pickle in `data` holds, as plain values, `View`, `Storage`, `Named` and `Made`.

    Raises PickleRefused where it is damaged, uses an operation that torch's files do not, or names something that is no
    part of tensors and of what trainers write beside them.
    """
    machine = _Machine(data)
    try:
        for _ in range(_MOST_OPERATIONS):
            code = data[machine.position]
            machine.position += 1
            if code == _STOP:
                return machine.pop()
            _STEPS[code](machine)
        raise PickleRefused(f"it has more than {_MOST_OPERATIONS:,} operations; no listing of tensors has so many")
    except MemoryError as error:
        raise PickleRefused("it holds more than there is memory for") from error
    except KeyError as error:
        raise PickleRefused(f"it has an operation or a reference that is not read here ({error})") from error
    except (IndexError, ValueError, TypeError, OverflowError, RecursionError, struct.error) as error:
        if isinstance(error, PickleRefused):
            raise
        raise PickleRefused(f"it is damaged ({error})") from error


def dtype_of(value: Any) -> str:
    """Return the safetensors name of a dtype in a pickle; raises PickleRefused."""
    return _dtype(value)
