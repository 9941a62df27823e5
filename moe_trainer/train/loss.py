"""The training loss, as this rank's share of the loss of the whole global batch."""

from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from moe_trainer.config.choices import AuxScope
from moe_trainer.kernels.permute import tokens_per_expert
from moe_trainer.models.decoder import ModelOutput
from moe_trainer.models.router import Routing
from moe_trainer.parallel.collectives import all_reduce
from moe_trainer.parallel.cross_entropy import IGNORED_LABEL, cross_entropy_sum
from moe_trainer.parallel.sequence import SequenceShards


class Losses(NamedTuple):
    """Shares of one micro-batch; summed over micro-batches and data ranks they are those of the global batch."""

    loss: torch.Tensor
    """Cross entropy alone."""
    aux_loss: torch.Tensor
    """Load-balancing loss before its coefficient; zero where that is zero."""
    z_loss: torch.Tensor
    """Router z-loss before its coefficient; zero where that is zero."""
    expert_counts: torch.Tensor
    """[sparse layers, num_experts], float: tokens sent to each expert by this data rank, padding left out."""

    @classmethod
    def zeros(cls, num_sparse_layers: int, num_experts: int, device: torch.device) -> "Losses":
        """Nothing yet."""
        zero = torch.zeros((), device=device)
        return cls(zero, zero, zero, torch.zeros(num_sparse_layers, num_experts, device=device))

    def add(self, other: "Losses") -> "Losses":
        """Part by part."""
        return Losses(*(a + b for a, b in zip(self, other, strict=True)))

    def flatten(self) -> torch.Tensor:
        """All parts in one float64 vector, for one collective or one copy."""
        return torch.cat([part.double().flatten() for part in self])

    def unflatten(self, flat: torch.Tensor) -> "Losses":
        """The parts, shaped as these, of a vector that `flatten` made."""
        parts = flat.split([part.numel() for part in self])
        return Losses(*(part.view_as(like) for part, like in zip(parts, self, strict=True)))


class LossFn:
    """Cross entropy, plus `aux_coef` times the load-balancing loss, plus `z_coef` times the router z-loss."""

    def __init__(
        self,
        num_experts: int,
        aux_coef: float,
        vocab_group: ProcessGroup | None = None,
        sequence: SequenceShards | None = None,
        *,
        z_coef: float = 0.0,
        aux_scope: AuxScope = AuxScope.micro_batch,
    ) -> None:
        """`vocab_group`: ranks that split the logits; `sequence`: the split of the tokens under SP, else None."""
        self.num_experts = num_experts
        self.aux_coef = aux_coef
        self.z_coef = z_coef
        self.aux_scope = aux_scope
        self.vocab_group = vocab_group
        self.sequence = sequence

    def __call__(self, output: ModelOutput, labels: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, Losses]:
        """The loss to differentiate, and its parts, detached.

        Args:
            labels: [batch, seq], -100 where none; the whole sequence on every rank.
            num_tokens: labels that count in the whole global batch.
        """
        num_tokens = max(num_tokens, 1)  # a batch without labels has no loss, and no gradient
        loss = cross_entropy_sum(output.logits, labels, self.vocab_group) / num_tokens
        valid = labels != IGNORED_LABEL
        counts, probabilities, squares = self._router_sums(output.routings, valid)
        aux_loss = z_loss = torch.zeros_like(loss)
        if self.aux_coef:
            top_k = output.routings[0].top_k_index.shape[1]
            aux_loss = self._balance(counts, probabilities, valid.sum(1), top_k) / num_tokens
        if self.z_coef:
            z_loss = squares / (len(output.routings) * num_tokens)
        total = loss + self.aux_coef * aux_loss + self.z_coef * z_loss
        parts = Losses(loss, aux_loss, z_loss, counts.sum(1))
        return total, Losses(*(part.detach() for part in parts))

    def _router_sums(
        self, routings: tuple[Routing, ...], valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums over the valid tokens of each sequence, under SP over all of its ranks; what no loss needs is zero.

        Returns:
            Tokens that chose each expert and its summed probability, both [layers, batch, num_experts]; and, over all
            layers and tokens, the squared logarithm of the router's normalizer.
        """
        mask = valid if self.sequence is None else self.sequence.local(valid)  # [batch, seq] of what was routed here
        counts = torch.stack([self._counts(routing, mask) for routing in routings])
        zero = counts.new_zeros(())
        probabilities = zero.expand_as(counts)
        squares = zero
        if self.aux_coef:
            probabilities = torch.stack([_sum_by_sequence(routing.probabilities, mask) for routing in routings])
        if self.z_coef:
            squares = torch.stack([(r.logits.logsumexp(-1).square() * mask.flatten()).sum() for r in routings]).sum()
        if self.sequence is not None:
            local = torch.cat([counts.flatten(), probabilities.flatten(), squares.view(1)])
            sums, squares = all_reduce(local, self.sequence.group).split([2 * counts.numel(), 1])
            counts, probabilities = sums.view(2, *counts.shape)
        return counts, probabilities, squares.view(())

    def _counts(self, routing: Routing, mask: torch.Tensor) -> torch.Tensor:
        """[batch, num_experts] in the router's type."""
        batch = len(mask)
        sequence = torch.arange(batch, device=mask.device).unsqueeze(1).expand_as(mask)  # [batch, seq]
        slots = routing.top_k_index + self.num_experts * sequence.flatten().unsqueeze(1)
        slots = slots.masked_fill(~mask.flatten().unsqueeze(1), batch * self.num_experts)
        counts = tokens_per_expert(slots, batch * self.num_experts)
        return counts.view(batch, self.num_experts).to(routing.logits.dtype)

    def _balance(
        self, counts: torch.Tensor, probabilities: torch.Tensor, lengths: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        """`num_experts * sum_e f_e P_e` times the tokens: f_e the share that chose e, P_e its mean probability.

        `micro_batch`: both over the layers and tokens of the micro-batch (Switch Transformer, Fedus et al., 2021).
        `sequence`: of each sequence and layer alone, f_e over `top_k` (DeepSeek-V3, 2024, eq. 17-20), the mean of the
        layers. Counts and probabilities are [layers, batch, num_experts], lengths [batch] valid tokens.
        """
        if self.aux_scope is AuxScope.micro_batch:
            tokens = lengths.sum()
            rows = (tokens * len(counts)).clamp(min=1)
            products = counts.sum((0, 1)) / rows * (probabilities.sum((0, 1)) / rows)
            return self.num_experts * products.sum() * tokens
        products = counts / top_k * probabilities / lengths.clamp(min=1).unsqueeze(1)  # f P times the length
        return self.num_experts * products.sum() / len(counts)


def _sum_by_sequence(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[batch * seq, width] -> [batch, width], over the positions of the mask [batch, seq]."""
    return (rows.view(*mask.shape, rows.shape[1]) * mask.unsqueeze(-1)).sum(1)
