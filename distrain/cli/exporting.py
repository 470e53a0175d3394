"""The command `distrain export`, which `distrain.cli.main` has among its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distrain.cli.options import Averaged, Best, InitialWeights, Overwrite
from distrain.system.output import echo, one_line


class ExportFormat(StrEnum):
    """What a model can be written as."""

    safetensors = "safetensors"
    adapter = "adapter"


def export(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="model.safetensors, or a folder; of an adapter its folder.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="safetensors: the model, adapters merged into its weights. adapter: the adapters alone, as the folder "
            "that peft opens."
        ),
    ] = ExportFormat.safetensors,
    ema: Averaged = False,
    best: Best = False,
    overwrite: Overwrite = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Write a trained model for others to use."""
    from distrain.checkpoint import find_checkpoint
    from distrain.checkpoints import export as exports

    checkpoint = find_checkpoint(target, best=best)
    if format is ExportFormat.adapter or initial_weights is not None or exports.is_built(checkpoint):
        from distrain.training.restored import export_adapter, export_checkpoint  # imports torch

        write = export_adapter if format is ExportFormat.adapter else export_checkpoint
        exported = write(checkpoint, out, ema=ema, overwrite=overwrite, initial=initial_weights)
    else:
        exported = exports.export(checkpoint, out, ema=ema, overwrite=overwrite)
    echo(f"wrote {out} from {checkpoint.name}")
    for note in exported.notes:
        echo(f"  {one_line(note)}")
