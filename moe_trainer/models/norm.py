"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import nn


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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * weight).to(x.dtype)
