from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "prepared/llm/model"
tokenizer = AutoTokenizer.from_pretrained(BASE)


def rows(path):
    ids = tokenizer(Path(path).read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: len(ids) // 64 * 64].view(-1, 64)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        self.net = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)

    def training_step(self, batch, index):
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.net(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):  # the adapters alone
        kept = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}


L.seed_everything(0)
trainer = L.Trainer(max_steps=10, val_check_interval=5, default_root_dir="runs/lora-lightning")
train, test = (rows(f"prepared/llm/{name}.txt") for name in ("train", "test"))
trainer.fit(Module(), DataLoader(train, 16, shuffle=True), DataLoader(test, 16))
