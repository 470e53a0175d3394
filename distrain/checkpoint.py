"""Saves, verifies, restores and retires the checkpoints of a run. Imports no torch: bytes in, bytes out.

A checkpoint is a folder `step-00001000` of one safetensors file for each rank and a `MANIFEST.json`. Every tensor is
cut into **pieces**, contiguous ranges of its elements in row-major order; the piece of tensor NAME that begins at
element START is the one-dimensional tensor `NAME@START` of a rank's file. The manifest lists each full tensor's shape,
dtype, role and pieces, each file's size and hash, and its own hash, so that a changed bit anywhere is found. It holds
no pickle: opening a checkpoint runs no code.

A checkpoint is complete or absent. `Saver` writes into `.tmp-…` beside the published ones and publishes by one rename
after everything is on disk; a retired one is first renamed to `.trash-…`. The names of both end in host, process id,
start time of that process and a random token. Rank 0 of a later save removes those of processes of its own host that
have ended, and those of other hosts in which nothing has changed for a day. A step that is saved again replaces the old
one by one exchange of names, or by two renames on file systems without that call.
"""

from __future__ import annotations

from distrain.checkpoints.comparing import Difference, TensorDifference, difference
from distrain.checkpoints.format import (
    CheckpointError,
    CheckpointInfo,
    Communicator,
    Criterion,
    Evaluation,
    FileInfo,
    Frozen,
    FrozenTensor,
    LocalCommunicator,
    Manifest,
    Piece,
    Saved,
    Tensor,
    TensorSpec,
    explain_difference,
    fingerprint,
)
from distrain.checkpoints.reading import (
    Reader,
    checkpoint_folder,
    criterion_of,
    find_best,
    find_checkpoint,
    find_newest,
    list_checkpoints,
    newest_step,
    read_manifest,
    verify,
)
from distrain.checkpoints.writing import Saver

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "Communicator",
    "Criterion",
    "Difference",
    "Evaluation",
    "FileInfo",
    "Frozen",
    "FrozenTensor",
    "LocalCommunicator",
    "Manifest",
    "Piece",
    "Reader",
    "Saved",
    "Saver",
    "Tensor",
    "TensorDifference",
    "TensorSpec",
    "checkpoint_folder",
    "criterion_of",
    "difference",
    "explain_difference",
    "find_best",
    "find_checkpoint",
    "find_newest",
    "fingerprint",
    "list_checkpoints",
    "newest_step",
    "read_manifest",
    "verify",
]
