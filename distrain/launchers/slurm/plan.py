"""`Plan`: all that a batch script is made from, each value checked for the place that it goes to.

SLURM reads `#SBATCH` lines with rules of its own, in which quotes, `%`, `#` and backslashes mean something, and hands
them on to plugins of the site; what goes there is held to the characters that such values have. What goes into the body
of the script is quoted, and may be any text of one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrain.config import UserError
from distrain.config.strategies import strategy_name
from distrain.system.output import one_line

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_SHOWN_ITEMS = 3
"""How many items of a list a message names one by one."""
_DAYS = re.compile(r"(\d{1,4})-(\d{1,2})(?::(\d{1,2})(?::(\d{1,2}))?)?")
_CLOCK = re.compile(r"(?:(\d{1,5}):)?(\d{1,4}):(\d{1,2})|(\d{1,6})")
_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY|_KEY$|^KEY$|JWT|_PAT$|_AUTH$")


def text_of_one_line(value: str) -> str:
    """Return `value`; raises ValueError for a line break or another control character in it."""
    if found := _NOT_UTF8.search(value):
        raise ValueError(
            f"found the byte {one_line(found[0])} in '{one_line(value)}', which is not UTF-8; rename what is called so"
        )
    if found := _CONTROL.search(value):
        raise ValueError(f"found the control character U+{ord(found[0]):04X} in {value!r}, expected text of one line")
    return value


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(f"found {value!r}, expected {expected}")
        return value

    return check


def absolute_path(value: str) -> str:
    """Return `value`; raises ValueError unless it is an absolute path on one line."""
    text_of_one_line(value)
    if not value.startswith("/"):
        raise ValueError(f"found {value!r}, expected an absolute path")
    return value


def header_path(value: str) -> str:
    r"""Return an absolute path that can stand in an #SBATCH line; raises ValueError where SLURM would misread it."""
    absolute_path(value)
    if found := re.search(r"[\"'`\\$%#]", value):
        raise ValueError(
            f"found {found[0]} in the path {value!r}, and SLURM gives it a meaning of its own; choose another --run-dir"
        )
    return value


def bound_path(value: str) -> str:
    """Return an absolute path that a list of mounts or of Python's folders can hold, which ',' and ':' cut apart."""
    absolute_path(value)
    if found := re.search("[,:]", value):
        raise ValueError(
            f"found {found[0]!r} in the path {value!r}, which lists of paths are cut at; rename the folder"
        )
    return value


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit as SLURM writes it; raises ValueError for what is none."""
    if match := _DAYS.fullmatch(time):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _CLOCK.fullmatch(time):
        hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
        days, minutes = 0, int(match[4]) if match[4] else minutes
    else:
        raise ValueError(f"found {time!r}, expected a time limit such as 30 (minutes), 4:00:00 or 1-12:00:00")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 60:
        raise ValueError(f"found {time!r}, expected at least a minute; SLURM counts in minutes")
    return total


def _time(value: str) -> str:
    seconds_of(value)
    return value


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name is likely to hold what nobody else may read."""
    return _SECRET.search(name.upper()) is not None


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,200}", name):
        raise ValueError(f"found {name!r}, expected the name of an environment variable")
    if is_secret(name):
        raise ValueError(
            f"{name} is the name of a secret, which a script would show to whoever may read it; keep it in a file that "
            "only you can read, as ~/.netrc for wandb"
        )
    if re.match(r"BASH|LD_PRELOAD$|LD_AUDIT$|IFS$|SHELLOPTS$|PS4$|PROMPT_COMMAND$|ENV$|SLURM_|SBATCH_|PATH$", name):
        raise ValueError(
            f"{name} cannot be set as a value; write `export {name}=…` into a file of your own and name it in `sources`"
        )
    return name


def _variable_value(value: str) -> str:
    text_of_one_line(value)
    if re.search(r"\$[\w{(]|`", value):
        raise ValueError(
            f"found {value!r}, which would not be expanded: values are taken as they are written. Write "
            "`export NAME=…` into a file of your own and name it in `sources`"
        )
    if re.search(r"://[^/@\s]*:[^/@\s]*@", value):
        raise ValueError("found an address with a password in it, which a script would show to whoever may read it")
    return value


_OWN_OPTIONS = (
    *("account", "array", "batch", "chdir", "constraint", "cpus-per-task", "error", "export", "export-file"),
    *("get-user-env", "gid", "gpus-per-node", "help", "ignore-pbs", "input", "job-name", "mem", "no-kill"),
    *("no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos"),
    *("quiet", "requeue", "reservation", "signal", "time", "uid", "usage", "version", "wait", "wrap"),
)


