"""Models and optimizers whose state takes every form that state can take, named in recipes as `kept_parts:NAME`.

Models take points of 5 numbers, (batch, 5), and return logits of 3 classes, (batch, 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------------
# State dicts that are not the model's own tensors


class Plain(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Wrapping(Plain):
    """A part of it has the name that torch.compile gives to what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = Plain()


class Hooked(Plain):
    """`saved` changes what its state dicts hold, `loaded` changes it back."""

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(lambda module, state, prefix, meta: module.saved(state, prefix))
        self._register_load_state_dict_pre_hook(lambda state, prefix, *rest: self.loaded(state, prefix))

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        raise NotImplementedError

    def loaded(self, state: dict[str, Any], prefix: str) -> None:
        raise NotImplementedError


class Renamed(Hooked):
    """The head's weight has another name."""

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        state[prefix + "classifier"] = state.pop(prefix + "head.weight")

    def loaded(self, state: dict[str, Any], prefix: str) -> None:
        state[prefix + "head.weight"] = state.pop(prefix + "classifier")


class Transposed(Hooked):
    """A view of another layout, of the same shape."""

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        state[prefix + "head.weight"] = state[prefix + "head.weight"].t()

    loaded = saved


class Copied(Hooked):
    """A copy of another layout."""

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        state[prefix + "head.weight"] = state[prefix + "head.weight"].t().contiguous()

    loaded = saved


class Dropped(Hooked):
    """A trained layer is left out."""

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        for name in [name for name in state if name.startswith(prefix + "body.")]:
            del state[name]

    def loaded(self, state: dict[str, Any], prefix: str) -> None:
        state |= {prefix + "body." + name: value for name, value in self.body.state_dict().items()}


class Detached(Hooked):
    """Other tensors of the same memory, as a hook makes that detaches."""

    def saved(self, state: dict[str, Any], prefix: str) -> None:
        for name in list(state):
            state[name] = state[name].detach()

    def loaded(self, state: dict[str, Any], prefix: str) -> None:
        pass


class OwnKey(Plain):
    """Keeps a running mean that is no buffer, and a count, under keys of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.passes = torch.zeros(5), 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "mean"], destination[prefix + "passes"] = self.mean, self.passes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.mean, self.passes = state_dict.pop(prefix + "mean").clone(), state_dict.pop(prefix + "passes")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean()
            self.passes += 1
        return super().forward(x) * (1 + self.mean.mean() + self.passes / 10)


# --------------------------------------------------------------------------------------------------------------------
# Extra state


class Counted(nn.Module):
    """Its outputs grow with its forward passes, which are counted in extra state of some form."""

    make: Callable[[int], Any] = staticmethod(torch.tensor)
    read: Callable[[Any], int] = staticmethod(int)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.passes = nn.Linear(5, 3), 0

    def get_extra_state(self) -> Any:
        return self.make(self.passes)

    def set_extra_state(self, state: Any) -> None:
        self.passes = self.read(state)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return self.inner(x) * (1 + self.passes / 10)


class CountedInDict(Counted):
    """In a dict of a number, a tensor and a tuple."""

    make = staticmethod(lambda passes: {"passes": passes, "history": torch.arange(passes), 3: ("a", None, 1.5)})
    read = staticmethod(lambda state: state["passes"] if len(state["history"]) == state["passes"] else -1)


class CountedInBytes(Counted):
    """In bytes."""

    make = staticmethod(lambda passes: passes.to_bytes(8, "little"))
    read = staticmethod(lambda state: int.from_bytes(state, "little"))


class Growing(Counted):
    """A tensor that is longer with each pass."""

    make = staticmethod(lambda passes: torch.zeros(passes, dtype=torch.uint8))
    read = staticmethod(len)


class Within(nn.Module):
    """Two modules with extra state, one of them there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Counted(), CountedInDict()
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


class Opaque(Counted):
    """In an object of its own."""

    make = staticmethod(lambda passes: [object()])


class WithoutSetter(Plain):
    """It gives extra state and takes none."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1)


class Forgetful(Counted):
    """It takes extra state and does nothing with it."""

    def set_extra_state(self, state: Any) -> None:
        self.passes = -1


# --------------------------------------------------------------------------------------------------------------------
# Memory, and dtypes


class Expanded(Plain):
    """Buffers whose elements share memory, one of which two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(5).expand(4, 5))
        self.register_buffer("windows", torch.arange(6.0).unfold(0, 3, 1))
        self.register_buffer("steps", torch.arange(7.0).as_strided((3, 3), (1, 2)), persistent=False)
        self.body.register_buffer("mask", self.mask)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.mask[0] * self.body.mask[1]) + self.windows[0] * self.steps[0].sum()


class Views(Plain):
    """Buffers that are views of one another, and of one table."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.linspace(0, 1, 10).reshape(2, 5)
        self.register_buffer("table", table)
        self.register_buffer("row", table[1])
        self.register_buffer("column", table[:, 1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.table[0] + self.row * self.column[0])


class OfParameter(Plain):
    """A buffer is a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", self.head.weight.detach()[0])


