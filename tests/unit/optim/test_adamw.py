import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_trainer.config.choices import DType
from moe_trainer.config.schema import OptimConfig
from moe_trainer.optim.adamw import build_adamw, optimizer_tensors, set_optimizer_step
from moe_trainer.optim.schedule import set_learning_rate
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.pool import run_distributed

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.3)


class Leaf(nn.Module):
    """One weight and no forward: the tests hand out the gradients."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


class Moe(nn.Module):
    """Parameters by the names and ranks of a real block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = Leaf(6)
        self.proj = Leaf(8, 6)
        self.gate = Leaf(4, 6)
        self.experts = Leaf(4, 2, 4, 6)


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


ONE = torch.ones(())
BF16 = DType.bfloat16


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *factor: torch.Tensor) -> None:
    for step in steps:
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step(*factor)


def lazy_adamw(model: Moe) -> torch.optim.AdamW:
    groups = [
        {"params": [model.proj.weight, model.experts.weight], "weight_decay": OPTIM.weight_decay},
        {"params": [model.norm.weight, model.gate.weight], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=True)


@pytest.mark.parametrize("decay_all", [False, True])
def test_only_matrices_but_the_router_decay(decay_all):
    names = {
        "model.embed_tokens.weight": (8, 6),
        "model.layers.0.mlp.gate.weight": (4, 6),
        "model.layers.0.mlp.router.weight": (4, 6),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 2, 4, 6),
        "model.layers.0.self_attn.q_proj.bias": (6,),
        "model.norm.weight": (6,),
    }
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    optimizer = build_adamw(parameters.items(), OptimConfig(weight_decay=0.3, decay_all=decay_all))
    decayed = {id(each) for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    expected = set(names) if decay_all else {"model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"}
    assert {name for name, parameter in parameters.items() if id(parameter) in decayed} == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_state_made_at_once_trains_bit_for_bit_like_lazy_state():
    ours, theirs = Moe(), Moe()
    optimizer = build_adamw(ours.named_parameters(), OPTIM)
    reference = lazy_adamw(theirs)
    take_steps(ours, optimizer, range(3), ONE)
    take_steps(theirs, reference, range(3))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        state, lazy = optimizer.state[mine], reference.state[other]
        assert state.keys() == lazy.keys()
        for key in state:
            assert state[key].dtype == lazy[key].dtype and state[key].device == lazy[key].device
            assert torch.equal(state[key], lazy[key])


def test_state_loaded_in_place_goes_on_as_if_uninterrupted():
    whole, resumed = Moe(), Moe()
    optimizer = build_adamw(whole.named_parameters(), OPTIM)
    take_steps(whole, optimizer, range(2), ONE)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, whole.named_parameters()).items()}
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    take_steps(whole, optimizer, range(2, 4), ONE)

    fresh = build_adamw(resumed.named_parameters(), OPTIM)
    template = optimizer_tensors(fresh, resumed.named_parameters())
    assert set(template) == {
        f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in whole.state_dict()
    }
    assert all(not tensor.any() for tensor in template.values())
    for name, tensor in template.items():
        tensor.copy_(saved[name])
    set_optimizer_step(fresh, resumed.named_parameters(), {}, 2)
    take_steps(resumed, fresh, range(2, 4), ONE)
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_meta_parameters_are_refused():
    with pytest.raises(AssertionError, match="a is on the meta device"):
        build_adamw([("a", nn.Parameter(torch.empty(2, device="meta")))], OPTIM)


def sharded_moe() -> Moe:
    """Dense leaves on (fsdp, tp), experts on (efsdp, ep), by FSDP on top of the inner axis."""
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    expert = init_device_mesh("cpu", (1, 4), mesh_dim_names=("efsdp", "ep"))
    model = Moe()
    inner = {"norm": [Replicate()], "proj": [Shard(0)], "gate": [Replicate()]}
    for name, placements in inner.items():
        leaf = getattr(model, name)
        leaf.weight = nn.Parameter(distribute_tensor(leaf.weight.detach(), dense["tp"], placements))
    experts = distribute_tensor(model.experts.weight.detach(), expert["ep"], [Shard(0)])
    model.experts.weight = nn.Parameter(experts)
    fully_shard(model.experts, mesh=expert["efsdp"])
    fully_shard(model, mesh=dense["fsdp"])
    return model


def train_sharded() -> list[tuple[str, float]]:
    """Largest difference from one process, after 3 steps, of every parameter."""
    model, whole = sharded_moe(), Moe()
    optimizer = build_adamw(model.named_parameters(), OPTIM)
    for name, tensor in optimizer_tensors(optimizer, model.named_parameters()).items():
        parameter = model.get_parameter(name.split(".", 1)[1])
        assert isinstance(tensor, DTensor) and tensor.placements == parameter.placements
        assert tensor.device_mesh == parameter.device_mesh and tensor.to_local().shape == parameter.to_local().shape
    for step in range(3):
        for parameter, gradient in zip(model.parameters(), gradients(whole, step), strict=True):
            mine = gradient[local_box(parameter)].contiguous()
            parameter.grad = DTensor.from_local(
                mine, parameter.device_mesh, parameter.placements, shape=gradient.shape, stride=gradient.stride()
            )
        optimizer.step(ONE)
    take_steps(whole, build_adamw(whole.named_parameters(), OPTIM), range(3), ONE)
    pairs = zip(model.named_parameters(), whole.parameters(), strict=True)
    return [
        (name, (mine.to_local() - other[local_box(mine)]).abs().max().item() / other.abs().max().item())
        for (name, mine), other in pairs
    ]


