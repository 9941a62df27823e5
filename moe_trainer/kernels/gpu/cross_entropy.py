"""Cross entropy's passes over the logits: statistics of each row, and the gradient in the logits' own memory."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 4096


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [tokens, vocab], labels [tokens] -> maximum, sum of exp(logit - maximum), logit of the label, [tokens]
    float32 each; a label outside of the vocabulary has logit 0."""
    tokens, vocab = logits.shape
    highest, total, at_label = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    if tokens:
        _statistics[(tokens,)](logits, labels, highest, total, at_label, vocab, _BLOCK, num_warps=8)
    return highest, total, at_label


def gradient_(
    logits: torch.Tensor, labels: torch.Tensor, log_normalizer: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Replace logits by `(softmax - onehot) * scale`, scale [tokens] float32."""
    tokens, vocab = logits.shape
    if tokens:
        grid = (tokens, ceil_div(vocab, _BLOCK))
        _gradient[grid](logits, labels, log_normalizer, scale, vocab, _BLOCK, num_warps=8)
    return logits


@triton.jit
def _statistics(logits, labels, highest, total, at_label, vocab: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab
    # One maximum for the whole block: a maximum for each lane would take two exponentials a value, not one.
    peak = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(value, 0))
        # -inf minus -inf is no number; a value that is none stays in the sum.
        mass *= tl.where(peak == higher, 1.0, tl.exp(peak - higher))
        mass += tl.where(value == float("-inf"), 0.0, tl.exp(value - higher))
        peak = higher
    tl.store(highest + token, peak)
    tl.store(total + token, tl.sum(mass, 0))
    label = tl.load(labels + token)
    known = (label >= 0) & (label < vocab)
    tl.store(at_label + token, tl.load(row + label, mask=known, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits, labels, log_normalizer, scale, vocab, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    factor = tl.load(scale + token)
    at = logits + token * vocab + columns
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.exp(value - tl.load(log_normalizer + token))
    value = tl.where(columns == tl.load(labels + token), value - 1.0, value) * factor
    tl.store(at, value.to(logits.dtype.element_ty), mask=inside)
