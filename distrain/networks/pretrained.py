"""Opening a folder that save_pretrained wrote with its weights left in their files.

transformers itself builds the model, finds the files, renames, converts, ties and initialises what they do not hold.
Under `distrain.networks.deferred.defer` all of that is on record; what differs is that a large tensor of a file is a
stand-in, and that reading it is an operation of the record, done when a value is asked for.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from distrain.checkpoints.dtypes import DTYPES
from distrain.networks.recorder import Recorder
from distrain.networks.weights import torch_dtype


@contextmanager
def weights_in_their_files() -> Iterator[None]:
    """Let `from_pretrained` leave large tensors in their files where a build is recorded; otherwise change nothing."""
    recorder = Recorder.active()
    if recorder is None:
        yield
        return
    modeling_utils: Any = importlib.import_module("transformers.modeling_utils")
    logging: Any = importlib.import_module("transformers.utils.logging")
    opened, loaded = modeling_utils.safe_open, modeling_utils.load_state_dict

    def safe_open(*args: Any, **kwargs: Any) -> _File:
        return _File(recorder, opened(*args, **kwargs))

    def load_state_dict(file: Any, map_location: Any = "cpu", *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            content: dict[str, Any] = loaded(file, map_location, *args, **kwargs)
        if str(file).endswith(".safetensors") or map_location == "meta":
            return content
        if not zipfile.is_zipfile(file):
            raise recorder.lost(f"{file} is in the format before PyTorch 1.6, which is read all at once")
        return {name: _mapped(recorder, each) if isinstance(each, Tensor) else each for name, each in content.items()}

    # a bar would count what is read, which is nothing yet, and start a thread
    bar = logging.set_tqdm_hook(lambda make, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    threads = os.environ.get(_NO_THREADS)
    modeling_utils.safe_open, modeling_utils.load_state_dict = safe_open, load_state_dict
    os.environ[_NO_THREADS] = "1"  # a record is of one thread
    try:
        yield
    finally:
        modeling_utils.safe_open, modeling_utils.load_state_dict = opened, loaded
        logging.set_tqdm_hook(bar)
        del os.environ[_NO_THREADS]
        if threads is not None:
            os.environ[_NO_THREADS] = threads


_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


class _Stored:
    """A tensor in a file, as transformers takes one: by an index."""

    def __init__(self, recorder: Recorder, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]):
        self._recorder, self._shape, self._dtype, self._read = recorder, shape, dtype, read

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: Any) -> Tensor:
        whole = self._recorder.later(self._shape, self._dtype, self._read)
        return whole if index is ... else whole[index]


class _Slice(_Stored):
    """One in a safetensors file."""

    def __init__(self, recorder: Recorder, file: Any, name: str):
        self._slice = file.get_slice(name)
        stored = self._slice.get_dtype()
        if stored not in DTYPES or DTYPES[stored].pair:
            raise recorder.lost(f"{name} is stored as {stored}")
        # a copy: what the file gives is a piece of its mapping, which is the same for all who ask
        super().__init__(
            recorder, tuple(self._slice.get_shape()), torch_dtype(stored), lambda: file.get_tensor(name).clone()
        )

    def get_dtype(self) -> str:
        return str(self._slice.get_dtype())


def _mapped(recorder: Recorder, tensor: Tensor) -> _Stored:
    return _Stored(recorder, tuple(tensor.shape), tensor.dtype, tensor.contiguous().clone)


class _File:
    """An open safetensors file. It stays open, for it is read later."""

    def __init__(self, recorder: Recorder, file: Any):
        self._recorder, self._file = recorder, file

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._recorder, self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        pass
