"""Rules about data: what a run trains on, and how texts become shards."""

import math
from pathlib import Path

from moe_trainer.config.checks import at_least, at_most, positive
from moe_trainer.config.commands import PrepareCommandConfig, VerifyDataConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DataConfig, ModelConfig, PrepareConfig


def check_data(data: DataConfig, model: ModelConfig) -> None:
    """Sources, sizes, and files that must be there; see `validate`."""
    _check_source(data)
    if data.validation_path is not None:
        check_source_file("data.validation_path", data.validation_path)
    if data.tokenizer not in (None, "byte"):
        check_file("data.tokenizer", data.tokenizer, "; give byte or the path of a tokenizer.json")
    for name in ("micro_batch_size", "global_batch_size"):
        at_least(f"data.{name}", getattr(data, name), 1)
        at_most(f"data.{name}", getattr(data, name), 2**24)
    if data.seq_len is not None:
        at_least("data.seq_len", data.seq_len, 1)
        if data.seq_len > model.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len={data.seq_len} must be at most "
                f"model.max_position_embeddings({model.max_position_embeddings})"
            )
    elif data.mixture or will_prepare(data) or (data.path is not None and Path(data.path).is_dir()):
        raise ConfigError("data.seq_len must be given for prepared data: the tokens of a sample")


def will_prepare(data: DataConfig) -> bool:
    """Whether the run makes `data.path` itself, because it is not there."""
    return bool(data.prepare.inputs) and data.path is not None and not Path(data.path).exists()


def check_prepare(cfg: PrepareCommandConfig) -> None:
    """The config of `moe-data prepare`."""
    if not cfg.out:
        raise ConfigError("out=DIR must be given: the folder to write")
    if not cfg.inputs:
        raise ConfigError("name the files to prepare: moe-data prepare FILE... out=DIR")
    _check_settings(cfg, "")


def check_verify_data(cfg: VerifyDataConfig) -> None:
    """The config of `moe-data verify`."""
    if not cfg.path:
        raise ConfigError("path=DIR must be given: a folder of moe-data prepare")
    check_source_file("path", cfg.path)


def check_source_file(key: str, text: str) -> None:
    """A file with text in it, or a prepared folder."""
    if not Path(text).is_dir():
        check_file(key, text)
    elif not (Path(text) / "index.json").is_file():
        raise ConfigError(f"{key}={text}: is a folder, not a file, and not one of moe-data prepare (index.json)")


def check_file(key: str, text: str, hint: str = "") -> None:
    """A file with something in it."""
    path = Path(text)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "there is no such file"
        raise ConfigError(f"{key}={text}: {what}{hint}")
    if path.stat().st_size == 0:
        raise ConfigError(f"{key}={text}: the file is empty{hint}")


def _check_source(data: DataConfig) -> None:
    given = [name for name in ("text", "path", "mixture") if getattr(data, name) not in (None, {})]
    if len(given) != 1:
        what = " and ".join(f"data.{name}" for name in given)
        problem = f"{what} are" if given else "none is"
        raise ConfigError(f"data.text, data.path or data.mixture must be given, exactly one of them; {problem}")
    if data.text == "":
        raise ConfigError("data.text is empty; give some text, or a file with data.path=FILE")
    if data.prepare.inputs:
        if data.path is None:
            raise ConfigError("data.prepare.inputs needs data.path=DIR: the folder to write")
        _check_settings(data.prepare, "data.prepare.")
    if data.path is not None and not will_prepare(data):
        check_source_file("data.path", data.path)
    for path, share in data.mixture.items():
        if not (share > 0 and math.isfinite(share)):
            raise ConfigError(f"data.mixture: the share {share} of {path} must be above 0")
        if not (Path(path) / "index.json").is_file():
            raise ConfigError(f"data.mixture: {path} is no prepared folder (index.json); moe-data prepare writes one")


def _check_settings(cfg: PrepareConfig, prefix: str) -> None:
    if cfg.tokenizer != "byte" and cfg.train_tokenizer is not None:
        raise ConfigError(f"{prefix}tokenizer and {prefix}train_tokenizer are both given; one is enough")
    if cfg.tokenizer != "byte":
        check_file(f"{prefix}tokenizer", cfg.tokenizer, "; give byte or the path of a tokenizer.json")
    if cfg.train_tokenizer is not None:
        at_least(f"{prefix}train_tokenizer", cfg.train_tokenizer, 258)
        at_most(f"{prefix}train_tokenizer", cfg.train_tokenizer, 2**22)  # the library makes room for all at once
    if cfg.chat_template is not None:
        check_file(f"{prefix}chat_template", cfg.chat_template)
    if not 0 <= cfg.validation_share < 1:
        raise ConfigError(f"{prefix}validation_share={cfg.validation_share} must be at least 0 and below 1")
    at_least(f"{prefix}seed", cfg.seed, 0)
    positive(f"{prefix}shard_tokens", cfg.shard_tokens)
