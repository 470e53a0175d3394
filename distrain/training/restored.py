"""The model of a checkpoint, built in one process: as it trained, or whole and without adapters, to be exported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain.checkpoint import Manifest, Reader, read_manifest
from distrain.checkpoints.export import Exported, describe, export, is_built
from distrain.checkpoints.export.companion_files import CONFIG, FOLDER, run_of
from distrain.checkpoints.hiding import hidden
from distrain.checkpoints.sources import Source, Stored
from distrain.config import LoraSection, Recipe, UserError
from distrain.config.yaml import parse_recipe
from distrain.datasets.base import DataMeta
from distrain.datasets.stored_meta import meta_from_json
from distrain.fingerprints import same_file
from distrain.models import build_model
from distrain.networks.huggingface import folder_of
from distrain.networks.lora import adapted_layers, is_adapter, matching_parameters, merge_adapters
from distrain.parallel import TrainingState, load_weights
from distrain.parallel.frozen import USING, check_frozen, explaining_source, initial_weights, with_initial_weights
from distrain.parallel.nested import bytes_of
from distrain.parallel.stored import specs_of


def restored_model(reader: Reader, recipe: Recipe, meta: DataMeta, *, averaged: bool) -> nn.Module:
    """Return the recipe's model on the CPU with the weights of a checkpoint, or their average where `averaged`.

    Weights that the checkpoint refers to come from where the recipe says, and are checked. Raises UserError.
    """
    model = _as_built(reader.path, reader.manifest, recipe, meta)
    load_weights(model, reader, averaged=averaged)
    return model


def _as_built(checkpoint: Path, manifest: Manifest, recipe: Recipe, meta: DataMeta) -> nn.Module:
    frozen, kept = manifest.frozen, run_of(checkpoint) / FOLDER
    with explaining_source(frozen, checkpoint, USING):
        return build_model(
            recipe,
            meta,
            weights=frozen is not None,
            kept=kept,
            as_kept=_is_configured_anew(recipe, manifest, checkpoint, kept),
        )


def _is_configured_anew(recipe: Recipe, manifest: Manifest, checkpoint: Path, kept: Path) -> bool:
    """Whether a transformers model's folder has another config.json than at the training, and the run has `kept` that.

    Raises UserError where it has not: names and shapes of weights tell no epsilon, no activation and no base of rotary
    positions from another.
    """
    folder = folder_of(recipe.model)
    then = (manifest.scalars.get("inputs") or {}).get("model") or {}
    same = [
        (each / CONFIG).is_file() and same_file(then, f"model.path: {CONFIG}", each / CONFIG)
        for each in (Path(folder or kept), kept)
    ]
    if folder is None or same[0] or not (Path(folder) / CONFIG).is_file():
        return False
    if not same[1]:
        raise UserError(
            f"{Path(folder) / CONFIG} is not the one that {checkpoint} was trained with, so the model would compute "
            f"something else with the same weights: put that back as it was, or {USING.format(key='model.path')}"
        )
    return True


def frozen_problem(checkpoint: Path, initial: Path | str | None = None) -> str | None:
    """Return what is wrong with the weights that a checkpoint refers to; None where nothing is, or there are none."""
    manifest = read_manifest(checkpoint)
    if manifest.frozen is None:
        return None
    try:
        recipe = with_initial_weights(parse_recipe(manifest.recipe, f"the recipe in {checkpoint}"), initial)
        model = _as_built(checkpoint, manifest, recipe, meta_from_json(manifest.scalars["meta"]))
        check_frozen(model, manifest.frozen, checkpoint, USING)
    except UserError as error:
        return str(error)
    return None


def built_model(
    checkpoint: Path, *, averaged: bool, verify: bool, initial: Path | str | None, meta: DataMeta | None = None
) -> nn.Module:
    """Return the model of a checkpoint; `meta`: the facts of its data, by default those that the checkpoint has."""
    with Reader(checkpoint, verify=verify) as reader:
        manifest = reader.manifest
        recipe = with_initial_weights(parse_recipe(manifest.recipe, f"the recipe in {checkpoint}"), initial)
        if averaged and not any(name.startswith("ema/") for name in manifest.tensors):
            raise UserError(f"{checkpoint} has no moving average of the weights: train.ema was off; export without ema")
        known = meta_from_json(manifest.scalars["meta"]) if meta is None else meta
        return restored_model(reader, recipe, known, averaged=averaged)


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str,
    *,
    ema: bool = False,
    verify: bool = True,
    initial: Path | str | None = None,
    **options: Any,
) -> Exported:
    """Write the model of a checkpoint as `export` does; adapters are merged into the weights, under their names there.

    A model with adapters, or of which the checkpoint refers to frozen weights, is built first, in memory. `initial`:
    where its initial weights are now; None: where the recipe says. `options` are those of `export`. Raises UserError.
    """
    checkpoint = Path(checkpoint)
    if not is_built(checkpoint):
        if initial is not None:
            raise UserError(f"--initial-weights: {checkpoint} stores all of its weights; remove it")
        return export(checkpoint, out, ema=ema, verify=verify, **options)
    model = built_model(checkpoint, averaged=ema, verify=verify, initial=initial)
    merge_adapters(model)
    with _source_of(checkpoint, model) as source:
        return export(source, out, averaged=ema, **options)


def _source_of(checkpoint: Path, model: nn.Module) -> Source:
    """Return a model's tensors as those of a checkpoint."""
    source = describe(Source(checkpoint, "distrain"), read_manifest(checkpoint))
    state = TrainingState(model, None, None)
    held = state.held()
    for name, spec in specs_of(held).items():
        values: Any = bytes_of(held[name].values).numpy().data
        source.tensors[name] = Stored(spec, spec.dtype, (spec.numel,), (), values)
    source.aliases = state.aliases()
    return source


