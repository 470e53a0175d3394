"""Models: one by name with its initial weights, what it is called with, and what it gives back.

A name is one of `distrain.networks`, any model of torchvision.models, `transformers:CLASS`, or your own class or
function. Nothing is ever downloaded. The story: `build_model` finds the builder, checks the recipe's arguments against
its signature, fills in what the data say (`facts`), builds under a seed of its own, and loads `model.weights`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import random
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain.config import ModelSection, Recipe, Task, UserError, close_names, is_object_spec, mix, resolve_object
from distrain.datasets.base import DataMeta
from distrain.networks import ModelEntry, find, model_names, register
from distrain.networks.deferred import SMALL, Deferred, defer
from distrain.networks.huggingface import PREFIX as TRANSFORMERS
from distrain.networks.huggingface import build_transformers, check_transformers, is_transformers, transformers_config
from distrain.networks.sequential import check_layers, shown
from distrain.networks.weights import WeightsReport, defer_weights, load_weights, tied_names

__all__ = [
    "Deferred",
    "ModelEntry",
    "ModelOutput",
    "ModelSummary",
    "WeightsReport",
    "build_model",
    "calling_convention",
    "check_model",
    "defer_model",
    "describe_model",
    "facts",
    "find",
    "forward",
    "load_weights",
    "model_names",
    "num_outputs",
    "plain_model",
    "register",
    "tied_names",
    "torchvision_names",
    "transformers_config",
]

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------------------
# What the data say


def num_outputs(task: Task, meta: DataMeta) -> int | None:
    """Return how many numbers the last layer gives (for each token, where tokens are predicted); None: not known."""
    if task == "classification":
        return meta.num_classes
    if task == "binary":
        return 1
    if task == "multilabel":
        return meta.num_targets
    if task == "regression":
        return meta.num_targets or 1
    return meta.vocab_size if task == "language_modeling" else meta.target_vocab_size


_HEAD = ("num_outputs", "num_classes", "num_labels", "out_features")
_DERIVED = ("in_features", "in_channels", "image_size", "seq_len", "cardinalities")


def facts(task: Task, meta: DataMeta) -> dict[str, Any]:
    """Return what is filled in for a model's parameters of these names when the recipe does not give them.

    They are the fields of `meta` that are known; `num_outputs`, `num_classes`, `num_labels` and `out_features`, all of
    them the size of the last layer; and from the shape of a sample `in_features` (its numbers; of a table with
    `cardinalities` those beside its categories), `in_channels` and `image_size` (square images), or `seq_len` (tokens).
    """
    known = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
    known |= dict.fromkeys(_HEAD, num_outputs(task, meta))
    shape = meta.input_shape
    if meta.vocab_size is not None:
        known["seq_len"] = meta.tokens_per_sample if shape is None else shape[0]
    elif shape is not None:
        known["in_features"] = math.prod(shape)
        if len(shape) >= 2:
            known["in_channels"] = shape[0]
        if len(shape) == 3 and shape[1] == shape[2]:
            known["image_size"] = shape[1]
    elif known.get("cardinalities") is not None and meta.feature_names is not None:
        known["in_features"] = len(meta.feature_names) - len(known["cardinalities"])
    return {name: value for name, value in known.items() if value is not None}


_FACT_NAMES = {field.name for field in dataclasses.fields(DataMeta)} | {*_HEAD, *_DERIVED}

# --------------------------------------------------------------------------------------------------------------------
# Builders by name


@dataclass(frozen=True)
class _Builder:
    name: str
    build: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    """Its parameters by name, without *args and **kwargs."""
    takes_any: bool
    """Whether it takes keys beside its parameters."""
    own: bool = False
    """Whether it is the user's code."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Arguments that are not passed on, and why."""
    types: Mapping[str, Any] = field(default_factory=dict)
    """What the values of arguments must be, where that is checked: for the networks written here."""

    def problems(self, args: Mapping[str, Any], known: set[str]) -> list[str]:
        """Return what is wrong with the recipe's arguments when the facts named `known` are filled in."""
        choices = [*self.parameters, *ModelSection.model_fields]
        unknown = [] if self.takes_any else [key for key in args if key not in self.parameters]
        found = [
            f"model.{key}: {self.refused[key]}"
            if key in self.refused
            else f"model.{key}: {self.name} takes no such argument{close_names(key, choices)}; it takes {self.shown()}"
            for key in unknown
        ]
        for key, value in args.items():
            try:
                TypeAdapter(self.types.get(key, Any)).validate_python(value, strict=True)
            except ValidationError as error:
                reasons = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
                found.append(f"model.{key}: {value!r} does not fit: {reasons}")
        empty = inspect.Parameter.empty
        for key, parameter in self.parameters.items():
            if parameter.default is empty and key not in args and key not in known:
                why = "the data do not say it" if key in _FACT_NAMES else "it has no default"
                found.append(f"model.{key}: {self.name} needs this argument, and {why}; write it in the recipe")
        return found

    def shown(self) -> str:
        empty = inspect.Parameter.empty
        parts = [key if p.default is empty else f"{key}={p.default!r}" for key, p in self.parameters.items()]
        return ", ".join(parts) or "none"


