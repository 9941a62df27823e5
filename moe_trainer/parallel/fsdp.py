"""FSDP2 over the data axes: it owns the master weights, the cast to the compute type and the sum of gradients."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import DecoderLayer
from moe_trainer.models.lora import is_adapter
from moe_trainer.models.moe import Experts
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.router import Router
from moe_trainer.parallel.compute_copy import compute_with_copies
from moe_trainer.parallel.mesh import Meshes
from moe_trainer.parallel.precision import Precision

PRECISE = (RMSNorm, Router)
"""Modules that compute in float32 at least, and keep their weights so."""


def shard_over_data(
    model: nn.Module, meshes: Meshes, precision: Precision, reshard: bool = False, keep_copies: bool = False
) -> None:
    """Wrap each layer's experts, all norms and routers, the layers' rest, then embedding and head, as groups.

    Norms and routers stay in float32 at least: they compute in it anyway, and the sum of their gradients over `tp`
    runs in the type of the parameters. They are small, so one group gathers those of all layers at once. The layers'
    rest, in an MoE model a small share of them, is gathered one group ahead (`layer_groups`) and stays whole from its
    forward to its backward pass, unless `reshard`; experts do not. Gradients are summed, not averaged: the loss is
    divided once by the tokens of the whole batch, so experts, which meet the tokens of several data ranks, need no
    factor of their own. Experts that no other data rank holds are left to themselves: FSDP would copy their weights
    and gradients several times. So is a whole model on one rank.

    Args:
        keep_copies: in the type of the computation, of what is left to itself: from step to step, not from its
            forward to its backward pass.
    """
    compute = MixedPrecisionPolicy(precision.compute, precision.reduce, cast_forward_inputs=False)
    precise = MixedPrecisionPolicy(precision.precise, precision.reduce, cast_forward_inputs=False)
    dense, expert = meshes.dense_data, meshes.expert_data
    _widen(model, precision.precise)
    if dist.get_world_size() == 1:
        if {precision.compute, precision.master} != {precision.precise}:
            for module in without_fsdp(model):
                compute_with_copies(module, precision.compute, keep_copies)
        return
    alone: set[nn.Parameter] = set()
    for experts in model.modules():
        if isinstance(experts, Experts) and is_alone(experts, expert):
            _as_dtensors(experts, expert)
            compute_with_copies(experts, precision.compute, keep_copies)
            alone.update(experts.parameters())
        elif isinstance(experts, Experts):
            placement = expert_shard_dim(experts, expert)
            fully_shard(experts, mesh=expert, mp_policy=compute, shard_placement_fn=placement)
    norms_and_routers = [module for module in model.model.layers.modules() if isinstance(module, PRECISE)]
    fully_shard(norms_and_routers, mesh=dense, mp_policy=precise, reshard_after_forward=False)
    fully_shard(model.model.norm, mesh=dense, mp_policy=precise)  # apart: not run again by activation checkpointing
    groups = layer_groups(list(model.model.layers), precision.compute.itemsize)
    for group in groups:
        fully_shard(group, mesh=dense, mp_policy=compute, ignored_params=alone, reshard_after_forward=reshard)
    in_order = [group[0] for group in groups]
    if not model.is_tied:  # a tied weight stays in the last group, which spans both uses
        fully_shard(model.model.embed_tokens, mesh=dense, mp_policy=compute)
        fully_shard(model.lm_head, mesh=dense, mp_policy=compute, reshard_after_forward=False)
        in_order = [model.model.embed_tokens, *in_order, model.lm_head]
    fully_shard(model, mesh=dense, mp_policy=compute, ignored_params=alone)
    for module, following in pairwise(in_order):
        module.set_modules_to_forward_prefetch([following])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


_GROUP_BYTES = 128 << 20
"""That the gathered weights of several layers may have together."""


def layer_groups(layers: list[DecoderLayer], itemsize: int) -> list[list[DecoderLayer]]:
    """Successive layers whose rest, besides experts, norms and routers, is gathered and reduced as one.

    FSDP's hooks and collectives keep the host a millisecond a group and pass, and small experts are done as fast as
    the host can queue their work. The first layer is alone: nothing hides that it is gathered first and reduced last.

    Args:
        itemsize: bytes of a gathered number.
    """
    groups, width = [layers[:1]], _GROUP_BYTES
    for layer in layers[1:]:
        own = itemsize * _rest(layer)
        if width + own > _GROUP_BYTES:
            groups.append([])
            width = 0
        groups[-1].append(layer)
        width += own
    return groups


def _rest(layer: DecoderLayer) -> int:
    """Numbers of this tensor-parallel rank's part."""
    apart = {p for module in layer.modules() if isinstance(module, (Experts, *PRECISE)) for p in module.parameters()}
    return sum(local_part(parameter).numel() for parameter in layer.parameters() if parameter not in apart)


