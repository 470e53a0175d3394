"""Transforms of inputs, in whole batches, as a function of (seed, epoch, sample id) alone.

transform.py  the transforms of a recipe, in order
steps.py      each transform, torchvision's or the user's; only recipes with transforms import torchvision
"""

from distrain.datasets.transforms.transform import Images, Step, Transform

__all__ = ["Images", "Step", "Transform"]
