"""What the server of test processes imports once for all of them: see worlds.py."""

import os

# before DeepSpeed is first imported, which otherwise looks for a GPU; CUDA that was started here would fail in children
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import accelerate  # noqa: F401
import pandas  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401
import torchvision.transforms.v2  # noqa: F401

import distrain.inference
import distrain.launchers
import distrain.loop
import distrain.parallel.fsdp2
import distrain.parallel.zero  # noqa: F401
from distrain.parallel.comm import quiet_deepspeed

quiet_deepspeed()
