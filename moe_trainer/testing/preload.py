"""Imported once by the fork server: every forked rank then starts with the whole program in memory.

The lazily imported parts of torch are named too. Whatever is left out, each rank of each test imports again: the
program and pytest alone are a third of a CPU-second.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy.ma  # noqa: E402, F401
import numpy.random  # noqa: E402, F401
import torch  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.checkpoint.state_dict  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import torch.distributed.tensor  # noqa: E402, F401
import torch.onnx  # noqa: E402, F401

import moe_trainer.cli.demo  # noqa: E402, F401  training, checkpoints, generation

# A rank's collections then neither walk what is imported nor copy its pages.
gc.collect()
gc.freeze()
