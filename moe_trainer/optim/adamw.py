"""AdamW: parameter groups, state that exists before the first step, and its tensors by parameter name."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.schema import DType, OptimConfig
from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.stochastic_rounding import round_stochastically
from moe_trainer.optim.groups import Options, options_by_parameter

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (Loshchilov and Hutter, 2019), with a factor for the gradients of a step.

    On CUDA one kernel of our own reads weight, gradient and moments once, applies the factor on the way, and writes
    no gradient back; elsewhere the gradients are scaled first.
    """

    numbers: dict[nn.Parameter, int]
    """Of the parameters, in their order: with the step they seed the random rounding of moments."""

    @torch.no_grad()
    def step(self, factor: torch.Tensor) -> None:
        """Move the weights by the gradients times `factor`, a scalar on the device.

        Where it is not finite, weights, moments and step count stay as they are; the host does not learn of it.
        """
        found_inf = (~factor.isfinite()).float()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(has_kernel(p) and p.dtype is torch.float32 for p in parameters):
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
                moments = exp_avg, exp_avg_sq, state["step"]
                gpu.adamw_(weight, grad.contiguous(), *moments, factor, *options, self.numbers[parameter])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StoredAdamW(AdamW):
    """The same steps with the moments elsewhere: in host memory, bit for bit, or in bfloat16 where no kernel rounds.
    Those of one parameter at a time are at hand."""

    @torch.no_grad()
    def step(self, factor: torch.Tensor) -> None:
        """As `AdamW.step`. The host waits for the end: who reads the moments then finds those of this step."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    self.param_groups = [{**group, "params": [parameter]}]
                    self._step_on_device(parameter, factor)
        finally:
            self.param_groups = groups
        if factor.is_cuda:
            torch.cuda.current_stream(factor.device).synchronize()

    def _step_on_device(self, parameter: nn.Parameter, factor: torch.Tensor) -> None:
        state = self.state[parameter]
        at_home = {name: state[name] for name in _MOMENTS}
        away = {name: moment.to(parameter.device, non_blocking=True) for name, moment in at_home.items()}
        if not has_kernel(parameter):
            away = {name: moment.to(parameter.dtype) for name, moment in away.items()}
        state.update(away)
        super().step(factor)
        for name, moment in at_home.items():
            self._put_back(parameter, moment, away[name])
        state.update(at_home)

    def _put_back(self, parameter: nn.Parameter, home: torch.Tensor, moment: torch.Tensor) -> None:
        if home.dtype is moment.dtype:
            home.copy_(moment, non_blocking=True)
        else:
            seed = int(self.state[parameter]["step"]) * 65521 + self.numbers[parameter]
            generator = torch.Generator(moment.device).manual_seed(seed)
            _local(home).copy_(round_stochastically(_local(moment), generator))


def _to_host(moment: torch.Tensor) -> torch.Tensor:
    """The moment in host memory, pinned where a GPU is to copy it; a DTensor keeps mesh and placements."""
    if moment.device.type == "cpu":
        return moment
    moment = moment.cpu()
    if isinstance(moment, DTensor):
        moment._local_tensor = moment._local_tensor.pin_memory()  # there is no public way to pin a shard
        return moment
    return moment.pin_memory()


def build_adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> AdamW:
    """The optimizer that the config describes, for what is not frozen.

    The state (zero moments with the parameter's placements, step 0) exists at once: a checkpoint can be loaded in
    place before the first step, and training is bit for bit what it is with lazy state.

    Args:
        named_parameters: materialised parameters, plain or DTensors; one group may mix DTensors of several meshes.

    Raises:
        ConfigError: see `options_by_parameter`.
    """
    named = list(named_parameters)
    for name, parameter in named:
        assert not parameter.is_meta, f"{name} is on the meta device: materialise it before building the optimizer"
    groups: dict[Options, list[nn.Parameter]] = {}
    for parameter, options in options_by_parameter(named, optim).items():
        groups.setdefault(options, []).append(parameter)
    dtype = None if optim.moments_dtype is DType.auto else getattr(torch, optim.moments_dtype.value)
    is_rounded = dtype is not None and not all(has_kernel(parameter) for _, parameter in named)
    optimizer = (StoredAdamW if optim.offload or is_rounded else AdamW)(
        [
            {"params": parameters, "lr_scale": lr_scale, "weight_decay": weight_decay}
            for (lr_scale, weight_decay), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    optimizer.numbers = {p: number for number, p in enumerate(p for group in groups.values() for p in group)}
    for parameter in optimizer.numbers:
        moments = {name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name in _MOMENTS}
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: _to_host(moment) if optim.offload else moment for name, moment in moments.items()},
        }
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.AdamW, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The live moments as `exp_avg.<name>` and `exp_avg_sq.<name>`: save them, or load into them in place. A frozen
    parameter has none."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in named_parameters
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def optimizer_step(optimizer: torch.optim.AdamW) -> int:
    """Steps that moved the weights, read from the device."""
    return int(torch.stack([state["step"] for state in optimizer.state.values()]).max())


def set_optimizer_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Set the number of steps taken, which the bias correction uses, for every parameter."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
