"""What stands beside an exported model so that others can use it: config.json, recipe.yaml, README.md. No torch."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distrain.checkpoints.dtypes import DTYPES
from distrain.checkpoints.export.companion_files import CONFIG, run_of
from distrain.checkpoints.format import MANIFEST, Manifest
from distrain.checkpoints.reading import read_manifest
from distrain.config import Recipe
from distrain.config.yaml import parse_recipe
from distrain.run.folder import RunDir
from distrain.system.bounded_json import read_json
from distrain.system.numbers import counted
from distrain.system.output import one_line

README, RECIPE, CODE = "README.md", "recipe.yaml", "code"
OWN_CONFIG = "distrain.json"
"""In place of config.json, where that is the transformers library's."""
PROCESSOR = "preprocessor_config.json"
_TRANSFORMERS = "transformers:"


@dataclass(frozen=True)
class Graph:
    """What is known of a model that is written as a graph."""

    file: str
    """`model.onnx` or `model.pt2`."""
    inputs: Sequence[Mapping[str, Any]]
    """{name, dtype, shape} of each, in the order in which they are passed; a dimension of any size is a name, and
    `most_tokens` the most that the model takes."""
    outputs: Sequence[str]


@dataclass(frozen=True)
class UserCode:
    """The files of the user's own that a model's class is in; they are copied beside the model."""

    files: Mapping[str, Path]
    """By their names in the folder CODE."""
    changed: Sequence[str] = ()
    """Those that have changed since the training."""
    of_distrain: Sequence[str] = ()
    """Those that import distrain."""


def card_files(
    checkpoint: Path,
    manifest: Manifest,
    *,
    averaged: bool,
    companions: Mapping[str, Path],
    graph: Graph | None = None,
    code: UserCode | None = None,
    pt: bool = False,
    rounded: str | None = None,
) -> dict[str, str]:
    """Return {name: text} of what stands beside a model; `companions`: the files that are copied there.

    `pt`: whether the weights are a model.pt. `code`: what is copied of the user's. `rounded`: the narrower dtype
    that the weights were rounded to.
    """
    recipe = parse_recipe(manifest.recipe, f"the recipe in {checkpoint}")
    is_hugging_face = bool(manifest.scalars.get("transformers_config"))
    config = _config(checkpoint, manifest, recipe, averaged, companions)
    if rounded is not None:
        config["rounded_to"] = DTYPES[rounded].torch
    if "model_call" in manifest.scalars:
        config["model_call"] = manifest.scalars["model_call"]
    if graph is not None:
        config |= {"file": graph.file, "inputs": [*graph.inputs], "outputs": [*graph.outputs]}
    name = OWN_CONFIG if is_hugging_face else CONFIG
    return {
        name: json.dumps(config, indent=2),
        RECIPE: manifest.recipe,
        README: _readme(checkpoint, manifest, recipe, config, _loading(recipe, manifest, name, graph, code, pt=pt)),
    }


def unlike_processor(checkpoint: Path, companions: Mapping[str, Path]) -> list[str]:
    """Return a line where the processor that is beside a model normalises images otherwise than its training did."""
    file = companions.get(PROCESSOR)
    text = read_manifest(checkpoint).recipe if file is not None and (checkpoint / MANIFEST).is_file() else ""
    if file is None or not text:
        return []
    try:
        theirs = read_json(file)
    except (OSError, ValueError):
        return []
    if not isinstance(theirs, dict) or "image_mean" not in theirs:
        return []
    recipe = parse_recipe(text, f"the recipe in {checkpoint}")
    own: Mapping[str, Any] = next((each.args for each in recipe.data.transforms.eval if each.name == "Normalize"), {})
    found = [
        _channels(theirs.get(f"image_{key}")) if theirs.get("do_normalize", True) else None for key in ("mean", "std")
    ]
    trained = [_channels(own.get(key)) for key in ("mean", "std")]
    if found == trained:
        return []
    return [
        f"{PROCESSOR} is that of the model that the run began with, and normalises images otherwise than the run did "
        f"(mean and std {found[0]} and {found[1]}, in the run {trained[0]} and {trained[1]}): write the run's into it"
    ]


