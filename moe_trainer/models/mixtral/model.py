"""Mixtral (Jiang et al., 2024): every layer sparse, grouped-query attention, rotary positions."""

from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.attention import Attention
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.router import Router


def build_mixtral(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    layers = [
        DecoderLayer(
            Attention(
                cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, layer, window=cfg.sliding_window
            ),
            SparseMoeBlock(
                Router(cfg.hidden_size, cfg.num_experts, cfg.top_k),
                Experts(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts),
                capacity_factor=cfg.capacity_factor,
            ),
            cfg.hidden_size,
            cfg.rms_norm_eps,
        )
        for layer in range(cfg.num_layers)
    ]
    return CausalLM(cfg, layers, cfg.head_dim)
