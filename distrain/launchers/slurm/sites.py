"""Sites: what jobs on a cluster have in common, one YAML file each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from distrain.config import UserError, close_names
from distrain.config.yaml.strict_yaml import Tree, dotted, syntax_problem
from distrain.launchers import shared_file
from distrain.launchers.slurm.plan import (
    Account,
    Constraint,
    Container,
    Count,
    Frozen,
    GpuType,
    Interface,
    Memory,
    Module,
    OneLine,
    Partition,
    Qos,
    Reservation,
    SbatchOption,
    TimeLimit,
    VariableName,
    VariableValue,
    absolute_path,
    problem_of,
    text_of_one_line,
)

_LARGEST_FILE = 1 << 18


def _source(value: str) -> str:
    return absolute_path(os.path.expanduser(text_of_one_line(value)))


def _scratch(value: str) -> str:
    text_of_one_line(value)
    if not value.startswith(("/", "$")):
        raise ValueError(f"found {value!r}, expected an absolute path or one that begins with a variable, as $SCRATCH")
    return value


class Site(Frozen):
    """Defaults for the jobs of a cluster; every value is optional."""

    description: OneLine = ""
    """One line for `distrain sites`."""
    partition: Partition | None = None
    """The partition; by default SLURM's."""
    account: Account | None = None
    """The account that pays."""
    qos: Qos | None = None
    """The quality of service."""
    constraint: Constraint | None = None
    """Features that the nodes must have, such as a100&ib."""
    reservation: Reservation | None = None
    """A reservation to run in."""
    gpu_type: GpuType | None = None
    """The type of GPU to ask for, such as a100."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are asked for: gres on clusters that know no other way."""
    cpus_per_gpu: Count | None = None
    """CPUs to ask for with each GPU, unless --cpus-per-task is given."""
    mem: Memory | None = None
    """Memory of each node, such as 64G; 0 is all of it."""
    time: TimeLimit | None = None
    """The time limit where --time is not given."""
    notice_s: Annotated[int, Field(ge=5, le=65_535)] | None = None
    """Seconds before the time limit at which a run is asked to save and stop."""
    sbatch: Annotated[tuple[SbatchOption, ...], Field(strict=False)] = ()
    """Further options of sbatch, such as --exclusive."""
    modules: Annotated[tuple[Module, ...], Field(strict=False)] = ()
    """Modules to load, in this order."""
    sources: Annotated[tuple[Annotated[str, AfterValidator(_source)], ...], Field(strict=False)] = ()
    """Files of shell commands that are read before the start: for what the other values cannot express."""
    environment: dict[VariableName, VariableValue] = {}
    """Environment variables, as they are written."""
    python: OneLine | None = None
    """The Python to run; by default the one that runs `distrain submit`."""
    interface: Interface | None = None
    """The network interface between nodes, such as ib0; by default detected for gloo and left to NCCL."""
    scratch: Annotated[str, AfterValidator(_scratch)] | None = None
    """A folder of each node's own for temporary files, such as /scratch or $SLURM_TMPDIR."""
    container: Container | None = None
    """An image to run in: {apptainer: IMAGE} or {pyxis: IMAGE}, with mounts."""


@dataclass(frozen=True)
class FoundSite:
    """A site's file."""

    name: str
    path: Path
    hidden_by: Path | None = None
    """Another file of this name that is taken instead."""


def site_folders() -> list[Path]:
    """Return where sites are looked for: this folder's slurm/sites, the user's own, and those that come along."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [Path.cwd() / "slurm" / "sites", Path(config) / "distrain" / "sites", shared_file("slurm", "sites")]


def find_sites() -> list[FoundSite]:
    """Return every site's file, by name; the first of equal names is the one that is taken."""
    first: dict[str, Path] = {}
    found = []
    for folder in site_folders():
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
            taken = first.setdefault(path.stem, path)
            if taken is path:
                found.append(FoundSite(path.stem, path))
            elif not taken.samefile(path):
                found.append(FoundSite(path.stem, path, taken))
    return sorted(found, key=lambda site: (site.name, site.hidden_by is not None))


def load_site(name: str) -> Site:
    """Return a site by its name, or by the path of its file. Raises UserError with all that is wrong with it."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_site(Path(name))
    sites = {site.name: site.path for site in find_sites() if site.hidden_by is None}
    if name not in sites:
        folders = ", ".join(str(folder) for folder in site_folders()[:2])
        hint = close_names(name, sites, f"there are {', '.join(sites)}")
        raise UserError(f"no site {name!r}{hint}. A site is a file NAME.yaml in one of {folders}")
    return read_site(sites[name])


def read_site(path: Path) -> Site:
    """Read a site's file. Raises UserError with all that is wrong with it."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise UserError(f"{path} is larger than {_LARGEST_FILE >> 10} KiB, which no site is")
        tree = Tree.parse(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: {syntax_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: found a control character; take it out") from error
    problems = [f"{path}:{tree.lines.get(place, 1)}: {dotted(place)}: {problem}" for place, problem in tree.problems]
    values = {} if tree.value is None else tree.value
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping; expected values for {', '.join(Site.model_fields)}")
    site = None
    try:
        site = Site.model_validate(values)
    except ValidationError as error:
        unreadable = {place for place, _ in tree.problems}
        problems += [
            f"{path}:{tree.lines.get(_known(place, tree), 1)}: {dotted(place)}: {_problem(item, place)}"
            for item in error.errors()
            for place in [tuple(step for step in item["loc"] if step != "[key]")]
            if place not in unreadable
        ]
    if problems or site is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"the site {path.stem} has {count}:\n  - " + "\n  - ".join(problems))
    return site


def _known(place: tuple[str | int, ...], tree: Tree) -> tuple[str | int, ...]:
    return next(place[:end] for end in range(len(place), -1, -1) if place[:end] in tree.lines or end == 0)


def _problem(item: object, place: tuple[str | int, ...]) -> str:
    assert isinstance(item, dict)
    if item["type"] == "extra_forbidden":
        keys = list(Site.model_fields if len(place) == 1 else Container.model_fields)
        return f"unknown key{close_names(str(place[-1]), keys) or ', expected one of ' + ', '.join(keys)}"
    return problem_of(item)


def site_lines(name: str | None = None) -> list[str]:
    """Return what `distrain sites` prints: each site with where it is, or the values of one."""
    if name is not None:
        site = load_site(name)
        about = {key: value for key, value in site.model_dump(mode="json", exclude_none=True).items() if value}
        text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True, default_flow_style=False)
        return text.rstrip().splitlines() if about else [f"{name} leaves every value to SLURM"]
    found = find_sites()
    width = max((len(each.name) for each in found), default=0)
    lines = []
    for each in found:
        try:
            what = read_site(each.path).description
        except UserError as error:
            what = str(error).partition(":\n")[0]
        hidden = f", hidden by {each.hidden_by}" if each.hidden_by else ""
        lines.append(f"{each.name:<{width}}  {what}{'  ' if what else ''}({each.path}{hidden})")
    return lines


def sites_as_json(name: str | None = None) -> Any:
    """Return the same for programs."""
    if name is not None:
        return load_site(name).model_dump(mode="json")
    return [
        {"name": site.name, "path": str(site.path), "hidden_by": str(site.hidden_by) if site.hidden_by else None}
        for site in find_sites()
    ]
