"""Plans without a process group: meshes are stand-ins that only have a size and names."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.models.mixtral.plan import PLANS
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.plan import resolve_plan, rule_for, select_parallel_plan, verify_plan
from moe_trainer.parallel.styles import STYLES, WeightStyle

FLAGS = {"tp": (False, False), "sp": (True, False), "tp_ep": (False, True), "sp_ep": (True, True)}
NAMES = list(FLAGS)
# What some layers have and others have not.
SHAPES = {
    Family.qwen3_moe: {"dense_layers": [0], "dense_intermediate_size": 32},
    Family.deepseek_v3: {"dense_layers": [0], "dense_intermediate_size": 32, "num_shared_experts": 1},
}


def tiny() -> nn.Module:
    with torch.device("meta"):
        return build_mixtral(ModelConfig())


def flags(name: str) -> ParallelConfig:
    sequence_parallel, expert_parallel = FLAGS[name]
    return ParallelConfig(sequence_parallel=sequence_parallel, expert_parallel=expert_parallel)


@pytest.mark.parametrize("name", NAMES)
def test_flags_choose_the_plan(name: str) -> None:
    assert select_parallel_plan(flags(name), PLANS, Family.mixtral) is getattr(PLANS, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_plan_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"mixtral has no plan {name}: "):
        select_parallel_plan(flags(name), replace(PLANS, **{name: None}), Family.mixtral)


def test_own_plan_replaces_the_models_whole() -> None:
    own = {"lm_head": "vocab_parallel_head"}
    parallel = replace(flags("sp_ep"), plan=own)
    assert select_parallel_plan(parallel, PLANS, Family.mixtral) is own


def test_unknown_style() -> None:
    parallel = replace(flags("tp"), plan={"lm_head": "colwse"})
    with pytest.raises(ConfigError, match="parallel.plan: lm_head names style colwse; there are .*colwise, "):
        select_parallel_plan(parallel, PLANS, Family.mixtral)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_familys_plans_resolve(name: str, family: Family) -> None:
    plans = FAMILIES[family].plans
    plan = getattr(plans, name)
    with torch.device("meta"):
        model = FAMILIES[family].build(ModelConfig(family=family, **SHAPES.get(family, {})))
    rules = resolve_plan(model, plan, plans.optional)
    assert {id(style) for style in rules.values()} == {id(STYLES[style]) for style in plan.values()}
    assert plans.optional <= plan.keys()


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("layers.3.mlp", "exact"),
        ("layers.4.mlp", "one star"),
        ("layers.4.mlp.gate", "two stars"),
        ("layers.4.mlp.experts", "narrower"),
        ("layers.4.mlp.gate.weight", None),  # a star is one part of a name
        ("layers.4", None),
        ("xlayers.4.mlp", None),
        ("layersx4.mlp", None),  # a dot is a dot
    ],
)
def test_the_narrowest_goes_first(name: str, style: str | None) -> None:
    plan = {
        "layers.*.mlp": "one star",
        "layers.*.mlp.*": "two stars",
        "layers.*.mlp.experts": "narrower",
        "layers.3.mlp": "exact",
    }
    assert rule_for(name, plan) == style
    assert rule_for(name, dict(reversed(plan.items()))) == style


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"model.layers.\*.mlp.router matches no module"):
        resolve_plan(tiny(), PLANS.tp | {"model.layers.*.mlp.router": "ep_router"})


PROJECTION = "model.layers.*.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (  # neither pattern is narrower
            {"model.*.0.self_attn.q_proj": "rowwise"},
            f"two rules claim model.layers.0.self_attn.q_proj: {PROJECTION}: colwise and "
            "model.*.0.self_attn.q_proj: rowwise",
        ),
        (
            {"model.layers.*.mlp.*.down_proj": "moe_tp_down_rowwise", "model.layers.*.*.experts.down_proj": "x"},
            "two rules claim model.layers.0.mlp.experts.down_proj: "
            "model.layers.*.mlp.*.down_proj: moe_tp_down_rowwise and model.layers.*.*.experts.down_proj: x",
        ),
        (  # a leaf's style places its weight, and so does the weight's own
            {f"{PROJECTION}.weight": "moe_tp_down_rowwise"},
            f"two rules claim model.layers.0.self_attn.q_proj.weight: {PROJECTION}: colwise and "
            f"{PROJECTION}.weight: moe_tp_down_rowwise",
        ),
        (
            {"lm_head": "grouped_gemm"},
            "lm_head names style grouped_gemm, which is for weights of experts, for lm_head",
        ),
        (
            {"lm_head.weight": "colwise", "lm_head": "replicate_input"},
            "lm_head.weight names style colwise, which is for modules, for lm_head.weight",
        ),
        (
            {"model.layers.*.self_attn": "rowwise"},
            "model.layers.*.self_attn names style rowwise, but model.layers.0.self_attn has no weight",
        ),
    ],
)
def test_a_parameter_that_two_rules_claim_and_other_misfits(change: dict[str, str], message: str) -> None:
    plan = PLANS.tp | change
    if any(style == "x" for style in change.values()):
        del plan["model.layers.*.mlp.experts.down_proj"]
    for order in (plan, dict(reversed(plan.items()))):
        with pytest.raises(ConfigError) as caught:
            resolve_plan(tiny(), order)
        first, _, rest = message.partition(": ")
        assert str(caught.value).startswith(f"parallel plan: {first}")
        assert all(part in str(caught.value) for part in rest.split(" and "))


def meshes(tp: int | None, ep: int | None) -> SimpleNamespace:
    return SimpleNamespace(tp=tp and SimpleNamespace(size=lambda: tp), ep=ep and SimpleNamespace(size=lambda: ep))


def test_verify_names_a_weight_that_stayed_whole() -> None:
    model = tiny()
    rules = resolve_plan(model, PLANS.tp)
    with pytest.raises(ConfigError, match="the rule for model.embed_tokens left model.embed_tokens.weight whole"):
        verify_plan(model, rules, meshes(2, None))


def test_verify_names_an_expert_weight_that_stayed_whole() -> None:
    model = tiny()
    name = "model.layers.1.mlp.experts.down_proj"
    for style, sizes in (("moe_tp_down_rowwise", (2, None)), ("grouped_gemm", (None, 2))):
        with pytest.raises(ConfigError, match=f"the rule for {name} left {name} whole on every rank"):
            verify_plan(model, {name: STYLES[style]}, meshes(*sizes))


def test_verify_wants_a_rule_for_every_expert_weight() -> None:
    model = tiny()
    experts = "model.layers.1.mlp.experts"
    for missing in (experts, f"{experts}.gate_up_proj", f"{experts}.down_proj"):
        rules = resolve_plan(model, PLANS.sp_ep)
        del rules[missing]
        # Only the experts' own rules: their weights would be found whole first.
        kept = {name: style for name, style in rules.items() if name.startswith("model.layers.1.mlp.experts")}
        kept = {name: replace(s, axis="tp") if isinstance(s, WeightStyle) else s for name, s in kept.items()}
        first = "model.layers.0.mlp.experts"
        others = {f"{first}{tail}": STYLES["moe_dispatch"] for tail in ("", ".gate_up_proj", ".down_proj")}
        with pytest.raises(ConfigError, match=f"no rule for {missing}: name it in the plan"):
            verify_plan(model, kept | others, meshes(None, 2))


def test_verify_refuses_whole_experts_on_ranks_that_share_a_batch() -> None:
    model = tiny()
    rules = {"model.layers.0.mlp.experts": STYLES["moe_dispatch"]}
    with pytest.raises(ConfigError, match="rule for model.layers.0.mlp.experts needs parallel.expert_parallel=true"):
        verify_plan(model, rules, meshes(2, None))


def test_verify_accepts_a_run_without_model_parallelism() -> None:
    verify_plan(tiny(), {}, meshes(None, None))
