"""Parameters, floating-point operations and what a GPU could do: the parts of model FLOPs utilisation (MFU)."""

import re

from moe_trainer.config.schema import ModelConfig

_DENSE_BF16_PEAKS = (
    # Words that must all be in the device's name; the first match counts. FLOP/s without sparsity, from data sheets.
    ({"H100", "PCIE"}, 756e12),
    ({"H100", "NVL"}, 835e12),
    ({"H100"}, 989e12),
    ({"H200", "NVL"}, 836e12),
    ({"H200"}, 989e12),
    ({"GH200"}, 989e12),
    ({"H800", "PCIE"}, 756e12),
    ({"H800"}, 989e12),
    ({"B200"}, 2250e12),
    ({"GB200"}, 2500e12),
    ({"A100"}, 312e12),
    ({"A800"}, 312e12),
    ({"L40S"}, 362e12),
    ({"MI300X"}, 1307e12),
)


def num_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of the model, and those that one token uses: `top_k` experts of each layer and all the rest.

    Both count the embedding and the head, which are not tied.
    """
    hidden = model.hidden_size
    attention = hidden * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    router = model.num_experts * hidden
    norms = 2 * hidden
    expert = 3 * hidden * model.intermediate_size
    outside = 2 * model.vocab_size * hidden + hidden + model.num_layers * (attention + router + norms)
    experts, active_experts = (model.num_layers * count * expert for count in (model.num_experts, model.top_k))
    return outside + experts, outside + active_experts


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    The usual convention (Kaplan et al., 2020; Chowdhery et al., 2022): 6 for each active parameter, with the head but
    without the embedding lookup, and 6 * layers * heads * head_dim * seq for the attention scores and values, half of
    the full square because it is causal. Recomputation, dropped or padded tokens do not count.
    """
    _, active = num_parameters(model)
    multiplied = active - model.vocab_size * model.hidden_size
    return 6.0 * multiplied + 6.0 * model.num_layers * model.num_heads * model.head_dim * seq_len


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name (`torch.cuda.get_device_name()`); None if it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((peak for needed, peak in _DENSE_BF16_PEAKS if needed <= words), None)
