import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from moe_trainer.config.schema import ModelConfig
from moe_trainer.observe.flops import flops_per_token, num_parameters, peak_flops

MIXTRAL_8X7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
)


def test_mixtral_8x7b_has_its_published_size():
    assert num_parameters(MIXTRAL_8X7B) == (46_702_792_704, 12_879_925_248)


def test_mixtral_8x7b_costs_79_7_gflops_a_token():
    assert flops_per_token(MIXTRAL_8X7B, 4096) == pytest.approx(79.7e9, rel=1e-3)
    attention = flops_per_token(MIXTRAL_8X7B, 4096) - flops_per_token(MIXTRAL_8X7B, 0)
    assert attention == 6 * 32 * 32 * 128 * 4096


def test_parameters_are_those_of_transformers():
    ours = ModelConfig(num_kv_heads=2, head_dim=24, num_experts=3, top_k=1)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            num_key_value_heads=ours.num_kv_heads,
            head_dim=ours.head_dim,
            num_local_experts=ours.num_experts,
        )
    )
    total, active = num_parameters(ours)
    assert total == sum(parameter.numel() for parameter in theirs.parameters())
    unused = sum(parameter.numel() for name, parameter in theirs.named_parameters() if ".experts." in name) * 2 // 3
    assert active == total - unused


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H20", None),
        ("NVIDIA A10G", None),
        ("some CPU", None),
    ],
)
def test_peaks_of_known_devices_only(name, peak):
    assert peak_flops(name) == peak
