"""Ranks that were started with different commands or programs, or without room for the model, do not train."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, OptimConfig
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import main as main_module
from tests.distributed.runs import run_config


def start_differently(odd: str) -> str:
    cfg = Config()
    if dist.get_rank() == 1 and odd == "config":
        cfg.optim = OptimConfig(lr=0.5)
    elif dist.get_rank() == 1 and odd == "torch":
        torch.__version__ = "1.0"
    try:
        main_module.refuse_strangers(cfg)
    except ConfigError as error:
        return str(error)
    return "all alike"


def test_the_odd_rank_is_named_on_all_with_what_is_odd() -> None:
    assert run_distributed(start_differently, 2, "nothing") == ["all alike"] * 2
    for odd, said in (("config", "rank 1 has optim.lr=0.5 (rank 0: 0.0003);"), ("torch", "rank 1 has torch=1.0 (")):
        first, second = run_distributed(start_differently, 2, odd)
        assert first == second and said in first


def build_too_large(folder: Path) -> str:
    cfg = run_config(folder, "large", "one", 1)
    cfg.model = replace(cfg.model, hidden_size=2**22, intermediate_size=2**22)  # beyond what 48 bits address
    try:
        main_module._built(cfg, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return "built"


def test_no_memory_for_the_weights_is_one_line(tmp_path: Path) -> None:
    said = run_distributed(build_too_large, 1, tmp_path)[0]
    assert said.startswith("rank 0 has no memory for its share of the model; try more ranks in parallel.fsdp or")
    assert not list(tmp_path.iterdir())
