"""Losses by name, as sums and counts.

A loss returns a sum and the count that it is over. The global sum divided by the global count is exactly what the torch
class returns with reduction="mean" on all the data at once, however the data is cut into batches, micro-batches and
ranks. The count depends on the targets alone, so a training step sums it over ranks before the backward pass.

What is counted, as in torch's means:
    classes   cross entropy, NLL: the targets that are not `ignore_index`, each with the weight of its class
    elements  the elements of the targets (MSE, BCE, ...)
    rows      the samples (margins over classes, triplets, CTC, a user's loss)

interface.py  `Loss`
classes.py    cross entropy and NLL
chunked.py    cross entropy of a linear layer's outputs, in chunks of rows
elements.py   the other losses of torch.nn
user.py       users' losses
shapes.py     whether outputs fit targets
building.py   losses by name, built from a recipe
"""

from distrain.optim.losses.building import build_loss, check_loss
from distrain.optim.losses.classes import class_dim
from distrain.optim.losses.interface import NO_TARGET, Loss, Outputs
from distrain.optim.losses.shapes import fitted

__all__ = ["NO_TARGET", "Loss", "Outputs", "build_loss", "check_loss", "class_dim", "fitted"]
