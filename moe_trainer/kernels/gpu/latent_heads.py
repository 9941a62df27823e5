"""Queries and keys of multi-head latent attention, and their gradients, a program for each token."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import next_power_of_2


def heads(
    query: torch.Tensor,
    key_value: torch.Tensor,
    shared_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.latent_heads.latent_heads`, query and key; the first two contiguous."""
    tokens, num_heads, width = query.shape
    turned, key = torch.empty_like(query), torch.empty_like(query)
    if query.numel():
        sizes = _sizes(width, key_value.shape[2], cos)
        _forward[(tokens,)](
            query, key_value, shared_key, shared_key.stride(0), cos, sin, turned, key, len(cos), num_heads,
            *sizes, interleave, *_blocks(sizes, num_heads), num_warps=4,
        )  # fmt: skip
    return turned, key


def heads_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleave: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key_value and shared_key; all given ones contiguous."""
    tokens, num_heads, width = grad_query.shape
    nope, rope = width - cos.shape[1], cos.shape[1]
    grad = torch.empty_like(grad_query)
    grad_key_value = grad.new_empty(tokens, num_heads, nope + grad_value.shape[2])
    grad_shared = grad.new_empty(tokens, rope)
    if grad.numel():
        sizes = _sizes(width, grad_key_value.shape[2], cos)
        _backward[(tokens,)](
            grad_query, grad_key, grad_value, cos, sin, grad, grad_key_value, grad_shared, len(cos), num_heads,
            *sizes, interleave, *_blocks(sizes, num_heads), num_warps=4,
        )  # fmt: skip
    return grad, grad_key_value, grad_shared


def _sizes(width: int, key_value_width: int, cos: torch.Tensor) -> tuple[int, int, int]:
    """Dims of a head without position, with one, and of its value."""
    nope = width - cos.shape[1]
    return nope, cos.shape[1], key_value_width - nope


def _blocks(sizes: tuple[int, int, int], num_heads: int) -> tuple[int, int, int]:
    """Heads at a time, and columns of the widest part and of half of the rotated one."""
    wide = next_power_of_2(max(sizes[0], sizes[2]))
    return min(next_power_of_2(num_heads), max(1, 2048 // wide)), wide, next_power_of_2(sizes[1] // 2)


@triton.jit
def _places(pair, ROPE: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Of the two halves of each pair, where they come from."""
    if INTERLEAVE:
        return 2 * pair, 2 * pair + 1
    return pair, pair + ROPE // 2


@triton.jit
def _angles(cos, sin, position, pair, ROPE: tl.constexpr):
    at, inside = position * ROPE + pair, pair < ROPE // 2
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    return c, tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(first, second, c, s):
    return first * c - second * s, second * c + first * s


@triton.jit
def _copy(source, target, mask):
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit
def _forward(
    query, key_value, shared_key, stride, cos, sin, turned, key, positions, heads,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, INTERLEAVE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair, column = tl.arange(0, HALF), tl.arange(0, WIDE)
    is_pair = pair < ROPE // 2
    left, right = _places(pair, ROPE, INTERLEAVE)
    c, s = _angles(cos, sin, token % positions, pair, ROPE)
    shared = shared_key + token * stride
    first = tl.load(shared + left, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(shared + right, mask=is_pair, other=0.0).to(tl.float32)
    kind = key.dtype.element_ty
    key_first, key_second = _turn(first, second, c, s)
    key_first, key_second = key_first.to(kind)[None, :], key_second.to(kind)[None, :]
    for start in range(0, heads, HEIGHT):
        head = start + tl.arange(0, HEIGHT)
        is_head = (head < heads)[:, None]
        row = (token * heads + head)[:, None]
        inside = is_head & (column < NOPE)[None, :]
        at = row * (NOPE + ROPE) + column[None, :]
        _copy(query + at, turned + at, inside)
        _copy(key_value + row * (NOPE + VALUE) + column[None, :], key + at, inside)
        inside = is_head & is_pair[None, :]
        at = row * (NOPE + ROPE) + NOPE
        a = tl.load(query + at + left[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(query + at + right[None, :], mask=inside, other=0.0).to(tl.float32)
        a, b = _turn(a, b, c[None, :], s[None, :])
        half = at + pair[None, :]
        tl.store(turned + half, a.to(kind), mask=inside)
        tl.store(turned + half + ROPE // 2, b.to(kind), mask=inside)
        tl.store(key + half, tl.broadcast_to(key_first, (HEIGHT, HALF)), mask=inside)
        tl.store(key + half + ROPE // 2, tl.broadcast_to(key_second, (HEIGHT, HALF)), mask=inside)


@triton.jit
def _backward(
    grad_query, grad_key, grad_value, cos, sin, grad, grad_key_value, grad_shared, positions, heads,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, INTERLEAVE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair, column = tl.arange(0, HALF), tl.arange(0, WIDE)
    is_pair = pair < ROPE // 2
    left, right = _places(pair, ROPE, INTERLEAVE)
    c, s = _angles(cos, sin, token % positions, pair, ROPE)
    s = -s  # back
    kind = grad.dtype.element_ty
    first_sum = tl.zeros((HALF,), tl.float32)
    second_sum = tl.zeros((HALF,), tl.float32)
    for start in range(0, heads, HEIGHT):
        head = start + tl.arange(0, HEIGHT)
        is_head = (head < heads)[:, None]
        row = (token * heads + head)[:, None]
        inside = is_head & (column < NOPE)[None, :]
        at = row * (NOPE + ROPE) + column[None, :]
        to = row * (NOPE + VALUE) + column[None, :]
        _copy(grad_query + at, grad + at, inside)
        _copy(grad_key + at, grad_key_value + to, inside)
        inside = is_head & (column < VALUE)[None, :]
        _copy(grad_value + row * VALUE + column[None, :], grad_key_value + to + NOPE, inside)
        inside = is_head & is_pair[None, :]
        at = row * (NOPE + ROPE) + NOPE
        half = at + pair[None, :]
        a = tl.load(grad_query + half, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(grad_query + half + ROPE // 2, mask=inside, other=0.0).to(tl.float32)
        a, b = _turn(a, b, c[None, :], s[None, :])
        tl.store(grad + at + left[None, :], a.to(kind), mask=inside)
        tl.store(grad + at + right[None, :], b.to(kind), mask=inside)
        first_sum += tl.sum(tl.load(grad_key + half, mask=inside, other=0.0).to(tl.float32), 0)
        second_sum += tl.sum(tl.load(grad_key + half + ROPE // 2, mask=inside, other=0.0).to(tl.float32), 0)
    first, second = _turn(first_sum, second_sum, c, s)
    tl.store(grad_shared + token * ROPE + left, first.to(kind), mask=is_pair)
    tl.store(grad_shared + token * ROPE + right, second.to(kind), mask=is_pair)
