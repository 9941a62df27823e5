from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_trainer.config.choices import Family
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.registry import FAMILIES
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


SMALL = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "num_experts": 6}
SHAPES = [
    ModelConfig(**SMALL, sliding_window=8),
    ModelConfig(**SMALL, tie_word_embeddings=True),
    ModelConfig(Family.qwen3_moe, **SMALL, dense_layers=[1], dense_intermediate_size=40, attention_bias=True),
    ModelConfig(Family.qwen3_moe, **SMALL),
    ModelConfig(Family.olmoe, **SMALL),
    ModelConfig(Family.olmoe, **SMALL, attention_bias=True, tie_word_embeddings=True),
    ModelConfig(Family.deepseek_v3, **SMALL, dense_layers=[0], dense_intermediate_size=40, num_shared_experts=2),
    ModelConfig(Family.deepseek_v3, **SMALL, q_lora_rank=24, kv_lora_rank=20, v_head_dim=6, attention_bias=True),
    ModelConfig(Family.deepseek_v3, **SMALL, attention_bias=True, num_shared_experts=1),
    ModelConfig(Family.gpt_oss, **SMALL, attention_bias=True),
    ModelConfig(Family.gpt_oss, **SMALL),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family.value)
def test_parameters_are_those_of_the_built_model(shape):
    with torch.device("meta"):
        built = FAMILIES[shape.family].build(shape)
    experts = sum(parameter.numel() for name, parameter in built.named_parameters() if ".experts." in name)
    total = sum(parameter.numel() for parameter in built.parameters())
    assert num_parameters(shape) == (total, total - experts * 4 // 6)


def test_a_tied_head_costs_what_a_head_costs():
    tied = replace(MIXTRAL_8X7B, tie_word_embeddings=True)
    assert flops_per_token(tied, 512) == flops_per_token(MIXTRAL_8X7B, 512)


def test_a_window_costs_what_it_looks_at():
    """Counted position by position: the convention's half a position for itself, then at most a window."""
    windowed, seq, window = replace(MIXTRAL_8X7B, sliding_window=100), 1000, 100
    looked_at = sum(min(position + 0.5, window) for position in range(seq)) / seq
    attention = flops_per_token(windowed, seq) - flops_per_token(windowed, 0)
    assert attention == pytest.approx(12 * 32 * 32 * 128 * looked_at)
    assert flops_per_token(windowed, 100) == flops_per_token(MIXTRAL_8X7B, 100)


def test_latent_attention_has_its_own_widths():
    shape = ModelConfig(Family.deepseek_v3, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7)
    attention = flops_per_token(shape, 30) - flops_per_token(shape, 0)
    assert attention == 3 * shape.num_layers * shape.num_heads * (5 + 4 + 7) * 30


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
