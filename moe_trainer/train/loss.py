"""The training loss, as this rank's share of the loss of the whole global batch."""

from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

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
    """Load-balancing loss before its coefficient."""
    expert_counts: torch.Tensor
    """[sparse layers, num_experts], float: tokens sent to each expert by this data rank, padding left out."""

    @classmethod
    def zeros(cls, num_sparse_layers: int, num_experts: int, device: torch.device) -> "Losses":
        """Nothing yet."""
        zero = torch.zeros((), device=device)
        return cls(zero, zero, torch.zeros(num_sparse_layers, num_experts, device=device))

    def add(self, other: "Losses") -> "Losses":
        """Part by part."""
        return Losses(*(a + b for a, b in zip(self, other, strict=True)))


class LossFn:
    """Cross entropy plus `aux_coef` times the load-balancing loss."""

    def __init__(
        self,
        num_experts: int,
        aux_coef: float,
        vocab_group: ProcessGroup | None = None,
        sequence: SequenceShards | None = None,
    ) -> None:
        """`vocab_group`: ranks that split the logits; `sequence`: the split of the tokens under SP, else None."""
        self.num_experts = num_experts
        self.aux_coef = aux_coef
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
        aux_loss, counts = self._balance(output.routings, valid)
        aux_loss = aux_loss * (valid.sum() / num_tokens)
        total = loss + self.aux_coef * aux_loss if self.aux_coef else loss
        return total, Losses(loss.detach(), aux_loss.detach(), counts.detach())

    def _balance(self, routings: tuple[Routing, ...], valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`num_experts * sum_e f_e P_e` (Switch Transformer, Fedus et al., 2021): f_e the share of tokens that chose
        e, P_e its mean probability, both over the layers and the valid tokens of the micro-batch."""
        if self.sequence is not None:
            valid = self.sequence.local(valid)
        mask = valid.flatten()  # [tokens], of those this rank routed
        counts, probabilities = [], []
        for routing in routings:
            chosen = routing.top_k_index.masked_fill(~mask.unsqueeze(-1), self.num_experts)
            counts.append(tokens_per_expert(chosen, self.num_experts))
            probabilities.append((routing.probabilities * mask.unsqueeze(-1)).sum(0))
        wide = probabilities[0].dtype
        sums = torch.stack((torch.stack(counts).to(wide), torch.stack(probabilities)))  # [2, layers, num_experts]
        rows = mask.sum().to(wide) * len(routings)
        if self.sequence is not None:
            sums, rows = all_reduce(sums, self.sequence.group), all_reduce(rows, self.sequence.group)
        chosen_share, mean_probability = (sums / rows.clamp(min=1)).sum(1)
        return self.num_experts * (chosen_share * mean_probability).sum(), sums[0]
