"""Imported once by the fork server: every forked rank then starts with torch in memory.

The lazily imported parts are named too; left out, each rank of each test would pay about a CPU-second for them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy.random  # noqa: E402, F401
import torch  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.checkpoint.state_dict  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import torch.distributed.tensor  # noqa: E402, F401
import torch.onnx  # noqa: E402, F401
