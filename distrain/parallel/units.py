"""What a sharded model gathers together: its repeated blocks, and the rest."""

from __future__ import annotations

from torch import nn

from distrain.networks.blocks import block_classes


def has_rows(parameter: nn.Parameter) -> bool:
    """Whether a parameter can be cut into rows; FSDP2 refuses those without, or does not gather them."""
    return parameter.dim() > 0 and parameter.numel() > 0


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Return what is gathered together besides the rest of the model: its repeated blocks, inner ones first.

    None that shares a weight with what is outside of it: a weight can be in one unit alone.
    """
    kinds = tuple(block_classes(model))
    units = {id(module): module for module in model.modules() if isinstance(module, kinds) and module is not model}
    while True:
        owners: dict[int, set[int]] = {}
        _note_owners(model, id(model), units, owners, set())
        shared = set().union(*(unit_ids for unit_ids in owners.values() if len(unit_ids) > 1))
        if not shared & units.keys():
            # an inner one comes later in `modules()` than what is around it
            return list(units.values())[::-1]
        units = {key: module for key, module in units.items() if key not in shared}


def _note_owners(
    module: nn.Module, unit: int, units: dict[int, nn.Module], owners: dict[int, set[int]], seen: set[tuple[int, int]]
) -> None:
    """Add to `owners` the units by which each parameter is held."""
    unit = id(module) if id(module) in units else unit
    if (id(module), unit) in seen:
        return
    seen.add((id(module), unit))
    for parameter in module.parameters(recurse=False):
        if has_rows(parameter):
            owners.setdefault(id(parameter), set()).add(unit)
    for child in module.children():
        _note_owners(child, unit, units, owners, seen)
