"""Writes a foreign checkpoint as one of distrain's own, with the optimizer's state if the format has it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.checkpoints.dtypes import ITEM_SIZES
from distrain.checkpoints.export.companion_files import keep_companions
from distrain.checkpoints.export.copying import Output, write_safetensors
from distrain.checkpoints.export.opening import COUNTED, check_optimizer, open_foreign
from distrain.checkpoints.format import MANIFEST, LocalCommunicator, piece_key
from distrain.checkpoints.sources import Source
from distrain.checkpoints.writing import Saver
from distrain.run.folder import RunDir
from distrain.system.errors import UserError, some

NO_OPTIMIZER = "no optimizer (it was imported without its state)"
_KEEP_ALL = 10**9


@dataclass(frozen=True)
class Imported:
    """The checkpoint that an import wrote."""

    path: Path
    description: str
    """Of the format."""
    step: int
    parameters: int
    """Tensors that are parameters, without tied aliases."""
    buffers: int
    optimizer: str | None
    """Class of the optimizer whose state was imported; None: no state was."""
    notes: tuple[str, ...]
    """How the checkpoint was understood."""
    skipped: tuple[str, ...]
    """What was not imported."""


def import_checkpoint(
    foreign: Path | str,
    out: Path | str,
    *,
    format: str | None = None,
    step: int | None = None,
    optimizer: str | None = None,
    with_optimizer: bool = True,
    tied: Mapping[str, str] | None = None,
    buffers: Sequence[str] = (),
    trust: bool = False,
    overwrite: bool = False,
    verify: bool = True,
) -> Imported:
    """Write the foreign checkpoint as `out/checkpoints/step-…`; `out` is a run's folder, or a new one that becomes one.

    `step` is the number of optimizer steps taken, if the format does not record it; `optimizer` the class of the
    optimizer (AdamW, SGD, …), if its state does not show it; `with_optimizer=False` skips that state. `format`,
    `trust`, `tied` and `buffers` are `open_foreign`'s; `verify=False` skips the checksums that torch's archives hold.
    The checkpoint is complete or absent, and other checkpoints stay. A run whose recipe builds the same model resumes
    from it: `distrain train RECIPE --run-dir OUT`. Raises UserError.
    """
    folder, recipe = _target(Path(out))
    with open_foreign(foreign, format=format, trust=trust, tied=tied, buffers=buffers) as source:
        if not any(name.startswith("model/") for name in source.names):
            raise UserError(f"{source.path} holds no model, only the state of an optimizer")
        _drop_odd_average(source)
        if with_optimizer:
            check_optimizer(source)
        else:
            _drop_optimizer(source)
        notes = [note for note in source.notes if step is None or not note.endswith(COUNTED)]
        if step is None and source.doubt:
            raise UserError(
                f"{source.path}: {source.doubt}; expected one number of steps of the optimizer, by which a run goes on "
                "in data and schedule: give it with --step (batches, and a loop's index, may be others, and "
                "the steps that an overflow of fp16 skipped may be counted in one of them)"
            )
        done = step if step is not None else source.step
        has_optimizer = source.optimizer is not None or any(name.startswith("optimizer/") for name in source.names)
        if done is None and has_optimizer:
            raise UserError(
                f"{source.path}: it holds the optimizer's state and no number of steps, by which a run goes on in data "
                "and schedule: give it with --step, 0 to begin both anew"
            )
        if done is None:
            done = 0
            notes.append("it does not record the step, which is taken for 0; --step N sets it")
        if done < 0:
            raise UserError(f"--step {done}: expected 0 or more")
        kind = (optimizer or source.optimizer) if has_optimizer else None
        if optimizer and not has_optimizer:
            raise UserError(f"{source.path} holds no optimizer's state; remove --optimizer {optimizer}")
        if has_optimizer and kind is None:
            raise UserError(
                f"{source.path} holds an optimizer's state that does not show its class; name the class with "
                "--optimizer (AdamW, SGD, …), or skip the state with --no-optimizer"
            )
        if (folder / f"step-{done:08d}").exists() and not overwrite:
            raise UserError(f"{folder / f'step-{done:08d}'} exists already; give another --step, or --overwrite it")
        if verify:
            source.verify()
        path = _write(source, folder, done, kind, recipe)
        if source.config is not None and source.path.is_dir():
            notes += keep_companions(source.path, folder.parent)
        roles = [source.spec(name).role for name in source.names]
        return Imported(
            path, source.description, done, roles.count("parameter"), roles.count("buffer"), kind, tuple(notes),
            tuple(source.skipped),
        )  # fmt: skip


def _target(out: Path) -> tuple[Path, str]:
    """Return the folder of checkpoints, and the recipe of its run."""
    if (out / MANIFEST).exists() or out.suffix in (".safetensors", ".pt", ".pth"):
        raise UserError(
            f"{out} is not a run's folder; expected a run's folder or a new one (`distrain export` writes one file)"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a run's folder, or a folder for the checkpoint")
    run = RunDir(out)
    if not run.exists and run.holds_other_files():
        raise UserError(f"{out} holds files and is not a run; choose another folder")
    return run.checkpoints, run.recipe_path.read_text(encoding="utf-8") if run.exists else ""


def _drop_odd_average(source: Source) -> None:
    """Drop an average that is not one of the model's tensors."""
    average = [full for full in source.names if full.startswith("ema/")]
    model = {name.removeprefix("model/") for name in [*source.tensors, *source.aliases] if name.startswith("model/")}
    if not (odd := sorted(full.removeprefix("ema/") for full in average if full.removeprefix("ema/") not in model)):
        return
    for full in average:
        del source.tensors[full]
    source.aliases = {alias: name for alias, name in source.aliases.items() if name in source.tensors}
    source.skipped.append(f"the average: {some(odd)} is no tensor of the model's")


def _drop_optimizer(source: Source) -> None:
    for name in [name for name in source.names if name.startswith("optimizer/")]:
        del source.tensors[name]
    source.optimizer = None
    source.optimizer_values.clear()
    source.optimizer_groups.clear()
    source.skipped.append("the optimizer's state, as asked")


def _write(source: Source, folder: Path, step: int, optimizer: str | None, recipe: str) -> Path:
    specs = {name: source.spec(name) for name in source.names}
    nbytes = sum(spec.nbytes for spec in specs.values())
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise UserError(f"{folder}: the checkpoint has {nbytes:,} bytes, and the disk has {free:,} left")
    ordered = sorted(specs, key=lambda name: (-ITEM_SIZES[specs[name].dtype], name))
    outputs = {
        piece_key(name, 0): Output(name, source.tensors[name], specs[name].dtype)
        for name in ordered
        if specs[name].numel
    }
    scalars: dict[str, Any] = {
        "optimizer": optimizer or NO_OPTIMIZER,
        "optimizer_values": source.optimizer_values if optimizer else {},
        "optimizer_groups": source.optimizer_groups if optimizer else [],
        "optimizer_group_values": [],
        "data": None,  # a run fits its data state again
        "imported_from": source.description,
    }
    if source.config is not None:
        scalars["transformers_config"] = source.config
    saver = Saver(folder, LocalCommunicator(), keep=_KEEP_ALL, keep_best=_KEEP_ALL)
    saved = saver.save_written(
        step,
        specs,
        lambda path: write_safetensors(source, {path: outputs}, metadata=None, flat=True),
        scalars=scalars,
        aliases=source.aliases,
        recipe=recipe,
        strategy="imported",
    )
    return saved.path
