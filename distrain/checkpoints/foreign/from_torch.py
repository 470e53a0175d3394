"""A file of torch.save: a state dict, or one among other things, as most trainers write it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distrain.checkpoints.files import open_descriptor
from distrain.checkpoints.foreign.common import TorchFile, add_rest, add_state_dict, basename
from distrain.checkpoints.foreign.optimizers import add_optimizer
from distrain.checkpoints.foreign.pickles import View
from distrain.checkpoints.sources import Source
from distrain.config.registry import formats
from distrain.system.errors import UserError, some

MODEL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights")
AVERAGE = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "ema_model")
_SHADOWS = ("shadow", "shadow_params", "ema_weights")
"""Where what keeps an average has it, inside of its own state."""
_DEEPEST = 4
OPTIMIZER = ("optimizer_state_dict", "optimizer_state", "optimizer", "optim", "optimizer_states")
STEP = ("step", "global_step", "global_steps", "iteration", "iter", "num_updates")
"""The usual keys under which trainers save these together."""
CURRENT = "current_model_state"
"""Where Lightning's WeightAveraging puts the weights: it saves their average as `state_dict`."""
INDEX = "pytorch_model.bin.index.json"


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.suffix in (".ckpt", ".pt", ".pth", ".bin"))


def is_torch(path: Path) -> bool:
    """Whether this is a file of torch.save, an index of several, or a folder with one."""
    if path.is_dir():
        return len(_files(path)) == 1
    if path.name.endswith(".index.json"):
        return True
    descriptor = open_descriptor(path)
    start = os.pread(descriptor, 4, 0)
    os.close(descriptor)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


@formats.register("torch", about="a file of torch.save, as Lightning's .ckpt is", order=4, found=is_torch, folder=False)
def open_torch(source: Source, path: Path, *, trust: bool) -> None:
    """Add a file, the one in a folder, or the files of an index."""
    if path.name.endswith(".index.json"):
        open_indexed(source, path, trust=trust)
        return
    files = _files(path) if path.is_dir() else [path]
    if len(files) != 1:
        raise UserError(f"{path} is a folder with {len(files)} files of torch.save; name one of them")
    open_file(source, files[0], trust=trust)
    if path.is_dir():
        add_rest(source, path, [files[0].name])


def open_file(source: Source, path: Path, *, trust: bool) -> None:
    """Add the model in one file, and the optimizer, average of the weights, and step that it was saved with."""
    file = TorchFile(source, path, trust=trust)
    state, others = _model(file)
    if isinstance(others.get(CURRENT), dict) and source.wants_optimizer:
        state, others[AVERAGE[0]] = others.pop(CURRENT), state
        source.notes.append(f"state_dict is the moving average, and {CURRENT} the weights, as Lightning saves them")
    elif isinstance(others.get(CURRENT), dict):
        source.notes.append(f"state_dict is taken, which is the moving average; {CURRENT} are the weights beside it")
    add_state_dict(source, file, state)
    averages = list(_averages(others))
    if len(averages) == 1:
        where, average = averages[0]
        add_state_dict(source, file, average, "ema")
        source.notes += [f"the moving average is {where}"] if "." in where else []
    for key, value in others.items():
        if key in OPTIMIZER and not source.wants_optimizer:
            source.skipped.append(f"{path.name}: {key}")
        elif key in OPTIMIZER:
            for one in value if isinstance(value, list) else [value]:
                add_optimizer(source, file, one, f"{path.name}: {key}")
        elif len(averages) == 1 and averages[0][0] == key:
            pass
        elif key in STEP and type(value) is int and 0 <= value < 10**18:
            source.steps[key] = value
        else:
            source.skipped.append(f"{path.name}: {key}")


def _averages(found: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield (path, state dict) of each average of the weights in what lies beside a model, also deeper inside."""
    for key, value in found.items():
        where = f"{path}.{key}" if path else str(key)
        if not isinstance(value, dict) or depth > _DEEPEST or key in OPTIMIZER:
            continue
        if key not in AVERAGE:
            yield from _averages(value, where, depth + 1)
            continue
        for _ in range(_DEEPEST):
            if any(isinstance(each, View) and each.shape for each in value.values()):
                yield where, value
                break
            inner = next((each for each in (*MODEL, *AVERAGE, *_SHADOWS) if isinstance(value.get(each), dict)), None)
            if inner is None:
                break
            value, where = value[inner], f"{where}.{inner}"


def open_indexed(source: Source, index: Path, *, trust: bool) -> None:
    """Add the tensors of an index's files, each of which must hold exactly what the index lists."""
    from distrain.checkpoints.foreign.from_safetensors import weight_map

    for name, expected in weight_map(index).items():
        file = TorchFile(source, index.parent / basename(name, index, "a file"), trust=trust)
        state = _model(file)[0]
        if odd := sorted({str(key) for key, value in state.items() if isinstance(value, View)} ^ expected):
            raise UserError(
                f"{file.path}: its tensors are not those that {index.name} lists for it, such as {odd[0]!r}"
            )
        add_state_dict(source, file, state)


def _model(file: TorchFile) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the state dict in a file, and whatever was saved beside it."""
    content = file.root
    others: dict[Any, Any] = {}
    for _ in range(4):
        if not isinstance(content, dict):
            break
        key = next((key for key in MODEL if isinstance(content.get(key), dict)), None) or _around(content)
        if key is None:
            break
        others |= {str(name): value for name, value in content.items() if name != key}
        content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, View) for value in content.values()):
        found = some(map(str, content), 8) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{file.path}: found {found or 'an empty mapping'}; expected a state dict (names and tensors), or one "
            f"under {', '.join(MODEL)}"
        )
    return content, others


def _around(content: Mapping[Any, Any]) -> Any:
    """Return the key of the one mapping around a model and what lies beside it, such as Composer's `state`."""
    if any(isinstance(value, View) for value in content.values()):
        return None
    keys = [
        key
        for key, value in content.items()
        if isinstance(value, dict)
        and key not in {*AVERAGE, *OPTIMIZER}
        and any(isinstance(value.get(k), dict) for k in MODEL)
    ]
    return keys[0] if len(keys) == 1 else None
