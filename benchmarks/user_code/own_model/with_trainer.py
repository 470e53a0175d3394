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
    output_dir="runs/own-model-trainer",
    num_train_epochs=3,
    per_device_train_batch_size=64,
    learning_rate=0.01,
    lr_scheduler_type="constant",
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    report_to="none",
)
Trainer(
    Model(), arguments, data_collator=collate, train_dataset=train, eval_dataset=test, compute_metrics=metrics
).train()