def _sbatch_option(value: str) -> str:
    match = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=([A-Za-z0-9_.,:/@+*\[\]()&|=-]+))?", value)
    if match is None:
        raise ValueError(
            f"found {value!r}, expected an option of sbatch as --exclusive or --licenses=NAME:1, without blanks, "
            "quotes and characters that a shell knows"
        )
    for own in _OWN_OPTIONS:
        if own == match[1] or (len(match[1]) >= 3 and own.startswith(match[1])):  # SLURM takes abbreviations
            raise ValueError(f"--{match[1]} is set from other values here; see `distrain submit --help`")
    return value


def _mount(value: str) -> str:
    text_of_one_line(value)
    source, *rest = value.split(":")
    targets, options = rest[:1], rest[1:]
    for path in (source, *targets):
        absolute_path(path)
        if "," in path:
            raise ValueError(f"found ',' in {value!r}, which lists of mounts are cut at")
    if options not in ([], ["ro"], ["rw"]):
        raise ValueError(f"found {value!r}, expected /path, /path:/path/inside or /path:/path/inside:ro")
    return value


def _image(value: str) -> str:
    text_of_one_line(value)
    if not re.fullmatch(r"[A-Za-z0-9/][^\s\"'`\\$%#;&|<>*?,]*", value):
        raise ValueError(
            f"found {value!r}, expected a file or an address of a container image, without blanks and quotes"
        )
    return value


def _module(value: str) -> str:
    return _matching(r"[A-Za-z0-9_][A-Za-z0-9_./+@=-]*", "the name of a module, such as cuda/12.4")(value)


