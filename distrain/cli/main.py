"""The command `distrain`. Every command is thin: it reads its arguments, calls a room, and prints what that returns.

Imports no torch, and nothing slow before the command that needs it.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command_name

from distrain import __version__
from distrain.cli import cluster as cli_cluster
from distrain.cli import completion
from distrain.cli import doctor as cli_doctor
from distrain.cli import exporting as cli_exporting
from distrain.cli import generate as cli_generate
from distrain.cli import plan as cli_plan
from distrain.cli import predict as cli_predict
from distrain.cli import reports as cli_reports
from distrain.cli import sweeps as cli_sweeps
from distrain.cli import ui as cli_ui
from distrain.cli.options import (
    AUTO,
    ChangedData,
    Commands,
    Documents,
    InitialWeights,
    Json,
    NoVerify,
    OffloadTo,
    Overrides,
    Quiet,
    RecipeOrRun,
    Replicate,
    RunFolder,
    Strategy,
    Trust,
    Update,
    be_quiet,
    one_of,
    own_process,
    print_notes,
)
from distrain.config import UserError
from distrain.system.environment import is_quiet, share_cores
from distrain.system.logs import show_on_terminal
from distrain.system.numbers import counted
from distrain.system.output import echo, echo_error, echo_loading, one_line, prepare_streams

app = typer.Typer(
    name="distrain",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
checkpoint_app = typer.Typer(
    help="List, verify, compare and import checkpoints; distrain export exports them.", no_args_is_help=True
)
data_app = typer.Typer(help="Prepare data.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        echo(f"distrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, and without it what COMMAND does.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Train a PyTorch model from one recipe, on whatever hardware is there."""


class Kind(StrEnum):
    """What `distrain list` can list."""

    tasks = "tasks"
    models = "models"
    datasets = "datasets"
    optimizers = "optimizers"
    losses = "losses"
    metrics = "metrics"
    schedules = "schedules"
    callbacks = "callbacks"
    trackers = "trackers"
    formats = "formats"
    launchers = "launchers"


# --------------------------------------------------------------------------------------------------------------------
# Training and using models


@app.command()
def train(
    target: RecipeOrRun,
    overrides: Overrides = None,
    run_dir: RunFolder = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one for each GPU, else 1")
    ] = None,
    update: Update = False,
    strategy: Strategy = AUTO,
    offload: OffloadTo = None,
    replicate: Replicate = None,
    quiet: Quiet = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print at the end what `distrain status --json` does, and nothing without it."),
    ] = False,
) -> None:
    """Train a recipe. The same command resumes a stopped run, and shows a finished one."""
    be_quiet(quiet or as_json)
    if not is_quiet():
        echo_loading(on_terminal=True)
    share_cores(processes or 1)
    from distrain.launchers import start

    ended = start(
        target, overrides or [], run_dir=run_dir, processes=processes, update=update, strategy=strategy.value,
        offload=offload.value if offload is not None else None, replicate=replicate,
    )  # fmt: skip
    if as_json and ended.run is not None:
        cli_cluster.print_statuses(ended.run, as_json=True)
    raise typer.Exit(ended.status)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.", autocompletion=completion.runs
        ),
    ],
    inputs: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="A file or folder with targets, as the data set reads one for a split, in place of a split.",
        ),
    ] = None,
    *,
    split: Annotated[str | None, typer.Option(help="train, valid or test.", show_default="test")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A key of the recipe's data section, for reading the samples.",
            show_default="as in training",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine; the metrics are the same for any number.")
    ] = 1,
    changed_data: ChangedData = False,
    initial_weights: InitialWeights = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on every sample of a split, or of a file with targets, each once."""
    share_cores(processes)
    from distrain.launchers import start_evaluation

    if inputs is not None and split is not None:
        raise UserError(f"found both {inputs} and --split {split}; name one of them")
    raise typer.Exit(
        start_evaluation(
            target, inputs or split or "test", processes=processes, as_json=as_json, changed_data=changed_data,
            initial_weights=initial_weights, data=data or [],
        )
    )  # fmt: skip


app.command()(cli_plan.plan)
app.command()(cli_doctor.doctor)
app.command()(cli_predict.predict)
app.command()(cli_generate.generate)


@app.command("prove")
def prove_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=0, help="Interruptions of each run that is resumed.")] = 3,
    steps: Annotated[int, typer.Option(min=6, help="How many of the recipe's first steps are trained.")] = 30,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one for each GPU, else 1")
    ] = None,
    worlds: Annotated[
        str,
        typer.Option(help="Numbers of processes that must agree, such as 1,2,3.", show_default="that of --processes"),
    ] = "",
    strategies: Annotated[
        str, typer.Option(help="Strategies that must agree, such as ddp,zero3.", show_default="the usual one")
    ] = "",
    replicate: Annotated[
        str, typer.Option(help="Numbers of replicas with which fsdp2 must agree, such as 1,2.", show_default="1")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides when runs are interrupted.", show_default="another each time")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep all runs there.", show_default="none is kept")
    ] = None,
    loss_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="How much losses may differ in other --worlds and --strategies.", show_default="by precision"
        ),
    ] = None,
    state_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="How much tensors may differ there, relative to their norm.", show_default="by precision"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a recipe without interruption, then with kills and resumes, and compare everything to the bit."""
    own_process("prove", processes)
    from distrain.prove.command import run

    status = run(
        recipe,
        overrides or [],
        as_json=as_json,
        kills=kills,
        steps=steps,
        processes=processes,
        worlds=worlds,
        strategies=strategies,
        replicate=replicate,
        seed=seed,
        keep=keep,
        loss_tolerance=loss_tolerance,
        state_tolerance=state_tolerance,
    )
    raise typer.Exit(status)


