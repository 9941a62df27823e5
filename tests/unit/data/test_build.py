"""From a run's config to its loaders."""

import json
import logging
from pathlib import Path

import pytest
import torch

from moe_trainer.config.choices import Packing
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, DataConfig, ModelConfig, PrepareConfig
from moe_trainer.data.build import build_loader, build_validation_loader
from moe_trainer.data.prepare import prepare
from moe_trainer.data.tokenizer import load_tokenizer, train_tokenizer


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of six byte tokens, a quarter of them held out, in many shards."""
    path = write_lines(
        tmp_path / "a.jsonl", [f"text{number % 10}" if number < 3 else f"te{number}x" for number in range(40)]
    )
    prepare(PrepareConfig([path], validation_share=0.25, shard_tokens=60), tmp_path / "out")
    return tmp_path / "out"


def config(**data: object) -> Config:
    return Config(data=DataConfig(**data))


def test_one_sentence_repeated_over_the_batch() -> None:
    sentence = "x" * 199
    loader, tokenizer = build_loader(config(text=sentence), 264, data_rank=1, data_size=2)
    batch = loader.batch(3)
    assert batch.input_ids.shape == (4, 199) and batch.documents is None
    assert loader.grad_accum_steps == 4
    assert loader.seq_len == 199
    assert tokenizer.decode(batch.input_ids[0].tolist()) == sentence
    assert (batch.labels[:, -1] == 256).all()
    assert build_validation_loader(config(text=sentence), 264, 0, 1) is None


def test_a_text_longer_than_the_model_is_cut_to_its_context() -> None:
    cfg = Config(data=DataConfig(text="x" * 99), model=ModelConfig(max_position_embeddings=50))
    assert (len(build_loader(cfg, 264, 0, 1)[0].sources[0]), build_loader(cfg, 264, 0, 1)[0].seq_len) == (2, 50)
    cfg.data.seq_len = 33
    assert (len(build_loader(cfg, 264, 0, 1)[0].sources[0]), build_loader(cfg, 264, 0, 1)[0].seq_len) == (3, 33)


def test_token_ids_beyond_the_embedding_are_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match="data.tokenizer=byte gives token id 256, but model.vocab_size=256"):
        build_loader(config(text="a"), 256, 0, 1)
    for build in (build_loader, build_validation_loader):
        with pytest.raises(ConfigError, match="has token id 256, but model.vocab_size=256: .* at least 257"):
            build(config(path=str(folder), seq_len=4), 256, 0, 1)


def test_a_prepared_folder_brings_its_tokenizer_and_its_held_out_documents(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(path=str(folder), seq_len=7)
    with caplog.at_level(logging.INFO):
        loader, tokenizer = build_loader(cfg, 264, 0, 1)
    index = json.loads((folder / "index.json").read_text())
    assert f"unigram entropy: {index['unigram_entropy']:.4f} nats" in caplog.messages
    validation = build_validation_loader(cfg, 264, 0, 1)

    def texts(one, batches: int) -> set[str]:
        rows = [one.batch(number * 8) for number in range(batches)]
        ids = [
            row[numbers == number]
            for batch in rows
            for row, numbers in documents(batch)
            for number in numbers.unique()
        ]
        return {tokenizer.decode(part.tolist()) for part in ids}

    def documents(batch):
        nothing = torch.zeros_like(batch.input_ids)
        return zip(batch.input_ids, nothing if batch.documents is None else batch.documents.numbers, strict=True)

    trained, held_out = texts(loader, loader.num_batches), texts(validation, validation.num_batches)
    whole = {text for text in held_out if len(text) >= 5}
    assert len(whole) >= 4 and not whole & trained
    tokens = sum(entry["tokens"] - entry["documents"] for entry in index["validation"])
    counted = [validation.num_tokens(number * 8) for number in range(validation.num_batches)]
    assert 0.6 * tokens < sum(counted) <= tokens
    assert counted[-1] > 0 and validation.num_tokens(validation.num_batches * 8) == 0


def test_validation_of_a_text_or_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "v.jsonl", ["held", "out"])
    validation = build_validation_loader(config(text="abc", validation_path=path), 264, 0, 1)
    assert validation.num_batches == 1 and validation.num_tokens(0) == 7
    validation = build_validation_loader(config(path=str(folder), seq_len=7, validation_path=path), 264, 0, 1)
    assert validation.seq_len == 7 and validation.num_tokens(0) == 4 + 3
    prepare(PrepareConfig([path]), tmp_path / "v")
    cfg = config(path=str(folder), seq_len=20, validation_path=str(tmp_path / "v"))
    assert build_validation_loader(cfg, 264, 0, 1).num_tokens(0) == 7
    prepare(PrepareConfig([path], seed=1, train_tokenizer=300), tmp_path / "other")
    cfg.data.validation_path = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="were prepared with different tokenizers"):
        build_validation_loader(cfg, 264, 0, 1)


def test_validation_of_another_tokenizer_is_refused_for_a_text_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "v.jsonl", ["held", "out"])
    prepare(PrepareConfig([path]), tmp_path / "byte")
    prepare(PrepareConfig([path], train_tokenizer=300), tmp_path / "trained")
    cfg = config(path=path, seq_len=7, validation_path=str(tmp_path / "byte"))
    assert build_validation_loader(cfg, 300, 0, 1) is not None
    cfg.data.validation_path = str(tmp_path / "trained")
    with pytest.raises(ConfigError, match="trained was prepared with another tokenizer than data.tokenizer=byte"):
        build_validation_loader(cfg, 300, 0, 1)
    cfg.data.tokenizer = str(tmp_path / "trained" / "tokenizer.json")
    assert build_validation_loader(cfg, 300, 0, 1) is not None


def test_a_mixture(folder: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig([write_lines(tmp_path / "b.jsonl", ["!" * 30])]), tmp_path / "b")
    cfg = config(mixture={str(folder): 3, str(tmp_path / "b"): 1}, seq_len=8, global_batch_size=4096)
    batch = build_loader(cfg, 264, 0, 1)[0].batch(0)
    assert ((batch.input_ids == ord("!")).any(1)).sum() == 1024
    cfg.data.global_batch_size = 8
    alone = build_validation_loader(config(path=str(folder), seq_len=8), 264, 0, 1)
    assert build_validation_loader(cfg, 264, 0, 1).num_tokens(0) == alone.num_tokens(0) > 0


@pytest.mark.parametrize("packing", Packing)
def test_packing_is_by_choice(packing: Packing, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["abc", "defg"])
    loader = build_loader(config(path=path, seq_len=8, packing=packing, global_batch_size=2), 264, 0, 1)[0]
    batch = loader.batch(0)
    assert (batch.documents is not None) == (packing is Packing.documents)
    assert (batch.labels == -100).any() == (packing is Packing.documents)


def test_the_tokenizer_may_be_named_too_but_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    load_tokenizer("byte").save(str(tmp_path / "same.json"))
    train_tokenizer(["abc"], 300).save(str(tmp_path / "other.json"))
    for name in ("byte", str(tmp_path / "same.json")):
        build_loader(config(path=str(folder), seq_len=7, tokenizer=name), 264, 0, 1)
    with pytest.raises(
        ConfigError, match="other.json, .* is not what .*out was made with: give .*null.* model.vocab_size=257 "
    ):
        build_loader(config(path=str(folder), seq_len=7, tokenizer=str(tmp_path / "other.json")), 264, 0, 1)


def test_prepared_data_needs_a_length(folder: Path) -> None:
    with pytest.raises(ConfigError, match="data.seq_len must be given for prepared data"):
        build_loader(config(path=str(folder)), 264, 0, 1)


def test_conversations_need_to_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(ConfigError, match="a.jsonl, line 1: `messages` need a chat template; use moe-data prepare"):
        build_loader(config(path=str(tmp_path / "a.jsonl")), 264, 0, 1)
