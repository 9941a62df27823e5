"""Activation checkpointing (Chen et al., 2016): a layer keeps its input; going backward it computes the rest anew."""

from collections import deque
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from moe_trainer.config.choices import Recompute
from moe_trainer.kernels.keepable import kept_by
from moe_trainer.models.decoder import DecoderLayer

_CHOICES = frozenset({"aten::topk"})
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
    }
)
_GROUPED_PRODUCTS = frozenset({"aten::_grouped_mm", "aten::_scaled_grouped_mm", "moe_trainer::grouped_mm"})


def recompute_layers(model: nn.Module, recompute: Recompute) -> None:
    """Let each layer of the model forget its activations, all or some of them. Before FSDP wraps the layers.

    In either kind the router's choice is kept, which takes little: what is computed again is what was computed, even
    on a device whose sums depend on the order of execution. `selective` also keeps what attention gave and the
    experts' pre-activation, the two that cost most to compute again: left are norms, projections and elementwise
    work, and of the experts the product with `down_proj`, whose result nobody keeps (see `kernels/experts.py`).
    Collectives inside a layer run again, on every rank alike.
    """
    if recompute is Recompute.none:
        return
    kept = _CHOICES if recompute is Recompute.full else _CHOICES | _ATTENTION | _GROUPED_PRODUCTS
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.forward = partial(  # FSDP's hooks stay around it, since they belong to the module's call
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a layer draws random numbers
                context_fn=partial(_contexts, kept),
            )


def _contexts(operators: Collection[str]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around one pass through one layer, and around its repetition.

    PyTorch's own pair (`create_selective_checkpoint_contexts`) looks at every operator, and wants the same ones in
    both passes, which they are not: FSDP inside a layer finds some weights gathered the second time.

    Args:
        operators: whose results are kept where they are `keepable`.
    """
    results: deque[Any] = deque()
    return kept_by(_Keep(operators, results)), kept_by(_Give(operators, results))


class _Keep(TorchDispatchMode):
    def __init__(self, operators: Collection[str], results: deque[Any]) -> None:
        super().__init__()
        self._operators, self._results = operators, results

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name() in self._operators:
            return self.result(op, args, kwargs or {})
        return op(*args, **(kwargs or {}))

    def result(self, op: Any, args: Any, kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        self._results.append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out


class _Give(_Keep):
    def result(self, op: Any, args: Any, kwargs: Any) -> Any:
        return self._results.popleft()
