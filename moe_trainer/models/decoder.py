"""The decoder-only language model that every family shares; a family says what its layers are made of."""

from typing import NamedTuple

import torch
from torch import nn

from moe_trainer.models.attention import KVCache
from moe_trainer.models.linear import Embedding, Linear
from moe_trainer.models.moe import Routing
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import Rotation, rotation


class ModelOutput(NamedTuple):
    """One forward pass."""

    logits: torch.Tensor
    """[batch, seq, vocab]; under tensor parallelism this rank's part of the vocabulary."""
    routings: tuple[Routing, ...]
    """Of each sparse layer, over the tokens that this rank routed."""


class DecoderLayer(nn.Module):
    """Attention and a sparse MLP, each on the normed input and added to the residual stream."""

    def __init__(self, self_attn: nn.Module, mlp: nn.Module, hidden_size: int, rms_norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: torch.Tensor, rope: Rotation, cache: KVCache | None) -> tuple[torch.Tensor, Routing]:
        """[batch, seq, hidden] -> the same, and the layer's routing."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        out, routing = self.mlp(self.post_attention_layernorm(x))
        return x + out, routing


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(
        self,
        layers: list[DecoderLayer],
        vocab_size: int,
        hidden_size: int,
        head_dim: int,
        rms_norm_eps: float,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.embed_tokens = Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, tuple[Routing, ...]]:
        """[batch, seq] -> hidden states [batch, seq, hidden] and the layers' routings."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids)
        rope = rotation(positions, self.head_dim, self.rope_theta, x.dtype)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, rope, cache)
            routings.append(routing)
        return self.norm(x), tuple(routings)


class CausalLM(nn.Module):
    """Decoder and language-model head."""

    def __init__(self, decoder: Decoder, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.model = decoder
        self.lm_head = Linear(hidden_size, vocab_size)

    def forward(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> ModelOutput:
        """Next-token logits for token ids [batch, seq].

        With a cache, ids continue what it holds, and the logits are those of the last position: [batch, 1, vocab].
        """
        hidden, routings = self.model(input_ids, cache)
        if cache is not None:
            hidden = hidden[:, -1:]
        return ModelOutput(self.lm_head(hidden), routings)
