"""Train a model of your own on arrays, look at the run, and predict.

python examples/own_model.py
"""

from sklearn.datasets import load_digits
from torch import nn

import distrain


class Net(nn.Module):
    """A small network for pixels (batch, 64)."""

    def __init__(self, num_classes: int, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, pixels):
        return self.layers(pixels)


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    run = distrain.train(
        task="classification",
        model={"name": Net, "hidden": 64},  # num_classes comes from the data
        data=(pixels / 16, digits),
        data__split=[0.7, 0.15, 0.15],
        batch={"global": 64},
        train={"epochs": 5},
        eval={"metrics": ["accuracy"], "best": "accuracy"},
        run_dir="runs/own-model",
    )
    print(run.metrics.query("event == 'eval'")[["step", "loss", "accuracy"]])
    print(run.best)
    print(run.predict(pixels[:3] / 16)[["prediction", "probability"]])
    network = run.model()  # plain PyTorch, in eval mode
    print(sum(parameter.numel() for parameter in network.parameters()), "parameters")


if __name__ == "__main__":
    main()
