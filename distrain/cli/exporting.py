"""The command `distrain export`, which `distrain.cli.main` has among its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distrain.cli.options import Averaged, Best, InitialWeights, NoVerify, Overwrite, Trust, print_notes
from distrain.system.output import echo


def export(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT|FOREIGN",
            help="A run's folder, one of its checkpoints, or what another trainer wrote.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="model.safetensors, model.pt, model.onnx or model.pt2; or a folder, which also gets what is needed to "
            "use the model.",
            show_default="the folder NAME-FORMAT here",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="safetensors|pt|hf|adapter|onnx|pt2",
            help="safetensors, pt: the weights, adapters merged into them. hf: the folder that from_pretrained opens. "
            "adapter: the adapters alone, as the folder that peft opens. onnx, pt2: the model as a graph that runs "
            "without its code.",
            show_default="by the name of -o; safetensors in a folder",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: fp32, bf16 or fp16.", show_default="as trained")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="The largest size of one file, such as 5GB.", show_default="one file of any size")
    ] = None,
    ema: Averaged = False,
    best: Best = False,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="What another trainer wrote: accelerate, deepspeed, distributed, safetensors or torch.",
            show_default="found out",
        ),
    ] = None,
    trust: Trust = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Write a trained model for others to use."""
    from distrain.api.exporting import export_model

    checkpoint, path, exported = export_model(
        target, out, format=format, source=source, dtype=dtype, shards=shards, ema=ema, best=best,
        overwrite=overwrite, verify=not no_verify, trust=trust, initial=initial_weights,
    )  # fmt: skip
    echo(f"wrote {path} from {checkpoint.name}")
    print_notes(exported.notes, exported.skipped)
