"""What other trainers write, one module for each: all of them turn listings into a `Source`, and read no tensor.

from_accelerate.py    folders of Accelerate's save_state: FSDP1 and FSDP2 (sharded or full), or one process's
from_deepspeed.py     folders of DeepSpeed's save_checkpoint: ZeRO-1, 2 and 3
from_distributed.py   folders of torch.distributed.checkpoint
from_safetensors.py   a safetensors file, or a folder as Hugging Face lays it out, with or without an index
from_torch.py         a file of torch.save

common.py             what they share; headers.py: a safetensors header; optimizers.py: torch's state dict of one
trusted.py            a pickle that only Python itself can open, in a process of its own
"""