def _word(expected: str) -> Any:
    return AfterValidator(_matching(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*", expected))


OneLine = Annotated[str, AfterValidator(text_of_one_line)]
AbsolutePath = Annotated[str, AfterValidator(absolute_path)]
HeaderPath = Annotated[str, AfterValidator(header_path)]
BoundPath = Annotated[str, AfterValidator(bound_path)]
TimeLimit = Annotated[str, AfterValidator(_time)]
Memory = Annotated[str, AfterValidator(_matching(r"\d{1,9}[KMGT]?", "memory such as 64G, or 0 for all of a node"))]
Partition = Annotated[str, _word("the name of a partition")]
Account = Annotated[str, _word("the name of an account")]
Qos = Annotated[str, _word("the name of a quality of service")]
Reservation = Annotated[str, _word("the name of a reservation")]
Constraint = Annotated[
    str, AfterValidator(_matching(r"[A-Za-z0-9_\[(][A-Za-z0-9_.,&|*\[\]()-]*", "features of nodes, such as a100&ib"))
]
GpuType = Annotated[str, AfterValidator(_matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a type of GPU, such as a100"))]
SbatchOption = Annotated[str, AfterValidator(_sbatch_option)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
VariableValue = Annotated[str, AfterValidator(_variable_value)]
Mount = Annotated[str, AfterValidator(_mount)]
Image = Annotated[str, AfterValidator(_image)]
Module = Annotated[str, AfterValidator(_module)]
Interface = Annotated[
    str, AfterValidator(_matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", "one network interface, such as ib0"))
]
Count = Annotated[int, Field(ge=1, le=100_000)]


class Frozen(BaseModel):
    """Values that are checked when they are set, and stay."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Container(Frozen):
    """An image that the processes run in."""

    apptainer: Image | None = None
    """A .sif file or an address, run by `apptainer exec`."""
    pyxis: Image | None = None
    """An image or a .sqsh file, run by srun with the plugin Pyxis."""
    mounts: tuple[Mount, ...] = Field(default=(), strict=False)
    """Folders of the node that are seen inside, as /path or /path:/inside; the run's own folder always is."""
    python: OneLine = "python3"
    """The Python inside, which has distrain's requirements."""

    @model_validator(mode="after")
    def _one(self) -> Container:
        if (self.apptainer is None) == (self.pyxis is None):
            raise ValueError("a container is either `apptainer: IMAGE` or `pyxis: IMAGE`")
        if self.python.startswith("-"):
            raise ValueError(f"found {self.python!r}, expected the name or path of a Python")
        return self


class Plan(Frozen):
    """One job, or one array of jobs."""

    name: Annotated[str, AfterValidator(_matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "a name"))]
    """What the queue shows."""
    folder: Annotated[HeaderPath, AfterValidator(bound_path)]
    """The run's folder, or that of a sweep."""
    runs: Annotated[tuple[HeaderPath, ...], Field(min_length=1, max_length=10_000, strict=False)]
    """The run folders: one, or of a sweep one for each task of the array."""
    tasks: Annotated[tuple[Annotated[int, Field(ge=0, le=100_000)], ...], Field(strict=False)] = ()
    """Of a search: the numbers of its runs that are left, each of which is a task of the array; `runs` is then the
    sweep's folder."""
    prunes: bool = False
    """Whether the runs of a search stop which are worse than the others."""
    parallel: Count | None = None
    """How many tasks of an array run at a time; None leaves it to SLURM."""
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] = 0
    gpu_type: GpuType | None = None
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are asked for."""
    processes_per_node: Count
    cpus_per_task: Count | None = None
    """CPUs of each node, which its processes share; None leaves it to the site."""
    mem: Memory | None = None
    """Memory of each node."""
    time: TimeLimit
    """The time limit; a run that has more to do resumes in another job."""
    notice_s: Annotated[int, Field(ge=5, le=65_535)] = 120
    """How long before the time limit the run is asked to save and stop."""
    partition: Partition | None = None
    account: Account | None = None
    qos: Qos | None = None
    constraint: Constraint | None = None
    reservation: Reservation | None = None
    sbatch: tuple[SbatchOption, ...] = Field(default=(), strict=False)
    """Further options of sbatch."""
    strategy: Annotated[str, AfterValidator(strategy_name)]
    offload: Literal["none", "optimizer", "all"] = "none"
    replicate: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    python: OneLine
    """The Python that runs the launchers."""
    node_script: AbsolutePath
    """launch/node.py, as it is seen where the launchers run."""
    modules: tuple[Module, ...] = Field(default=(), strict=False)
    sources: tuple[AbsolutePath, ...] = Field(default=(), strict=False)
    """Files of shell commands that are read before the start."""
    variables: dict[VariableName, VariableValue] = {}
    """Environment variables, as they are written."""
    python_path: tuple[BoundPath, ...] = Field(default=(), strict=False)
    """Folders in which Python looks for modules first."""
    interface: Interface | None = None
    """The network between nodes."""
    scratch: OneLine | None = None
    """A folder of each node's own; $NAME in it is a variable of the node."""
    container: Container | None = None

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        if 0 < self.gpus_per_node < self.processes_per_node:
            raise ValueError(
                f"{self.processes_per_node} processes on a node with {self.gpus_per_node} GPUs; each needs one"
            )
        if self.notice_s >= seconds_of(self.time):
            raise ValueError(
                f"a notice {self.notice_s} s before a time limit of {seconds_of(self.time)} s leaves no time to train"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def is_array(self) -> bool:
        """Whether it is an array of jobs, one for each run of a sweep."""
        return bool(self.tasks) or self.runs != (self.folder,)

    @property
    def task_count(self) -> int:
        """Tasks of the array; 1 where it is none."""
        return len(self.tasks or self.runs)


def problems_of(error: ValidationError) -> list[str]:
    """Return what is wrong with values that pydantic refused, a line for each place, in words of ours.

    Told once is what stands in several places: that a list of refused items is empty, and a path below a refused
    folder. Of a list's items the first few are named.
    """
    found: dict[tuple[int | str, ...], Any] = {}
    for item in error.errors():
        place = tuple(step for step in item["loc"] if step != "[key]")
        found.setdefault(place, item)
    refused = found.get(("folder",), {}).get("input")
    lines = []
    counts: dict[tuple[int | str, ...], int] = {}
    for place, item in found.items():
        value = item["input"]
        if item["type"] == "too_short" and any(other[:-1] == place for other in found):
            continue
        inside = isinstance(refused, str) and isinstance(value, str) and f"{value}/".startswith(f"{refused}/")
        if inside and place != ("folder",):
            continue
        if isinstance(place[-1] if place else None, int):
            counts[place[:-1]] = counts.get(place[:-1], 0) + 1
            if counts[place[:-1]] > _SHOWN_ITEMS:
                continue
        name = ".".join(map(str, place))
        lines.append(f"{name}: {problem_of(item)}" if name else problem_of(item))
    more = {place: count - _SHOWN_ITEMS for place, count in counts.items() if count > _SHOWN_ITEMS}
    return lines + [f"{'.'.join(map(str, place))}: {count} more like these" for place, count in more.items()]


def problem_of(item: Any) -> str:
    """Return what is wrong with one value that pydantic refused, in words of ours."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    expected = {
        "string_type": "text; put it in quotes",
        "string_unicode": "text in UTF-8",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than_equal": f"at most {context.get('le')}",
        "greater_than": f"more than {context.get('gt')}",
        "less_than": f"less than {context.get('lt')}",
        "literal_error": f"one of {context.get('expected', '').replace(' or ', ', ')}",
        "too_short": f"at least {context.get('min_length')}",
        "too_long": f"at most {context.get('max_length')}",
    }
    match kind:
        case "value_error":
            return str(context["error"])
        case "extra_forbidden":
            return "is not known here"
        case "missing":
            return "is missing"
        case "too_short" | "too_long":
            return f"found {len(value)}, expected {expected[kind]}"
        case _:
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            return f"found {shown}, expected {expected.get(kind, 'something else')}"


def make_plan(**values: Any) -> Plan:
    """Return the plan of these values; raises UserError with all that is wrong with them."""
    try:
        return Plan(**values)
    except ValidationError as error:
        raise UserError("this cannot be submitted:\n  - " + "\n  - ".join(problems_of(error))) from error
