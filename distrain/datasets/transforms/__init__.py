"""Transforms of inputs, in whole batches, as a function of (seed, epoch, sample id) alone.

transform.py  the transforms of a recipe, in order
finishing.py  the last ones, which make floats of bytes
steps.py      each transform, torchvision's or the user's; only recipes with transforms import torchvision
"""

from distrain.datasets.transforms.finishing import FINISH, Finish, finished
from distrain.datasets.transforms.transform import Images, Masks, Step, Transform, Windows, too_small

__all__ = ["FINISH", "Finish", "Images", "Masks", "Step", "Transform", "Windows", "finished", "too_small"]
