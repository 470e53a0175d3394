"""Reads pickles as data: Python's Unpickler, restricted to operations that build values and call nothing.

A pickle is a program. Where it would look up a Python object, it gets a `Named`; where it would call one, a `Made`. The
few calls that make tensors and mappings in torch's files are replaced by functions of this module. Names must be on a
list, because no trainer that is read here writes others. As nothing is called, a malicious file runs no code.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distrain.checkpoints.dtypes import BY_TORCH_NAME, DTYPES
from distrain.system.errors import UserError


class PickleRefused(UserError):
    """The pickle names an object that is not allowed, or is damaged."""


@dataclass(frozen=True, slots=True)
class Named:
    """A Python object that a pickle names: `torch.float32`, `collections.OrderedDict`."""

    path: str


@dataclass(eq=False, slots=True)
class Made:
    """The stand-in for the result of a call, or for an instance of a class."""

    kind: str
    args: tuple[Any, ...]
    state: Any = None

    def __getitem__(self, key: str) -> Any:
        """Return an attribute from the state; None if it has none of that name."""
        return self.state[key] if isinstance(self.state, dict) and key in self.state else None

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop an item, where it stands in for a mapping."""

    def append(self, value: Any) -> None:
        """Drop an item, where it stands in for a list."""

    def extend(self, values: list[Any]) -> None:
        """Drop items, where it stands in for a list."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A record's bytes, which tensors are views of."""

    key: str
    dtype: str | None
    """As safetensors names it; None: untyped bytes, whose tensors have their own dtypes."""
    numel: int
    """Elements, or bytes if there is no dtype."""


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
"""Dtypes by torch's names, of which some have several."""
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

_MAX_OPERATIONS = 10_000_000
"""Of one pickle: each may make an object of a hundred bytes, and a tensor takes some forty."""
_SETTINGS = {"lightning", "lightning_fabric", "pytorch_lightning", "omegaconf"}
"""Packages whose objects are in files as hyper-parameters and states of callbacks."""
_MAX_INTEGER = 255  # bytes
_SHARDED = "torch._utils._rebuild_wrapper_subclass"


def _tensor_v2(args: tuple[Any, ...]) -> View:
    storage, offset, shape, strides, _, _, *metadata = *args, None, None, None
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise PickleRefused("a tensor is not a view of a storage with a dtype")
    return _view(storage, storage.dtype, offset, shape, strides, metadata[0])


def _tensor_v3(args: tuple[Any, ...]) -> View:
    storage, offset, shape, strides, _, _, dtype, *metadata = *args, None
    if not isinstance(storage, Storage):
        raise PickleRefused("a tensor is not a view of a storage")
    return _view(storage, dtype_of(dtype), offset, shape, strides, metadata[0])


def dtype_of(named: Any) -> str:
    """Return the safetensors name of a dtype in a pickle; raises PickleRefused."""
    short = named.path.removeprefix("torch.") if isinstance(named, Named) else ""
    if short not in _NAMES:
        raise PickleRefused(f"{getattr(named, 'path', type(named).__name__)} is not a dtype that is read here")
    return _NAMES[short]


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any) -> View:
    if metadata:
        raise PickleRefused("a tensor is a conjugate or negative view, which is not read here")
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


class _Mapping(dict[Any, Any]):
    """A mapping that a pickle fills."""

    def __init__(self, pairs: Any = ()):
        super().__init__()
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        # tuples in tuples could take forever to hash
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, str | int | float | bytes | bool | Made | Named | None) for part in parts):
            raise PickleRefused("a mapping has a key that is neither text nor a number")
        super().__setitem__(key, value)


def _mapping(args: tuple[Any, ...]) -> _Mapping:
    pairs = next((arg for arg in args if isinstance(arg, dict | list | tuple)), ())
    return _Mapping(pairs.items() if isinstance(pairs, dict) else pairs)


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


class _Operations(dict[int, Callable[[Any], None]]):
    """The function of each operation; counts how many are performed."""

    left: int

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            self.spend(0)
        return dict.__getitem__(self, code)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise PickleRefused(f"it has more than {_MAX_OPERATIONS:,} operations; no listing of tensors has so many")