def _named_parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of `target` that can be given by name, and whether it takes any others."""
    try:
        every = inspect.signature(target).parameters.values()
    except ValueError:  # written in C without a signature
        return {}, True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in every if p.kind in kinds}, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in every)


def _find_builder(recipe: Recipe, say: Callable[[str], None] = logger.info) -> _Builder:
    name, task = recipe.model.name, recipe.task
    if entry := find(name):
        if task not in entry.tasks:
            others = ", ".join(other for other in model_names() if task in getattr(find(other), "tasks", ()))
            raise UserError(
                f"model.name: {name} is for {', '.join(entry.tasks)}, and the task is {task}; for that there are "
                f"{others}, or a model of your own"
            )
        target = vars(entry.build)["__init__"] if isinstance(entry.build, type) else entry.build
        types = get_type_hints(target, include_extras=True)
        return _Builder(name, entry.build, *_named_parameters(entry.build), types=types)
    if is_object_spec(name):
        target = resolve_object(name)
        if not callable(target):
            raise UserError(
                f"model.name: {name} is {type(target).__name__}, not a class or function that builds a model"
            )
        return _Builder(name, target, *_named_parameters(target), own=True)
    if name in torchvision_names():
        return _torchvision_builder(name, say)
    choices = [*model_names(), *torchvision_names()]
    if name in torchvision.models.list_models():
        raise UserError(
            f"model.name: {name} of torchvision is for detection, optical flow or quantized inference, which no task "
            "here trains; wrap it in a class of your own and name that, as path/to/file.py:Class"
        )
    raise UserError(
        f"model.name: no model {name!r}{close_names(name, choices)}; expected {', '.join(model_names())}, any model of "
        "torchvision.models, transformers:CLASS, path/to/file.py:NAME or package.module:NAME"
    )


# --------------------------------------------------------------------------------------------------------------------
# torchvision


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Return the models of torchvision that map one tensor to one: of images, of video, and of pixels."""
    models = torchvision.models
    modules = (models, models.video, models.segmentation)
    return tuple(sorted({name for module in modules for name in models.list_models(module=module)}))


_NO_DOWNLOAD = "weights are never downloaded; name a local file in model.weights"
_NO_SECOND_HEAD = "an auxiliary head needs the targets in the forward pass, so it cannot be trained here; leave it out"
_REFUSED = {
    **dict.fromkeys(("pretrained", "pretrained_backbone", "weights_backbone"), _NO_DOWNLOAD),
    **dict.fromkeys(("aux_logits", "aux_loss"), _NO_SECOND_HEAD),
}


