"""The repeated blocks of a model, and computing their activations again in the backward pass."""

from __future__ import annotations

import copy
import io
import os
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from logged import logged
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import in_world

from distrain.config import UserError
from distrain.networks.blocks import block_classes, blocks_of, checkpoint_activations
from distrain.networks.gpt import GPT
from distrain.networks.seq2seq import seq2seq

# --------------------------------------------------------------------------------------------------------------------
# Models


class Moody(nn.Module):
    """Draws from Python's and NumPy's generators, and counts its calls in a buffer that it uses."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, debug: float = 1.0) -> Tensor:
        assert isinstance(self.calls, Tensor)
        self.calls.add_(1.0)
        factor = random.random() + np.random.rand()
        return x + torch.tanh(self.norm(self.up(x)) * factor / self.calls) * debug


class Stack(nn.Module):
    """Blocks of a user's own; the first gets inputs that need no gradient."""

    def __init__(self, width: int = 6, depth: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Moody(width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, debug=0.5)  # a name that torch's checkpoint has an argument of
        return self.head(x)


def gpt() -> tuple[nn.Module, Tensor]:
    return GPT(11, 16, n_layer=3, n_head=2, d_model=16, dropout=0.3), torch.randint(0, 11, (4, 16))


def vit() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 32, dropout=0.2, num_classes=5)
    nn.init.normal_(model.heads[0].weight)  # zero at first, and so would be all gradients
    return model, torch.randn(4, 3, 16, 16)


def resnet() -> tuple[nn.Module, Tensor]:
    return torchvision.models.resnet18(num_classes=5), torch.randn(4, 3, 32, 32)


def stack() -> tuple[nn.Module, Tensor]:
    return Stack(), torch.randn(5, 6)


def hugging_face() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=11, n_positions=16)
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 11, (4, 16))


