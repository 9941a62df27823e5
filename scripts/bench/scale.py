"""Weak scaling over GPUs, and the cost of longer sequences, more experts and more layers: rows of `train.py`.

    python scripts/bench/scale.py model=olmoe_1b_7b model.num_layers=4 data.micro_batch_size=4 [--steps=12]

Each row is a run of its own: 1, 2, 4, ... GPUs with SP and EP over all of them, then, on all of them, the sequence
doubled (at half the batch), the experts doubled and the layers doubled.
"""

import subprocess
import sys
from pathlib import Path

import torch

from moe_trainer.config.store import compose


def main() -> None:
    """Run and let the runs print."""
    given = sys.argv[1:]
    cfg = compose("train", [argument for argument in given if not argument.startswith("--")])
    most = max(torch.cuda.device_count(), 1)
    worlds = [2**n for n in range(most.bit_length()) if 2**n <= most]
    for world in worlds:
        _run(world, given)
    seq_len, batch = cfg.data.seq_len or 4096, cfg.data.micro_batch_size
    _run(most, [*given, f"data.seq_len={2 * seq_len}", f"data.micro_batch_size={max(batch // 2, 1)}"])
    _run(most, [*given, f"model.num_experts={2 * cfg.model.num_experts}"])
    _run(most, [*given, f"model.num_layers={2 * cfg.model.num_layers}"])


def _run(world: int, arguments: list[str]) -> None:
    mesh = ["parallel=sp_ep", f"parallel.fsdp={world}", f"parallel.ep={world}"] if world > 1 else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run([*launcher, str(Path(__file__).with_name("train.py")), *arguments, *mesh], check=True)


if __name__ == "__main__":
    main()
