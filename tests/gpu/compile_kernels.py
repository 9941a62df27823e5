"""Compiles the kernels for Hopper, on any machine: what calls them is called, and a launch only compiles.

Run without TRITON_INTERPRET; writes a line of JSON for each compiled kernel: module, name, types, bytes of shared
memory.
"""

import json
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moe_trainer.kernels.experts import Clamp
from moe_trainer.kernels.gpu import (
    accumulate,
    adamw,
    bfloat16_terms,
    cross_entropy,
    fp8,
    grouped_gemm,
    latent_heads,
    norm,
    normal,
    ping_pong,
    rope,
    rows,
    silu_mul,
    sort,
    sum_of_squares,
    swiglu,
)
from moe_trainer.kernels.stochastic_rounding import RandomBits

_BF16, _FP32, _FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
_KINDS = (_BF16, _FP32)
_TOKENS, _TOP_K, _EXPERTS = 64, 2, 8
_PAIRS = _TOKENS * _TOP_K


class _Hopper:
    """All that Triton asks of a driver before it loads a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(_Hopper())
    launch, seen = JITFunction.run, set()

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(_describe(kernel, compiled)), flush=True)

    JITFunction.run = compile_only
    _elementwise()
    _norms_and_positions()
    _experts()
    _grouped_products()
    _optimizer()


def _describe(kernel: JITFunction, compiled: Any) -> dict[str, Any]:
    types = {name: str(kind) for name, kind in compiled.src.signature.items()}
    used = {"module": kernel.module.rpartition(".")[2], "name": kernel.fn.__name__, "types": types}
    return used | {"shared": compiled.metadata.shared}


def _elementwise() -> None:
    for kind in _KINDS:
        x = torch.empty(_TOKENS, 512, dtype=kind)
        for total in (x, x.float()):
            accumulate.add(total, x, torch.empty_like(x, dtype=_FP32))
        silu_mul.silu_mul_backward(x, x, silu_mul.silu_mul(x, x))
        sum_of_squares.sum_of_squares([x])
        fp8.quantize_rows(x)
        fp8.quantize_rows(x.new_empty(4, 5000))
        fp8.quantize_columns(x.new_empty(_EXPERTS, 512, 100))
        labels, wide = torch.zeros(_TOKENS, dtype=torch.int64), torch.empty(_TOKENS)
        for vocab in (512, 9001):
            logits = x.new_empty(_TOKENS, vocab)
            cross_entropy.statistics(logits, labels)
            cross_entropy.gradient_(logits, labels, wide, wide)
    normal.normal_(torch.empty(4096), 2**62 + 3, 0.02)
    for split in (bfloat16_terms.stacked_terms, bfloat16_terms.joined_terms):
        split(torch.empty(_TOKENS, 100))
        split(torch.empty(_TOKENS, 128))


def _norms_and_positions() -> None:
    for kind, weight_kind in ((_BF16, _BF16), (_BF16, _FP32), (_FP32, _FP32)):
        for width in (100, 128, 4096):
            x, weight = torch.empty(_TOKENS, width, dtype=kind), torch.empty(width, dtype=weight_kind)
            for turn in (None, norm.Turn(x, x, 4)):
                norm.rms_norm_backward(x, x, weight, norm.rms_norm(x, weight, 1e-5, turn)[1], turn)
    for kind, inverse in product(_KINDS, (False, True)):
        turn = torch.empty(_TOKENS, 64, dtype=kind)
        for heads in (1, 32):
            x = torch.empty(1, _TOKENS, heads, 64, dtype=kind)
            rope.rotate(x.transpose(1, 2), turn, turn, inverse)
            rope.rotate(x.transpose(1, 2).contiguous(), turn, turn, inverse)
        query, key_value = (torch.empty(_TOKENS, 16, width, dtype=kind) for width in (128 + 64, 128 + 128))
        for shared in (torch.empty(_TOKENS, 64, dtype=kind), torch.empty(_TOKENS, 512 + 64, dtype=kind)[:, 512:]):
            latent_heads.heads(query, key_value, shared, turn, turn, interleave=inverse)
        latent_heads.heads_backward(query, query, key_value[..., :128].contiguous(), turn, turn, interleave=inverse)


def _experts() -> None:
    numbers = torch.zeros(_PAIRS, dtype=torch.int64)
    for experts in (1, _EXPERTS, 200):
        sort.sort(numbers, experts)
    end = torch.zeros(1, dtype=torch.int32)
    for kind, width in product(_KINDS, (100, 4096)):
        tokens = torch.empty(_TOKENS, width, dtype=kind)
        copies = rows.spread(tokens, numbers, end, _PAIRS, _TOP_K)
        rows.sum_pairs(copies, numbers, end, _TOP_K)
        gate_up, bias = tokens.new_empty(_PAIRS, 2 * width), tokens.new_empty(_EXPERTS, 2 * width)
        routes = torch.empty(_TOKENS, _TOP_K), numbers, end
        clamp = Clamp(1.702, 7.0)
        for more in ((), (None, None, clamp), (bias, numbers), (bias, numbers, clamp)):
            swiglu.swiglu(gate_up, *routes, *more)
            swiglu.swiglu_backward(gate_up, copies, *routes, *more)


def _grouped_products() -> None:
    """Long sums are `grouped_gemm`'s own, short ones `ping_pong`'s."""
    long = ((_EXPERTS, 4096, 1024), (3, 4104, 1000))
    for count, width, other in ((_EXPERTS, 512, 1024), (3, 264, 1000), *long):
        offsets = torch.zeros(count, dtype=torch.int32)
        left, right = (torch.empty(_PAIRS, size, dtype=_BF16) for size in (width, other))
        weight = torch.empty(count, width, other, dtype=_BF16)
        grouped_gemm.multiply(left, weight, offsets)
        grouped_gemm.multiply(left, weight.mT.contiguous().mT, offsets)
        grouped_gemm.outer(left, right, offsets)
    pairs = torch.empty(_EXPERTS * 4096, 128, dtype=_BF16)  # so many that their sum is long
    grouped_gemm.outer(pairs, pairs, torch.zeros(_EXPERTS, dtype=torch.int32))
    for width, other in ((512, 1024), (272, 1008), (8192, 1008)):
        left, weight = torch.empty(_PAIRS, width).to(_FP8), torch.empty(_EXPERTS, other, width).to(_FP8)
        offsets = torch.zeros(_EXPERTS, dtype=torch.int32)
        grouped_gemm.multiply_scaled(left, torch.empty(_PAIRS), weight, torch.empty(_EXPERTS, other), offsets)
    for width, hidden in ((512, 1024), (200, 264)):
        offsets, order = torch.zeros(_EXPERTS, dtype=torch.int32), torch.zeros(_PAIRS, dtype=torch.int64)
        rows, weights = torch.empty(_PAIRS, hidden, dtype=_BF16), torch.empty(_TOKENS, _TOP_K)
        gate_up_proj = torch.empty(_EXPERTS, 2, width, hidden, dtype=_BF16)
        gate_up, _ = ping_pong.swiglu(rows, gate_up_proj, offsets, weights, order)
        down_proj = torch.empty(_EXPERTS, hidden, width, dtype=_BF16)
        ping_pong.swiglu_backward(rows, down_proj, offsets, weights, order, gate_up)


def _optimizer() -> None:
    """Weight and moments are kept in one type or two; part of a tensor, or the whole of it."""
    shape, scalar = (4, 2, 12, 40), torch.ones(())
    whole, part = [slice(0, size) for size in shape], [slice(0, 4), slice(0, 2), slice(6, 12), slice(20, 40)]
    for grad_kind, kind, moments_kind, box in product(_KINDS, _KINDS, _KINDS, (whole, part)):
        bits = RandomBits.of("weight", shape, box)
        weight = torch.empty([place.stop - place.start for place in box], dtype=kind)
        moments = [torch.empty_like(weight, dtype=moments_kind) for _ in range(2)]
        options = scalar, scalar, 1e-3, (0.9, 0.95), 1e-8, 0.1, bits
        adamw.adamw_(weight, weight.to(grad_kind), *moments, *options)
        if kind is _FP32:
            adamw.adamw_(weight, weight.to(grad_kind), *moments, *options, weight.bfloat16())


if __name__ == "__main__":
    main()
