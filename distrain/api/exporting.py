"""`export_model`: a trained model as a file or folder for others, whatever the format and whoever trained it.

What `distrain export` and `Run.export` do. Imports no torch; formats that need it import it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from distrain.system.errors import UserError, close_names

if TYPE_CHECKING:
    from distrain.checkpoints.export import Exported
    from distrain.checkpoints.export.model_card import UserCode

ExportFormat = Literal["safetensors", "pt", "hf", "adapter", "onnx", "pt2"]
"""What a model can be written as."""
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
_ENDINGS: dict[str, ExportFormat] = {
    ".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".onnx": "onnx", ".pt2": "pt2",
}  # fmt: skip


def export_model(
    target: Path | str,
    out: Path | str | None = None,
    *,
    format: str | None = None,
    source: str | None = None,
    dtype: str | None = None,
    shards: str | int | None = None,
    ema: bool = False,
    best: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    trust: bool = False,
    initial: str | None = None,
) -> tuple[Path, Path, Exported]:
    """Write the model of a run, of a checkpoint, or of what another trainer wrote; return (checkpoint, out, what).

    `out`: a file or a folder, which also gets what is needed to use the model; None: the folder NAME-FORMAT here.
    `format`: one of FORMATS; None: by the name of `out`, and safetensors in a folder. `source`: the format of another
    trainer; None finds it out. `initial`: where those weights are now that a checkpoint refers to. The rest are the
    options of `distrain.checkpoints.export.export`. Raises UserError for what does not go together, and with nothing
    written for all else.
    """
    from distrain.checkpoints.export import export, find_source

    target = Path(target)
    written, source = _formats(target, out, format, source)
    checkpoint, found = find_source(target, best=best, format=source)
    path = Path(out) if out is not None else Path(f"{_name(target)}-{written or 'safetensors'}")
    ending = None if path.is_dir() else _ENDINGS.get(path.suffix)
    written = written or ending or "safetensors"
    _check_name(checkpoint, path, written, ending)
    options: dict[str, Any] = {"ema": ema, "overwrite": overwrite, "verify": verify}
    weights: dict[str, Any] = {"dtype": dtype, "shards": shards}
    if found is not None:
        if written not in ("safetensors", "pt") or initial is not None:
            what = "--initial-weights" if initial is not None else f"--format {written}"
            raise UserError(
                f"{checkpoint}: {what} is for checkpoints of distrain's own, and this one is {found}; import it"
            )
        pt = written == "pt"
        return checkpoint, path, export(checkpoint, path, format=found, trust=trust, pt=pt, **weights, **options)
    if trust:
        raise UserError(
            f"{checkpoint}: --trust is for other trainers' checkpoints, and this one holds no code; remove it"
        )
    exported = _export_own(checkpoint, path, written, initial, weights, options)
    if not ema and _is_averaged(checkpoint):
        what = "these are the weights; the run was evaluated by their moving average, which --ema writes"
        exported = replace(exported, notes=(*exported.notes, what))
    return checkpoint, path, exported


def _is_averaged(checkpoint: Path) -> bool:
    from distrain.checkpoint import read_manifest

    return any(name.startswith("ema/") for name in read_manifest(checkpoint).tensors)


def _export_own(
    checkpoint: Path,
    out: Path,
    format: ExportFormat,
    initial: str | None,
    weights: dict[str, Any],
    options: dict[str, Any],
) -> Exported:
    """Write a checkpoint of distrain's own."""
    from distrain.checkpoints.export import export, is_built
    from distrain.checkpoints.export.exporting import names_folder

    if format in ("hf", "adapter", "onnx", "pt2"):
        allowed = format == "hf"
        if not allowed and (given := [f"--{name}" for name, value in weights.items() if value is not None]):
            raise UserError(f"{given[0]} is for weights alone, and --format {format} writes more; remove it")
    if format == "hf":
        _check_transformers(checkpoint)
    if format == "adapter":
        from distrain.training.restored import export_adapter  # imports torch

        return export_adapter(checkpoint, out, initial=initial, **options)
    if format in ("onnx", "pt2"):
        from distrain.inference.graphs import export_graph  # imports torch

        return export_graph(checkpoint, out, format=format, initial=initial, **options)
    code = _code_of(checkpoint) if names_folder(out) else None
    options = {"card": True, "pt": format == "pt", "code": code, **weights, **options}
    if initial is not None or is_built(checkpoint):
        from distrain.training.restored import export_checkpoint  # imports torch, which other exports do not need

        return export_checkpoint(checkpoint, out, initial=initial, **options)
    return export(checkpoint, out, **options)


def _code_of(checkpoint: Path) -> UserCode | None:
    """Return the user's code that the model of a checkpoint is of, as it is now; None where it is a library's."""
    from distrain.checkpoint import read_manifest
    from distrain.checkpoints.export.model_card import UserCode
    from distrain.fingerprints import code_files

    manifest = read_manifest(checkpoint)
    call = manifest.scalars.get("model_call") or {}
    if call.get("library") != "own":
        return None
    found = [*code_files([call["object"]])]
    then = [each[-1] for each in ((manifest.scalars.get("inputs") or {}).get("code") or {}).values()]
    return UserCode(
        {each.name: each.path for each in found},
        [each.name for each in found if each.hashes[-1] not in then],
        [each.name for each in found if each.of_distrain],
    )


def _formats(
    target: Path, out: Path | str | None, format: str | None, source: str | None
) -> tuple[ExportFormat | None, str | None]:
    """Return what is written, None where its name decides, and what another trainer wrote, None where that is found.

    A format that is only read is taken for the latter, as it was when there was one option for both.
    """
    if format is None:
        return None, source
    written: ExportFormat | None = next((each for each in FORMATS if each == format), None)
    if written == "safetensors" and source is None and out is not None and target.exists():
        from distrain.checkpoints.export import find_source

        other = _ENDINGS.get(Path(out).suffix)
        if other == "pt" and find_source(target)[1] is not None:  # read as safetensors, and written as its name says
            return None, format
    if written is not None:
        return written, source
    from distrain.config.registry import formats

    known = [entry.name for entry in formats.entries()]
    if source is None and (format in known or ":" in format):
        return None, format
    hint = close_names(format, FORMATS, f"a model is written as {', '.join(FORMATS)}")
    raise UserError(
        f"--format: no format {format!r}{hint}"
        + (f"; --from {format} says what another trainer wrote" if format in known else "")
    )


def _name(target: Path) -> str:
    """Return what a folder of this model is called where it has no name: the run, and the step of a checkpoint."""
    from distrain.checkpoints.export.companion_files import run_of
    from distrain.checkpoints.reading import is_checkpoint_name

    target = target.absolute()
    return f"{run_of(target).name}-{target.name}" if is_checkpoint_name(target.name) else target.stem


def _check_name(checkpoint: Path, out: Path, format: ExportFormat, ending: ExportFormat | None) -> None:
    """Raise UserError for a path that is not one of the format."""
    if format in ("hf", "adapter") and ending is not None:
        raise UserError(f"{out}: --format {format} writes a folder; name one")
    if ending not in (None, format):
        raise UserError(
            f"{out}: --format {format} does not write a {out.suffix} file; name one of its own, or a folder"
        )


def _check_transformers(checkpoint: Path) -> None:
    from distrain.checkpoint import read_manifest

    if not read_manifest(checkpoint).scalars.get("transformers_config"):
        raise UserError(
            f"{checkpoint}: --format hf is for models of the transformers library, which from_pretrained opens, "
            "and this is none; export it as safetensors, onnx or pt2"
        )
