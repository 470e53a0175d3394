import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Net, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, index):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log("val_loss", cross_entropy(logits, y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


L.seed_everything(0)
train, test = random_split(TensorDataset(*digits()), [0.8, 0.2])
trainer = L.Trainer(
    max_epochs=3,
    default_root_dir="runs/own-model-lightning",
    callbacks=[ModelCheckpoint(monitor="accuracy", mode="max", save_last=True)],
)
trainer.fit(Module(), DataLoader(train, 64, shuffle=True), DataLoader(test, 64))
