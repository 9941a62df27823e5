"""Each style alone, forward and backward, against the plain module; four positions over three ranks: 2, 2, none."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.experts import Clamp
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.linear import Embedding, Linear
from moe_trainer.models.lora import adapt
from moe_trainer.models.moe import ClampedExperts, Experts, SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.plans import Plan
from moe_trainer.models.router import BiasedRouter, Router
from moe_trainer.parallel.apply import apply_plan
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.sequence import SequenceShards
from moe_trainer.parallel.shards import local_box
from moe_trainer.parallel.styles import STYLES, ParallelContext
from moe_trainer.testing.pool import run_distributed

WORLD, BATCH, SEQ, WIDTH, VOCAB = 3, 2, 4, 6, 9
PARALLEL = ParallelConfig(fsdp=1, tp=WORLD, ep=WORLD, sequence_parallel=True, expert_parallel=True)


class Twice(nn.Module):
    """A module with something inside that each rank has a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@dataclass(frozen=True)
class Example:
    """A module, its plan, and how each rank's input, output and input gradient lie in those of one process.

    `whole`: the same on every rank; `sequence`, `features`: the rank's part; `sum`: the ranks' parts add up.
    """

    build: Callable[[], nn.Module]
    plan: Plan
    input: str
    output: str
    input_grad: str


def linear() -> nn.Module:
    return nn.ModuleDict({"leaf": Linear(WIDTH, WIDTH, bias=True)})


def embedding() -> nn.Module:
    return nn.ModuleDict({"leaf": Embedding(VOCAB, WIDTH)})


def norm() -> nn.Module:
    return nn.ModuleDict({"leaf": RMSNorm(WIDTH, 1e-5)})


def plain_linear() -> nn.Module:
    return nn.ModuleDict({"leaf": Linear(WIDTH, WIDTH)})


def around() -> nn.Module:
    return nn.ModuleDict({"leaf": Twice()})


def block() -> nn.Module:
    return nn.ModuleDict({"leaf": SparseMoeBlock(Router(WIDTH, 6, 2), Experts(WIDTH, 6, 6))})


def biased_block() -> nn.Module:
    experts = ClampedExperts(WIDTH, 6, 6, Clamp(alpha=1.7, limit=2.0))
    return nn.ModuleDict({"leaf": SparseMoeBlock(BiasedRouter(WIDTH, 6, 2), experts)})


