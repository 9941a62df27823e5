"""`moe-checkpoint export`: its workers, and what transformers' `generate` does with the folder."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.cli import checkpoint as command
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.models.mixtral.model import build_mixtral

SHAPE = ModelConfig(
    vocab_size=264, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
END = 256


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    """A model whose every next token is the end of text: each position stays 1 up to its head's row."""
    torch.manual_seed(0)
    values = {f"model.{name}": torch.randn_like(value) for name, value in build_mixtral(SHAPE).named_parameters()}
    for name, value in values.items():
        if name.endswith(("norm.weight", "embed_tokens.weight")):
            value.fill_(1)
        elif name.endswith(("o_proj.weight", "down_proj", "lm_head.weight")):
            value.zero_()
    values["model.lm_head.weight"][END] = 1
    documents = {"model.json": model_config_to_json(SHAPE), "tokenizer.json": tokenizer.to_str(), "state.json": "{}"}
    return CheckpointManager(folder, keep_last=None).save(1, values, documents)


def special(*names: str) -> Tokenizer:
    tokenizer = load_tokenizer("byte")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def test_generate_stops_at_the_end_of_text(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, special())
    assert command.main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "do_sample": False,
        "eos_token_id": END,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = model.generate(torch.tensor([[72, 105]]), max_new_tokens=9, pad_token_id=0)
    assert tokens.tolist() == [[72, 105, END]]


def test_special_tokens_are_named(tmp_path: Path) -> None:
    tokenizer = special("<s>", "<pad>")
    checkpoint = saved(tmp_path, tokenizer)
    assert command.main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}"]) == 0
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (256, 257, 258)
    assert config.do_sample is False
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("<|endoftext|>", "<s>", "<pad>")
    batch = theirs(["a", "bcd"], padding=True)
    assert [sorted(row) for row in batch["input_ids"]] == [[97, 258, 258], [98, 99, 100]]


def test_an_ordinary_token_of_that_name_has_no_role(tmp_path: Path) -> None:
    tokenizer = special()
    tokenizer.add_tokens(["<s>", "<pad>"])
    checkpoint = saved(tmp_path, tokenizer)
    assert command.main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}"]) == 0
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (256, None, None)


def test_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved(tmp_path, special())
    arguments = ["export", f"checkpoint={checkpoint}", "max_shard_size=9KB"]
    for workers in (1, 3):
        assert command.main([*arguments, f"out={tmp_path / str(workers)}", f"workers={workers}"]) == 0
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 3
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    capsys.readouterr()
    assert command.main([*arguments, f"out={tmp_path / 'none'}", "workers=0"]) == 2
    assert capsys.readouterr().err.startswith("moe-checkpoint: workers=0 must be at least 1")
    assert not (tmp_path / "none").exists()
