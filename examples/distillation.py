"""A teacher is trained, and a smaller student then learns from what the teacher predicts.

python examples/distillation.py --processes 2
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

import distrain

SHARED = {
    "batch": {"global": 64},
    "optim": {"lr": 0.01},
    "train": {"epochs": 8},
    "eval": {"every": "8 epochs", "metrics": ["accuracy"]},
}


class Net(nn.Module):
    """A network for pixels (batch, 64); `width` tells teacher and student apart."""

    def __init__(self, width: int, num_classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, pixels):
        return self.layers(pixels)


def digits():
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16), torch.tensor(classes)


class Distillation(distrain.Classification):
    """Beside the cross entropy of the labels, that of what the teacher predicts at a `temperature`.

    `teacher` is the path of its export. What `prepare` builds is frozen, whole in each process, in no checkpoint and in
    no export: the student's hold the student alone.
    """

    def __init__(self, teacher: str, width: int, temperature: float = 3.0, share: float = 1.0):
        self.path, self.width, self.temperature = teacher, width, temperature
        self.weights = {"teacher": share}

    def prepare(self, context):
        self.teacher = Net(self.width)
        self.teacher.load_state_dict(load_file(self.path))
        dtype = torch.float64 if context.recipe.train.precision == "fp64" else torch.float32
        self.teacher.to(context.device, dtype).requires_grad_(False).eval()

    def losses(self, model, batch):
        known = self.teacher(batch["inputs"])
        found = model(batch["inputs"])
        correct = known.argmax(1) == batch["targets"]
        self.log("teacher_accuracy", correct.sum())  # a mean over the samples, as the student's accuracy
        soft = (known / self.temperature).softmax(1), (found / self.temperature).log_softmax(1)
        return {
            "labels": nn.functional.cross_entropy(found, batch["targets"], reduction="none"),
            "teacher": -(soft[0] * soft[1]).sum(1) * self.temperature**2,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    teacher = distrain.train(
        SHARED, task="classification", model={"name": Net, "width": 128}, data=digits, run_dir="runs/teacher"
    )
    path = Path("runs/teacher.safetensors").absolute()
    teacher.export(path, overwrite=True)

    student = distrain.train(
        SHARED,
        task={"name": Distillation, "teacher": str(path), "width": 128},
        model={"name": Net, "width": 8},
        data=digits,
        processes=options.processes,
        run_dir=f"runs/student-{options.processes}",
    )
    last = student.metrics[student.metrics.event == "eval"].iloc[-1]
    print(f"accuracy: teacher {last.teacher_accuracy:.3f}, student {last.accuracy:.3f}")
    sizes = (sum(each.numel() for each in run.model().state_dict().values()) for run in (teacher, student))
    print("parameters: teacher {:,}, student {:,}".format(*sizes))


if __name__ == "__main__":
    main()
