from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

BASE = "prepared/llm/model"
pairs = load_dataset("json", data_files="prepared/llm/pairs.jsonl", split="train").train_test_split(0.2, seed=0)
arguments = DPOConfig(
    output_dir="runs/dpo-trl",
    beta=0.1,
    max_length=256,
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    eval_strategy="epoch",
    report_to="none",
    bf16=False,  # by default on, which fails without a GPU
)
DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(BASE),
    args=arguments,
    processing_class=AutoTokenizer.from_pretrained(BASE),
    train_dataset=pairs["train"],
    eval_dataset=pairs["test"],
).train()
