"""Qwen3-MoE (Qwen team, 2025): norms on each head's query and key, some layers dense."""

import torch

from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.attention import Attention
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.mlp import SwiGLU
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.norm import RotatedNorm
from moe_trainer.models.rope import Rotation
from moe_trainer.models.router import Router


class Qwen3Attention(Attention):
    """Attention whose queries and keys are normed, each head on its own."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(
            cfg.hidden_size,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            layer,
            cfg.attention_bias,
            cfg.sliding_window,
        )
        self.q_norm = RotatedNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RotatedNorm(cfg.head_dim, cfg.rms_norm_eps)

    def project(self, x: torch.Tensor, rope: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))
        return self.q_norm(query, rope=rope), self.k_norm(key, rope=rope), self.heads(self.v_proj(x))


def build_qwen3_moe(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    return CausalLM(cfg, [_layer(cfg, layer) for layer in range(cfg.num_layers)], cfg.head_dim)


def _layer(cfg: ModelConfig, layer: int) -> DecoderLayer:
    if layer in cfg.dense_layers:
        mlp = SwiGLU(cfg.hidden_size, cfg.dense_intermediate_size)
    else:
        mlp = SparseMoeBlock(
            Router(cfg.hidden_size, cfg.num_experts, cfg.top_k, cfg.norm_topk_prob),
            Experts(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts),
            capacity_factor=cfg.capacity_factor,
        )
    return DecoderLayer(Qwen3Attention(cfg, layer), mlp, cfg.hidden_size, cfg.rms_norm_eps)
