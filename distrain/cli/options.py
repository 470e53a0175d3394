"""What several commands have: options, and how they begin."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distrain.cli import completion
from distrain.config.strategies import STRATEGIES
from distrain.system.environment import QUIET
from distrain.system.errors import close_names
from distrain.system.output import echo, one_line


def _named(value: str | None) -> str | None:
    """Refuse an empty path: a variable of the shell that is not set would mean another place than the one in mind."""
    if value == "":
        raise typer.BadParameter("found an empty text; expected a path (is a variable of the shell not set?)")
    return value


class Commands(TyperGroup):
    """Commands that say of an option's value what was found and expected, where Typer passes on pydantic's error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            problems: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
            problem = problems[0] if problems else {}
            if expected := _EXPECTED.get(problem.get("type", "")):
                error.message = f"found {problem['input']!r}, expected {expected.format(**problem.get('ctx', {}))}"
            raise


_EXPECTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "a number ≥ {ge:.16g}",
    "less_than_equal": "a number ≤ {le:.16g}",
}
"""By the type of pydantic's error; in braces what that holds."""


def one_of(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    """Return a reader of options that are one of an enumeration; Typer's own error has no suggestion."""
    choices = [each.value for each in kind]

    def parse(value: str) -> StrEnum:
        if value not in choices:
            guess = close_names(value, choices)
            raise typer.BadParameter(f"found {value!r}, expected one of {', '.join(map(repr, choices))}{guess}")
        return kind(value)

    return parse


Averaged = Annotated[
    bool,
    typer.Option(
        "--ema", help="The moving average of the weights, in place of the weights that are otherwise written."
    ),
]
Best = Annotated[
    bool,
    typer.Option(
        "--best",
        help="The best checkpoint of a run by its score. Without it the one that a finished run exported is taken, and "
        "of any other run the newest.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there; refused without it.")]
ChangedData = Annotated[
    bool,
    typer.Option(
        "--changed-data", help="Take a split although the data changed since the training; an error without it."
    ),
]
InitialWeights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Where the weights are now that a checkpoint refers to and does not store (checkpoint.frozen).",
        show_default="where its recipe says",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Open pickles that hold more than tensors, in a process which runs them; refused without it."
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not check the bytes against their hashes first, as is done without it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and not text for people, as without it.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings and errors alone; without it also progress and results.")
]
RecipeOrRun = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|RUN",
        help="A recipe file, or the folder of a run to resume.",
        autocompletion=completion.runs,
        callback=_named,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the recipe's.",
        autocompletion=completion.overrides,
    ),
]
RunFolder = Annotated[
    str | None, typer.Option(help="The run's folder, of a recipe.", show_default="runs/NAME", callback=_named)
]
Update = Annotated[
    bool,
    typer.Option("--update", help="Resume an existing run under a changed recipe, data or code; refused without it."),
]


SearchRuns = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Make N runs, whose values Optuna draws.", show_default="every combination"),
]
NoPrune = Annotated[
    bool,
    typer.Option(
        "--no-prune",
        help="Train every run of a search to its end; without it those stop early whose evaluations are worse than the "
        "median.",
    ),
]


StrategyName = StrEnum("StrategyName", ["auto", *STRATEGIES])  # type: ignore[misc] # its names are known at run time
"""How state can be spread over processes."""

AUTO = StrategyName("auto")


Replicate = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Replicas that fsdp2 makes, each sharded over its share of the processes; auto: one for each machine.",
        show_default="as the run was started, else 1",
    ),
]


class Documents(StrEnum):
    """What a document is in a file of text."""

    file = "file"
    line = "line"


class Offload(StrEnum):
    """What can be kept in the memory of the CPU."""

    none = "none"
    optimizer = "optimizer"
    all = "all"


Strategy = Annotated[
    StrategyName,
    typer.Option(
        parser=one_of(StrategyName),
        help="How state is spread over the processes; auto resumes a run as it was started; a new one has ddp, or "
        "single in one process.",
    ),
]
OffloadTo = Annotated[
    Offload | None,
    typer.Option(
        parser=one_of(Offload),
        help="What zero1, zero2, zero3 and fsdp2 keep in the memory of the CPU.",
        show_default="as the run was started, else none",
    ),
]


def be_quiet(asked: bool) -> None:
    """Where asked, have this process and those that it starts print nothing but results, warnings and errors."""
    if asked:
        os.environ[QUIET] = "1"


def own_process(command: str, processes: int | None = None) -> None:
    """Have nothing of other launchers act on a command that is one process, or starts its own."""
    from distrain.system.environment import own_start, say_ignored

    say_ignored(own_start(os.environ, processes, command))


def print_notes(notes: Sequence[str], skipped: Sequence[str]) -> None:
    """Print how a checkpoint was understood, and what of it was not taken."""
    for note in notes:
        echo(f"  {one_line(note)}")
    for what in skipped:
        echo(f"  not imported: {one_line(what)}")
