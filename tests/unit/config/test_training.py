"""Rules of evaluation, spikes and adapters."""

from dataclasses import replace
from typing import Any

import pytest

from moe_trainer.config.choices import DeviceName, DType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from moe_trainer.config.validate import validate

BASE = Config(data=DataConfig(text="x"), device=DeviceName.cpu)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"eval": EvalConfig(every=0)}, "eval.every=0 must be at least 1"),
        ({"eval": EvalConfig(batches=0)}, "eval.batches=0 must be at least 1"),
        ({"optim": OptimConfig(max_grad_zscore=0.0)}, "optim.max_grad_zscore=0.0 must be above 0"),
        ({"optim": OptimConfig(max_skipped_steps=0)}, "optim.max_skipped_steps=0 must be at least 1"),
        (
            {"optim": OptimConfig(weights_dtype=DType.float64)},
            "optim.weights_dtype=float64 must be auto or bfloat16",
        ),
        (
            {"optim": OptimConfig(moments_dtype=DType.float32)},
            "optim.moments_dtype=float32 must be auto or bfloat16",
        ),
        (
            {"optim": OptimConfig(weights_dtype=DType.bfloat16), "dtype": DType.float64},
            "optim.weights_dtype=bfloat16 does not go with dtype=float64",
        ),
        ({"lora": LoraConfig(rank=0)}, "lora.rank=0 must be at least 1"),
        ({"lora": LoraConfig(rank=2, alpha=0.0)}, "lora.alpha=0.0 must be above 0"),
        ({"lora": LoraConfig(rank=2, targets=[])}, "lora.targets is empty; name the layers"),
        (
            {
                "lora": LoraConfig(rank=2),
                "parallel": ParallelConfig(fsdp=8),
                "model": ModelConfig(num_experts=4, intermediate_size=12),
            },
            "parallel.fsdp=8: with adapters and more shards than experts, their number (8) must divide "
            "model.intermediate_size(12)",
        ),
    ],
)
def test_mistake(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(replace(BASE, **changes), None, 0)
    assert str(caught.value).startswith(line)


def test_what_is_fine() -> None:
    optim = OptimConfig(max_grad_zscore=6.0, max_skipped_steps=None)
    fine = replace(BASE, eval=EvalConfig(10, 2), lora=LoraConfig(rank=8), optim=optim)
    assert validate(fine, None, 0).lora == fine.lora
