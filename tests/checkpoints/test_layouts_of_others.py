"""How other trainers lay a model out beside what it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from worlds import in_world

from distrain.checkpoints.export import export, open_foreign
from distrain.networks.weights import load_weights
from distrain.system.errors import UserError


class Net(nn.Module):
    def __init__(self, wrapped: bool = False):
        super().__init__()
        if wrapped:
            self.module = Net()
        else:
            self.embed, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
            self.layers = nn.ModuleDict({"0": nn.Linear(4, 8)})

    def forward(self, tokens):
        return self.layers["0"](self.norm(self.embed(tokens)))


def trained() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def torchtitan(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The parameters under no key, and mappings beside them."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        **model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=flat),
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": b"state", "world_size": 1},
        "train_state": {"step": torch.tensor(3, dtype=torch.int32), "ntokens_seen": torch.tensor(24)},
    }


def composer(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One mapping around the model and what it was trained with."""
    return {
        "state": {
            "model": model.state_dict(),
            "optimizers": {"AdamW": get_optimizer_state_dict(model, optimizer)},
            "timestamp": {"Timestamp": {"batch": 3}},
        },
        "rng": [{"torch": torch.get_rng_state()}],
    }


def with_a_key(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The model under its usual key, and a tensor under no mapping."""
    return {"model": model.state_dict(), "rng.cpu": torch.get_rng_state(), "step": 3}


def file_of(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def folder_of(content: dict[str, Any], path: Path) -> None:
    dcp.save(content, checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize(
    ("layout", "write", "state", "step"),
    [
        (torchtitan, folder_of, {"exp_avg", "exp_avg_sq", "step"}, 3),
        (with_a_key, folder_of, set(), 3),
        (composer, folder_of, set(), None),
        (composer, file_of, set(), None),
    ],
)
def test_the_model_alone_is_taken_for_the_model(layout, write, state, step, tmp_path):
    model, optimizer = trained()
    write(layout(model, optimizer), tmp_path / "theirs")
    with open_foreign(tmp_path / "theirs") as source:
        names = {name.removeprefix("model/") for name in source.names if name.startswith("model/")}
        kept = {name.rpartition("/")[2] for name in source.names if name.startswith("optimizer/")}
        assert (kept, source.step) == (state, step)
    assert names == set(model.state_dict())
    # and it is the run's and the export's
    again = Net()
    load_weights(again, tmp_path / "theirs")
    found = safetensors.torch.load_file(export(tmp_path / "theirs", tmp_path / "model.safetensors").paths[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("alone", [False, True])
def test_what_one_rank_saved_is_no_whole_model(alone, tmp_path):
    for rank in (0, 2):
        safetensors.torch.save_file(
            {"a.weight": torch.ones(2, 4)},
            tmp_path / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors",
            metadata={
                "DCP_SHARDING_INFO": json.dumps({"a.weight": {"saved_offsets": [rank, 0]}}),
                "DCP_VERSION": "1.0",
            },
        )
    second = tmp_path / "shard-00003-model-00001-of-00001.safetensors"
    if alone:
        second.rename(second := tmp_path / "model.safetensors")
        (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    for path in (tmp_path, second):
        with pytest.raises(
            UserError, match=r"holds the parts of tensors that one rank saved.*enable_consolidation=True"
        ):
            open_foreign(path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_model_may_have_a_name_that_wrappers_give(prefix, tmp_path):
    model, again = Net(wrapped=True), Net(wrapped=True)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, path)
    load_weights(again, path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def save_sharded(path: str) -> None:
    """Save what a rank holds of a sharded model, as `torch.save(model.state_dict())` does under FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.save({"a.weight": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}, f"{path}{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("trust", [False, True])
def test_one_ranks_sharded_tensors_say_how_to_save_them(trust, tmp_path):
    in_world(2, save_sharded, str(tmp_path / "rank"))
    with pytest.raises(UserError, match=r"one rank's parts of sharded tensors.*full_state_dict=True") as refused:
        open_foreign(tmp_path / "rank0", trust=trust)
    assert "--trust" not in str(refused.value)
