"""Tasks, and a loss and a model, that change while they train."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import distrain


class Momentum(distrain.Task):
    """MoCo: what a slowly moving copy of the model makes of a sample is near to its own output, and far from a queue.

    The targets are not used.
    """

    couples_samples = True

    def __init__(self, length: int = 24):
        self.queue, self.filled = torch.zeros(length, 4, dtype=torch.float64), 0

    def prepare(self, context):
        self.slow = context.initial_model()

    def losses(self, model, batch):
        keys = functional.normalize(self.slow(batch["inputs"]).double(), dim=1)
        queries = functional.normalize(model(batch["inputs"]).double(), dim=1)
        self.keys = distrain.gather(keys)
        queries = distrain.gather(queries)
        near = (queries * self.keys).sum(1, keepdim=True)
        logits = torch.cat((near, queries @ self.queue[: self.filled].T), 1) / 0.2
        return {"contrast": functional.cross_entropy(logits, logits.new_zeros(len(logits)).long(), reduction="none")}

    def step_taken(self, model):
        self.queue = torch.cat((self.keys.detach(), self.queue))[: len(self.queue)]
        self.filled = min(self.filled + len(self.keys), len(self.queue))
        for slow, quick in zip(self.slow.parameters(), model.parameters(), strict=True):
            slow.lerp_(quick.to(slow), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue, "filled": self.filled, "slow": dict(self.slow.state_dict())}

    def load_state_dict(self, state):
        self.queue, self.filled = state["queue"], state["filled"]
        self.slow.load_state_dict(state["slow"])


class Annealed(distrain.Task):
    """Its loss depends on the step, which is counted for it and by itself."""

    form = "classification"

    def __init__(self, kind: str = "right"):
        self.kind, self.own, self.taken = kind, 0, 0

    def losses(self, model, batch):
        if model.training:
            self.own += 1
        entropy = functional.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")
        self.log("so_far", float(self.step), 1.0)
        self.log("own", float(self.own), 1.0)
        if self.kind == "anomalous" and self.step == 3:
            entropy = entropy * float("nan")
        return {"entropy": entropy / (1 + self.step)}

    def step_taken(self, model):
        self.taken += 1

    def state_dict(self) -> Any:
        if self.kind == "unlike" and self.own:
            return {"here": torch.distributed.get_rank() * torch.ones(3)}
        return {"own": self.own, "taken": self.taken, "odd": object() if self.kind == "object" else None}

    def load_state_dict(self, state):
        self.own, self.taken = state.get("own", 0) + (self.kind == "lost"), state.get("taken", 0)


class Fading(distrain.Task):
    """A weight that falls with each step, from what it was: in place, by another dict, or in each call of `losses`."""

    form = "classification"
    weights = {"size": 8.0}

    def __init__(self, kind: str = "own"):
        self.kind = kind

    def losses(self, model, batch):
        outputs = model(batch["inputs"])
        if self.kind == "step":
            self.weights = {"size": 8.0 / (1 + self.step)}
        entropy = functional.cross_entropy(outputs, batch["targets"], reduction="none")
        if self.kind == "anomalous" and self.step == 3:
            entropy = entropy * float("nan")
        return {"entropy": entropy, "size": outputs.square().mean(1)}

    def step_taken(self, model):
        if self.kind == "inside":
            self.weights["size"] *= 0.5
        elif self.kind != "step":
            self.weights = {"size": self.weights["size"] * 0.5}


class Alone(distrain.Task):
    """Half of what keeps a state."""

    def losses(self, model, batch):
        return {"none": model(batch["inputs"]).sum(1)}

    def state_dict(self) -> Any:
        return {}


class Forgetful(distrain.Classification):
    """What it remembers from step to step is in no checkpoint."""

    def __init__(self) -> None:
        self.calls, self.mean = 0, torch.zeros(10)

    def prepare(self, context):
        self.slow, self.teacher = context.initial_model(), context.initial_model()

    def losses(self, model, batch):
        self.mask = torch.ones(10)  # the same in each step
        if model.training:
            self.calls += 1
            self.mean = self.mean + 1
            with torch.no_grad():
                for slow in self.slow.parameters():
                    slow.mul_(0.9)
        return super().losses(model, batch)


class Counting(nn.Module):
    """A model that counts, and keeps a mask that it computes once."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.inner, self.mask, self.calls = nn.Linear(64, num_classes), None, 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("kept", torch.zeros(()))

    def forward(self, x):
        self.mask = torch.ones(64, dtype=x.dtype) if self.mask is None else self.mask
        if self.training:
            self.calls += 1
            self.seen += 1
            self.kept += 1
        return self.inner(x.flatten(1) * self.mask)


class CountingKept(nn.Module):
    """The same count, in its extra state; beside weights that torch computes anew before each pass."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.norm = nn.utils.spectral_norm(nn.Linear(64, 8))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.RNN(8, 8, batch_first=True), "weight_hh_l0")
        self.pruned = prune.l1_unstructured(nn.Linear(8, num_classes), "weight", 0.5)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        self.calls += self.training
        return self.pruned(self.weighted(self.norm(x.flatten(1)))[0])


class Centred(nn.Module):
    """A loss with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def forward(self, outputs, targets):
        self.centre += 1
        return functional.cross_entropy(outputs, targets, reduction="none")


