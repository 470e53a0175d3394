"""Models of the transformers library: `transformers:CLASS`. Nothing is ever downloaded.

model: {name: transformers:AutoModelForCausalLM, config: {model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 2}}
model: {name: transformers:AutoModelForSequenceClassification, path: folders/bert}
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distrain.checkpoints.export.companion_files import CONFIG
from distrain.config import ModelSection, UserError, close_names
from distrain.networks.meta_device import is_building_on_meta
from distrain.networks.weights import stored_tensors, tied_names
from distrain.system.bounded_json import SUMMARY
from distrain.system.errors import some

PREFIX = "transformers:"

_FACTS = {"num_labels": "num_labels", "pad_token_id": "pad_id", "bos_token_id": "bos_id", "eos_token_id": "eos_id"}
_PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
    "binary": None,
}
"""Which probabilities a pipeline of transformers makes of logits; without one, a softmax, or of one logit a sigmoid."""


def folder_of(section: ModelSection) -> str | None:
    """Return the folder that a model of transformers starts from; None for others, and for one that is built anew."""
    return section.args.get("path") if section.name.startswith(PREFIX) else None


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is one of transformers; does not import it."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def transformers_config(model: nn.Module) -> str | None:
    """Return the text of the config.json that `save_pretrained` writes; None for other models than transformers'."""
    if not is_transformers(model):
        return None
    # the model's own class, not one that a strategy made of it
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return json.dumps(content | {"architectures": [own.__name__]}, indent=2)


def check_transformers(name: str, args: Mapping[str, Any]) -> list[str]:
    """Return the problems of the name and arguments of a transformers model."""
    try:
        kind = _class(name)
    except UserError as error:
        return [str(error)]
    problems = [
        f"model.{key}: {name} takes no such argument{close_names(key, ('config', 'path'), 'it takes config or path')}"
        for key in args
        if key not in ("config", "path")
    ]
    if ("config" in args) == ("path" in args):
        problems.append(
            f"model: {name} takes either `config`, a mapping such as {{model_type: gpt2, n_layer: 2}}, or `path`, a "
            f"local folder that save_pretrained wrote; found {'both' if 'config' in args else 'neither'}"
        )
    elif "config" in args:
        problems += _config_problems(kind, args["config"])
    return problems


def build_transformers(
    name: str,
    args: Mapping[str, Any],
    known: Mapping[str, Any],
    *,
    base: Path,
    weights: bool,
    kept: Path | None = None,
    as_kept: bool = False,
) -> nn.Module:
    """Return the model: with `config` freshly initialised, with `path` and `weights` as it was saved there.

    `known`: the facts (`networks/facts.py`) for open values of the configuration: the vocabulary, the number of labels,
    and the ids of special tokens; and the `task`. `kept`: a folder with a config.json to use `as_kept`, or if that of
    `path` is gone and the weights come from elsewhere.
    """
    problems = check_transformers(name, args)
    if problems:
        raise UserError("\n".join(problems))
    kind = _class(name)
    if "path" in args:
        folder = configured = base / args["path"]
        if kept is not None and (as_kept or not (weights or (folder / CONFIG).is_file())) and (kept / CONFIG).is_file():
            configured = kept
        return _from_folder(kind, name, folder if weights else configured, configured, known, weights)
    given = dict(args["config"])
    config_class = _config_class(kind, given.pop("model_type", None))
    facts = {key: known[fact] for key, fact in _FACTS.items() if fact in known}
    padding, asked = facts.get("pad_token_id"), given.get("pad_token_id")
    if None not in (padding, asked) and asked != padding:
        raise UserError(
            f"model.config.pad_token_id is {asked}, and the data are padded with {padding}, which the "
            "model would read as a token; remove it"
        )
    # a default padding id of the class would hide real tokens of data that have none
    facts.setdefault("pad_token_id", None)
    vocabularies = [known[key] for key in ("vocab_size", "target_vocab_size") if key in known]
    if vocabularies:
        facts["vocab_size"] = max(vocabularies)
    try:
        config = config_class(**(facts | given))
        for key in ("bos_token_id", "eos_token_id"):
            token = getattr(config, key, None)
            if vocabularies and key not in given and isinstance(token, int) and token >= max(vocabularies):
                setattr(config, key, None)  # the default of another vocabulary
        _describe_outputs(config, name, known, given)
        with _as_single_process():
            model = _fresh(kind, config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"model.config: {name} cannot be built from {dict(args['config'])}: {error}") from error
    return model.float()


