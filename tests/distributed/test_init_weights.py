"""Initial weights do not depend on the mesh, and making them takes no more memory than they do."""

import hashlib
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import shard_over_data
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import Precision
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL

SP_EP = {"sequence_parallel": True, "expert_parallel": True}
MESHES = {
    1: [ParallelConfig(fsdp=1, tp=1, ep=1, **SP_EP)],
    2: [ParallelConfig(fsdp=2, tp=1, ep=1), ParallelConfig(fsdp=1, tp=2, ep=2, **SP_EP)],
    4: [
        ParallelConfig(fsdp=1, tp=4, ep=1, sequence_parallel=True),
        ParallelConfig(fsdp=2, tp=2, ep=4, **SP_EP),
        ParallelConfig(fsdp=2, tp=2, ep=1),
        ParallelConfig(dp_replicate=2, fsdp=2, tp=1, ep=1),
    ],
}
FLOAT32 = Precision(torch.float32, torch.float32, torch.float32)


def digest(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest() for name, w in weights.items()}


def sharded(model: Any, parallel: ParallelConfig) -> torch.nn.Module:
    meshes = build_meshes(parallel, "cpu")
    made, _ = build_model(model, parallel, meshes, torch.float32)
    shard_over_data(made, meshes, FLOAT32)
    made.to_empty(device="cpu")
    initialize(made, 7, 0.02)
    return made


def digests(meshes: list[ParallelConfig]) -> list[dict[str, str]]:
    return [digest(full_tensors(dict(sharded(MODEL, parallel).named_parameters()))) for parallel in meshes]


def test_same_seed_same_weights_on_every_mesh() -> None:
    plain = build_mixtral(MODEL)
    initialize(plain, 7, 0.02)
    expected = digest({name: parameter.detach() for name, parameter in plain.named_parameters()})
    for world, meshes in MESHES.items():
        for parallel, found in zip(meshes, run_distributed(digests, world, meshes)[0], strict=True):
            assert found == expected, parallel
    initialize(plain, 8, 0.02)
    other = digest({name: parameter.detach() for name, parameter in plain.named_parameters()})
    assert {name for name in expected if expected[name] == other[name]} == {n for n in expected if "norm" in n}


def test_weights_are_independent_normal_draws() -> None:
    """No expert, layer or matrix repeats another, and the scale is the one asked for."""
    plain = build_mixtral(MODEL)
    initialize(plain, 7, 0.02)
    rows = []
    for name, parameter in plain.named_parameters():
        if "norm" not in name:
            rows += parameter.detach().flatten().split(64)
            assert abs(parameter.std().item() / 0.02 - 1) < 0.15, name
    same = torch.nn.functional.normalize(torch.stack([row for row in rows if len(row) == 64]), dim=1)
    assert (same @ same.T).fill_diagonal_(0).abs().max() < 0.8


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor goes first; what it does to its local tensors comes here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu":  # no DTensor, none faked
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


WIDE = replace(MODEL, hidden_size=64, intermediate_size=128, vocab_size=256, num_layers=3)


def measure(meshes: list[ParallelConfig]) -> list[tuple[int, int, int]]:
    """Bytes of the rank's share, those alive after building, and the most alive at a time."""
    result = []
    for parallel in meshes:
        with LiveBytes() as memory:
            model = sharded(WIDE, parallel)
        share = sum(local_part(parameter).nbytes for parameter in model.parameters())
        result.append((share, memory.live, memory.peak))
    return result


def test_no_rank_holds_more_than_its_share_and_one_tensor() -> None:
    shapes = dict(build_mixtral(WIDE).named_parameters())
    largest_dense = max(p.nbytes for name, p in shapes.items() if ".experts." not in name)
    largest_expert = max(p[0].nbytes for name, p in shapes.items() if ".experts." in name)
    everything = sum(p.nbytes for p in shapes.values())
    meshes = MESHES[4][:3]
    for results in run_distributed(measure, 4, meshes):
        for parallel, (share, live, peak) in zip(meshes, results, strict=True):
            assert share < 0.4 * everything
            assert live >= share, "the count misses weights"
            assert share + min(largest_dense, largest_expert) <= peak, "the count misses what is drawn"
            assert peak <= share + max(largest_dense, largest_expert) + 4096, parallel
