"""Cross entropy over a vocabulary that is split between ranks (Megatron-LM, Shoeybi et al., 2019)."""

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

IGNORED_LABEL = -100


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum over tokens of -log softmax(logits)[label], in float32 at least.

    Args:
        logits: [..., vocab], or this rank's equal part of the vocabulary if there is a group.
        labels: [...] token ids, equal on every rank of the group; -100 is left out.
        group: ranks that split the vocabulary, or None.

    Forward makes two all-reduces (the maximum; then the sum of exponentials with the label's logit); backward none.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None
    ) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = wide.amax(-1)
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        local = labels - (0 if group is None else group.rank() * logits.shape[-1])
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0)
        shifted = wide - highest.unsqueeze(-1)
        at_label = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0)
        sums = torch.stack((shifted.exp().sum(-1), at_label))  # [2, tokens]
        if group is not None:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        ignored = labels == IGNORED_LABEL
        ctx.save_for_backward(logits, highest + log_sum, local, elsewhere, ignored)
        return (log_sum - sums[1]).masked_fill(ignored, 0).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, log_normalizer, local, elsewhere, ignored = ctx.saved_tensors
        probabilities = (logits.to(log_normalizer.dtype) - log_normalizer.unsqueeze(-1)).exp()
        at_label = (~elsewhere).to(probabilities.dtype).unsqueeze(-1)
        probabilities.scatter_add_(-1, local.unsqueeze(-1), -at_label)
        grad_logits = probabilities.masked_fill_(ignored.unsqueeze(-1), 0) * grad
        return grad_logits.to(logits.dtype), None, None
