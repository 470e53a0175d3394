from parts import Autoencoder, digits

import distrain


class Variational(distrain.Task):
    def losses(self, model, batch):
        x = batch["inputs"]
        mean, log_std = model.encoder(x).chunk(2, 1)
        found = model.decoder(mean + distrain.randn_like(mean) * log_std.exp())
        return {
            "reconstruction": (found - x).square().sum(1),
            "kl": (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1) / 2,
        }


distrain.train(
    task=Variational,
    model=Autoencoder,
    data=digits,
    batch={"global": 64},
    optim={"lr": 0.005},
    train={"epochs": 3},
    eval={"every": "1 epoch"},
    run_dir="runs/vae",
)
