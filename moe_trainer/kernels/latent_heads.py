"""Queries, keys and values of multi-head latent attention (DeepSeek-V2, 2024) from what its projections give.

In plain PyTorch, as `models.deepseek_v3` has it, they are made by slices, rotations and concatenations, each a pass
over memory; here by one pass forward and one backward.
"""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel


def has_latent_kernel(query: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether `latent_heads` computes for these."""
    return has_kernel(query) and cos.ndim == 2


def latent_heads(
    query: torch.Tensor,
    key_value: torch.Tensor,
    shared_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate the last `rope` dims of every query and the shared key, and give every key the shared one.

    Args:
        query: [tokens, heads, nope + rope].
        key_value: [tokens, heads, nope + value].
        shared_key: [tokens, rope].
        cos: [positions, rope], both halves alike; the token after the last position is at the first again.
        sin: likewise.
        interleave: what is rotated comes in pairs (0, 1), (2, 3), ..., and leaves as (i, i + rope / 2).

    Returns:
        query [tokens, heads, nope + rope], key like it, value [tokens, heads, value], which shares its memory with
        `key_value`.
    """
    return _LatentHeads.apply(query, key_value, shared_key, cos, sin, interleave)


class _LatentHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key_value: torch.Tensor,
        shared_key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleave: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from moe_trainer.kernels.gpu import latent_heads as gpu

        ctx.turn = cos, sin  # all layers' the same: nothing that activation checkpointing would have to forget
        ctx.interleave = interleave
        shared_key = shared_key if shared_key.stride(-1) == 1 else shared_key.contiguous()
        turned, key = gpu.heads(query.contiguous(), key_value.contiguous(), shared_key, cos, sin, interleave)
        return turned, key, key_value[..., query.shape[-1] - cos.shape[-1] :]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from moe_trainer.kernels.gpu import latent_heads as gpu

        gradients = gpu.heads_backward(*(grad.contiguous() for grad in grads), *ctx.turn, ctx.interleave)
        return *gradients, None, None, None
