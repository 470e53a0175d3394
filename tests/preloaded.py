"""What the server of test processes imports once for all of them: see worlds.py."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is first imported, which otherwise looks for one and warns

import accelerate  # noqa: F401
import pandas  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torchvision.transforms.v2  # noqa: F401

import distrain.inference
import distrain.launcher
import distrain.loop
import distrain.strategy.fsdp2
import distrain.strategy.zero  # noqa: F401
from distrain.strategy.world import quiet_deepspeed

quiet_deepspeed()
