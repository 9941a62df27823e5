"""What a step is worth knowing by, and the log that sends it to every sink.

Keys: `step loss aux_loss z_loss grad_norm lr tokens tokens_per_second tokens_per_second_per_gpu
tflops_per_gpu mfu memory_gib expert_load_max_over_mean dead_experts expert_load_entropy`.
"""

import math
import resource
import sys
from pathlib import Path

import torch

from moe_trainer.config.schema import Config, WandbMode
from moe_trainer.observe.sinks import ConsoleSink, JsonlSink, Sink, WandbSink


class MetricsLog:
    """Sends the metrics of a step to the console, `metrics.jsonl` and wandb. Built on rank 0 only.

    Args:
        run_folder: existing folder of the run; on resume its `metrics.jsonl` is appended to.
        total_steps: step at which this command stops.
        start_step: steps taken before this command.
    """

    def __init__(self, run_folder: Path, cfg: Config, total_steps: int, start_step: int) -> None:
        self._sinks: list[Sink] = [
            JsonlSink(run_folder / "metrics.jsonl"),
            ConsoleSink(total_steps, start_step, cfg.logging.every),
        ]
        if cfg.logging.wandb is not WandbMode.disabled:
            self._sinks.append(WandbSink(run_folder, cfg))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one step.

        Args:
            step: 1-based: the number of steps taken.
            metrics: host numbers; reading them from the device is the caller's business.
        """
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Finish every sink."""
        for sink in self._sinks:
            sink.close()


def throughput(
    tokens: int, seconds: float, world_size: int, flops_per_token: float, peak: float | None
) -> dict[str, float]:
    """Speed of a step.

    Args:
        tokens: tokens of the step, over all ranks.
        seconds: wall-clock time of the step.
        flops_per_token: from `observe.flops`.
        peak: FLOP/s of one device; None leaves `mfu` out.

    Returns:
        `tokens_per_second`, `tokens_per_second_per_gpu`, `tflops_per_gpu` (1e12 FLOP/s) and `mfu` (0 to 1).
    """
    per_gpu = tokens / seconds / world_size
    speed = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": per_gpu,
        "tflops_per_gpu": per_gpu * flops_per_token / 1e12,
    }
    return speed if peak is None else speed | {"mfu": per_gpu * flops_per_token / peak}


def expert_load(tokens_per_expert: torch.Tensor) -> dict[str, float]:
    """How evenly the router spreads the tokens.

    Args:
        tokens_per_expert: `[layers, num_experts]` counts of (token, expert) pairs, over all ranks. It is read on the
            host: pass a copy that has arrived there.

    Returns:
        `expert_load_max_over_mean`: the busiest expert's tokens over the mean, of the worst layer (1 is even);
        `dead_experts`: experts without a token, summed over layers;
        `expert_load_entropy`: entropy of the shares over log(num_experts), the mean over layers (1 is even).
        Layers without any token are left out; if there is no other, the result is empty.
    """
    counts = tokens_per_expert.double()
    counts = counts[counts.sum(dim=1) > 0]  # [layers with tokens, num_experts]
    if not len(counts):
        return {}
    num_experts = counts.shape[1]
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1).mean().item()
    return {
        "expert_load_max_over_mean": (shares.max() * num_experts).item(),
        "dead_experts": float((counts == 0).sum()),
        "expert_load_entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory so far of this rank in GiB: allocated on the GPU or, on the CPU, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
