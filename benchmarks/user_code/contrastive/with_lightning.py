import lightning as L
import torch
from parts import Halves, Towers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, random_split


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Towers()

    def loss(self, batch):
        left, right = self.net(**batch[0])
        if self.trainer.world_size > 1:  # what ranks have is gathered, and what is accumulated is not
            left, right = (self.all_gather(each, sync_grads=True).flatten(0, 1) for each in (left, right))
        logits = self.net.log_scale.exp() * left @ right.T
        own = torch.arange(len(logits), device=self.device)
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005)


L.seed_everything(0)
train, test = random_split(Halves(), [0.8, 0.2])
trainer = L.Trainer(max_epochs=3, default_root_dir="runs/contrastive-lightning")
trainer.fit(Module(), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 64))
