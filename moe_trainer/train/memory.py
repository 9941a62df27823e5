"""What a rank keeps of each parameter, and what to say when a step runs out of memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moe_trainer.config.choices import DType, Recompute
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.kernels.local_part import local_part
from moe_trainer.observe.metrics import expert_load
from moe_trainer.parallel.fsdp import computed_with_copies
from moe_trainer.parallel.precision import Precision


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of a rank's weights, gradients and moments, all of which are there at the end of the backward pass.

    What comes and goes is not in them: activations, and what FSDP gathers and sums of a few modules at a time.
    """

    parameters: int
    """Their number, frozen ones included."""
    weights: int
    copies: int
    """Of weights in the type of the computation, which are kept."""
    gradients: int
    """With sums in another type that FSDP keeps as long."""
    moments: int
    is_offloaded: bool
    """The moments are in host memory."""

    def __str__(self) -> str:
        on_device = self.weights + self.copies + self.gradients + (0 if self.is_offloaded else self.moments)
        parts = {"weights": self.weights, "copies": self.copies, "gradients": self.gradients, "moments": self.moments}
        each = ", ".join(f"{name} {size / self.parameters:.2g}" for name, size in parts.items() if size)
        where = " in host memory" if self.is_offloaded else ""
        return f"{_size(on_device)} of states, {on_device / self.parameters:.3g} bytes a parameter ({each}{where})"


def states_of(model: nn.Module, cfg: Config, precision: Precision, device: torch.device) -> States:
    """Of a model that is sharded over its data axes; it may be on the meta device."""
    data_ranks = cfg.parallel.dp_replicate * cfg.parallel.fsdp
    is_summed = cfg.data.global_batch_size > cfg.data.micro_batch_size * data_ranks
    # Outside FSDP a weight keeps what the products of the only micro-batch give: `parallel.compute_copy`.
    alone = computed_with_copies(model)
    weights = copies = gradients = moments = parameters = 0
    for parameter in model.parameters():
        number, dtype = local_part(parameter).numel(), parameter.dtype
        parameters += number
        weights += number * dtype.itemsize
        if parameter in alone and precision.compute.itemsize < dtype.itemsize and keeps_copies(cfg):
            copies += number * precision.compute.itemsize
        if not parameter.requires_grad:
            continue
        wide = torch.promote_types(dtype, torch.float32)
        is_sum = model.is_tied and parameter is model.lm_head.weight  # of its two uses
        single = precision.compute if parameter in alone and device.type == "cuda" and not is_sum else dtype
        gradients += number * (wide if is_summed else single).itemsize
        if cfg.parallel.dp_replicate > 1 and precision.reduce is not dtype:
            gradients += number * precision.reduce.itemsize  # FSDP keeps the sums over copies until the pass ends
        chosen = cfg.optim.moments_dtype
        moments += 2 * number * (wide if chosen is DType.auto else getattr(torch, chosen.value)).itemsize
    return States(parameters, weights, copies, gradients, moments, cfg.optim.offload)


def keeps_copies(cfg: Config) -> bool:
    """Whether what FSDP does not manage is cast once a step, by the optimizer; without recomputation every layer's
    copies are there at the end of the forward pass in any case (docs/decisions/0009)."""
    return cfg.recompute is Recompute.none


def _size(size: int) -> str:
    for unit, width in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= width:
            return f"{size / width:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


@contextmanager
def out_of_memory_is(message: Callable[[], str]) -> Iterator[None]:
    """What runs out of a GPU's or the host's memory inside raises ConfigError: the message and what PyTorch said."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ConfigError(f"{message()}. PyTorch said: {' '.join(str(error).split())[:200]}") from error


def how_to_need_less(cfg: Config, rank: int, step: int, seq_len: int, expert_counts: torch.Tensor | None) -> str:
    """One line with what a step that ran out of memory is made of, and what makes it smaller.

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
    types = [name for name in ("moments_dtype", "weights_dtype") if getattr(cfg.optim, name) is DType.auto]
    ways += [f"optim.{name}=bfloat16" for name in types if cfg.dtype is not DType.float64]
    ways += [] if cfg.optim.offload else ["optim.offload=true"]
    ways.append("more ranks in parallel.fsdp or parallel.tp")
    ways.append(f"a shorter data.seq_len (now {seq_len})")
    return (
        f"rank {rank} ran out of memory in step {step} with data.micro_batch_size={micro} sequences of {seq_len} "
        f"tokens{even}; try {', '.join(ways)}"
    )
