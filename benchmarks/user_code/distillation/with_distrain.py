import torch
from parts import Net, digits

import distrain


class Distillation(distrain.Classification):
    def prepare(self, context):
        self.teacher = Net(width=128).to(context.device).requires_grad_(False).eval()
        self.teacher.load_state_dict(torch.load("prepared/teacher.pt"))

    def losses(self, model, batch):
        wanted = (self.teacher(batch["inputs"]) / 3).softmax(1)
        found = (model(batch["inputs"]) / 3).log_softmax(1)
        return {**super().losses(model, batch), "teacher": -(wanted * found).sum(1)}


distrain.train(
    task=Distillation,
    model={"name": Net, "width": 8},
    data=digits,
    batch={"global": 64},
    optim={"lr": 0.01},
    train={"epochs": 3},
    eval={"every": "1 epoch", "metrics": ["accuracy"]},
    run_dir="runs/distillation",
)
