"""What the plan does to each parameter, found out without ranks and without memory for the weights."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.choices import DeviceName
from moe_trainer.config.patterns import covers
from moe_trainer.config.schema import Config
from moe_trainer.config.validate import world_size_of
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import shard_over_data
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.plan import rule_for, select_parallel_plan, with_adapters
from moe_trainer.parallel.precision import resolve_precision
from moe_trainer.train.memory import States, states_of

Row = tuple[str, str, str, str, str]
"""Parameter, global shape, style, placement, local shape on rank 0."""


class PlanReport(NamedTuple):
    """Of rank 0."""

    rows: list[Row]
    """One for each parameter."""
    states: States


def plan_report(cfg: Config) -> PlanReport:
    """What rank 0 has of each parameter, and of all.

    The real model is split on the meta device, in a process group that only pretends to have ranks.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    # The fake backend registers itself on import; it is PyTorch's own, for questions like this one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size_of(cfg.parallel))
    try:
        meshes = build_meshes(cfg.parallel, "cpu")
        device = torch.device("cuda" if cfg.device is DeviceName.cuda else "cpu")
        precision = resolve_precision(cfg.dtype, cfg.reduce_dtype, device, cfg.optim.weights_dtype)
        model, _ = build_model(cfg.model, cfg.parallel, meshes, precision.master, cfg.lora)
        shard_over_data(model, meshes, precision)
        for name, parameter in model.named_parameters():
            if any(covers(pattern, name) for pattern in cfg.optim.freeze):
                parameter.requires_grad_(False)
        family = FAMILIES[cfg.model.family]
        plan = with_adapters(select_parallel_plan(cfg.parallel, family.plans, cfg.model.family), model)
        rows = [_row(name, parameter, plan) for name, parameter in model.named_parameters()]
        return PlanReport(rows, states_of(model, cfg, precision, device))
    finally:
        dist.destroy_process_group()


def plan_table(cfg: Config) -> str:
    """Mesh and states in one line, and the table of parameters."""
    parallel = cfg.parallel
    report = plan_report(cfg)
    rows = [("parameter", "shape", "style", "placement", "local shape"), *report.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mesh = (
        f"{world_size_of(parallel)} ranks: dp_replicate={parallel.dp_replicate} fsdp={parallel.fsdp} "
        f"tp={parallel.tp} ep={parallel.ep}; rank 0 holds {report.states}"
    )
    return "\n".join([mesh, *lines])


def print_plan(cfg: Config) -> None:
    """Print `plan_table` on stdout."""
    print(plan_table(cfg))


def _row(name: str, parameter: nn.Parameter, plan: dict[str, str]) -> Row:
    style = rule_for(name, plan) or rule_for(name.rpartition(".")[0], plan) or "-"
    placement = "whole"
    if isinstance(parameter, DTensor):
        axes = zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)
        placement = " ".join(f"{axis}:{_short(placed)}" for axis, placed in axes)
    return name, _shape(parameter.shape), style, placement, _shape(local_part(parameter).shape)


def _short(placement: object) -> str:
    dim = getattr(placement, "dim", None)
    return "replicate" if dim is None else f"shard({dim})"


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