MODELS = (gpt, vit, resnet, stack, hugging_face)
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def called(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs, use_cache=False).logits if "transformers" in type(model).__module__ else model(inputs)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def made(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model, the same with its activations computed again, and inputs."""
    seed_all(0)
    model, inputs = make()
    other = copy.deepcopy(model)
    checkpoint_activations(other, True)
    return model.train(), other.train(), inputs


def step(model: nn.Module, inputs: Tensor, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Any]:
    """Go forward and backward; return (loss, what comes next out of the generators)."""
    seed_all(seed)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = called(model, inputs).float().square().mean()
    loss.backward()
    return loss.detach(), (torch.rand(()).item(), random.random(), np.random.rand())


# --------------------------------------------------------------------------------------------------------------------
# Which blocks


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "names", "count"),
    [
        (lambda: gpt()[0], ["Block"], 3),
        (lambda: GPT(11, 8, n_layer=1, n_head=2, d_model=8), ["Block"], 1),
        (lambda: seq2seq(9, 9, 0, 1, 2, d_model=8, n_layer=2), ["Block"], 4),
        (lambda: seq2seq(9, 9, 0, 1, 2, kind="gru", d_model=8), [], 0),
        (lambda: resnet()[0], ["BasicBlock"], 8),
        (lambda: vit()[0], ["EncoderBlock"], 3),
        (lambda: torchvision.models.swin_t(), ["SwinTransformerBlock"], 12),
        (lambda: torchvision.models.convnext_tiny(), ["CNBlock"], 18),
        (lambda: torchvision.models.densenet121(), ["_DenseLayer"], 58),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), ["TransformerEncoderLayer"], 2),
        (lambda: nn.Sequential(Moody(4), Moody(4), Stack(8)), ["Moody"], 5),
        (plain_mlp, [], 0),
    ],
    ids=["gpt", "gpt1", "seq2seq", "gru", "resnet", "vit", "swin", "convnext", "densenet", "torch", "nested", "mlp"],
)
def test_blocks_are_found(make: Callable[[], nn.Module], names: list[str], count: int) -> None:
    with torch.device("meta"):
        try:
            model = make()
        except (NotImplementedError, TypeError):
            model = None  # some initialisations need numbers
    model = make() if model is None else model
    classes = block_classes(model)
    assert [kind.__name__ for kind in classes] == names
    assert len(blocks_of(model, classes)) == count


@pytest.mark.parametrize(
    ("model_type", "names"), [("gpt2", ["GPT2Block"]), ("bert", ["BertLayer"]), ("llama", ["LlamaDecoderLayer"])]
)
def test_blocks_that_transformers_lists(model_type: str, names: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    extra = {"intermediate_size": 16, "num_key_value_heads": 2} if model_type == "llama" else {}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert [kind.__name__ for kind in block_classes(model)] == names
    assert len(blocks_of(model, block_classes(model))) == 2


class Two(nn.Module):
    """Blocks of two classes in turn, as hybrids of attention and recurrence have, and a few small ones."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]
        self.blocks = nn.Sequential(layers[0], Moody(24), layers[1], Moody(24), Moody(24))
        self.small = nn.ModuleList([torchvision.ops.MLP(1, [1]), torchvision.ops.MLP(1, [1])])


def test_hybrids_have_blocks_of_several_classes() -> None:
    assert [kind.__name__ for kind in block_classes(Two())] == ["Moody", "TransformerEncoderLayer"]


def test_a_class_by_name() -> None:
    model = gpt()[0]
    assert [kind.__name__ for kind in block_classes(model, "Attention")] == ["Attention"]
    with logged() as said:
        checkpoint_activations(model, "Attention")
    assert said == ["activations of 3 x Attention are recomputed in the backward pass"]
    with pytest.raises(
        UserError, match=r"activation_checkpointing: the model has no class 'Blok'; did you mean 'Block'"
    ):
        block_classes(model, "Blok")
    with pytest.raises(UserError, match="the model has no class 'X'; it has Attention, Block, GPT, "):
        block_classes(model, "X")


def test_without_blocks_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential has no repeated blocks; name the class .*or set it to fa"):
        checkpoint_activations(plain_mlp(), True)
    with logged() as said:
        checkpoint_activations(plain_mlp(), False)
    assert said == []


# --------------------------------------------------------------------------------------------------------------------
# Computing them again


def assert_equal_buffers(found: nn.Module, expected: nn.Module) -> None:
    for (name, buffer), (_, found_buffer) in zip(expected.named_buffers(), found.named_buffers(), strict=True):
        assert torch.equal(found_buffer, buffer), name


@every_model
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_differs(make: Callable[[], tuple[nn.Module, Tensor]], dtype: torch.dtype | None) -> None:
    model, other, inputs = made(make)
    assert list(other.state_dict()) == list(model.state_dict())
    assert [name for name, _ in other.named_modules()] == [name for name, _ in model.named_modules()]
    for seed in range(3):
        assert step(model, inputs, seed, dtype) == step(other, inputs, seed, dtype)
        for (name, expected), (_, found) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert found.grad is not None, name
            assert torch.equal(found.grad, expected.grad), name  # type: ignore[arg-type]
        assert_equal_buffers(other, model)
    outputs = []
    for each in (model, other):
        seed_all(0)
        with torch.no_grad():
            outputs.append(called(each.eval(), inputs))
    assert torch.equal(*outputs)


def test_buffers_move_again_after_an_evaluation_with_gradients() -> None:
    model, other, inputs = made(resnet)
    for training in (False, True, False, True):
        for each in (model, other):
            each.train(training)
            step(each, inputs, 0)
    assert_equal_buffers(other, model)


class Late(nn.Module):
    """Has buffers that the first pass does not change: a mean of zeros, a counter, and a large one."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("large", torch.zeros(large))

    def forward(self, x: Tensor) -> Tensor:
        if self.counter > 0 or self.norm.num_batches_tracked > 1:
            self.counter += 1
            self.large += 1
        return x + self.norm(self.inner(x) + x * self.large[0])


@pytest.mark.parametrize("large", [1, 2**17])
def test_buffers_that_change_later_move_once(large: int) -> None:
    model, other, inputs = made(lambda: (nn.Sequential(Late(large), Late(large)), torch.randn(4, 6)))
    for seed in range(4):
        for each in (model, other):
            step(each, inputs, seed)
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter += 0.1
    assert model[1].norm.running_mean.any()
    assert_equal_buffers(other, model)


class Live(TorchDispatchMode):
    """Counts the bytes of what operations have made and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self._known:
                storage = each.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                self._known.add(pointer)
                self.now += size
                weakref.finalize(storage, self._gone, pointer, size)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


def kept_and_peak(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Return the bytes that a forward pass leaves behind, and the most at any moment of a step."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    with Live() as live:
        loss = called(model, inputs).square().mean()
        kept = live.now
        loss.backward()
    return kept, live.peak - parameters  # the gradients are there in any case


def test_less_is_kept() -> None:
    seed_all(0)
    model = GPT(11, 64, n_layer=8, n_head=2, d_model=32)
    other = copy.deepcopy(model)
    checkpoint_activations(other, True)
    inputs = torch.randint(0, 11, (16, 64))
    (kept, peak), (other_kept, other_peak) = kept_and_peak(model, inputs), kept_and_peak(other, inputs)
    print(f"kept {kept / 2**20:.1f} MiB, peak {peak / 2**20:.1f}; {other_kept / 2**20:.1f}, {other_peak / 2**20:.1f}")
    one_input = 16 * 64 * 32 * 4
    assert other_kept < 8 * one_input + 0.1 * kept + 16 * 64 * 11 * 4
    assert other_peak < 0.4 * peak


def test_saved_tensors_are_those_outside_the_blocks() -> None:
    model, other, inputs = made(gpt)
    counts = []
    for each in (model, other):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            called(each, inputs)
        counts.append(len(saved))
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_compute_their_own_blocks(way: str) -> None:
    _, other, inputs = made(gpt)
    if way == "deepcopy":
        clone = copy.deepcopy(other)
    else:
        file = io.BytesIO()
        torch.save(other, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    before = step(other, inputs, 0)
    assert step(clone, inputs, 0) == before
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert step(clone, inputs, 0)[0] == 0
    assert step(other, inputs, 0) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [gpt, resnet, pytest.param(hugging_face, marks=pytest.mark.more)], ids=lambda make: make.__name__
)
def test_it_compiles(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, other, inputs = made(make)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    other = copy.deepcopy(model)
    checkpoint_activations(other, True)
    other.compile(backend="aot_eager")
    for seed in range(2):
        torch.testing.assert_close(step(other, inputs, seed)[0], step(model, inputs, seed)[0])
        for (name, expected), (_, found) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, msg=name, rtol=1e-4, atol=1e-5)
        for (name, buffer), (_, found_buffer) in zip(model.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(found_buffer, buffer, msg=name)


def gradients_in_a_world(way: str, again: bool) -> list[list[float]]:
    """Return the gradient of each parameter, summed over two steps, of a model under DDP or sharded by FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model, inputs = in_this_world(again)
    wrapped = model
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks_of(model, block_classes(model)).values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for seed in range(2):
        seed_all(seed + dist.get_rank())
        wrapped(inputs).square().mean().backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    dist.barrier()
    dist.destroy_process_group()
    return [gradient.flatten().tolist() for gradient in gradients if gradient is not None]


def in_this_world(again: bool) -> tuple[nn.Module, Tensor]:
    """Return a model, and what this rank gives it."""
    import torch.distributed as dist

    seed_all(0)
    model = GPT(11, 16, n_layer=2, n_head=2, d_model=16, dropout=0.3)
    if again:
        checkpoint_activations(model, True)
    return model, torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))


def weights_with_zero(stage: int, again: bool) -> list[list[float]]:
    """Return the weights after two steps of a DeepSpeed engine of that ZeRO stage."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed("gloo", verbose=False)
    model, inputs = in_this_world(again)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for seed in range(2):
        seed_all(seed + dist.get_rank())
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = engine(inputs).float().square().mean()
        engine.backward(loss)
        engine.step()
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        weights = [parameter.detach().flatten().tolist() for parameter in parameters]
    dist.barrier()
    dist.destroy_process_group()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_it_works_in_a_world(way: str) -> None:
    kept = in_world(2, gradients_in_a_world, way, False)
    assert in_world(2, gradients_in_a_world, way, True) == kept


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_it_works_with_deepspeed(stage: int) -> None:
    pytest.importorskip("deepspeed")
    kept = in_world(2, weights_with_zero, stage, False)
    assert in_world(2, weights_with_zero, stage, True) == kept
