import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = resnet18(num_classes=classes)
        weights = load_file("prepared/resnet18.safetensors")
        self.net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def collate(samples):
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.tensor(y)}


def metrics(found):
    return {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()}


end = [v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)]
train = ImageFolder("prepared/images/train", v2.Compose([v2.RandomCrop(32, padding=4, pad_if_needed=True), *end]))
test = ImageFolder("prepared/images/test", v2.Compose(end))
model = Model(len(train.classes))
head = list(model.net.fc.parameters())
body = [p for name, p in model.net.named_parameters() if not name.startswith("fc.")]
optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-3}])
arguments = TrainingArguments(
    output_dir="runs/images-trainer",
    num_train_epochs=2,
    per_device_train_batch_size=32,
    lr_scheduler_type="cosine",
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    report_to="none",
)
Trainer(
    model,
    arguments,
    data_collator=collate,
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=metrics,
    optimizers=(optimizer, None),
).train()
