"""Cross entropy over a vocabulary that is split between ranks (Megatron-LM, Shoeybi et al., 2019)."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.kernels.cross_entropy import gradient_, statistics

IGNORED_LABEL = -100


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum over tokens of -log softmax(logits)[label], in float32 at least.

    Args:
        logits: [..., vocab], or this rank's equal part of the vocabulary if there is a group.
        labels: [...] token ids, equal on every rank of the group; -100 is left out.
        group: ranks that split the vocabulary, or None.

    Forward makes two all-reduces (the maximum; then the sum of exponentials with the label's logit); backward none.
    On a GPU the backward pass writes the gradient over the logits, so it can run once.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        local = labels - (0 if group is None else group.rank() * logits.shape[-1])
        highest, total, at_label = statistics(logits, local)
        if group is not None:
            own = highest.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total * (own - highest).exp(), at_label))  # [2, tokens]
            dist.all_reduce(sums, group=group)
            total, at_label = sums
        log_normalizer = highest + total.log()
        ignored = labels == IGNORED_LABEL
        ctx.save_for_backward(logits, local, log_normalizer, ignored)
        return (log_normalizer - at_label).masked_fill(ignored, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, local, log_normalizer, ignored = ctx.saved_tensors
        scale = grad.expand_as(log_normalizer).masked_fill(ignored, 0)
        return gradient_(logits, local, log_normalizer, scale), None, None