class ExpandedWeight(Plain):
    """A parameter's rows are one row."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.ones(3).expand(3, 3))


class Typed(Plain):
    """A buffer of any dtype, which forward uses where it is not complex."""

    def __init__(self, dtype: str = "uint16") -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([1.0, 0.0, 2.0, 4.0]).to(getattr(torch, dtype)))


class Wave(nn.Module):
    """Complex weights, a conjugate view, and complex frequencies in a buffer."""

    def __init__(self, dtype: str = "complex64") -> None:
        super().__init__()
        kind = getattr(torch, dtype)
        self.wave = nn.Parameter(0.3 * torch.randn(5, 4).to(kind) * (1 + 0.5j))
        self.head = nn.Linear(4, 3)
        self.register_buffer("frequencies", torch.polar(torch.ones(4), torch.arange(4.0)).to(kind))
        self.register_buffer("turned", self.frequencies.conj())

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.wave.dtype) @ self.wave * self.frequencies * self.turned).abs().to(x.dtype))


class Quantized(Plain):
    """A quantized buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8))


class SubByte(Plain):
    """A buffer of a dtype that has no name to be stored under."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))


class Sparse(Plain):
    """A sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(3).to_sparse())


class Reshaped(Plain):
    """A buffer has another shape from the first forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = x.detach().sum(0)
        return super().forward(x)


class Late(Plain):
    """A buffer is there from the first forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().sum()
        return super().forward(x)


class PerRank(Plain):
    """Extra state that each rank has its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def get_extra_state(self) -> float:
        return self.seen

    def set_extra_state(self, state: float) -> None:
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        self.seen = float(x.detach().sum())
        return super().forward(x)


# --------------------------------------------------------------------------------------------------------------------
# Optimizers


class Base(torch.optim.Optimizer):
    """`update` makes a step with the parameters of a group that have gradients."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])


class InList(Base):
    """Averages of the gradient in a list."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            old, new = self.state[p].setdefault("averages", [torch.zeros_like(p), torch.zeros_like(p)])
            old.copy_(new)
            new.mul_(0.9).add_(p.grad)
            p.add_(old + new, alpha=-group["lr"])


class InDicts(Base):
    """Dicts in tuples in dicts, with numbers, None and a tensor of another shape beside."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            start = {"slow": ({"weights": p.clone(), "none": None}, 0), 7: [torch.zeros(2, dtype=torch.int64)]}
            kept = self.state[p].setdefault("kept/all", start)
            weights, count = kept["slow"]
            kept["slow"] = (weights, count + 1)
            kept[7][0] += 1
            p.add_(p.grad, alpha=-group["lr"] * int(kept[7][0][0]))
            if count % 2:
                p.copy_(weights["weights"].lerp_(p, 0.5))


class OtherDtypes(Base):
    """State of other dtypes than the parameters': torch's own loader would cast it."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"half": torch.zeros_like(p, dtype=torch.bfloat16), "text": "on", "large": float("inf")}
                state |= {"count": torch.zeros((), dtype=torch.int64), "wide": torch.zeros_like(p, dtype=torch.float64)}
                state |= {
                    "turn": torch.ones_like(p, dtype=torch.complex128),
                    "small": torch.zeros_like(p, dtype=torch.uint16),
                }
            state["half"].add_(p.grad)
            state["count"] += 1
            state["wide"].add_(p.grad / 3)
            state["turn"].mul_(0.6 + 0.8j)
            assert state["text"] == "on"
            assert state["half"].dtype == torch.bfloat16
            p.add_(state["half"] + state["wide"] + state["turn"].real, alpha=-group["lr"] / int(state["count"]))


class TensorInGroup(Base):
    """An estimate, a tensor in the group."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            group["distance"] = group.get("distance", torch.tensor(1.0)) + p.grad.abs().sum()
            p.add_(p.grad / group["distance"], alpha=-10 * group["lr"])


class ListInGroup(Base):
    """Norms so far in a list in the group; a tuple that training changes; one setting that it takes out."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        norms = group.setdefault("norms", [])
        norms.append(float(sum(p.grad.norm() for p in parameters)))
        first, second = group["betas"]
        group["betas"] = (first * 0.9, second)
        faster = group.pop("weight_decay", None) is not None
        for p in parameters:
            p.add_(p.grad * len(norms) / sum(norms) * first, alpha=-group["lr"] * (1 + faster))


class UnderOwnKey(Base):
    """A count and a tensor in the state under a key that is no parameter."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        count = self.state.setdefault("all", {"count": 0, "seen": torch.zeros(())})
        count["count"] += 1
        count["seen"] += 1
        for p in parameters:
            p.add_(p.grad, alpha=-group["lr"] / count["count"] / float(count["seen"]))


class OfObjects(Base):
    """Objects of its own."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            self.state[p].setdefault("history", {"made": object()})
            p.add_(p.grad, alpha=-group["lr"])


class Shared(Base):
    """One count for all parameters, the same tensor in the state of each."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            count = next((state["count"] for state in self.state.values()), torch.zeros(()))
            self.state[p].setdefault("count", count)
            p.add_(p.grad, alpha=-group["lr"])
        count += 1


class OwnStateDict(InList):
    """Its state_dict holds something besides, which load_state_dict would need."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"slow": 3}


class LateObjects(Base):
    """Objects of its own from the third step on."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            if state["count"] > 2:
                state["made"] = object()
            p.add_(p.grad, alpha=-group["lr"])


class Everything(Plain):
    """Extra state, a tied buffer that is an expanded view, and buffers of odd dtypes: all that every strategy keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.passes = CountedInDict(), Counted()
        self.register_buffer("mask", torch.ones(5).expand(4, 5))
        self.body.register_buffer("mask", self.mask)
        self.register_buffer("unsigned", torch.tensor([3], dtype=torch.uint16))
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)).conj())
        self.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.unsigned = (self.unsigned.long() + 1).to(torch.uint16)
        x = x * self.mask[0] * self.body.mask[1] * self.small[0].float()
        return (super().forward(x) * self.turn).real + self.counted(x) / self.unsigned.long() + self.passes(x)