# the Unpickler in C allocates any place in the memo, hashes any key, and counts no operations
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.operations = self.dispatch = _Operations(_OPERATIONS)  # type: ignore[misc]
        self.operations.left = _MAX_OPERATIONS

    def find_class(self, module: str, name: str) -> Named:
        # Python 2's names, which pickles of protocol 2 have
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        path = f"{module}.{name}"
        if path == _SHARDED:
            raise UserError(
                "it holds one rank's parts of sharded tensors (DTensor): save the whole with get_model_state_dict and "
                "full_state_dict=True, or a folder of torch.distributed.checkpoint"
            )
        if path not in _HARMLESS and path not in _CALLS and module.partition(".")[0] not in _SETTINGS:
            raise PickleRefused(f"it names {path[:200]}, which is no part of tensors")
        return Named(path)

    def persistent_load(self, reference: Any) -> Storage:
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise PickleRefused("it refers to an object that is not a storage")
        _, kind, key, _, numel = reference
        if not isinstance(kind, Named) or kind.path not in _STORAGE_DTYPES:
            raise PickleRefused(f"{getattr(kind, 'path', 'what it names')} is not a storage that is read here")
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**62:
            raise PickleRefused("a storage has no key or size")
        return Storage(key, _STORAGE_DTYPES[kind.path], numel)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Named) or not isinstance(args, tuple):
            raise PickleRefused("it calls an object instead of a name")
        self.operations.spend(sum(len(arg) for arg in args if isinstance(arg, dict | list)))  # they are copied
        known = _CALLS.get(function.path)
        try:
            self.append(known(args) if known else Made(function.path, args))
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            if isinstance(error, PickleRefused):
                raise
            raise PickleRefused(f"it calls {function.path} with other arguments than torch does") from error

    def call_with_keywords(self) -> None:
        self.stack.pop()
        self.call()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, dict | View):  # attributes of mappings and tensors carry no state of training
            raise PickleRefused("it gives attributes to a number, a text or a list")

    def mapping(self) -> None:
        flat = self.pop_mark()
        self.append(_Mapping(zip(flat[::2], flat[1::2], strict=True)))

    def number(self) -> None:
        line = self.readline()
        if len(line) > _MAX_INTEGER:
            raise PickleRefused("it has a number of too many digits")
        self.append(line == b"01\n" if line in (b"00\n", b"01\n") else int(line.rstrip(b"L\n")))


_CODES: dict[int, Any] = pickle._Unpickler.dispatch
_SAFE = (
    b"(012NKMJGFXUTCBqrhjtlaesuc.])Q"
    b"\x80\x95\x88\x89\x8a\x8c\x8d\x8e\x94\x85\x86\x87\x93"
)  # fmt: skip
_OPERATIONS: dict[int, Any] = {code: _CODES[code] for code in _SAFE} | {
    pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Mapping()),
    pickle.DICT[0]: _Unpickler.mapping,
    # a set is read as a list, so that its items are not hashed
    pickle.EMPTY_SET[0]: _CODES[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS[0]: _CODES[pickle.APPENDS[0]],
    pickle.FROZENSET[0]: _CODES[pickle.TUPLE[0]],
    pickle.INT[0]: _Unpickler.number,
    pickle.LONG[0]: _Unpickler.number,
    pickle.REDUCE[0]: _Unpickler.call,
    pickle.NEWOBJ[0]: _Unpickler.call,
    pickle.NEWOBJ_EX[0]: _Unpickler.call_with_keywords,
    pickle.BUILD[0]: _Unpickler.build,
}
"""All that a pickle may do. Numbers have at most 255 bytes: longer ones are slow to handle."""


_VIEWS: dict[bytes, View] = {}
"""By their pickles: `torch.distributed.checkpoint` writes one for each part of each tensor, most of them alike."""
_SMALL, _MOST_VIEWS = 1024, 4096


def read_pickle(data: bytes) -> Any:
    """Return the content of the pickle in `data` as Python's own types, `View`, `Storage`, `Named` and `Made`.

    Raises PickleRefused if it is damaged, uses an operation that torch's files do not, or names an object that is
    neither a part of tensors nor of what trainers write beside them.
    """
    if data in _VIEWS:
        return _VIEWS[data]
    content = _read(data)
    if isinstance(content, View) and len(data) <= _SMALL and len(_VIEWS) < _MOST_VIEWS:
        _VIEWS[data] = content
    return content


def _read(data: bytes) -> Any:
    try:
        return _Unpickler(data).load()
    except UserError:
        raise
    except MemoryError as error:
        raise PickleRefused("it holds more than there is memory for") from error
    except KeyError as error:
        raise PickleRefused(f"it has an operation that is not read here ({error})") from error
    except EOFError as error:
        raise PickleRefused("it ends in the middle") from error
    except (
        pickle.UnpicklingError, AttributeError, IndexError, ValueError, TypeError, OverflowError, RecursionError,
        struct.error,
    ) as error:  # fmt: skip
        raise PickleRefused(f"it is damaged ({error})") from error
