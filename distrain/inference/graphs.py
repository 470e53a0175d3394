"""A trained model as a graph that runs without its code: ONNX, or a `.pt2` of `torch.export`.

It is traced in eval mode on the CPU with samples of the run's own data. What was written is opened again, and has to
compute what the model computes, for batches of other sizes too, before it is put in its place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distrain.checkpoints.export import Exported
from distrain.checkpoints.export.companion_files import FOLDER, companions_of, run_of
from distrain.checkpoints.export.exporting import names_folder
from distrain.checkpoints.export.model_card import Graph, card_files
from distrain.checkpoints.export.text_files import companions_as_trained
from distrain.checkpoints.format import Manifest
from distrain.checkpoints.hiding import hidden
from distrain.checkpoints.reading import read_manifest
from distrain.config import UserError
from distrain.config.yaml import parse_recipe
from distrain.data import build_data, build_transform
from distrain.datasets.base import Data, is_stream
from distrain.datasets.evaluation import build_eval_loader
from distrain.datasets.transforms import finished
from distrain.networks.calling import calling_convention
from distrain.networks.lora import merge_adapters
from distrain.parallel.frozen import with_initial_weights
from distrain.system.numbers import a_kind
from distrain.system.output import error_line
from distrain.training.restored import built_model, put_in_place

GraphFormat = Literal["onnx", "pt2"]

_TOLERANCE = {torch.float64: 1e-9}
_USUAL = 1e-4
"""Of a difference, as a share of the largest output."""
_IN_ONE_FILE = 1 << 30
"""Bytes of weights up to which ONNX keeps them in the graph's own file; its format ends at 2 GiB."""
_MOST_SAMPLES, _MOST_TOKENS = 256, 4096
"""At sizes up to these it is tried whether the model computes something else beyond a condition of the graph."""
_CUT = 4
"""Tokens of an input from which shorter ones are tried too."""


