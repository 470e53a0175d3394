"""`distrain plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from distrain.cli.options import Json, Overrides, own_process
from distrain.system.importing import importing
from distrain.system.output import echo, echo_loading, one_line

GpuName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="b200, h200, h100, a100, l40s, l4, …, cpu, or a YAML file that describes a GPU (docs/plan.md).",
        show_default="this machine's, else its CPUs",
    ),
]


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe file, or a run's folder.")],
    overrides: Overrides = None,
    gpu: GpuName = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each node.", show_default="this machine's, else 1")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe will take before it is started: memory, time, and which strategy fits."""
    echo_loading(on_terminal=True)
    own_process("plan")
    with importing():
        from distrain.launchers.preflight import gpu_count
        from distrain.plan.command import plan_recipe
        from distrain.plan.showing import plan_lines

    per_node = gpus_per_node or (gpu_count() if gpu is None else 0) or 1
    found = plan_recipe(recipe, overrides or [], gpu=gpu, nodes=nodes, per_node=per_node)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    for line in plan_lines(found):
        echo(one_line(line))
