"""The loss on held-out data: the same samples and the same figures on every mesh."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.data.build import build_validation_loader
from moe_trainer.data.loader import Loader
from moe_trainer.parallel.cross_entropy import IGNORED_LABEL, cross_entropy_sum


def build_held_out(cfg: Config, data_rank: int, data_size: int) -> Loader | None:
    """The held-out data of a run, if it has any.

    Raises:
        ConfigError: it has none, though `eval` asks for some; or as `build_validation_loader`.
    """
    loader = build_validation_loader(cfg, cfg.model.vocab_size, data_rank, data_size)
    for name in ("every", "batches"):
        value = getattr(cfg.eval, name)
        if loader is None and value is not None:
            raise ConfigError(
                f"eval.{name}={value}: there is nothing to evaluate on; give data.validation_path=FILE, or prepare "
                "the data with validation_share=0.05"
            )
    return loader


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, batches: int | None, vocab_group: ProcessGroup | None, device: torch.device
) -> dict[str, float]:
    """Mean cross entropy of the labels of the first `batches` global batches (None: of every sample once).

    Collective. Nothing of the run is moved: no weight, no bias of a router, no random stream, no position in the
    training data.

    Args:
        loader: of `build_validation_loader`.
        vocab_group: ranks that split the logits, or None.

    Returns:
        `val_loss` in nats a token, `val_perplexity` (its exponential) and `val_tokens`, equal on every rank.
    """
    number = loader.num_batches if batches is None else min(batches, loader.num_batches)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # cross entropy and labels
    for position in range(0, number * loader.global_batch_size, loader.global_batch_size):
        for micro_batch in loader.batch(position).to(device).split(loader.grad_accum_steps):
            logits = model(micro_batch.input_ids, documents=micro_batch.documents).logits
            sums[0] += cross_entropy_sum(logits, micro_batch.labels, vocab_group)
            sums[1] += (micro_batch.labels != IGNORED_LABEL).sum()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the head is left whole by a forward pass that no backward pass follows
            module.reshard()
    dist.all_reduce(sums)  # ranks of a tensor-parallel group hold the same, which leaves the ratio as it is
    loss, tokens = sums.tolist()
    loss /= max(tokens, 1)
    copies = dist.get_world_size() // loader.data_size
    return {"val_loss": loss, "val_perplexity": _exp(loss), "val_tokens": tokens / copies}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
