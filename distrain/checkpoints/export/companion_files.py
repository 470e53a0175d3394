"""What lies beside the weights of a model of Hugging Face's and is needed to use it. Imports no torch.

Tokenizer, chat template, processor, generation settings: a run keeps a copy of these from its first start, so that its
exports open as the folder did that it started from, wherever that is by then.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distrain.checkpoints.writing import hidden
from distrain.config import UserError

FOLDER = "transformers"
"""In the run's folder."""
CONFIG = "config.json"
_PATTERNS = (
    "tokenizer*", "*tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "*.vocab", "*.codes", "normalizer.json", "chat_template*", "*.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json", "processor_config.json",
    "image_processor*.json", "feature_extractor*.json", "label*.json", "id2label.json",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".index.json", ".onnx", ".gguf")
_MOST = 256 << 20
"""Bytes of all of them: the largest tokenizers have some 40 MiB."""


def files_beside(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of these files in a folder, and of those that are left out as all together are too large."""
    names = {
        str(path.relative_to(folder))
        for pattern in _PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and not path.name.endswith(_WEIGHTS)
    }
    kept: list[str] = []
    left: list[str] = []
    size = 0
    for name in sorted(names, key=lambda name: ((folder / name).stat().st_size, name)):
        size += (folder / name).stat().st_size
        (kept if size <= _MOST else left).append(name)
    return sorted(kept), sorted(left)


def keep_beside(folder: Path, run: Path) -> list[str]:
    """Copy these files, and config.json, into a run's folder, once; return what a person should know of it.

    What is there is complete: it gets its name when all of it is copied. Raises UserError.
    """
    into = run / FOLDER
    if into.is_dir() or not folder.is_dir():
        return []
    names, left = files_beside(folder)
    part = into.with_name(hidden("tmp", FOLDER))
    try:
        part.mkdir(parents=True)
        for name in (CONFIG, *names):
            if (folder / name).is_file():
                (part / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, part / name)
        os.rename(part, into)
    except OSError as error:
        raise UserError(f"{into}: files of {folder} cannot be copied there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    what = f"of {folder}, with more than {_MOST >> 20} MiB together, exports will not have: {', '.join(left)}"
    return [what] if left else []


def kept_beside(checkpoint: Path) -> dict[str, Path]:
    """Return {name: file} of what the run of a checkpoint has kept, without config.json, which the checkpoint holds."""
    folder = run_of(checkpoint) / FOLDER
    return {name: folder / name for name in files_beside(folder)[0]} if folder.is_dir() else {}


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint lies in."""
    return checkpoint.absolute().parent.parent
