"""distrain: distributed training of PyTorch models from one recipe."""

from typing import Any

__version__ = "0.1.0"

_FOUND_IN = {
    "Callback": "distrain.training.callbacks.base",
    "Duration": "distrain.config",
    "Tracker": "distrain.training.callbacks.trackers",
}


def __getattr__(name: str) -> Any:
    # when asked for: importing distrain costs nothing
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'distrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FOUND_IN[name]), name)
