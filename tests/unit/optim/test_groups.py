import pytest
import torch
from torch import nn

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.patterns import covers
from moe_trainer.config.schema import GroupConfig, ModelConfig, OptimConfig
from moe_trainer.config.store import compose
from moe_trainer.models.registry import FAMILIES
from moe_trainer.optim.adamw import StoredAdamW, build_adamw, optimizer_tensors
from moe_trainer.optim.groups import freeze, options_by_parameter
from moe_trainer.optim.schedule import set_learning_rate
from moe_trainer.parallel.initialize import initialize

ROUTERS, EXPERTS = "model.layers.*.mlp.gate", "model.layers.*.mlp.experts"


def small_model() -> nn.Module:
    cfg = ModelConfig(hidden_size=16, intermediate_size=16, head_dim=4, vocab_size=32)
    model = FAMILIES[cfg.family].build(cfg)
    initialize(model, 0, 0.1)
    return model


def test_a_pattern_covers_a_name_and_what_lies_below():
    name = "model.layers.3.mlp.experts.down_proj"
    assert all(covers(pattern, name) for pattern in (name, EXPERTS, "model.layers.3", "model", "*.*.*.mlp"))
    assert not any(covers(pattern, name) for pattern in ("model.layers.*.mlp.gate", "model.layer", "*.down_proj", ""))


def test_the_last_group_that_covers_a_parameter_counts():
    groups = [GroupConfig("model.layers", 0.5), GroupConfig(ROUTERS, 0.1, 0.2), GroupConfig("model.norm", 3.0)]
    model = small_model()
    options = options_by_parameter(model.named_parameters(), OptimConfig(weight_decay=0.3, groups=groups))
    layer = model.model.layers[1]
    assert options[layer.mlp.gate.weight] == (0.1, 0.2)
    assert options[layer.mlp.experts.down_proj] == (0.5, 0.3)
    assert options[layer.input_layernorm.weight] == (0.5, 0.0)
    assert options[model.model.norm.weight] == (3.0, 0.0)
    assert options[model.lm_head.weight] == (1.0, 0.3)
    assert len(options) == len(list(model.parameters()))


def test_each_group_takes_its_share_of_the_rate():
    optim = OptimConfig(groups=[GroupConfig(ROUTERS, 0.25)])
    model = small_model()
    optimizer = build_adamw(model.named_parameters(), optim)
    set_learning_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.model.layers[0].mlp.gate.weight)] == 0.2
    assert rates[id(model.lm_head.weight)] == 0.8


def test_what_is_frozen_has_no_gradient_and_no_state():
    model = small_model()
    freeze(model, [ROUTERS, EXPERTS, "model.embed_tokens"])
    optimizer = build_adamw(model.named_parameters(), OptimConfig())
    model(torch.arange(8).view(1, 8)).logits.square().sum().backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {
        name for name, _ in model.named_parameters() if "gate" in name or "experts" in name or "embed" in name
    }
    named = {name.split(".", 1)[1] for name in optimizer_tensors(optimizer, model.named_parameters())}
    assert named == {name for name, _ in model.named_parameters()} - frozen


@pytest.mark.parametrize(
    ("patterns", "line"),
    [(["model.layers.*.mlp.router"], "optim.freeze: model.layers.*.mlp.router covers no parameter"),
     (["model", "lm_head"], "optim.freeze leaves nothing to train")],
)  # fmt: skip
def test_freezing_nothing_or_everything_is_a_mistake(patterns: list[str], line: str):
    with pytest.raises(ConfigError) as caught:
        freeze(small_model(), patterns)
    assert str(caught.value).startswith(line)


def test_a_group_of_nothing_is_a_mistake():
    model = small_model()
    freeze(model, [ROUTERS])
    with pytest.raises(ConfigError, match="optim.groups: .* covers no trained parameter"):
        build_adamw(model.named_parameters(), OptimConfig(groups=[GroupConfig(ROUTERS)]))


def test_the_command_line_says_groups_and_patterns():
    cfg = compose("train", [
        "data.text=x", f"optim.freeze=[{ROUTERS},model.norm]", f"optim.groups=[{{pattern: {EXPERTS}, lr_scale: 0.1}}]"
    ])  # fmt: skip
    assert cfg.optim.freeze == [ROUTERS, "model.norm"]
    assert cfg.optim.groups == [GroupConfig(EXPERTS, 0.1)]


def test_offloaded_moments_give_the_same_bits():
    ours, theirs = small_model(), small_model()
    optimizers = [
        build_adamw(model.named_parameters(), OptimConfig(lr=1e-2, offload=offload))
        for model, offload in ((ours, True), (theirs, False))
    ]
    assert isinstance(optimizers[0], StoredAdamW)
    for step in range(4):
        factor = torch.tensor(float("nan") if step == 2 else 0.5)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(torch.arange(8).view(1, 8) + step).logits.square().sum().backward()
            optimizer.step(factor)
            optimizer.zero_grad()
    states = [optimizer_tensors(o, m.named_parameters()) for o, m in zip(optimizers, (ours, theirs), strict=True)]
    for mine, other in (*zip(ours.parameters(), theirs.parameters(), strict=True), *pairwise_values(*states)):
        assert torch.equal(mine, other)
    assert len(optimizers[0].param_groups) == len(optimizers[1].param_groups)


def pairwise_values(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[tuple]:
    assert ours.keys() == theirs.keys() and any(value.any() for value in ours.values())
    return [(ours[name], theirs[name]) for name in ours]
