"""Makes a plain model parallel by a plan: parameters first, then the forward functions."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from moe_trainer.config.choices import Dispatch
from moe_trainer.config.schema import LoraConfig, ModelConfig, ParallelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters
from moe_trainer.models.moe import SparseMoeBlock
from moe_trainer.models.plans import Plan
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.mesh import Meshes
from moe_trainer.parallel.plan import placements_of, resolve_plan, select_parallel_plan, verify_plan, with_adapters
from moe_trainer.parallel.sequence import SequenceShards
from moe_trainer.parallel.styles import ParallelContext, WeightStyle


def build_model(
    cfg: ModelConfig, parallel: ParallelConfig, meshes: Meshes, dtype: torch.dtype, lora: LoraConfig | None = None
) -> tuple[CausalLM, ParallelContext]:
    """The family's model on the meta device, split by the plan of the flags over `tp` and `ep`.

    Next comes FSDP (for training), then `to_empty`, then the values. With `lora` it has adapters, and all else is
    frozen.

    Returns:
        The model and the context that its styles share; the loss needs its split of the sequence.

    Raises:
        ConfigError: no plan for the flags, or one that does not fit the model; a target of `lora` that names nothing.
    """
    family = FAMILIES[cfg.family]
    with torch.device("meta"):
        model = family.build(cfg)
        if lora is not None and lora.rank is not None:
            add_adapters(model, lora)
        model.to(dtype)
    plan = with_adapters(select_parallel_plan(parallel, family.plans, cfg.family), model)
    optional = family.plans.optional if parallel.plan is None else frozenset()
    context = apply_plan(model, plan, meshes, optional, parallel.dispatch)
    model.tie()
    return model, context


def apply_plan(
    model: nn.Module,
    plan: Plan,
    meshes: Meshes,
    optional: frozenset[str] = frozenset(),
    dispatch: Dispatch = Dispatch.auto,
) -> ParallelContext:
    """Split a model on the meta device: its parameters first, then the forward functions.

    Args:
        optional: patterns that may match nothing.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    context = ParallelContext(meshes, dispatch)
    rules = resolve_plan(model, plan, optional)
    axes = {"tp": meshes.tp, "ep": meshes.ep}
    active = {name: style for name, style in rules.items() if axes[style.axis] is not None}
    for name, style in active.items():
        mesh = axes[style.axis]
        for parameter, placement in placements_of(model, name, style, mesh.size()).items():
            _shard(model, parameter, placement, mesh)
    for name, style in active.items():
        if not isinstance(style, WeightStyle):
            module = model.get_submodule(name)
            module.forward = style.wrap(module, context)
    if context.sequence is not None:
        for module in model.modules():
            if isinstance(module, SparseMoeBlock):
                module.limit = _limit_whole(module, context.sequence)
    verify_plan(model, rules, meshes)
    return context


def _limit_whole(block: SparseMoeBlock, sequence: SequenceShards) -> Callable[[torch.Tensor], torch.Tensor]:
    """Capacity over all positions, of which this rank has its own: all-gather of the choices; no backward."""
    limit = block.limit
    return lambda top_k_index: sequence.local(limit(sequence.gather(top_k_index)))


def _shard(model: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    """Replace a parameter by a DTensor on an axis."""
    owner, _, last = name.rpartition(".")
    whole = model.get_parameter(name)
    assert whole.is_meta, f"{name} already holds data: build the model on the meta device"
    shape = list(whole.shape)
    if isinstance(placement, Shard):
        assert shape[placement.dim] % mesh.size() == 0, f"{name} {tuple(shape)} over {mesh.size()} ranks"
        shape[placement.dim] //= mesh.size()
    local = torch.empty(shape, dtype=whole.dtype, device="meta")
    sharded = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    setattr(model.get_submodule(owner), last, nn.Parameter(sharded, requires_grad=whole.requires_grad))
