"""All that differs between the ways of spreading a run over processes.

Building the `Accelerator`, checking that the world is the one that was asked for, wrapping a model, agreeing on
numbers, and turning the state of training into flat pieces for `distrain.checkpoint` and back. The other rooms ask a
`World` and never look at a strategy.

    launched.py       the world and the strategy that were asked for
    configuration.py  the launcher's own configuration, read where it was written
    configured.py     what that asks for, beside the recipe
    world.py          `World`: the processes, and how they agree
    replicated.py     one process, and DistributedDataParallel
    state.py          the state of training as flat ranges of named tensors
"""

from distrain.strategy.configuration import Configuration, Stated, read_configuration, take_over
from distrain.strategy.configured import disagreements, strategy_wishes, unused
from distrain.strategy.launched import (
    OFFLOADS,
    STRATEGIES,
    Asked,
    Environment,
    Wish,
    check_world,
    launcher_argv,
    processes_asked,
    settle,
)
from distrain.strategy.replicated import align_buffers, backward, clip_gradients, prepare, without_sync
from distrain.strategy.state import TrainingState, check_fit, fill, load_weights
from distrain.strategy.world import World, open_world

__all__ = [
    "OFFLOADS",
    "STRATEGIES",
    "Asked",
    "Configuration",
    "Environment",
    "Stated",
    "TrainingState",
    "Wish",
    "World",
    "align_buffers",
    "backward",
    "check_fit",
    "check_world",
    "clip_gradients",
    "disagreements",
    "fill",
    "launcher_argv",
    "load_weights",
    "open_world",
    "prepare",
    "processes_asked",
    "read_configuration",
    "settle",
    "strategy_wishes",
    "take_over",
    "unused",
    "without_sync",
]
