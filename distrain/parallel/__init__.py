"""All that differs between the ways of spreading a run over processes.

Building the `Accelerator`, checking that the world is the one that was asked for, wrapping a model, agreeing on
numbers, and turning the state of training into flat pieces for `distrain.checkpoint` and back. The other rooms ask a
`World` and never look at a strategy.

    strategy_spec.py        the strategy that was asked for, and whether the world is the one that was asked for
    accelerate_config.py    the launcher's own configuration, read where it was written
    accelerate_settings.py  what that asks for, beside the recipe
    mesh.py                 `Mesh`: who shards, who replicates, and which part of the data each rank reads
    comm.py                 `World`: the processes, and how they agree
    precision.py            the precision of the forward pass, and loss scaling
    copying.py              copies of batches to a GPU beside the kernels
    tuning.py               the recipe's section `tune`, resolved for the device, the precision and the model
    determinism.py          `train.deterministic`
    strategy.py             `Strategy`: what every strategy is to the loop
    model_tensors.py        a model's tensors: moved, given to every rank, remembered for a step that is not taken
    step_record.py          `StepRecord`: what the ranks agree on in each step
    ddp.py                  one process, and DistributedDataParallel
    fsdp2.py                FSDP2: rows of each parameter
    zero.py                 ZeRO-1, 2 and 3: equal flat parts
    stirring.py             weights that begin as zeros, for a moment without them
    collective_forward.py   names the part in which ranks differ, where a forward pass is collective
    materialize.py          building sharded models once in each node, and filling the shards
    unused_parameters.py    which parameters get a gradient, and which are only cast
    state.py                the state of training as flat ranges of named tensors
    matrices.py             whole matrices for an optimizer, from the parts that ranks hold
    shards.py               what a rank holds of a tensor
    optimizer_state.py      what an optimizer keeps, as a checkpoint holds it
    optimizer_restoring.py  an optimizer's state from a checkpoint
    stored.py               from the tensors of a checkpoint to those of a model
    contents.py, nested.py  what of a model and an optimizer that state must hold
"""

import importlib

from distrain.config import OptimSection, UserError
from distrain.config.strategies import OFFLOADS, STRATEGIES
from distrain.optim import dtensor_problem, full_keys, sharding_problem
from distrain.parallel.accelerate_config import Configuration, SourcedValue, read_configuration, take_over
from distrain.parallel.accelerate_settings import disagreements, strategy_wishes, unused
from distrain.parallel.comm import World, open_world
from distrain.parallel.contents import keep_with, keeps_task, prepare_to_save, task_unchanged
from distrain.parallel.mesh import Mesh
from distrain.parallel.parameter_writes import check_hooks
from distrain.parallel.state import TrainingState, load_weights
from distrain.parallel.step_record import StepFlags, StepRecord
from distrain.parallel.stored import check_fit, fill
from distrain.parallel.strategy import BuildSpec, Strategy, with_mixed_precision
from distrain.parallel.strategy_spec import (
    StrategyHint,
    StrategySpec,
    check_precision,
    check_several,
    check_world,
    processes_asked,
    resolve_strategy,
)
from distrain.system.environment import Environment, launcher_argv

__all__ = [
    "OFFLOADS",
    "STRATEGIES",
    "BuildSpec",
    "Configuration",
    "Environment",
    "Mesh",
    "SourcedValue",
    "StepFlags",
    "StepRecord",
    "Strategy",
    "StrategyHint",
    "StrategySpec",
    "TrainingState",
    "World",
    "build_strategy",
    "check_fit",
    "check_hooks",
    "check_precision",
    "check_several",
    "check_world",
    "disagreements",
    "fill",
    "keep_with",
    "keeps_task",
    "launcher_argv",
    "load_weights",
    "open_world",
    "prepare_to_save",
    "processes_asked",
    "read_configuration",
    "resolve_strategy",
    "strategy_wishes",
    "take_over",
    "task_unchanged",
    "unused",
    "with_mixed_precision",
]


def build_strategy(world: World, plan: BuildSpec) -> Strategy:
    """Return the strategy of the world's strategy, having seen that it took effect. All ranks call.

    Raises UserError where the strategy cannot do what the plan asks for, RuntimeError where it did not take effect.
    """
    check_several(plan.sections, world.strategy)
    for name, section in plan.sections.items():
        with full_keys(name):
            _check_optimizer(world, section)
    module, _, name = STRATEGIES[world.strategy].place.partition(":")
    strategy: Strategy = getattr(importlib.import_module(module), name)(world, plan)
    strategy.check()
    # building the model has run the user's code
    world.run_on_all(world.mixed_precision.check_kept)
    return strategy


def _check_optimizer(world: World, section: OptimSection) -> None:
    """Raise UserError for an optimizer that would compute something else on shards than on whole parameters."""
    problem = world.run_on_all(lambda: sharding_problem(section, world.strategy))
    # what torch's others can do depends on its release, and of a class of the user's own only trying it tells
    if problem is None and world.strategy == "fsdp2" and section.name not in ("adamw", "adam", "sgd", "muon"):
        problem = dtensor_problem(section, world.mesh.device_mesh(world.device.type, world.timeout))
    if problem is not None:
        raise UserError(problem)
