import lightning as L
import optuna
import torch
from parts import Net, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class Module(L.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.net, self.lr = Net(), lr
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch, index):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def objective(trial):
    L.seed_everything(0)
    train, test = random_split(TensorDataset(*digits()), [0.8, 0.2])
    trainer = L.Trainer(max_epochs=2, default_root_dir=f"runs/sweep-lightning/{trial.number}")
    module = Module(trial.suggest_float("lr", 1e-4, 1e-1, log=True))
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 64))
    return trainer.callback_metrics["accuracy"].item()


study = optuna.create_study(direction="maximize", storage="sqlite:///sweep.db", study_name="sweep", load_if_exists=True)
study.optimize(objective, n_trials=2)
print(study.trials_dataframe(), study.best_params)
