"""OLMoE (Muennighoff et al., 2024): norms over all queries and all keys, optional clipping, weights not rescaled."""

import torch

from moe_trainer.config.schema import ModelConfig
from moe_trainer.kernels.rope import rotate
from moe_trainer.models.attention import Attention
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import Rotation
from moe_trainer.models.router import Router


class OlmoeAttention(Attention):
    """Attention whose queries and keys are normed over all heads together."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, layer, cfg.attention_bias)
        self.clip = cfg.clip_qkv
        self.q_norm = RMSNorm(cfg.num_heads * cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.num_kv_heads * cfg.head_dim, cfg.rms_norm_eps)

    def project(self, x: torch.Tensor, rope: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        projected = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip is not None:
            projected = tuple(part.clamp(-self.clip, self.clip) for part in projected)
        query, key, value = (self.heads(part) for part in projected)
        return rotate(query, *rope), rotate(key, *rope), value


def build_olmoe(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    layers = [
        DecoderLayer(
            OlmoeAttention(cfg, layer),
            SparseMoeBlock(
                Router(cfg.hidden_size, cfg.num_experts, cfg.top_k, cfg.norm_topk_prob),
                Experts(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts),
                capacity_factor=cfg.capacity_factor,
            ),
            cfg.hidden_size,
            cfg.rms_norm_eps,
        )
        for layer in range(cfg.num_layers)
    ]
    return CausalLM(cfg, layers, cfg.head_dim)
