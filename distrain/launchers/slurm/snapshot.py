"""The user's code as it is when a job is submitted: a copy, so that a later edit changes nothing that is queued.

A recipe names code as `path/to/file.py:name` or `package.module:name`. What is copied is the folder of such a file, as
Python would find modules beside it, or the package where it is not installed:

- in a git repository the files that git knows, and new Python files that it does not ignore;
- elsewhere Python files, without hidden folders, virtual environments and folders of runs.

Files larger than 1 MiB are data and stay where they are, and so do symbolic links that lead out of the folder; what may
hold a secret is never copied.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import distrain
from distrain.config import Recipe, UserError, is_object_spec
from distrain.config.yaml import LoadedRecipe
from distrain.fingerprints import named_objects, user_module

LARGEST_FILE = 1 << 20
LARGEST_COPY = 64 << 20
MOST_FILES = 5_000
_MOST_ENTRIES = 50_000

_SECRET_NAMES = (
    *(".*", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.jks", "*.kdbx", "*.ovpn", "id_rsa*", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", "*credential*", "*secret*", "*.token", "token", "token.*", "netrc", "*_netrc"),
    *("htpasswd", "passwd", "password*", "kubeconfig", "*.env", "env.*"),
)
"""What is not copied even where git knows it. A Python module may be called `tokens.py`, and `secrets.py` is none."""

_NOT_CODE = ("__pycache__", "node_modules", "site-packages", "wandb", "build", "dist")


@dataclass(frozen=True)
class Snapshot:
    """What is to be copied."""

    files: dict[str, Path] = field(default_factory=dict)
    """Each file by its place in the copy."""
    roots: dict[Path, str] = field(default_factory=dict)
    """Folders whose files are copied, and the name of each in the copy."""
    notes: list[str] = field(default_factory=list)
    """What was skipped, for the user."""
    packages: tuple[str, ...] = ()
    """The copied folders in which Python is to look for packages."""

    def place(self, file: Path) -> str | None:
        """Return the place of a file in the copy, or None where it is not in it."""
        for root, name in self.roots.items():
            if file.is_relative_to(root):
                return f"{name}/{file.relative_to(root).as_posix()}"
        return None


def take_snapshot(*recipes: Recipe) -> Snapshot:
    """Find the files that the recipes' code consists of. Raises UserError where a file is not there, or too much is."""
    named = [_named(recipe) for recipe in recipes]
    files = sorted({file for found, _ in named for file in found})
    packages = sorted({package for _, found in named for package in found})
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f"the recipe names code that is not there: {', '.join(missing)}")
    snapshot = Snapshot()
    folders = {file.parent for file in files} | {folder.parent for folder in packages}
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        if snapshot.place(folder) is not None:
            continue
        name = _free(folder.name or "root", set(snapshot.roots.values()))
        snapshot.roots[folder] = name
        # of a package's parent only that package
        wanted = None if folder in {file.parent for file in files} else [p for p in packages if p.parent == folder]
        for file in _files_of(folder, wanted, snapshot.notes):
            snapshot.files[f"{name}/{file.relative_to(folder).as_posix()}"] = file
    for file in files:  # whatever it is called: it is named
        snapshot.files[str(snapshot.place(file))] = file
    size = sum(file.stat().st_size for file in snapshot.files.values())
    if len(snapshot.files) > MOST_FILES or size > LARGEST_COPY:
        raise UserError(
            f"{', '.join(map(str, snapshot.roots))}: {len(snapshot.files):,} files of {size / 2**20:.0f} MiB would be "
            f"copied as the recipe's code, expected at most {MOST_FILES:,} of {LARGEST_COPY >> 20} MiB; put the code "
            "into a folder of its own"
        )
    found = {snapshot.place(folder.parent / "x") for folder in packages}
    return Snapshot(
        snapshot.files, snapshot.roots, snapshot.notes, tuple(sorted(str(p).removesuffix("/x") for p in found))
    )


def _named(recipe: Recipe) -> tuple[list[Path], list[Path]]:
    """Return the files that a recipe names, and the folders (or files) of packages that are not installed."""
    files: set[Path] = set()
    packages: set[Path] = set()
    for spec in named_objects(recipe.model_dump(mode="json")):
        where = spec.rpartition(":")[0]
        if where.endswith(".py"):
            files.add(Path(os.path.abspath(where)))
        elif (package := user_module(where.partition(".")[0])) is not None:
            packages.add(package)
    return sorted(files), sorted(packages)


def _free(name: str, taken: set[str]) -> str:
    clean = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name).lstrip(".-") or "code"
    return next(each for number in range(1, 10_000) if (each := clean + (f"-{number}" * (number > 1))) not in taken)


