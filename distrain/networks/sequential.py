"""`sequential`: any layers of torch.nn, listed in the recipe.

    model:
      name: sequential
      layers:
        - Conv2d: {in_channels: 1, out_channels: 16, kernel_size: 3}   # by name
        - {name: BatchNorm2d, num_features: 16}                        # the same, written flat
        - ReLU                                                         # without arguments
        - MaxPool2d: 2                                                 # one argument
        - Residual: [{Conv2d: [16, 16, 3, 1, 1]}, ReLU]                # x + layers(x)
        - Flatten
        - LazyLinear: 10                                               # sizes found from the data

Layers that take a sequence read it as (batch, seq, features), and RNN, LSTM and GRU pass their outputs on without their
states. MultiheadAttention is attention of its input over itself. Besides those of torch.nn there are `Sequential`,
`Residual`, `Last` (the last time step), `Mean` (over `dim`, by default time) and `Transpose` (two dimensions); and
`path/to/file.py:Class` or `package.module:Class` is a layer of your own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import container, loss, rnn
from torch.nn.parameter import is_lazy

from distrain.config import UserError, close_names, is_object_spec, resolve_object
from distrain.config.registry import models
from distrain.networks.meta_device import is_building_on_meta


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, super().forward(x))


class Last(nn.Module):
    """The last time step: (batch, seq, features) -> (batch, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


class Mean(nn.Module):
    """The mean over one dimension, by default time: (batch, seq, features) -> (batch, features)."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


class Transpose(nn.Module):
    """Swaps two dimensions, such as (batch, channels, length) and (batch, length, channels)."""

    def __init__(self, dim0: int = 1, dim1: int = 2):
        super().__init__()
        self.dim0, self.dim1 = dim0, dim1

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(self.dim0, self.dim1)


class _Outputs:
    """Returns the outputs of a recurrent layer without its states."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x)[0])  # type: ignore[misc]


class RNN(_Outputs, nn.RNN):  # type: ignore[misc]
    """nn.RNN: (batch, seq, features) -> (batch, seq, hidden)."""


class LSTM(_Outputs, nn.LSTM):  # type: ignore[misc]
    """nn.LSTM: (batch, seq, features) -> (batch, seq, hidden)."""


class GRU(_Outputs, nn.GRU):  # type: ignore[misc]
    """nn.GRU: (batch, seq, features) -> (batch, seq, hidden)."""


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention of its input over itself: (batch, seq, embed_dim) -> the same."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _defined_in(kind: Any, module: ModuleType) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__


_OURS: dict[str, type[nn.Module]] = {
    layer.__name__: layer for layer in (Residual, Last, Mean, Transpose, RNN, LSTM, GRU, MultiheadAttention)
}
_BATCH_FIRST = (nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention, nn.TransformerEncoderLayer)

_NOT_LAYERS = (
    *(kind for module in (container, loss) for kind in vars(module).values() if _defined_in(kind, module)),
    *(rnn.RNNCellBase, nn.AdaptiveLogSoftmaxWithLoss, nn.DataParallel),
    *(nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
    *(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, nn.Bilinear, nn.CosineSimilarity, nn.PairwiseDistance),
)


@functools.cache
def layer_classes() -> dict[str, type[nn.Module]]:
    """Return the valid `layers` by name: the classes of torch.nn that map one tensor to one, and the layers above."""
    known: dict[str, type[nn.Module]] = {}
    for name, kind in vars(nn).items():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            bare = kind in (nn.Module, rnn.RNNBase)
            if kind is nn.Sequential or not (bare or issubclass(kind, _NOT_LAYERS)):
                known[name] = kind
    return known | _OURS


def layer_class(name: str, where: str) -> type[nn.Module]:
    """Return the class of a layer; `where` is its place in the recipe, for the error."""
    known = layer_classes()
    if name in known:
        return known[name]
    if is_object_spec(name):
        found = resolve_object(name)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UserError(f"{where}: {name} is not a class of nn.Module but {type(found).__name__}")
        return found
    if isinstance(getattr(nn, name, None), type):
        raise UserError(
            f"{where}: {name} does not map one tensor to one, so it cannot be in a list of layers; write your own "
            "class that uses it and name that, as path/to/file.py:Class"
        )
    raise UserError(f"{where}: torch.nn has no layer {name!r}{close_names(name, known)}")


_FORMS = "expected ReLU, {Linear: [64, 10]}, {Linear: {in_features: 64, out_features: 10}} or {name: Linear, ...}"


def _read(item: Any, where: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the name, positional and named arguments of one item of `layers`."""
    if isinstance(item, str):
        return item, (), {}
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        return item["name"], (), {key: value for key, value in item.items() if key != "name"}
    if isinstance(item, Mapping) and len(item) == 1:
        name, given = next(iter(item.items()))
        if isinstance(name, str):
            if isinstance(given, Mapping):
                return name, (), dict(given)
            if isinstance(given, list | tuple):
                return name, tuple(given), {}
            return name, () if given is None else (given,), {}
    raise UserError(f"{where}: {item!r} is not a layer; {_FORMS}")


def shown(name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a call as Python would write it."""
    parts = [repr(value) for value in args] + [f"{key}={value!r}" for key, value in (kwargs or {}).items()]
    return f"{name}({', '.join(parts)})"


def _signature(kind: type[nn.Module]) -> inspect.Signature:
    # torch's recurrent layers pass (*args, **kwargs) to their base
    base = rnn.RNNBase if issubclass(kind, rnn.RNNBase) else kind
    signature = inspect.signature(base)
    hidden = ("mode", "device", "dtype")
    kept = [parameter for name, parameter in signature.parameters.items() if name not in hidden]
    if issubclass(kind, _BATCH_FIRST):
        kept = [p.replace(default=True) if p.name == "batch_first" else p for p in kept]
    return signature.replace(parameters=kept, return_annotation=inspect.Signature.empty)


def build_layer(item: Any, where: str) -> nn.Module:
    """Return the layer that one item of `layers` describes; `where` is its place in the recipe, for errors."""
    name, args, kwargs = _read(item, where)
    kind = layer_class(name, where)
    if issubclass(kind, nn.Sequential) and kind in (nn.Sequential, Residual):
        inner = kwargs.get("layers", args) if set(kwargs) <= {"layers"} else None
        if not isinstance(inner, list | tuple) or not inner:
            raise UserError(f"{where}: {name} takes a list of layers, as in {{{name}: [ReLU, ...]}}")
        return kind(*(build_layer(part, f"{where}.{name}[{place}]") for place, part in enumerate(inner)))
    # an argument that is itself a layer, such as the encoder_layer of TransformerEncoder
    kwargs = {key: build_layer(value, f"{where}.{key}") if _is_layer(value) else value for key, value in kwargs.items()}
    args = tuple(
        build_layer(value, f"{where}.{name}[{i}]") if _is_layer(value) else value for i, value in enumerate(args)
    )
    signature = _signature(kind) if kind.__module__.startswith(("torch.", __name__)) else inspect.signature(kind)
    try:
        signature.bind(*args, **kwargs)
        if issubclass(kind, _BATCH_FIRST):
            bound = signature.bind(*args, **kwargs)
            kwargs = {"batch_first": True} | kwargs if "batch_first" not in bound.arguments else kwargs
        return kind(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        unknown = [key for key in kwargs if key not in signature.parameters]
        takes = f"it takes {name}{signature}"
        hint = close_names(unknown[0], signature.parameters, takes) if unknown else f"; {takes}"
        raise UserError(f"{where}: {shown(name, args, kwargs)} cannot be built: {error}{hint}") from error


def _is_layer(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in layer_classes()


def _build_layers(layers: Any) -> tuple[list[nn.Module], list[str]]:
    if not isinstance(layers, list | tuple) or not layers:
        return [], [f"model.layers: {layers!r} is not a list of layers; {_FORMS}, for each"]
    built, problems = [], []
    for place, item in enumerate(layers):
        try:
            built.append(build_layer(item, f"model.layers[{place}]"))
        except UserError as error:
            problems.append(str(error))
    return built, problems


def check_layers(layers: Any) -> list[str]:
    """Return the problems of each of `layers`; allocates no parameters."""
    with torch.device("meta"):
        return _build_layers(layers)[1]


@models.register("sequential")
def sequential(
    layers: Sequence[Any],
    input_shape: Sequence[int] | None = None,
    vocab_size: int | None = None,
    num_outputs: int | None = None,
) -> nn.Module:
    """Any layers of torch.nn one after the other, listed in the recipe."""
    built, problems = _build_layers(layers)
    if problems:
        raise UserError("\n".join(problems))
    model = nn.Sequential(*built)
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if is_building_on_meta() and not lazy:
        return model  # the process that builds the values too tries the layers
    if input_shape is None:
        if lazy:
            raise UserError(
                f"model.layers: the shape of a sample is unknown, so {lazy[0]!r} cannot be sized; give the "
                "sizes of every layer in place of the Lazy ones"
            )
        return model
    tokens = vocab_size is not None or isinstance(model[0], nn.Embedding | nn.EmbeddingBag)
    sample = torch.zeros(2, *input_shape, dtype=torch.int64 if tokens else torch.get_default_dtype())
    try:
        output = _dry_run(model, sample, layers)
    except UserError as error:
        if not is_building_on_meta():
            raise
        raise UserError("its Lazy layers are sized by a sample, which its other layers cannot compute there") from error
    if num_outputs is not None and num_outputs > max([1, *output.shape[1:]]):
        raise UserError(
            f"model.layers: the last layer gives {_shape(output)}, and the task needs {num_outputs} outputs for each "
            "sample; change the size of the last layer that has one"
        )
    return model


def _shape(x: Any) -> str:
    return f"(batch, {', '.join(map(str, x.shape[1:]))})" if isinstance(x, Tensor) else type(x).__name__


def _dry_run(model: nn.Sequential, sample: Tensor, layers: Sequence[Any]) -> Tensor:
    """Pass a sample through every layer, which sizes the Lazy ones; changes nothing else."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    training = model.training
    with torch.no_grad():
        output = _walk(model.eval(), sample, layers, "model.layers")
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    model.train(training)
    return output


def _walk(model: nn.Sequential, x: Tensor, items: Sequence[Any], where: str) -> Tensor:
    start = x
    for place, (layer, item) in enumerate(zip(model, items, strict=True)):
        name, args, kwargs = _read(item, where)
        if type(layer) in (nn.Sequential, Residual):
            x = _walk(cast(nn.Sequential, layer), x, kwargs.get("layers", args), f"{where}[{place}].{name}")
        else:
            x = _step(layer, x, f"{where}[{place}]: {shown(name, args, kwargs)} received {_shape(x)}")
    if isinstance(model, Residual):
        return _step(lambda y: start + y, x, f"{where}: its input is {_shape(start)} and its layers give {_shape(x)}")
    return x


def _step(layer: Callable[[Tensor], Any], x: Tensor, what: str) -> Tensor:
    try:
        output = layer(x)
    except Exception as error:
        raise UserError(f"{what}: {error}") from error
    if not isinstance(output, Tensor):
        raise UserError(f"{what}: it gives {type(output).__name__}, and the next layer takes one tensor")
    return output
