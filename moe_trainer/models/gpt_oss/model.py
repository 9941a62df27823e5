"""gpt-oss (OpenAI, 2025): biases, attention sinks, sliding windows in every other layer, clamped experts."""

import torch
import torch.nn.functional as F
from torch import nn

from moe_trainer.config.schema import ModelConfig
from moe_trainer.kernels.experts import Clamp
from moe_trainer.kernels.keepable import keepable
from moe_trainer.kernels.packed_attention import takes_packed
from moe_trainer.models.attention import Attention, attend_packed, whole_mask, within
from moe_trainer.models.decoder import CausalLM, DecoderLayer
from moe_trainer.models.documents import Documents
from moe_trainer.models.moe import ClampedExperts, SparseMoeBlock
from moe_trainer.models.router import BiasedRouter


class AttentionSinks(nn.Module):
    """One score for each head that takes part in the softmax and has no value (Xiao et al., 2023; gpt-oss).

    Weight [heads].
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return self.compute(query, self.weight)

    def compute(self, query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The heads' scores [1, heads, 1, 1], in the type of query [batch, heads, seq, head_dim]."""
        return weight.to(query.dtype).view(1, -1, 1, 1)


class SinkAttention(Attention):
    """Attention with sinks.

    Where `packed_attention` does not compute, a sink is a key that scores the same with every query, and whose value
    is zero: one more dim in queries (one) and keys (zero, but the score in the sink's key) makes it so, and PyTorch's
    fused attention does the rest. Eight dims are added, to values too, because fused kernels want whole 16 bytes and
    the CPU's one width.
    """

    def __init__(self, cfg: ModelConfig, layer: int, window: int | None) -> None:
        super().__init__(
            cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, layer, cfg.attention_bias, window
        )
        self.sinks = AttentionSinks(cfg.num_heads)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is None:
            positions = torch.arange(query.shape[2], device=query.device)
            mask = within(positions, positions, None)
        elif query.shape[2] == 1:
            return self._attend_once(query, key, value, mask)
        scale = self.head_dim**-0.5
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # the sinks are per head
        score = self.sinks(query) / scale
        sink = F.pad(score.expand(query.shape[0], -1, -1, -1), (self.head_dim, 7))  # [batch, heads, 1, head_dim + 8]
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, 7))
        key = torch.cat((F.pad(key, (0, 8)), sink), dim=2)
        mask = F.pad(mask, (0, 1), value=True)
        value = F.pad(value, (0, 8, 0, 1))
        with keepable():
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return out[..., : self.head_dim]

    def attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
    ) -> torch.Tensor:
        if takes_packed(query, value):
            sinks = self.sinks(query).flatten()
            return attend_packed(query, key, value, documents, self.window, sinks=sinks)
        return self.attend(query, key, value, whole_mask(query, documents, self.window))

    def _attend_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """One query a sequence, without copies of the cache: the heads of a group are queries of their key head."""
        rows = query.squeeze(2).unflatten(1, (key.shape[1], -1)) * self.head_dim**-0.5
        scores = (rows @ key.mT).masked_fill(~mask, -torch.inf)  # [batch, kv_heads, group, columns]
        sinks = self.sinks(query).view(1, key.shape[1], -1, 1).expand(len(query), -1, -1, -1)
        scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :-1]
        return (weights.to(value.dtype) @ value).flatten(1, 2).unsqueeze(2)


def build_gpt_oss(cfg: ModelConfig) -> CausalLM:
    """The model with unset weights, on torch's default device."""
    layers, clamp = [], Clamp(cfg.swiglu_alpha, cfg.swiglu_limit)
    for layer in range(cfg.num_layers):
        slides = cfg.sliding_layers is None or layer in cfg.sliding_layers
        mlp = SparseMoeBlock(
            BiasedRouter(cfg.hidden_size, cfg.num_experts, cfg.top_k),
            ClampedExperts(cfg.hidden_size, cfg.intermediate_size, cfg.num_experts, clamp),
            capacity_factor=cfg.capacity_factor,
        )
        attention = SinkAttention(cfg, layer, cfg.sliding_window if slides else None)
        layers.append(DecoderLayer(attention, mlp, cfg.hidden_size, cfg.rms_norm_eps))
    return CausalLM(cfg, layers, cfg.head_dim)