def end_backward(model: nn.Module) -> None:
    """After each backward pass: the next forward pass is one from the start, and lets its gathering wait for what was
    queued before, such as the optimizer's work.

    Activation checkpointing runs the grouped norms again in the backward pass, which FSDP takes for the begin of a
    forward pass. PyTorch before 2.13 never sees that one end, and later passes then gather at once, before the
    weights have moved. In 2.11 a group's state also counts once for each of its modules, and at the end of a backward
    pass each count looks at each of its parameters: for the norms and routers of 48 layers 58,000 times.
    """
    if isinstance(model, FSDPModule):
        context = model._get_fsdp_state()._state_ctx  # there is no public way
        context.iter_forward_root = None
        context.all_states[:] = dict.fromkeys(context.all_states)


def _widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store norms, routers and adapters in `dtype`: they are small."""
    for module in model.modules():
        if isinstance(module, PRECISE):
            module.to(dtype)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_adapter(name):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))


def is_alone(experts: Experts, mesh: DeviceMesh) -> bool:
    """Whether no rank of the data axes shares these experts, and none of the others a part of their gradients."""
    split = (isinstance(p.placements[0], Shard) for p in experts.parameters() if isinstance(p, DTensor))
    return mesh.size() == 1 and all(split)


def without_fsdp(model: nn.Module) -> list[nn.Module]:
    """Modules whose own weights are computed with copies, once `shard_over_data` has left them to themselves."""
    is_whole = not isinstance(model, FSDPModule)
    kinds = nn.Module if is_whole else Experts
    modules = [module for module in model.modules() if isinstance(module, kinds) and not isinstance(module, PRECISE)]
    return [module for module in modules if not isinstance(module, FSDPModule) and module._parameters]


def computed_with_copies(model: nn.Module) -> set[nn.Parameter]:
    """The weights of `without_fsdp`."""
    return {parameter for module in without_fsdp(model) for parameter in module.parameters(recurse=False)}


def _as_dtensors(experts: Experts, mesh: DeviceMesh) -> None:
    """One kind of parameter for the optimizer."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            sharded = DTensor.from_local(parameter.data, mesh, [Shard(0)] * mesh.ndim, run_check=False)
            setattr(experts, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def expert_shard_dim(experts: Experts, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard] | None:
    """FSDP's dim of each expert weight: whole experts while there are enough for every rank, else the last wide dim.

    Never dim 1 of gate_up_proj, which has length 2. That dim must divide evenly; the config checks it.
    """
    num_local_experts = len(local_part(experts.gate_up_proj))
    if mesh.size(mesh.ndim - 1) <= num_local_experts:
        return None
    hidden_dims = {"gate_up_proj": 3, "down_proj": 1, "gate_up_bias": 2, "down_bias": 1}
    hidden_dims |= {"gate_up_lora_a": 2, "gate_up_lora_b": 2, "down_lora_a": 2, "down_lora_b": 1}
    dims = {id(parameter): hidden_dims[name] for name, parameter in experts.named_parameters(recurse=False)}
    return lambda parameter: Shard(dims[id(parameter)])
