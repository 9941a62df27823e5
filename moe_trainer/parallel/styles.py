"""The styles that a plan names: where a parameter lives, and which collectives surround a module.

A style either places parameters and replaces the `forward` of a leaf by one on local weights (`LeafStyle`), or only
places one expert weight (`WeightStyle`), or surrounds a module with collectives (`ModuleStyle`). All tensors in
forward and backward are local; the DTensors say only where parameters live and how their gradients are to be summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moe_trainer.config.choices import Dispatch
from moe_trainer.kernels.experts import Exchange
from moe_trainer.kernels.permute import Routes
from moe_trainer.models.linear import Embedding, Linear
from moe_trainer.models.moe import Experts
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.router import Routing
from moe_trainer.parallel.collectives import all_gather, all_reduce, copy_to_group, gather_replicated, reduce_scatter
from moe_trainer.parallel.dispatch import exchanged_experts, gathered_experts, sort_for_rank
from moe_trainer.parallel.mesh import Meshes
from moe_trainer.parallel.sequence import SequenceShards


class ParallelContext:
    """What the styles of one model share: the groups along the axes and the current split of the sequence."""

    def __init__(self, meshes: Meshes, dispatch: Dispatch = Dispatch.auto) -> None:
        self.dispatch = dispatch
        # Kept, because slicing a mesh anew at each use costs more than the small collectives do.
        axes = {"tp": meshes.tp, "ep": meshes.ep}
        self._groups = {axis: mesh.get_group() for axis, mesh in axes.items() if mesh is not None}
        self.sequence: SequenceShards | None = None
        """The split of the sequence, where the plan splits it."""

    def group(self, axis: str) -> ProcessGroup:
        """The ranks along `tp` or `ep`, where that axis is longer than one rank."""
        return self._groups[axis]

    def gathers_tokens(self, top_k: int) -> bool:
        """Whether tokens meet their experts by all-gather, which `auto` takes where it moves fewer rows: it sends
        `ranks - 1` a token, all-to-all `top_k * (ranks - 1) / ranks`."""
        if self.dispatch is Dispatch.auto:
            return self.group("ep").size() <= top_k
        return self.dispatch is Dispatch.all_gather

    def tokens_of_expert_ranks(self, tokens: int) -> list[int]:
        """Tokens of each rank of `ep`: every data rank has a batch of the same shape, split along `tp` alike."""
        if self.sequence is None:
            return [tokens] * self.group("ep").size()
        sizes = self.sequence.token_sizes
        return [sizes[rank % len(sizes)] for rank in range(self.group("ep").size())]


Transform = Callable[[torch.Tensor, ParallelContext], torch.Tensor]


def local_weight(weight: torch.Tensor | None, grad: Placement | None = None) -> torch.Tensor | None:
    """The rank's part of a weight; its gradient is placed like the weight, or as `grad` says."""
    if isinstance(weight, DTensor):
        return weight.to_local(grad_placements=[grad or weight.placements[0]])
    return weight


@dataclass(frozen=True, slots=True)
class WeightStyle:
    """One expert weight, sharded on a dim along an axis. No communication of its own: the experts' style has it."""

    placement: Placement
    axis: str = "tp"


@dataclass(frozen=True, slots=True)
class ModuleStyle:
    """Collectives around a module: `wrap(module, context)` returns its new forward."""

    wrap: Callable[[Any, ParallelContext], Callable[..., Any]]
    axis: str = "tp"


