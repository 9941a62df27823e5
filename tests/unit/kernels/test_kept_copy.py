"""A kept copy is used as long as it says what the weight says, whoever writes to the weight."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.config.schema import OptimConfig
from moe_trainer.kernels.kept_copy import current_copy, forget_copy, kept_copy
from moe_trainer.kernels.local_part import local_part
from moe_trainer.optim.adamw import build_adamw
from moe_trainer.testing.pool import run_distributed


def by_optimizer(weight: nn.Parameter, **options: bool) -> None:
    optimizer = build_adamw([("weight", weight)], OptimConfig(lr=0.5, **options))
    weight.grad = torch.ones_like(weight)
    optimizer.step(torch.ones(()))


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "operation": lambda weight: weight.detach().mul_(2),
    "local part": lambda weight: local_part(weight).add_(1),
    "optimizer": by_optimizer,
    "optimizer with moments elsewhere": lambda weight: by_optimizer(weight, offload=True),
}


def write_and_look(write: str, is_dtensor: bool) -> None:
    values = torch.linspace(-1, 1, 6).view(2, 3)
    if is_dtensor:
        values = DTensor.from_local(values, init_device_mesh("cpu", (1,)), [Shard(0)], run_check=False)
    weight = nn.Parameter(values)
    first = kept_copy(weight, torch.bfloat16)
    assert kept_copy(weight, torch.bfloat16).data_ptr() == first.data_ptr() == current_copy(weight).data_ptr()
    before = local_part(weight).clone()
    WRITES[write](weight)
    assert not torch.equal(local_part(weight), before)
    assert current_copy(weight) is None
    assert torch.equal(kept_copy(weight, torch.bfloat16), local_part(weight).bfloat16())


@pytest.mark.parametrize("is_dtensor", (False, True))
@pytest.mark.parametrize("write", WRITES)
def test_whoever_writes(write: str, is_dtensor: bool) -> None:
    run_distributed(write_and_look, 1, write, is_dtensor)


def test_other_memory() -> None:
    weight = nn.Parameter(torch.ones(3))
    kept_copy(weight, torch.bfloat16)
    weight.data = torch.zeros(3)
    assert current_copy(weight) is None


def test_what_a_kernel_writes_with_the_weight_stays() -> None:
    weight = nn.Parameter(torch.ones(3))
    copy = kept_copy(weight, torch.bfloat16)
    weight.detach().numpy().fill(2.0)  # as a kernel does, unseen
    current_copy(weight).fill_(2.0)
    assert kept_copy(weight, torch.bfloat16).data_ptr() == copy.data_ptr()


def test_who_writes_unseen_says_so() -> None:
    weight = nn.Parameter(torch.ones(3))
    kept_copy(weight, torch.bfloat16)
    weight.data.mul_(2)
    forget_copy(weight)
    assert torch.equal(kept_copy(weight, torch.bfloat16), weight.bfloat16())


def test_no_copy_for_training_is_made_by_inference() -> None:
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        kept_copy(weight, torch.bfloat16)
    assert not kept_copy(weight, torch.bfloat16).is_inference()


def test_the_type_decides() -> None:
    """A wider copy is not kept."""
    weight = nn.Parameter(torch.ones(3))
    assert kept_copy(weight, torch.float32).data_ptr() == weight.data_ptr() and current_copy(weight) is None
    assert kept_copy(weight, torch.float64).dtype is torch.float64 and current_copy(weight) is None
    kept_copy(weight, torch.bfloat16)
    assert kept_copy(weight, torch.float16).dtype is torch.float16


def test_autograd_does_not_stick_to_it() -> None:
    weight = nn.Parameter(torch.ones(3))
    kept_copy(weight, torch.bfloat16).requires_grad_()
    assert not kept_copy(weight, torch.bfloat16).requires_grad
