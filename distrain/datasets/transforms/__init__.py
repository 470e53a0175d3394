"""What is done to inputs, in whole batches, as a function of (seed, epoch, sample id) alone.

transform.py  the transforms of a recipe, in order
steps.py      each of them: torchvision's or the user's; torchvision takes seconds to import,
              which only recipes with transforms wait for
"""

from distrain.datasets.transforms.transform import Images, Step, Transform

__all__ = ["Images", "Step", "Transform"]
