"""The four plans on GPUs: float32 over NCCL against one process, and bfloat16 against float32.

Each test prints a row for each mesh: the worst relative error, the worst cosine and the tensor that has it.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.config.validate import resolve_parallel
from moe_trainer.parallel.gpus import count_places
from moe_trainer.testing.compare import errors_by_part
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import Case, Outcome, assert_same, train_parallel, train_plain

NUM_GPUS = count_places()
needs_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")

PLANS = {"tp": (False, False), "sp": (True, False), "tp_ep": (False, True), "sp_ep": (True, True)}
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    top_k=2,
    initializer_range=0.1,
)
SEQ = 33
FEWEST_COSINE = 0.999


def meshes(plan: str, world: int) -> list[ParallelConfig]:
    """Every mesh of `world` ranks without replicas that the config allows for a plan, and one with."""
    sequence_parallel, expert_parallel = PLANS[plan]
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    found = []
    for dp_replicate, tp, ep in product((1, 2), sizes, sizes if expert_parallel else [None]):
        sizes_of_axes = {"dp_replicate": dp_replicate, "tp": tp, "ep": ep}
        parallel = ParallelConfig(
            **sizes_of_axes, sequence_parallel=sequence_parallel, expert_parallel=expert_parallel
        )
        try:
            found.append(resolve_parallel(parallel, world))
        except ConfigError:
            continue
    return found


def describe(parallel: ParallelConfig) -> str:
    return f"dp_replicate={parallel.dp_replicate} fsdp={parallel.fsdp} tp={parallel.tp} ep={parallel.ep}"


def train_all(cases: list[Case]) -> list[Outcome | None]:
    # Reductions in TensorFloat-32 would hide what float32 is to show.
    torch.backends.cuda.matmul.allow_tf32 = False
    return [train_parallel(case) for case in cases]


def world_sizes() -> list[int]:
    return [size for size in (2, 4, 8) if size <= NUM_GPUS] or [2]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def compare_float32(plan: str, world: int, device: str) -> None:
    case = Case(meshes(plan, world)[0], torch.float32, MODEL, SEQ, device=device, clear_routing=True)
    cases = [replace(case, parallel=parallel) for parallel in meshes(plan, world)]
    plain = train_plain(case)
    outcomes = run_distributed(train_all, world, cases, timeout=300, device=device)[0]
    for one, outcome in zip(cases, outcomes, strict=True):
        errors: dict[str, float] = {}
        for name in plain.gradients:
            errors |= errors_by_part(name, outcome.gradients[name], plain.gradients[name])
        worst = max(errors, key=errors.get)
        print(f"\n{plan:6} {describe(one.parallel):38} float32 worst error {errors[worst]:.1e} {worst}", end="")
        assert_same(outcome, plain, 1e-5)


def compare_bfloat16(plan: str, world: int, device: str) -> None:
    case = Case(meshes(plan, world)[0], torch.float32, MODEL, SEQ, device=device, steps=1, clear_routing=True)
    cases = [replace(case, parallel=parallel, compute=torch.bfloat16) for parallel in meshes(plan, world)]
    plain = train_plain(case)
    failures = []
    outcomes = run_distributed(train_all, world, cases, timeout=300, device=device)[0]
    for one, outcome in zip(cases, outcomes, strict=True):
        assert torch.equal(outcome.expert_counts, plain.expert_counts), "bfloat16 chose other experts"
        cosines = {name: cosine(outcome.gradients[name], plain.gradients[name]) for name in plain.gradients}
        worst = min(cosines, key=cosines.get)
        print(f"\n{plan:6} {describe(one.parallel):38} bfloat16 worst cosine {cosines[worst]:.6f} {worst}", end="")
        if not cosines[worst] >= FEWEST_COSINE:
            failures.append(f"{describe(one.parallel)}: {worst} {cosines[worst]:.6f}")
    assert not failures, "\n".join(failures)


@needs_gpus
@pytest.mark.parametrize("world", world_sizes())
@pytest.mark.parametrize("plan", PLANS)
def test_float32_against_one_process(plan: str, world: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        compare_float32(plan, world, "cuda")


@needs_gpus
@pytest.mark.parametrize("world", world_sizes())
@pytest.mark.parametrize("plan", PLANS)
def test_bfloat16_against_float32(plan: str, world: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        compare_bfloat16(plan, world, "cuda")