def _torchvision_builder(name: str, say: Callable[[str], None]) -> _Builder:
    builder = torchvision.models.get_model_builder(name)
    outer, _ = _named_parameters(builder)
    parameters = dict(outer)
    kind = inspect.signature(builder).return_annotation
    if "weights_backbone" not in outer:  # models of pixels drop their **kwargs
        # **kwargs goes to the class, where what the builder itself sets has no default
        inner, _ = _named_parameters(kind)
        empty = inspect.Parameter.empty
        parameters |= {key: p for key, p in inner.items() if key not in outer and p.default is not empty}
        # but for what a builder of vision transformers takes out of **kwargs first
        parameters |= {key: inner[key].replace(default=224) for key in ("image_size",) if key in inner}
    for key in ("weights", "progress", *_REFUSED):
        parameters.pop(key, None)
    parameters.setdefault("in_channels", _OPTIONAL)
    fixed: dict[str, Any] = {"weights": None}
    fixed |= {"weights_backbone": None} if "weights_backbone" in outer else {}
    if name in ("googlenet", "inception_v3"):
        # a second head would have no gradient, which DistributedDataParallel refuses; the default initialisation warns
        fixed |= {"aux_logits": False, "init_weights": True}

    def build(in_channels: int | None = None, **args: Any) -> nn.Module:
        model: nn.Module = builder(**(fixed | args))
        if in_channels is not None and (layer := _set_in_channels(model, in_channels)):
            say(f"{name}: its first layer, {layer}, was rebuilt for in_channels {in_channels}")
        return model

    return _Builder(name, build, parameters, takes_any=False, refused=_REFUSED)


_OPTIONAL = inspect.Parameter("in_channels", inspect.Parameter.KEYWORD_ONLY, default=None)


def _set_in_channels(model: nn.Module, in_channels: int) -> str | None:
    """Give the first convolution `in_channels`, freshly initialised; return its name, or None where it has so many."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if module.in_channels == in_channels:
                return None
            assert module.groups == 1
            new = type(module)(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            return name
    raise UserError(f"model.in_channels: {type(model).__name__} has no convolution to change")


# --------------------------------------------------------------------------------------------------------------------
# Building


def check_model(recipe: Recipe) -> list[str]:
    """Return what is wrong with the model's name and arguments, as far as that shows without data and building it."""
    args = recipe.model.args
    try:
        if recipe.model.name.startswith(TRANSFORMERS):
            return check_transformers(recipe.model.name, args)
        builder = _find_builder(recipe)
    except UserError as error:
        return [str(error)]
    problems = builder.problems(args, _FACT_NAMES)
    if builder.name == "sequential" and "layers" in args:
        problems += check_layers(args["layers"])
    return problems


def build_model(
    recipe: Recipe,
    meta: DataMeta,
    *,
    base: Path = Path(),
    weights: bool = True,
    say: Callable[[str], None] = logger.info,
    kept: Path | None = None,
) -> nn.Module:
    """Return the recipe's model on the CPU, in training mode, in fp32 (fp64 for train.precision fp64).

    Its initial weights depend on the recipe's seed alone, and no random state outside changes. `base`: the folder that
    relative paths start from. `weights`: whether model.weights (or the weights in the `path` of a transformers model)
    are loaded; without them a checkpoint is expected to follow. `say` gets a line about what was loaded or adapted.
    `kept`: what a run has kept of that `path` (see `distrain.checkpoints.export.companion_files`).
    """
    model = _initial(recipe, meta, base, weights, say, kept)
    if weights and recipe.model.weights is not None:
        path = base / recipe.model.weights
        say(str(load_weights(model, path, strict=recipe.model.weights_strict)))
    return model


def defer_model(
    recipe: Recipe,
    meta: DataMeta,
    *,
    base: Path = Path(),
    weights: bool = True,
    say: Callable[[str], None] = logger.info,
    small: int = SMALL,
    kept: Path | None = None,
) -> Deferred:
    """Return what `build_model` returns without its weights, and the same weights one at a time; see `Deferred`.

    So no process holds the whole. Where the model's own code makes that impossible it is built in full, and `say` gets
    a line with the reason. `small`: see `defer`.
    """
    section = recipe.model

    def build(say: Callable[[str], None]) -> nn.Module:
        return _initial(recipe, meta, base, weights, say, kept)

    deferred = defer(build, say=say, small=small)
    if weights and section.weights is not None:
        say(str(defer_weights(deferred, base / section.weights, strict=section.weights_strict)))
    return deferred


def _initial(
    recipe: Recipe, meta: DataMeta, base: Path, weights: bool, say: Callable[[str], None], kept: Path | None
) -> nn.Module:
    """Return the model as its constructor leaves it, in training mode."""
    section, known = recipe.model, facts(recipe.task, meta)
    dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
    with isolated_seed(mix(recipe.seed, "init")):
        if section.name.startswith(TRANSFORMERS):
            model = build_transformers(section.name, section.args, known, base=base, weights=weights, kept=kept)
        else:
            model = _build(recipe, known, say)
            _size_lazy(model, meta, section.name)
    if any(p.device.type != "cpu" or (p.is_floating_point() and p.dtype != dtype) for p in model.parameters()):
        model = model.to(device="cpu", dtype=dtype)
    return model.train()


