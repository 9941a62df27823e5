"""What the project knows of each model family."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trainer.config.schema import Family, ModelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.keymap import KeyMap
from moe_trainer.models.mixtral import hf as mixtral_hf
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.models.mixtral.plan import PLANS as MIXTRAL_PLANS
from moe_trainer.models.plans import ParallelPlans


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
    Family.mixtral: ModelFamily(
        build_mixtral, MIXTRAL_PLANS, mixtral_hf.key_map, mixtral_hf.model_config_from_hf, mixtral_hf.hf_config
    )
}