@dataclass(frozen=True, slots=True)
class LeafStyle:
    """A linear, embedding, norm or router computed on the rank's part of its weight, with `before` and `after` it."""

    weight: Placement
    weight_grad: Placement | None = None
    """Of the local gradient, where it differs from the weight: Partial if the rank saw only some of the tokens."""
    bias: Placement | None = None
    bias_grad: Placement | None = None
    before: Transform | None = None
    after: Transform | None = None
    axis: str = "tp"

    def placements(self, module: Any, ranks: int) -> dict[str, Placement]:
        """Of each parameter of the leaf. B of adapters lies like the weight's rows, A like its columns."""
        placements = {"weight": self.weight, "bias": self.bias or Replicate()}
        placements["lora_a"] = self.weight if self.weight == Shard(1) else Replicate()
        placements["lora_b"] = self.weight if self.weight == Shard(0) else Replicate()
        return {name: placements[name] for name, _ in module.named_parameters(recurse=False)}

    def wrap(self, module: Any, context: ParallelContext) -> Callable[..., Any]:
        """The leaf's forward on local weights."""

        is_adapted = getattr(module, "lora_a", None) is not None

        def compute(x: torch.Tensor, *weights: torch.Tensor, **more: Any) -> Any:
            out = module.compute(x, *weights, **more)
            return out + module.adapt(x, *self._local_adapters(module)) if is_adapted else out

        def forward(x: torch.Tensor, **more: Any) -> Any:
            if self.before is not None:
                x = self.before(x, context)
            weight = local_weight(module.weight, self.weight_grad)
            bias = local_weight(getattr(module, "bias", None), self.bias_grad)
            if bias is None:
                out = compute(x, weight, **more)
                return out if self.after is None else self.after(out, context)
            if isinstance(self.bias, Replicate) and self.after is not None:
                # The outputs are summed over ranks: the bias is added once, after.
                return self.after(compute(x, weight, **more), context) + bias
            out = compute(x, weight, bias, **more)
            return out if self.after is None else self.after(out, context)

        return forward

    def _local_adapters(self, module: Linear) -> list[torch.Tensor]:
        """A and B. The half that is whole meets a part of the weight's rows or columns, or of the tokens where the
        weight does: its gradient is then a part of the sum."""
        is_part = isinstance(self.weight, Shard) or self.weight_grad is not None
        a = None if self.weight == Shard(1) or not is_part else Partial()
        b = None if self.weight == Shard(0) or not is_part else Partial()
        return [local_weight(module.lora_a, a), local_weight(module.lora_b, b)]


@dataclass(frozen=True, slots=True)
class EmbeddingStyle:
    """Rows of the vocabulary on each rank: ids of other ranks give zero, and `after` sums."""

    after: Transform
    splits_sequence: bool = False
    """Whether `after` leaves each rank its own positions: the whole plan then is one of sequence parallelism."""
    axis: str = "tp"

    def placements(self, module: Embedding, ranks: int) -> dict[str, Placement]:
        """Of the embedding's weight."""
        return {"weight": Shard(0)}

    def wrap(self, module: Embedding, context: ParallelContext) -> Callable[[torch.Tensor], torch.Tensor]:
        """The embedding's forward on local rows."""
        if self.splits_sequence:
            context.sequence = SequenceShards(context.group("tp"))

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            weight = local_weight(module.weight)
            if self.splits_sequence:
                context.sequence.batch, context.sequence.seq = input_ids.shape
            local = input_ids - context.group("tp").rank() * len(weight)
            elsewhere = (local < 0) | (local >= len(weight))
            x = module.compute(local.masked_fill(elsewhere, 0), weight)
            return self.after(x.masked_fill(elsewhere.unsqueeze(-1), 0), context)

        return forward


@dataclass(frozen=True, slots=True)
class KeyValueStyle:
    """Key or value heads: split like any features or, where there are fewer heads than ranks, each rank computes the
    one head that its query heads need from a whole weight, whose gradient is then a part of the sum."""

    axis: str = "tp"

    def placements(self, module: Linear, ranks: int) -> dict[str, Placement]:
        """Of weight and bias."""
        if module.heads % ranks == 0:
            return LeafStyle(Shard(0), bias=Shard(0)).placements(module, ranks)
        return {name: Replicate() for name, _ in module.named_parameters(recurse=False)}

    def wrap(self, module: Linear, context: ParallelContext) -> Callable[[torch.Tensor], torch.Tensor]:
        """The projection's forward on this rank's heads."""
        group = context.group("tp")
        if module.heads % group.size() == 0:
            return LeafStyle(Shard(0), bias=Shard(0)).wrap(module, context)
        head = group.rank() * module.heads // group.size()

        def of_head(weight: torch.Tensor | None) -> torch.Tensor | None:
            whole = local_weight(weight, Partial())
            return None if whole is None else whole.unflatten(0, (module.heads, -1))[head]

        def forward(x: torch.Tensor) -> torch.Tensor:
            out = module.compute(x, of_head(module.weight), of_head(module.bias))
            if module.lora_a is None:
                return out
            return out + module.adapt(x, local_weight(module.lora_a, Partial()), of_head(module.lora_b))

        return forward


