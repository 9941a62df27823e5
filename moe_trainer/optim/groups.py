"""Which parameters are trained, and at which rate and decay."""

from collections.abc import Iterable

from torch import nn

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.patterns import covers
from moe_trainer.config.schema import OptimConfig

Options = tuple[float, float]
"""What multiplies the learning rate, and the weight decay."""


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Leave what the patterns cover as it is: it gets no gradient and no state in the optimizer.

    Raises:
        ConfigError: a pattern that covers nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        covered = [parameter for name, parameter in parameters.items() if covers(pattern, name)]
        if not covered:
            raise ConfigError(f"optim.freeze: {pattern} covers no parameter; print_plan=true lists their names")
        for parameter in covered:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("optim.freeze leaves nothing to train")


def options_by_parameter(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig
) -> dict[nn.Parameter, Options]:
    """Of each trained parameter, in their order. Norms, biases and the router are not decayed unless `decay_all`.

    Raises:
        ConfigError: a pattern of `optim.groups` that covers nothing that is trained.
    """
    trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    for group in optim.groups:
        if not any(covers(group.pattern, name) for name in trained):
            raise ConfigError(
                f"optim.groups: {group.pattern} covers no trained parameter; print_plan=true lists their names"
            )
    return {parameter: _options(name, parameter, optim) for name, parameter in trained.items()}


def _options(name: str, parameter: nn.Parameter, optim: OptimConfig) -> Options:
    lr_scale, weight_decay = 1.0, optim.weight_decay if optim.decay_all or _decays(name, parameter) else 0.0
    for group in optim.groups:
        if covers(group.pattern, name):
            lr_scale = group.lr_scale
            weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
    return lr_scale, weight_decay


def _decays(name: str, parameter: nn.Parameter) -> bool:
    path = f".{name}"
    return parameter.ndim > 1 and not path.endswith(".gate.weight") and ".router." not in path
