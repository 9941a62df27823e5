"""From the flags to a plan, from a plan to a rule for each module and parameter, and the proof that it took."""

from torch import nn
from torch.distributed.tensor import DTensor, Placement

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.patterns import matches
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.moe import Experts
from moe_trainer.models.plans import ParallelPlans, Plan
from moe_trainer.parallel.mesh import Meshes
from moe_trainer.parallel.styles import STYLES, EmbeddingStyle, ModuleStyle, Style, WeightStyle


def select_parallel_plan(parallel: ParallelConfig, plans: ParallelPlans, family: Family) -> Plan:
    """The plan that the two flags name, or the user's own plan, whole.

    Raises:
        ConfigError: the family has no plan for these flags, or the user's plan names an unknown style.
    """
    if parallel.plan is not None:
        plan, name = parallel.plan, "parallel.plan"
    elif parallel.sequence_parallel and parallel.expert_parallel:
        plan, name = plans.sp_ep, "sp_ep"
    elif parallel.sequence_parallel:
        plan, name = plans.sp, "sp"
    elif parallel.expert_parallel:
        plan, name = plans.tp_ep, "tp_ep"
    else:
        plan, name = plans.tp, "tp"
    if plan is None:
        raise ConfigError(
            f"{family.value} has no plan {name}: change parallel.sequence_parallel or parallel.expert_parallel"
        )
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ConfigError(f"{name}: {pattern} names style {style}; there are {', '.join(sorted(STYLES))}")
    return plan


def with_adapters(plan: Plan, model: nn.Module) -> Plan:
    """The plan, and rules for the adapters of experts (`models.lora`), which follow from those of their weights; the
    adapters of linear layers go with their layer."""
    names = [name for name, _ in model.named_parameters() if "_lora_" in name]
    rules = {}
    for name in names:
        module, _, last = name.rpartition(".")
        weight_style = rule_for(f"{module}.{last.partition('_lora_')[0]}_proj", plan)
        if weight_style is not None:
            is_whole = weight_style != "grouped_gemm" and last in ("gate_up_lora_a", "down_lora_b")
            rules[name] = "moe_tp_adapter" if is_whole else weight_style
    return plan | rules


def rule_for(name: str, plan: Plan) -> str | None:
    """The style of a module or parameter, if the plan has one for it.

    Raises:
        ConfigError: two patterns match, and neither is narrower.
    """
    pattern = _pattern_for(name, plan)
    return None if pattern is None else plan[pattern]


def _pattern_for(name: str, plan: Plan) -> str | None:
    """The narrowest pattern that matches: every other one that does contains it. So an exact name goes before a
    pattern, and `layers.*.mlp` before `layers.*.*`."""
    matching = [pattern for pattern in plan if matches(pattern, name)]
    # A pattern contains another one if it matches it as text: a star stands for a star too.
    narrowest = [p for p in matching if not any(matches(p, other) for other in matching if other != p)]
    if len(narrowest) > 1:
        raise _claimed_twice(name, plan, *narrowest[:2])
    return narrowest[0] if narrowest else None


def _claimed_twice(name: str, plan: Plan, first: str, second: str) -> ConfigError:
    rules = f"{first}: {plan[first]} and {second}: {plan[second]}"
    return ConfigError(f"parallel plan: two rules claim {name}: {rules}")


def resolve_plan(model: nn.Module, plan: Plan, optional: frozenset[str] = frozenset()) -> dict[str, Style]:
    """The style of each module and parameter of the model that has one, by name.

    Raises:
        ConfigError: a pattern that matches nothing, a parameter that two rules claim, or a style for something else
            than what it is named for.
    """
    modules = dict(model.named_modules())
    names = [*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    for pattern in plan:
        if pattern not in optional and not any(matches(pattern, name) for name in names):
            raise ConfigError(f"parallel plan: {pattern} matches no module or parameter of the model")
    patterns = {name: pattern for name in names if (pattern := _pattern_for(name, plan)) is not None}
    for name, pattern in patterns.items():
        style = STYLES[plan[pattern]]
        if isinstance(style, WeightStyle) is (name in modules):
            kind = "weights of experts" if name in modules else "modules"
            raise ConfigError(
                f"parallel plan: {pattern} names style {plan[pattern]}, which is for {kind}, for {name}"
            )
        if isinstance(style, WeightStyle | ModuleStyle):
            continue
        own = [parameter for parameter, _ in modules[name].named_parameters(recurse=False)]
        if "weight" not in own:
            raise ConfigError(f"parallel plan: {pattern} names style {plan[pattern]}, but {name} has no weight")
        for parameter in (f"{name}.{last}" for last in own):
            if parameter in patterns:
                raise _claimed_twice(parameter, plan, pattern, patterns[parameter])
    return {name: STYLES[plan[pattern]] for name, pattern in patterns.items()}


def placements_of(model: nn.Module, name: str, style: Style, ranks: int) -> dict[str, Placement]:
    """Where the rule for `name` wants parameters on its axis of `ranks` ranks, by their full names."""
    if isinstance(style, ModuleStyle):
        return {}
    if isinstance(style, WeightStyle):
        return {name: style.placement}
    placements = style.placements(model.get_submodule(name), ranks)
    return {f"{name}.{parameter}": placement for parameter, placement in placements.items()}


def verify_plan(model: nn.Module, rules: dict[str, Style], meshes: Meshes) -> None:
    """Check the applied plan: every rule for a weight left a DTensor placed as it says, and no parameter is without
    a rule that needs one: an expert weight always; every parameter where the sequence is split, because a rank then
    sees part of the tokens only and somebody must sum its gradients. A weight that embedding and head share is
    claimed by the rules of both, which must agree.

    Raises:
        ConfigError: naming the parameter.
    """
    axes = {"tp": meshes.tp, "ep": meshes.ep}
    for name, style in rules.items():
        if style.axis == "ep" and meshes.ep is None and meshes.tp is not None:
            # Left out, it would leave whole experts on ranks that share a batch, their gradients unsummed.
            raise ConfigError(f"parallel plan: the rule for {name} needs parallel.expert_parallel=true")
        if axes[style.axis] is None:
            continue
        for parameter, placement in placements_of(model, name, style, axes[style.axis].size()).items():
            if _placement_on(model.get_parameter(parameter), style.axis) != placement:
                raise ConfigError(f"parallel plan: the rule for {name} left {parameter} whole on every rank")
    if meshes.tp is None and meshes.ep is None:
        return
    if isinstance(model, CausalLM) and model.is_tied:
        embedding, head = (_placement_on(m.weight, "tp") for m in (model.model.embed_tokens, model.lm_head))
        if embedding != head:
            raise ConfigError(
                "parallel plan: two rules claim model.embed_tokens.weight, which is the head's too: that for "
                f"model.embed_tokens places it as {embedding!r}, that for lm_head as {head!r}"
            )
    if meshes.tp is not None and any(isinstance(s, EmbeddingStyle) and s.splits_sequence for s in rules.values()):
        for name, _ in model.named_parameters():
            if name not in rules and name.rpartition(".")[0] not in rules:
                raise ConfigError(f"parallel plan: no rule for {name}, which sees a part of the sequence")
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for name in (module_name, *(f"{module_name}.{n}" for n, _ in module.named_parameters())):
                if name not in rules:
                    raise ConfigError(f"parallel plan: no rule for {name}: name it in the plan")


def _placement_on(parameter: nn.Parameter, axis: str) -> Placement | None:
    if not isinstance(parameter, DTensor):
        return None
    return dict(zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)).get(axis)
