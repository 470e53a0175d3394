import lightning as L
import torch
from parts import Autoencoder, digits
from torch.utils.data import DataLoader, TensorDataset, random_split


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Autoencoder()

    def losses(self, batch):
        x, _ = batch
        mean, log_std = self.net.encoder(x).chunk(2, 1)
        found = self.net.decoder(mean + torch.randn_like(mean) * log_std.exp())
        return {
            "reconstruction": (found - x).square().sum(1).mean(),
            "kl": (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean() / 2,
        }

    def training_step(self, batch, index):
        losses = self.losses(batch)
        self.log_dict(losses)
        return sum(losses.values())

    def validation_step(self, batch, index):
        self.log_dict({f"val_{name}": loss for name, loss in self.losses(batch).items()}, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005)


L.seed_everything(0)
train, test = random_split(TensorDataset(*digits()), [0.8, 0.2])
trainer = L.Trainer(max_epochs=3, default_root_dir="runs/vae-lightning")
trainer.fit(Module(), DataLoader(train, 64, shuffle=True), DataLoader(test, 64))