def _from_folder(
    kind: Any, name: str, folder: Path, configured: Path, known: Mapping[str, Any], weights: bool
) -> nn.Module:
    """Return the model of a folder, by the config.json of `configured`."""
    import transformers

    if not (folder / CONFIG).is_file():
        raise UserError(
            f"model.path: there is no config.json in {folder}; expected a folder that save_pretrained wrote"
        )
    for file in folder.glob("*.json"):
        if (nbytes := file.stat().st_size) > SUMMARY:  # what follows reads them whole
            raise UserError(f"model.path: {file} has {nbytes:,} bytes, and at most {SUMMARY:,} are expected")
    try:
        config = transformers.AutoConfig.from_pretrained(configured, local_files_only=True)
        for key, fact in _FACTS.items():
            # a language model's labels are tokens
            if fact in known and not (key == "num_labels" and ("LM" in name or "Generation" in name)):
                setattr(config, key, known[fact])
        _describe_outputs(config, name, known)
        with _as_single_process():
            if weights:
                # the config's dtype may be narrower than the file's
                model, found = kind.from_pretrained(
                    folder, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
            else:
                model, found = _fresh(kind, config), {}
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"model.path: {name} cannot be opened from {folder}: {error}") from error
    if found and not {name for name, _ in model.named_parameters()} - {*found["missing_keys"]}:
        raise UserError(
            f"model.path: no tensor in {folder} is one of {name}: found {some(sorted(found['unexpected_keys']))}, "
            f"expected {some(sorted(found['missing_keys']))}; give the file to model.weights, which removes prefixes"
        )
    # without their values, on the meta device, equal ones are not tied either
    if found and not is_building_on_meta() and (other := _other_than_tied(model, _ties(model, kind, config), folder)):
        raise UserError(
            f"model.path: {folder / CONFIG} ties {other} to another tensor, and the weights there differ: the model "
            "could not be built again; save it with one weight for both, or, where it is the output, write "
            "tie_word_embeddings: false there"
        )
    size = getattr(config.get_text_config(), "vocab_size", None)
    needed = known.get("vocab_size")
    if size is not None and needed is not None and needed > size:
        raise UserError(
            f"model.path: the model in {folder} knows {size} tokens and the data have {needed}; tokenize the data with "
            "the model's own tokenizer"
        )
    return model.float()


def _ties(model: nn.Module, kind: Any, config: Any) -> dict[str, str]:
    """Return alias -> name of the tensors that are one in a model that is built by the configuration."""
    try:
        with _as_single_process(), torch.device("meta"):
            return tied_names(_fresh(kind, config))
    except Exception:  # some models look at values as they are built, or give them: those that are loaded are known
        return tied_names(model)


def _other_than_tied(model: nn.Module, ties: Mapping[str, str], folder: Path) -> str | None:
    """Return a tensor of the folder that differs from the one that it is tied to; None: there is none.

    Transformers leaves such tensors apart, and before version 5 takes one of them for both.
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))
    }  # fmt: skip
    for alias, name in ties.items():
        if tensors.get(alias) is not tensors.get(name):
            return alias
    try:
        stored = stored_tensors(folder)[0] if ties else {}
    except UserError:  # a form that transformers alone reads
        return None
    both = {alias: name for alias, name in ties.items() if {alias, name} <= stored.keys()}
    return next((alias for alias, name in both.items() if not stored[alias].equals(stored[name])), None)


def _fresh(kind: Any, config: Any) -> Any:
    """Return a model with initial weights, in fp32 whatever dtype the configuration names."""
    return kind.from_config(config, dtype=torch.float32) if hasattr(kind, "from_config") else kind(config)


def _describe_outputs(config: Any, name: str, known: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Have a configuration know the names of the data's classes, where it has an output for each, and the task."""
    names, task, outputs = known.get("class_names") or (), known.get("task"), getattr(config, "num_labels", None)
    if task == "binary":
        names = names[-outputs:] if outputs in (1, 2) else ()  # one output is of the positive class
    elif known.get("num_labels") != outputs:
        names = ()
    if names and len(names) == outputs:
        config.id2label = dict(enumerate(names))
        config.label2id = {label: number for number, label in enumerate(names)}
    if "Classification" in name and "Token" not in name and task in _PROBLEMS and "problem_type" not in given:
        config.problem_type = _PROBLEMS[task]


