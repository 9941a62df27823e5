"""Mixtral (Jiang et al., 2024): every layer sparse, grouped-query attention, rotary positions."""

from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.attention import Attention
from moe_trainer.models.decoder import CausalLM, Decoder, DecoderLayer
from moe_trainer.models.moe import SparseMoeBlock


def build_mixtral(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    layers = [
        DecoderLayer(
            Attention(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, layer),
            SparseMoeBlock(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts, cfg.top_k),
            cfg.hidden_size,
            cfg.rms_norm_eps,
        )
        for layer in range(cfg.num_layers)
    ]
    decoder = Decoder(layers, cfg.vocab_size, cfg.hidden_size, cfg.head_dim, cfg.rms_norm_eps, cfg.rope_theta)
    return CausalLM(decoder, cfg.vocab_size, cfg.hidden_size)
