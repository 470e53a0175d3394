"""`distrain predict`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from distrain.cli.options import ChangedData, InitialWeights, one_of


class OutputKind(StrEnum):
    """What can be written for each sample."""

    predictions = "predictions"
    probabilities = "probabilities"
    logits = "logits"
    embeddings = "embeddings"
    text = "text"


def predict(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.")],
    inputs: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT", help="A file or folder as the data set reads it, or a split: train, valid, test."
        ),
    ] = None,
    *,
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            help="A .csv, .parquet or .jsonl table, a .npy or .npz array, a .png for one map, or FOLDER/ with a file "
            "for each sample.",
        ),
    ],
    output: Annotated[
        OutputKind | None,
        typer.Option(
            parser=one_of(OutputKind),
            help="What is written for each sample.",
            show_default="text where the model writes, else predictions",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The layer whose output is the embedding.", show_default="what the output layer reads"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A key of the recipe's data section, for reading the input; path=FILE is the input itself.",
            show_default="as in training",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine; the numbers are the same for any number.")
    ] = 1,
    changed_data: ChangedData = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Write the model's prediction for each sample; those that do not decode are skipped and listed."""
    from distrain.launchers import start_prediction

    raise typer.Exit(
        start_prediction(
            target,
            inputs=inputs,
            out=out,
            output=output.value if output is not None else None,
            layer=layer,
            data=data or [],
            processes=processes,
            changed_data=changed_data,
            initial_weights=initial_weights,
        )
    )
