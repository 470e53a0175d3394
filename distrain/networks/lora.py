"""Low-rank adapters (LoRA; Hu et al. 2021) beside the layers of a model, which is frozen itself.

A layer with an adapter computes `layer(x) + alpha / r * B(A(dropout(x)))`. It stays the layer that it is, with the
adapter's matrices in it: so every weight of the model keeps its name, which is the one in the file that it came from,
and those of the adapter have the names that peft writes (`q_proj.lora_A.weight`). peft's own layers would put the
model's weights under other names (`q_proj.base_layer.weight`), in checkpoints, patterns and exports. The initial values
are peft's as well.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain.config import LoraSection, UserError, close_names
from distrain.networks.huggingface import is_transformers
from distrain.networks.quantized import Quantized, check_installed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = [kind.forward for kind in (nn.Linear, nn.Embedding, *_CONVOLUTIONS)]


class _Adapted(nn.Module):
    """A layer with an adapter."""

    weight: nn.Parameter
    lora_dropout: nn.Module
    lora_scale: float

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, of the same shape."""
        raise NotImplementedError


class _Linear(_Adapted):
    """Two linear layers beside one, also of those of transformers whose weight is (in, out)."""

    lora_A: nn.Linear
    lora_B: nn.Linear

    def add(self, r: int, weight: Tensor) -> None:
        rows, columns = weight.shape if isinstance(self, nn.Linear) else weight.T.shape
        self.lora_A = nn.Linear(columns, r, bias=False, dtype=weight.dtype)
        self.lora_B = nn.Linear(r, rows, bias=False, dtype=weight.dtype)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.lora_scale

    def delta(self) -> Tensor:
        found = self.lora_B.weight @ self.lora_A.weight * self.lora_scale
        return found if isinstance(self, nn.Linear) else found.T


class _Embedding(_Adapted):
    """An embedding of `r` numbers, and a matrix that makes the others of them."""

    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def add(self, r: int, weight: Tensor) -> None:
        count, width = weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, count, dtype=weight.dtype))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, r, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        plain: Any = super()
        table: Any = self
        found = functional.embedding(x, self.lora_embedding_A.T, table.padding_idx)
        return plain.forward(x) + found @ self.lora_embedding_B.T * self.lora_scale

    def delta(self) -> Tensor:
        return (self.lora_embedding_B @ self.lora_embedding_A).T * self.lora_scale


