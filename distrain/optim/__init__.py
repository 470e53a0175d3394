"""How a model is trained: its optimizer, its loss, its learning rate at each step, and the average of its weights.

optimizers.py  optimizers by name, and which parameters are decayed, scaled or frozen
losses/        losses by name, as sums and counts, so that one division over the global count gives the mean
schedules.py   the learning rate as a pure function of the step
averages.py    the exponential moving average of the weights
sharding.py    which optimizers give the same result where parameters are cut into pieces
sparse.py      embeddings with sparse gradients
families.py    what an optimizer can take over from the state of another
"""

from distrain.optim.averages import Ema, canonical_name
from distrain.optim.families import CarryOver, carry_over
from distrain.optim.losses import Loss, build_loss, check_loss
from distrain.optim.optimizers import (
    GroupPlan,
    build_optimizer,
    check_optimizer,
    frozen_names,
    parameter_plan,
    set_lr,
    unregistered_layers,
)
from distrain.optim.schedules import Schedule, check_schedule, lr_at, resolve_schedule
from distrain.optim.sharding import dtensor_problem, is_elementwise, sharding_problem
from distrain.optim.sparse import settle_sparse, sparse_layers

__all__ = [
    "CarryOver",
    "Ema",
    "GroupPlan",
    "Loss",
    "Schedule",
    "build_loss",
    "build_optimizer",
    "canonical_name",
    "carry_over",
    "check_loss",
    "check_optimizer",
    "check_schedule",
    "dtensor_problem",
    "frozen_names",
    "is_elementwise",
    "lr_at",
    "parameter_plan",
    "resolve_schedule",
    "set_lr",
    "settle_sparse",
    "sharding_problem",
    "sparse_layers",
    "unregistered_layers",
]
