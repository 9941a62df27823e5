"""Activation checkpointing changes nothing but memory: gradients equal those without it bit for bit, on any mesh."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.utils._python_dispatch import TorchDispatchMode

from moe_trainer.config.choices import Dispatch, Family, Recompute
from moe_trainer.config.schema import Config, ModelConfig
from moe_trainer.kernels.keepable import keepable
from moe_trainer.models.router import Router
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import recompute as module
from moe_trainer.train.recompute import recompute_layers
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import MODEL, Case, Outcome, batches, describe, mesh, plain_model, train_all
from tests.distributed.runs import run_config
from tests.distributed.test_families import MODELS

KINDS = (Recompute.full, Recompute.selective)


def same_bits(a: Outcome, b: Outcome) -> list[str]:
    """What differs."""
    wrong = [name for name in ("loss", "aux_loss", "z_loss", "grad_norm") if getattr(a, name) != getattr(b, name)]
    wrong += [f"gradient of {name}" for name in a.gradients if not torch.equal(a.gradients[name], b.gradients[name])]
    return wrong + [name for name in a.weights if not torch.equal(a.weights[name], b.weights[name])]


def check_bits(cases: list[Case], world: int) -> None:
    """Each case with either kind of recomputation against the same case without."""
    kinds = (Recompute.none, *KINDS)
    outcomes = run_distributed(train_all, world, [replace(c, recompute=kind) for c in cases for kind in kinds])[0]
    wrong = {}
    for number, case in enumerate(cases):
        expected, *others = outcomes[number * len(kinds) : (number + 1) * len(kinds)]
        for kind, outcome in zip(KINDS, others, strict=True):
            if differing := same_bits(outcome, expected):
                wrong[f"{describe(case.parallel)} {case.model.family.value} {kind.value}"] = differing
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.grid)])
def test_every_plan_on_two_ranks(dtype: torch.dtype) -> None:
    meshes = [
        mesh("tp", tp=2),
        mesh("sp", tp=2),
        mesh("tp_ep", tp=2),
        mesh("sp_ep", tp=2),
        mesh("sp_ep", fsdp=2, ep=2),
    ]
    check_bits([Case.accumulating(parallel, dtype, MODEL, steps=2) for parallel in meshes], 2)


def test_fsdp_and_experts_on_four_ranks() -> None:
    folded, hidden = mesh("sp_ep", fsdp=2, tp=2, ep=4), mesh("sp_ep", fsdp=4)
    exchanged = replace(mesh("sp_ep", fsdp=2, tp=2), dispatch=Dispatch.all_to_all)
    few = replace(MODEL, num_experts=2, top_k=1)
    cases = [(folded, MODEL), (exchanged, MODEL), (hidden, few), (mesh("sp", dp_replicate=2, tp=2), MODEL)]
    check_bits([Case.accumulating(parallel, torch.float32, model, steps=2) for parallel, model in cases], 4)


@pytest.mark.parametrize("family", [Family.deepseek_v3, pytest.param(Family.gpt_oss, marks=pytest.mark.grid)])
def test_other_families(family: Family) -> None:
    check_bits([Case.accumulating(mesh("sp_ep", tp=2), torch.float32, MODELS[family.value], steps=2)], 2)


class Count(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[op.name()] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "attention", "products"),
    [(Recompute.none, 1, 6), (Recompute.selective, 1, 7), (Recompute.full, 2, 8)],
)
def test_what_is_computed_again(kind: Recompute, attention: int, products: int) -> None:
    """A layer multiplies twice in the forward pass and four times in the backward pass."""
    case = Case(mesh("tp"), torch.float32, replace(MODEL, num_kv_heads=MODEL.num_heads))
    model = plain_model(case)
    recompute_layers(model, kind)
    ids, labels = batches(case.model, case.seq)[0]
    with Count() as count:
        loss, _ = case.loss_fn()(model(ids), labels, 1)
        loss.backward()
    layers = case.model.num_layers
    assert count.ran["aten::_scaled_dot_product_flash_attention_for_cpu"] == attention * layers
    assert count.ran["aten::_grouped_mm"] == products * layers
    assert count.ran["aten::topk"] == layers


def test_an_operator_is_kept_where_it_is_keepable_and_computed_again_elsewhere() -> None:
    a, b = torch.randn(2, 3, 3), torch.randn(2, 3, 3)

    def layer() -> torch.Tensor:
        with keepable():
            first = a[0] @ b[0]
            torch.bmm(a, b)  # is not named
        a[1] @ b[1]
        return first

    keep, give = module._contexts({"aten::mm"})
    with keep:
        first = layer()
    with Count() as count, give:
        again = layer()
    assert again.equal(first) and (count.ran["aten::mm"], count.ran["aten::bmm"]) == (1, 1)
    with Count() as count:
        layer()
    assert count.ran["aten::mm"] == 2  # outside both nothing is given


def shaky(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A router on a device that never computes the same twice."""
    return lambda self, x, *weights: compute(self, x + 0.5 * torch.randn_like(x), *weights)


