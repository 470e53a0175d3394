"""REINFORCE with a baseline: a model learns to balance a pole, from episodes that it plays itself.

python examples/reinforce.py --processes 2
"""

import argparse

import torch
from torch import nn
from torch.utils.data import Dataset

import distrain

STEPS = 100


class Episodes(Dataset):
    """What is random in an episode: where it starts (4,), and a number in [0, 1) for each action (STEPS,).

    Before each item the global generators are seeded from (seed, epoch, sample). An episode therefore depends on these
    and on the model, and neither on the micro-batch nor on the process that plays it.
    """

    def __init__(self, count: int = 640):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"start": torch.rand(4) / 10 - 0.05, "dice": torch.rand(STEPS)}, 0


def push(state, right):
    """Move carts with poles by 0.02 s: state (batch, 4), right (batch,) bool."""
    _, speed, angle, turning = state.unbind(1)  # of the cart, and of the pole
    force = torch.where(right, 10.0, -10.0)
    sine, cosine = angle.sin(), angle.cos()
    pushed = (force + 0.05 * turning**2 * sine) / 1.1
    turned = (9.8 * sine - cosine * pushed) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    moved = pushed - 0.05 * turned * cosine / 1.1
    return state + 0.02 * torch.stack((speed, moved, turning, turned), 1)


def stands(state):
    """Whether a cart is on its track and its pole within 12 degrees, (batch,)."""
    return (state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 0.21)


class Player(nn.Module):
    """Returns the logit of a push to the right, and the reward that is expected from here on, as a share of STEPS."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 1.0, 10.0, 1.0]))
        self.policy = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.value = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, state):
        state = state * self.scale
        return self.policy(state).squeeze(-1), self.value(state).squeeze(-1)


class Reinforce(distrain.Task):
    """Each episode is a sample. The baseline is a part of the model: a mean over the batch would couple episodes."""

    @torch.no_grad()
    def play(self, model, batch, greedy=False):
        """Return states (batch, STEPS, 4), actions and whether the pole stood when they were taken, (batch, STEPS)."""
        state, played = batch["inputs"]["start"], []
        stood = stands(state)
        for dice in batch["inputs"]["dice"].unbind(1):
            logit, _ = model(state)
            right = logit > 0 if greedy else dice < logit.sigmoid()
            played.append((state, right, stood))
            state = torch.where(stood[:, None], push(state, right), state)
            stood = stood & stands(state)
        return [torch.stack(each, 1) for each in zip(*played, strict=True)]

    def losses(self, model, batch):
        states, right, stood = self.play(model, batch)
        reward = stood.to(states.dtype)  # one for each step in which it stands
        self.log("reward", reward.sum())  # the mean over episodes
        later = reward.flip(1).cumsum(1).flip(1) / STEPS
        logit, value = model(states)
        gain = (later - value).detach()
        log_probability = nn.functional.logsigmoid(torch.where(right, logit, -logit))
        return {
            "policy": -(log_probability * gain * reward).sum(1) / STEPS,
            "value": ((later - value).square() * reward).sum(1) / STEPS,
        }

    def predictions(self, model, batch):
        """Return how long the pole stands if the likelier action is taken, (batch,)."""
        return self.play(model, batch, greedy=True)[2].sum(1)


def balanced(predictions, targets):
    """The metric of evaluations: for how many steps the pole stands, of each episode."""
    return predictions.double()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    run = distrain.train(
        task=Reinforce,
        model=Player,
        data=Episodes,
        batch={"global": 64},
        optim={"lr": 0.005},
        # rounding may turn an action whose dice is at its probability, and episodes differ from there: hardly in fp64
        train={"steps": 30, "precision": "fp64"},
        eval={"every": "5 steps", "metrics": [balanced], "best": "balanced"},
        processes=options.processes,
        run_dir=f"runs/reinforce-{options.processes}",
    )
    for row in run.metrics[run.metrics.event == "eval"].itertuples():
        print(f"step {row.step}: the pole stands for {row.reward:.1f} of {STEPS} steps, greedily {row.balanced:.1f}")


if __name__ == "__main__":
    main()
