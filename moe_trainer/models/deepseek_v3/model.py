"""DeepSeek-V3 (2024): multi-head latent attention, shared experts, a sigmoid router balanced by a bias."""

import torch
from torch import nn

from moe_trainer.config.choices import RopeType
from moe_trainer.config.schema import ModelConfig
from moe_trainer.kernels.latent_heads import has_latent_kernel, latent_heads
from moe_trainer.kernels.rope import rotate
from moe_trainer.models.attention import KVCache, attend, attend_documents
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.documents import Documents
from moe_trainer.models.linear import Linear
from moe_trainer.models.mlp import SwiGLU
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import Rotation, yarn_scale
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
        projected = projected.unflatten(-1, (-1, self.nope_dim + self.rope_dim))
        latent, shared_key = self.kv_a_proj(x).split((self.kv_rank, self.rope_dim), dim=-1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        key_value = key_value.unflatten(-1, (-1, self.nope_dim + self.value_dim))
        query, key, value = (part.transpose(1, 2) for part in self.heads(projected, key_value, shared_key, rope))
        if cache is None:
            out = attend_documents(query, key, value, documents, None, self.score_scale)
        else:
            mask = cache.mask(None)
            out = attend(query, *cache.append(self.layer, key, value), mask, self.score_scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(
        self, query: torch.Tensor, key_value: torch.Tensor, shared_key: torch.Tensor, rope: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [batch, seq, heads, width] from query [batch, seq, heads, nope + rope], key_value
        [batch, seq, heads, nope + value] and the rotary key [batch, seq, rope]."""
        if has_latent_kernel(query, rope.cos):
            batch = query.shape[0]
            rows = (part.flatten(0, 1) for part in (query, key_value, shared_key))
            made = latent_heads(*rows, *rope, self.rope_interleave)
            return tuple(part.unflatten(0, (batch, -1)) for part in made)
        plain, turned = query.split((self.nope_dim, self.rope_dim), dim=-1)
        key, value = key_value.split((self.nope_dim, self.value_dim), dim=-1)
        shared_key = self._rotate(shared_key.unsqueeze(2), rope).expand(-1, -1, key.shape[2], -1)
        return torch.cat((plain, self._rotate(turned, rope)), -1), torch.cat((key, shared_key), -1), value

    def _rotate(self, x: torch.Tensor, rope: Rotation) -> torch.Tensor:
        """[batch, seq, heads, rope]."""
        if self.rope_interleave:  # (0, 1), (2, 3), ... -> the half-split layout; scores do not mind the order
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return rotate(x.transpose(1, 2), *rope).transpose(1, 2)


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