def choices(kind: Recompute, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The experts chosen by each call of a router, in the forward pass and then in its repetitions."""
    chosen: list[torch.Tensor] = []
    choose = Router.choose

    def record(self: Router, logits: torch.Tensor) -> Any:
        routing = choose(self, logits)
        chosen.append(routing.top_k_index.clone())
        return routing

    with monkeypatch.context() as patch:
        patch.setattr(Router, "choose", record)
        patch.setattr(Router, "compute", shaky(Router.compute))
        case = Case(mesh("tp"), torch.float32)
        model = plain_model(case)
        for name, parameter in model.named_parameters():
            if name.endswith(".gate.weight"):
                nn.init.normal_(parameter, std=1e-3)  # near ties everywhere
        recompute_layers(model, kind)
        ids, labels = batches(case.model, case.seq)[0]
        case.loss_fn()(model(ids), labels, 1)[0].backward()
    return chosen


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_kept_even_where_computing_again_gives_another(
    kind: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *again = choices(kind, monkeypatch)
    assert len(again) == 2 and torch.equal(again[1], first) and torch.equal(again[0], second)
    monkeypatch.setattr(module, "_CHOICES", frozenset())  # without it the same test fails
    first, second, *again = choices(kind, monkeypatch)
    assert not torch.equal(again[1], first) and not torch.equal(again[0], second)


def fsdp_after_a_step(cfg: Config) -> tuple[str, bool]:
    """What FSDP takes for the root of a forward pass under way, where, as before PyTorch 2.13, the end of a backward
    pass leaves it; and whether it knows a state twice, as there of each group of several modules."""
    real = FSDPState._root_post_backward_final_callback

    def end(state: FSDPState) -> None:
        context = state._state_ctx
        root = context.iter_forward_root
        real(state)
        context.iter_forward_root = root
        context.all_states.extend(list(context.all_states))

    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPState, "_root_post_backward_final_callback", end)
        trainer.train_step(trainer.loader.batch(0))
    context = trainer.model._get_fsdp_state()._state_ctx
    return repr(context.iter_forward_root), len(set(context.all_states)) < len(context.all_states)


def test_the_next_forward_pass_waits_for_the_optimizer(tmp_path: Path) -> None:
    """On a GPU, FSDP gathers on streams of its own, which only the root of a pass lets wait."""
    model = ModelConfig(hidden_size=32, intermediate_size=32, num_layers=2, head_dim=8, num_experts=4)
    cfgs = [run_config(tmp_path, kind.value, "fsdp2", 1, recompute=kind, model=model) for kind in KINDS]
    assert [run_distributed(fsdp_after_a_step, 2, cfg)[0] for cfg in cfgs] == [("None", False)] * 2
