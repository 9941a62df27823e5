"""Looking on while a step is taken: what each layer gives, and the gradients that come back to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_trainer.models.decoder import CausalLM, DecoderLayer


@contextmanager
def watching(model: CausalLM, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Show `see` this rank's part of every layer's output, of the logits, and of their gradients, as they are made.

    Before gradients of weights are summed over ranks these tell the ranks apart. Names read `micro-batch 2:
    model.layers.3`, with `, gradient` behind it on the way back; layers that are computed again are shown once.
    """
    number = 0

    def count(module: nn.Module, inputs: object) -> None:
        nonlocal number
        number += 1

    def shown(name: str) -> Callable[[nn.Module, object, tuple], None]:
        def show(module: nn.Module, inputs: object, output: tuple) -> None:
            value, full = output[0], f"micro-batch {number}: {name}"
            see(full, value.detach())
            if value.requires_grad:
                value.register_hook(lambda grad: see(f"{full}, gradient", grad))

        return show

    layers = {name: module for name, module in model.named_modules() if isinstance(module, DecoderLayer)}
    handles = [model.register_forward_pre_hook(count)]
    handles += [module.register_forward_hook(shown(name)) for name, module in layers.items()]
    handles.append(model.register_forward_hook(shown("logits")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
