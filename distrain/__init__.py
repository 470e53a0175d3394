"""distrain: distributed training of PyTorch models from one recipe."""

__version__ = "0.1.0"
