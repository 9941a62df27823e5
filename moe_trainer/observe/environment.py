"""What a run ran on, a line for each command that went on with it: versions, device, mesh, and how FLOPs are counted.

Chosen facts only. Of the process's environment nothing is written: that is where keys and passwords live.
"""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_trainer import __version__
from moe_trainer.config.schema import Config
from moe_trainer.observe.flops import flops_per_token, num_parameters, peak_flops
from moe_trainer.observe.sinks import drop_torn_line

FLOP_CONVENTION = (
    "FLOPs of a token: 6 x active parameters (head, but no embedding lookup) + attention, causal and so halved; "
    "no recompute"
)


def environment(
    cfg: Config, device: torch.device, dtype: torch.dtype, start_step: int, seq_len: int
) -> dict[str, Any]:
    """Facts about the command that takes the steps after `start_step`."""
    axes = ("dp_replicate", "fsdp", "tp", "ep")
    total, active = num_parameters(cfg.model)
    name = device_name(device)
    return {
        "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "from_step": start_step,
        "moe_trainer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": name,
        "world_size": dist.get_world_size(),
        "mesh": " x ".join(f"{axis}={getattr(cfg.parallel, axis)}" for axis in axes),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": flops_per_token(cfg.model, seq_len),
        "peak_flops_per_gpu": peak_flops(name),
        "flop_convention": FLOP_CONVENTION,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu` and its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def append_environment(path: Path, facts: dict[str, Any]) -> None:
    """One more line of `environment.jsonl`."""
    drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
