"""Exports checkpoints to the files that others read, and imports theirs. Imports no torch; bounded memory.

    export               a checkpoint, distrain's own or a foreign one -> safetensors files or a `.pt`
    import_checkpoint    a foreign checkpoint -> one of distrain's own
    find_source          the checkpoint that a command names
    open_tensors         the tensors of a checkpoint of any format
    open_foreign         where the tensors of a foreign checkpoint lie

exporting.py, importing.py
opening.py          finds out the format, and opens it
copying.py          copies them into new files: cuts the work into streams, which threads take
streams.py          what a stream is; tensors whose elements lie apart
buffered.py         long parts, a buffer at a time
windows.py          short parts, many files at a time
new_files.py        writes new files in any order
companion_files.py  the other files of a transformers model
text_files.py       those of a language model, as it was trained
model_card.py       what stands beside a model in a folder: its facts, its recipe, its card
torch_file.py       writes what `torch.save` writes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distrain.checkpoints.export.exporting import Exported, export, made_by_hooks
from distrain.checkpoints.export.opening import describe, find_source, is_built, open_foreign, open_tensors

if TYPE_CHECKING:
    from distrain.checkpoints.export.importing import Imported, import_checkpoint

__all__ = [
    "Exported",
    "Imported",
    "describe",
    "export",
    "find_source",
    "import_checkpoint",
    "is_built",
    "made_by_hooks",
    "open_foreign",
    "open_tensors",
]


def __getattr__(name: str) -> Any:
    # when asked for: an export needs nothing of what writes checkpoints
    if name not in ("Imported", "import_checkpoint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distrain.checkpoints.export import importing

    return getattr(importing, name)
