"""Whether the packages that are installed fit each other, and are those that a run imports."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

import distrain
from distrain.doctor.context import Context
from distrain.doctor.findings import Finding, error, ok, warning
from distrain.system.errors import some

OURS = "distrain"
_SHOWN = ("torch", "torchvision", "accelerate", "deepspeed", "numpy")
_MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""What is imported of a package where that has another name."""


def versions(context: Context) -> Iterator[Finding]:
    """The versions of packages against the ranges of distrain and of each other."""
    try:
        needed = metadata.metadata(OURS)
    except metadata.PackageNotFoundError:
        yield error(
            f"distrain {distrain.__version__} in {Path(distrain.__file__).parent} is not installed",
            "processes that are started elsewhere do not find it, and which versions it needs is not known",
            "install it into this environment: pip install -e FOLDER",
        )
        return
    here = platform.python_version()
    ranges = str(needed.json.get("requires_python") or "")
    if not SpecifierSet(ranges).contains(here, prereleases=True):
        yield error(f"Python {here}", f"distrain needs Python {ranges}", "make an environment with a newer Python")
    problems = list(_misfits(OURS))
    for each in sorted(_direct()):
        problems += _misfits(each)
    for who, requirement, found in problems:
        has = f"{requirement.name} {found} is installed" if found else f"{requirement.name} is not installed"
        yield error(
            f"{who} needs {requirement.name}{requirement.specifier}, and {has}",
            "imports fail, or functions do other than what is expected of them",
            f"pip install {str(requirement).split(';')[0].strip()!r}, with the versions that distrain was tested "
            "with as constraints (constraints.txt)",
        )
    if not problems:
        yield ok(", ".join([f"Python {here}", *(f"{name} {_version(name)}" for name in _SHOWN)]))


def _direct() -> set[str]:
    """Return the names of the packages that distrain needs, and are there."""
    return {each.name for each in _requirements(OURS) if _version(each.name) is not None}


def _misfits(name: str) -> Iterator[tuple[str, Requirement, str | None]]:
    """Yield (who needs it, what, the version that is there) for each requirement of a package that does not hold."""
    for requirement in _requirements(name):
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{name} {_version(name)}", requirement, found


def _requirements(name: str) -> Iterator[Requirement]:
    """Yield what a package needs here whatever it is used for."""
    for line in metadata.requires(name) or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def copies(context: Context) -> Iterator[Finding]:
    """Whether a package is there twice, or hidden by a file of the current folder."""
    names = {_normal(each.name) for each in _requirements(OURS)} | {OURS}
    found: dict[str, dict[Path, set[str]]] = {}
    for entry in dict.fromkeys(Path(each or ".").resolve() for each in sys.path):
        for each in metadata.distributions(path=[str(entry)]):
            name = _normal(each.metadata["Name"] or "")
            if name in names:
                found.setdefault(name, {}).setdefault(entry, set()).add(each.version)
    problem = False
    for name, places in sorted(found.items()):
        for place, there in places.items():
            if len(there) > 1:
                problem = True
                yield error(
                    f"{place} has {name} as {' and as '.join(sorted(there))}",
                    "an installation was interrupted: files of both may be mixed",
                    f"pip uninstall {name} until nothing of it is there, then install it again",
                )
        if (
            len(places) > 1
            and not any(len(there) > 1 for there in places.values())
            and len({each for there in places.values() for each in there}) > 1
        ):
            problem = True
            first, *others = [f"{'/'.join(sorted(there))} in {place}" for place, there in places.items()]
            yield warning(
                f"{name} is there {len(places)} times: {first}, and {some(others)}",
                "the first is imported here; a process with another PYTHONPATH or user site takes another",
                f"remove the one that is not meant, or set PYTHONNOUSERSITE=1; PYTHONPATH is "
                f"{context.variables.get('PYTHONPATH') or 'not set'}",
            )
    for hidden, file in _hidden(Path.cwd(), names):
        problem = True
        yield error(
            f"{file} hides the package {hidden}",
            "processes of a run import from the current folder first, and find this in place of the package",
            "rename it, or start from another folder",
        )
    if not problem:
        yield ok(f"each of {len(names)} packages is there once")


def _hidden(folder: Path, names: set[str]) -> Iterator[tuple[str, Path]]:
    installed = Path(distrain.__file__).parents[1]
    for name in sorted(names):
        module = _MODULES.get(name, name.replace("-", "_"))
        for file in (folder / f"{module}.py", folder / module / "__init__.py"):
            if file.is_file() and not (name == OURS and folder.resolve() == installed.resolve()):
                yield name, file


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installation(context: Context) -> Iterator[Finding]:
    """Whether the distrain that runs is the one that processes elsewhere run."""
    here = Path(distrain.__file__).resolve().parent
    # without the current folder, PYTHONPATH and the user's own packages
    find = "import importlib.util as util; found = util.find_spec('distrain'); print(found.origin if found else '')"
    asked = subprocess.run([sys.executable, "-I", "-c", find], capture_output=True, text=True, timeout=30, check=False)
    said = asked.stdout.strip()
    if not said or Path(said).resolve().parent != here:
        yield warning(
            f"distrain is imported from {here}, and {f'installed in {Path(said).parent}' if said else 'not installed'}",
            "a process that starts in another folder, or on another machine, runs other code or none",
            f"install the one that is meant (pip install -e {here.parent}), or unset PYTHONPATH",
        )
    elif (installed := _version(OURS)) not in (None, distrain.__version__):
        yield warning(
            f"distrain is {distrain.__version__}, and was installed as {installed}",
            "the packages that this one needs may be missing",
            f"install it again: pip install -e {here.parent}",
        )
    else:
        yield ok(f"distrain {distrain.__version__} in {here}")
