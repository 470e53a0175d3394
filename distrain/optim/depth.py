"""Learning rates that fall from block to block, from a model's last to its first.

As in ELECTRA (Clark et al., 2020) and BEiT (Bao et al., 2021): of n blocks, what comes before the first has the factor
d ** (n + 1), block i, from 0, has d ** (n - i), and what comes after the last has 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from distrain.config import UserError
from distrain.networks.blocks import block_classes, blocks_of
from distrain.networks.calling import unwrap_model
from distrain.optim.averages import canonical_name


@dataclass(frozen=True)
class LayerDepths:
    """The factor of the learning rate of each parameter, by its depth."""

    decay: float
    blocks: tuple[str, ...]
    """The names of the blocks, from the first to the last."""
    kinds: tuple[str, ...]
    """Their classes."""
    depths: Mapping[str, int]
    """0 for parameters before the first block, i + 1 for those of block i, len(blocks) + 1 for those after the last."""

    def scale(self, names: tuple[str, ...]) -> float:
        """Return the factor of a parameter with these names, of which the one nearest to the input counts."""
        return float(self.decay ** (len(self.blocks) + 1 - min(self.depths[name] for name in names)))

    def __str__(self) -> str:
        kinds = " and ".join(self.kinds)
        return (
            f"optim.layer_decay {self.decay:g} over {len(self.blocks)} x {kinds}, {self.blocks[0]} to "
            f"{self.blocks[-1]}: the learning rate is multiplied by {self.decay ** (len(self.blocks) + 1):.3g} before "
            "the first, and by 1 behind the last"
        )


def layer_depths(model: nn.Module, decay: float) -> LayerDepths:
    """Return the depths of a model's parameters, by its repeated blocks (`block_classes`), in the model's order.

    A parameter outside of blocks belongs to the next block that the model registers, such as what reduces an image
    between two stages; those of the model itself, such as a class token, come before the first. Raises UserError for a
    model without repeated blocks.
    """
    model = unwrap_model(model)
    classes = block_classes(model)
    blocks = tuple(canonical_name(name) for name in blocks_of(model, classes))
    if not blocks:
        raise UserError(
            f"optim.layer_decay: {type(model).__name__} has no repeated blocks, by which the depth of a parameter is "
            "found; give optim.groups with lr_scale instead"
        )
    depths: dict[str, int] = {}
    inside = {name: place for place, name in enumerate(blocks)}
    behind = 0  # how many blocks were met
    for full, _ in model.named_parameters(remove_duplicate=False):
        name = canonical_name(full)
        parts = name.split(".")
        place = next((inside[start] for end in range(len(parts)) if (start := ".".join(parts[:end])) in inside), None)
        if place is not None:
            behind = max(behind, place + 1)
            depths[name] = place + 1
        else:
            depths[name] = behind + 1 if behind else 0
    # FSDP2 makes classes of its own of those that it shards
    kinds = tuple(dict.fromkeys(kind.__name__.removeprefix("FSDP") for kind in classes))
    return LayerDepths(decay, blocks, kinds, depths)
