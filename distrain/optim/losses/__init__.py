"""Losses by name, as sums and counts.

A loss here returns the sum of what it measured and the count that the sum is over. One division of the global sum by
the global count gives exactly what the torch class gives with reduction="mean" on all the data at once, however the
data is cut into batches, micro-batches and ranks. The count is known from the targets alone, so a training step can add
it up over ranks before it goes backward.

What the count is over, after torch's own means:
    classes   cross entropy, NLL: the targets that are not `ignore_index`, each with the weight of its class
    elements  the numbers in the targets (MSE, BCE, ...)
    rows      the samples (margins over classes, triplets, CTC, a loss of your own)

interface.py  `Loss`
classes.py    cross entropy and NLL
elements.py   the other losses of torch.nn
own.py        losses of the user's own
shapes.py     whether outputs fit targets
building.py   losses by name, built from a recipe
"""

from distrain.optim.losses.building import build_loss, check_loss
from distrain.optim.losses.classes import class_dim
from distrain.optim.losses.interface import NO_TARGET, Loss, Outputs
from distrain.optim.losses.shapes import fitted

__all__ = ["NO_TARGET", "Loss", "Outputs", "build_loss", "check_loss", "class_dim", "fitted"]
