"""What the project knows of each model family."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_trainer.config.schema import Family, ModelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.models.mixtral.plan import PLANS as MIXTRAL_PLANS
from moe_trainer.models.plans import ParallelPlans


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How to build a family's model and how to split it."""

    build: Callable[[ModelConfig], CausalLM]
    plans: ParallelPlans


FAMILIES = {Family.mixtral: ModelFamily(build_mixtral, MIXTRAL_PLANS)}
