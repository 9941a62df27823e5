"""Folders of every family there and back: bfloat16 files with an index, tied heads, a head stored twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from tests.unit.models.against_transformers import assert_same_as, from_folder, randomize, tensors_of
from tests.unit.models.test_deepseek_v3 import theirs as deepseek_v3
from tests.unit.models.test_families_hf import MIXTRAL, OLMOE, QWEN3_MOE
from tests.unit.models.test_gpt_oss import theirs as gpt_oss

FAMILIES = {
    "mixtral": lambda **options: randomize(MixtralForCausalLM(MixtralConfig(**MIXTRAL | options))),
    "qwen3_moe": lambda **options: randomize(
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_MOE | {"mlp_only_layers": [1]} | options))
    ),
    "olmoe": lambda **options: randomize(OlmoeForCausalLM(OlmoeConfig(**OLMOE | options))),
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def export(folder: Path, cfg: ModelConfig, tensors: dict[str, torch.Tensor], dtype: DType, max_shard: int) -> Path:
    documents = {
        "model.json": model_config_to_json(cfg),
        "tokenizer.json": load_tokenizer("byte").to_str(),
        "state.json": "{}",
    }
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = CheckpointManager(folder / "checkpoints", keep_last=None).save(1, stored, documents)
    export_checkpoint(checkpoint, folder / "out", max_shard, dtype, workers=2)
    return folder / "out"


def assert_equal(left: PreTrainedModel, right: PreTrainedModel) -> None:
    expected = right.state_dict()
    assert left.state_dict().keys() == expected.keys()
    for name, value in left.state_dict().items():
        assert torch.equal(value.float(), expected[name].float()), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_in_shards_there_and_back(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = FAMILIES[family](tie_word_embeddings=tied).bfloat16()
    theirs.save_pretrained(tmp_path / "hub", max_shard_size="15KB")
    assert len(json.loads((tmp_path / "hub/model.safetensors.index.json").read_text())["weight_map"]) > 20
    cfg, ours = from_folder(tmp_path / "hub")
    out = export(tmp_path, cfg, tensors_of(ours), DType.bfloat16, 15_000)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in out.glob("*.safetensors")}
    assert set(weight_map.values()) == files and len(files) > 3
    assert (HEAD in weight_map) != tied
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == torch.bfloat16 and again.config.tie_word_embeddings == tied
    assert_equal(again, theirs)


def with_head(folder: Path, model: PreTrainedModel, **change: torch.Tensor) -> dict[str, torch.Tensor]:
    """The folder of a tied model, whose file holds the head too."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    save_file(tensors | {HEAD: change.get("head", tensors[EMBEDDING]).clone()}, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_that_is_stored_too(family: str, tmp_path: Path) -> None:
    theirs = FAMILIES[family](tie_word_embeddings=True)
    tensors = with_head(tmp_path, theirs)
    cfg, ours = from_folder(tmp_path)
    assert cfg.tie_word_embeddings and torch.equal(ours.model.embed_tokens.weight, tensors[EMBEDDING])
    assert HEAD not in dict(ours.named_parameters())
    ids = torch.arange(9)[None]
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_that_differs_is_refused(family: str, tmp_path: Path) -> None:
    theirs = FAMILIES[family](tie_word_embeddings=True)
    other = theirs.state_dict()[EMBEDDING].clone()
    other[-1, -1] += 1e-3
    with_head(tmp_path, theirs, head=other)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not equal to model\.embed_tokens\.weight, though"):
        from_folder(tmp_path)
    with_head(tmp_path, theirs, head=other[:-1])
    with pytest.raises(ConfigError, match=r"lm_head\.weight: shape "):
        from_folder(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_that_is_missing_is_named(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit the model: missing: lm_head\.weight$"):
        from_folder(tmp_path)


def no_shared_experts(**options: Any) -> DeepseekV3ForCausalLM:
    """transformers makes matrices of width zero, which `randomize` cannot scale."""
    donor = deepseek_v3(**options)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**donor.config.to_dict() | {"n_shared_experts": 0}))
    fitting = {name: value for name, value in donor.state_dict().items() if "shared_experts" not in name}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    assert not unexpected and len(missing) == 6 and all("shared_experts" in name for name in missing)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_deepseek_v3_without_shared_experts(tmp_path: Path) -> None:
    theirs = no_shared_experts()
    theirs.save_pretrained(tmp_path / "hub")
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    cfg, ours = from_folder(tmp_path / "hub")
    assert cfg.num_shared_experts == 0 and not any("shared" in name for name in tensors_of(ours))
    out = export(tmp_path, cfg, tensors_of(ours), DType.auto, 10**9)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert_equal(again, theirs)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)

    without = {key: value for key, value in stored.items() if value.numel()}  # some writers leave them out
    save_file(without, tmp_path / "hub" / "model.safetensors")
    from_folder(tmp_path / "hub")
    key = "model.layers.1.mlp.shared_experts.up_proj.weight"
    save_file(without | {key: torch.ones(3, 32)}, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"{key}: shape \[3, 32\] in the file, \[0, 32\] here$"):
        from_folder(tmp_path / "hub")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_deepseek_v3_without_shared_experts_in_everything(tmp_path: Path) -> None:
    assert_same_as(no_shared_experts(q_lora_rank=10), tmp_path)
