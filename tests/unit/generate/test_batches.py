"""Prompts of different lengths together: each comes out as alone, and as transformers says, in every family."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from moe_trainer.config.choices import Family, Quantization, RopeType
from moe_trainer.config.schema import ModelConfig, RopeConfig
from moe_trainer.generate import decoding
from moe_trainer.generate.decoding import DecodeStep, _chooser, generate, pad_left
from moe_trainer.generate.quantization import quantize_model
from moe_trainer.generate.sampling import Sampler, Sampling
from moe_trainer.models.attention import KVCache
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.registry import FAMILIES
from tests.unit.models.against_transformers import from_folder, randomize

NEW_TOKENS = 9
VOCAB = 61
LENGTHS = (3, 11, 1, 7)  # the window of 4 begins inside, at the edge of and after the prompts

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def hub_model(family: str) -> PreTrainedModel:
    """A random model of transformers, in float64."""
    if family == "mixtral":
        config = transformers.MixtralConfig(
            **_COMMON, intermediate_size=24, num_key_value_heads=2, num_local_experts=4, sliding_window=4
        )
    elif family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **_COMMON,
            intermediate_size=24,
            moe_intermediate_size=16,
            num_key_value_heads=2,
            num_experts=8,
            head_dim=12,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        )
    elif family == "olmoe":
        config = transformers.OlmoeConfig(
            **_COMMON, intermediate_size=24, num_key_value_heads=4, num_experts=4, clip_qkv=0.9
        )
    elif family == "deepseek_v3":
        config = transformers.DeepseekV3Config(
            **_COMMON,
            intermediate_size=24,
            moe_intermediate_size=16,
            num_key_value_heads=4,
            n_routed_experts=8,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_nope_head_dim=10,
            qk_rope_head_dim=8,
            v_head_dim=14,
            rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        )
    else:
        config = transformers.GptOssConfig(
            **_COMMON,
            intermediate_size=16,
            num_key_value_heads=2,
            num_local_experts=4,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=_YARN | {"truncate": False},
        )
    torch.manual_seed(0)
    # PyTorch's grouped product, which it would take, knows no float64.
    return randomize(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"))


HUB_FAMILIES = [family.value for family in Family]


@pytest.fixture(scope="module", params=HUB_FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CausalLM, PreTrainedModel]:
    """The same weights here and in transformers, in float64."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs = hub_model(request.param)
    theirs.save_pretrained(folder)
    _, ours = from_folder(folder)
    return ours.double().requires_grad_(False), theirs.double()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def follow(model: CausalLM, batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, new] and the logits that they were chosen from, [batch, new, vocab]."""
    seen = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    tokens = torch.stack(list(generate(model, batch, NEW_TOKENS, choose)), dim=1)
    return tokens, torch.stack(seen, dim=1)


def test_each_prompt_comes_out_as_alone(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    ours, _ = pair
    tokens, logits = follow(ours, prompts())
    for row, prompt in enumerate(prompts()):
        alone_tokens, alone_logits = follow(ours, [prompt])
        assert torch.equal(tokens[row], alone_tokens[0])
        assert (logits[row] - alone_logits[0]).abs().max() <= 1e-9
        # And as without a cache, a mask or a step.
        whole = ours(torch.tensor([prompt + alone_tokens[0].tolist()])).logits[0, len(prompt) - 1 : -1]
        assert (alone_logits[0] - whole).abs().max() <= 1e-9
    assert len({tuple(row) for row in tokens.tolist()}) == len(LENGTHS)


def test_the_same_tokens_as_transformers_with_padding_on_the_left(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    ours, theirs = pair
    input_ids, starts = pad_left(prompts(), torch.device("cpu"))
    attention_mask = (torch.arange(input_ids.shape[1]) >= starts.unsqueeze(1)).long()
    expected = theirs.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens = torch.stack(list(generate(ours, prompts(), NEW_TOKENS)), dim=1)
    assert torch.equal(tokens, expected[:, input_ids.shape[1] :])


def test_equal_lengths_have_no_padding_and_no_mask() -> None:
    input_ids, starts = pad_left([[1, 2], [3, 4]], torch.device("cpu"))
    assert input_ids.tolist() == [[1, 2], [3, 4]] and starts is None
    cache = KVCache(1, 4)
    cache.advance(2, torch.device("cpu"))
    assert cache.mask(None) is None and cache.mask(2) is None and cache.mask(1) is not None
    input_ids, starts = pad_left([[1], [3, 4]], torch.device("cpu"))
    assert input_ids.tolist() == [[0, 1], [3, 4]] and starts.tolist() == [1, 0]


def test_what_stands_in_the_padding_does_not_matter(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    """Neither for attention nor for the experts that the others go to."""
    ours, _ = pair
    input_ids, starts = pad_left(prompts(), torch.device("cpu"))
    padding = torch.arange(input_ids.shape[1]) < starts.unsqueeze(1)
    generator = torch.Generator().manual_seed(2)
    outputs = []
    for noise in (input_ids, torch.randint(VOCAB, input_ids.shape, generator=generator)):
        ids = torch.where(padding, noise, input_ids)
        cache = KVCache(len(ours.model.layers), input_ids.shape[1], starts)
        outputs.append(ours(ids, cache))
    assert (outputs[0].logits - outputs[1].logits).abs().max() <= 1e-12
    for before, after in zip(*(output.routings for output in outputs), strict=True):
        choices = before.top_k_index, after.top_k_index
        assert torch.equal(*(choice[~padding.flatten()] for choice in choices))
        assert not torch.equal(*choices)  # the noise did go through


def test_the_step_works_in_place(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    """The same memory and shapes each time, as a graph needs them, and the tokens of the plain loop."""
    ours, _ = pair
    input_ids, starts = pad_left(prompts(), torch.device("cpu"))
    cache = KVCache(len(ours.model.layers), input_ids.shape[1] + NEW_TOKENS, starts)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    step = DecodeStep(ours, cache, choose, choose(ours(input_ids, cache).logits[:, -1]))
    tokens, places = [step.tokens.clone()], set()
    for _ in range(NEW_TOKENS - 1):
        step()
        tokens.append(step.tokens.clone())
        keys, values = cache._layers[0]
        places.add((step.tokens.data_ptr(), keys.data_ptr(), values.data_ptr(), keys.shape, cache.mask(None).shape))
    assert len(places) == 1
    expected, _ = follow(ours, prompts())
    assert torch.equal(torch.stack(tokens, dim=1), expected)


_SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    top_k=2,
    rope=RopeConfig(1e4, RopeType.yarn, 4.0, 16),
)
MODELS = {
    Family.mixtral: replace(_SMALL, sliding_window=4),
    Family.qwen3_moe: replace(
        _SMALL, family=Family.qwen3_moe, dense_layers=[1], dense_intermediate_size=24, num_kv_heads=1
    ),
    Family.olmoe: replace(_SMALL, family=Family.olmoe, norm_topk_prob=False, clip_qkv=0.8),
    Family.deepseek_v3: replace(
        _SMALL,
        family=Family.deepseek_v3,
        num_kv_heads=4,
        head_dim=18,
        num_shared_experts=1,
        num_expert_groups=4,
        top_k_groups=2,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=14,
    ),
    Family.gpt_oss: replace(
        _SMALL, family=Family.gpt_oss, sliding_window=4, sliding_layers=[0], attention_bias=True, swiglu_limit=0.8
    ),
}
"""Of each family a small one, wide enough for the grouped GEMM in bfloat16."""


def meta_step(family: Family, quantization: Quantization, sampling: Sampling | None) -> DecodeStep:
    """A step on the meta device, where there is nothing to read: a host read raises."""
    device = torch.device("meta")
    with device:
        model = FAMILIES[family].build(MODELS[family]).bfloat16().requires_grad_(False)
    quantize_model(model, quantization)
    input_ids, starts = torch.zeros(3, 4, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64)
    cache = KVCache(len(model.model.layers), 9, starts.to(device))
    choose = _chooser(None if sampling is None else Sampler(sampling, [0, 1, 2], 9, device), None)
    return DecodeStep(model, cache, choose, choose(model(input_ids, cache).logits[:, -1]))


@pytest.mark.parametrize("sampling", [None, Sampling(0.7, 5, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", Family)
def test_the_step_reads_nothing_on_the_host(family: Family, sampling: Sampling | None) -> None:
    step = meta_step(family, Quantization.none, sampling)
    step()
    step()
    assert step.tokens.shape == (3,)


def test_nor_with_weights_in_8_bits() -> None:
    meta_step(Family.gpt_oss, Quantization.int8, None)()


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_is_captured_unless_it_waits(
    pair: tuple[CausalLM, PreTrainedModel], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder that only counts: no step is left out or done twice around the capture."""
    ours, _ = pair
    done = []

    def waits_for_host(run: Callable[[], None]) -> bool:
        done.append("watched")
        run()
        return waits

    def record(run: Callable[[], None]) -> Callable[[], None]:
        done.append("recorded")

        def replay() -> None:
            done.append("replayed")
            run()

        return replay

    monkeypatch.setattr(decoding, "_waits_for_host", waits_for_host)
    monkeypatch.setattr(decoding, "_record", record)
    input_ids, starts = pad_left(prompts(), torch.device("cpu"))
    cache = KVCache(len(ours.model.layers), input_ids.shape[1] + NEW_TOKENS, starts)
    first = ours(input_ids, cache).logits[:, -1].argmax(-1)
    step = DecodeStep(ours, cache, lambda logits: logits.argmax(-1), first, captures=True)
    tokens = torch.stack(list(decoding._read_behind(step, NEW_TOKENS)), dim=1)
    assert torch.equal(tokens, follow(ours, prompts())[0])
    assert done == ["watched"] + ([] if waits else ["recorded"] + ["replayed"] * (NEW_TOKENS - 1 - 2))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
