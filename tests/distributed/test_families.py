"""Every family under every plan gives the losses, gradients and weights of one plain process.

`test_parity` runs Mixtral on every legal mesh. Here are those on which the families differ: heads and key heads that
are split, shared or normed together, dense layers and shared experts beside sparse ones, latent attention, tied
embeddings, biases, sinks, the expert bias that moves after each step.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe_trainer.config.choices import AuxScope, Family, RopeType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig, ParallelConfig, RopeConfig
from moe_trainer.config.shape import check_divisions
from moe_trainer.kernels.grouped_gemm import grouped_gemm_supported
from moe_trainer.models.router import Router, Routing
from tests.distributed.reference import (
    MODEL,
    PLANS,
    SEQ,
    STEPS,
    Case,
    check,
    mesh,
    plain_outcome,
    train_plain,
)

YARN = RopeConfig(1e4, RopeType.yarn, 4.0, 8, mscale=0.7, mscale_all_dim=1.3)
DEEPSEEK = replace(
    MODEL,
    family=Family.deepseek_v3,
    num_kv_heads=8,
    head_dim=18,
    top_k=3,
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
    rope=YARN,
)
GPT_OSS = replace(
    MODEL,
    family=Family.gpt_oss,
    top_k=3,
    sliding_window=4,
    sliding_layers=[0],
    attention_bias=True,
    swiglu_limit=0.8,
    rope=replace(YARN, truncate=False, mscale=None, mscale_all_dim=None),
)
MODELS = {
    "mixtral": replace(
        MODEL,
        num_kv_heads=2,
        sliding_window=4,
        tie_word_embeddings=True,
        rope=RopeConfig(1e4, RopeType.yarn, 4.0, 16),
    ),
    "qwen3_moe": replace(
        MODEL,
        family=Family.qwen3_moe,
        num_layers=3,
        num_kv_heads=2,
        dense_layers=[1],
        dense_intermediate_size=24,
        norm_topk_prob=False,
        attention_bias=True,
    ),
    "olmoe": replace(MODEL, family=Family.olmoe, head_dim=4, norm_topk_prob=False, clip_qkv=0.8, attention_bias=True),
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": GPT_OSS,
}
VARIANTS = {
    "qwen3_moe tied": replace(
        MODEL, family=Family.qwen3_moe, num_kv_heads=1, tie_word_embeddings=True, sliding_window=4
    ),
    "olmoe tied": replace(MODEL, family=Family.olmoe, head_dim=4, tie_word_embeddings=True),
    "deepseek_v3 direct": replace(
        DEEPSEEK, q_lora_rank=None, num_shared_experts=0, dense_layers=[], norm_topk_prob=False, attention_bias=False
    ),
    "gpt_oss two kv heads": replace(GPT_OSS, num_kv_heads=2, sliding_layers=None),
}
ALL = MODELS | VARIANTS

MESHES = {
    1: [mesh("tp"), mesh("sp_ep")],
    2: [
        *(mesh(plan, tp=2) for plan in PLANS),
        mesh("tp", fsdp=2),
        mesh("tp", dp_replicate=2),
        mesh("sp_ep", fsdp=2, ep=2),
    ],
    4: [
        *(mesh(plan, tp=4) for plan in PLANS),
        *(mesh(plan, fsdp=2, tp=2) for plan in PLANS),
        *(mesh(plan, dp_replicate=2, tp=2) for plan in PLANS),
        mesh("tp", fsdp=4),
        mesh("tp", dp_replicate=2, fsdp=2),
        mesh("sp_ep", fsdp=2, tp=2, ep=4),
        mesh("sp_ep", fsdp=4, ep=2),
        mesh("sp_ep", fsdp=4, ep=4),
        mesh("sp_ep", dp_replicate=2, fsdp=2, ep=2),
    ],
    8: [
        *(mesh(plan, dp_replicate=2, fsdp=2, tp=2) for plan in PLANS),
        *(mesh(plan, fsdp=2, tp=4) for plan in PLANS),
        *(mesh(plan, tp=8) for plan in PLANS),
        mesh("tp", fsdp=8),
        mesh("tp", dp_replicate=2, fsdp=4),
        mesh("sp_ep", dp_replicate=2, fsdp=2, tp=2, ep=4),
        mesh("sp_ep", dp_replicate=2, fsdp=4, ep=4),
        mesh("sp_ep", fsdp=2, tp=4, ep=8),
        mesh("sp_ep", fsdp=4, tp=2, ep=8),
        mesh("sp_ep", fsdp=8, ep=8),
    ],
}
"""In float32, for one model of each family."""
EXACT_MESHES = {
    2: [mesh(plan, tp=2) for plan in PLANS],
    4: [
        *(mesh(plan, tp=4) for plan in PLANS),
        *(mesh(plan, fsdp=2, tp=2) for plan in PLANS),
        mesh("tp", dp_replicate=2, fsdp=2),
        mesh("sp_ep", fsdp=2, tp=2, ep=4),
        mesh("sp_ep", fsdp=4, ep=2),
        mesh("sp_ep", dp_replicate=2, tp=2),
    ],
}
"""In float64, for every model, with the loss that balances each sequence."""
GRID = [
    pytest.param(name, world, marks=[pytest.mark.grid] * (world > 2), id=f"{name}-{world}")
    for world in MESHES
    for name in (MODELS if world not in EXACT_MESHES else ALL)
]


def legal(model: ModelConfig, meshes: list[ParallelConfig]) -> list[ParallelConfig]:
    """Those on which the config allows the model."""
    found = []
    for parallel in meshes:
        try:
            check_divisions(model, parallel)
        except ConfigError:
            continue
        found.append(parallel)
    return found


@pytest.mark.parametrize(("name", "world"), GRID)
def test_every_plan_equals_one_process(name: str, world: int) -> None:
    model = ALL[name]
    exact = legal(model, EXACT_MESHES.get(world, []))
    cases = [Case.accumulating(m, torch.float64, model, aux_scope=AuxScope.sequence) for m in exact]
    if name in MODELS:
        cases += [Case.accumulating(m, torch.float32, model) for m in legal(model, MESHES[world])]
    check(cases, world, timeout=400)


def test_what_the_config_refuses() -> None:
    """No mesh above is left out without notice."""
    meshes = [parallel for of_world in MESHES.values() for parallel in of_world]
    refused = {name: len(meshes) - len(legal(model, meshes)) for name, model in ALL.items()}
    # Norms over all four key heads do not split over eight ranks.
    assert refused == dict.fromkeys(ALL, 0) | {"olmoe": len(PLANS), "olmoe tied": len(PLANS)}
    for parallel in MESHES[2] + MESHES[4]:
        intermediate = MODEL.intermediate_size // (1 if parallel.expert_parallel else parallel.tp)
        assert grouped_gemm_supported(torch.float32, MODEL.hidden_size, intermediate)


@pytest.mark.parametrize("name", ALL)
def test_the_models_have_what_they_are_for(name: str) -> None:
    """Nothing that is compared is zero in the reference, so what is missing shows; windows take effect."""
    model = ALL[name]
    outcome = plain_outcome(Case.accumulating(mesh("tp"), torch.float64, model, aux_scope=AuxScope.sequence))
    assert len(outcome.loss) == STEPS
    zero = [key for key, value in (outcome.gradients | outcome.weights).items() if not value.any()]
    assert not zero
    assert outcome.expert_counts.shape == (STEPS, model.num_layers - len(model.dense_layers), model.num_experts)
    assert ("lm_head.weight" in outcome.weights) is not model.tie_word_embeddings
    assert any("expert_bias" in key for key in outcome.weights) is (model.family is Family.deepseek_v3)
    assert model.sliding_window is None or model.sliding_window < SEQ


Choose = Callable[[Router, torch.Tensor], Routing]


def noisy(choose: Choose, size: float, changed: list[int]) -> Choose:
    """`choose`, which counts the tokens that other logits, `size` away at most, would send to other experts."""
    generator = torch.Generator().manual_seed(0)

    def choose_twice(self: Router, logits: torch.Tensor) -> Routing:
        routing = choose(self, logits)
        noise = size * (2 * torch.rand(8, *logits.shape, generator=generator, dtype=logits.dtype) - 1)
        others = torch.stack([choose(self, logits + one).top_k_index for one in noise])
        changed.append(int((others.sort().values != routing.top_k_index.sort().values).any(-1).sum()))
        return routing

    return choose_twice


@pytest.mark.parametrize("name", MODELS)
def test_float32_has_no_ties(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that differ by ten times what float32 rounds lead to the same experts, so all meshes choose the same:
    the comparison needs that, since another choice is another function."""
    kinds = [Router, *Router.__subclasses__()]
    for micro_batch_size in (1, 2, 4):
        case = Case(mesh("tp"), torch.float32, MODELS[name], micro_batch_size=micro_batch_size)
        for size, is_harmless in ((2e-5, True), (0.3, False)):
            changed: list[int] = []
            with monkeypatch.context() as patch:
                for kind in kinds:
                    patch.setattr(kind, "choose", noisy(kind.choose, size, changed))
                train_plain(case)
            assert (sum(changed) == 0) is is_harmless


@pytest.mark.parametrize("without", [{"aux_coef": 0.0}, {"z_coef": 0.0}, {"aux_scope": AuxScope.sequence}])
@pytest.mark.parametrize("name", MODELS)
def test_balancing_losses_reach_every_router(name: str, without: dict[str, object]) -> None:
    """In the reference, by more of the gradient than any tolerance hides: so their way on a mesh is compared too."""
    case = Case.accumulating(mesh("tp"), torch.float64, MODELS[name])
    whole, part = plain_outcome(case).gradients, plain_outcome(replace(case, **without)).gradients
    routers = [key for key in whole if key.endswith(".mlp.gate.weight")]
    assert routers
    for key in routers:
        for expert, (ours, theirs) in enumerate(zip(whole[key], part[key], strict=True)):
            assert (ours - theirs).norm() > 1e-4 * ours.norm(), f"{key}[{expert}]"
