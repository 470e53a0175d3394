"""Objects that a recipe names, from installed packages and from the user's own files.

A file is imported under its own name where Python itself finds it by that name. Where the name belongs to something
else (`train.py`, `evaluate.py`), it becomes a submodule of this module, and its name holds the file's path: a loader
process that unpickles an object of it imports it again from nothing but that name.

An object that a person gives in Python, and that cannot be imported, is named `object.KEY:NAME`, KEY being the section
of the recipe: `object.model:Net`. It is there in that process, while `given_objects` holds, and in those that get it
by `handing_over`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from distrain.system.errors import UserError, close_names
from distrain.system.output import error_line

__path__: list[str] = []  # what makes a module a package, which can have submodules
_OBJECT_SPEC = re.compile(r".+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FILE_MODULE = re.compile(re.escape(__name__) + r"\.file_([0-9a-f]+)")
_GIVEN_SPEC = re.compile(r"object\.([a-z]+):(\w+)")
_HANDED_OVER = "DISTRAIN_OBJECTS"
"""The environment variable with the file of the objects that a process hands over to those that it starts."""

_PLACES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_INSTALLED = tuple(
    {f"{each}/" for place in [*_PLACES, str(Path(__file__).parents[1])] for each in (place, Path(place).resolve())}
)


@dataclass(frozen=True)
class Given:
    """An object of this process."""

    value: Any
    """What `resolve_object` returns."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """The source text of its classes and functions by name, for the fingerprint; without those that have none."""


_given: dict[str, Given] = {}
_importing = 0


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        match = _FILE_MODULE.fullmatch(name)
        return importlib.util.spec_from_file_location(name, os.fsdecode(bytes.fromhex(match[1]))) if match else None


sys.meta_path.append(_Finder)


LIBRARIES = ("timm:", "transformers:")
"""What names begin with that are a library's, though they look like `package.module:name`."""


def is_object_spec(name: str) -> bool:
    """Whether `name` says where an object is, as `package.module:name` or `path/to/file.py:name`."""
    where, colon, attribute = name.rpartition(":")
    names = attribute.split(".")
    return bool(colon and _OBJECT_SPEC.fullmatch(where) and all(part.isidentifier() for part in names))


def resolve_object(spec: str) -> Any:
    """Import what `spec` names: `package.module:name`, or `path/to/file.py:name` with the path best absolute.

    A file is imported once in each process, under a name by which other processes import the same file, so that what
    is in it can be pickled. Its folder is put last on `sys.path`: files beside it can be imported, and none of them
    takes the place of a library. Raises UserError when the module, or the name in it, is not there, or when the
    module itself fails, saying where.
    """
    if not is_object_spec(spec):
        raise UserError(f"{spec!r} is not 'package.module:name' or 'path/to/file.py:name'")
    if (given := _given.get(spec)) is not None or _GIVEN_SPEC.fullmatch(spec):
        return (given or given_object(spec)).value
    where, _, attribute = spec.rpartition(":")
    found: Any = _import_file(Path(os.path.abspath(where)), spec) if where.endswith(".py") else _import(where, spec)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise UserError(f"{spec}: {where} has no {part!r}{close_names(part, names)}") from None
    return found