def test_dtensors_of_two_meshes_train_like_one_process():
    for differences in run_distributed(train_sharded, 4):
        assert len(differences) == 4
        assert all(difference <= 1e-6 for _, difference in differences), differences


def test_the_factor_scales_the_gradients():
    ours, theirs = Moe(), Moe()
    take_steps(ours, build_adamw(ours.named_parameters(), OPTIM), range(3), torch.tensor(0.25))
    reference = lazy_adamw(theirs)
    for step in range(3):
        for parameter, gradient in zip(theirs.parameters(), gradients(theirs, step), strict=True):
            parameter.grad = 0.25 * gradient
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_factor_that_is_not_finite_changes_nothing():
    model = Moe()
    optimizer = build_adamw(model.named_parameters(), OPTIM)
    take_steps(model, optimizer, range(1), ONE)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    take_steps(model, optimizer, range(1, 2), torch.tensor(float("nan")))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[0][name])
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[1][number][key]), key


def test_rounded_moments_learn_as_well() -> None:
    """A quadratic with noise, 300 steps: the distance from its minimum is that of float32 moments, and resumable."""

    def distance(moments: DType, seed: int) -> float:
        torch.manual_seed(seed)
        model, target = Leaf(64, 32), torch.randn(64, 32)
        optim = OptimConfig(lr=1e-2, weight_decay=0.0, beta2=0.999, moments_dtype=moments)
        optimizer = build_adamw(model.named_parameters(), optim)
        for step in range(300):
            model.weight.grad = model.weight.detach() - target + 0.5 * torch.randn(64, 32)
            set_learning_rate(optimizer, 1e-2 * (1 - step / 300))
            optimizer.step(ONE)
        dtype = torch.bfloat16 if moments is BF16 else torch.float32
        assert optimizer.state[model.weight]["exp_avg"].dtype is dtype
        return (model.weight.detach() - target).norm().item()

    wide = [distance(DType.auto, seed) for seed in range(4)]
    rounded = [distance(BF16, seed) for seed in range(4)]
    spread = max(wide) - min(wide)
    assert abs(sum(rounded) - sum(wide)) / 4 < spread
    assert rounded == [distance(BF16, seed) for seed in range(4)]  # rounded at random, and the same every time


def rounded_leaf(size: int) -> Leaf:
    torch.manual_seed(0)
    return Leaf(size).bfloat16()


def test_rounded_weights_take_steps_below_their_precision() -> None:
    """Each of 200 steps is a twentieth or less of what lies between two bfloat16 numbers; rounded to the nearest, no
    weight would ever move."""
    model = rounded_leaf(4096)
    model.weight.data.abs_().clamp_(0.5, 0.99)  # 2**-8 between neighbours
    before = model.weight.detach().double()
    optim = OptimConfig(lr=2e-4, weight_decay=0.0, moments_dtype=BF16)
    optimizer = build_adamw(model.named_parameters(), optim)
    for _ in range(200):
        model.weight.grad = torch.full_like(model.weight, -1.0)
        optimizer.step(ONE)
    assert model.weight.dtype is torch.bfloat16
    moved = model.weight.detach().double() - before
    assert abs(moved.mean().item() - 200 * 2e-4) < 5e-4
    assert moved.unique().numel() > 3


def test_one_step_of_rounded_weights_is_right_on_average() -> None:
    """Against float64: never farther than the next bfloat16, and in the mean over many names the exact value."""
    size, many = 400, 100
    grad = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = rounded_leaf(size).weight.detach().double().requires_grad_()
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    exact.grad = 0.5 * grad.double()
    reference.step()
    found = []
    for number in range(many):
        weight = rounded_leaf(size).weight
        optimizer = build_adamw(
            [(f"model.{number}.weight", weight)], OptimConfig(lr=1e-2, decay_all=True, weight_decay=0.3)
        )
        assert optimizer.state[weight]["exp_avg"].dtype is torch.float32
        weight.grad = grad.clone()
        optimizer.step(torch.tensor(0.5))
        found.append(weight.detach().double())
    between = 2.0 ** (exact.detach().abs().log2().floor() - 7)
    assert ((torch.stack(found) - exact).abs() < between * 1.001).all()
    error = (torch.stack(found).mean(0) - exact.detach()) / between
    assert error.abs().max() < 5 * 0.5 / many**0.5
    assert error.mean().abs() < 5 * 0.5 / (many * size) ** 0.5


def test_a_skipped_step_rounds_nothing() -> None:
    model = rounded_leaf(512)
    optimizer = build_adamw(model.named_parameters(), OptimConfig(moments_dtype=BF16))
    states = []
    for factor in (1.0, float("nan")):
        model.weight.grad = torch.randn(512).bfloat16()
        optimizer.step(torch.tensor(factor))
        states.append(
            [model.weight.detach().clone(), *(value.clone() for value in optimizer.state[model.weight].values())]
        )
    assert all(torch.equal(before, after) for before, after in zip(*states, strict=True))
    assert list(optimizer.state) == [model.weight] and len(optimizer.param_groups) == 1
