"""DeepSeek-V3 and gpt-oss under the four plans on small meshes: what one plain process computes, in float64."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.schema import Family, ModelConfig, ParallelConfig, RopeConfig, RopeType
from moe_trainer.config.validate import resolve_parallel
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.moe import SparseMoeBlock
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import GroupedSigmoidRouter
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import shard_over_data
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import Precision
from moe_trainer.parallel.shards import local_box, local_part
from moe_trainer.testing.compare import assert_close_by_part, full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.loss import LossFn

SEQ = 9  # over four ranks: 3, 3, 3 and none
BATCH = 4
MICRO_BATCH = 2  # the same on every mesh: the balancing loss is one of the micro-batch
STEPS = 2
AUX_COEF = 0.1
TOLERANCE = 1e-9

_YARN = RopeConfig(1e4, RopeType.yarn, 4.0, 8, mscale=0.7, mscale_all_dim=1.3)
_SMALL = ModelConfig(vocab_size=48, hidden_size=32, intermediate_size=16, num_layers=2, num_experts=8, top_k=3)
DEEPSEEK = replace(
    _SMALL,
    family=Family.deepseek_v3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=18,
    dense_layers=[0],
    dense_intermediate_size=24,
    num_shared_experts=2,
    num_expert_groups=4,
    top_k_groups=2,
    routed_scaling_factor=1.5,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=14,
    attention_bias=True,
    rope=_YARN,
)
GPT_OSS = replace(
    _SMALL,
    family=Family.gpt_oss,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    sliding_window=4,
    sliding_layers=[0],
    attention_bias=True,
    swiglu_limit=0.8,
    rope=replace(_YARN, truncate=False, mscale=None, mscale_all_dim=None),
)
MODELS = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_direct": replace(
        DEEPSEEK, q_lora_rank=None, num_shared_experts=0, dense_layers=[], norm_topk_prob=False, attention_bias=False
    ),
    "gpt_oss": GPT_OSS,
    "gpt_oss_two_kv_heads": replace(GPT_OSS, num_kv_heads=2, sliding_layers=None),
}
PLANS = {"tp": (False, False), "sp": (True, False), "tp_ep": (False, True), "sp_ep": (True, True)}
MESHES = {
    2: [*((plan, 1, 1, 2, None) for plan in PLANS), ("sp_ep", 1, 2, 1, 2), ("tp", 1, 2, 1, None)],
    4: [
        *((plan, 1, 1, 4, None) for plan in PLANS),
        *((plan, 1, 2, 2, None) for plan in PLANS),
        ("sp_ep", 1, 2, 2, 4),
        ("sp_ep", 2, 1, 2, 2),
    ],
}


class Outcome(NamedTuple):
    """What must not depend on the mesh."""

    losses: torch.Tensor
    """[steps, 2]: cross entropy and balancing loss."""
    counts: torch.Tensor
    """[steps, sparse layers, num_experts]."""
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def mesh(plan: str, dp_replicate: int, fsdp: int, tp: int, ep: int | None) -> ParallelConfig:
    sequence_parallel, expert_parallel = PLANS[plan]
    parallel = ParallelConfig(dp_replicate, fsdp, tp, ep, sequence_parallel, expert_parallel)
    return resolve_parallel(parallel, dp_replicate * fsdp * tp)


@torch.no_grad()
def fill(model: CausalLM) -> None:
    """The same values on every mesh, none at one that hides it: biases, sinks and the expert bias are not zero."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scaled = 1 + 0.2 * whole if "norm" in name else 0.3 * whole
        local_part(tensor).copy_(scaled[local_box(tensor)])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, _SMALL.vocab_size, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
    labels = ids[:, 1:].clone()
    labels[1, SEQ // 2 :] = -100
    return ids[:, :-1], labels


def train(
    model: CausalLM,
    loss_fn: LossFn,
    whole: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    total: Callable[[torch.Tensor], torch.Tensor],
    data_rank: int,
    data_size: int,
) -> Outcome:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, foreach=True)
    routers = [module for module in model.modules() if isinstance(module, GroupedSigmoidRouter)]
    num_sparse = sum(isinstance(module, SparseMoeBlock) for module in model.modules())
    losses, counts, gradients = [], [], {}
    for step in range(STEPS):
        ids, labels = batch(step)
        shares = torch.zeros(2 + loss_fn.num_experts * num_sparse, dtype=torch.float64)
        for start in range(data_rank * MICRO_BATCH, BATCH, data_size * MICRO_BATCH):
            rows = slice(start, start + MICRO_BATCH)
            loss, parts = loss_fn(model(ids[rows]), labels[rows], int((labels != -100).sum()))
            loss.backward()
            shares += torch.cat([parts.loss.view(1), parts.aux_loss.view(1), parts.expert_counts.flatten()])
        summed = total(shares)
        losses.append(summed[:2])
        counts.append(summed[2:].view(num_sparse, -1))
        if step == 0:
            gradients = whole({name: parameter.grad for name, parameter in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for router, load in zip(routers, counts[-1], strict=bool(routers)):
                router.expert_bias += 0.05 * torch.sign(load.mean() - load)
    weights = whole(dict(model.named_parameters()) | dict(model.named_buffers()))
    return Outcome(torch.stack(losses), torch.stack(counts), gradients, weights)


@cache
def plain(name: str) -> Outcome:
    cfg = MODELS[name]
    model = FAMILIES[cfg.family].build(cfg).double()
    fill(model)

    def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor.detach().clone() for key, tensor in tensors.items()}

    return train(model, LossFn(cfg.num_experts, AUX_COEF), copies, lambda shares: shares, 0, 1)


def train_on(cfg: ModelConfig, cases: list[ParallelConfig]) -> list[Outcome | None]:
    """Each case on this rank; the first rank returns the outcomes."""
    outcomes = []
    for parallel in cases:
        meshes = build_meshes(parallel, "cpu")
        model, context = build_model(cfg, parallel, meshes, torch.float64)
        shard_over_data(model, meshes, Precision(torch.float64, torch.float64, torch.float64))
        model.to_empty(device="cpu")
        fill(model)
        group = meshes.tp.get_group() if meshes.tp is not None else None
        loss_fn = LossFn(cfg.num_experts, AUX_COEF, group, context.sequence)

        def total(shares: torch.Tensor, ranks: int = parallel.tp) -> torch.Tensor:
            dist.all_reduce(shares)
            return shares / ranks

        outcomes.append(train(model, loss_fn, full_tensors, total, meshes.data_rank, meshes.data_size))
    return outcomes if dist.get_rank() == 0 else [None] * len(cases)


@pytest.mark.parametrize("world", [pytest.param(w, marks=pytest.mark.grid) if w > 2 else w for w in MESHES])
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_equals_one_process(name: str, world: int) -> None:
    cases = [mesh(*case) for case in MESHES[world]]
    outcomes = run_distributed(train_on, world, MODELS[name], cases, timeout=300)[0]
    expected = plain(name)
    failed = {}
    for case, outcome in zip(MESHES[world], outcomes, strict=True):
        try:
            assert torch.equal(outcome.counts, expected.counts), "expert counts differ"
            torch.testing.assert_close(outcome.losses, expected.losses, rtol=TOLERANCE, atol=0)
            assert_close_by_part(outcome.gradients, expected.gradients, TOLERANCE)
            assert_close_by_part(outcome.weights, expected.weights, TOLERANCE)
        except AssertionError as error:
            failed[case] = str(error)
    assert not failed, "\n".join(f"{case}: {error}" for case, error in failed.items())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_is_compared_is_zero(name: str) -> None:
    outcome = plain(name)
    silent = [key for key, value in (outcome.gradients | outcome.weights).items() if not value.any()]
    assert not silent
