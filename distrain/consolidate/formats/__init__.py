"""What other trainers write, one module for each: all of them turn listings into a `Source`, and read no tensor.

    accelerate    folders of Accelerate's save_state: FSDP1 and FSDP2 (sharded or full), or one process's
    deepspeed     folders of DeepSpeed's save_checkpoint: ZeRO-1, 2 and 3
    distributed   folders of torch.distributed.checkpoint
    safetensors   a safetensors file, or a folder as Hugging Face lays it out, with or without an index
    torch         a file of torch.save

Inside: `common` (what they share), `optimizers` (torch's state dict of an optimizer), `trusted` (a pickle that only
Python itself can open, in a process of its own).
"""