def _build(recipe: Recipe, known: dict[str, Any], say: Callable[[str], None]) -> nn.Module:
    builder, given = _find_builder(recipe, say), recipe.model.args
    problems = builder.problems(given, set(known))
    if problems:
        raise UserError("\n".join(problems))
    args = {key: value for key, value in known.items() if key in builder.parameters} | given
    if recipe.task == "classification" and "num_classes" in given and "num_classes" in known:
        classes = given["num_classes"]
        if isinstance(classes, int) and classes < known["num_classes"]:
            raise UserError(
                f"model.num_classes: {classes}, and the data have {known['num_classes']} classes; leave it out, and it "
                "is taken from the data"
            )
    call = shown(builder.name, (), args)
    try:
        model = builder.build(**args)
    except UserError:
        raise
    except Exception as error:
        if builder.own:
            # the user's own code: its traceback is worth more than a message of ours
            error.add_note(f"while building the recipe's model, {call}")
            raise
        raise UserError(f"model: {call} cannot be built: {error}; it takes {builder.shown()}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name: {builder.name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators, and put them back as they were at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _size_lazy(model: nn.Module, meta: DataMeta, name: str) -> None:
    """Give lazy parameters their shapes, by a forward pass over a sample of zeros."""
    lazy = [key for key, parameter in model.named_parameters() if is_lazy(parameter)]
    if not lazy:
        return
    if meta.input_shape is None:
        raise UserError(
            f"model.name: {name} has lazy parameters, such as {lazy[0]!r}, and the data do not say the shape of a "
            "sample; give their sizes"
        )
    dtype = torch.get_default_dtype() if meta.vocab_size is None else torch.int64
    with torch.no_grad():
        forward(model.eval(), torch.zeros(2, *meta.input_shape, dtype=dtype))
    model.train()


# --------------------------------------------------------------------------------------------------------------------
# Calling


class ModelOutput(NamedTuple):
    """What a model gives for a batch. A named tuple, which every wrapper of PyTorch and Accelerate can look into."""

    logits: Tensor
    """(batch, outputs), or (batch, seq, vocabulary) where tokens are predicted."""
    aux_loss: Tensor | None = None
    """A mean over the batch, 0-d, that is added to the loss of each sample (such as a router's balance)."""
    others: tuple[Tensor, ...] = ()
    """What a model that returns a tuple of tensors gives behind the first, for losses that take several."""


Convention = Callable[[nn.Module, Any], ModelOutput]
"""Calls a model, wrapped or not, with the inputs of a batch."""


def forward(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> ModelOutput:
    """Call `model`, wrapped or not, with the inputs of a batch; see `calling_convention`."""
    convention = _CONVENTIONS.get(model)
    if convention is None:
        convention = _CONVENTIONS[model] = calling_convention(model)
    return convention(model, inputs)


_CONVENTIONS: weakref.WeakKeyDictionary[nn.Module, Convention] = weakref.WeakKeyDictionary()


def calling_convention(model: nn.Module) -> Convention:
    """Return the function that calls `model`, or any wrapper of it, with the inputs of a batch.

    A tensor is passed on as it is. A mapping is passed by name where `forward` takes its keys, otherwise as it is. A
    model of transformers gets tokens as `input_ids` with an attention mask where it knows a padding id (or its own main
    input, such as `pixel_values`), and {"source", "target"} as `input_ids` and `decoder_input_ids`. A model may return
    a tensor, a `ModelOutput`, a mapping with `logits` (or `out`) and maybe `aux_loss`, or a tuple, whose first tensor
    is what losses and metrics take unless a loss takes several. Raises UserError where neither way of calling fits.
    """
    plain = plain_model(model)
    if is_transformers(plain):
        return _transformers_convention(plain)
    # of the class, for wrappers put on the instance hide the names
    signature = inspect.signature(type(plain).forward)
    by_name: dict[tuple[str, ...], bool] = {}

    def call(model: nn.Module, inputs: Any) -> ModelOutput:
        if isinstance(inputs, Mapping):
            keys = tuple(inputs)
            named = by_name.get(keys)
            if named is None:
                named = by_name[keys] = _takes_names(plain, signature, keys)
            return _output(model(**inputs) if named else model(inputs))
        return _output(model(inputs))

    return call


def _takes_names(model: nn.Module, signature: inspect.Signature, keys: tuple[str, ...]) -> bool:
    def binds(*args: Any, **kwargs: Any) -> bool:
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError:
            return False
        return True

    if binds(**dict.fromkeys(keys)):
        return True
    if binds(None):
        return False
    takes = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
    raise UserError(
        f"{type(model).__name__}.forward takes ({takes}), and the inputs of a batch are {', '.join(keys)}; name its "
        "parameters so, or let it take the one mapping"
    )


def _transformers_convention(plain: Any) -> Convention:
    takes = set(inspect.signature(type(plain).forward).parameters)
    always: dict[str, Any] = {"return_dict": True}
    always |= {"use_cache": False} if "use_cache" in takes else {}
    masks = "attention_mask" in takes
    pad_id = getattr(plain.config, "pad_token_id", None)
    coefficient = getattr(plain.config, "router_aux_loss_coef", 1.0)

    def call(model: nn.Module, inputs: Any) -> ModelOutput:
        if not isinstance(inputs, Mapping):
            named = {plain.main_input_name: inputs}
        elif inputs.keys() == {"source", "target"}:
            if "decoder_input_ids" not in takes:
                raise UserError(f"{type(plain).__name__} has no decoder; task seq2seq needs an encoder and a decoder")
            named = {"input_ids": inputs["source"], "decoder_input_ids": inputs["target"]}
        else:
            named = dict(inputs)
        if masks and pad_id is not None and "input_ids" in named and "attention_mask" not in named:
            named["attention_mask"] = named["input_ids"] != pad_id
        output = _output(model(**named, **always))
        return output if output.aux_loss is None else output._replace(aux_loss=coefficient * output.aux_loss)

    return call


def _output(raw: Any) -> ModelOutput:
    if isinstance(raw, Tensor):
        return ModelOutput(raw)
    if isinstance(raw, ModelOutput):
        return raw
    logits, aux_loss, others = None, None, ()
    if isinstance(raw, Mapping):
        logits = raw.get("logits", raw.get("out"))
        aux_loss = raw.get("aux_loss")
    elif isinstance(raw, tuple | list) and raw:
        logits, *rest = raw
        others = tuple(rest) if all(isinstance(each, Tensor) for each in rest) else ()
    if not isinstance(logits, Tensor):
        found = f"a mapping of {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else type(raw).__name__
        raise UserError(
            f"the model returned {found}; expected a tensor, a tuple that begins with one, a mapping with 'logits', or "
            "distrain.models.ModelOutput"
        )
    return ModelOutput(logits, aux_loss, others)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model itself, without what torch.compile, DistributedDataParallel or DeepSpeed put around it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inside = "_orig_mod" if "_orig_mod" in model._modules else "module"
        if inside == "module" and not isinstance(model, wrappers) and type(model).__name__ != "DeepSpeedEngine":
            return model
        model = model.get_submodule(inside)


# --------------------------------------------------------------------------------------------------------------------
# Describing


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model; tied tensors count once."""

    parameters: int
    trainable: int
    """Of them, those that are trained."""
    by_dtype: dict[str, int]
    """Parameters by the name of their dtype, such as float32."""
    bytes: int
    """Bytes of the parameters and buffers."""

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in self.by_dtype.items())
        return f"{self.parameters:,} parameters ({dtypes}), {self.trainable:,} trainable, {self.bytes / 2**20:,.1f} MiB"


def describe_model(model: nn.Module, frozen: Collection[str] = ()) -> ModelSummary:
    """Return the size of `model`. `frozen`: names of parameters that will not be trained, besides those that say so."""
    parameters = list(model.parameters())
    by_dtype: dict[str, int] = {}
    for parameter in parameters:
        dtype = str(parameter.dtype).removeprefix("torch.")
        by_dtype[dtype] = by_dtype.get(dtype, 0) + parameter.numel()
    return ModelSummary(
        parameters=sum(by_dtype.values()),
        trainable=sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in frozen
        ),
        by_dtype=by_dtype,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *model.buffers())),
    )