def _channels(values: Any) -> list[float] | None:
    """Return a number for each channel; one where all are equal."""
    if values is None:
        return None
    each = list(values) if isinstance(values, list | tuple) else [values]
    return each[:1] if len({*each}) == 1 else each


def _config(
    checkpoint: Path, manifest: Manifest, recipe: Recipe, averaged: bool, companions: Mapping[str, Path]
) -> dict[str, Any]:
    scalars, data = manifest.scalars, recipe.data
    generation = "generation_config.json"
    return {
        "model": recipe.model.model_dump(mode="json", exclude_none=True, exclude={"weights", "weights_strict"}),
        "task": {"name": recipe.task.name, **recipe.task.args},
        # facts of the data: shape of an input, classes, vocabulary, ids of padding, begin and end
        "data": scalars.get("data_facts", scalars.get("meta", {})),
        "preprocessing": {
            "dataset": data.name,
            "arguments": data.args,
            "transforms": [{"name": each.name, **each.args} for each in data.transforms.eval],
            "images_of_bytes": "become numbers in [0, 1] behind the transforms, unless one of them makes floats",
            "fitted_on_train": scalars.get("data", {}),
        },
        "files": sorted(companions),
        "generation_config": generation if generation in companions else None,
        "weights": f"moving average, decay {recipe.train.ema}" if averaged else f"those of step {manifest.step}",
        "averaged": averaged,
        "step": manifest.step,
        "checkpoint": checkpoint.name,
    }


# --------------------------------------------------------------------------------------------------------------------
# The model card


def _readme(
    checkpoint: Path, manifest: Manifest, recipe: Recipe, config: Mapping[str, Any], loading: Sequence[str]
) -> str:
    facts = config["data"]
    name = OWN_CONFIG if manifest.scalars.get("transformers_config") else CONFIG
    parameters = sum(spec.numel for full, spec in manifest.specs.items() if _is_parameter(full, spec.role))
    what = f"`{recipe.model.name}` for task `{recipe.task.name}`"
    lines = [
        f"# {recipe.name}",
        "",
        f"{what}, trained on data set `{recipe.data.name}` to step {manifest.step:,}: {parameters:,} parameters, the "
        f"weights are {config['weights']}.",
        "",
        "| | |",
        "|---|---|",
        *_rows(
            {
                "input of a sample": _shape(facts.get("input_shape")),
                "classes": _names(facts.get("class_names"), facts.get("num_classes")),
                "vocabulary": facts.get("vocab_size"),
                "padding, begin and end of a text": _ids(facts),
                "preprocessing": _preprocessing(config["preprocessing"], facts.get("input_shape") or ()),
                "also here": ", ".join(config["files"]) or None,
            }
        ),
        "",
        f"All of it with its numbers is in `{name}`.",
        "",
        "## How to load it",
        "",
        *loading,
        "",
        "## Evaluation",
        "",
        *_evaluation(checkpoint, manifest),
        "",
        "## Training",
        "",
        f"The whole recipe is `{RECIPE}`. {_steps(recipe, manifest)}",
        "",
        *_data(manifest),
        "",
        "## Limits",
        "",
        *(f"- {line}" for line in _limits(recipe, config)),
        "",
        f"Written from `{checkpoint.name}` ({manifest.created}) with {_versions()}.",
    ]
    return "\n".join(lines)


def _is_parameter(full: str, role: str) -> bool:
    return full.startswith("model/") and role == "parameter"


def _rows(values: Mapping[str, Any]) -> list[str]:
    return [f"| {key} | {_cell(value)} |" for key, value in values.items() if value is not None]


def _cell(value: Any) -> str:
    return one_line(str(value)).replace("|", "\\|")


