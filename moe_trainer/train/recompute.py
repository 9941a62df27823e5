"""Activation checkpointing (Chen et al., 2016): a layer keeps its input; going backward it computes the rest anew."""

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from moe_trainer.config.choices import Recompute
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

Keeps = Callable[[str, int], bool]
"""(operator, how often one of its kind has run in this pass, this time included) -> whether its result is kept."""


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
    keeps = _keeps_choices if recompute is Recompute.full else _keeps_dear
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.forward = partial(  # FSDP's hooks stay around it, since they belong to the module's call
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a layer draws random numbers
                context_fn=partial(_contexts, keeps),
            )


def _keeps_choices(op: str, number: int) -> bool:
    return op in _CHOICES


def _keeps_dear(op: str, number: int) -> bool:
    # The experts' first product is that with gate_up_proj.
    return op in _CHOICES or op in _ATTENTION or (op in _GROUPED_PRODUCTS and number == 1)


def _contexts(keeps: Keeps) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Around one pass through one layer, and around its repetition.

    PyTorch's own pair (`create_selective_checkpoint_contexts`) wants the same operators in both, which they are not:
    FSDP inside a layer finds some weights gathered the second time.
    """
    kept: deque[Any] = deque()
    return _Keep(keeps, kept), _Give(keeps, kept)


class _Keep(TorchDispatchMode):
    def __init__(self, keeps: Keeps, kept: deque[Any]) -> None:
        super().__init__()
        self._keeps, self._kept = keeps, kept
        self._ran: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        kind = "a grouped product" if name in _GROUPED_PRODUCTS else name  # whose kernel depends on its widths
        self._ran[kind] += 1
        if self._keeps(name, self._ran[kind]):
            return self.kept_result(op, args, kwargs or {})
        return op(*args, **(kwargs or {}))

    def kept_result(self, op: Any, args: Any, kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        self._kept.append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out


class _Give(_Keep):
    def kept_result(self, op: Any, args: Any, kwargs: Any) -> Any:
        return self._kept.popleft()
