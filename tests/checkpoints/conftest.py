"""Real folders of other trainers, each written once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_folders
import pytest
from foreign_folders import ZERO
from worlds import in_world


@dataclass(frozen=True)
class Written:
    """A folder, and what rank 0 held when it was written."""

    path: Path
    state: Any


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Return a function from the kind of a folder to the folder, which must not be changed."""
    made: dict[str, Written] = {}

    def make(kind: str) -> Written:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            if kind in ZERO:
                world_size, stage, options = ZERO[kind]
                options = pickle.loads(pickle.dumps(options))
                state = in_world(world_size, foreign_folders.write_deepspeed, str(path), stage, options)[0]
                assert state["stage"] == stage
            elif kind == "fsdp":
                kinds = ["SHARDED_STATE_DICT", "FULL_STATE_DICT"]
                state = in_world(2, foreign_folders.write_fsdp, str(path), kinds)[0]
            elif kind == "fsdp1":
                state = in_world(2, foreign_folders.write_fsdp1, str(path))[0]
            elif kind == "dcp":
                state = in_world(2, foreign_folders.write_dcp, str(path))[0]
            else:
                state = in_world(1, foreign_folders.write_plain, str(path))[0]
            made[kind] = Written(path, state)
        return made[kind]

    return make
