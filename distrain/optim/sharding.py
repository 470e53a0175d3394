"""Which optimizers give the same result on shards of the parameters, found by trying.

ZeRO gives an optimizer flat pieces of all parameters laid end to end; FSDP2 gives it DTensors, of which each rank holds
some rows. An elementwise optimizer is not affected. One that uses whole matrices, or all elements together, silently
computes something else on flat pieces. It is tried on small parameters before a run starts.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrain.config import OptimSection, PartSection, UserError
from distrain.config.strategies import STRATEGIES
from distrain.optim.muon import Muon
from distrain.optim.optimizers import build_optimizer

_SCALES = (1.0, 30.0, 0.03, 1.0)
"""Factor of each step's gradients: some optimizers treat only large ones specially."""
_TOLERANCE = 1e-9
"""Largest difference relative to the update; in fp64 rounding is far below."""

ATTEMPT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What optimizers raise where they cannot take a step; NotImplementedError is a RuntimeError."""


class _Parameters(nn.Module):
    """Parameters on their own, named 0, 1, ..."""

    def __init__(self, values: list[Tensor]):
        super().__init__()
        for index, value in enumerate(values):
            self.register_parameter(str(index), nn.Parameter(value.clone()))


def toy_optimizer(section: OptimSection, shapes: list[tuple[int, ...]]) -> tuple[Optimizer, list[nn.Parameter]]:
    """Return the recipe's optimizer of parameters of these shapes (fp64, on the CPU), and these. Raises UserError."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    model = _Parameters(values)
    return build_optimizer(model, without_names(section)), list(model.parameters())


