"""A weight's values in the type of the computation, kept from step to step.

The optimizer's kernel, which has the weight at hand, writes them as well, and nobody casts the weight again. Who else
writes to a weight by PyTorch need not know: a copy is of the weight's version in autograd's sight. (Writes through
`weight.data` change no version, nor do kernels: they call `forget_copy`.)
"""

import torch

from moe_trainer.kernels.local_part import local_part

_NAME = "_moe_trainer_copy"


def kept_copy(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's values of a weight in `dtype`, outside of autograd; its own where that is the weight's type.

    Kept are narrower ones alone: a wide copy of a weight that is rounded at random would say more than the weight.
    """
    local = local_part(weight)
    if local.dtype.itemsize <= dtype.itemsize or torch.is_inference_mode_enabled():
        return local.to(dtype)
    copy = current_copy(weight)
    if copy is None or copy.dtype is not dtype:
        copy = local.to(dtype)
        setattr(weight, _NAME, (copy, _age(weight)))
    return copy.detach()  # what autograd makes of the result is not to stick to what is kept


def current_copy(weight: torch.Tensor) -> torch.Tensor | None:
    """What is kept of this weight and still says what it says; who writes the weight unseen writes it too."""
    copy, age = getattr(weight, _NAME, (None, None))
    if copy is not None and age != _age(weight):
        forget_copy(weight)
        return None
    return copy


def forget_copy(weight: torch.Tensor) -> None:
    """After a write to the weight alone that autograd does not see."""
    if hasattr(weight, _NAME):
        delattr(weight, _NAME)


def _age(weight: torch.Tensor) -> tuple[int, ...]:
    """Changes with every write by PyTorch, through the DTensor or to its local tensor."""
    local = local_part(weight)
    return weight._version, local._version, local.data_ptr()
