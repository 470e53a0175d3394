"""Objects that a recipe names, from installed packages and from the user's own files.

A file is imported under its own name where Python itself finds it by that name. Where the name belongs to something
else (`train.py`, `evaluate.py`), it becomes a submodule of this module, and its name holds the file's path: a loader
process that unpickles an object of it imports it again from nothing but that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from distrain.system.errors import UserError, close_names
from distrain.system.output import error_line

__path__: list[str] = []  # what makes a module a package, which can have submodules
_OBJECT_SPEC = re.compile(r".+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FILE_MODULE = re.compile(re.escape(__name__) + r"\.file_([0-9a-f]+)")


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        match = _FILE_MODULE.fullmatch(name)
        return importlib.util.spec_from_file_location(name, os.fsdecode(bytes.fromhex(match[1]))) if match else None


sys.meta_path.append(_Finder)


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


def _where(error: BaseException, folder: Path | None) -> str:
    """Return FILE:LINE of what failed: the last line of the user's own folder, where that is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
    return next((f"{frame.filename}:{frame.lineno}" for frame in reversed(own or frames)), "while importing it")
