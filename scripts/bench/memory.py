"""What a training step holds on one GPU, and when: states, after forward, the peak of each part.

    python -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench/memory.py model=olmoe_1b_7b \
        parallel=sp_ep parallel.fsdp=2 parallel.ep=2 data.micro_batch_size=4 [any key of moe-train]

`states` are weights and moments, `kept` is what the forward pass keeps for the backward pass (copies of weights in
the compute type included), the peaks are over everything. GiB of rank 0.
"""

import sys

import torch
import torch.distributed as dist
from record import record
from train import Ours, config_of

from moe_trainer.parallel.process_group import process_group


def main() -> None:
    """One row."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    cfg = config_of(overrides)
    with process_group(cfg.device) as device:
        if device.type != "cuda":
            sys.exit("memory.py: needs a GPU")
        side = Ours(cfg, device)
        side.step()
        row: dict[str, object] = {"what": " ".join(overrides), "ranks": dist.get_world_size()}
        row["states"] = round(side.state_bytes() / 2**30, 1)
        model, optimizer = side.trainer.model, side.trainer.optimizer
        forward, step = model.forward, optimizer.step
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)

        def watched_forward(*args: object, **kwargs: object) -> object:
            out = forward(*args, **kwargs)
            row["kept by forward"] = round((torch.cuda.memory_allocated(device) - before) / 2**30, 1)
            row["peak of forward"] = _peak(device)
            return out

        def watched_step(factor: torch.Tensor) -> None:
            row["peak of backward"] = _peak(device)
            step(factor)

        model.forward, optimizer.step = watched_forward, watched_step
        side.step()
        row["peak of optimizer"] = _peak(device)
        if dist.get_rank() == 0:
            record("memory", row)


def _peak(device: torch.device) -> float:
    """Since the last call."""
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 1)


if __name__ == "__main__":
    main()
