import torch
from parts import Net, digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, random_split
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def collate(samples):
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def metrics(found):
    return {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()}


train, test = random_split(TensorDataset(*digits()), [0.8, 0.2], torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    output_dir="runs/sweep-trainer",
    num_train_epochs=2,
    per_device_train_batch_size=64,
    eval_strategy="epoch",
    report_to="none",
)
trainer = Trainer(
    None,
    arguments,
    model_init=Model,
    data_collator=collate,
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=metrics,
)
best = trainer.hyperparameter_search(
    hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
    compute_objective=lambda found: found["eval_accuracy"],
    direction="maximize",
    backend="optuna",
    n_trials=2,
)
print(best)
