"""Optimizers, losses, schedules of the learning rate, and the average of the weights.

optimizers.py  optimizers by name, and which parameters are decayed, scaled or frozen
fused.py       the fused step of Adam and AdamW, by its kernel alone
muon.py        Muon, with AdamW for what is no matrix
matrices.py    which parameters are the matrices of hidden layers
losses/        losses by name, as sums and counts, so that one division over the global count gives the mean
schedules.py   the learning rate as a pure function of the step
depth.py       learning rates that fall from block to block
freezing.py    parameters that are not trained before a step
averages.py    the exponential moving average of the weights
sharding.py    which optimizers give the same result where parameters are cut into pieces
sparse.py      embeddings with sparse gradients
several.py     several optimizers, each with parameters of its own
migration.py   what an optimizer can use of the state that another has stored
"""

from distrain.optim.averages import Ema, canonical_name
from distrain.optim.depth import layer_depths
from distrain.optim.freezing import THAW, drop_frozen, is_frozen, thaws
from distrain.optim.fused import FusedStep
from distrain.optim.losses import Loss, build_loss, check_loss
from distrain.optim.migration import StateMigration, plan_migration
from distrain.optim.optimizers import (
    GroupPlan,
    build_optimizer,
    describe_groups,
    frozen_names,
    fused_kernel,
    parameter_plan,
    set_lr,
    unregistered_layers,
)
from distrain.optim.schedules import Schedule, check_schedule, lr_at, resolve_schedule
from distrain.optim.several import (
    OPTIMIZER,
    Optimizers,
    build_optimizers,
    check_optimizers,
    check_parts,
    classes_of,
    full_keys,
    in_part,
    parts_of,
)
from distrain.optim.sharding import dtensor_problem, is_elementwise, sharding_problem
from distrain.optim.sparse import make_dense, sparse_layers

__all__ = [
    "OPTIMIZER",
    "THAW",
    "Ema",
    "FusedStep",
    "GroupPlan",
    "Loss",
    "Optimizers",
    "Schedule",
    "StateMigration",
    "build_loss",
    "build_optimizer",
    "build_optimizers",
    "canonical_name",
    "check_loss",
    "check_optimizers",
    "check_parts",
    "check_schedule",
    "classes_of",
    "describe_groups",
    "drop_frozen",
    "dtensor_problem",
    "frozen_names",
    "full_keys",
    "fused_kernel",
    "in_part",
    "is_elementwise",
    "is_frozen",
    "layer_depths",
    "lr_at",
    "make_dense",
    "parameter_plan",
    "parts_of",
    "plan_migration",
    "resolve_schedule",
    "set_lr",
    "sharding_problem",
    "sparse_layers",
    "thaws",
    "unregistered_layers",
]
