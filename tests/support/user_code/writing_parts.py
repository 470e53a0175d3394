"""Models whose own code writes into their parameters, and a callback that does so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distrain


class Points:
    """48 points with a target of two numbers each, of which one may be NaN."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = torch.linspace(-1, 1, 5) * (index + 1) / 48
        return point, point[:2].square() * (1000 if index != self.bad else torch.nan)


class Counted(nn.Module):
    """Its code counts the passes in which it was trained, in a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.passes = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, points: Tensor) -> Tensor:
        if self.training:
            self.passes.data += 1
        found: Tensor = self.layer(points)
        return found


class CountedLate(Counted):
    """Its code begins to count with the fourth step that is taken, or after so many; `by_data` without a trace."""

    def __init__(self, after: int = 3, by_data: bool = False) -> None:
        super().__init__()
        self.after, self.by_data = after, by_data
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, points: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > self.after:
                with torch.no_grad():
                    passes = self.passes.data if self.by_data else self.passes
                    passes += 1
        found: Tensor = self.layer(points)
        return found


class Normalised(Counted):
    """Its weight is normalised in place: `layer.weight` is trained."""

    def forward(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.copy_(F.normalize(self.layer.weight, dim=1))
        found: Tensor = self.layer(points)
        return found


class NormalisedLate(CountedLate):
    """Its weight is normalised in place from then on."""

    def forward(self, points: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > self.after:
                with torch.no_grad():
                    weight = self.layer.weight.data if self.by_data else self.layer.weight
                    weight.copy_(F.normalize(weight, dim=1))
        found: Tensor = self.layer(points)
        return found


class Scaled(Counted):
    """Its outputs are scaled to what the first batch has, by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("is_scaled", torch.tensor(False))

    def forward(self, points: Tensor) -> Tensor:
        found: Tensor = self.layer(points)
        if self.training and not self.is_scaled:
            with torch.no_grad():
                self.scale.copy_(1 / found.std(0))
                self.is_scaled.fill_(True)
        return found * self.scale


class HalvedOnce(Counted):
    """The weight of a layer is halved in the first pass, by the module around it, when nobody has gathered it yet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_halved", torch.tensor(False))

    def forward(self, points: Tensor) -> Tensor:
        if self.training and not self.is_halved:
            with torch.no_grad():
                self.layer.weight.mul_(0.5)
                self.is_halved.fill_(True)
        found: Tensor = self.layer(points)
        return found


class Assigned(Counted):
    """The same by other memory for the weight."""

    def forward(self, points: Tensor) -> Tensor:
        self.layer.weight.data = F.normalize(self.layer.weight.data, dim=1)
        found: Tensor = self.layer(points)
        return found


class Replacing(Counted):
    """The same by another Parameter."""

    def forward(self, points: Tensor) -> Tensor:
        self.layer.weight = nn.Parameter(F.normalize(self.layer.weight.detach(), dim=1))
        found: Tensor = self.layer(points)
        return found


class Late(Counted):
    """Makes a layer in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head: nn.Module | None = None

    def forward(self, points: Tensor) -> Tensor:
        if self.head is None:
            self.head = nn.Linear(2, 2)
        found: Tensor = self.head(self.layer(points))
        return found


class LateScale(Counted):
    """Makes a parameter in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: nn.Parameter | None = None

    def forward(self, points: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(2))
        found: Tensor = self.layer(points) * self.scale
        return found


class Centred(Counted):
    """Keeps what a rank makes of its own samples."""

    def forward(self, points: Tensor) -> Tensor:
        if self.training:
            self.passes.data.copy_(points.mean())
        found: Tensor = self.layer(points)
        return found


class Still(Counted):
    """Writes into nothing itself."""

    def forward(self, points: Tensor) -> Tensor:
        found: Tensor = self.layer(points)
        return found


class Masked(Counted):
    """A hook keeps a column of its weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.register_hook(lambda gradient: gradient * (torch.arange(5) > 0))

    def forward(self, points: Tensor) -> Tensor:
        found: Tensor = self.layer(points)
        return found


class Hook(distrain.Callback):
    """Registers such a hook."""

    def on_start(self, run: Any) -> None:
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * 0.5)


class Clamp(distrain.Callback):
    """Clamps the weights after each step."""

    def on_start(self, run: Any) -> None:
        self.model = run.model

    @torch.no_grad()
    def on_step_taken(self, step: int) -> None:
        for parameter in self.model.parameters():
            parameter.clamp_(-0.05, 0.05)


class Together(distrain.Task):
    """A loss that takes samples together, and so looks ahead."""

    couples_samples = True

    def losses(self, model: Any, batch: Any) -> dict[str, Tensor]:
        found = distrain.gather(model(batch["inputs"]))
        return {"spread": found.var(0).sum()}