def generate(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    pad_id: int,
    bos_id: int | None,
    starts: bool,
    eos_id: int | None = None,
    **options: Any,
) -> Tensor:
    """Return what a transformers model takes for the likeliest after `tokens` (batch, seq), where `mask` is not 0.

    `starts`: of a model of pairs, whose targets begin with `bos_id`, which is then first in each row. A row ends with
    `eos_id` and is padded with `pad_id`. `options` are those of `generate` of transformers.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        decoder_start_token_id=bos_id if starts else None,
    )
    # what the model's own settings ask for besides (penalties, beams, another first token) is not what was trained
    kept, model.generation_config = model.generation_config, settings
    try:
        with torch.no_grad():
            found: Tensor = model.generate(tokens, attention_mask=mask, generation_config=settings, **options)
    finally:
        model.generation_config = kept
    return found


@contextmanager
def _as_single_process() -> Iterator[None]:
    """Make transformers build as in a single process.

    Under ZeRO-3 it would shard each layer as it is made, with other initial weights. If Accelerate loads for FSDP on
    the first rank only, the others would have an empty model. If parameters go to the meta device as they are loaded,
    its threads would hold many of them at once.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    variables = {name: os.environ.pop(name, None) for name in (_FIRST_RANK_ONLY, _NO_THREADS)}
    deepspeed.unset_hf_deepspeed_config()
    if is_building_on_meta():
        os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
        os.environ.pop(_NO_THREADS, None)
        os.environ.update({name: value for name, value in variables.items() if value is not None})


_FIRST_RANK_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def _class(name: str) -> Any:
    import transformers

    bare = name.removeprefix(PREFIX)
    kind = getattr(transformers, bare, None)
    if not (isinstance(kind, type) and (hasattr(kind, "from_config") or hasattr(kind, "from_pretrained"))):
        choices = [other for other in dir(transformers) if "For" in other or other.startswith("AutoModel")]
        raise UserError(f"model.name: transformers has no model {bare!r}{close_names(bare, choices)}")
    return kind


def _config_class(kind: Any, model_type: Any) -> Any:
    from transformers import CONFIG_MAPPING

    if not hasattr(kind, "from_config"):
        return kind.config_class
    if model_type not in CONFIG_MAPPING:
        kinds = "it names the architecture, such as gpt2, llama, bert or t5"
        close = close_names(str(model_type), sorted(CONFIG_MAPPING.keys()), kinds)
        found = f"is missing; {kinds}" if model_type is None else f"{model_type!r} is not known{close}"
        raise UserError(f"model.config.model_type: {found}")
    return CONFIG_MAPPING[model_type]


def _config_problems(kind: Any, given: Any) -> list[str]:
    if not isinstance(given, Mapping):
        return [f"model.config: {given!r} is not a mapping such as {{model_type: gpt2, n_layer: 2}}"]
    try:
        config_class = _config_class(kind, given.get("model_type"))
    except UserError as error:
        return [str(error)]
    # a configuration accepts any key, so a typing error would do nothing
    default = config_class()
    choices = {*default.to_dict(), *default.attribute_map, "num_labels", "model_type"}
    choices |= {"decoder_start_token_id"} if getattr(default, "is_encoder_decoder", False) else set()
    return [
        f"model.config.{key}: {config_class.__name__} has no such key{close_names(str(key), choices)}"
        for key in given
        if key not in choices and not hasattr(default, str(key))
    ]
