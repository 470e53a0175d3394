"""All that differs between the ways of spreading a run over processes.

Building the `Accelerator`, checking that the world is the one that was asked for, wrapping a model, agreeing on
numbers, and turning the state of training into flat pieces for `distrain.checkpoint` and back. The other rooms ask a
`World` and never look at a strategy.

    launched.py       the world and the strategy that were asked for
    configuration.py  the launcher's own configuration, read where it was written
    configured.py     what that asks for, beside the recipe
    world.py          `World`: the processes, and how they agree
    precision.py      the arithmetic of the forward pass, and loss scaling
    engine.py         `Engine`: what every strategy is to the loop
    replicated.py     one process, and DistributedDataParallel
    fsdp2.py          FSDP2: rows of each parameter
    zero.py           ZeRO-1, 2 and 3: equal flat parts
    state.py          the state of training as flat ranges of named tensors
"""

from torch.distributed.device_mesh import init_device_mesh

from distrain.config import OptimSection, UserError, is_object_spec
from distrain.optim import dtensor_problem, sharding_problem
from distrain.parallel.accelerate_config import Configuration, Stated, read_configuration, take_over
from distrain.parallel.accelerate_settings import disagreements, strategy_wishes, unused
from distrain.parallel.comm import World, open_world
from distrain.parallel.contents import prepare_to_save
from distrain.parallel.ddp import Replicated
from distrain.parallel.state import TrainingState, check_fit, fill, load_weights
from distrain.parallel.strategy import FLAGS, Engine, Plan, with_arithmetic
from distrain.parallel.strategy_spec import (
    OFFLOADS,
    STRATEGIES,
    Asked,
    Wish,
    check_precision,
    check_world,
    processes_asked,
    settle,
)
from distrain.system.environment import Environment, launcher_argv

__all__ = [
    "FLAGS",
    "OFFLOADS",
    "STRATEGIES",
    "Asked",
    "Configuration",
    "Engine",
    "Environment",
    "Plan",
    "Stated",
    "TrainingState",
    "Wish",
    "World",
    "build_engine",
    "check_fit",
    "check_precision",
    "check_world",
    "disagreements",
    "fill",
    "launcher_argv",
    "load_weights",
    "open_world",
    "prepare_to_save",
    "processes_asked",
    "read_configuration",
    "settle",
    "strategy_wishes",
    "take_over",
    "unused",
    "with_arithmetic",
]


def build_engine(world: World, plan: Plan) -> Engine:
    """Return the engine of the world's strategy, having seen that it took effect. All ranks call.

    Raises UserError where the strategy cannot do what the plan asks for, RuntimeError where it did not take effect.
    """
    if plan.section is not None:
        _check_optimizer(world, plan.section)
    engine: Engine
    if world.strategy in ("single", "ddp"):
        engine = Replicated(world, plan)
    elif world.strategy == "fsdp2":
        # each of the two takes a second to import, and DeepSpeed may be missing
        from distrain.parallel.fsdp2 import Fsdp2

        engine = Fsdp2(world, plan)
    else:
        from distrain.parallel.zero import Zero

        engine = Zero(world, plan)
    engine.check()
    # building the model has run the user's code
    world.together(world.arithmetic.check_kept)
    return engine


def _check_optimizer(world: World, section: OptimSection) -> None:
    """Raise UserError for an optimizer that would compute something else on shards than on whole parameters."""
    problem = world.together(lambda: sharding_problem(section, world.strategy))
    if problem is None and world.strategy == "fsdp2" and is_object_spec(section.name):
        # of a class of the user's own only trying it tells
        problem = dtensor_problem(section, init_device_mesh(world.device.type, (world.world_size,)))
    if problem is not None:
        raise UserError(problem)
