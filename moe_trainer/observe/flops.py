"""Parameters, floating-point operations and what a GPU could do: the parts of model FLOPs utilisation (MFU)."""

import re

from moe_trainer.config.choices import Family
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
    """Parameters of the model, and those that one token uses: `top_k` experts of each sparse layer and all the rest.

    Both count the embedding, and the head where it is not the embedding itself.
    """
    hidden = model.hidden_size
    has_biases = model.family is Family.gpt_oss
    router = model.num_experts * (hidden + has_biases)
    expert = 3 * hidden * model.intermediate_size + has_biases * (2 * model.intermediate_size + hidden)
    shared = 3 * hidden * model.num_shared_experts * model.intermediate_size
    num_dense = len(model.dense_layers)
    num_sparse = model.num_layers - num_dense
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * hidden
    outside = tables + hidden + model.num_layers * (_attention_parameters(model) + 2 * hidden)
    outside += num_sparse * (router + shared) + num_dense * 3 * hidden * (model.dense_intermediate_size or 0)
    return outside + num_sparse * model.num_experts * expert, outside + num_sparse * model.top_k * expert


def _attention_parameters(model: ModelConfig) -> int:
    """Of one layer: projections, their biases, norms and sinks."""
    hidden, heads = model.hidden_size, model.num_heads
    if model.family is Family.deepseek_v3:
        return _latent_attention_parameters(model)
    queries, keys = heads * model.head_dim, model.num_kv_heads * model.head_dim
    norms = {Family.qwen3_moe: 2 * model.head_dim, Family.olmoe: queries + keys}.get(model.family, 0)
    sinks = heads if model.family is Family.gpt_oss else 0
    biases = queries + 2 * keys + hidden if model.attention_bias else 0
    return 2 * hidden * (queries + keys) + norms + sinks + biases


def _latent_attention_parameters(model: ModelConfig) -> int:
    hidden, heads, rank = model.hidden_size, model.num_heads, model.kv_lora_rank
    queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent = rank + model.qk_rope_head_dim
    count = hidden * latent + rank + rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    count += heads * model.v_head_dim * hidden
    biases = latent + hidden
    if model.q_lora_rank is None:
        count += hidden * queries
    else:
        count += model.q_lora_rank * (hidden + 1 + queries)
        biases += model.q_lora_rank
    return count + (biases if model.attention_bias else 0)


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    The usual convention (Kaplan et al., 2020; Chowdhery et al., 2022): 6 for each active parameter, with the head but
    without the embedding lookup, and for the attention scores and values 6 * heads * (query width + value width) for
    each position looked at: half of all on average, because it is causal, and fewer through a sliding window.
    Recomputation, dropped or padded tokens do not count.
    """
    _, active = num_parameters(model)
    lookup = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    widths = 2 * model.head_dim
    if model.family is Family.deepseek_v3:
        widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    looked_at = sum(_mean_context(model, layer, seq_len) for layer in range(model.num_layers))
    return 6.0 * (active - lookup) + 6.0 * model.num_heads * widths * looked_at


def _mean_context(model: ModelConfig, layer: int, seq_len: int) -> float:
    """Positions that a token attends to, averaged over the sequence."""
    window = model.sliding_window
    slides = model.sliding_layers is None or layer in model.sliding_layers
    if window is None or not slides or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name (`torch.cuda.get_device_name()`); None if it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((peak for needed, peak in _DENSE_BF16_PEAKS if needed <= words), None)
