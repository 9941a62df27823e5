"""From the flags to a plan, from a plan to a rule for each module and parameter, and the proof that it took."""

import re
from collections.abc import Iterable

from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Family, ParallelConfig
from moe_trainer.models.moe import Experts
from moe_trainer.models.plans import ParallelPlans, Plan
from moe_trainer.parallel.mesh import Meshes
from moe_trainer.parallel.styles import STYLES, EmbeddingStyle, ModuleStyle, Style


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


def rule_for(name: str, plan: Plan) -> str | None:
    """The style of a module or parameter: an exact key goes before a pattern, a longer pattern before a shorter."""
    if name in plan:
        return plan[name]
    matching = [pattern for pattern in plan if _matches(pattern, name)]
    return plan[max(matching, key=len)] if matching else None


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def resolve_plan(model: nn.Module, plan: Plan, optional: frozenset[str] = frozenset()) -> dict[str, Style]:
    """The style of each module and parameter of the model that has one, by name.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for pattern in plan.keys() - optional:
        if not any(_matches(pattern, name) for name in names):
            raise ConfigError(f"parallel plan: {pattern} matches no module or parameter of the model")
    rules = {name: rule_for(name, plan) for name in names}
    return {name: STYLES[rule] for name, rule in rules.items() if rule is not None}


def verify_plan(model: nn.Module, rules: dict[str, Style], meshes: Meshes) -> None:
    """Check the applied plan: every rule for a weight left a DTensor on its axis, and no parameter is without a rule
    that needs one: an expert weight always; every parameter where the sequence is split, because a rank then sees
    part of the tokens only and somebody must sum its gradients.

    Raises:
        ConfigError: naming the parameter.
    """
    axes = {"tp": meshes.tp, "ep": meshes.ep}
    for name, style in rules.items():
        if style.axis == "ep" and meshes.ep is None and meshes.tp is not None:
            # Left out, it would leave whole experts on ranks that share a batch, their gradients unsummed.
            raise ConfigError(f"parallel plan: the rule for {name} needs parallel.expert_parallel=true")
        if isinstance(style, ModuleStyle) or axes[style.axis] is None:
            continue
        for parameter_name, parameter in _parameters_of(model, name):
            if not isinstance(parameter, DTensor) or style.axis not in (parameter.device_mesh.mesh_dim_names or ()):
                raise ConfigError(f"parallel plan: the rule for {name} left {parameter_name} whole on every rank")
    if meshes.tp is None and meshes.ep is None:
        return
    if meshes.tp is not None and any(isinstance(s, EmbeddingStyle) and s.splits_sequence for s in rules.values()):
        for name, _ in model.named_parameters():
            if name not in rules and name.rpartition(".")[0] not in rules:
                raise ConfigError(f"parallel plan: no rule for {name}, which sees a part of the sequence")
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for name in (module_name, *(f"{module_name}.{n}" for n, _ in module.named_parameters())):
                if name not in rules:
                    raise ConfigError(f"parallel plan: no rule for {name}: name it in the plan")


def _parameters_of(model: nn.Module, name: str) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameter of this name, or a leaf's own parameters."""
    owner, _, last = name.rpartition(".")
    own = dict(model.get_submodule(owner).named_parameters(recurse=False))
    if last in own:
        return [(name, own[last])]
    return [(f"{name}.{n}", p) for n, p in model.get_submodule(name).named_parameters(recurse=False)]