@dataclass(frozen=True, slots=True)
class SplitNormStyle:
    """A norm over features that are split between ranks: the sum of squares is summed over them, and so is its
    gradient, since every rank's output depends on it."""

    axis: str = "tp"

    def placements(self, module: RMSNorm, ranks: int) -> dict[str, Placement]:
        """Of the norm's weight."""
        return {"weight": Shard(0)}

    def wrap(self, module: RMSNorm, context: ParallelContext) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm's forward on this rank's features."""
        group = context.group("tp")

        def forward(x: torch.Tensor) -> torch.Tensor:
            total = all_reduce(module.square(x).sum(-1, keepdim=True), group)
            mean_square = copy_to_group(total, group) / (x.shape[-1] * group.size())
            return module.scale(x, mean_square, local_weight(module.weight))

        return forward


def _copy(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    return copy_to_group(x, context.group("tp"))


def _sum(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    return all_reduce(x, context.group("tp"))


def _gather_sequence(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    return context.sequence.gather(x)


def _scatter_sequence(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    return context.sequence.scatter(x)


def _gather_features(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    group = context.group("tp")
    return gather_replicated(x, x.ndim - 1, [x.shape[-1]] * group.size(), group)


def _on_input(before: Transform) -> ModuleStyle:
    def wrap(module: nn.Module, context: ParallelContext) -> Callable[..., Any]:
        forward = module.forward
        return lambda x, *args: forward(before(x, context), *args)

    return ModuleStyle(wrap)


def _expert_weights(module: Experts) -> dict[str, torch.Tensor]:
    return {name: local_weight(weight) for name, weight in module.weights().items()}


def _split_expert_weights(module: Experts, group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Weights of experts that are split inside. What every rank has whole has a partial gradient; a bias after
    `down_proj` is added on the first rank only, because the outputs are summed."""
    weights = _expert_weights(module)
    for name in ("gate_up_lora_a", "down_lora_b"):
        if name in weights:
            weights[name] = local_weight(getattr(module, name), Partial())
    if "down_bias" in weights:
        whole = local_weight(module.down_bias, Partial())
        weights["down_bias"] = whole if group.rank() == 0 else whole * 0
    return weights


def _moe_tp_experts(module: Experts, context: ParallelContext) -> Callable[..., torch.Tensor]:
    """Every rank has a slice of `intermediate` of every expert: its output, and its gradients of input and weights of
    the combination, are parts of sums."""
    group = context.group("tp")

    def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        x, top_k_weights = copy_to_group(x, group), copy_to_group(top_k_weights, group)
        weights = _split_expert_weights(module, group)
        return all_reduce(module.compute(x, top_k_index, top_k_weights, weights), group)

    return forward


def _moe_tp_experts_gather(module: Experts, context: ParallelContext) -> Callable[..., torch.Tensor]:
    """The same between an all-gather of the ranks' tokens and a reduce-scatter of the outputs."""
    group = context.group("tp")

    def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        sizes = context.sequence.token_sizes
        x, top_k_index, top_k_weights = (all_gather(t, 0, sizes, group) for t in (x, top_k_index, top_k_weights))
        out = module.compute(x, top_k_index, top_k_weights, _split_expert_weights(module, group))
        return reduce_scatter(out, 0, sizes, group)

    return forward


def _ep_router(module: nn.Module, context: ParallelContext) -> Callable[..., Routing]:
    """Each rank uses the weights of its own experts only, so their gradient is summed over `ep` on its way to the
    router, which is then whole and equal on every rank."""
    group, forward = context.group("ep"), module.forward

    def routed(x: torch.Tensor) -> Routing:
        routing = forward(x)
        # Cloned because FSDP's hooks on what a module returns do not go with views.
        return routing._replace(top_k_weights=copy_to_group(routing.top_k_weights, group).clone())

    return routed


def _moe_experts_allreduce(module: Experts, context: ParallelContext) -> Callable[..., torch.Tensor]:
    """Every rank sees all tokens, computes the routes to its own experts, and one all-reduce sums the outputs."""
    group = context.group("ep")

    def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        routes = sort_for_rank(top_k_index, module.num_experts, group)
        num_rows = routes.count_rows()
        weights, x = _expert_weights(module), copy_to_group(x, group)
        return all_reduce(module.compute_routes(x, routes.trimmed(num_rows), top_k_weights, weights), group)

    return forward


def _moe_dispatch(module: Experts, context: ParallelContext) -> Callable[..., torch.Tensor]:
    """Each rank's own tokens to their experts and back, by the dispatch that moves less."""
    group = context.group("ep")

    def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if context.gathers_tokens(top_k_index.shape[1]):

            def compute_all(
                x: torch.Tensor, routes: Routes, weights: torch.Tensor, exchange: Exchange
            ) -> torch.Tensor:
                return module.compute_routes(x, routes, weights, _expert_weights(module), exchange)

            sizes = context.tokens_of_expert_ranks(len(x))
            return gathered_experts(compute_all, x, top_k_index, top_k_weights, module.num_experts, sizes, group)
        compute = partial(module.compute, weights=_expert_weights(module))
        return exchanged_experts(compute, x, top_k_index, top_k_weights, module.num_experts, group)

    return forward


