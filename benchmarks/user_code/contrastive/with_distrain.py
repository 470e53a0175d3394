import torch
from parts import Halves, Towers
from torch.nn.functional import cross_entropy

import distrain


class Contrastive(distrain.Task):
    couples_samples = True

    def losses(self, model, batch):
        left, right = map(distrain.gather, model(**batch["inputs"]))
        logits = model.log_scale.exp() * left @ right.T
        own = torch.arange(len(logits), device=logits.device)
        return {"contrastive": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2}


distrain.train(
    task=Contrastive,
    model=Towers,
    data=Halves,
    batch={"global": 64, "micro": 16},
    optim={"lr": 0.005},
    train={"epochs": 3},
    run_dir="runs/contrastive",
)
