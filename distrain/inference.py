"""Using a trained model: scoring a checkpoint on a split, and predicting a file of inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.checkpoint import Reader, find_checkpoint, read_manifest
from distrain.config import Recipe, UserError
from distrain.data import Transform, build_data, build_eval_loader, build_transform
from distrain.datasets import AnySource, Batch, Data, DataMeta
from distrain.loop import evaluate, to_device
from distrain.metrics import build_metrics
from distrain.models import Convention, build_model, calling_convention
from distrain.optim import build_loss
from distrain.output import write_csv
from distrain.recipe_file import parse_recipe
from distrain.strategy import World, load_weights, open_world, with_arithmetic

_NEW_TOKENS = 128
"""What a language model writes behind a prompt."""


@dataclass(frozen=True)
class Trained:
    """A model as it was trained, ready to be used."""

    checkpoint: Path
    recipe: Recipe
    data: Data
    model: nn.Module
    call: Convention
    world: World

    @classmethod
    def load(cls, target: Path | str) -> Trained:
        """Load a run's or a checkpoint's model, with the average of its weights where one was kept. All ranks call."""
        # the arithmetic must be known before there is a world; once there is one, rank 0's choice is everybody's, for a
        # run that is still training may publish or retire a checkpoint between two looks
        checkpoint = find_checkpoint(target)
        world = open_world(_recipe_in(read_manifest(checkpoint).recipe, checkpoint).train.precision)
        try:
            return cls._load(world, Path(world.broadcast(str(checkpoint))))
        except BaseException:
            world.close()
            raise

    @classmethod
    def _load(cls, world: World, checkpoint: Path) -> Trained:
        world.first(lambda: Reader(checkpoint).close())  # read and hashed once, not by every rank
        with world.together(lambda: Reader(checkpoint, verify=False)) as reader:
            recipe = _recipe_in(reader.manifest.recipe, checkpoint)

            def build() -> tuple[Data, nn.Module]:
                data = build_data(recipe, state=reader.manifest.scalars["data"])
                model = build_model(recipe, data.meta, weights=False)
                load_weights(model, reader, averaged=recipe.train.ema is not None)
                return data, model.to(world.device).eval()

            data, model = world.together(build)
        return cls(checkpoint, recipe, data, with_arithmetic(world, model), calling_convention(model), world)


def _recipe_in(text: str, checkpoint: Path) -> Recipe:
    return parse_recipe(text, f"the recipe in {checkpoint}")


def _batch_size(recipe: Recipe, world_size: int) -> int:
    """Return how many samples go through the model at a time: no more than in training on as many processes."""
    micro = recipe.batch.micro_batch_size
    return recipe.eval.batch or (-(-recipe.batch.global_batch_size // world_size) if micro == "auto" else micro)


def evaluate_checkpoint(target: Path | str, split: str) -> dict[str, Any]:
    """Return the metrics of a run's or a checkpoint's model on a split, with what was scored. All ranks call."""
    trained = Trained.load(target)
    try:
        return _evaluate(trained, split)
    finally:
        trained.world.close()


def _evaluate(trained: Trained, split: str) -> dict[str, Any]:
    recipe, data, world = trained.recipe, trained.data, trained.world
    if split not in data.splits:
        raise UserError(f"data set {recipe.data.name!r} has no split {split!r}; it has {', '.join(data.splits)}")
    values = evaluate(
        trained.model,
        trained.call,
        data.splits[split],
        world=world,
        loss=build_loss(recipe, data.meta),
        metrics=build_metrics(recipe, data.meta),
        batch_size=_batch_size(recipe, world.world_size),
        transform=build_transform(recipe, "eval"),
        workers=recipe.data.workers,
        decode=data.meta.decode,
        split=split,
        skip_undecodable=recipe.data.skip_undecodable,
    )
    return {"checkpoint": str(trained.checkpoint), "split": split, "processes": world.world_size, **values}


# --------------------------------------------------------------------------------------------------------------------
# Predicting


def predict_file(target: Path | str, inputs: str, out: Path) -> int:
    """Write one row for each sample of `inputs` to `out` (.csv or .parquet); returns how many.

    `inputs` is a file or folder that the data set can read, or the name of a split. Columns by task: `prediction` and
    `probability` (of the predicted class, or of the positive one), `probability_NAME` for each class or label,
    `prediction` or `prediction_0`, … in the targets' own units, and `text` for what is generated. Where samples
    have targets, `target` or `target_NAME` holds them in the same terms.
    """
    import pandas as pd

    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"-o {out}: predictions are written as .csv or .parquet")
    if out.is_symlink() or not out.parent.is_dir():
        raise UserError(f"-o {out}: expected a file in a folder that exists, and not a symbolic link")
    trained = Trained.load(target)
    source = _source(trained, inputs)
    transform = build_transform(trained.recipe, "eval")
    frames = [pd.DataFrame(columns) for columns in _predict(trained, source, transform, inputs)]
    table = pd.concat(frames, ignore_index=True)
    temporary = out.with_name(f".{out.name}.part")
    if out.suffix == ".csv":
        write_csv(table, temporary)
    else:
        table.to_parquet(temporary, index=False)
    temporary.replace(out)
    return len(table)


def _source(trained: Trained, inputs: str) -> AnySource:
    data, name = trained.data, trained.recipe.data.name
    if inputs in data.splits:
        return data.splits[inputs]
    path = Path(inputs)
    if not path.exists():
        raise UserError(
            f"there is no file {inputs}, and data set {name!r} has no such split ({', '.join(data.splits)})"
        )
    if data.read is None:
        raise UserError(
            f"data set {name!r} cannot read files for prediction; name one of its splits: {', '.join(data.splits)}"
        )
    return data.read(path)


def _predict(trained: Trained, source: AnySource, transform: Transform, what: str) -> Iterator[dict[str, Any]]:
    recipe, world = trained.recipe, trained.world
    batch_size = _batch_size(recipe, world_size=1)
    loader = build_eval_loader(source, rank=0, world_size=1, batch_size=batch_size, transform=transform, split=what)
    is_probability = build_loss(recipe, trained.data.meta).takes_probabilities
    with torch.no_grad():
        for batch in loader:
            keep = (batch["ids"] >= 0).numpy()
            batch = to_device(batch, world)
            if recipe.task in ("language_modeling", "seq2seq"):
                columns: dict[str, Any] = {"text": _generated(trained, batch)}
            else:
                outputs = trained.call(trained.model, batch["inputs"]).logits.cpu()
                columns = _columns(recipe.task, outputs, trained.data.meta, is_probability)
                if isinstance(batch.get("targets"), Tensor):
                    columns |= _targets(recipe.task, batch["targets"].cpu(), trained.data.meta)
            yield {"row": batch["ids"].numpy()[keep]} | {
                name: np.asarray(values, dtype=object if name == "text" else None)[keep]
                for name, values in columns.items()
            }


def _columns(task: str, outputs: Tensor, meta: DataMeta, is_probability: bool) -> dict[str, Any]:
    """Return the columns of a batch of outputs (batch, k) or (batch,).

    `is_probability`: whether outputs of binary and multilabel are probabilities, and not logits.
    """
    outputs = outputs.double()
    if task == "classification":
        probabilities = outputs.softmax(dim=1)
        names = meta.class_names or tuple(str(index) for index in range(outputs.shape[1]))
        top = probabilities.argmax(dim=1)
        return {
            "prediction": [names[index] for index in top.tolist()],
            "probability": probabilities.gather(1, top[:, None])[:, 0].numpy(),
        } | {f"probability_{name}": probabilities[:, index].numpy() for index, name in enumerate(names)}
    outputs = outputs.reshape(len(outputs), -1)
    if task == "binary":
        # two outputs are one for each class
        outputs = outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]
        probability = outputs if is_probability else outputs.sigmoid()
        names = meta.class_names or ("0", "1")
        return {"prediction": [names[int(p > 0.5)] for p in probability.tolist()], "probability": probability.numpy()}
    if task == "multilabel":
        names = meta.class_names or tuple(str(index) for index in range(outputs.shape[1]))
        probabilities = outputs if is_probability else outputs.sigmoid()
        columns = {f"probability_{name}": probabilities[:, index].numpy() for index, name in enumerate(names)}
        return {f"prediction_{name}": (probabilities[:, i] > 0.5).numpy() for i, name in enumerate(names)} | columns
    outputs = _in_own_units(outputs, meta)
    if outputs.shape[1] == 1:
        return {"prediction": outputs[:, 0].numpy()}
    return {f"prediction_{index}": outputs[:, index].numpy() for index in range(outputs.shape[1])}


def _targets(task: str, targets: Tensor, meta: DataMeta) -> dict[str, Any]:
    """Return the columns of what a batch should have been, (batch,) or (batch, k)."""
    if task in ("classification", "binary") and targets.dim() == 1:
        names = meta.class_names
        return {"target": [names[int(each)] if names else int(each) for each in targets.tolist()]}
    targets = targets.reshape(len(targets), -1).double()
    names = meta.class_names if task == "multilabel" else None
    if task == "regression":
        targets = _in_own_units(targets, meta)
    if targets.shape[1] == 1:
        return {"target": targets[:, 0].numpy()}
    keys = names or [str(index) for index in range(targets.shape[1])]
    return {f"target_{key}": targets[:, index].numpy() for index, key in enumerate(keys)}


def _in_own_units(values: Tensor, meta: DataMeta) -> Tensor:
    """Undo the standardising of targets (batch, k)."""
    if meta.target_std is None or meta.target_mean is None:
        return values
    std, mean = (torch.tensor(each, dtype=torch.float64) for each in (meta.target_std, meta.target_mean))
    return values * std + mean


def _generated(trained: Trained, batch: Batch) -> list[str]:
    generate, decode = getattr(trained.model, "generate", None), trained.data.meta.decode
    if generate is None or decode is None:
        raise UserError(
            f"model {trained.recipe.model.name!r} cannot generate text: it needs a method "
            "generate(tokens, max_new_tokens)"
        )
    inputs = batch["inputs"]
    if isinstance(inputs, dict):
        source = inputs["source"]
        return [decode(row) for row in generate(source, max_new_tokens=2 * source.shape[1] + 8).tolist()]
    # one by one: what follows a prompt must not follow its padding
    lengths = batch.get("lengths", torch.full((len(inputs),), inputs.shape[1])).tolist()
    prompts = [inputs[index : index + 1, :length] for index, length in enumerate(lengths)]
    return [decode(generate(prompt, max_new_tokens=_room(trained.model, prompt))[0].tolist()) for prompt in prompts]


def _room(model: nn.Module, prompt: Tensor) -> int:
    """Return how many tokens to write behind a prompt (1, tokens): a transformers model ends with its positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = _NEW_TOKENS if positions is None else min(_NEW_TOKENS, positions - prompt.shape[1])
    if room < 1:
        raise UserError(f"a prompt has {prompt.shape[1]} tokens, and the model {positions} positions; shorten it")
    return room