def _shape(shape: Sequence[int] | None) -> str | None:
    return None if shape is None else " × ".join(map(str, shape))


def _names(names: Sequence[str] | None, count: int | None) -> str | None:
    if names is None:
        return None if count is None else str(count)
    return f"{len(names)}: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"


def _preprocessing(found: Mapping[str, Any], shape: Sequence[int]) -> str:
    parts = [each["name"] for each in found["transforms"]]
    if len(shape) > 2:
        parts.append(
            f"images of bytes {found['images_of_bytes']}" if parts else "images of bytes become numbers in [0, 1]"
        )
    if found["fitted_on_train"].keys() - {"class_counts"}:  # those are for the loss
        parts.append("by what was fitted on the training split (`preprocessing.fitted_on_train`)")
    return ", ".join(parts) or "none"


def _ids(facts: Mapping[str, Any]) -> str | None:
    ids = [facts.get(key) for key in ("pad_id", "bos_id", "eos_id")]
    return None if ids == [None] * 3 else ", ".join("none" if each is None else str(each) for each in ids)


def _steps(recipe: Recipe, manifest: Manifest) -> str:
    optimizers = " and ".join(f"`{section.name}`" for section in recipe.optimizers.values())
    kind = "optimizer" if len(recipe.optimizers) == 1 else "optimizers"
    world = manifest.world_size
    processes = "1 process" if world == 1 else f"{world} processes ({manifest.strategy})"
    return (
        f"{counted(manifest.step, 'step')} of {kind} {optimizers} with "
        f"{counted(recipe.batch.global_batch_size, 'sample')} in each, "
        f"precision {recipe.train.precision}, seed {recipe.seed}, in {processes}."
    )


def _evaluation(checkpoint: Path, manifest: Manifest) -> list[str]:
    split, values = None, {}
    if manifest.evaluation is not None:
        split, values = manifest.evaluation.criterion.split, dict(manifest.evaluation.values)
    run = RunDir(run_of(checkpoint))
    for row in run.rows() if run.exists else ():
        if row.get("event") == "final" and row.get("step") == manifest.step:
            split = row.get("split")
            own = ("event", "step", "split", "time", "seconds", "epoch", "checkpoint")
            values = {key: value for key, value in row.items() if key not in own and isinstance(value, int | float)}
    if not values:
        return ["This step was not evaluated."]
    rows = [f"| {_cell(key)} | {value:.6g} |" for key, value in values.items()]
    return [f"On split `{split}`, at step {manifest.step:,}:", "", "| metric | value |", "|---|---|", *rows]


def _data(manifest: Manifest) -> list[str]:
    inputs = manifest.scalars.get("inputs") or {}
    known = {key: inputs[key] for key in ("data", "folder", "items", "splits") if key in inputs}
    if not known:
        return ["The checkpoint has no fingerprint of its data."]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    splits = ", ".join(
        f"{name} {'a stream' if count is None else f'{count:,}'}"
        for name, count in (inputs.get("splits") or {}).items()
    )
    return [f"Samples: {splits or 'unknown'}. SHA-256 of the fingerprint of the data: `{digest}`."]


def _limits(recipe: Recipe, config: Mapping[str, Any]) -> list[str]:
    facts = config["data"]
    found = [
        "It knows what its training data show; the numbers above are of data drawn as these were.",
        "Its inputs must be prepared as in training: the preprocessing is not part of the weights.",
    ]
    if "feature_mean" in config["preprocessing"]["fitted_on_train"]:
        found.append(
            "Its inputs are standardised: `(value - feature_mean) / feature_std`, as fitted on training samples."
        )
    if facts.get("target_mean") is not None:
        found.append(
            "Its outputs are standardised: a target is `output * target_std + target_mean` of the data's facts."
        )
    if recipe.train.ema is not None and not config["averaged"]:
        found.append(
            "Its evaluation was of the moving average of the weights, and these are the weights (--ema has it)."
        )
    if "rounded_to" in config:
        found.append(f"Its evaluation was of the weights as trained, and these are rounded to {config['rounded_to']}.")
    if recipe.eval.best is not None:
        found.append("Which step was best was chosen on the validation split, so numbers of that split are favourable.")
    if "inputs" not in config:
        return found
    fixed = [f"{each['name']} {list(each['shape'])}" for each in config["inputs"]]
    most = [f", {each['shape'][1]} up to {each['most_tokens']}" for each in config["inputs"] if "most_tokens" in each]
    sizes = f"named sizes may vary{''.join(most)}"
    return [*found, f"The graph takes what its data type and shape say: {'; '.join(fixed)}; {sizes}."]


