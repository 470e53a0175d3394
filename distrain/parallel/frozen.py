"""Weights that are not trained, by reference: hashed where they are built, and checked wherever they are built again.

A checkpoint that refers to them holds their names, shapes, dtypes and hashes. Whoever opens it builds the model with
its initial weights, as at the start of the run, and checks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from torch import Tensor, nn

from distrain.checkpoint import Frozen, FrozenTensor, Manifest, TensorSpec
from distrain.config import Recipe, UserError
from distrain.networks.huggingface import folder_of
from distrain.parallel.nested import bytes_of, stored_dtype
from distrain.run.heartbeat import progress

TRAINING = "name where they are now in the recipe, as in `distrain train … {key}=PATH --update`"
USING = "name where they are now with --initial-weights PATH"


def initial_weights(recipe: Recipe) -> tuple[str, str | None]:
    """Return the key of the recipe that names the initial weights, and the path; ("seed", None) where none does."""
    if recipe.model.weights is not None:
        return "model.weights", recipe.model.weights
    path = folder_of(recipe.model)
    return ("model.path", str(path)) if path is not None else ("seed", None)


def with_initial_weights(recipe: Recipe, path: Path | str | None) -> Recipe:
    """Return the recipe with its initial weights at another place (None: where it says); raises UserError."""
    if path is None:
        return recipe
    key, _ = initial_weights(recipe)
    if key == "seed":
        raise UserError("--initial-weights: the recipe starts from its seed, and from no file; remove it")
    model = recipe.model.model_copy(update={key.removeprefix("model."): str(path)})
    if key == "model.path":
        model = type(recipe.model).model_validate(recipe.model.model_dump() | {"path": str(path)})
    return recipe.model_copy(update={"model": model})


def refers(recipe: Recipe) -> bool:
    """Whether a new run of this recipe refers to its frozen weights (checkpoint.frozen).

    auto: where adapters are trained beside weights of a file. That file is at least as well kept as the run, and is
    most of what a checkpoint would hold. What a seed makes depends on versions of libraries as well, and other
    checkpoints with frozen weights were complete in themselves before they could be anything else.
    """
    if recipe.checkpoint.frozen == "auto":
        return recipe.model.lora is not None and initial_weights(recipe)[0] != "seed"
    return recipe.checkpoint.frozen == "reference"


def referred(
    recipe: Recipe, model: nn.Module, names: list[str], resumed: Manifest | None, *, hashes: bool
) -> Frozen | None:
    """Return what the checkpoints of a run refer to; None where they store all.

    `names` are the frozen parameters of the model, which is as it was built. `hashes`: whether to look at their values;
    a rank that has none, or has the same as another, need not. Raises UserError where the run `resumed` from a
    checkpoint that refers to others.
    """
    before = resumed.frozen if resumed is not None else None
    parameters = dict(model.named_parameters())
    if before is not None:
        now = {f"model/{name}" for name in names}
        if trained := sorted(before.tensors.keys() - now):
            raise UserError(
                f"the checkpoint of step {resumed.step if resumed else 0} refers to {trained[0].removeprefix('model/')}"
                f"{f' and {len(trained) - 1} others' if trained[1:] else ''} as frozen, and this recipe trains them or "
                "has no such; freeze them as before, or start a new run with model.weights set to an export"
            )
        if hashes:
            check_frozen(model, before, f"the checkpoint of step {resumed.step if resumed else 0}", TRAINING)
    if not (refers(recipe) if resumed is None else before is not None and recipe.checkpoint.frozen != "store"):
        return None
    key, path = initial_weights(recipe)
    wanted = [f"model/{name}" for name in names] if before is None else [*before.tensors]
    tensors = {}
    for name in wanted:
        parameter = parameters[name.removeprefix("model/")]
        dtype = stored_dtype(parameter)
        assert dtype is not None, "prepare_to_save refuses others"
        spec = TensorSpec(tuple(parameter.shape), dtype, "parameter")
        known = before.tensors[name].xxh3_128 if before is not None else _hash(parameter) if hashes else ""
        tensors[name] = FrozenTensor(spec, known)
    return Frozen(key, path, tensors) if tensors else None


def _hash(tensor: Tensor) -> str:
    progress()
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor).numpy().data)


def check_frozen(model: nn.Module, frozen: Frozen, checkpoint: object, cure: str) -> None:
    """Raise UserError unless the model, whole and on the CPU, has the tensors that a checkpoint refers to."""
    parameters = dict(model.named_parameters())
    wrong: list[str] = []
    for name, each in frozen.tensors.items():
        plain = name.removeprefix("model/")
        found = parameters.get(plain)
        if found is None:
            wrong.append(f"{plain}: found no such parameter")
        elif (spec := TensorSpec(tuple(found.shape), stored_dtype(found) or "F32", "parameter")) != each.spec:
            shown = f"{spec.dtype} {list(spec.shape)}, expected {each.spec.dtype} {list(each.spec.shape)}"
            wrong.append(f"{plain}: found {shown}")
        elif (digest := _hash(found)) != each.xxh3_128:
            wrong.append(f"{plain}: found the hash {digest[:12]}…, expected {each.xxh3_128[:12]}…")
    if not wrong:
        return
    if frozen.path is None:
        where = "the seed makes others now"
        cure = "use the versions of libraries, the model's code and the seed that the run was trained with"
    else:
        where = f"{frozen.key} was {frozen.path}"
        cure = f"put that back as it was, or {cure.format(key=frozen.key)}"
    shown = "\n  ".join([*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])])
    raise UserError(
        f"{checkpoint} refers to frozen weights, and {len(wrong)} of {len(frozen.tensors)} are not those that it was "
        f"trained beside ({where}):\n  {shown}\nThey are not in the checkpoint: {cure}"
    )


@contextmanager
def explaining_source(frozen: Frozen | None, checkpoint: object, cure: str) -> Iterator[None]:
    """Say of an error in building a model that the checkpoint needs the initial weights, where it refers to them."""
    try:
        yield
    except UserError as error:
        if frozen is None or frozen.path is None or "refers to frozen weights" in str(error):
            raise
        raise UserError(
            f"{error}\n{checkpoint} refers to {len(frozen.tensors)} frozen weights there and does not store them "
            f"({frozen.key} was {frozen.path}): put that back as it was, or {cure.format(key=frozen.key)}"
        ) from error
