"""Other trainers' checkpoints, one module for each format: reads listings into a `Source`, and no tensors.

from_accelerate.py    folders of Accelerate's save_state: FSDP1 and FSDP2 (sharded or full), or one process's
from_deepspeed.py     folders of DeepSpeed's save_checkpoint: ZeRO-1, 2 and 3
from_distributed.py   folders of torch.distributed.checkpoint
from_safetensors.py   a safetensors file, or a folder as Hugging Face lays it out, with or without an index
from_torch.py         a file of torch.save

common.py             what they share; optimizers.py: the state dict of a torch optimizer
archive.py            reads what `torch.save` wrote, and pickles.py its pickle, without running code
trusted.py            pickles that only Python itself can open, in a process of their own
"""
