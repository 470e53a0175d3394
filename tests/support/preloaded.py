"""What the server of test processes imports once for all of them: see worlds.py."""

import os

# before DeepSpeed is first imported, which otherwise looks for a GPU; CUDA that was started here would fail in children
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import importlib
import pkgutil

import distrain.parallel.comm

# what a start imports on its way, each time anew: with ZeRO, DeepSpeed imports torch's compiler and accelerate
# transformers, which takes longer than the few steps of most tests
for name in (
    "accelerate.commands.launch",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "optuna",
    "pandas",
    "pytest",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torchvision.transforms.v2",
    "transformers.integrations.deepspeed",
    *(module.name for module in pkgutil.walk_packages(distrain.__path__, "distrain.")),
):
    if name != "distrain.__main__":
        importlib.import_module(name)

distrain.parallel.comm.quiet_deepspeed()