class _Convolution(_Adapted):
    """A convolution with `r` channels, and one of size 1 that makes the others of them."""

    lora_A: nn.Module
    lora_B: nn.Module

    def add(self, r: int, weight: Tensor) -> None:
        layer: Any = self
        kind = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
        cut = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        kept: dict[str, Any] = {"bias": False, "dtype": weight.dtype}
        self.lora_A = kind(layer.in_channels, r, layer.kernel_size, **cut, **kept)
        self.lora_B = kind(r, layer.out_channels, 1, **kept)
        nn.init.zeros_(self.lora_B.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.lora_scale

    def delta(self) -> Tensor:
        one, other = self.lora_A.get_parameter("weight"), self.lora_B.get_parameter("weight")
        return (other.flatten(1) @ one.flatten(1)).view_as(self.weight) * self.lora_scale


def _kind(module: nn.Module) -> type[_Adapted] | None:
    """Return what a layer with an adapter is; None where a layer of this kind gets none."""
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return _Linear
    if isinstance(module, nn.Embedding):
        return _Embedding
    return _Convolution if isinstance(module, _CONVOLUTIONS) else None


_CLASSES: dict[tuple[type, type], Any] = {}


def _class_of(kind: type[_Adapted], of: type[nn.Module]) -> Any:
    """Return the class of layers of the class `of` that have adapters, the same each time."""
    if (kind, of) not in _CLASSES:
        _CLASSES[kind, of] = type(f"Lora{of.__name__}", (kind, of), {"__module__": __name__})
    return _CLASSES[kind, of]


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Freeze the model, and add adapters to the layers that the section names, in place.

    Draws the initial values from PyTorch's CPU generator, in the model's order. Before an adapter is trained its layer
    computes what it did before. Raises UserError with every problem of the section.
    """
    if section.bits is not None:
        check_installed()
    chosen, problems = _chosen(model, section)
    if section.bits is not None and chosen and not any(isinstance(each, nn.Linear) for each in chosen.values()):
        problems.append(
            f"model.lora.bits: none of the layers with adapters is an nn.Linear ({next(iter(chosen))} is a "
            f"{type(next(iter(chosen.values()))).__name__}), and only their weights are quantized; remove it"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained: set[int] = set()
    for at, pattern in enumerate(section.train):
        found = [parameters[name] for name in matching_parameters(model, pattern)]
        if not found:
            hint = close_names(pattern, [*parameters, *sorted(f"{name.rpartition('.')[0]}.*" for name in parameters)])
            problems.append(f"model.lora.train[{at}]: no parameter matches {pattern!r}{hint}")
        trained |= {id(each) for each in found}
    holders: dict[int, list[str]] = {}
    for name, each in parameters.items():
        holders.setdefault(id(each), []).append(name)
    for name, module in chosen.items():
        problems += _problems(name, module, section, holders, trained)
    if problems:
        raise UserError("\n".join(problems))
    for parameter in parameters.values():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    for module in chosen.values():
        _add(module, section)
        if section.bits is not None and isinstance(module, nn.Linear):
            _quantize(module, section.bits)
    _call_layers(model)


def matching_parameters(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of the parameters that a pattern of `model.lora.train` matches."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if fnmatchcase(name, pattern)]


def _add(module: nn.Module, section: LoraSection) -> None:
    kind = _kind(module)
    assert kind is not None, "it was chosen"
    module.__class__ = _class_of(kind, type(module))
    adapted: Any = module
    adapted.lora_scale = section.alpha / section.r
    if kind is not _Embedding:
        adapted.lora_dropout = nn.Dropout(section.dropout) if section.dropout else nn.Identity()
    adapted.add(section.r, adapted.weight)


def _quantize(module: nn.Linear, bits: int) -> None:
    of: Any = type(module).__bases__[1]
    if (Quantized, of) not in _CLASSES:
        _CLASSES[Quantized, of] = type(f"Quantized{of.__name__}", (Quantized, of), {"__module__": __name__})
    adapted: Any = module
    adapted.__class__ = _class_of(_Linear, _CLASSES[Quantized, of])
    adapted.quantize(bits)


def _call_layers(model: nn.Module) -> None:
    """Have encoders of torch call their layers in evaluation too; their fast path takes the layers' weights alone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _chosen(model: nn.Module, section: LoraSection) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the layers by their names, in the model's order, and the problems of the targets."""
    layers = {name: module for name, module in model.named_modules() if name and _kind(module) is not None}
    uncalled = set(_uncalled(model))
    if section.targets == "all-linear":
        head = model.get_output_embeddings() if is_transformers(model) else None  # type: ignore[operator]
        whole = {name for name in layers for pattern in section.train if fnmatchcase(f"{name}.weight", pattern)}
        found = {
            name: module
            for name, module in layers.items()
            if _kind(module) is _Linear and module is not head and name not in uncalled | whole
        }
        nothing = "model.lora.targets: the model has no linear layer; name its convolutions or embeddings"
        return found, [] if found else [f"{nothing}, such as {next(iter(layers))}" if layers else nothing]
    problems, names = [], set()
    if not section.targets:
        problems.append("model.lora.targets: found an empty list, expected names of layers, or all-linear")
    modules = dict(model.named_modules())
    for at, target in enumerate(section.targets):
        matching = {name for name in layers if _matches(name, target)}
        if not matching:
            problems.append(f"model.lora.targets[{at}]: {_nothing(target, layers, modules)}")
        if not_called := sorted(matching & uncalled):
            problems.append(
                f"model.lora.targets[{at}]: {not_called[0]} is not called: nn.MultiheadAttention takes its weight, and "
                "an adapter would have no effect; remove it"
            )
        names |= matching
    return {name: module for name, module in layers.items() if name in names}, problems


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def _nothing(target: str, layers: Collection[str], modules: dict[str, nn.Module]) -> str:
    other = next((name for name in modules if name and _matches(name, target)), None)
    if other is not None:
        kind = type(modules[other]).__name__
        return f"{other} is a {kind}; adapters are for linear layers, embeddings and convolutions"
    ends = [name.rpartition(".")[2] for name in layers]
    hint = close_names(target, dict.fromkeys([*ends, *layers]))
    return f"no layer is named {target!r}{hint or f'; the layers are like {next(iter(layers), None)!r}'}"


def _uncalled(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield f"{name}.out_proj".removeprefix(".")


def _problems(
    name: str, module: nn.Module, section: LoraSection, holders: dict[int, list[str]], trained: set[int]
) -> Iterator[str]:
    layer: Any = module
    if id(layer.weight) not in holders or (not layer.weight.is_meta and not _can_merge(module)):
        yield (
            f"model.lora.targets: {name} ({type(module).__name__}) computes its weight, or with it, in a way of its "
            "own, so that an adapter merged into it would be another model; name other layers"
        )
        return
    others = [each for each in holders[id(layer.weight)] if each != f"{name}.weight"]
    if others:
        yield (
            f"model.lora.targets: the weight of {name} is also {others[0]}, and an adapter that is merged would change "
            "both; remove it from the targets"
        )
    if id(layer.weight) in trained:
        yield f"model.lora.targets: {name} is in model.lora.train as well; remove it from one of them"
    if getattr(layer, "groups", 1) != 1:
        yield f"model.lora.targets: {name} is a convolution with {layer.groups} groups, expected 1; remove it"
    if getattr(layer, "max_norm", None) is not None:
        yield f"model.lora.targets: {name} changes its own weights (max_norm); remove it"


@torch.no_grad()
def _can_merge(module: nn.Module) -> bool:
    """Whether a layer computes with an adapter what it does with that merged; tried on a copy."""
    kind: Any = _kind(module)
    if type(module).forward in _PLAIN or kind is None or type(module).__name__ == "Conv1D":
        return True
    with torch.random.fork_rng(devices=[]):
        layer: Any = copy.deepcopy(module)
        _add(layer, LoraSection(r=1, alpha=1))
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        if kind is _Embedding:
            x = torch.arange(min(layer.num_embeddings, 8))
        elif kind is _Linear:
            x = torch.randn(4, layer.in_features)
        else:
            sizes = [size * gap + 4 for size, gap in zip(layer.kernel_size, layer.dilation, strict=True)]
            x = torch.randn(2, layer.in_channels, *sizes)
        x = x.to(layer.weight.device, layer.weight.dtype if x.is_floating_point() else None)
        layer.eval()
        try:
            apart = layer(x)
            merge_adapters(layer)
            return torch.allclose(layer(x), apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))
        except (RuntimeError, TypeError, ValueError):
            return False


def adapted_layers(model: nn.Module) -> dict[str, _Adapted]:
    """Return the layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Adapted)}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to the weight of its layer, and remove it, in place: the model is then what it was built as."""
    for layer in adapted_layers(model).values():
        if isinstance(layer, Quantized):
            layer.restore(layer.delta().dtype)
            layer.__class__ = _class_of(_Linear, type(layer).__bases__[1].__bases__[1])
        layer.weight.add_(layer.delta())
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_dropout"):
            if hasattr(layer, name):
                delattr(layer, name)
        del layer.lora_scale
        layer.__class__ = type(layer).__bases__[1]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return not {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}.isdisjoint(name.split("."))
