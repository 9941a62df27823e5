"""Hugging Face weights into sharded parameters: right on every mesh, and no rank reads more than its share."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moe_trainer.checkpoint import hf, stored
from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.checkpoint.stored import read_block
from moe_trainer.config.choices import DType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.keymap import file_shapes
from moe_trainer.models.mixtral.hf import key_map
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.pool import run_distributed

MODEL = ModelConfig(
    vocab_size=22,
    hidden_size=16,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_experts=6,
)
# (fsdp, tp, ep, dims of gate_up_proj and down_proj that FSDP shards)
MESHES = {
    2: [(2, 1, 1, (0, 0)), (1, 2, 2, (0, 0)), (1, 2, 1, (0, 0))],
    4: [(2, 2, 2, (0, 0)), (2, 2, 2, (3, 1)), (1, 4, 4, (0, 0)), (4, 1, 2, (3, 1)), (2, 2, 1, (0, 0))],
}


def shapes() -> dict[str, tuple[int, ...]]:
    hidden, heads = MODEL.hidden_size, MODEL.num_heads * MODEL.head_dim
    found = {"model.norm.weight": (hidden,)}
    found |= {name: (MODEL.vocab_size, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in range(MODEL.num_layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{prefix}self_attn.{part}_proj.weight": (heads // 2, hidden) for part in "kv"}
        found |= {f"{prefix}self_attn.q_proj.weight": (heads, hidden)}
        found |= {f"{prefix}self_attn.o_proj.weight": (hidden, heads)}
        found |= {f"{prefix}mlp.gate.weight": (MODEL.num_experts, hidden)}
        found |= {f"{prefix}mlp.experts.gate_up_proj": (MODEL.num_experts, 2, MODEL.intermediate_size, hidden)}
        found |= {f"{prefix}mlp.experts.down_proj": (MODEL.num_experts, hidden, MODEL.intermediate_size)}
    return found


def whole(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shapes()[name], generator=generator).bfloat16()


def tp_placement(name: str) -> Shard | Replicate:
    if "norm" in name or "mlp.gate" in name:
        return Replicate()
    if "gate_up_proj" in name or "down_proj" in name:
        return Shard(2)
    return Shard(1) if "o_proj" in name else Shard(0)


def sharded(fsdp: int, tp: int, ep: int, expert_dims: tuple[int, int]) -> dict[str, torch.Tensor]:
    """float32 parameters full of NaN, laid out as FSDP2 over tp and ep lays them out."""
    efsdp = fsdp * tp // ep
    dense_mesh = init_device_mesh("cpu", (fsdp, tp), mesh_dim_names=("fsdp", "tp"))
    expert_mesh = init_device_mesh("cpu", (efsdp, ep), mesh_dim_names=("efsdp", "ep"))
    groups: dict[str, nn.Module] = {"dense": nn.Module(), "experts": nn.Module()}
    dims: dict[int, int] = {}
    for name, shape in shapes().items():
        is_expert = ".experts." in name and ep > 1
        mesh, placement = (expert_mesh["ep"], Shard(0)) if is_expert else (dense_mesh["tp"], tp_placement(name))
        tensor = torch.full(shape, torch.nan)
        value = distribute_tensor(tensor, mesh, [placement], src_data_rank=None) if mesh.size() > 1 else tensor
        parameter = nn.Parameter(value)
        groups["experts" if is_expert else "dense"].register_parameter(name.replace(".", "/"), parameter)
        dims[id(parameter)] = expert_dims["down_proj" in name] if is_expert else 0
    fully_shard(groups["dense"], mesh=dense_mesh["fsdp"])
    if any(True for _ in groups["experts"].parameters()):
        place = {name: dims[id(p)] for name, p in groups["experts"].named_parameters()}
        ids = {id(p): place[name] for name, p in groups["experts"].named_parameters()}
        fully_shard(groups["experts"], mesh=expert_mesh["efsdp"], shard_placement_fn=lambda p: Shard(ids[id(p)]))
    return {
        name.replace("/", "."): parameter for group in groups.values() for name, parameter in group.named_parameters()
    }


class Meter:
    """Stands for what reads a file, and counts the bytes."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self._read = stored._values

    def read(self, *arguments: Any) -> torch.Tensor:
        values = self._read(*arguments)
        self.read_bytes += values.nbytes
        return values


def load_on(folder: Path, meshes: list[tuple[int, int, int, tuple[int, int]]]) -> list[str]:
    problems = []
    for mesh in meshes:
        parameters = sharded(*mesh)
        meter = Meter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored, "_values", meter.read)
            patch.setattr(stored, "_LEAST_RUN", 1)  # the model is small
            hf.load_hf(folder, parameters, partial(key_map, MODEL))
        share = sum(local_part(parameter).numel() for parameter in parameters.values()) * 2  # bfloat16 on disk
        if not share <= meter.read_bytes <= 1.1 * share:
            problems.append(f"{mesh}: read {meter.read_bytes} bytes for a share of {share}")
        for name, parameter in parameters.items():
            expected = whole(name).float()
            if not torch.equal(parameter.detach().full_tensor(), expected):
                problems.append(f"{mesh}: {name}")
            if not torch.equal(local_part(parameter), expected[local_box(parameter)]):
                problems.append(f"{mesh}: local {name}")
    return problems


