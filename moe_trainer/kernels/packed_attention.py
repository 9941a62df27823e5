"""Attention over documents laid end to end, without a mask: PyTorch's FlashAttention for sequences of any length.

`torch.nn.attention.varlen` wraps the same operator. It is called here as such, because the wrapper's signature has
changed between the versions of PyTorch that we support, and because it knows no sinks. Documents of one length
without a window go to cuDNN on Hopper, which is 1.8 times as fast there.
"""

from typing import Any

import torch

from moe_trainer.kernels.keepable import keepable


def takes_packed(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `packed_attention` computes for these: on CUDA, in 16 bits, with heads that the kernel has room for."""
    width = query.shape[-1]
    fits = width % 8 == 0 and value.shape[-1] <= width <= 256
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and fits


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor | None,
    longest: int,
    window: int | None,
    scale: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention inside each document (FlashAttention-2, Dao, 2023).

    Args:
        query: [tokens, heads, head_dim]; key [tokens, kv_heads, head_dim], value [tokens, kv_heads, value_dim].
        boundaries: [documents + 1] int32, where each begins, and the end; a document may be empty. None: each has
            `longest` tokens.
        longest: no document has more tokens.
        window: positions that a token attends to, itself included; None: all before it.
        scale: of the scores; None: head_dim ** -0.5.
        sinks: [heads] scores that take part in each softmax and have no value.

    Returns:
        [tokens, heads, value_dim]
    """
    if boundaries is None and not _takes_cudnn(query, key, value, longest, window):
        boundaries = torch.arange(0, len(query) + 1, longest, dtype=torch.int32, device=query.device)
    missing = query.shape[-1] - value.shape[-1]
    if missing:  # the kernel wants values as wide as keys
        value = torch.nn.functional.pad(value, (0, missing))
    if sinks is None:
        with keepable():
            out = _attend(query, key, value, boundaries, longest, window, scale)[0]
    else:
        out = _AttendWithSinks.apply(query, key, value, sinks, boundaries, longest, window, scale)
    return out[..., :-missing] if missing else out


class _AttendWithSinks(torch.autograd.Function):
    """A sink adds to each softmax's denominator alone: it scales the output, and with the denominator that has it the
    kernel's backward pass gives the gradients of query, key and value as they are with sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        boundaries: torch.Tensor | None,
        longest: int,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        with keepable():
            out, log_sum, *state = _attend(query, key, value, boundaries, longest, window, scale)[:4]
        total = torch.logaddexp(log_sum, sinks.to(log_sum.dtype).unsqueeze(1))  # [heads, tokens]
        # In one pass, and not in place: activation checkpointing may have kept what the kernel gave.
        out = torch.mul(out, (log_sum - total).exp().T.unsqueeze(-1), out=torch.empty_like(out))
        ctx.save_for_backward(query, key, value, sinks, out, total, boundaries, *state)
        ctx.settings = longest, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, total, boundaries, *state = ctx.saved_tensors
        gradients = _attend_backward(grad, query, key, value, out, total, boundaries, *state, *ctx.settings)
        # The sink's share of a softmax has no value, so its score is pulled by minus the rest's.
        share = (sinks.to(total.dtype).unsqueeze(1) - total).exp()  # [heads, tokens]
        pull = (grad * out).sum(-1, dtype=total.dtype).T
        return *gradients, -(share * pull).sum(1).to(sinks.dtype), None, None, None, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor | None,
    longest: int,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Output, logarithm of each softmax's denominator [heads, tokens] in float32, and two tensors for backward.

    Without boundaries by cuDNN.
    """
    if boundaries is None:
        rows = (batched(part, longest) for part in (query, key, value))
        out, log_sum, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *rows, None, True, is_causal=True, scale=scale
        )
        return end_to_end(out), log_sum.squeeze(-1).transpose(0, 1).flatten(1), seed, offset
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        window is None,
        False,
        scale=scale,
        **_window(window),
    )


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    boundaries: torch.Tensor | None,
    rng_state: torch.Tensor,
    rng_more: torch.Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value."""
    if boundaries is None:
        rows = (batched(part, longest) for part in (grad, query, key, value, out))
        sums = log_sum.unflatten(1, (-1, longest)).transpose(0, 1).unsqueeze(-1).contiguous()
        lengths = None, None, longest, longest
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *rows, sums, rng_state, rng_more, None, *lengths, 0.0, True, scale=scale
        )
        return tuple(map(end_to_end, gradients))
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out,
        log_sum,
        boundaries,
        boundaries,
        longest,
        longest,
        0.0,
        window is None,
        rng_state,
        rng_more,
        scale=scale,
        **_window(window),
    )


def _takes_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, window: int | None
) -> bool:
    """Whether cuDNN computes for documents of one length: not where PyTorch itself would not let it, as in a
    deterministic run."""
    if window is not None or not query.is_cuda or torch.cuda.get_device_capability(query.device) < (9, 0):
        return False
    rows = (batched(part, length) for part in (query, key, value))
    parameters = torch.backends.cuda.SDPAParams(*rows, None, 0.0, True, query.shape[1] != key.shape[1])
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.can_use_cudnn_attention(parameters)


def batched(x: torch.Tensor, length: int) -> torch.Tensor:
    """[documents * length, heads, width] -> [documents, heads, length, width]."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def end_to_end(x: torch.Tensor) -> torch.Tensor:
    """[documents, heads, length, width] -> [documents * length, heads, width]."""
    return x.transpose(1, 2).flatten(0, 1)


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