class _Called(nn.Module):
    """The model, called with tensors one after the other as a batch's inputs hold them."""

    def __init__(self, model: nn.Module, rebuild: Callable[[Sequence[Tensor]], Any]):
        super().__init__()
        self.model = model
        self._rebuild, self._convention = rebuild, calling_convention(model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = self._convention(self.model, self._rebuild(tensors))
        return (output.logits, *output.others)


def export_graph(
    checkpoint: Path | str,
    out: Path | str,
    *,
    format: GraphFormat,
    ema: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    initial: Path | str | None = None,
) -> Exported:
    """Write the model of a checkpoint as a graph, to a file or to a folder, which gets what `model_card` writes too.

    The number of samples in a batch may vary, and the number of tokens where the model allows it. `ema`, `verify`,
    `overwrite` and `initial` are those of `export_checkpoint`. Raises UserError: the data are not there, the model
    cannot be traced, what was written computes something else; then nothing is left.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    _check_installed(format)
    file = _file_of(out, format, overwrite)
    manifest = read_manifest(checkpoint)
    data, batch = _samples(checkpoint, manifest, initial)
    model = built_model(checkpoint, averaged=ema, verify=verify, initial=initial, meta=data.meta)
    merge_adapters(model)
    inputs = batch["inputs"]
    if data.packed and isinstance(inputs, dict):
        inputs = {name: each for name, each in inputs.items() if name != "position_ids"}  # one document in each row
    named = dict(_named(inputs, "inputs"))
    called = _Called(model, lambda tensors: _rebuilt(inputs, iter(tensors))).eval()
    tensors = [each[:2].contiguous() for each in named.values()]
    growing = [data.meta.vocab_size is not None and _holds_tokens(each) for each in tensors]
    program, free, most, notes = _traced(called, tensors, growing, [*named])
    program.example_inputs = None  # they would be pickled
    with torch.no_grad():
        expected = called(*tensors)
    graph = _described(file.name, named, free, most, len(expected))
    into_folder = names_folder(out)
    parent = file.parent if not into_folder else out.parent
    part = parent / hidden("tmp", out.name)
    try:
        part.mkdir(parents=True)
        run = _write(program, part / file.name, graph)
        _compare(called, run, list(named.values()), free, file)
        if into_folder:
            notes += _write_beside(checkpoint, manifest, part, graph, averaged=ema)
        written = sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file())
        clash = [each for each in written if (file.parent / each).exists()]
        if clash and not overwrite:
            raise UserError(f"{file.parent / clash[0]} exists already; choose another name, or --overwrite it")
        put_in_place(part, file.parent)
    except OSError as error:
        raise UserError(f"{out}: the model cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    nbytes = sum(each.nbytes for each in model.state_dict().values())
    return Exported(tuple(file.parent / each for each in written), nbytes, len(model.state_dict()), tuple(notes))


def _check_installed(format: GraphFormat) -> None:
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"ONNX files are written by {', '.join(needed)}, and {missing[0]} is not installed: "
            "pip install 'distrain[onnx]'; --format pt2 needs none of them"
        )


def _file_of(out: Path, format: GraphFormat, overwrite: bool) -> Path:
    if not names_folder(out) and out.suffix != f".{format}":
        raise UserError(
            f"{out}: --format {format} writes a .{format} file, or a folder that has one; name one of these"
        )
    file = out / f"model.{format}" if names_folder(out) else out
    if file.is_symlink() or out.is_symlink():
        raise UserError(f"{out} is a symbolic link, and is not written over; remove it or choose another name")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists already; choose another name, or --overwrite it")
    return file


# --------------------------------------------------------------------------------------------------------------------
# Samples of the run's own data


def _samples(checkpoint: Path, manifest: Manifest, initial: Path | str | None) -> tuple[Data, dict[str, Any]]:
    """Return the run's data and a batch of three samples, as the model gets them in an evaluation."""
    recipe = with_initial_weights(parse_recipe(manifest.recipe, f"the recipe in {checkpoint}"), initial)
    try:
        data = build_data(recipe, state=manifest.scalars["data"])
    except UserError as error:
        raise UserError(
            f"{error}\nThe model is traced with samples of its data; put the data where they were"
        ) from error
    split = next(name for name in ("valid", "test", *data.splits) if name in data.splits)
    source = data.splits[split]
    loader = build_eval_loader(
        source,
        rank=0,
        world_size=1,
        batch_size=3,
        transform=build_transform(recipe, "eval"),
        split=split,
        skip_corrupt=0 if is_stream(source) else len(source),
    )
    batch = finished(next(iter(loader)))
    rows = torch.arange(3) % len(batch["ids"])  # a split may have fewer samples
    return data, {"inputs": _taken(batch["inputs"], rows)}


def _taken(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _taken(each, rows) for name, each in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_taken(each, rows) for each in inputs)
    if not isinstance(inputs, Tensor):
        raise UserError(f"the inputs of a batch hold {a_kind(inputs)}, and a graph takes tensors alone")
    return inputs[rows]


def _named(inputs: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch's inputs with a name for each."""
    if isinstance(inputs, Tensor):
        yield name, inputs
        return
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    for key, each in items:
        inner = str(key) if name == "inputs" and isinstance(inputs, Mapping) else f"{name}_{key}"
        yield from _named(each, inner)


def _rebuilt(inputs: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the inputs of a batch with other tensors in them."""
    if isinstance(inputs, Mapping):
        return {name: _rebuilt(each, tensors) for name, each in inputs.items()}
    return tuple(_rebuilt(each, tensors) for each in inputs) if isinstance(inputs, tuple) else next(tensors)


def _holds_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point() and tensor.shape[1] >= _CUT


# --------------------------------------------------------------------------------------------------------------------
# The graph


_SIZE = r"L\['\w+'\]\[(\d+)\]\.size\(\)\[(\d+)\]"
"""A size of an input, as conditions of a graph call it."""


class _OtherSizesError(Exception):
    """The model computes otherwise for other sizes than those that it was traced with."""


def _traced(
    called: _Called, tensors: list[Tensor], growing: list[bool], names: Sequence[str]
) -> tuple[ExportedProgram, list[bool], dict[str, int], list[str]]:
    """Return the graph, which of its inputs may have any number of tokens, the most of them by name, and notes."""
    failure: Exception | None = None
    for free in [growing, [False] * len(tensors)] if any(growing) else [growing]:
        shapes = tuple({0: Dim.DYNAMIC} | ({1: Dim.DYNAMIC} if grows else {}) for grows in free)
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(called, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
                most = _most_tokens(program, called, tensors, free, names)
        except Exception as error:  # whatever tracing somebody else's code raises
            failure = failure or error
            continue
        fixed = f"the graph takes texts of {tensors[0].shape[1]} tokens alone: {_reason(failure)}" if failure else None
        return program, free, most, [] if fixed is None else [fixed]
    assert failure is not None
    raise UserError(
        f"{type(called.model).__name__} cannot be traced as a graph: {_reason(failure)}. torch.export needs a forward "
        "that computes with tensors alone, without a choice that depends on their values or on the number of samples "
        "(x.shape[0] may be any, len(x) is a constant); change it there, or export the weights (--format safetensors)"
    ) from failure


def _most_tokens(
    program: ExportedProgram, called: _Called, tensors: Sequence[Tensor], free: Sequence[bool], names: Sequence[str]
) -> dict[str, int]:
    """Return how many tokens an input may have, where the model itself takes no more.

    A graph holds one of the ways between which a forward can choose by sizes, and ONNX keeps no conditions: it would go
    that way for all. Raises _OtherSizesError where the model computes something else for sizes that meet none.
    """
    most: dict[str, int] = {}
    for guard in getattr(program, "_guards_code", None) or ():
        if re.fullmatch(f"{_SIZE} == {_SIZE}", guard):  # inputs of one batch
            continue
        sizes = re.findall(_SIZE, guard)
        numbers = {int(each) for each in re.findall(r"\d+", re.sub(_SIZE, "", guard))}
        near = sorted({number + step for number in numbers for step in (-1, 0, 1)})
        batches = [(each, None) for each in near if 0 < each <= _MOST_SAMPLES and any(dim == "0" for _, dim in sizes)]
        texts = [(1, each) for each in near if 0 < each <= _MOST_TOKENS and any(dim == "1" for _, dim in sizes)]
        if not all(_holds(program, called, _resized(tensors, free, *each)) for each in [*batches, *texts]):
            shown = re.sub(_SIZE, lambda found: f"{names[int(found[1])]}.shape[{found[2]}]", guard)
            raise _OtherSizesError(f"its forward chooses by sizes, and was traced where {shown}")
        bound = re.fullmatch(rf"{_SIZE} <= (\d+)", guard)
        if bound is not None and bound[2] == "1":
            most[names[int(bound[1])]] = int(bound[3])
    return most


def _resized(tensors: Sequence[Tensor], free: Sequence[bool], samples: int, tokens: int | None) -> list[Tensor]:
    """Return inputs of so many samples, and of so many tokens where their number is free."""
    found = []
    for each, grows in zip(tensors, free, strict=True):
        count = tokens if grows and tokens is not None else None
        repeats = [
            -(-samples // len(each)),
            *(1 if count is None else -(-count // each.shape[1]) for _ in range(grows)),
        ]
        more = each.repeat(*repeats, *[1] * (each.ndim - len(repeats)))[:samples]
        found.append((more if count is None else more[:, :count]).contiguous())
    return found


def _holds(program: ExportedProgram, called: _Called, tensors: list[Tensor]) -> bool:
    """Whether the graph, whatever its conditions, computes what the model does; also where that raises an error."""
    try:
        expected = called(*tensors)
    except Exception:  # whatever somebody else's code raises
        return True
    try:
        found = program.module(check_guards=False)(*tensors)
    except Exception:
        return False
    return all(_difference(mine, theirs) is None for mine, theirs in zip(expected, found, strict=True))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip() and "TORCH_LOGS" not in line]
    if isinstance(error, _OtherSizesError):
        return text
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:400].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say about themselves off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "torch.fx")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    printed = io.StringIO()  # of a graph that torch gives up, it prints the whole
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _described(
    file: str, named: Mapping[str, Tensor], free: Sequence[bool], most: Mapping[str, int], outputs: int
) -> Graph:
    inputs = [
        {
            "name": name,
            "dtype": str(each.dtype).removeprefix("torch."),
            "shape": ["batch", *([f"{name}_tokens"] if grows else each.shape[1:])],
        }
        | ({"most_tokens": most[name]} if name in most else {})
        for (name, each), grows in zip(named.items(), free, strict=True)
    ]
    return Graph(file, inputs, ["logits", *(f"output_{number}" for number in range(1, outputs))])


def _write(program: ExportedProgram, path: Path, graph: Graph) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Write the graph, and return what computes with the file."""
    if path.suffix == ".pt2":
        try:
            with _quiet():
                torch.export.save(program, path)
                module = torch.export.load(path).module()
        except OSError:
            raise
        except Exception as error:  # such as an operation of transformers 4 for which torch 2.11 has no form in a file
            raise UserError(
                f"torch {torch.__version__} cannot write the graph of the model: {_reason(error)}. Take newer versions "
                "of torch and of the model's library, --format onnx, or the weights (--format safetensors)"
            ) from error
        return lambda tensors: module(*tensors)
    nbytes = sum(each.nbytes for each in program.state_dict.values())
    names = [each["name"] for each in graph.inputs]
    try:
        with _quiet():
            torch.onnx.export(
                program,
                (),
                path,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=[*graph.outputs],
                external_data=nbytes > _IN_ONE_FILE,
            )
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"the model cannot be written as ONNX: {_reason(error)}. An operation or a dtype of it has no form there; "
            "--format pt2 has all of PyTorch's"
        ) from error
    known = {each.name for each in session.get_inputs()}  # one that the model does not use is left out

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        feeds = {name: each.numpy() for name, each in zip(names, tensors, strict=True) if name in known}
        return [torch.from_numpy(np.asarray(each)) for each in session.run(None, feeds)]

    return run


def _compare(
    called: _Called,
    run: Callable[[list[Tensor]], Sequence[Tensor]],
    tensors: list[Tensor],
    free: Sequence[bool],
    file: Path,
) -> None:
    """Raise UserError unless the file computes what the model does, for one to three samples and fewer tokens."""
    for count in (2, 1, 3):
        short = any(free) and count != 2
        batch = [
            (each[:count, : max(2, each.shape[1] // 2)] if short and grows else each[:count]).contiguous()
            for each, grows in zip(tensors, free, strict=True)
        ]
        with torch.no_grad():
            expected = called(*batch)
        try:
            with torch.no_grad():
                found = run(batch)
        except Exception as error:
            raise UserError(
                f"{file.name} fails on {count} samples where the model does not: {error_line(error)[:400]}. The model "
                "was traced with 2 samples; its forward must not depend on their number"
            ) from error
        for mine, theirs in zip(expected, found, strict=True):
            _check_equal(mine, theirs, count, file)


def _difference(expected: Tensor, found: Tensor) -> str | None:
    """Return how two outputs differ by more than rounding; None: they do not."""
    if expected.shape != found.shape:
        return f"the shape {tuple(found.shape)}, and the model {tuple(expected.shape)}"
    tolerance = _TOLERANCE.get(expected.dtype, _USUAL)
    mine, theirs = expected.double(), found.double()
    scale = max(1.0, float(mine[mine.isfinite()].abs().max())) if mine.isfinite().any() else 1.0
    if torch.allclose(theirs, mine, rtol=0, atol=tolerance * scale, equal_nan=True):
        return None
    difference = float((mine - theirs).abs().nan_to_num(nan=float("inf")).max())
    return f"outputs differ by up to {difference:.3g}, and {tolerance * scale:.3g} is allowed"


def _check_equal(expected: Tensor, found: Tensor, count: int, file: Path) -> None:
    difference = _difference(expected, found)
    if expected.shape != found.shape:
        raise UserError(
            f"{file.name} gives for {count} samples {difference}; its forward must not depend on the number of samples"
        )
    if difference is not None:
        raise UserError(
            f"{file.name} computes something else than the model for {count} samples: {difference}. Does its forward "
            "draw at random, or keep something between calls? Export the weights instead (--format safetensors)"
        )


def _write_beside(checkpoint: Path, manifest: Manifest, part: Path, graph: Graph, *, averaged: bool) -> list[str]:
    """Write what a folder has beside the graph; return notes for the user."""
    kept = companions_of(run_of(checkpoint) / FOLDER)[0]
    with tempfile.TemporaryDirectory(prefix="distrain-") as scratch:
        companions, notes = companions_as_trained(kept, manifest, Path(scratch))
        for name, file in companions.items():
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, part / name)
    texts = card_files(checkpoint, manifest, averaged=averaged, companions=companions, graph=graph)
    for name, text in texts.items():
        (part / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    if isinstance(config := manifest.scalars.get("transformers_config"), str):
        (part / "config.json").write_text(config.rstrip() + "\n", encoding="utf-8")
    return notes
