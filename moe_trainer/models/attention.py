"""Causal self-attention with grouped queries (Ainslie et al., 2023) and a cache for generation."""

import torch
import torch.nn.functional as F
from torch import nn

from moe_trainer.kernels.keepable import keepable
from moe_trainer.kernels.packed_attention import batched, end_to_end, packed_attention, takes_packed
from moe_trainer.kernels.rope import rotate
from moe_trainer.models.documents import Documents
from moe_trainer.models.linear import Linear
from moe_trainer.models.rope import Rotation


class KVCache:
    """Keys and values of the tokens so far, for each layer, in columns that never move or grow.

    It holds the heads that this rank computes. Shorter sequences begin further to the right, so that all end in the
    same column; nobody looks at the columns before a sequence's start. Which column comes next is counted on the
    device: a step over one more token is the same work each time, which a CUDA graph can replay.
    """

    def __init__(self, num_layers: int, max_seq_len: int, starts: torch.Tensor | None = None) -> None:
        """
        Args:
            max_seq_len: columns; to write past them is an error of the device's `index_copy_`.
            starts: [batch] each sequence's first column, on the model's device; None: all begin in the first.
        """
        self.max_seq_len = max_seq_len
        self.starts = starts
        self._is_first = False
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._next: torch.Tensor | None = None
        self._columns: torch.Tensor
        self._masks: dict[int | None, torch.Tensor | None]

    def advance(self, seq: int, device: torch.device) -> torch.Tensor:
        """Take the next `seq` columns, once for all layers; the tokens' positions, [seq] or, from `starts`,
        [batch, seq]."""
        self._is_first = self._next is None
        if self._next is None:
            self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._columns = self._next + torch.arange(seq, device=device)
        self._next += seq
        self._masks = {}
        if self.starts is None:
            return self._columns
        return (self._columns - self.starts.unsqueeze(1)).clamp(min=0)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [batch, kv_heads, seq, head_dim] into the columns just taken.

        Returns:
            The keys and values that `mask` is about: of the first tokens themselves, later of all columns.
        """
        if self._layers[layer] is None:
            # Zeros: what no sequence has written yet is multiplied by a weight of zero, and NaN would survive that.
            wide = [part.new_zeros(*part.shape[:2], self.max_seq_len, part.shape[3]) for part in (key, value)]
            self._layers[layer] = (wide[0], wide[1])
        keys, values = self._layers[layer]
        keys.index_copy_(2, self._columns, key)
        values.index_copy_(2, self._columns, value)
        return (key, value) if self._is_first else (keys, values)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """As `causal_mask` for the tokens just taken, and true in the columns of a token's own sequence alone.

        [seq, columns], with `starts` [batch, 1, seq, columns]. Padding looks at itself: a query without keys is NaN.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        seq, device = len(self._columns), self._columns.device
        if self._is_first and self.starts is None:
            return causal_mask(seq, window, device)
        columns = torch.arange(seq if self._is_first else self.max_seq_len, device=device)
        mask = within(self._columns, columns, window)
        if self.starts is None:
            return mask
        begun = columns >= self.starts.view(-1, 1, 1, 1)
        return mask & (begun | (columns == self._columns.unsqueeze(1)))


class Attention(nn.Module):
    """q, k, v and output projections around PyTorch's scaled dot-product attention.

    The number of heads is read off the projections' width, so a rank that holds some of the heads runs the same code.
    A family with norms or clipping between projection and rotation overrides `project`, which rotates too.
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

    def forward(
        self, x: torch.Tensor, rope: Rotation, cache: KVCache | None = None, documents: Documents | None = None
    ) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        query, key, value = self.project(x, rope)
        if cache is None:
            out = self.attend_documents(query, key, value, documents)
        else:
            mask = cache.mask(self.window)
            out = self.attend(query, *cache.append(self.layer, key, value), mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor, rope: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[batch, seq, hidden] -> query [batch, heads, seq, head_dim] and key, both turned, and value, likewise with
        kv_heads."""
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, *rope), rotate(key, *rope), value

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Weighted values, [batch, heads, seq, head_dim]; see `attend`."""
        return attend(query, key, value, mask)

    def attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents | None
    ) -> torch.Tensor:
        """The same, each token in its own document; see `attend_documents`."""
        return attend_documents(query, key, value, documents, self.window)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of query [batch, heads, seq, head_dim] over key and value [batch, kv_heads, columns, head_dim].

    Args:
        mask: true where a query looks, broadcast to [batch, heads, seq, columns]; None: causal, over as many columns
            as queries, which fused kernels do without a mask.
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1:
        if query.shape[2] == 1:
            # The heads of a group become queries of their key head: no copies of a long cache.
            rows = query.squeeze(2).unflatten(1, (-1, groups))
            out = F.scaled_dot_product_attention(rows, key, value, mask, scale=scale)
            return out.flatten(1, 2).unsqueeze(2)
        # Copied: fused kernels take a mask or grouped queries, not both.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    with keepable():
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents | None,
    window: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention inside each document, shapes as `attend`; a mask of seq x seq only where no kernel fits.

    Args:
        documents: None: each row is one.
        window: positions that a token attends to, itself included; None: all before it.
    """
    if documents is None and (window is None or query.shape[2] <= window):
        return attend(query, key, value, None, scale)  # which has faster kernels
    if takes_packed(query, value):
        return attend_packed(query, key, value, documents, window, scale)
    return attend(query, key, value, whole_mask(query, documents, window), scale)


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents | None,
    window: int | None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend_documents` by `packed_attention`, the rows of the batch laid end to end."""
    seq = query.shape[2]
    rows = [end_to_end(part) for part in (query, key, value)]  # [batch * seq, heads, head_dim]
    if documents is None and window is not None and seq <= window:
        window = None
    boundaries = None if documents is None else documents.boundaries
    return batched(packed_attention(*rows, boundaries, seq, window, scale, sinks), seq)


def whole_mask(query: torch.Tensor, documents: Documents | None, window: int | None) -> torch.Tensor | None:
    """Where each token of whole sequences looks, as `attend` wants it."""
    return causal_mask(query.shape[2], window, query.device) if documents is None else documents.mask(window)


def causal_mask(seq: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[seq, seq], true where each token looks: not ahead, nor further back than the window. None if the window does
    not matter: see `attend`."""
    if window is None or seq <= window:
        return None
    positions = torch.arange(seq, device=device)
    return within(positions, positions, window)


def within(queries: torch.Tensor, columns: torch.Tensor, window: int | None) -> torch.Tensor:
    """Numbers of the queries' and of all columns -> [queries, columns], true up to the query's own."""
    distance = queries.unsqueeze(1) - columns
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