def _import_file(file: Path, spec: str) -> Any:
    if not file.is_file():
        beside = [path.name for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UserError(f"{spec}: there is no file {file}{close_names(file.name, beside)}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    # its own name, when Python finds this very file under it, so that it is one module with what siblings import.
    try:
        known = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
    except (ValueError, ImportError):
        known = None
    plain = known is not None and known.origin is not None and Path(known.origin).resolve() == file.resolve()
    return _import(file.stem if plain else f"{__name__}.file_{os.fsencode(file).hex()}", spec, file.parent)


def _import(module: str, spec: str, folder: Path | None = None) -> Any:
    global _importing
    _importing += 1
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{spec}: {_where(error, folder)}: {error}; is it installed here?") from error
        raise UserError(
            f"{spec}: there is no module {error.name!r} to import; install it, or write 'path/to/file.py:name'"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{spec}: {_where(error, folder)}: {error_line(error)}") from error
    finally:
        _importing -= 1


def _where(error: BaseException, folder: Path | None) -> str:
    """Return FILE:LINE of what failed: the last line of the user's own folder, where that is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
    return next((f"{frame.filename}:{frame.lineno}" for frame in reversed(own or frames)), "while importing it")


# --------------------------------------------------------------------------------------------------------------------
# Objects of this process


def is_importing() -> bool:
    """Whether a file or module that a recipe names is being imported just now."""
    return _importing > 0


def file_of(module: str) -> Path | None:
    """Return the file of a module that was imported under a name of this module's own; None for any other."""
    match = _FILE_MODULE.fullmatch(module)
    return Path(os.fsdecode(bytes.fromhex(match[1]))) if match else None


@cache
def is_users_path(file: str) -> bool:
    """Whether a file of Python belongs neither to Python, nor to what is installed, nor to distrain."""
    if not file.endswith(".py") or _is_installed(file):
        return False
    return not _is_installed(str(Path(file).resolve()))


def _is_installed(path: str) -> bool:
    return "/site-packages/" in path or "/dist-packages/" in path or path.startswith(_INSTALLED)


def users_modules() -> Iterator[ModuleType]:
    """Yield the imported modules that are files of the user's own."""
    for name in _users_names(len(sys.modules), next(reversed(sys.modules))):
        if (module := sys.modules.get(name)) is not None:
            yield module


@lru_cache(maxsize=1)
def _users_names(count: int, newest: str) -> list[str]:
    """Return their names, while there are so many modules and none is newer: thousands are imported."""
    files = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in list(sys.modules.items())}
    return [
        name for name, file in files.items() if name == "__main__" or (isinstance(file, str) and is_users_path(file))
    ]


def given_key(spec: str) -> str | None:
    """Return the section of the recipe that an object of a process is for; None for what can be imported."""
    match = _GIVEN_SPEC.fullmatch(spec)
    return match[1] if match else None


@contextmanager
def given_objects(objects: Mapping[str, Given]) -> Iterator[None]:
    """Have `resolve_object` return these by their specs, until the end of the block; others are as before."""
    global _given
    before, _given = _given, {**_given, **objects}
    try:
        yield
    finally:
        _given = before


def given_object(spec: str) -> Given:
    """Return an object of this process, or of the one that started it; raises UserError where neither has it."""
    found = _given.get(spec) or _handed_over().get(spec)
    if found is None:
        key, name = spec.removeprefix("object.").split(":")
        raise UserError(
            f"{spec} is an object of the Python process that made this recipe, and this process does not have it. In "
            f"Python, pass what it was: distrain.load(RUN, {key}=...), and then resume, evaluate, predict or model of "
            f"what that returns. For the command, define {name} in a file, and train a recipe that names it as "
            f"path/to/file.py:{name}"
        )
    return found


@contextmanager
def handing_over(objects: Mapping[str, Given]) -> Iterator[None]:
    """Give these objects to the processes that are started in this block, which find modules where this one does.

    Raises UserError with each that cannot be pickled. The file is this user's alone, and gone after the block.
    """
    import pickle
    import tempfile

    import cloudpickle

    problems = []
    pickled: dict[str, bytes] = {}
    for spec, given in objects.items():
        try:
            pickled[spec] = cloudpickle.dumps(given)
        except Exception as error:  # whatever an object of somebody else's raises
            problems.append(f"{spec} cannot be passed to several processes: {error_line(error)}")
    if problems:
        advice = "Define it at the top level of a file that can be imported, or train in one process: processes=1"
        raise UserError("\n".join([*problems, advice]))
    handle, path = tempfile.mkstemp(prefix="distrain-objects-")  # readable by this user alone
    before = {name: os.environ.get(name) for name in (_HANDED_OVER, "PYTHONPATH")}
    try:
        with os.fdopen(handle, "wb") as file:
            pickle.dump(pickled, file)
        os.environ[_HANDED_OVER] = path
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.unlink(path)


_received: dict[str, Given] | None = None


def _handed_over() -> dict[str, Given]:
    global _received
    path = os.environ.get(_HANDED_OVER)
    if path is None:
        return {}
    if _received is None:
        import pickle

        found: dict[str, Given] = {}
        with open(path, "rb") as file:
            pickled = pickle.load(file)
        for spec, content in pickled.items():
            try:
                found[spec] = pickle.loads(content)
            except Exception as error:
                raise UserError(f"{spec} cannot be unpickled in another process: {error_line(error)}") from error
        _received = found
    return _received