class Slow(torch.optim.SGD):
    """Looks ahead: weights that move slowly, and a count, which it has on itself."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.trained = [each for group in self.param_groups for each in group["params"]]
        self.count, self.slow = 0, [each.detach().clone() for each in self.trained]

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        self.count += 1
        for slow, parameter in zip(self.slow, self.trained, strict=True):
            if self.count % 2 == 0:
                parameter.copy_(slow.lerp_(parameter, 0.5))


class Around(torch.optim.Optimizer):
    """Holds an optimizer whose state is not its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        self.inner.step()


class Shared(Around):
    """Holds an optimizer whose state is its own, and the parameters."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.trained = [each for group in self.param_groups for each in group["params"]]
        self.state = self.inner.state

    def step(self, closure=None):
        self.inner.state = self.state
        self.inner.step()


def passed(kept: Any, kind: str, outputs: torch.Tensor) -> torch.Tensor:
    """Return how many passes `kept` has seen before, as it keeps that in this `kind`, for each of the outputs."""
    global seen
    one = outputs.detach().flatten()[0] * 0 + 1  # has no value where nothing has
    before: Any = getattr(kept, kind, None)
    if kind == "number":
        kept.number += 1
    elif kind == "tensor":
        kept.tensor = kept.tensor + one
    elif kind == "in_place":
        before = before.clone()
        kept.in_place += one
    elif kind in ("listed", "shared"):
        before = sum(before)
        getattr(kept, kind).append(one)
    elif kind == "named":
        before = before.get("seen", 0)
        kept.named["seen"] = before + one
    elif kind == "meter":
        before = before.count
        kept.meter.count += 1
    elif kind == "generator":
        drawn, known = before.random(), random.Random(0)
        before = [known.random() for _ in range(100)].index(drawn)
    elif kind == "of_file":
        before = seen
        seen = seen + 1
    elif kind == "of_class":
        before = Shown.number
        Shown.number += 1
    elif kind == "of_function":
        before = passed.number
        passed.number += 1
    elif kind == "of_backward":
        before, outputs = Shown.backward_passes, Shown.apply(outputs)
    elif kind == "inner":
        before = kept.inner.running_mean.clone()[0]
        kept.inner(one.expand(2, 1) + before)
    elif kind == "teacher":
        before = kept.teacher.weight.detach().clone()[0, 0]
        with torch.no_grad():
            kept.teacher.weight += one
    return outputs.sum(1) * 0 + before


passed.number = seen = 0


class Shown(torch.autograd.Function):
    """Lets values through, and counts how often gradients came back."""

    number = backward_passes = 0

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        Shown.backward_passes += 1
        return gradient


def keep(kept: Any, kind: str) -> None:
    """Give it what `passed` needs for any of the kinds that all have."""
    global seen
    passed.number = seen = Shown.number = Shown.backward_passes = 0
    kept.kind, kept.number, kept.tensor, kept.in_place = kind, 0, torch.zeros(()), torch.zeros(())
    kept.listed, kept.named, kept.meter, kept.generator = [], {}, SimpleNamespace(count=0), random.Random(0)


class Kept(distrain.Task):
    """Its loss is how many micro-batches came before, which it keeps in one of many ways."""

    shared = []

    def __init__(self, kind: str):
        keep(self, kind)
        self.inner = nn.BatchNorm1d(1, affine=False, momentum=1.0)
        self.teacher = nn.Linear(1, 1)
        nn.init.zeros_(self.teacher.weight)

    def losses(self, model, batch):
        return {"before": passed(self, self.kind, model(batch["inputs"]))}


class Coupled(distrain.Task):
    """Takes the first outputs of all samples of a step together."""

    couples_samples = True

    def losses(self, model, batch):
        return {"first": distrain.gather(model(batch["inputs"])[:, 0])}


class KeptByLoss(nn.Module):
    """A loss that is how many micro-batches came before."""

    def __init__(self, kind: str):
        super().__init__()
        keep(self, kind)
        if kind in ("tensor", "in_place"):
            delattr(self, kind)
            self.register_buffer(kind, torch.zeros(()))

    def forward(self, outputs, targets):
        return passed(self, self.kind, outputs)


class KeptByModel(nn.Module):
    """A model whose outputs are how many micro-batches came before."""

    def __init__(self, kind: str, num_classes: int):
        super().__init__()
        keep(self, kind)
        self.layer = nn.Linear(64, num_classes)
        if kind == "hooked":
            self.hook_in(0)

    def hook_in(self, number):
        """Hook a function in that gives this number once, and hooks in another for the next one."""

        def give(*_):
            handle.remove()
            self.hook_in(number + 1)
            self.given = number

        handle = self.layer.register_forward_hook(give)

    def forward(self, inputs):
        outputs = self.layer(inputs.flatten(1))
        before = self.given if self.kind == "hooked" else passed(self, self.kind, outputs)[:, None]
        return outputs * 0 + before


def first(outputs, targets):
    """A loss that is the first output."""
    return outputs[:, 0]
