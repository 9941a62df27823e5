"""Token shards on disk: what `moe-data prepare` writes and the loader maps into memory.

index.json               what the folder holds, with the SHA-256 of every file
tokenizer.json           what made the tokens
train-00000.tokens       uint16 or uint32, little-endian: the documents one after the other
train-00000.ends         int64: where each document ends, in tokens
train-00000.targets      uint8, where the documents are conversations: 1 for a token to be learned
validation-00000.*       the held-out documents of the same part of the input, if any
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import sync
from moe_trainer.data import tokenizer as tokenizers

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
TRAIN, VALIDATION = "train", "validation"
FORMAT = 1
_NAME = re.compile(rf"({TRAIN}|{VALIDATION})-[0-9]+")
_DTYPES = {"tokens": None, "ends": "<i8", "targets": "u1"}


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: np.ndarray
    """[tokens] integers."""
    targets: np.ndarray | None = None
    """[tokens] bool, which of them are to be learned; None: all."""


@dataclass(slots=True)
class Shard:
    """Documents one after the other."""

    tokens: np.ndarray
    """[tokens] integers."""
    ends: np.ndarray
    """[documents] int64, where each ends."""
    targets: np.ndarray | None
    """[tokens], not zero where a token is to be learned; None: all are."""
    highest_token: int
    """None is above it, it is said."""
    digest: str
    """Tells this content from any other."""

    @classmethod
    def of(cls, documents: Sequence[Encoded]) -> "Shard":
        """The documents in memory; those without targets are learned whole."""
        tokens = np.concatenate([document.ids for document in documents])
        ends = np.cumsum([len(document.ids) for document in documents], dtype=np.int64)
        targets = None
        if any(document.targets is not None for document in documents):
            targets = np.concatenate([_targets(document) for document in documents]).astype(np.uint8)
        parts = [part for part in (tokens, ends, targets) if part is not None]
        hashes = [hashlib.sha256(np.ascontiguousarray(part).data).hexdigest() for part in parts]
        return cls(tokens, ends, targets, int(tokens.max(initial=0)), "/".join(hashes))

    def longest_document(self) -> int:
        """Tokens of it."""
        return int(np.diff(self.ends, prepend=0).max())


@dataclass(slots=True)
class ShardEntry:
    """One shard as the index lists it."""

    name: str
    documents: int
    tokens: int
    sha256: dict[str, str]
    """Of each of its files, by suffix."""


@dataclass(slots=True)
class Index:
    """`index.json`."""

    request: str
    """Digest of the inputs and settings that the folder was made from."""
    dtype: str
    """Of the tokens."""
    tokenizer: str
    """Digest of the tokenizer."""
    highest_token: int
    unigram_entropy: float
    """Of the training tokens, in nats: the loss of a model that knows only how frequent each token is."""
    skipped: int
    """Documents that were left out."""
    settings: dict[str, Any]
    """Of the preparation, for people; its sources among them."""
    train: list[ShardEntry] = field(default_factory=list)
    validation: list[ShardEntry] = field(default_factory=list)

    def describe(self) -> str:
        """Documents and tokens in one line."""
        counts = [
            f"{split}: {sum(e.documents for e in entries):,} documents, {sum(e.tokens for e in entries):,} tokens"
            for split, entries in (("training", self.train), ("validation", self.validation))
            if entries
        ]
        return "; ".join(counts) + (f"; {self.skipped:,} documents left out" if self.skipped else "")


def write_shard(folder: Path, name: str, documents: Sequence[Encoded], dtype: str) -> ShardEntry:
    """Write the documents as one shard, down to the disk."""
    shard = Shard.of(documents)
    parts = {"tokens": shard.tokens.astype(f"<{np.dtype(dtype).str[1:]}"), "ends": shard.ends.astype("<i8")}
    if shard.targets is not None:
        parts["targets"] = shard.targets
    for suffix, part in parts.items():
        write_durably(folder / f"{name}.{suffix}", part.data)
    hashes = {suffix: hashlib.sha256(part.data).hexdigest() for suffix, part in parts.items()}
    return ShardEntry(name, len(documents), len(shard.tokens), hashes)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """The whole file under its name, or none, whenever the power goes."""
    partial = path.with_name(path.name + ".new")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json`, which makes the folder complete."""
    write_durably(folder / INDEX, (json.dumps({"format": FORMAT, **asdict(index)}, indent=1) + "\n").encode())


def is_prepared(path: Path) -> bool:
    """Whether the folder holds an index."""
    return os.path.isfile(path / INDEX)  # of Path, the method raises an error for a name that is too long


