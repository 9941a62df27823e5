"""How long the host takes to queue a step of one rank among many, on one GPU; without a GPU only to try the script.

    python scripts/bench/host.py --ranks=2 model=qwen3_30b_a3b model.num_layers=12 model.num_experts=16 \
        model.intermediate_size=128 model.vocab_size=8000 data.seq_len=1024 parallel=sp_ep parallel.fsdp=2 \
        parallel.ep=2 [any key of moe-train] [--steps=24] [--profile]

The other ranks do not exist, and collectives give this rank's own data: losses mean nothing, and what NCCL takes is
missing. With few tokens and narrow experts the rest is mostly the host's, with its waits for each layer's count of
rows and for the end of the step. Keep an expert rank's rows well above 4,096, where our grouped product takes over
from PyTorch's, or well below. The row: median and fastest of the last two thirds of the steps. `--profile` adds
where the time goes, by function: by Python's profiler, which doubles it, and with the backward pass on the main
thread.
"""

import cProfile
import os
import pstats
import statistics
import sys
import time

import torch
import torch.distributed as dist
from record import option, record
from torch.testing._internal.distributed.fake_pg import FakeStore  # PyTorch's own; registers itself
from train import Ours, config_of, synchronize

from moe_trainer.config.choices import DeviceName


def main() -> None:
    """Measure what the command line describes."""
    ranks, steps = int(option("ranks", "2")), int(option("steps", "24"))
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "1"}  # this machine has one of them
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    cfg = config_of(overrides)
    device = torch.device("cuda", 0) if cfg.device is DeviceName.cuda else torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        side = Ours(cfg, device)
        seconds = [_step(side, device) for _ in range(steps)][steps // 3 :]
        row = {"what": " ".join(overrides), "ranks": ranks, "ms/step": statistics.median(seconds) * 1e3}
        record("host", row | {"fastest": min(seconds) * 1e3})
        if "--profile" in sys.argv:
            with torch.autograd.set_multithreading_enabled(False), cProfile.Profile() as profiler:
                for _ in range(4):
                    _step(side, device)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    finally:
        dist.destroy_process_group()


def _step(side: Ours, device: torch.device) -> float:
    start = time.perf_counter()
    side.step()
    synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
