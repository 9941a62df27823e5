"""AdamW: parameter groups, state that exists before the first step, and its tensors by parameter name."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.schema import OptimConfig
from moe_trainer.kernels.backend import has_kernel


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (Loshchilov and Hutter, 2019), with a factor for the gradients of a step.

    On CUDA one kernel of our own reads weight, gradient and moments once, applies the factor on the way, and writes
    no gradient back; elsewhere the gradients are scaled first.
    """

    @torch.no_grad()
    def step(self, factor: torch.Tensor) -> None:
        """Move the weights by the gradients times `factor`, a scalar on the device.

        Where it is not finite, weights, moments and step count stay as they are; the host does not learn of it.
        """
        found_inf = (~factor.isfinite()).float()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(has_kernel(_local(p)) and p.dtype is torch.float32 for p in parameters):
            torch._foreach_add_([self.state[p]["step"] for p in parameters], 1 - found_inf)
            for group in self.param_groups:
                self._step_group(group, factor)
            return
        torch._foreach_mul_([_local(p.grad) for p in parameters], factor)
        self.found_inf = found_inf
        super().step()

    def _step_group(self, group: dict, factor: torch.Tensor) -> None:
        from moe_trainer.kernels.gpu import adamw as gpu

        options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                weight, grad, exp_avg, exp_avg_sq = map(_local, tensors)
                assert weight.is_contiguous(), "a shard in pieces"
                gpu.adamw_(weight, grad.contiguous(), exp_avg, exp_avg_sq, state["step"], factor, *options)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> AdamW:
    """The optimizer that the config describes.

    Norms, biases and the router are not decayed unless `optim.decay_all`. The state (zero moments with the
    parameter's placements, step 0) exists at once: a checkpoint can be loaded in place before the first step, and
    training is bit for bit what it is with lazy state.

    Args:
        named_parameters: materialised parameters, plain or DTensors; one group may mix DTensors of several meshes.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        assert not parameter.is_meta, f"{name} is on the meta device: materialise it before building the optimizer"
        (decayed if optim.decay_all or _decays(name, parameter) else undecayed).append(parameter)
    optimizer = AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    for parameter in decayed + undecayed:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
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


def optimizer_step(optimizer: torch.optim.AdamW) -> int:
    """Steps that moved the weights, read from the device."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_optimizer_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Set the number of steps taken, which the bias correction uses, for every parameter."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    path = f".{name}"
    return parameter.ndim > 1 and not path.endswith(".gate.weight") and ".router." not in path
