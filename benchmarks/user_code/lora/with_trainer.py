from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

BASE = "prepared/llm/model"
tokenizer = AutoTokenizer.from_pretrained(BASE)


class Rows(Dataset):
    def __init__(self, path):
        ids = tokenizer(Path(path).read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
        self.rows = ids[: len(ids) // 64 * 64].view(-1, 64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


torch.manual_seed(0)
config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
arguments = TrainingArguments(
    output_dir="runs/lora-trainer",
    max_steps=10,
    per_device_train_batch_size=16,
    learning_rate=5e-3,
    lr_scheduler_type="cosine",
    eval_strategy="steps",
    eval_steps=5,
    report_to="none",
)
Trainer(
    model,
    arguments,
    data_collator=default_data_collator,
    train_dataset=Rows("prepared/llm/train.txt"),
    eval_dataset=Rows("prepared/llm/test.txt"),
).train()
