import torch
from parts import Net, digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, random_split
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(width=8)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Distillation(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        wanted = (self.teacher(inputs["x"]) / 3).softmax(1)
        teacher = -(wanted * (outputs["logits"] / 3).log_softmax(1)).sum(1).mean()
        loss = outputs["loss"] + teacher
        return (loss, outputs) if return_outputs else loss


def collate(samples):
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def metrics(found):
    return {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()}


teacher = Net(width=128).requires_grad_(False).eval()
teacher.load_state_dict(torch.load("prepared/teacher.pt"))
train, test = random_split(TensorDataset(*digits()), [0.8, 0.2], torch.Generator().manual_seed(0))
arguments = TrainingArguments(
    output_dir="runs/distillation-trainer",
    num_train_epochs=3,
    per_device_train_batch_size=64,
    learning_rate=0.01,
    lr_scheduler_type="constant",
    eval_strategy="epoch",
    report_to="none",
)
Distillation(
    Model(),
    arguments,
    teacher=teacher,
    data_collator=collate,
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=metrics,
).train()
