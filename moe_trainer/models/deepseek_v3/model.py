"""DeepSeek-V3 (2024): multi-head latent attention, shared experts, a sigmoid router balanced by a bias."""

import torch
from torch import nn

from moe_trainer.config.choices import RopeType
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.attention import KVCache, attend, attend_documents
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.documents import Documents
from moe_trainer.models.linear import Linear
from moe_trainer.models.mlp import SwiGLU
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import Rotation, rotate, yarn_scale
from moe_trainer.models.router import GroupedSigmoidRouter


class LatentAttention(nn.Module):
    """Queries, and keys and values, each through a narrow latent (MLA, DeepSeek-V2, 2024).

    A head's query and key have a part without position and a rotary part; the rotary key is one for all heads. The
    number of heads is read off the projections' width.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kv_rank = cfg.kv_lora_rank
        self.nope_dim, self.rope_dim, self.value_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.rope_interleave = cfg.rope_interleave
        query_dim = self.nope_dim + self.rope_dim
        self.score_scale = query_dim**-0.5
        if cfg.rope.type is not RopeType.default and cfg.rope.mscale_all_dim:
            self.score_scale *= yarn_scale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
        hidden, heads, eps = cfg.hidden_size, cfg.num_heads, 1e-6  # the norms of the latents have their own eps
        if cfg.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * query_dim)
        else:
            self.q_a_proj = Linear(hidden, cfg.q_lora_rank, cfg.attention_bias)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, eps)
            self.q_b_proj = Linear(cfg.q_lora_rank, heads * query_dim)
        self.kv_a_proj = Linear(hidden, self.kv_rank + self.rope_dim, cfg.attention_bias)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, eps)
        self.kv_b_proj = Linear(self.kv_rank, heads * (self.nope_dim + self.value_dim))
        self.o_proj = Linear(heads * self.value_dim, hidden, cfg.attention_bias)

    def forward(
        self, x: torch.Tensor, rope: Rotation, cache: KVCache | None = None, documents: Documents | None = None
    ) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        projected = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = projected.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).transpose(1, 2)
        query = torch.cat((query[..., : self.nope_dim], self._rotate(query[..., self.nope_dim :], rope)), dim=-1)

        latent, shared_key = self.kv_a_proj(x).split((self.kv_rank, self.rope_dim), dim=-1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        key_value = key_value.unflatten(-1, (-1, self.nope_dim + self.value_dim)).transpose(1, 2)
        key, value = key_value.split((self.nope_dim, self.value_dim), dim=-1)
        shared_key = self._rotate(shared_key.unsqueeze(1), rope)  # [batch, 1, seq, rope_dim]
        key = torch.cat((key, shared_key.expand(-1, key.shape[1], -1, -1)), dim=-1)
        mask = None
        if cache is not None:
            mask = cache.mask(None)
            key, value = cache.append(self.layer, key, value)
        if documents is not None:
            out = attend_documents(query, key, value, documents, None, self.score_scale)
        else:
            out = attend(query, key, value, mask, self.score_scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _rotate(self, x: torch.Tensor, rope: Rotation) -> torch.Tensor:
        if self.rope_interleave:  # (0, 1), (2, 3), ... -> the half-split layout; scores do not mind the order
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return rotate(x, rope)


def build_deepseek_v3(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    return CausalLM(cfg, [_layer(cfg, layer) for layer in range(cfg.num_layers)], cfg.qk_rope_head_dim)


def _layer(cfg: ModelConfig, layer: int) -> DecoderLayer:
    if layer in cfg.dense_layers:
        mlp = SwiGLU(cfg.hidden_size, cfg.dense_intermediate_size)
    else:
        router = GroupedSigmoidRouter(
            cfg.hidden_size,
            cfg.num_experts,
            cfg.top_k,
            cfg.norm_topk_prob,
            cfg.num_expert_groups,
            cfg.top_k_groups,
            cfg.routed_scaling_factor,
        )
        experts = Experts(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts)
        shared = SwiGLU(cfg.hidden_size, cfg.num_shared_experts * cfg.intermediate_size)
        mlp = SparseMoeBlock(router, experts, shared if cfg.num_shared_experts else None, cfg.capacity_factor)
    return DecoderLayer(LatentAttention(cfg, layer), mlp, cfg.hidden_size, cfg.rms_norm_eps)
