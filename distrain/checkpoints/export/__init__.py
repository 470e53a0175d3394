"""Between checkpoints and what others read and write. Imports no torch, and holds no model in memory.

    export               a checkpoint, distrain's own or a foreign one -> safetensors files or a `.pt`
    find_source          what a command that exports means
    import_checkpoint    a foreign checkpoint -> one of distrain's own
    open_tensors         the tensors of any of them
    open_foreign         where the tensors of a foreign checkpoint lie

Inside: `exporting`, `importing`, `opening` (which format it is), `formats/` (one room for each), `sources` (where
tensors lie), `copying` (from there into one file), `beside` (what else a model of transformers needs), `torch_file`
(what `torch.save` writes), `archive` and `pickles` (what it wrote, opened without running anything).
"""

from __future__ import annotations

from distrain.checkpoints.export.exporting import Exported, export, find_source, made_by_hooks, open_tensors
from distrain.checkpoints.export.importing import Imported, import_checkpoint
from distrain.checkpoints.export.opening import open_foreign

__all__ = [
    "Exported",
    "Imported",
    "export",
    "find_source",
    "import_checkpoint",
    "made_by_hooks",
    "open_foreign",
    "open_tensors",
]
