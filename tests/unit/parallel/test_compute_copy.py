"""The copy that experts are computed with, and where its gradient goes."""

import weakref
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.models.linear import Embedding, Linear
from moe_trainer.parallel import compute_copy as module
from moe_trainer.parallel.compute_copy import compute_copy, compute_with_copies
from moe_trainer.testing.pool import run_distributed


def master_of(values: torch.Tensor) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(DTensor.from_local(values, mesh, [Shard(0)], run_check=False))


def micro_batches(has_kernel: bool, dtype: torch.dtype) -> list[tuple[torch.dtype, torch.Tensor]]:
    """Type and local part of the master's gradient after each of three; what the third adds is below bfloat16."""
    master = master_of(torch.ones(2, 3, dtype=dtype))
    seen = []
    with patch.object(module, "has_kernel", lambda x: has_kernel):
        for scale in (256.0, 1.0, 1.0):
            (compute_copy(master, torch.bfloat16) * scale).sum().backward()
            seen.append((master.grad.dtype, master.grad.to_local().clone()))
    return seen


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("has_kernel", (False, True))
def test_gradients_are_summed_in_float32(has_kernel: bool, dtype: torch.dtype) -> None:
    first, second, third = run_distributed(micro_batches, 1, has_kernel, dtype)[0]
    # Alone it stays what the products gave, where kernels take it; 256 + 1 is 256 in bfloat16.
    assert first[0] is (torch.bfloat16 if has_kernel else dtype)
    assert (second[0], third[0]) == (torch.float32, torch.float32)
    assert [values.unique().tolist() for _, values in (first, second, third)] == [[256.0], [257.0], [258.0]]


def frozen_and_alike() -> None:
    frozen = master_of(torch.ones(2, 3)).requires_grad_(False)
    assert not compute_copy(frozen, torch.bfloat16).requires_grad
    master = master_of(torch.ones(2, 3))
    with torch.no_grad():
        assert not compute_copy(master, torch.bfloat16).requires_grad
    same = compute_copy(master, torch.float32)  # nothing to copy: the parameter's own values, in autograd's sight
    assert same.data_ptr() == master.to_local().data_ptr()
    same.sum().backward()
    assert torch.equal(master.grad.to_local(), torch.ones(2, 3))


def test_frozen_weights_and_weights_of_the_type() -> None:
    run_distributed(frozen_and_alike, 1)


def in_pieces() -> None:
    """A gradient that is a part of a wider tensor: fused AdamW would read it as if it were whole."""
    master = master_of(torch.ones(2, 3))
    compute_copy(master, torch.float32).backward(torch.arange(48.0).view(2, 3, 8)[..., 0])
    local = master.grad.to_local()
    assert local.is_contiguous() and local.flatten().tolist() == [0, 8, 16, 24, 32, 40]


def test_a_gradient_in_pieces_is_laid_out_like_the_weight() -> None:
    run_distributed(in_pieces, 1)


def outlives_its_use() -> bool:
    copy = compute_copy(master_of(torch.ones(2, 3)), torch.bfloat16)
    seen = weakref.ref(copy)
    total = copy.sum()  # keeps nothing of it for the backward pass, as activation checkpointing does not
    del copy
    lives = seen() is not None
    total.backward()
    return lives


def test_only_who_needs_the_copy_keeps_it() -> None:
    assert run_distributed(outlives_its_use, 1) == [False]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.dtype is torch.bfloat16
        raise KeyError("in the middle")


def test_a_module_has_its_own_weights_again() -> None:
    """Also after a forward pass that ends early, as a repeated one of activation checkpointing does."""
    module = Broken()
    compute_with_copies(module, torch.bfloat16, keep=True)
    weight = module.weight
    with pytest.raises(KeyError):
        module(torch.ones(3))
    assert module.weight is weight and dict(module.named_parameters()) == {"weight": weight}


@pytest.mark.parametrize("keep", (False, True))
def test_a_weight_that_two_modules_share(keep: bool) -> None:
    """Its gradient is the sum of both, in float32; a bias and adapters are cast too, a frozen one has none."""
    embedding, head = Embedding(5, 4), Linear(4, 5, bias=True)
    for parameter in (embedding.weight, head.bias):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    head.weight = embedding.weight
    head.bias.requires_grad_(False)
    for leaf in (embedding, head):
        compute_with_copies(leaf, torch.bfloat16, keep)
    ids = torch.tensor([[0, 3, 3]])
    grad = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    head(embedding(ids)).backward(grad)

    rows, columns = (embedding.weight.detach().bfloat16().requires_grad_() for _ in range(2))
    out = nn.functional.linear(nn.functional.embedding(ids, rows), columns, head.bias.bfloat16())
    parts = torch.autograd.grad(out, (rows, columns), grad)
    assert head.bias.grad is None and head.weight is embedding.weight
    assert torch.equal(head.weight.grad, parts[0].float() + parts[1].float())
