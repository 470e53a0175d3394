"""The files beside a Hugging Face model's weights that are needed to use it. Imports no torch.

Tokenizer, chat template, processor, generation settings: a run copies these from the folder that it starts from, so
that its exports open as that folder did, even when it is gone.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distrain.checkpoints.hiding import hidden
from distrain.system.errors import UserError

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
_MAX_BYTES = 256 << 20
"""Of all of them: the largest tokenizers have some 40 MiB."""


def companions_of(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return {name: file} of these files in a folder, and the names of those that together would be too large."""
    files = {
        str(path.relative_to(folder)): path
        for pattern in _PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and not path.name.endswith(_WEIGHTS)
    }
    kept: dict[str, Path] = {}
    size = 0
    for name, path in sorted(files.items(), key=lambda item: (item[1].stat().st_size, item[0])):
        size += path.stat().st_size
        if size <= _MAX_BYTES:
            kept[name] = path
    return dict(sorted(kept.items())), sorted(files.keys() - kept.keys())


def keep_companions(folder: Path, run: Path) -> list[str]:
    """Copy these files, and config.json, into a run's folder, once; return notes for the user.

    The copy is complete or absent. Raises UserError.
    """
    into = run / FOLDER
    if into.is_dir() or not folder.is_dir():
        return []
    files, skipped = companions_of(folder)
    part = into.with_name(hidden("tmp", FOLDER))
    try:
        part.mkdir(parents=True)
        for name in (CONFIG, *files):
            if (folder / name).is_file():
                (part / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, part / name)
        os.rename(part, into)
    except OSError as error:
        raise UserError(f"{into}: files of {folder} cannot be copied there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    what = f"of {folder}, with more than {_MAX_BYTES >> 20} MiB together, exports will not have: {', '.join(skipped)}"
    return [what] if skipped else []


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that holds a checkpoint."""
    return checkpoint.absolute().parent.parent
