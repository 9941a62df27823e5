"""Causal self-attention with grouped queries (Ainslie et al., 2023) and a cache for generation."""

import torch
import torch.nn.functional as F
from torch import nn

from moe_trainer.models.linear import Linear
from moe_trainer.models.rope import Rotation, rotate


class KVCache:
    """Keys and values of the tokens so far, for each layer; it holds the heads that this rank computes."""

    def __init__(self, num_layers: int, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.lengths = [0] * num_layers
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return self.lengths[-1]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, kv_heads, seq, head_dim] and return all of the layer's keys and values.

        Raises:
            ValueError: the sequence outgrows `max_seq_len`.
        """
        start, stop = self.lengths[layer], self.lengths[layer] + key.shape[2]
        if stop > self.max_seq_len:
            raise ValueError(f"the key-value cache holds {self.max_seq_len} tokens, {stop} were given")
        if self._keys[layer] is None:
            self._keys[layer] = key.new_empty(*key.shape[:2], self.max_seq_len, key.shape[3])
            self._values[layer] = value.new_empty(*value.shape[:2], self.max_seq_len, value.shape[3])
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, start:stop], values[:, :, start:stop] = key, value
        self.lengths[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """q, k, v and output projections around PyTorch's scaled dot-product attention.

    The number of heads is read off the projections' width, so a rank that holds some of the heads runs the same code.
    A family with norms or clipping between projection and heads overrides `project`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        bias: bool = False,
        window: int | None = None,
    ) -> None:
        """`window`: positions that a token attends to, itself included; None: all before it."""
        super().__init__()
        self.head_dim = head_dim
        self.layer = layer
        self.window = window
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias, heads=num_kv_heads)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias, heads=num_kv_heads)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias)

    def forward(self, x: torch.Tensor, rope: Rotation, cache: KVCache | None = None) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        query, key, value = self.project(x)
        query, key = rotate(query, rope), rotate(key, rope)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out = self.attend(query, key, value)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[batch, seq, hidden] -> query [batch, heads, seq, head_dim], key and value likewise with kv_heads."""
        return self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Weighted values, [batch, heads, seq, head_dim]."""
        return attend(query, key, value, self.window)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of the last `query.shape[2]` positions over all of `key`."""
    seq, context = query.shape[2], key.shape[2]
    windowed = window is not None and context > window
    is_causal = seq == context and not windowed
    mask = None
    if not is_causal and (seq > 1 or windowed):
        mask = causal_mask(seq, context, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def causal_mask(seq: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[seq, context], true where the last `seq` positions look: not ahead, nor further back than the window."""
    mask = torch.ones(seq, context, dtype=torch.bool, device=device).tril(context - seq)
    return mask if window is None else mask.triu(context - seq - window + 1)
