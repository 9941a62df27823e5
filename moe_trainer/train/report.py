"""What rank 0 tells of a run: each step's metrics, read from the device without holding it up."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml
from moe_trainer.observe.flops import flops_per_token, peak_flops
from moe_trainer.observe.log import get_logger
from moe_trainer.observe.metrics import MetricsLog, expert_load, memory_gib, throughput
from moe_trainer.train.loss import Losses

_logger = get_logger(__name__)


class StepMetrics(NamedTuple):
    """What one step gives; the tensors stay on the device until somebody reads them."""

    losses: Losses
    grad_norm: torch.Tensor
    lr: float
    num_tokens: int


class RunReport:
    """Rank 0's log: on CUDA, metrics are copied while the next step runs, and written one step late."""

    def __init__(self, cfg: Config, device: torch.device, run_folder: Path, start_step: int, seq_len: int) -> None:
        """`start_step`: steps taken before this command."""
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        self._log = MetricsLog(run_folder, cfg, cfg.steps, start_step)
        self._device = device
        self._flops = flops_per_token(cfg.model, seq_len)
        on_cuda = device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if on_cuda else None
        self._coefs = {"aux_loss": cfg.optim.aux_coef, "z_loss": cfg.optim.z_coef}
        self._pending: _Taken | None = None
        self._last = _Mark(self._device)

    def take(self, step: int, tokens: int, metrics: StepMetrics) -> None:
        """Start copying this step's metrics, and write the step before."""
        values = torch.cat((metrics.losses.flatten(), metrics.grad_norm.double().view(1)))
        values = values.to("cpu", non_blocking=True)
        taken = _Taken(step, tokens, metrics, values, self._last, _Mark(self._device))
        self._last = taken.end
        self.flush()
        self._pending = taken
        if self._device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending is None:
            return
        taken, self._pending = self._pending, None
        seconds = taken.end.seconds_since(taken.start)  # waits for the copy too, which was queued before the mark
        losses = taken.metrics.losses.unflatten(taken.values[:-1])
        line = {"loss": losses.loss.item()}
        line |= {name: getattr(losses, name).item() for name, coef in self._coefs.items() if coef}
        grad_norm = taken.values[-1].item()
        if not math.isfinite(grad_norm):
            _logger.warning("step %d: the gradients are not finite; the weights stay as they are", taken.step)
        line |= {"grad_norm": grad_norm, "lr": taken.metrics.lr, "tokens": taken.tokens}
        line |= throughput(taken.metrics.num_tokens, seconds, dist.get_world_size(), self._flops, self._peak)
        line["memory_gib"] = memory_gib(self._device)
        line |= expert_load(losses.expert_counts)
        self._log.log(taken.step, line)

    def skip_time(self) -> None:
        """What happened since the last step, such as a checkpoint, is not the next step's time."""
        self._last = _Mark(self._device)

    def close(self) -> None:
        """Write what is pending and finish the log."""
        self.flush()
        self._log.close()


class _Mark:
    """A moment in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at = time.perf_counter()

    def seconds_since(self, earlier: "_Mark") -> float:
        """Seconds between two marks; on CUDA it waits for this one to pass."""
        if self._event is None:
            return self._at - earlier._at
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class _Taken(NamedTuple):
    """Metrics on their way to the log."""

    step: int
    tokens: int
    metrics: StepMetrics
    values: torch.Tensor
    start: _Mark
    end: _Mark
