"""The sum of the squares of many tensors' values."""

from collections.abc import Sequence

import torch

from moe_trainer.kernels.backend import has_kernel


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one type on one device, at least one: a scalar in float32 at least, summed in a fixed order."""
    if all(has_kernel(tensor) and tensor.is_contiguous() for tensor in tensors):
        from moe_trainer.kernels.gpu import sum_of_squares as gpu

        return gpu.sum_of_squares(tensors)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=wide)).square().sum()
