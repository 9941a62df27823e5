"""Three training steps of a small uneven model: on one process without any parallelism, and on any mesh."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.clip import clip_grad_norm
from moe_trainer.parallel.fsdp import Precision, shard_over_data
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.shards import local_box, local_part
from moe_trainer.testing.compare import full_tensor
from moe_trainer.train.loss import LossFn

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    num_experts=8,
    top_k=2,
    initializer_range=0.3,
)
SEQ = 9  # over four tensor-parallel ranks: 3, 3, 3 and none
GLOBAL_BATCH = 8
STEPS = 3
AUX_COEF = 0.1
MAX_NORM = 0.5
SILENT_EXPERT = 5


class Outcome(NamedTuple):
    """What must not depend on the mesh."""

    loss: list[float]
    aux_loss: list[float]
    grad_norm: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, torch.Tensor]
    """After the last step."""
    expert_counts: torch.Tensor
    """[layers, num_experts] of the first step."""


@dataclass(frozen=True)
class Case:
    """One mesh, one plan, one precision."""

    parallel: ParallelConfig
    dtype: torch.dtype
    model: ModelConfig = field(default_factory=lambda: MODEL)
    seq: int = SEQ
    device: str = "cpu"
    compute: torch.dtype | None = None


def batches(model: ModelConfig, seq: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels [GLOBAL_BATCH, seq] of each step; some labels are missing."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(STEPS):
        # Frequent small ids make the routing uneven.
        ids = torch.rand(GLOBAL_BATCH, seq + 1, generator=generator).square() * model.vocab_size
        ids = ids.long()
        labels = ids[:, 1:].clone()
        labels[2, seq // 2 :] = -100
        result.append((ids[:, :-1], labels))
    return result


@torch.no_grad()
def bend(model: CausalLM) -> None:
    """Give every hidden state a common part that one expert's router row rejects: it never gets a token."""
    for name, parameter in model.named_parameters():
        local = local_part(parameter)
        if name == "model.embed_tokens.weight":
            local += 0.2
        if name.endswith(".gate.weight"):
            rows, columns = local_box(parameter)
            if rows.start <= SILENT_EXPERT < rows.stop:
                local[SILENT_EXPERT - rows.start] = -1.0


def _steps(model, loss_fn, data_rank, data_size, total, clip, full, case) -> Outcome:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    loss, aux_loss, grad_norm, gradients, counts = [], [], [], {}, None
    for step, (ids, labels) in enumerate(batches(case.model, case.seq)):
        ids, labels = ids.to(case.device), labels.to(case.device)
        num_tokens = int((labels != -100).sum())
        shares = None
        for row in range(data_rank, GLOBAL_BATCH, data_size):
            to_differentiate, losses = loss_fn(model(ids[row : row + 1]), labels[row : row + 1], num_tokens)
            to_differentiate.backward()
            flat = torch.cat([t.double().flatten() for t in losses])
            shares = flat if shares is None else shares + flat
        shares = total(shares)
        loss.append(shares[0].item())
        aux_loss.append(shares[1].item())
        if step == 0:
            gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
            counts = shares[2:].view(case.model.num_layers, -1).cpu()
        grad_norm.append(clip(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(loss, aux_loss, grad_norm, gradients, {n: full(p) for n, p in model.named_parameters()}, counts)


def train_plain(case: Case) -> Outcome:
    """The reference: a plain model, PyTorch's own clipping."""
    model = build_mixtral(case.model).to(case.dtype)
    initialize(model, 0, case.model.initializer_range)
    bend(model)
    model.to(case.device)
    return _steps(
        model,
        LossFn(case.model.num_experts, AUX_COEF),
        0,
        1,
        lambda x: x,
        torch.nn.utils.clip_grad_norm_,
        lambda x: x.detach().cpu().clone(),
        case,
    )


def train_parallel(case: Case) -> Outcome | None:
    """The same on this rank's mesh; the first rank returns the outcome."""
    import torch.distributed as dist

    parallel = case.parallel
    meshes = build_meshes(parallel, case.device)
    reduce = torch.promote_types(case.dtype, torch.float32)
    precision = Precision(case.compute or case.dtype, case.dtype, reduce)
    model, context = build_model(case.model, parallel, meshes, case.dtype)
    shard_over_data(model, meshes, precision)
    model.to_empty(device=case.device)
    initialize(model, 0, case.model.initializer_range)
    bend(model)
    vocab_group = meshes.tp.get_group() if meshes.tp is not None else None
    sequence = context.sequence if parallel.sequence_parallel else None

    def total(shares: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(shares)
        return shares / parallel.tp

    loss_fn = LossFn(case.model.num_experts, AUX_COEF, vocab_group, sequence)
    outcome = _steps(model, loss_fn, meshes.data_rank, meshes.data_size, total, clip_grad_norm, full_tensor, case)
    return outcome if dist.get_rank() == 0 else None
