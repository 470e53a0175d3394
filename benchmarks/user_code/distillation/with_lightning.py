import lightning as L
import torch
from parts import Net, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(width=8)
        teacher = Net(width=128).requires_grad_(False).eval()
        teacher.load_state_dict(torch.load("prepared/teacher.pt"))
        self.kept = [teacher]  # in a list, so that no checkpoint holds it
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def losses(self, batch):
        x, y = batch
        logits = self.net(x)
        wanted = (self.kept[0].to(self.device)(x) / 3).softmax(1)
        return logits, cross_entropy(logits, y), -(wanted * (logits / 3).log_softmax(1)).sum(1).mean()

    def training_step(self, batch, index):
        _, labels, teacher = self.losses(batch)
        self.log_dict({"labels": labels, "teacher": teacher})
        return labels + teacher

    def validation_step(self, batch, index):
        logits, labels, teacher = self.losses(batch)
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log_dict({"val_labels": labels, "val_teacher": teacher}, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


L.seed_everything(0)
train, test = random_split(TensorDataset(*digits()), [0.8, 0.2])
trainer = L.Trainer(max_epochs=3, default_root_dir="runs/distillation-lightning")
trainer.fit(Module(), DataLoader(train, 64, shuffle=True), DataLoader(test, 64))
