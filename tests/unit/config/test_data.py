"""Rules about data, each refused in one line before anything is read."""

from pathlib import Path

import pytest

from moe_trainer.config.commands import PrepareCommandConfig, VerifyDataConfig
from moe_trainer.config.data import check_data, check_prepare, check_verify_data, will_prepare
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DataConfig, ModelConfig, PrepareConfig


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    Path("empty").touch()
    Path("folder").mkdir()
    Path("prepared").mkdir()
    Path("prepared/index.json").write_text("{}")


INPUTS = PrepareConfig(["a.txt"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(mixture={}), "data.text, data.path or data.mixture must be given, exactly one of them; none is"),
        (DataConfig(text="a", mixture={"b": 1.0}), "exactly one of them; data.text and data.mixture are"),
        (DataConfig(path="none"), "data.path=none: there is no such file"),
        (DataConfig(path="folder", seq_len=4), "data.path=folder: is a folder, not a file, and not one of moe-data"),
        (DataConfig(path="prepared"), "data.seq_len must be given for prepared data"),
        (DataConfig(mixture={"prepared": 1.0}), "data.seq_len must be given for prepared data"),
        (DataConfig(mixture={"prepared": 0.0}), "data.mixture: the share 0.0 of prepared must be above 0"),
        (DataConfig(mixture={"prepared": float("inf")}), "data.mixture: the share inf of prepared must be above 0"),
        (DataConfig(mixture={"folder": 1.0}), "data.mixture: folder is no prepared folder"),
        (DataConfig(text="a", validation_path="empty"), "data.validation_path=empty: the file is empty"),
        (DataConfig(text="a", validation_path="folder"), "data.validation_path=folder: is a folder"),
        (DataConfig(text="a", prepare=INPUTS), "data.prepare.inputs needs data.path=DIR"),
        (DataConfig(path="new", prepare=INPUTS), "data.seq_len must be given for prepared data"),
        (
            DataConfig(path="new", seq_len=4, prepare=PrepareConfig(["a.txt"], tokenizer="bpe")),
            "data.prepare.tokenizer=bpe: there is no such file",
        ),
    ],
)
def test_data_mistakes(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_data(data, ModelConfig())


def test_what_is_fine() -> None:
    for data in (
        DataConfig(text="a"),
        DataConfig(path="a.txt", validation_path="prepared"),
        DataConfig(path="prepared", seq_len=4, prepare=INPUTS),
        DataConfig(path="new", seq_len=4, prepare=INPUTS),
        DataConfig(mixture={"prepared": 0.3}, seq_len=4),
    ):
        check_data(data, ModelConfig())
    assert will_prepare(DataConfig(path="new", prepare=INPUTS))
    assert not will_prepare(DataConfig(path="prepared", prepare=INPUTS))
    assert not will_prepare(DataConfig(path="new"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": None}, "out=DIR must be given"),
        ({"inputs": []}, "name the files to prepare"),
        ({"train_tokenizer": 257}, "train_tokenizer=257 must be at least 258"),
        ({"train_tokenizer": 300, "tokenizer": "a.txt"}, "tokenizer and train_tokenizer are both given"),
        ({"tokenizer": "folder"}, "tokenizer=folder: is a folder, not a file"),
        ({"chat_template": "empty"}, "chat_template=empty: the file is empty"),
        ({"validation_share": 1.0}, "validation_share=1.0 must be at least 0 and below 1"),
        ({"validation_share": -0.1}, "validation_share=-0.1 must be"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be above 0"),
    ],
)
def test_prepare_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_prepare(PrepareCommandConfig(**{"inputs": ["a.txt"], "out": "new", **values}))


def test_verify_mistakes() -> None:
    for path, message in ((None, "path=DIR must be given"), ("folder", "path=folder: is a folder, not a file, and")):
        with pytest.raises(ConfigError, match=message):
            check_verify_data(VerifyDataConfig(path))
