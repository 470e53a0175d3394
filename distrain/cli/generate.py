"""`distrain generate`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.cli.options import InitialWeights, Json, own_process
from distrain.config import UserError
from distrain.system.importing import importing
from distrain.system.numbers import counted
from distrain.system.output import echo

if TYPE_CHECKING:
    from distrain.inference.generating import Prompt


def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run's folder, or one of its checkpoints.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="A text to continue (seq2seq: a source), shown as it is written.", show_default="--prompts has them"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='A line {"prompt": …} or {"messages": […]} for each prompt; results are such lines with `text`.',
            show_default="--prompt has one",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens after a prompt.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Above 0 tokens are drawn; 0 takes the likeliest one.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the likeliest tokens that together have this probability.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw only from so many of the likeliest tokens.", show_default="all")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="End before this text; may be given several times.", show_default="no such text"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="What is drawn depends on it and on the number of the prompt alone.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that are continued at a time.")] = 16,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="A .jsonl file of results.", show_default="standard output")
    ] = None,
    as_json: Json = False,
    initial_weights: InitialWeights = None,
) -> None:
    """Continue prompts with a language model, or answer sources with a seq2seq model."""
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE.jsonl")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: expected a number above 0 and at most 1")
    if temperature == 0 and (top_p < 1 or top_k is not None):
        raise UserError("--top-p and --top-k choose among tokens that are drawn; add --temperature, such as 0.8")
    if "" in (stop or []):
        raise UserError("--stop: an empty text would end each text at once")
    own_process("generate")
    with importing():
        from distrain.inference.files import LinesFile, open_predictions
        from distrain.inference.generating import Prompt, generate_texts, json_line, read_prompts
        from distrain.inference.generation import GenerationOptions
        from distrain.networks.decoding import Sampling

    def given() -> Iterator[Prompt]:
        if prompts is not None:
            yield from read_prompts(prompts)
        else:
            yield Prompt({"prompt": prompt}, 0, "the prompt")

    write = partial(generate_texts, target, given, initial_weights=initial_weights)
    options = GenerationOptions(max_new_tokens, Sampling(temperature, top_p, top_k), tuple(stop or ()), seed)
    if out is not None:
        if not out.endswith(".jsonl"):
            raise UserError(f"-o {out}: texts are written as a .jsonl file, a line for each prompt")
        file, count = open_predictions(out), 0
        assert isinstance(file, LinesFile)

        def add(record: dict[str, Any]) -> None:
            nonlocal count
            file.add_line(record)
            count += 1

        try:
            write(options, batch_size=batch, write=add)
            file.write()
        finally:
            file.discard()
        echo(f"wrote {counted(count, 'text')} to {out}")
        return
    if prompts is not None or as_json:
        write(options, batch_size=batch, write=lambda record: echo(json_line(record)))
        return

    def show(text: str) -> None:
        echo(text, end="")

    (written,) = write(options, batch_size=1, write=lambda record: None, show=show)
    echo()
    echo(f"{counted(written.tokens, 'token')}; ended by {_ENDS[written.finish]}", error=True)


_ENDS = {
    "end": "the end token",
    "stop": "a stop text",
    "length": "--max-new-tokens",
    "context": "the model's last position",
}
