"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import nn

from moe_trainer.kernels.norm import rms_norm, rms_norm_rotated
from moe_trainer.models.rope import Rotation


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dim, computed in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width], in x's type."""
        return rms_norm(x, weight, self.eps)

    def square(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise, in float32 at least."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).square()

    def scale(self, x: torch.Tensor, mean_square: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The norm, given the mean square [..., 1]: that of the whole width, of which x may be a part."""
        return (x.to(mean_square.dtype) * torch.rsqrt(mean_square + self.eps) * weight).to(x.dtype)


class RotatedNorm(RMSNorm):
    """The norm of each head's query or key, and then its rotation."""

    def forward(self, x: torch.Tensor, rope: Rotation) -> torch.Tensor:
        return self.compute(x, self.weight, rope)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, rope: Rotation) -> torch.Tensor:
        """[batch, seq, heads, head_dim] -> [batch, heads, seq, head_dim], in x's type."""
        return rms_norm_rotated(x, weight, self.eps, *rope)
