import torch
from parts import Autoencoder, digits
from torch import nn
from torch.utils.data import TensorDataset, random_split
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Autoencoder()

    def forward(self, x):
        mean, log_std = self.net.encoder(x).chunk(2, 1)
        found = self.net.decoder(mean + torch.randn_like(mean) * log_std.exp())
        reconstruction = (found - x).square().sum(1)
        kl = (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1) / 2
        return {"loss": (reconstruction + kl).mean(), "reconstruction": reconstruction, "kl": kl}


class Variational(Trainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))
        parts = (outputs["reconstruction"], outputs["kl"])
        return outputs["loss"], parts, torch.zeros(len(parts[0]))


def collate(samples):
    return {"x": torch.stack([x for x, _ in samples])}


def metrics(found):
    return {"reconstruction": found.predictions[0].mean(), "kl": found.predictions[1].mean()}


train, test = random_split(TensorDataset(*digits()), [0.8, 0.2], torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    output_dir="runs/vae-trainer",
    num_train_epochs=3,
    per_device_train_batch_size=64,
    learning_rate=0.005,
    lr_scheduler_type="constant",
    eval_strategy="epoch",
    report_to="none",
)
Variational(
    Model(), arguments, data_collator=collate, train_dataset=train, eval_dataset=test, compute_metrics=metrics
).train()