def _versions() -> str:
    found = {"Python": platform.python_version()}
    for package in ("distrain", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{name} {number}" for name, number in found.items())


# --------------------------------------------------------------------------------------------------------------------
# Code


def _loading(
    recipe: Recipe, manifest: Manifest, name: str, graph: Graph | None, code: UserCode | None, *, pt: bool
) -> list[str]:
    alone = "In this folder, without distrain:"
    if graph is not None:
        return [alone, *_python(_onnx(graph) if graph.file.endswith(".onnx") else _pt2(graph))]
    read = _weights(manifest, pt=pt)
    if recipe.model.name.startswith(_TRANSFORMERS):
        kind = recipe.model.name.removeprefix(_TRANSFORMERS)
        if not pt:
            return [
                alone,
                *_python([f"from transformers import {kind}", "", f'model = {kind}.from_pretrained(".").eval()']),
            ]
        made = f"{kind}.from_config(config)" if kind.startswith("Auto") else f"{kind}(config)"
        build = [f"from transformers import AutoConfig, {kind}", "", 'config = AutoConfig.from_pretrained(".")']
        return [alone, *_python([*build, f"model = {made}.eval()", *read])]
    if recipe.model.name.startswith("object."):
        file = "model.pt" if pt else "model.safetensors"
        return [f"The model was made in a Python process: make it there, and load `{file}` into it."]
    call = manifest.scalars.get("model_call")
    if call is not None:
        return _foreign(recipe, call, code, read)
    lora = ', ["model.lora=null"]' if recipe.model.lora is not None else ""
    build = [
        "import json",
        "from pathlib import Path",
        "",
        "from distrain.config.yaml import parse_recipe",
        "from distrain.datasets.stored_meta import meta_from_json",
        "from distrain.models import build_model",
        "",
        f'recipe = parse_recipe(Path("{RECIPE}").read_text(), "{RECIPE}"{lora})',
        f'facts = json.loads(Path("{name}").read_text())["data"]',
        "model = build_model(recipe, meta_from_json(facts), weights=False).eval()",
        *read,
    ]
    return [
        "In this folder; the class of the model is distrain's, which has to be installed, and `model` is an ordinary "
        "`torch.nn.Module`. A model that runs without distrain: export with `--format pt2` or `--format onnx`.",
        *_python(build),
    ]


def _python(lines: Sequence[str]) -> list[str]:
    return ["", "```python", *lines, "```"]


def _weights(manifest: Manifest, *, pt: bool) -> list[str]:
    """Return the lines that load the weights into `model`; values that are no tensors are not among them."""
    strict = ", strict=False" if manifest.scalars.get("model_state") else ""
    if pt:
        return ["", "import torch", "", f'model.load_state_dict(torch.load("model.pt", weights_only=True){strict})']
    return [
        "",
        "from pathlib import Path",
        "",
        "from safetensors.torch import load_file",
        "",
        'files = sorted(Path().glob("model*.safetensors"))',
        "weights = {name: tensor for file in files for name, tensor in load_file(file).items()}",
        f"model.load_state_dict(weights{strict})",
    ]


def _foreign(recipe: Recipe, call: Mapping[str, Any], code: UserCode | None, read: Sequence[str]) -> list[str]:
    """Return how a model is loaded whose class is a library's or the user's."""
    name, own = recipe.model.name, recipe.model.args
    # facts of the data, which are not the recipe's, are tuples where they are sequences
    arguments = {
        key: tuple(each) if isinstance(each, list) and key not in own else each
        for key, each in call["arguments"].items()
    }
    text = ["In this folder, without distrain."]
    shape = None
    if call["library"] == "torchvision":
        shape = arguments.pop("in_channels", None)
        lines = [
            "from torchvision.models import get_model",
            "",
            f"model = get_model({_arguments(arguments, repr(name))})",
        ]
    elif call["library"] == "timm":
        named = repr(name.partition(":")[2])
        lines = ["import timm", "", f"model = timm.create_model({_arguments(arguments, named, 'pretrained=False')})"]
    else:
        where, _, kind = call["object"].rpartition(":")
        module = Path(where).stem if where.endswith(".py") else where
        if code is None or not code.files:
            text = [f"Where `{module}` can be imported, without distrain."]
            path = []
        else:
            text += [f"The code of its class is in `{CODE}/`: {', '.join(f'`{each}`' for each in code.files)}."]
            path = ["import sys", "", f'sys.path.insert(0, "{CODE}")', ""]
        if code is not None and code.changed:
            text += [f"It has changed since the training: {', '.join(f'`{each}`' for each in code.changed)}."]
        if code is not None and code.of_distrain:
            text[0] = "In this folder."
            files = ", ".join(f"`{each}`" for each in code.of_distrain)
            text += [f"It imports distrain, which has to be installed: {files}."]
        lines = [*path, *_import(module, kind), "", f"model = {kind}({_arguments(arguments)})"]
    if shape not in (None, 3):
        lines += [
            "from torch import nn",
            "",
            "name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))",
            f"sizes = ({shape}, first.out_channels, first.kernel_size, first.stride, first.padding, first.dilation)",
            "model.set_submodule(name, type(first)(*sizes, bias=first.bias is not None))",
        ]
    if recipe.train.precision == "fp64":
        lines.append("model.double()")
    return [" ".join(text), *_python([*lines, "model.eval()", *read])]


def _import(module: str, kind: str) -> list[str]:
    if all(part.isidentifier() for part in module.split(".")):
        return [f"from {module} import {kind}"]
    return ["from importlib import import_module", "", f"{kind} = import_module({module!r}).{kind}"]


def _arguments(values: Mapping[str, Any], *first: str) -> str:
    """Return the arguments of a call, behind the `first` ones."""
    if all(key.isidentifier() for key in values):
        return ", ".join([*first, *(f"{key}={value!r}" for key, value in values.items())])
    return ", ".join([*first, f"**{dict(values)!r}"])


def _sizes(each: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a shape with which an input can be tried: one sample, four tokens."""
    return tuple(size if isinstance(size, int) else 1 if size == "batch" else 4 for size in each["shape"])


def _onnx(graph: Graph) -> list[str]:
    feeds = [f'    "{each["name"]}": np.zeros({_sizes(each)}, "{each["dtype"]}"),' for each in graph.inputs]
    outputs = ", ".join(graph.outputs)
    return [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{graph.file}", providers=["CPUExecutionProvider"])',
        "inputs = {",
        *feeds,
        "}",
        f"{outputs}{',' if len(graph.outputs) == 1 else ''} = session.run(None, inputs)",
        f"print({graph.outputs[0]}.shape)",
    ]


def _pt2(graph: Graph) -> list[str]:
    values = ", ".join(f"torch.zeros({_sizes(each)}, dtype=torch.{each['dtype']})" for each in graph.inputs)
    outputs = ", ".join(graph.outputs)
    return [
        "import torch",
        "",
        f'model = torch.export.load("{graph.file}").module()',
        f"{outputs}{',' if len(graph.outputs) == 1 else ''} = model({values})",
        f"print({graph.outputs[0]}.shape)",
    ]
