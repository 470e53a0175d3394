import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2


class Module(L.LightningModule):
    def __init__(self, classes):
        super().__init__()
        self.net = resnet18(num_classes=classes)
        weights = load_file("prepared/resnet18.safetensors")
        self.net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch, index):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        head = list(self.net.fc.parameters())
        body = [p for name, p in self.net.named_parameters() if not name.startswith("fc.")]
        optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-3}])
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


L.seed_everything(0)
end = [v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)]
train = ImageFolder("prepared/images/train", v2.Compose([v2.RandomCrop(32, padding=4, pad_if_needed=True), *end]))
test = ImageFolder("prepared/images/test", v2.Compose(end))
trainer = L.Trainer(
    max_epochs=2,
    default_root_dir="runs/images-lightning",
    callbacks=[ModelCheckpoint(monitor="accuracy", mode="max", save_last=True)],
)
trainer.fit(Module(len(train.classes)), DataLoader(train, 32, shuffle=True), DataLoader(test, 32))