LeafPlacement = LeafStyle | EmbeddingStyle | KeyValueStyle | SplitNormStyle
Style = LeafPlacement | WeightStyle | ModuleStyle

_SEEN_IN_PART = LeafStyle(Replicate(), weight_grad=Partial(), bias=Replicate(), bias_grad=Partial())

STYLES: dict[str, Style] = {
    # Linear: out_features split. Input whole, output this rank's features; the module around sums the input's grad.
    "colwise": LeafStyle(Shard(0), bias=Shard(0)),
    # The same, then all-gather of the features; backward takes the rank's slice.
    "colwise_all_gather": LeafStyle(Shard(0), bias=Shard(0), before=_copy, after=_gather_features),
    # Linear: in_features split, partial outputs. Forward all-reduce; backward nothing.
    "rowwise": LeafStyle(Shard(1), bias=Replicate(), after=_sum),
    # Forward reduce-scatter along the sequence; backward all-gather. The bias sees only this rank's positions.
    "rowwise_reduce_scatter": LeafStyle(Shard(1), bias=Replicate(), bias_grad=Partial(), after=_scatter_sequence),
    # Embedding: vocabulary split. Forward all-reduce of the looked-up rows; backward nothing.
    "vocab_parallel": EmbeddingStyle(_sum),
    # Forward reduce-scatter along the sequence; backward all-gather.
    "vocab_parallel_reduce_scatter": EmbeddingStyle(_scatter_sequence, splits_sequence=True),
    # Head: vocabulary split, logits stay split for the loss. Backward all-reduce of the input.
    "vocab_parallel_head": LeafStyle(Shard(0), bias=Shard(0), before=_copy),
    # Forward all-gather along the sequence; backward reduce-scatter.
    "vocab_parallel_head_gather": LeafStyle(Shard(0), bias=Shard(0), before=_gather_sequence),
    # Key or value heads, which may be fewer than ranks.
    "colwise_kv_heads": KeyValueStyle(),
    # Norm over split features. Forward all-reduce of the sums of squares; backward all-reduce of their gradients.
    "split_norm": SplitNormStyle(),
    # Norm on this rank's positions: weight whole, its gradient a part of the sum over `tp`.
    "sequence_parallel": _SEEN_IN_PART,
    # Any leaf with a whole weight that saw part of the tokens or heads: router under SP, norms of q and k.
    "replicated_weight": _SEEN_IN_PART,
    # Module: identity; backward is the one all-reduce for everything inside (q, k and v).
    "replicate_input": _on_input(_copy),
    # Module: all-gather along the sequence; backward reduce-scatter.
    "gather_input": _on_input(_gather_sequence),
    # gate_up_proj [experts, 2, intermediate, hidden] and down_proj [experts, hidden, intermediate]: split inside.
    "moe_tp_gate_up_colwise": WeightStyle(Shard(2)),
    "moe_tp_down_rowwise": WeightStyle(Shard(2)),
    # down_bias [experts, hidden]: whole, added on the first rank.
    "moe_tp_down_bias": WeightStyle(Replicate()),
    # The half of an adapter that is whole where the experts are split inside; its gradient is a part of a sum.
    "moe_tp_adapter": WeightStyle(Replicate()),
    # Expert weights: whole experts on each rank of `ep`.
    "grouped_gemm": WeightStyle(Shard(0), axis="ep"),
    # Experts split inside. Forward all-reduce of the output; backward all-reduce of input and top_k_weights.
    "moe_tp_experts": ModuleStyle(_moe_tp_experts),
    # Forward all-gather of the tokens, reduce-scatter of the output; backward the reverse.
    "moe_tp_experts_gather": ModuleStyle(_moe_tp_experts_gather),
    # Router of whole experts on shared tokens. Forward nothing; backward all-reduce of top_k_weights.
    "ep_router": ModuleStyle(_ep_router, axis="ep"),
    # Whole experts on shared tokens. Forward all-reduce of the output; backward all-reduce of the input.
    "moe_experts_allreduce": ModuleStyle(_moe_experts_allreduce, axis="ep"),
    # Whole experts on each rank's own tokens. Forward two all-to-alls, or all-gather and reduce-scatter; so backward
    "moe_dispatch": ModuleStyle(_moe_dispatch, axis="ep"),
}
