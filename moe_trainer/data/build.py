"""The loaders of a run, from its config."""

import logging
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moe_trainer.config.choices import DeviceName
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, DataConfig
from moe_trainer.data.loader import Loader
from moe_trainer.data.packing import Samples
from moe_trainer.data.shards import (
    TRAIN,
    VALIDATION,
    Encoded,
    Index,
    Shard,
    is_prepared,
    map_shards,
    read_index,
    read_tokenizer,
)
from moe_trainer.data.sources import read_documents, read_texts
from moe_trainer.data.tokenizer import digest, encode_texts, load_tokenizer

_logger = logging.getLogger(__name__)
_ENCODE_AT_ONCE = 1024


def build_loader(cfg: Config, vocab_size: int, data_rank: int, data_size: int) -> tuple[Loader, Tokenizer]:
    """What `cfg.data` names, packed and dealt to one data rank.

    Args:
        vocab_size: rows of the model's embedding, after `model.init_from`.

    Raises:
        ConfigError: data, tokenizer or sizes that cannot work; nothing has been written by then.
    """
    data = cfg.data
    folders = _folders(data)
    tokenizer = _tokenizer(data, folders)
    if folders:
        for folder in folders:
            _logger.info("%s: %s", folder.path, folder.index.describe())
            _logger.info("unigram entropy: %.4f nats", folder.index.unigram_entropy)
        shards = [folder.shards(TRAIN, vocab_size) for folder in folders]
        sources = [Samples(parts, _given_seq_len(data), data.packing) for parts in shards]
    else:
        shard = _encoded(read_documents(data), tokenizer, vocab_size, data.tokenizer or "byte")
        sources = [Samples([shard], _seq_len(data, shard, cfg.model.max_position_embeddings), data.packing)]
    shares = list(data.mixture.values()) if data.mixture else None
    return _loader(cfg, sources, data_rank, data_size, shares=shares), tokenizer


def build_validation_loader(cfg: Config, vocab_size: int, data_rank: int, data_size: int) -> Loader | None:
    """What a run evaluates on: `data.validation_path`, else what its prepared folders hold out; None if nothing.

    Its samples are as long as the training samples and as large a batch; they come once, in a fixed order, in
    `num_batches` global batches, the last filled up with samples that have no labels:

        for number in range(loader.num_batches):
            position = number * loader.global_batch_size
            batch, num_tokens = loader.batch(position), loader.num_tokens(position)

    Raises:
        ConfigError: as `build_loader`.
    """
    data = cfg.data
    path = data.validation_path
    if path is None or is_prepared(Path(path)):
        folders = _folders(data) if path is None else [_Folder.open(path)]
        trained = _folders(data)
        tokenizer = _tokenizer(data, [*trained, *folders])
        if not trained and folders and digest(load_tokenizer(data.tokenizer or "byte")) != digest(tokenizer):
            raise ConfigError(
                f"data.validation_path={path} was prepared with another tokenizer than data.tokenizer="
                f"{data.tokenizer or 'byte'}, which makes the tokens to train on; prepare both alike"
            )
        held_out = [shards for folder in folders if (shards := folder.shards(VALIDATION, vocab_size))]
        if path is not None and not held_out:  # a folder of its own may hold nothing out
            held_out = [folders[0].shards(TRAIN, vocab_size)]
        sources = [Samples(shards, _given_seq_len(data), data.packing) for shards in held_out]
    else:
        tokenizer = _tokenizer(data, _folders(data))
        texts = read_texts(path, "data.validation_path")
        shard = _encoded(texts, tokenizer, vocab_size, data.tokenizer or "byte")
        sources = [Samples([shard], _seq_len(data, shard, cfg.model.max_position_embeddings), data.packing)]
    if not sources:
        return None
    return _loader(cfg, sources, data_rank, data_size, shuffles=False)


@dataclass(slots=True)
class _Folder:
    """A prepared folder."""

    path: Path
    index: Index
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str) -> "_Folder":
        path = Path(name)
        index = read_index(path)
        return cls(path, index, read_tokenizer(path, index))

    def shards(self, split: str, vocab_size: int) -> list[Shard]:
        if self.index.highest_token >= vocab_size:
            raise ConfigError(
                f"{self.path} has token id {self.index.highest_token}, but model.vocab_size={vocab_size}: "
                f"set model.vocab_size to at least {self.index.highest_token + 1}"
            )
        return map_shards(self.path, self.index, split)


def _folders(data: DataConfig) -> list[_Folder]:
    """Of `data.mixture` or `data.path`; none where that is a text."""
    if data.mixture:
        return [_Folder.open(path) for path in data.mixture]
    return [_Folder.open(data.path)] if data.path is not None and Path(data.path).is_dir() else []


def _tokenizer(data: DataConfig, folders: list[_Folder]) -> Tokenizer:
    """The folders' own, which must be one and, if the config names one too, that."""
    if not folders:
        return load_tokenizer(data.tokenizer or "byte")
    first = folders[0]
    for folder in folders[1:]:
        if folder.index.tokenizer != first.index.tokenizer:
            raise ConfigError(f"{folder.path} and {first.path} were prepared with different tokenizers")
    if data.tokenizer is not None and digest(load_tokenizer(data.tokenizer)) != first.index.tokenizer:
        size = first.tokenizer.get_vocab_size()
        raise ConfigError(
            f"data.tokenizer={data.tokenizer}, as given or in the recipe, is not what {first.path} was made with: "
            f"give data.tokenizer=null, which takes its own, and model.vocab_size={size} or more"
        )
    return first.tokenizer


def _encoded(texts: list[str], tokenizer: Tokenizer, vocab_size: int, name: str) -> Shard:
    """The texts in memory.

    Raises:
        ConfigError: a token id that the embedding has no row for.
    """
    documents = []
    for start in range(0, len(texts), _ENCODE_AT_ONCE):
        documents += [Encoded(ids) for ids in encode_texts(texts[start : start + _ENCODE_AT_ONCE], tokenizer)]
    shard = Shard.of(documents)
    highest = int(shard.tokens.max(initial=0))
    if highest >= vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} gives token id {highest}, but model.vocab_size={vocab_size}: "
            f"set model.vocab_size to at least {highest + 1}"
        )
    return shard


def _given_seq_len(data: DataConfig) -> int:
    if data.seq_len is None:
        raise ConfigError("data.seq_len must be given for prepared data: the tokens of a sample")
    return data.seq_len


def _seq_len(data: DataConfig, shard: Shard, context: int) -> int | None:
    """None, each document a sample, unless the config or the longest document speaks against it."""
    longest = shard.longest_document() - 1
    if data.seq_len is not None or longest <= context:
        return data.seq_len
    _logger.info("the longest document has %d tokens: cut into samples of %d (data.seq_len)", longest, context)
    return context


def _loader(
    cfg: Config,
    sources: list[Samples],
    data_rank: int,
    data_size: int,
    shares: list[float] | None = None,
    shuffles: bool = True,
) -> Loader:
    return Loader(
        sources,
        cfg.data.global_batch_size,
        cfg.data.micro_batch_size,
        cfg.seed,
        data_rank,
        data_size,
        shares=shares,
        shuffles=shuffles,
        pins_memory=cfg.device is DeviceName.cuda,
    )
