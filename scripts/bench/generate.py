"""Tokens a second of greedy generation: ours against transformers' `generate`, the same shape with random weights.

    python scripts/bench/generate.py model=olmoe_1b_7b [model.num_layers=4] [--prompt=128] [--new=128]
    python -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench/generate.py ...   # TP&EP

Prompts of equal length, --batches=1,8 of them; both make every token (no stop). Seconds count from the prompt to
the last token, of the second run; the first one warms up (and records our CUDA graph's kernels).
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from record import device, option, record

from moe_trainer.config.schema import Config, ParallelConfig
from moe_trainer.config.store import compose
from moe_trainer.generate.decoding import generate
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import PRECISE
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import compute_dtype
from moe_trainer.parallel.process_group import process_group

Continue = Callable[[torch.Tensor, int], None]
"""(prompts [batch, prompt], new tokens) -> generated and thrown away."""


def main() -> None:
    """One row for each batch size and side."""
    cfg = compose("train", [argument for argument in sys.argv[1:] if not argument.startswith("--")])
    prompt, new = int(option("prompt", "128")), int(option("new", "128"))
    with process_group(device()) as here:
        sides = {"moe_trainer": _ours}
        if dist.get_world_size() == 1:
            sides["transformers"] = _transformers
        heading = True
        for side, build in sides.items():
            continue_prompts = build(cfg, here)
            for batch in map(int, option("batches", "1,8").split(",")):
                ids = torch.randint(cfg.model.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
                seconds = [_seconds(continue_prompts, ids, new) for _ in range(2)][-1]
                row = {"model": cfg.model.family.value, "layers": cfg.model.num_layers, "by": side, "batch": batch}
                row |= {"ranks": dist.get_world_size(), "prompt": prompt, "new": new, "tok/s": batch * new / seconds}
                if dist.get_rank() == 0:
                    record("generate", row, heading)
                heading = False


def _seconds(continue_prompts: Continue, ids: torch.Tensor, new: int) -> float:
    start = time.perf_counter()
    continue_prompts(ids, new)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ours(cfg: Config, device: torch.device) -> Continue:
    ranks = dist.get_world_size()
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True)
    meshes = build_meshes(parallel, device.type)
    model, _ = build_model(cfg.model, parallel, meshes, compute_dtype(cfg.dtype, device))
    for module in model.modules():
        if isinstance(module, PRECISE):
            module.float()
    model.to_empty(device=device).requires_grad_(False)
    initialize(model, 0, 0.02)
    group = None if meshes.tp is None else meshes.tp.get_group()

    def run(ids: torch.Tensor, new: int) -> None:
        for _ in generate(model, ids, new, group=group):
            pass

    return run


def _transformers(cfg: Config, device: torch.device) -> Continue:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**FAMILIES[cfg.model.family].config_to_hf(cfg.model, "float32", None))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype(cfg.dtype, device))
    model.generation_config.eos_token_id = None

    def run(ids: torch.Tensor, new: int) -> None:
        ids = ids.to(device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    return run


if __name__ == "__main__":
    main()
