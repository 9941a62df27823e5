"""The decoder-only language model that every family shares; a family says what its layers are made of."""

from typing import NamedTuple, Self

import torch
from torch import nn

from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.attention import KVCache
from moe_trainer.models.documents import Documents
from moe_trainer.models.linear import Embedding, Linear
from moe_trainer.models.mlp import SwiGLU
from moe_trainer.models.moe import SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import Rotation, rotation
from moe_trainer.models.router import Routing


class ModelOutput(NamedTuple):
    """One forward pass."""

    logits: torch.Tensor
    """[batch, seq, vocab]; under tensor parallelism this rank's part of the vocabulary."""
    routings: tuple[Routing, ...]
    """Of each sparse layer, over the tokens that this rank routed."""


class DecoderLayer(nn.Module):
    """Attention and an MLP, each on the normed input and added to the residual stream.

    A layer has either `mlp`, a sparse one, or `dense_mlp`: two names, so that a plan's patterns tell them apart.
    """

    def __init__(
        self, self_attn: nn.Module, mlp: SparseMoeBlock | SwiGLU, hidden_size: int, rms_norm_eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.mlp = mlp if isinstance(mlp, SparseMoeBlock) else None
        self.dense_mlp = mlp if isinstance(mlp, SwiGLU) else None

    def forward(
        self, x: torch.Tensor, rope: Rotation, cache: KVCache | None, documents: Documents | None = None
    ) -> tuple[torch.Tensor, Routing | None]:
        """[batch, seq, hidden] -> the same, and the routing of a sparse layer."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, documents)
        normed = self.post_attention_layernorm(x)
        if self.dense_mlp is not None:
            return x + self.dense_mlp(normed), None
        out, routing = self.mlp(normed)
        return x + out, routing


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, cfg: ModelConfig, layers: list[DecoderLayer], rope_width: int) -> None:
        """`rope_width`: rotated dims of a head."""
        super().__init__()
        self.rope = cfg.rope
        self.rope_width = rope_width
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, cache: KVCache | None = None, documents: Documents | None = None
    ) -> tuple[torch.Tensor, tuple[Routing, ...]]:
        """[batch, seq] -> hidden states [batch, seq, hidden] and the sparse layers' routings."""
        x = self.embed_tokens(input_ids)
        rope = self._rotation(input_ids, cache, documents, x.dtype)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, rope, cache, documents)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), tuple(routings)

    def _rotation(
        self, input_ids: torch.Tensor, cache: KVCache | None, documents: Documents | None, dtype: torch.dtype
    ) -> Rotation:
        """Of each position, [seq, width]; of each document's own, [batch * seq, width]; of each sequence's own where
        they begin in different columns of the cache, [batch, 1, seq, width]."""
        if documents is not None:
            return rotation(documents.positions.flatten(), self.rope_width, self.rope, dtype)
        if cache is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            positions = cache.advance(input_ids.shape[1], input_ids.device)
        rope = rotation(positions.flatten(), self.rope_width, self.rope, dtype)
        if positions.ndim == 1:
            return rope
        return Rotation(*(part.unflatten(0, positions.shape).unsqueeze(1) for part in rope))


class CausalLM(nn.Module):
    """Decoder and language-model head, whose weight may be the embedding's."""

    def __init__(self, cfg: ModelConfig, layers: list[DecoderLayer], rope_width: int) -> None:
        super().__init__()
        self.is_tied = cfg.tie_word_embeddings
        self.model = Decoder(cfg, layers, rope_width)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's, where the config says so; again after weights were replaced."""
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As PyTorch's, which would leave a tied model with two weights."""
        super().to_empty(device=device, recurse=recurse)
        self.tie()
        return self

    def forward(
        self, input_ids: torch.Tensor, cache: KVCache | None = None, documents: Documents | None = None
    ) -> ModelOutput:
        """Next-token logits for token ids [batch, seq].

        With a cache, ids continue what it holds, and the logits are those of the last position: [batch, 1, vocab].
        With `documents`, tokens see those of their own document alone, whose positions begin at 0.
        """
        assert cache is None or documents is None, "documents are for whole sequences"
        hidden, routings = self.model(input_ids, cache, documents)
        if cache is not None:
            hidden = hidden[:, -1:]
        return ModelOutput(self.lm_head(hidden), routings)
