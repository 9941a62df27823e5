"""The values that this rank holds of a tensor, for code that knows no mesh."""

import torch
from torch.distributed.tensor import DTensor


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor with this rank's values, sharing memory with the parameter and outside autograd."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.detach()
