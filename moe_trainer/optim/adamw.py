"""AdamW: parameter groups, state that exists before the first step, and its tensors by parameter name."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.config.choices import DType
from moe_trainer.config.schema import OptimConfig
from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.kept_copy import current_copy, forget_copy
from moe_trainer.kernels.local_part import local_part
from moe_trainer.kernels.stochastic_rounding import (
    EXP_AVG_BITS,
    EXP_AVG_SQ_BITS,
    WEIGHT_BITS,
    RandomBits,
    round_stochastically,
)
from moe_trainer.optim.groups import Options, options_by_parameter

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (Loshchilov and Hutter, 2019), with a factor for the gradients of a step.

    On CUDA one kernel of our own reads weight, gradient and moments once, applies the factor on the way, and writes
    no gradient back; elsewhere the gradients are scaled first. What is stored in bfloat16, moments or weights, is
    computed in float32 and rounded at random.
    """

    random_bits: dict[nn.Parameter, RandomBits]
    """What each parameter and its moments are rounded with."""

    @torch.no_grad()
    def step(self, factor: torch.Tensor) -> None:
        """Move the weights by the gradients times `factor`, a scalar on the device.

        Where it is not finite, weights, moments and step count stay as they are; the host does not learn of it.
        """
        found_inf = (~factor.isfinite()).float()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(has_kernel(p) for p in parameters):
            torch._foreach_add_([self.state[p]["step"] for p in parameters], 1 - found_inf)
            for group in self.param_groups:
                self._step_group(group, factor)
            return
        torch._foreach_mul_([local_part(p.grad) for p in parameters], factor)
        self.found_inf = found_inf
        super().step()
        for parameter in parameters:
            forget_copy(parameter)  # autograd does not see PyTorch's fused step

    def _step_group(self, group: dict, factor: torch.Tensor) -> None:
        from moe_trainer.kernels.gpu import adamw as gpu

        options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                weight, grad, exp_avg, exp_avg_sq = map(local_part, tensors)
                assert weight.is_contiguous(), "a shard in pieces"
                moments = exp_avg, exp_avg_sq, state["step"]
                more = self.random_bits[parameter], current_copy(parameter)
                gpu.adamw_(weight, grad.contiguous(), *moments, factor, *options, *more)


