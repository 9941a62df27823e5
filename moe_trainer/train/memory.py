"""What to say when a step runs out of memory."""

import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, DType, Recompute
from moe_trainer.observe.metrics import expert_load


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU or of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def explain_out_of_memory(
    error: Exception, cfg: Config, rank: int, step: int, seq_len: int, expert_counts: torch.Tensor | None
) -> ConfigError:
    """One line with what a step is made of, and what makes it smaller without changing what it computes.

    Args:
        step: the one that failed.
        expert_counts: `[layers, num_experts]` of the step before, over all ranks; None before the second step. A rank
            whose experts are chosen more often than others needs more memory.
    """
    load = {} if expert_counts is None else expert_load(expert_counts.cpu())
    even = f", the busiest expert had {load['expert_load_max_over_mean']:.1f} x the mean load" if load else ""
    micro = cfg.data.micro_batch_size
    ways = [f"data.micro_batch_size={micro // 2} (now {micro}; the global batch stays)"] if micro > 1 else []
    ways += [f"recompute={kind.value}" for kind in (Recompute.selective, Recompute.full) if cfg.recompute is not kind]
    ways += [] if cfg.optim.moments_dtype is DType.bfloat16 else ["optim.moments_dtype=bfloat16"]
    ways += [] if cfg.optim.offload else ["optim.offload=true"]
    ways.append("more ranks in parallel.fsdp or parallel.tp")
    ways.append(f"a shorter data.seq_len (now {seq_len})")
    first = " ".join(str(error).split())[:200]
    return ConfigError(
        f"rank {rank} ran out of memory in step {step} with data.micro_batch_size={micro} sequences of {seq_len} "
        f"tokens{even}; try {', '.join(ways)}. PyTorch said: {first}"
    )