def read_index(folder: Path) -> Index:
    """`index.json` of a prepared folder.

    Raises:
        ConfigError: it is missing, damaged, or of another version.
    """
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) != FORMAT:
            raise ConfigError(f"{path} has format {version}, this version reads {FORMAT}; prepare the data again")
        splits = {split: [ShardEntry(**entry) for entry in values.pop(split)] for split in (TRAIN, VALIDATION)}
        index = Index(**values, **splits)
        _check_index(index)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no prepared folder (no {INDEX}); moe-data prepare writes one") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read ({error}); prepare the data again") from error
    return index


def read_tokenizer(folder: Path, index: Index) -> Tokenizer:
    """The folder's tokenizer.

    Raises:
        ConfigError: it is not the one that made the tokens.
    """
    tokenizer = tokenizers.load_tokenizer(str(folder / TOKENIZER), None)
    if tokenizers.digest(tokenizer) != index.tokenizer:
        raise ConfigError(f"{folder / TOKENIZER} is not the tokenizer that made the shards; prepare the data again")
    return tokenizer


def map_shards(folder: Path, index: Index, split: str) -> list[Shard]:
    """The shards of `train` or `validation`, mapped into memory: only what is read comes from the disk.

    Raises:
        ConfigError: a file is missing, or shorter or longer than the index says, or documents do not follow one
            another.
    """
    return [_map_shard(folder, entry, index) for entry in getattr(index, split)]


def verify(folder: Path) -> Index:
    """Compare every file with its checksum.

    Raises:
        ConfigError: the first file that is not as it was written.
    """
    index = read_index(folder)
    read_tokenizer(folder, index)
    for entry in (*index.train, *index.validation):
        _map_shard(folder, entry, index)
        for suffix, expected in entry.sha256.items():
            path = folder / f"{entry.name}.{suffix}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ConfigError(f"{path}: its checksum is not the one in {INDEX}; prepare the data again")
    return index


def _check_index(index: Index) -> None:
    """Types and ranges of all that the loader goes by.

    Raises:
        ValueError: the first that cannot be.
    """
    if index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"odd dtype {index.dtype!r}")
    if not _is_count(index.highest_token, 0, np.iinfo(index.dtype).max):
        raise ValueError(f"odd highest_token {index.highest_token!r}")
    if type(index.unigram_entropy) not in (int, float) or not 0 <= index.unigram_entropy < math.inf:
        raise ValueError(f"odd unigram_entropy {index.unigram_entropy!r}")
    if not _is_count(index.skipped, 0):
        raise ValueError(f"odd skipped {index.skipped!r}")
    if not index.train:
        raise ValueError("no training data")
    for entry in (*index.train, *index.validation):
        is_whole = (
            isinstance(entry.name, str)
            and _NAME.fullmatch(entry.name)
            and _is_count(entry.tokens, 1)
            and _is_count(entry.documents, 1, entry.tokens)
            and {"tokens", "ends"} <= entry.sha256.keys() <= _DTYPES.keys()
            and all(isinstance(value, str) for value in entry.sha256.values())
        )
        if not is_whole:
            raise ValueError(f"odd entry {entry.name!r}")


def _is_count(value: object, least: int, most: int = 1 << 62) -> bool:
    return type(value) is int and least <= value <= most


def _map_shard(folder: Path, entry: ShardEntry, index: Index) -> Shard:
    lengths = {"tokens": entry.tokens, "ends": entry.documents, "targets": entry.tokens}
    parts: dict[str, np.ndarray] = {}
    for suffix in entry.sha256:
        path = folder / f"{entry.name}.{suffix}"
        kind = np.dtype(_DTYPES[suffix] or f"<{np.dtype(index.dtype).str[1:]}")
        expected = lengths[suffix] * kind.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise ConfigError(f"{path} has {size:,} bytes instead of {expected:,}; prepare the data again")
            parts[suffix] = np.memmap(path, dtype=kind, mode="r")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); prepare the data again") from error
    ends = parts["ends"]
    if int(ends[-1]) != entry.tokens or int(ends[0]) < 1 or not (ends[1:] > ends[:-1]).all():
        raise ConfigError(f"{folder / entry.name}.ends does not fit {INDEX}; prepare the data again")
    hashes = "/".join(entry.sha256.values())
    return Shard(parts["tokens"], ends, parts.get("targets"), index.highest_token, hashes)


def _targets(document: Encoded) -> np.ndarray:
    return np.ones(len(document.ids), dtype=bool) if document.targets is None else document.targets