class StoredAdamW(AdamW):
    """The same steps, one parameter after the other, each by a stand-in: its moments are brought from host memory,
    and where no kernel rounds, what is in bfloat16 is widened. Without rounding the results are the same bit for
    bit."""

    @torch.no_grad()
    def step(self, factor: torch.Tensor) -> None:
        """As `AdamW.step`. The host waits for the end: who reads the moments then finds those of this step."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_by_stand_in(parameter, group, factor)
        finally:
            self.param_groups = groups
        if factor.is_cuda:
            torch.cuda.current_stream(factor.device).synchronize()

    def _step_by_stand_in(self, parameter: nn.Parameter, group: dict, factor: torch.Tensor) -> None:
        def at_hand(tensor: torch.Tensor) -> torch.Tensor:
            here = local_part(tensor).to(parameter.device, non_blocking=True)
            return here if has_kernel(parameter) else here.to(_at_least_float32(here.dtype))

        state = self.state[parameter]
        stand_in = nn.Parameter(at_hand(parameter.detach()))
        stand_in.grad_dtype = None  # any
        stand_in.grad = at_hand(parameter.grad)
        moved = {"step": state["step"], **{name: at_hand(state[name]) for name in _MOMENTS}}
        self.state[stand_in], self.random_bits[stand_in] = moved, self.random_bits[parameter]
        self.param_groups = [{**group, "params": [stand_in]}]
        super().step(factor)
        forget_copy(parameter)  # the stand-in may have its memory
        del self.state[stand_in], self.random_bits[stand_in]
        homes = parameter.detach(), *(state[name] for name in _MOMENTS)
        self._put_back(
            parameter, [local_part(home) for home in homes], [stand_in.detach(), *map(moved.get, _MOMENTS)]
        )

    def _put_back(
        self, parameter: nn.Parameter, homes: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> None:
        """Weight and moments to where they are kept."""
        bits = None
        for home, value, first_bit in zip(homes, values, (WEIGHT_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS), strict=True):
            if home.dtype is not value.dtype:
                if bits is None:
                    step = int(self.state[parameter]["step"])
                    bits = self.random_bits[parameter].draw(step, value.device).view_as(value)
                home.copy_(round_stochastically(value, bits >> first_bit))
            elif home.data_ptr() != value.data_ptr():
                home.copy_(value, non_blocking=True)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _to_host(moment: torch.Tensor) -> torch.Tensor:
    """The moment in host memory, pinned where a GPU is to copy it; a DTensor keeps mesh and placements."""
    if moment.device.type == "cpu":
        return moment
    moment = moment.cpu()
    if isinstance(moment, DTensor):
        moment._local_tensor = moment._local_tensor.pin_memory()  # there is no public way to pin a shard
        return moment
    return moment.pin_memory()


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optim: OptimConfig,
    box_of: Callable[[torch.Tensor], tuple[slice, ...]] | None = None,
) -> AdamW:
    """The optimizer that the config describes, for what is not frozen.

    The state (zero moments with the parameter's placements, step 0) exists at once: a checkpoint can be loaded in
    place before the first step, and training is bit for bit what it is with lazy state.

    Args:
        named_parameters: materialised parameters, plain or DTensors; one group may mix DTensors of several meshes.
            Those in bfloat16 are rounded to it at random after each step.
        box_of: the block of a parameter that this rank holds, so that random rounding does not depend on the mesh;
            without it each rank's part is rounded as if it were all.

    Raises:
        ConfigError: see `options_by_parameter`.
    """
    named = list(named_parameters)
    for name, parameter in named:
        assert not parameter.is_meta, f"{name} is on the meta device: materialise it before building the optimizer"
    groups: dict[Options, list[nn.Parameter]] = {}
    for parameter, options in options_by_parameter(named, optim).items():
        groups.setdefault(options, []).append(parameter)
    dtypes = {parameter: _moments_dtype(parameter, optim) for group in groups.values() for parameter in group}
    is_rounded = any(torch.bfloat16 in (p.dtype, dtype) and not has_kernel(p) for p, dtype in dtypes.items())
    optimizer = (StoredAdamW if optim.offload or is_rounded else AdamW)(
        [
            {"params": group, "lr_scale": lr_scale, "weight_decay": weight_decay}
            for (lr_scale, weight_decay), group in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    optimizer.random_bits = {p: _random_bits(name, p, box_of) for name, p in named if p in dtypes}
    for parameter, dtype in dtypes.items():
        moments = {name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name in _MOMENTS}
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: _to_host(moment) if optim.offload else moment for name, moment in moments.items()},
        }
    return optimizer


def _moments_dtype(parameter: nn.Parameter, optim: OptimConfig) -> torch.dtype:
    if optim.moments_dtype is DType.auto:
        return _at_least_float32(parameter.dtype)
    return getattr(torch, optim.moments_dtype.value)


def _random_bits(
    name: str, parameter: nn.Parameter, box_of: Callable[[torch.Tensor], tuple[slice, ...]] | None
) -> RandomBits:
    if box_of is not None:
        return RandomBits.of(name, parameter.shape, box_of(parameter))
    shape = local_part(parameter).shape
    return RandomBits.of(name, shape, [slice(0, size) for size in shape])


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


def optimizer_step(
    optimizer: torch.optim.AdamW,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    moments_since: Mapping[str, int],
) -> int:
    """Steps that moved weights, read from the device; arguments as `set_optimizer_step`."""
    name, parameter = next(pair for pair in named_parameters if pair[1] in optimizer.state)
    return int(optimizer.state[parameter]["step"]) + moments_since.get(name, 0)


def set_optimizer_step(
    optimizer: torch.optim.AdamW,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    moments_since: Mapping[str, int],
    step: int,
) -> None:
    """Set the number of steps taken, which bias correction and random rounding use, for every parameter.

    Args:
        moments_since: by name, the step after which a parameter's moments begin, where that is not the first.
        step: steps that moved weights.
    """
    for name, parameter in named_parameters:
        if parameter in optimizer.state:
            optimizer.state[parameter]["step"].fill_(step - moments_since.get(name, 0))
