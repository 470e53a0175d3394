"""Real folders of other trainers: what Accelerate, DeepSpeed and torch themselves write, from real worlds on CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

WIDTH = 6  # no multiple of the world: padding and uneven rows
STEPS = 3
ZERO: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: (world, stage, what the configuration adds)
    "zero1": (2, 1, {}),
    "zero2": (2, 2, {}),
    "zero3": (2, 3, {}),
    "zero1-bf16": (2, 1, {"precision": "bf16"}),
    "zero2-bf16": (2, 2, {"precision": "bf16"}),
    "zero3-bf16": (2, 3, {"precision": "bf16"}),
    "zero2-elastic": (2, 2, {"zero": {"elastic_checkpoint": True}}),
    "zero2-round-robin": (3, 2, {"zero": {"round_robin_gradients": True}}),
    "zero3-sub-groups": (3, 3, {"zero": {"sub_group_size": 40}}),
}


def build_model() -> Any:
    """Return a model with tied weights, a frozen layer, buffers, odd sizes, and a parameter of a single element."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, WIDTH)
            self.body = nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, WIDTH))
            self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
            self.scale = nn.Parameter(torch.ones(1))
            self.head = nn.Linear(WIDTH, 11, bias=False)
            self.head.weight = self.embed.weight
            self.frozen.weight.requires_grad = False
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.frozen(self.body(self.embed(tokens)))
            self.mean.mul_(0.9).add_(0.3)
            self.seen.add_(len(tokens))
            return self.head(hidden) * self.scale

    torch.manual_seed(0)
    return Model()


def groups(model: Any) -> list[dict[str, Any]]:
    """Return two parameter groups, as every recipe with weight decay has."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def loss_of(model: Any, step: int, rank: int) -> Any:
    """Return the loss of one batch, which differs from rank to rank."""
    import torch

    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(11, (8,), generator=generator)
    return torch.nn.functional.cross_entropy(model(tokens).float(), (tokens + 1) % 11)


# --------------------------------------------------------------------------------------------------------------------
# In the processes of a world


def write_fsdp(out: str, kinds: list[str]) -> dict[str, Any]:
    """Train under Accelerate's FSDP2 and `save_state` for each state-dict type; rank 0's whole state is returned."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState(cpu=True)
    # Accelerate honours FSDP only where the world is of GPUs, though it runs on CPU as well
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = build_model()
    model.frozen.weight.requires_grad = True  # FSDP2 prepares groups anew by name, all of them trained
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step, accelerator.process_index))
        optimizer.step()
        optimizer.zero_grad()
    for kind in kinds:
        plugin.set_state_dict_type(kind)
        accelerator.save_state(str(Path(out) / kind))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer.optimizer, options=options),
    }
    return _leave(whole if accelerator.process_index == 0 else {})


def write_fsdp1(out: str) -> dict[str, Any]:
    """Train under FSDP1 and save its sharded states as Accelerate's `save_fsdp_model` and `save_fsdp_optimizer` do.

    Accelerate itself gives FSDP1 no device on CPU.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    dist.init_process_group("gloo")
    model = FSDP(build_model(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        dcp.save({"model": model.state_dict()}, checkpoint_id=Path(out) / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": FSDP.optim_state_dict(model, optimizer)}, checkpoint_id=Path(out) / "optimizer_0")
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True)):
        # of the optimizer, torch's own full state repeats one of the moments where it is gathered on CPU
        whole = {"model": model.state_dict()}
    return _leave(whole)


def write_plain(out: str) -> dict[str, Any]:
    """Train under Accelerate in one process and `save_state`, as safetensors and as pickles."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build_model()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step, 0))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(Path(out) / "safetensors"))
    accelerator.save_state(str(Path(out) / "bin"), safe_serialization=False)
    return {"model": accelerator.unwrap_model(model).state_dict(), "optimizer": optimizer.state_dict()}


def write_deepspeed(out: str, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train a DeepSpeed engine of that ZeRO stage and `save_checkpoint`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo", verbose=False)
    precision = options.pop("precision", "fp32")
    model = build_model()
    torch_adam = torch.optim.AdamW(groups(model), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage, **options.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        **options,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch_adam, config=config)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step, engine.global_rank))
        engine.step()
    engine.save_checkpoint(out, client_state={"epoch": 2})
    return _leave({"stage": engine.zero_optimization_stage()})


def write_dcp(out: str) -> dict[str, Any]:
    """Write with `torch.distributed.checkpoint`: tensors sharded along rows, along columns, in both, and whole."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    full = {
        "rows": torch.randn(5, 3),
        "columns": torch.randn(4, 7, 3),
        "whole": torch.randn(3, 3),
        "half": torch.randn(9, 2).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "half": [Shard(0)], "whole": [Replicate()]}
    state: dict[str, Any] = {
        name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor
        for name, tensor in full.items()
    }
    state["transposed"] = full["transposed"] = torch.randn(4, 5).t()
    dcp.save({"model": state, "epoch": 3, "note": "text"}, checkpoint_id=out)
    return _leave(full)


def _leave(result: Any) -> Any:
    import gc

    import torch.distributed as dist

    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return result