# --------------------------------------------------------------------------------------------------------------------
# Many runs, runs on a cluster, and what others use

for command in (
    cli_sweeps.sweep,
    *(
        cli_cluster.submit,
        cli_cluster.status,
        cli_cluster.watch,
        cli_cluster.logs,
        cli_cluster.stop,
        cli_cluster.cancel,
    ),
    cli_cluster.sites,
    *(cli_reports.report, cli_reports.compare),
    cli_exporting.export,
    cli_ui.ui,
):
    app.command()(command)


# --------------------------------------------------------------------------------------------------------------------
# Recipes


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print the resolved recipe, each value with where it came from."""
    from distrain.config.yaml import load_recipe
    from distrain.config.yaml import show as shown

    rows = shown(load_recipe(recipe, overrides or []))
    if as_json:
        typer.echo(json.dumps([{"key": key, "value": value, "from": origin} for key, value, origin in rows], indent=2))
        return
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(max(len(str(value)) for _, value, _ in rows), 44)
    for key, value, origin in rows:
        echo(one_line(f"{key:<{key_width}}  {value!s:<{value_width}}  {origin}"))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from distrain.config.yaml import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command("list")
def list_names(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", parser=one_of(Kind), help="What to list.")],
    part: Annotated[
        str, typer.Argument(metavar="PART", help="Only names with this in them, those of libraries one by one.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Print the names that a recipe or an option may use, each with one line."""
    from distrain.config import registry

    table = getattr(registry, kind)
    found = {name: about for name, about in table.summaries().items() if part.lower() in name.lower()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        what = f"with {part!r} in its name " if part else ""
        echo(f"no {table.kind} {what}is built in or installed; name your own as path/to/file.py:NAME", error=True)
    for about, names in itertools.groupby(found, key=lambda name: found[name]):
        listed = list(names)
        if len(listed) > 10 and not part:
            which = f"`distrain list {kind} PART` prints those with PART in their names"
            echo(f"{listed[0]} ... {len(listed)} {kind} of {about}; {which}")
            continue
        for name in listed:
            echo(one_line(f"{name:<28} {about}"))


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")]) -> None:
    """Start a small project of your own: a model, a data set and a recipe, which train at once."""
    from distrain.project import create_project

    for path in create_project(folder):
        echo(f"wrote {path}")
    echo(f"Train it: distrain train {folder / 'recipe.yaml'}")


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


@checkpoint_app.command("ls")
def checkpoint_ls(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")], as_json: Json = False
) -> None:
    """List a run's checkpoints."""
    from distrain.checkpoint import CheckpointError, checkpoint_folder, list_checkpoints, read_manifest

    rows: list[dict[str, Any]] = []
    for info in list_checkpoints(checkpoint_folder(run)):
        try:
            manifest = read_manifest(info.path)
        except CheckpointError as error:
            rows.append({"name": info.path.name, "problem": str(error)})
            continue
        rows.append(
            {
                "name": info.path.name,
                "step": manifest.step,
                "bytes": sum(file.size for file in manifest.files),
                "written by": f"{manifest.world_size} x {manifest.strategy}",
                "score": manifest.score,
                "created": manifest.created,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        echo(f"{run} has no checkpoints")
    for row in rows:
        if "problem" in row:
            echo(one_line(f"{row['name']}  {row['problem']}"))
            continue
        score = "" if row["score"] is None else f"  score {row['score']:.6g}"
        size = f"{row['bytes'] / 2**20:8.1f} MiB"
        echo(one_line(f"{row['name']}  {size}  {row['written by']:<12}  {row['created']}{score}"))


@checkpoint_app.command("verify")
def checkpoint_verify(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.", autocompletion=completion.runs
        ),
    ],
    initial_weights: InitialWeights = None,
    as_json: Json = False,
) -> None:
    """Read every byte and check it against the manifest's hashes, and the weights that it refers to."""
    from distrain.checkpoint import checkpoint_folder, list_checkpoints, read_manifest, verify
    from distrain.checkpoints.format import MANIFEST
    from distrain.checkpoints.reading import is_checkpoint_name

    single = (target / MANIFEST).exists() or (target.is_dir() and is_checkpoint_name(target.name))
    paths = [target] if single else [info.path for info in list_checkpoints(checkpoint_folder(target))]
    if not paths:
        raise UserError(f"{target} has no checkpoints")
    found: dict[str, list[str]] = {}
    checked: dict[str, str | None] = {}
    for path in paths:
        problems = verify(path)
        if not problems and (frozen := read_manifest(path).frozen) is not None:
            key = json.dumps(frozen.to_json())
            if key not in checked:  # all of a run refer to the same
                from distrain.training.restored import frozen_problem

                checked[key] = frozen_problem(path, initial_weights)
            problems += [problem] if (problem := checked[key]) is not None else []
        found[path.name] = problems
        if as_json:
            continue
        echo(f"{path.name}  {'whole' if not problems else f'damaged: {one_line(problems[0])}'}")
        for problem in problems[1:]:
            echo(f"  {one_line(problem)}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    raise typer.Exit(1 if any(found.values()) else 0)


@checkpoint_app.command("diff")
def checkpoint_diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Say which tensors of two checkpoints differ, and by how much. Exit status 1 when any does."""
    from distrain.checkpoint import difference
    from distrain.run.json_files import json_safe

    found = difference(a, b)
    if as_json:
        typer.echo(json.dumps(json_safe({"identical": found.identical, **asdict(found)}), indent=2))
    else:
        for line in found.lines():
            echo(one_line(line))
    raise typer.Exit(0 if found.identical else 1)


Format = Annotated[
    str | None,
    typer.Option(help="accelerate, deepspeed, distributed, safetensors or torch.", show_default="found out"),
]
# the same command, under its earlier name
checkpoint_app.command("export", hidden=True)(cli_exporting.export)


@checkpoint_app.command("import")
def checkpoint_import(
    foreign: Annotated[
        Path,
        typer.Argument(
            metavar="FOREIGN",
            help="A folder of Accelerate, DeepSpeed, torch.distributed.checkpoint or Hugging Face, or a .pt or "
            ".safetensors file.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="A run's folder, whose training then resumes from it, or a new one."),
    ],
    step: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps done.", show_default="as it records, else 0")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="What kept the optimizer's state, such as AdamW or SGD.",
            show_default="as it records",
        ),
    ] = None,
    no_optimizer: Annotated[
        bool, typer.Option("--no-optimizer", help="Leave the optimizer's state out, which is imported without it.")
    ] = False,
    tied: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=OTHER", help="NAME is tied to OTHER: the same tensor.", show_default="as it records"
        ),
    ] = None,
    buffers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Names such as 'rope.*' are buffers, not parameters.",
            show_default="by name or dtype",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint of that step; refused without it.")
    ] = False,
    no_verify: NoVerify = False,
    format: Format = None,
    trust: Trust = False,
) -> None:
    """Turn a checkpoint that another trainer wrote into one of distrain's own, with its optimizer's state."""
    from distrain.checkpoints.export import import_checkpoint

    pairs = [pair.partition("=") for pair in tied or []]
    if bad := [name for name, sign, other in pairs if not (name and sign and other)]:
        raise UserError(f"--tied {bad[0]!r} is not NAME=OTHER")
    done = import_checkpoint(
        foreign, out, format=format, step=step, optimizer=optimizer, with_optimizer=not no_optimizer,
        tied={name: other for name, _, other in pairs}, buffers=buffers or [], trust=trust, overwrite=overwrite,
        verify=not no_verify,
    )  # fmt: skip
    optimizer_state = f", the state of {done.optimizer}" if done.optimizer else ""
    echo(f"wrote {done.path} from {done.description}")
    echo(f"  step {done.step}: {done.parameters} parameters, {done.buffers} buffers{optimizer_state}")
    print_notes(done.notes, done.skipped)


# --------------------------------------------------------------------------------------------------------------------
# Data


@data_app.command("tokenize")
def data_tokenize(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Files of text, .jsonl or .parquet (or .gz), or folders of them."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of token shards.")],
    tokenizer: Annotated[str, typer.Option(help="'bytes', or a tokenizer.json of Hugging Face tokenizers.")] = "bytes",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one shard.")] = 100_000_000,
    documents: Annotated[
        Documents, typer.Option(parser=one_of(Documents), help="What a document is in a file of text.")
    ] = Documents.file,
    field: Annotated[str, typer.Option(help="The text's field in .jsonl and .parquet.")] = "text",
    eos: Annotated[
        str | None,
        typer.Option(help="The token behind each document; 'none' for none.", show_default="the tokenizer's usual one"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Turn text into token shards that training maps into memory; they may be larger than it."""
    from distrain.datasets.tokens import tokenize_corpus

    index = tokenize_corpus(
        paths,
        out,
        tokenizer,
        shard_tokens=shard_tokens,
        documents=documents.value,
        field=field,
        eos=True if eos is None else False if eos == "none" else eos,
        workers=workers,
    )
    echo(
        f"wrote {out}: {index.tokens:,} tokens of {index.vocab_size:,} in {counted(len(index.shards), 'shard')}, "
        f"from {counted(index.documents, 'document')} of {index.bytes:,} bytes"
    )


def application(name: str = "") -> typer.Typer:
    """Return the command line with only the command or group of this name, or with all where there is none.

    Typer builds each command with all its options before it calls one, which takes 70 ms.
    """
    alone = copy.copy(app)
    alone.registered_commands = [
        each
        for each in app.registered_commands
        if name == (each.name or (each.callback and get_command_name(each.callback.__name__)))
    ]
    alone.registered_groups = [each for each in app.registered_groups if each.name == name]
    return alone if alone.registered_commands or alone.registered_groups else app


def main() -> None:
    """Run the command line; what the user can mend is printed without a traceback."""
    prepare_streams()
    show_on_terminal()
    try:
        application(*sys.argv[1:2])()
    except UserError as error:
        echo_error(error)
        sys.exit(1)
