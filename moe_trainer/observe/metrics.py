"""What a step is worth knowing by, and the log that sends it to every sink.

Of a step: `loss aux_loss z_loss grad_norm lr tokens seconds data_seconds skipped_steps tokens_per_second
tokens_per_second_per_gpu tflops_per_gpu mfu memory_gib expert_load_max_over_mean dead_experts expert_load_entropy`
and, each `logging.load_every` steps, `router_entropy expert_load` and, of an earlier such step,
`slowest_rank slowest_over_median slowest_data_share`. Of an evaluation: `val_loss` and its like.
"""

import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.config.choices import WandbMode
from moe_trainer.config.schema import Config
from moe_trainer.models.router import Routing
from moe_trainer.observe.console import ConsoleSink
from moe_trainer.observe.log import get_logger
from moe_trainer.observe.sinks import JsonlSink, Metrics, Sink, TensorBoardSink, WandbSink

_logger = get_logger(__name__)


class MetricsLog:
    """Sends the metrics of a step to `metrics.jsonl`, the console and, where asked, wandb and TensorBoard.

    Built on rank 0 only. A sink that raises is reported once and dropped, whichever it is: training goes on. Only a
    `metrics.jsonl` that cannot be opened at the start is an error, because then nothing can be written at all.

    Args:
        run_folder: existing folder of the run; on resume its `metrics.jsonl` is appended to.
        total_steps: step at which this command stops.
        start_step: steps taken before this command.

    Raises:
        OSError: `metrics.jsonl` cannot be opened.
    """

    def __init__(self, run_folder: Path, cfg: Config, total_steps: int, start_step: int) -> None:
        path = run_folder / "metrics.jsonl"
        self._sinks: dict[str, Sink] = {str(path): JsonlSink(path)}
        self._add("the console", lambda: ConsoleSink(total_steps, start_step, cfg.logging.every))
        if cfg.logging.wandb is not WandbMode.disabled:
            self._add("wandb", lambda: WandbSink(run_folder, cfg))
        if cfg.logging.tensorboard:
            self._add("TensorBoard", lambda: TensorBoardSink(run_folder / "tensorboard", start_step))

    def log(self, step: int, metrics: Metrics) -> None:
        """Log the metrics of one step.

        Args:
            step: 1-based: the number of steps taken.
            metrics: host numbers; reading them from the device is the caller's business.
        """
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(step, metrics)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Finish every sink."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:
                self._drop(name, error)

    def _add(self, name: str, build: Callable[[], Sink]) -> None:
        try:
            self._sinks[name] = build()
        except Exception as error:
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        _logger.warning("%s is off for the rest of this run, training goes on: %s", name, first_line[:200])


def is_load_due(step: int, cfg: Config) -> bool:
    """Whether expert load and router entropy of this step are recorded; the first and the last step's always are."""
    every = cfg.logging.load_every or max(10, cfg.steps // 100)
    return step % every == 0 or step in (1, cfg.steps)


class RouterEntropy:
    """How undecided the routers are: the entropy of each token's probabilities over log(num_experts), the mean over
    the valid tokens of the global batch and the sparse layers; 1 is a router that knows nothing, 0 one that is sure.

    Sums stay on the device. Ranks that route the same tokens count them alike in both sums, so the mean is the same
    on every mesh.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # entropies; tokens times layers

    @torch.no_grad()
    def add(self, routings: tuple[Routing, ...], valid: torch.Tensor) -> None:
        """Count a micro-batch; `valid`: [batch, seq] of the tokens that this rank routed."""
        mask = valid.flatten()
        for routing in routings:
            most = math.log(max(2, routing.probabilities.shape[-1]))  # of a single expert the entropy is zero
            entropy = torch.special.entr(routing.probabilities).sum(-1) / most  # [tokens]
            self._sums += torch.stack([(entropy * mask).sum(), mask.sum()])

    def over_ranks(self) -> torch.Tensor:
        """The mean, a scalar on the device. Collective, over all ranks."""
        dist.all_reduce(self._sums)
        return self._sums[0] / self._sums[1].clamp(min=1)


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