def toy_steps(optimizer: Optimizer, parameters: list[nn.Parameter], count: int = 1) -> None:
    """Take steps with gradients that depend on the shapes only."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def toy_shapes(section: OptimSection) -> list[tuple[int, ...]]:
    """Return the shapes of a matrix and a vector, or of matrices for an optimizer that takes no vectors."""
    shapes: list[tuple[int, ...]] = [(6, 5), (4,)]
    try:
        toy_optimizer(section, shapes)
    except UserError:
        return [(6, 5), (2, 3)]
    return shapes


def without_names(section: OptimSection) -> OptimSection:
    """Return the section without the names of parameters, with the largest weight decay of any of them."""
    decays = [section.weight_decay, *(group.weight_decay or 0.0 for group in section.groups)]
    update: dict[str, Any] = {
        "groups": [],
        "freeze": [],
        "layer_decay": None,
        "no_decay": [],
        "weight_decay": max(decays),
    }
    if isinstance(section, PartSection):
        update["params"] = "*"
    if isinstance(others := section.args.get("others"), dict):
        update["others"] = {key: value for key, value in others.items() if key != "params"}
    return section.model_copy(update=update)


# --------------------------------------------------------------------------------------------------------------------
# Flat pieces


def is_elementwise(section: OptimSection) -> bool:
    """Return whether the recipe's optimizer gives the same result on flat pieces of its parameters as on whole ones.

    Each piece has its own optimizer, as on each rank, so an optimizer that uses all elements together, such as the norm
    of the whole gradient, is found too. Raises UserError if the optimizer cannot be built at all.
    """
    shapes = toy_shapes(section)
    optimizer, parameters = toy_optimizer(section, shapes)
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    # ranges of all parameters laid end to end: the second holds the end of one and the start of the next
    cuts = [0, 11, 32, len(start)]
    pieces = [start[low:high].clone() for low, high in itertools.pairwise(cuts)]
    models = [_Parameters([piece]) for piece in pieces]
    try:
        optimizers = [build_optimizer(model, without_names(section)) for model in models]
    except UserError:
        return False
    generator = torch.Generator().manual_seed(1)
    for scale in _SCALES:
        gradient = torch.randn(len(start), generator=generator, dtype=torch.float64) * scale
        offset = 0
        for parameter in parameters:
            parameter.grad = gradient[offset : offset + parameter.numel()].reshape(parameter.shape).clone()
            offset += parameter.numel()
        optimizer.step()
        for model, (low, high), each in zip(models, itertools.pairwise(cuts), optimizers, strict=True):
            (piece,) = model.parameters()
            piece.grad = gradient[low:high].clone()
            try:
                each.step()
            except ATTEMPT_ERRORS:
                return False
    whole = torch.cat([parameter.detach().flatten() for parameter in parameters])
    cut = torch.cat([parameter.detach() for model in models for parameter in model.parameters()])
    return bool((whole - cut).norm() <= _TOLERANCE * (whole - start).norm())


def odd_states(section: OptimSection) -> dict[str, tuple[int, ...]]:
    """Return {name: shape for a parameter (6, 5)} of state that has neither its parameter's shape nor one element.

    Raises UserError if the optimizer cannot be built at all.
    """
    optimizer, parameters = toy_optimizer(section, toy_shapes(section))
    toy_steps(optimizer, parameters, 2)
    return {
        key: tuple(value.shape)
        for key, value in optimizer.state[parameters[0]].items()
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameters[0].shape
    }


def sharding_problem(section: OptimSection, strategy: str) -> str | None:
    """Return why the recipe's optimizer cannot be used under a strategy, or None.

    `strategy`: single, ddp, zero1, zero2, zero3 or fsdp2. Under fsdp2 a user's class that uses whole matrices may
    support DTensors: `dtensor_problem` tries it in the world itself. Raises UserError if the optimizer cannot be built
    at all.
    """
    if not STRATEGIES[strategy].shards:
        return None
    optimizer, _ = toy_optimizer(section, toy_shapes(section))
    if isinstance(optimizer, Muon):
        return None  # it is given whole matrices, each by one rank
    torchs_own = type(optimizer).__module__.startswith("torch.optim")
    if strategy == "fsdp2":
        if torchs_own and section.args.get("fused") and type(optimizer).__name__ in ("SGD", "Adagrad"):
            return f"optim.fused: torch has no fused {section.name} for the shards of fsdp2; remove it"
        if not torchs_own or is_elementwise(section):
            return None
        return (
            f"optim.name: {section.name} uses whole matrices, which torch's cannot do with the shards of fsdp2; "
            "use ddp, or adamw"
        )
    if not is_elementwise(section):
        return (
            f"optim.name: {section.name} uses whole matrices, or all elements together, and {strategy} gives it flat "
            "pieces, on which it computes something else; use ddp"
            + (", or adamw" if torchs_own else " or fsdp2, or adamw")
        )
    if odd := odd_states(section):
        shown = ", ".join(f"{key} {shape}" for key, shape in odd.items())
        return (
            f"optim.name: {section.name} has state that is not of its parameter's shape (for (6, 5): {shown}), which "
            f"cannot be rebuilt from the flat pieces of {strategy}; use ddp or fsdp2, or adamw"
        )
    return None


# --------------------------------------------------------------------------------------------------------------------
# DTensors


def dtensor_problem(section: OptimSection, mesh: Any) -> str | None:
    """Return why the recipe's optimizer cannot be used on the shards of FSDP2, found by trying, or None.

    `mesh`: the device mesh that the model will be sharded over. All ranks call; all get the same.
    """
    from torch.distributed.fsdp import fully_shard  # a second to import, and only sharded models need it
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    # uneven rows, and fewer of them than there are ranks
    shapes = [(7, 5), (3, 7), (1, 3), *([(7,), (1,)] if len(toy_shapes(section)[1]) == 1 else [])]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(mesh.device_type) for shape in shapes]
    whole, sharded = _Parameters(start), _Parameters(start)
    fully_shard(sharded, mesh=mesh)
    optimizers = [build_optimizer(model, without_names(section)) for model in (whole, sharded)]
    problem = None
    try:
        for scale in _SCALES:
            for parameter, shards in zip(whole.parameters(), sharded.parameters(), strict=True):
                assert isinstance(shards, DTensor), "fully_shard makes them"
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.grad = gradient.to(mesh.device_type)
                shards.grad = distribute_tensor(parameter.grad, mesh, shards.placements)
            for optimizer in optimizers:
                optimizer.step()
    except ATTEMPT_ERRORS as error:
        problem = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
    problems: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(problems, problem)
    problem = next((each for each in problems if each is not None), None)
    if problem is None:
        for parameter, shards, before in zip(whole.parameters(), sharded.parameters(), start, strict=True):
            assert isinstance(shards, DTensor)
            moved = (parameter - before).norm()
            if not (parameter - shards.full_tensor()).norm() <= _TOLERANCE * moved:
                problem = "computes something else than on whole parameters"
    return problem and f"optim.name: on the shards of fsdp2 {section.name} {problem}; use ddp, or adamw"
