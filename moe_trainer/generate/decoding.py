"""Token after token from a model that may be split over ranks."""

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.generate.sampling import Sampler
from moe_trainer.models.attention import KVCache
from moe_trainer.models.decoder import CausalLM
from moe_trainer.parallel.collectives import gather_replicated


@torch.inference_mode()
def generate(
    model: CausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: Collection[int],
    group: ProcessGroup | None = None,
) -> Iterator[torch.Tensor]:
    """Continue prompts of equal length: one pass over them, then one over each new token. Collective over `group`.

    Args:
        input_ids: [batch, prompt], the same on every rank, on the model's device.
        max_new_tokens: the prompt's length and this must fit the positions that the model is made for.
        sampler: only that of the group's first rank is asked; its choice goes to all.
        stop_ids: tokens that end a sequence.
        group: ranks that split the logits; None where every rank has all of them.

    Yields:
        Token ids [batch], on the CPU; the stop token is the last of its sequence, and repeated until all have ended.
    """
    batch, prompt = input_ids.shape
    cache = KVCache(len(model.model.layers), prompt + max_new_tokens)
    ended = torch.zeros(batch, dtype=torch.bool)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
    tokens: torch.Tensor | None = None
    for _ in range(max_new_tokens):
        chosen = _choose(model(input_ids, cache).logits[:, -1], sampler, group)
        tokens = chosen if tokens is None else torch.where(ended, tokens, chosen)
        ended |= torch.isin(tokens, stops)
        yield tokens
        if ended.all():
            return
        input_ids = tokens.to(input_ids.device).unsqueeze(1)


def _choose(logits: torch.Tensor, sampler: Sampler, group: ProcessGroup | None) -> torch.Tensor:
    """Local logits [batch, vocab / ranks] -> token ids [batch] on the CPU, the same on every rank.

    Ranks may differ in a logit's last bits, and so in a near tie: the first rank decides.
    """
    if group is None:
        return sampler(logits)
    logits = gather_replicated(logits, 1, [logits.shape[1]] * group.size(), group)
    tokens = sampler(logits) if group.rank() == 0 else torch.empty(len(logits), dtype=torch.int64)
    shared = tokens.to(logits.device)
    dist.broadcast(shared, group=group, group_src=0)
    return shared.cpu()