# --------------------------------------------------------------------------------------------------------------------
# As a folder of peft

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def export_adapter(
    checkpoint: Path | str,
    out: Path | str,
    *,
    ema: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    initial: Path | str | None = None,
) -> Exported:
    """Write a checkpoint's adapters as the folder that `peft.PeftModel.from_pretrained(base, folder)` opens.

    It has `adapter_model.safetensors` and `adapter_config.json`. Raises UserError: there are no adapters, peft is not
    installed, the folder exists (unless `overwrite`).
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("an adapter is written by peft, which is not installed: pip install 'distrain[lora]'") from None
    from safetensors.torch import save_file

    checkpoint, out = Path(checkpoint), Path(out)
    recipe = parse_recipe(read_manifest(checkpoint).recipe, f"the recipe in {checkpoint}")
    if (section := recipe.model.lora) is None:
        raise UserError(f"{checkpoint} has no adapters: its recipe has no model.lora; export it as a model")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and overwrite)):
        raise UserError(f"{out} exists already; choose another name, or --overwrite it")
    model = built_model(checkpoint, averaged=ema, verify=verify, initial=initial)
    modules = _trained_modules(model, section)
    tensors = {
        f"base_model.model.{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if is_adapter(name) or name.rpartition(".")[0] in modules
    }
    path = initial_weights(with_initial_weights(recipe, initial))[1]
    kind = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    layers = adapted_layers(model)
    config = LoraConfig(
        # with the task of a classifier peft would expect a head in the file
        task_type=kind if modules or kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None,
        base_model_name_or_path=None if path is None else str(Path(path).absolute()),
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type] # a number of any kind
        lora_dropout=section.dropout,
        target_modules=_targets([*layers], [name for name, _ in model.named_modules()]),
        modules_to_save=modules or None,
        fan_in_fan_out=all(type(layer).__name__ == "LoraConv1D" for layer in layers.values()),
        inference_mode=True,
    )
    folder = out.with_name(hidden("tmp", out.name))
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        put_in_place(folder, out)
    except OSError as error:
        raise UserError(f"{out}: the adapter cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Exported(tuple(sorted(out.iterdir())), nbytes, len(tensors))


def put_in_place(folder: Path, out: Path) -> None:
    """Make a folder that is complete `out`, or put its files there."""
    if not out.exists():
        folder.rename(out)
        return
    for file in folder.iterdir():
        file.replace(out / file.name)


def _targets(layers: list[str], modules: list[str]) -> list[str] | str:
    """Return what has peft choose exactly these layers: their names, or a pattern where a name ends another's."""
    # peft takes a name for that of each module which ends with it
    chosen = {name for name in modules for layer in layers if name == layer or name.endswith(f".{layer}")}
    return layers if chosen == set(layers) else "|".join(map(re.escape, layers))


def _trained_modules(model: nn.Module, section: LoraSection) -> list[str]:
    """Return the modules whose parameters are trained as a whole, and those with buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(parameters[name]) for pattern in section.train for name in matching_parameters(model, pattern)}
    # of a tied one, each module that has it: peft would train a copy of the one
    names = [name for name, parameter in parameters.items() if id(parameter) in trained]
    modules = sorted({name.rpartition(".")[0] for name in names if not is_adapter(name)})
    if "" in modules:
        raise UserError(
            "model.lora.train names a parameter of the model itself, which is in none of its modules, and an adapter's "
            "folder holds whole modules; export the merged model"
        )
    return sorted({*modules, *_with_state(model)})


def _with_state(model: nn.Module) -> set[str]:
    """Return the layers with buffers of their own, such as batch norms: training changes them, frozen or not."""
    layers = adapted_layers(model)
    return {
        name
        for name, module in model.named_modules()
        if name
        and name not in layers
        and not [*module.children()]
        and module._buffers.keys() - module._non_persistent_buffers_set
    }
