import torch
from parts import Halves, Towers
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate, random_split
from transformers import Trainer, TrainingArguments


class Contrastive(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        left, right = model(inputs["left"], inputs["right"])
        if self.args.world_size > 1:  # what ranks have is gathered, and what is accumulated is not
            left, right = torch.cat(all_gather(left)), torch.cat(all_gather(right))
        scale = self.accelerator.unwrap_model(model).log_scale.exp()
        logits = scale * left @ right.T
        own = torch.arange(len(logits), device=logits.device)
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        return (loss, {"left": left}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


def collate(samples):
    return default_collate([inputs for inputs, _ in samples])


train, test = random_split(Halves(), [0.8, 0.2], torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    output_dir="runs/contrastive-trainer",
    num_train_epochs=3,
    per_device_train_batch_size=64,
    dataloader_drop_last=True,
    learning_rate=0.005,
    lr_scheduler_type="constant",
    eval_strategy="epoch",
    remove_unused_columns=False,
    report_to="none",
)
Contrastive(Towers(), arguments, data_collator=collate, train_dataset=train, eval_dataset=test).train()
