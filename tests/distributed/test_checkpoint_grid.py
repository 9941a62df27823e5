"""Saved on each mesh, loaded on each other: every value bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_trainer.checkpoint.sharded import load_tensors, save_tensors
from moe_trainer.kernels.local_part import local_part
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.pool import run_distributed


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; `expert_dims` are the dims that FSDP shards of gate_up_proj and down_proj."""

    dp_replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    expert_dims: tuple[int, int] = (0, 0)

    @property
    def world(self) -> int:
        return self.dp_replicate * self.fsdp * self.tp


LAYOUTS = {
    "fsdp1": Layout(),
    "fsdp2": Layout(fsdp=2),
    "tp2_sp_ep": Layout(tp=2, ep=2),
    "tp2": Layout(tp=2),
    "fsdp2_tp2_sp_ep": Layout(fsdp=2, tp=2, ep=2),
    "fsdp2_tp2_sp_ep_hidden": Layout(fsdp=2, tp=2, ep=2, expert_dims=(3, 1)),
    "fsdp2_tp2": Layout(fsdp=2, tp=2),
    "fsdp2_tp2_ep4": Layout(fsdp=2, tp=2, ep=4),
    "fsdp4_ep2_hidden": Layout(fsdp=4, ep=2, expert_dims=(3, 1)),
    "tp4_sp_ep": Layout(tp=4, ep=4),
    "dp2_fsdp2": Layout(dp_replicate=2, fsdp=2),
    "dp2_tp2_sp_ep": Layout(dp_replicate=2, tp=2, ep=2),
}
# Shape and the dim that tp shards (None: whole). 10 and 3 do not divide by 4: uneven and empty shards.
DENSE = {"embed": ((10, 6), 0), "q_proj": ((8, 6), 0), "o_proj": ((6, 8), 1), "norm": ((3,), None)}
# Shape of one expert's weights; 2 and 6 experts of them are made.
EXPERTS = {"gate_up": (2, 5, 8), "down": (8, 6)}


def reference(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def whole_tensors() -> dict[str, torch.Tensor]:
    weights = {name: reference(name, shape) for name, (shape, _) in DENSE.items()}
    for count in (6, 2):  # on ep=4: uneven, and ranks without an expert
        weights |= {f"{name}{count}": reference(f"{name}{count}", (count, *tail)) for name, tail in EXPERTS.items()}
    moments = {f"exp_avg.{name}": weight * 0.5 for name, weight in weights.items()}
    return weights | moments | {"beta_product": torch.tensor(0.125, dtype=torch.float64)}


def holder(mesh_tensors: dict[str, torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for name, tensor in mesh_tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
    return module


def sharded_tensors(layout: Layout, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout that FSDP2 makes over tensor- and expert-parallel DTensors."""
    dense_mesh, dense_data = make_mesh(layout.dp_replicate, layout.fsdp, layout.tp, "fsdp", "tp")
    dense = {}
    for name, (_, dim) in DENSE.items():
        placement = Replicate() if dim is None else Shard(dim)
        dense[name] = split(whole[name], dense_mesh, "tp", layout.tp, placement)
    blocks = holder(dense)
    fully_shard(blocks, mesh=dense_mesh[dense_data])

    efsdp = layout.fsdp * layout.tp // layout.ep
    inner = ("ep", layout.ep) if layout.ep > 1 else ("tp", layout.tp)
    outer = efsdp if layout.ep > 1 else layout.fsdp
    mesh, data = make_mesh(layout.dp_replicate, outer, inner[1], "efsdp", inner[0])
    experts = {}
    for count in (6, 2):
        for name, dim in (("gate_up", 2), ("down", 2)):
            placement = Shard(0 if inner[0] == "ep" else dim)
            experts[f"{name}{count}"] = split(whole[f"{name}{count}"], mesh, inner[0], inner[1], placement)
    modules = holder(experts)
    dims = dict(zip(EXPERTS, layout.expert_dims, strict=True))
    by_parameter = {id(p): dims[name[:-1]] for name, p in modules.named_parameters()}
    fully_shard(modules, mesh=mesh[data], shard_placement_fn=lambda p: Shard(by_parameter[id(p)]))

    weights = {**dict(blocks.named_parameters()), **dict(modules.named_parameters())}
    moments = {f"exp_avg.{name}": (weight.detach() * 0.5) for name, weight in weights.items()}
    return weights | moments | {"beta_product": whole["beta_product"].clone()}


def make_mesh(replicate: int, data: int, inner: int, data_name: str, inner_name: str):
    axes = {"dp_replicate": replicate, data_name: data, inner_name: inner}
    axes = {name: size for name, size in axes.items() if size > 1 or name == data_name}
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    return mesh, tuple(name for name in axes if name != inner_name)


def split(tensor: torch.Tensor, mesh, axis: str, size: int, placement) -> torch.Tensor:
    return distribute_tensor(tensor, mesh[axis], [placement], src_data_rank=None) if size > 1 else tensor.clone()


def save_all(root: Path, names: list[str]) -> dict[str, list[tuple[str, int | None]]]:
    """Kind and dim of the placements of gate_up6 on each layout."""
    placements = {}
    for name in names:
        tensors = sharded_tensors(LAYOUTS[name], whole_tensors())
        save_tensors(root / name, tensors)
        kinds = tensors["gate_up6"].placements
        placements[name] = [(type(kind).__name__, getattr(kind, "dim", None)) for kind in kinds]
    return placements


def load_all(root: Path, names: list[str], saved: list[str]) -> list[str]:
    """The wrong cells."""
    whole = whole_tensors()
    wrong = []
    for name in names:
        target = sharded_tensors(LAYOUTS[name], {key: torch.full_like(value, -7) for key, value in whole.items()})
        for source in saved:
            with torch.no_grad():
                for tensor in target.values():
                    local_part(tensor).fill_(-7)
            load_tensors(root / source, target)
            for key, tensor in target.items():
                if not torch.equal(local_part(tensor), whole[key][local_box(tensor)]):
                    wrong.append(f"{source} -> {name}: {key}")
        # Every rank's box of every cell is compared; that the boxes are those of DTensor need be seen only once.
        for key, tensor in target.items():
            if isinstance(tensor, DTensor) and not torch.equal(tensor.full_tensor(), whole[key]):
                wrong.append(f"{name}: {key} as a whole")
    return wrong


def test_every_layout_loads_on_every_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "alone", whole_tensors())  # no process group
    placements: dict[str, list[tuple[str, int | None]]] = {}
    for world in (1, 2, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.world == world]
        placements |= run_distributed(save_all, world, tmp_path, names, timeout=180)[0]
    assert placements["fsdp2_tp2_sp_ep"] == [("_StridedShard", 0), ("Shard", 0)]
    assert placements["fsdp2_tp2_sp_ep_hidden"] == [("Shard", 3), ("Shard", 0)]
    assert placements["dp2_fsdp2"] == [("Replicate", None), ("Shard", 0)]
    saved = ["alone", *LAYOUTS]
    for world in (1, 2, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.world == world]
        assert run_distributed(load_all, world, tmp_path, names, saved, timeout=180) == [[]] * world
    for source in saved:
        alone = {key: torch.full_like(value, -7) for key, value in whole_tensors().items()}
        load_tensors(tmp_path / source, alone)
        assert all(torch.equal(alone[key], value) for key, value in whole_tensors().items()), source
