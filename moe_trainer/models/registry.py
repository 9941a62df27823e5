"""What the project knows of each model family."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.deepseek_v3 import hf as deepseek_v3_hf
from moe_trainer.models.deepseek_v3 import plan as deepseek_v3_plan
from moe_trainer.models.deepseek_v3.model import build_deepseek_v3
from moe_trainer.models.gpt_oss import hf as gpt_oss_hf
from moe_trainer.models.gpt_oss import plan as gpt_oss_plan
from moe_trainer.models.gpt_oss.model import build_gpt_oss
from moe_trainer.models.keymap import KeyMap
from moe_trainer.models.mixtral import hf as mixtral_hf
from moe_trainer.models.mixtral import plan as mixtral_plan
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.models.olmoe import hf as olmoe_hf
from moe_trainer.models.olmoe import plan as olmoe_plan
from moe_trainer.models.olmoe.model import build_olmoe
from moe_trainer.models.plans import ParallelPlans
from moe_trainer.models.qwen3_moe import hf as qwen3_moe_hf
from moe_trainer.models.qwen3_moe import plan as qwen3_moe_plan
from moe_trainer.models.qwen3_moe.model import build_qwen3_moe


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How to build a family's model and how to split it."""

    build: Callable[[ModelConfig], CausalLM]
    plans: ParallelPlans
    key_map: Callable[[ModelConfig, Collection[str]], KeyMap]
    """From the names in a Hugging Face folder to which of its tensors fill which block of which parameter."""
    config_from_hf: Callable[[Path], ModelConfig]
    """Reads config.json."""
    config_to_hf: Callable[[ModelConfig, str, int | None], dict[str, Any]]
    """config.json's content for a model, the dtype of its weights and its end-of-text id."""


FAMILIES = {
    family: ModelFamily(build, plan.PLANS, hf.key_map, hf.model_config_from_hf, hf.hf_config)
    for family, build, plan, hf in (
        (Family.mixtral, build_mixtral, mixtral_plan, mixtral_hf),
        (Family.qwen3_moe, build_qwen3_moe, qwen3_moe_plan, qwen3_moe_hf),
        (Family.olmoe, build_olmoe, olmoe_plan, olmoe_hf),
        (Family.deepseek_v3, build_deepseek_v3, deepseek_v3_plan, deepseek_v3_hf),
        (Family.gpt_oss, build_gpt_oss, gpt_oss_plan, gpt_oss_hf),
    )
}
