"""The command `distrain export`, which `distrain.cli.main` has among its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.cli.options import Averaged, Best, InitialWeights, Overwrite
from distrain.system.errors import UserError
from distrain.system.output import echo, one_line

if TYPE_CHECKING:
    from distrain.checkpoints.export import Exported


class ExportFormat(StrEnum):
    """What a model can be written as."""

    safetensors = "safetensors"
    pt = "pt"
    hf = "hf"
    adapter = "adapter"
    onnx = "onnx"
    pt2 = "pt2"


_ENDINGS = {
    ".safetensors": ExportFormat.safetensors,
    ".pt": ExportFormat.pt,
    ".pth": ExportFormat.pt,
    ".onnx": ExportFormat.onnx,
    ".pt2": ExportFormat.pt2,
}


def own_format(name: str | None) -> ExportFormat | None:
    """Return the format of this name that is written and never read, if there is one."""
    return ExportFormat(name) if name in {each.value for each in ExportFormat} - {"safetensors"} else None


def export(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.")
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="A file, or a folder, which also gets what is needed to use the model."),
    ],
    format: Annotated[
        ExportFormat | None,
        typer.Option(
            help="safetensors, pt: the weights, adapters merged into them. hf: the folder that from_pretrained opens. "
            "adapter: the adapters alone, as the folder that peft opens. onnx, pt2: the model as a graph that runs "
            "without its code.",
            show_default="by the name of -o; safetensors in a folder",
        ),
    ] = None,
    ema: Averaged = False,
    best: Best = False,
    overwrite: Overwrite = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Write a trained model for others to use."""
    from distrain.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(target, best=best)
    _say(checkpoint, out, write(checkpoint, out, format, ema=ema, overwrite=overwrite, initial=initial_weights))


def write(
    checkpoint: Path,
    out: Path,
    format: ExportFormat | None,
    *,
    initial: str | None = None,
    verify: bool = True,
    **options: Any,
) -> Exported:
    """Write a checkpoint of distrain's own in a format (None: by the name of `out`); raises UserError.

    `initial`: where its initial weights are now. Of `options`, graphs and adapters take `ema` and `overwrite` alone.
    """
    from distrain.checkpoints import export as exports

    ending = None if out.is_dir() else _ENDINGS.get(out.suffix)
    format = format or ending or ExportFormat.safetensors
    _check_name(checkpoint, out, format, ending)
    if format in (ExportFormat.onnx, ExportFormat.pt2, ExportFormat.adapter):
        if given := [f"--{name}" for name in ("dtype", "shards") if options.pop(name, None) is not None]:
            raise UserError(f"{given[0]} is for weights alone, and --format {format} writes more; remove it")
        if options.pop("trust", False):
            raise UserError(
                f"{checkpoint}: --trust is for other trainers' checkpoints, and this one holds no code; remove it"
            )
        if format is ExportFormat.adapter:
            from distrain.training.restored import export_adapter  # imports torch

            return export_adapter(checkpoint, out, initial=initial, verify=verify, **options)
        from distrain.inference.graphs import GraphFormat, export_graph  # imports torch

        kind: GraphFormat = "onnx" if format is ExportFormat.onnx else "pt2"
        return export_graph(checkpoint, out, format=kind, initial=initial, verify=verify, **options)
    if initial is not None or exports.is_built(checkpoint):
        from distrain.training.restored import export_checkpoint  # imports torch, which other exports do not need

        return export_checkpoint(checkpoint, out, initial=initial, verify=verify, card=True, **options)
    return exports.export(checkpoint, out, verify=verify, card=True, **options)


def _check_name(checkpoint: Path, out: Path, format: ExportFormat, ending: ExportFormat | None) -> None:
    """Raise UserError for a path that is not one of the format."""
    if format is ExportFormat.pt and ending is not format:
        raise UserError(f"{out}: --format pt writes one file; name a .pt file")
    if format in (ExportFormat.hf, ExportFormat.adapter) and ending is not None:
        raise UserError(f"{out}: --format {format} writes a folder; name one")
    if ending not in (None, format):
        raise UserError(
            f"{out}: --format {format} does not write a {out.suffix} file; name one of its own, or a folder"
        )
    if format is ExportFormat.hf:
        from distrain.checkpoint import read_manifest

        if not read_manifest(checkpoint).scalars.get("transformers_config"):
            raise UserError(
                f"{checkpoint}: --format hf is for models of the transformers library, which from_pretrained opens, "
                "and this is none; export it as safetensors, onnx or pt2"
            )


def _say(checkpoint: Path, out: Path, exported: Exported) -> None:
    echo(f"wrote {out} from {checkpoint.name}")
    for note in exported.notes:
        echo(f"  {one_line(note)}")