def adapted(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same with adapters on every linear layer and on the experts."""

    def build_adapted() -> nn.Module:
        module = build()
        for inner in module.modules():
            if isinstance(inner, Linear | Experts):
                adapt(inner, rank=2, scale=0.5)
        return module

    return build_adapted


def key_heads() -> nn.Module:
    return nn.ModuleDict({"leaf": Linear(WIDTH, WIDTH, bias=True, heads=3)})


class SharedKeyHead(nn.Module):
    """Three query heads of two features share one key head: on each rank one query head meets the same key head."""

    def __init__(self) -> None:
        super().__init__()
        self.query = Linear(WIDTH, WIDTH)
        self.key = Linear(WIDTH, 2, bias=True, heads=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x)
        return query * self.key(x).repeat(1, 1, query.shape[-1] // 2)


def shared_key_head() -> nn.Module:
    return nn.ModuleDict({"leaf": SharedKeyHead()})


INSIDE = {
    "leaf.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "leaf.experts.down_proj": "moe_tp_down_rowwise",
}
INSIDE_BIASES = {
    "leaf.experts.gate_up_bias": "moe_tp_gate_up_colwise",
    "leaf.experts.down_bias": "moe_tp_down_bias",
}
WHOLE_BIASES = {"leaf.experts.gate_up_bias": "grouped_gemm", "leaf.experts.down_bias": "grouped_gemm"}
WHOLE = {"leaf.experts.gate_up_proj": "grouped_gemm", "leaf.experts.down_proj": "grouped_gemm"}

INSIDE_ADAPTERS = {
    "leaf.experts.gate_up_lora_a": "moe_tp_adapter",
    "leaf.experts.gate_up_lora_b": "moe_tp_gate_up_colwise",
    "leaf.experts.down_lora_a": "moe_tp_down_rowwise",
    "leaf.experts.down_lora_b": "moe_tp_adapter",
}

EXAMPLES = {
    "colwise": Example(linear, {"leaf": "colwise"}, "whole", "features", "sum"),
    "colwise_all_gather": Example(linear, {"leaf": "colwise_all_gather"}, "whole", "whole", "whole"),
    "rowwise": Example(linear, {"leaf": "rowwise"}, "features", "whole", "features"),
    "rowwise_reduce_scatter": Example(linear, {"leaf": "rowwise_reduce_scatter"}, "features", "sequence", "features"),
    "rowwise_without_bias": Example(plain_linear, {"leaf": "rowwise"}, "features", "whole", "features"),
    "vocab_parallel": Example(embedding, {"leaf": "vocab_parallel"}, "whole", "whole", "none"),
    "vocab_parallel_reduce_scatter": Example(
        embedding, {"leaf": "vocab_parallel_reduce_scatter"}, "whole", "sequence", "none"
    ),
    "vocab_parallel_head": Example(linear, {"leaf": "vocab_parallel_head"}, "whole", "features", "whole"),
    "vocab_parallel_head_gather": Example(
        linear, {"leaf": "vocab_parallel_head_gather"}, "sequence", "features", "sequence"
    ),
    "colwise_kv_heads": Example(key_heads, {"leaf": "colwise_kv_heads"}, "whole", "features", "sum"),
    "colwise_fewer_kv_heads": Example(
        shared_key_head,
        {"leaf": "replicate_input", "leaf.query": "colwise", "leaf.key": "colwise_kv_heads"},
        *("whole", "features", "whole"),
    ),
    "split_norm": Example(norm, {"leaf": "split_norm"}, "features", "features", "features"),
    "replicated_bias": Example(linear, {"leaf": "replicated_weight"}, "sequence", "sequence", "sequence"),
    "sequence_parallel": Example(norm, {"leaf": "sequence_parallel"}, "sequence", "sequence", "sequence"),
    "replicated_weight": Example(plain_linear, {"leaf": "replicated_weight"}, "sequence", "sequence", "sequence"),
    "replicate_input": Example(
        around, {"leaf": "replicate_input", "leaf.inner": "colwise"}, "whole", "features", "whole"
    ),
    "gather_input": Example(
        around, {"leaf": "gather_input", "leaf.inner": "colwise"}, "sequence", "features", "sequence"
    ),
    "experts_tp": Example(block, INSIDE | {"leaf.experts": "moe_tp_experts"}, "whole", "whole", "whole"),
    "experts_sp": Example(
        block,
        INSIDE | {"leaf.gate": "replicated_weight", "leaf.experts": "moe_tp_experts_gather"},
        *("sequence", "sequence", "sequence"),
    ),
    "biased_experts_tp": Example(
        biased_block, INSIDE | INSIDE_BIASES | {"leaf.experts": "moe_tp_experts"}, "whole", "whole", "whole"
    ),
    "biased_experts_sp": Example(
        biased_block,
        INSIDE | INSIDE_BIASES | {"leaf.gate": "replicated_weight", "leaf.experts": "moe_tp_experts_gather"},
        *("sequence", "sequence", "sequence"),
    ),
    "biased_experts_tp_ep": Example(
        biased_block,
        WHOLE | WHOLE_BIASES | {"leaf.gate": "ep_router", "leaf.experts": "moe_experts_allreduce"},
        *("whole", "whole", "whole"),
    ),
    "biased_experts_sp_ep": Example(
        biased_block,
        WHOLE | WHOLE_BIASES | {"leaf.gate": "replicated_weight", "leaf.experts": "moe_dispatch"},
        *("sequence", "sequence", "sequence"),
    ),
    "experts_tp_ep": Example(
        block,
        WHOLE | {"leaf.gate": "ep_router", "leaf.experts": "moe_experts_allreduce"},
        *("whole", "whole", "whole"),
    ),
    "experts_sp_ep": Example(
        block,
        WHOLE | {"leaf.gate": "replicated_weight", "leaf.experts": "moe_dispatch"},
        *("sequence", "sequence", "sequence"),
    ),
}


EXAMPLES |= {
    "adapted_colwise": replace(EXAMPLES["colwise"], build=adapted(linear)),
    "adapted_rowwise": replace(EXAMPLES["rowwise"], build=adapted(linear)),
    "adapted_rowwise_reduce_scatter": replace(EXAMPLES["rowwise_reduce_scatter"], build=adapted(linear)),
    "adapted_replicated_weight": replace(EXAMPLES["replicated_weight"], build=adapted(plain_linear)),
    "adapted_kv_heads": replace(EXAMPLES["colwise_kv_heads"], build=adapted(key_heads)),
    "adapted_fewer_kv_heads": replace(EXAMPLES["colwise_fewer_kv_heads"], build=adapted(shared_key_head)),
    "adapted_experts_tp": Example(
        adapted(biased_block),
        INSIDE | INSIDE_BIASES | INSIDE_ADAPTERS | {"leaf.experts": "moe_tp_experts"},
        *("whole", "whole", "whole"),
    ),
    "adapted_experts_sp": Example(
        adapted(block),
        INSIDE | INSIDE_ADAPTERS | {"leaf.gate": "replicated_weight", "leaf.experts": "moe_tp_experts_gather"},
        *("sequence", "sequence", "sequence"),
    ),
}


def part(x: torch.Tensor, layout: str, context: ParallelContext) -> torch.Tensor:
    if layout == "sequence":
        return context.sequence.local(x)
    return x.chunk(WORLD, -1)[dist.get_rank()] if layout == "features" else x


def output_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = module["leaf"](x)
    return output[0] if isinstance(output, tuple) else output


def check_style(name: str) -> None:
    example = EXAMPLES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    plain = example.build().double()
    for parameter in plain.parameters():
        parameter.data = random(*parameter.shape)
    with torch.device("meta"):
        module = example.build().double()
    context = apply_plan(module, example.plan, build_meshes(PARALLEL, "cpu"))
    module.to_empty(device="cpu")
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        local_part(ours).copy_(theirs.detach()[local_box(ours)])

    is_embedding = example.input_grad == "none"
    if is_embedding:
        x = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    else:
        x = random(BATCH, SEQ, WIDTH).requires_grad_()
    weight = random(BATCH, SEQ, WIDTH)
    expected = output_of(plain, x)
    (expected * weight).sum().backward()

    if context.sequence is None:  # in a whole model the embedding brings it
        context.sequence = SequenceShards(context.group("tp"))
    context.sequence.batch, context.sequence.seq = (0, 0) if is_embedding else (BATCH, SEQ)
    mine = part(x.detach(), example.input, context).clone().requires_grad_(not is_embedding)
    output = output_of(module, mine)
    torch.testing.assert_close(output, part(expected, example.output, context), rtol=1e-12, atol=1e-12)
    (output * part(weight, example.output, context)).sum().backward()

    if not is_embedding:
        gradient = mine.grad
        if example.input_grad == "sum":
            dist.all_reduce(gradient)
        expected_gradient = part(x.grad, example.input_grad, context)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    sharded = 0
    for (parameter_name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        gradient = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(
            gradient, theirs.grad, rtol=1e-12, atol=1e-12, msg=lambda text, n=parameter_name: f"{n}: {text}"
        )
        sharded += isinstance(ours, DTensor)
    assert sharded, "the plan left every parameter plain"


@pytest.mark.parametrize("name", EXAMPLES)
def test_style(name: str) -> None:
    run_distributed(check_style, WORLD, name)


def test_every_style_has_an_example() -> None:
    assert {style for example in EXAMPLES.values() for style in example.plan.values()} == set(STYLES)
