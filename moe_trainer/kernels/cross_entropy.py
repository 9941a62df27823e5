"""The two passes of cross entropy over the logits, which are never copied to a wider type on a GPU."""

import torch

from moe_trainer.kernels.backend import has_kernel


def statistics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: the maximum, the sum of exp(logit - maximum), and the label's logit; float32 at least.

    Args:
        logits: [tokens, vocab].
        labels: [tokens]; one outside of the vocabulary has logit 0.
    """
    if has_kernel(logits) and logits.is_contiguous():
        from moe_trainer.kernels.gpu import cross_entropy as gpu

        return gpu.statistics(logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = wide.amax(-1)
    unknown = _unknown(labels, logits.shape[1])
    at_label = wide.gather(1, labels.masked_fill(unknown, 0).unsqueeze(1)).squeeze(1)
    return highest, (wide - highest.unsqueeze(1)).exp_().sum(-1), at_label.masked_fill(unknown, 0)


def gradient_(
    logits: torch.Tensor, labels: torch.Tensor, log_normalizer: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`(softmax(logits) - onehot(labels)) * scale`, [tokens, vocab]; it may use up the memory of the logits.

    Args:
        log_normalizer: [tokens], logarithm of the sum of exp(logit).
        scale: [tokens].
    """
    if has_kernel(logits) and logits.is_contiguous():
        from moe_trainer.kernels.gpu import cross_entropy as gpu

        return gpu.gradient_(logits, labels, log_normalizer, scale)
    probabilities = (logits.to(log_normalizer.dtype) - log_normalizer.unsqueeze(1)).exp_()
    unknown = _unknown(labels, logits.shape[1])
    onehot = (~unknown).to(probabilities.dtype).unsqueeze(1)
    probabilities.scatter_add_(1, labels.masked_fill(unknown, 0).unsqueeze(1), -onehot)
    return (probabilities * scale.unsqueeze(1)).to(logits.dtype)


def _unknown(labels: torch.Tensor, vocab: int) -> torch.Tensor:
    return (labels < 0) | (labels >= vocab)
