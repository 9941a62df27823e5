"""torch's AdamW: parameter groups, state that exists before the first step, and its tensors by parameter name."""

from collections.abc import Iterable

import torch
from torch import nn

from moe_trainer.config.schema import OptimConfig


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig, device_type: str
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused on CUDA and foreach on CPU.

    Norms, biases and the router are not decayed unless `optim.decay_all`. The state (zero moments with the
    parameter's placements, step 0) exists at once: a checkpoint can be loaded in place before the first step, and
    training is bit for bit what it is with lazy state.

    Args:
        named_parameters: materialised parameters, plain or DTensors; one group may mix DTensors of several meshes.
        device_type: `cuda` or `cpu`.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        assert not parameter.is_meta, f"{name} is on the meta device: materialise it before building the optimizer"
        (decayed if optim.decay_all or _decays(name, parameter) else undecayed).append(parameter)
    fused = device_type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
        foreach=not fused,
    )
    for parameter in decayed + undecayed:
        optimizer.state[parameter] = {
            # The fused kernel counts in float32 on the device, the others on the host.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.AdamW, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The live moments as `exp_avg.<name>` and `exp_avg_sq.<name>`: save them, or load into them in place."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named_parameters
        for moment in ("exp_avg", "exp_avg_sq")
    }


def set_optimizer_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Set the number of steps taken, which the bias correction uses, for every parameter."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    path = f".{name}"
    return parameter.ndim > 1 and not path.endswith(".gate.weight") and ".router." not in path