def write_hub_folder(folder: Path, changes: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
    """As `transformers` lays it out; the layout is checked against transformers itself in the unit tests."""
    key_of: dict[str, torch.Tensor] = {}
    for name, pieces in key_map(MODEL).items():
        for piece in pieces:
            key_of[piece.key] = whole(name)[piece.target].clone()
    key_of |= changes
    expected = file_shapes(key_map(MODEL), shapes())
    tensors = [
        LazyTensor(key, expected[key], torch.bfloat16, partial(key_of.__getitem__, key)) for key in sorted(key_of)
    ]
    write_hf(folder, tensors, {}, max_shard_bytes=3000)


@pytest.mark.parametrize("world", MESHES)
def test_each_rank_reads_its_share(tmp_path: Path, world: int) -> None:
    write_hub_folder(tmp_path / "hub")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 3
    assert run_distributed(load_on, world, tmp_path / "hub", MESHES[world]) == [[]] * world


def refusal(folder: Path) -> list[str]:
    """One rank cannot read: all stop with the same words, and soon."""
    parameters = sharded(2, 1, 1, (0, 0))
    messages = []

    def read(*arguments: Any) -> None:
        if dist.get_rank() == 1:
            raise ConfigError("the cable is out")
        read_block(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "read_block", read)
        try:
            hf.load_hf(folder, parameters, partial(key_map, MODEL))
        except ConfigError as error:
            messages.append(str(error))
    mesh = init_device_mesh("cpu", (2,))
    local = torch.zeros(MODEL.num_experts, 2, MODEL.intermediate_size // 2, MODEL.hidden_size)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parameters[name] = DTensor.from_local(
        local, mesh, [_StridedShard(2, split_factor=2)], run_check=False, shape=torch.Size(shapes()[name]),
        stride=torch.empty(shapes()[name]).stride(),
    )  # fmt: skip
    try:
        hf.load_hf(folder, parameters, partial(key_map, MODEL))
    except ConfigError as error:
        messages.append(str(error))
    return messages


def test_refusals_are_agreed(tmp_path: Path) -> None:
    write_hub_folder(tmp_path / "hub")
    first, second = run_distributed(refusal, 2, tmp_path / "hub")
    assert first == second
    assert first[0] == "reading Hugging Face weights: the cable is out"
    assert "interleave rows" in first[1]


def load_tied(folder: Path) -> str:
    tied = replace(MODEL, tie_word_embeddings=True)
    parameters = sharded(2, 1, 1, (0, 0))
    del parameters["lm_head.weight"]
    try:
        hf.load_hf(folder, parameters, partial(key_map, tied))
    except ConfigError as error:
        return f"{error} {all(local_part(value).isnan().all() for value in parameters.values())}"
    embedding = "model.embed_tokens.weight"
    return str(
        torch.equal(local_part(parameters[embedding]), whole(embedding).float()[local_box(parameters[embedding])])
    )


def test_a_tied_head_is_compared_by_the_rank_that_keeps_the_rows(tmp_path: Path) -> None:
    embedding = whole("model.embed_tokens.weight")
    for name, row in (("same", None), ("first", 0), ("last", -1)):
        head = embedding.clone()
        if row is not None:
            head[row, 3] += 1
        write_hub_folder(tmp_path / name, {"lm_head.weight": head})
    assert run_distributed(load_tied, 2, tmp_path / "same") == ["True"] * 2
    for name, rank in (("first", 0), ("last", 1)):
        said, other = run_distributed(load_tied, 2, tmp_path / name)
        assert said == other
        assert said.startswith(f"reading Hugging Face weights: {tmp_path / name}: lm_head.weight is not equal to")
        assert said.endswith(" True"), f"rank {rank} or the other changed a parameter"


def export_while_group_lives(root: Path) -> list[str]:
    parameters = sharded(2, 2, 2, (0, 0))
    hf.load_hf(root / "hub", parameters, partial(key_map, MODEL))
    documents = {
        "model.json": model_config_to_json(MODEL),
        "tokenizer.json": load_tokenizer("byte").to_str(),
        "state.json": json.dumps({"step": 1}),
    }
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    checkpoint = CheckpointManager(root / "checkpoints", None).save(1, tensors, documents)
    if dist.get_rank() == 0:
        for workers in (1, 3):
            export_checkpoint(checkpoint, root / f"out{workers}", 4000, DType.bfloat16, workers)
    dist.barrier()
    alone, three = ({path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("out1", "out3"))
    assert len(alone) > 6 and alone == three
    return load_on(root / "out3", [(4, 1, 1, (0, 0))])


def test_hub_to_mesh_to_hub(tmp_path: Path) -> None:
    """Imported on four ranks, saved, exported by rank 0 alone while the group lives, imported on another mesh."""
    write_hub_folder(tmp_path / "hub")
    assert run_distributed(export_while_group_lives, 4, tmp_path) == [[]] * 4