def _files_of(folder: Path, packages: list[Path] | None, notes: list[str]) -> Iterator[Path]:
    known = _known_to_git(folder)
    candidates = _python_files(folder) if known is None else known
    for file in sorted(candidates):
        if packages is not None and not any(file.is_relative_to(package) for package in packages):
            continue
        inner = file.relative_to(folder)
        if any(part in _NOT_CODE for part in inner.parts[:-1]) or not file.is_file():
            continue
        if any(part.startswith(".") for part in inner.parts) or _may_be_secret(file):
            continue
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            if file.suffix != ".py":
                continue
            notes.append(f"{file} is a link out of its folder and is not copied")
            continue
        if file.stat().st_size > LARGEST_FILE:
            if file.suffix == ".py":
                notes.append(f"{file} is larger than {LARGEST_FILE >> 20} MiB and is not copied")
            continue
        yield file


def _may_be_secret(file: Path) -> bool:
    name = file.name.lower()
    return file.suffix != ".py" and any(fnmatch(name, pattern) for pattern in _SECRET_NAMES)


def _known_to_git(folder: Path) -> list[Path] | None:
    """Return the folder's files that git tracks, and new Python files; None where there is no repository."""

    def listed(*options: str) -> list[str] | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), "ls-files", "-z", *options], capture_output=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name] if done.returncode == 0 else None

    tracked, new = listed(), listed("--others", "--exclude-standard", "--", "*.py")
    if tracked is None or new is None or not (tracked or new):
        return None  # of a folder that git ignores it says nothing
    return [folder / name for name in {*tracked, *new}]


def _python_files(folder: Path) -> list[Path]:
    found, seen = [], 0
    for place, folders, names in os.walk(folder):
        inner = Path(place)
        folders[:] = sorted(name for name in folders if _may_hold_code(inner / name))
        seen += len(folders) + len(names)
        if seen > _MOST_ENTRIES:
            raise UserError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files and folders, so it is more than the recipe's code; "
                "put the code into a folder of its own, or into a git repository"
            )
        found += [inner / name for name in names if name.endswith(".py")]
    return found


def _may_hold_code(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in _NOT_CODE or folder.is_symlink():
        return False
    marks = ("pyvenv.cfg", "conda-meta", "launch.json", "sweep.json")  # environments, and folders of runs
    return not any((folder / mark).exists() for mark in marks)


# --------------------------------------------------------------------------------------------------------------------
# The copy


def moved_values(value: Any, snapshot: Snapshot, code: Path) -> Any:
    """Return values of a recipe with the code that they name in the copy at `code`."""
    if isinstance(value, dict):
        return {moved_values(key, snapshot, code): moved_values(item, snapshot, code) for key, item in value.items()}
    if isinstance(value, list):
        return [moved_values(item, snapshot, code) for item in value]
    if isinstance(value, str) and is_object_spec(value):
        where, _, name = value.rpartition(":")
        if where.endswith(".py") and (place := snapshot.place(Path(os.path.abspath(where)))) is not None:
            return f"{code / place}:{name}"
    return value


def moved(loaded: LoadedRecipe, snapshot: Snapshot, code: Path) -> LoadedRecipe:
    """Return the recipe with the code that it names in the copy at `code`."""
    tree = moved_values(loaded.recipe.model_dump(mode="json"), snapshot, code)
    recipe = Recipe.model_validate(tree, by_alias=True, by_name=False)
    return LoadedRecipe(recipe, loaded.origins, loaded.folder)


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the hash of each file by its place."""
    return {place: hashlib.sha256(path.read_bytes()).hexdigest() for place, path in sorted(files.items())}


def copied(code: Path) -> dict[str, Path]:
    """Return the files of a copy by their places."""
    return {
        path.relative_to(code).as_posix(): path
        for path in code.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(code: Path, snapshot: Snapshot) -> list[str]:
    """Return the places at which a copy differs from what would be copied now."""
    old, new = digests(copied(code)), digests(snapshot.files)
    return sorted(place for place in old.keys() | new.keys() if old.get(place) != new.get(place))


def write_copy(snapshot: Snapshot, code: Path) -> None:
    """Copy the files to `code`, all or none; what was there is replaced."""
    fresh, old = code.with_name(f".{code.name}.new"), code.with_name(f".{code.name}.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    for place, path in snapshot.files.items():
        target = fresh / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        shutil.copymode(path, target)
    if code.exists():
        code.rename(old)
    fresh.rename(code)
    shutil.rmtree(old, ignore_errors=True)


def own_package(package: Path = Path(distrain.__file__).parent) -> Snapshot | None:
    """Return distrain itself where it runs from a checkout, whose files a user may edit; None where it is installed."""
    if (package / "share").is_dir():
        return None
    files: dict[str, Path] = {}
    for name in ("distrain", "launch", "accelerate_configs"):
        for folder, _, names in os.walk(package.parent / name):
            for path in (Path(folder, file) for file in names if file.endswith((".py", ".yaml"))):
                if path.is_file():  # an editor's lock is a link that leads nowhere
                    files[path.relative_to(package.parent).as_posix()] = path
    return Snapshot(dict(sorted(files.items())))
