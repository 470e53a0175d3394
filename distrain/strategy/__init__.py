"""All that differs between the ways of spreading a run over processes.

Building the `Accelerator`, checking that the world is the one that was asked for, wrapping a model, agreeing on
numbers, and turning the state of training into flat pieces for `distrain.checkpoint` and back. The other rooms ask a
`World` and never look at a strategy.

    launched.py    what the launcher said, and the world that was asked for
    world.py       `World`: the processes, and how they agree
    replicated.py  one process, and DistributedDataParallel
    state.py       the state of training as flat ranges of named tensors
"""

from distrain.strategy.launched import Environment, check_world, launcher_argv, processes_asked
from distrain.strategy.replicated import align_buffers, backward, clip_gradients, prepare, without_sync
from distrain.strategy.state import TrainingState, check_fit, fill, load_weights
from distrain.strategy.world import World, open_world

__all__ = [
    "Environment",
    "TrainingState",
    "World",
    "align_buffers",
    "backward",
    "check_fit",
    "check_world",
    "clip_gradients",
    "fill",
    "launcher_argv",
    "load_weights",
    "open_world",
    "prepare",
    "processes_asked",
    "without_sync",
]
