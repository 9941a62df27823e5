import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from moe_trainer.config.schema import ModelConfig, RopeConfig
from moe_trainer.kernels.rope import rotate
from moe_trainer.models.attention import KVCache
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.mixtral.model import build_mixtral
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.rope import rotation
from moe_trainer.parallel.initialize import initialize

CONFIG = ModelConfig(vocab_size=19, hidden_size=16, intermediate_size=8, num_heads=4, num_kv_heads=2, head_dim=6)


def model() -> CausalLM:
    made = build_mixtral(CONFIG).double()
    initialize(made, 0, 0.3)
    return made.eval()


IDS = torch.randint(CONFIG.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunks", ([11], [1] * 11, [6, 1, 1, 3], [4, 7], [1, 10]), ids=str)
@torch.no_grad()
def test_with_a_cache_as_without(chunks: list[int]) -> None:
    """Prefill whole, in chunks or token by token: the last logits of each chunk are those of a single pass."""
    net = model()
    expected = net(IDS).logits
    cache = KVCache(CONFIG.num_layers, 12)
    seen = 0
    for chunk in chunks:
        logits = net(IDS[:, seen : seen + chunk], cache).logits
        seen += chunk
        assert logits.shape == (2, 1, CONFIG.vocab_size)
        torch.testing.assert_close(logits[:, 0], expected[:, seen - 1])


@torch.no_grad()
def test_the_cache_has_an_end() -> None:
    net, cache = model(), KVCache(CONFIG.num_layers, 8)
    net(IDS[:, :8], cache)
    with pytest.raises((IndexError, RuntimeError), match="index 8 is out of bounds|out of range"):
        net(IDS[:, 8:9], cache)


@torch.no_grad()
def test_attention_is_causal() -> None:
    net = model()
    other = IDS.clone()
    other[:, 7] = (other[:, 7] + 1) % CONFIG.vocab_size
    before, after = net(IDS).logits, net(other).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-12, atol=1e-12)
    assert ((before - after).abs().amax((0, 2))[7:] > 1e-6).all()


def test_rotation_against_transformers() -> None:
    hub = MixtralConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    theta = hub.rope_parameters["rope_theta"]
    embedding = modeling_mixtral.MixtralRotaryEmbedding(hub)
    positions = torch.arange(3, 40)
    x = torch.randn(2, 4, 37, 6)
    cos, sin = embedding(x, positions.unsqueeze(0))
    rope = rotation(positions, 6, RopeConfig(theta), torch.float32)
    torch.testing.assert_close(rope.cos, cos[0])
    torch.testing.assert_close(rope.sin, sin[0])
    expected, _ = modeling_mixtral.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotate(x, *rope), expected)


def test_rotation_depends_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)
    products = []
    for first in (0, 5, 300):
        rope = rotation(torch.tensor([first, first + 4]), 8, RopeConfig(1e4), torch.float64)
        turned = rotate(torch.cat((query, key), dim=2), *rope)[0, 0]
        products.append(turned[0] @ turned[1])
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, 1e-5).to(torch.promote_types(dtype, torch.float32))
    norm.weight.data = torch.randn(16, dtype=norm.weight.dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    wide = x.to(norm.weight.dtype)
    expected = torch.nn.functional.rms_norm(wide, (16,), norm.weight, 1e-5).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected)
