"""Run folders as a training run leaves them, without training."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

DENSE_LAYERS = [1]
LAYERS, EXPERTS = 3, 8


def write_run(folder: Path, steps: int, val_every: int | None = None, load_every: int = 1, **config: Any) -> Path:
    """Curves that fall or rise smoothly; expert 0 of the first sparse layer is dead in the first half."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = 2 + 4 * math.exp(-step / 20)
        line = {"step": step, "loss": loss, "grad_norm": 1 + 1 / step, "lr": 1e-3 / step, "tokens": 100 * step}
        line |= {"seconds": 0.5, "data_seconds": 0.01, "skipped_steps": 0, "tokens_per_second": 200.0}
        line |= {"tokens_per_second_per_gpu": 100.0, "tflops_per_gpu": 3.0, "mfu": 0.4, "memory_gib": 1.5}
        line |= {"expert_load_max_over_mean": 1.5, "dead_experts": 0.0, "expert_load_entropy": 0.9}
        if step % load_every == 0:
            line |= {"router_entropy": 0.8, "expert_load": load_table(step, steps)}
        lines.append(line)
        if val_every and step % val_every == 0:
            lines.append({"step": step, "val_loss": loss + 0.1, "val_perplexity": math.exp(loss + 0.1)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"run_name": folder.name, "model": {"num_layers": LAYERS, "dense_layers": DENSE_LAYERS}} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.jsonl").write_text(json.dumps({"from_step": 0, "torch": "2.13", "world_size": 4}) + "\n")
    return folder


def load_table(step: int, steps: int) -> list[list[int]]:
    """Tokens [sparse layers][experts]."""
    table = [[10 + expert for expert in range(EXPERTS)] for _ in range(LAYERS - len(DENSE_LAYERS))]
    if step <= steps / 2:
        table[0][0] = 0
    return table
