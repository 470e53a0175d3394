"""What one rank reads of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distrain.config import Recipe
from distrain.data import build_loader, float_dtype
from distrain.datasets.base import Batch, Data, is_stream
from distrain.datasets.mixing import Mixing
from distrain.datasets.order import SampleOrder
from distrain.datasets.transforms import Transform
from distrain.parallel import World
from distrain.run.micro_batch import CachedMicroBatch


@dataclass(frozen=True)
class DataPipeline:
    """What one rank reads of the data, and in which pieces."""

    recipe: Recipe
    world: World
    data: Data
    transforms: dict[str, Transform]
    """`train`, and `eval` for all other splits."""
    total_steps: int
    micro_batch_size: int
    accumulation: int
    autobatch: CachedMicroBatch | None
    """What `batch.micro: auto` was found to be, where it was tried."""

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """Return the micro-batches of each step from this one on."""
        source = self.data.splits["train"]
        length = len(source) if not is_stream(source) else None
        return build_loader(
            source,
            SampleOrder(length, self.recipe.seed) if length is not None else None,
            recipe=self.recipe,
            rank=self.world.mesh.data_rank,
            world_size=self.world.mesh.data_size,
            micro_batch_size=self.micro_batch_size,
            start_step=start_step,
            stop_step=self.total_steps,
            transform=self.transforms["train"],
            pin_memory=self.world.device.type == "cuda",
            mixing=Mixing.of(self.recipe, self.data.meta, float_dtype(self.recipe)),
        )
