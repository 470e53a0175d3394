"""Which optimizers give the same result where parameters are cut into pieces, found by trying.

ZeRO hands an optimizer flat pieces of all parameters laid end to end, and FSDP2 hands it DTensors, of which each rank
holds some rows. An optimizer that treats each number by itself does not notice. One that looks at whole matrices, or
at all numbers together, computes something else on flat pieces without a word. Here it is tried on small parameters
before a run starts.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrain.config import OptimSection, UserError
from distrain.config.strategies import STRATEGIES
from distrain.optim.optimizers import build_optimizer

_SCALES = (1.0, 30.0, 0.03, 1.0)
"""What the gradients of each step are multiplied by: some optimizers act on large ones alone."""
_TOLERANCE = 1e-9
"""Largest difference, as a share of how far the numbers have moved; in fp64 rounding is far below."""


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
    return build_optimizer(model, _anywhere(section)), list(model.parameters())


def toy_steps(optimizer: Optimizer, parameters: list[nn.Parameter], count: int = 1) -> None:
    """Make steps with gradients that depend on nothing but the shapes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def toy_shapes(section: OptimSection) -> list[tuple[int, ...]]:
    """Return the shapes of a matrix and a vector, or of matrices alone for an optimizer that takes no vectors."""
    shapes: list[tuple[int, ...]] = [(6, 5), (4,)]
    try:
        toy_optimizer(section, shapes)
    except UserError:
        return [(6, 5), (2, 3)]
    return shapes


def _anywhere(section: OptimSection) -> OptimSection:
    """Return the section without what names parameters, with as much weight decay as any of them gets."""
    decays = [section.weight_decay, *(group.weight_decay or 0.0 for group in section.groups)]
    return section.model_copy(update={"groups": [], "freeze": [], "no_decay": [], "weight_decay": max(decays)})


# --------------------------------------------------------------------------------------------------------------------
# Flat pieces


def is_elementwise(section: OptimSection) -> bool:
    """Return whether the recipe's optimizer gives the same result on flat pieces of its parameters as on whole ones.

    Each piece has an optimizer of its own, as each rank has: what looks at all numbers together, such as the norm of
    the whole gradient, is found as well. Raises UserError where the section cannot be built at all.
    """
    shapes = toy_shapes(section)
    optimizer, parameters = toy_optimizer(section, shapes)
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    # ranges of all parameters laid end to end: the second holds the end of one and the start of the next
    cuts = [0, 11, 32, len(start)]
    pieces = [start[low:high].clone() for low, high in itertools.pairwise(cuts)]
    models = [_Parameters([piece]) for piece in pieces]
    try:
        optimizers = [build_optimizer(model, _anywhere(section)) for model in models]
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
            except (RuntimeError, ValueError, IndexError, TypeError):
                return False
    whole = torch.cat([parameter.detach().flatten() for parameter in parameters])
    cut = torch.cat([parameter.detach() for model in models for parameter in model.parameters()])
    return bool((whole - cut).norm() <= _TOLERANCE * (whole - start).norm())


def odd_states(section: OptimSection) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an optimizer's state that are neither of their parameter's shape nor single numbers.

    By name, each with the shape it has for a parameter (6, 5). Raises UserError as `is_elementwise`.
    """
    optimizer, parameters = toy_optimizer(section, toy_shapes(section))
    toy_steps(optimizer, parameters, 2)
    return {
        key: tuple(value.shape)
        for key, value in optimizer.state[parameters[0]].items()
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameters[0].shape
    }


def sharding_problem(section: OptimSection, strategy: str) -> str | None:
    """Return why the recipe's optimizer cannot be used under a strategy, or None where nothing speaks against it.

    `strategy`: single, ddp, zero1, zero2, zero3 or fsdp2. Under fsdp2 a class of the user's own that looks at whole
    matrices may know how to do so with DTensors: `dtensor_problem` tries it in the world itself. Raises UserError where
    the section cannot be built at all.
    """
    if not STRATEGIES[strategy].shards:
        return None
    optimizer, _ = toy_optimizer(section, toy_shapes(section))
    torchs_own = type(optimizer).__module__.startswith("torch.optim")
    if strategy == "fsdp2":
        if torchs_own and section.args.get("fused") and type(optimizer).__name__ in ("SGD", "Adagrad"):
            return f"optim.fused: torch has no fused {section.name} for the shards of fsdp2; remove it"
        if not torchs_own or is_elementwise(section):
            return None
        return (
            f"optim.name: {section.name} looks at whole matrices, and torch's cannot do that with the shards of fsdp2; "
            "use ddp, or adamw"
        )
    if not is_elementwise(section):
        return (
            f"optim.name: {section.name} looks at whole matrices, or at all numbers together, and {strategy} gives it "
            "flat pieces, on which it computes something else; use ddp"
            + (", or adamw" if torchs_own else " or fsdp2, or adamw")
        )
    if odd := odd_states(section):
        shown = ", ".join(f"{key} {shape}" for key, shape in odd.items())
        return (
            f"optim.name: {section.name} keeps state that is not of its parameter's shape (for (6, 5): {shown}), which "
            f"cannot be put together again from the flat pieces of {strategy}; use ddp or fsdp2, or adamw"
        )
    return None


# --------------------------------------------------------------------------------------------------------------------
# DTensors


def dtensor_problem(section: OptimSection, mesh: Any) -> str | None:
    """Return why the recipe's optimizer cannot be used on the shards of FSDP2, found by trying, or None.

    `mesh`: the device mesh of all ranks that a model will be sharded over. All ranks call; all get the same.
    """
    from torch.distributed.fsdp import fully_shard  # a second to import, and only sharded models need it
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    # uneven rows, and fewer of them than there are ranks
    shapes = [(7, 5), (3, 7), (1, 3), *([(7,), (1,)] if len(toy_shapes(section)[1]) == 1 else [])]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(mesh.device_type) for shape in shapes]
    whole, sharded = _Parameters(start), _Parameters(start)
    fully_shard(sharded, mesh=mesh)
    optimizers = [build_optimizer(model, _anywhere(section)) for model in (whole, sharded)]
    own = None
    try:
        for scale in _SCALES:
            for parameter, shards in zip(whole.parameters(), sharded.parameters(), strict=True):
                assert isinstance(shards, DTensor), "fully_shard makes them"
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.grad = gradient.to(mesh.device_type)
                shards.grad = distribute_tensor(parameter.grad, mesh, shards.placements)
            for optimizer in optimizers:
                optimizer.step()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
        own = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    found: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(found, own)
    told = next((each for each in found if each is not None), None)
    if told is None:
        for parameter, shards, before in zip(whole.parameters(), sharded.parameters(), start, strict=True):
            assert isinstance(shards, DTensor)
            moved = (parameter - before).norm()
            if not (parameter - shards.full_tensor()).norm() <= _TOLERANCE * moved:
                told = "computes something else than on whole parameters"
    return told and f"optim.name: on the shards of fsdp2 {section.name} {told}; use ddp, or adamw"
