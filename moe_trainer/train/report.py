"""What rank 0 tells of a run: each step's metrics, read from the device without holding it up."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import lock
from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml
from moe_trainer.observe.environment import FLOP_CONVENTION, append_environment, environment
from moe_trainer.observe.log import get_logger
from moe_trainer.observe.metrics import MetricsLog, expert_load, is_load_due, memory_gib, throughput
from moe_trainer.observe.report import REPORT, write_report
from moe_trainer.parallel.clock import Mark
from moe_trainer.parallel.gpus import ranks_per_gpu
from moe_trainer.parallel.precision import resolve_precision
from moe_trainer.train.loss import Losses

_logger = get_logger(__name__)


class StepMetrics(NamedTuple):
    """What one step gives; the tensors stay on the device until somebody reads them."""

    losses: Losses
    grad_norm: torch.Tensor
    lr: float
    num_tokens: int
    data_seconds: float = 0.0
    """Time for which the step waited for its batch."""
    more: Mapping[str, torch.Tensor] = MappingProxyType({})
    """Other scalars on the device, logged under their names; `skipped` is 1 where the step moved nothing."""


class RunReport:
    """Rank 0's log: on CUDA, metrics are copied while the next step runs, and written one step late."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        run_folder: Path,
        start_step: int,
        seq_len: int,
        skipped_steps: int = 0,
    ) -> None:
        """`start_step`: steps taken before this command; `skipped_steps`: those among them that moved nothing."""
        dtype = resolve_precision(cfg.dtype, cfg.reduce_dtype, device).compute
        facts = environment(cfg, device, dtype, start_step, seq_len)
        if device.type == "cuda":
            facts["ranks_per_gpu"] = ranks_per_gpu()  # above one its speeds are no measure
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(run_folder / "metrics.jsonl")
            (run_folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
            append_environment(run_folder / "environment.jsonl", facts)
        except OSError as error:
            raise ConfigError(f"{run_folder} cannot be written to: {error}") from error
        self._cfg = cfg
        self._run_folder = run_folder
        self._log = MetricsLog(run_folder, cfg, cfg.steps, start_step)
        self._device = device
        self._flops, self._peak = facts["flops_per_token"], facts["peak_flops_per_gpu"]
        _logger.info("%s%s", FLOP_CONVENTION, f"; MFU of {self._peak / 1e12:g} TFLOP/s" if self._peak else "")
        self._coefs = {"aux_loss": cfg.optim.aux_coef, "z_loss": cfg.optim.z_coef}
        self._skipped_steps = skipped_steps
        self._pending: _Taken | None = None
        self._last = Mark(self._device)

    def take(self, step: int, tokens: int, metrics: StepMetrics) -> None:
        """Start copying this step's metrics, and write the step before."""
        more = [value.double().view(1) for value in metrics.more.values()]
        values = torch.cat((metrics.losses.flatten(), metrics.grad_norm.double().view(1), *more))
        values = values.to("cpu", non_blocking=True)
        taken = _Taken(step, tokens, metrics, values, self._last, Mark(self._device))
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
        self._log.log(taken.step, self._line(taken, seconds))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Log an evaluation after this many steps, `val_loss` and what else there is; its time is no step's time."""
        self.flush()
        self._log.log(step, metrics)
        self.skip_time()

    def skip_time(self) -> None:
        """What happened since the last step, such as a checkpoint, is not the next step's time."""
        self._last = Mark(self._device)

    def close(self) -> None:
        """Write what is pending, finish the log, and draw it as `report.html`."""
        try:
            self.flush()
        finally:
            self._log.close()
            self._draw()
            self._lock.close()

    def _line(self, taken: "_Taken", seconds: float) -> dict[str, Any]:
        split = len(taken.values) - 1 - len(taken.metrics.more)
        losses = taken.metrics.losses.unflatten(taken.values[:split])
        grad_norm, *more = taken.values[split:].tolist()
        line: dict[str, Any] = {"loss": losses.loss.item()}
        line |= {name: getattr(losses, name).item() for name, coef in self._coefs.items() if coef}
        line |= {"grad_norm": grad_norm, "lr": taken.metrics.lr, "tokens": taken.tokens}
        line |= {"seconds": seconds, "data_seconds": taken.metrics.data_seconds}
        line |= dict(zip(taken.metrics.more, more, strict=True))
        line["skipped_steps"] = self._count_skipped(taken.step, line)
        line |= throughput(taken.metrics.num_tokens, seconds, dist.get_world_size(), self._flops, self._peak)
        line["memory_gib"] = memory_gib(self._device)
        line |= expert_load(losses.expert_counts)
        if is_load_due(taken.step, self._cfg):
            line["expert_load"] = losses.expert_counts.round().long().tolist()
        return line

    def _count_skipped(self, step: int, line: dict[str, Any]) -> int:
        is_finite = math.isfinite(line["grad_norm"])
        if not is_finite:
            _logger.warning("step %d: the gradients are not finite; the weights stay as they are", step)
        self._skipped_steps += bool(line.pop("skipped", not is_finite))
        return self._skipped_steps

    def _draw(self) -> None:
        try:
            if (self._run_folder / "metrics.jsonl").stat().st_size:  # a run that fails at once has nothing to draw
                write_report([self._run_folder], self._run_folder / REPORT)
        except Exception as error:
            _logger.warning("%s was not written: %s", self._run_folder / REPORT, error)


class _Taken(NamedTuple):
    """Metrics on their way to the log."""

    step: int
    tokens: int
    metrics: StepMetrics
    values: torch.Tensor
    start: Mark
    end: Mark
