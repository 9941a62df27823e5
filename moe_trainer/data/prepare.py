"""`moe-data prepare`: files of texts and conversations to a folder of token shards.

Everything is written to a folder beside the final one, which is renamed once it is whole. A run that is killed goes
on after the last finished shard.
"""

import fnmatch
import glob
import hashlib
import json
import logging
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.data.chat import ChatTemplate
from moe_trainer.data.shards import (
    FORMAT,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Index,
    map_shards,
    read_index,
    write_durably,
    write_index,
)
from moe_trainer.data.sources import Document, read_file
from moe_trainer.data.tokenizer import digest, highest_id, load_tokenizer, train_tokenizer
from moe_trainer.data.working import Keys, working_folder
from moe_trainer.data.writer import Record, ShardWriter, is_held_out

_logger = logging.getLogger(__name__)
_TEMPLATE = "chat_template.jinja"

Progress = Callable[[str, int, int, int], None]
"""Called with what is being done, the documents done so far, about how many bytes of the files they are, and of how
many."""


def show_nothing(what: str, documents: int, done: int, total: int) -> None:
    """A `Progress` for nobody."""


def prepare(cfg: PrepareConfig, out: Path, progress: Progress = show_nothing, keys: Keys | None = None) -> Index:
    """Make the folder `out`, unless it is there already, made from the same files with the same settings.

    Files are the same while their paths, sizes and times of change are. Several processes may ask at once: one works,
    the others wait for it.

    Raises:
        ConfigError: an input that cannot be used (nothing is then left under `out`), or an `out` that holds something
            else or cannot be written.
    """
    keys = keys or Keys()
    files = _find_files(cfg, keys)
    try:
        request = _digest_of(cfg, files)
        with working_folder(out, request, keys) as folder:
            if folder is not None:
                _write(cfg, files, request, folder, progress, keys)
        return read_index(out)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise ConfigError(f"{keys.out}={out}: cannot be made ({what})") from error


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a token drawn by these counts [vocab]."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def _write(cfg: PrepareConfig, files: list[Path], request: str, folder: Path, progress: Progress, keys: Keys) -> None:
    """All files of the folder, the index last."""
    reader = _Reader(files, cfg.skip_bad, keys, progress)
    template_folder = None if cfg.tokenizer == "byte" else Path(cfg.tokenizer).parent
    template = ChatTemplate.load(template_folder, cfg.chat_template)
    tokenizer = _tokenizer(cfg, folder, template, reader, keys)
    done = [Record.read(path) for path in sorted(folder.glob("shard-*.json"))]
    if done:
        _logger.info("%s: goes on after %d finished shards", folder, len(done))
    writer = ShardWriter(cfg, folder, tokenizer, template, done, keys)
    writer.write(reader.documents("encoding"))
    entries = {
        split: [e for record in writer.records for e in getattr(record, split)] for split in (TRAIN, VALIDATION)
    }
    if not entries[TRAIN]:
        raise ConfigError(
            f"{files[0]}: no document is left to train on; give more, or a smaller {keys.prefix}validation_share"
        )
    skipped = reader.skipped + writer.skipped
    index = Index(request, writer.dtype, digest(tokenizer), 0, 0.0, skipped, _settings(cfg, files), **entries)
    counts = {split: _count(folder, index, split, tokenizer) for split in (TRAIN, VALIDATION)}
    index.highest_token = int(np.flatnonzero(sum(counts.values())).max())
    index.unigram_entropy = unigram_entropy(counts[TRAIN])
    if template is not None:
        write_durably(folder / _TEMPLATE, template.source.encode())
    write_index(folder, index)


def _find_files(cfg: PrepareConfig, keys: Keys) -> list[Path]:
    """What the globs name, each file once, in the order of their names.

    Raises:
        ConfigError: a glob that names no file.
    """
    found: set[str] = set()
    for pattern in cfg.inputs:
        matches = {path for path in glob.glob(_expanded(pattern), recursive=True) if Path(path).is_file()}
        if Path(pattern).is_file():  # a name with brackets is first of all a name
            matches = {pattern}
        if not matches:
            hint = f"; {pattern}/**/* names the files in it" if Path(pattern).is_dir() else ""
            raise ConfigError(f"{keys.prefix}inputs: {pattern} names no file{hint}")
        found |= matches
    excluded = [_expanded(pattern) for pattern in cfg.exclude]
    left_out = {
        os.path.abspath(path) for path in found if any(fnmatch.fnmatchcase(path, pattern) for pattern in excluded)
    }
    by_place = {os.path.abspath(path): path for path in sorted(found, reverse=True)}  # a.txt and ./a.txt are one
    kept = sorted(path for place, path in by_place.items() if place not in left_out)
    if not kept:
        raise ConfigError(f"{keys.prefix}exclude leaves out all {len(by_place)} files")
    return [Path(path) for path in kept]


def _expanded(pattern: str) -> str:
    return pattern.replace("{stdlib}", glob.escape(sysconfig.get_paths()["stdlib"]))


def _settings(cfg: PrepareConfig, files: list[Path]) -> dict[str, object]:
    sources = [{"path": str(path), "bytes": path.stat().st_size} for path in files]
    settings = {key: value for key, value in asdict(cfg).items() if key != "out"}
    return {**settings, "sources": sources}


def _digest_of(cfg: PrepareConfig, files: list[Path]) -> str:
    """Tells a preparation from any other."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in ("inputs", "exclude", "out")}
    named = [cfg.tokenizer, cfg.chat_template]
    if cfg.tokenizer != "byte":
        named += [str(Path(cfg.tokenizer).parent / name) for name in ("tokenizer_config.json", _TEMPLATE)]
    settings["contents"] = [
        hashlib.sha256(Path(name).read_bytes()).hexdigest() if name and Path(name).is_file() else None
        for name in named
    ]
    try:
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(json.dumps([FORMAT, settings, stats], sort_keys=True).encode()).hexdigest()


def _tokenizer(
    cfg: PrepareConfig, folder: Path, template: ChatTemplate | None, reader: "_Reader", keys: Keys
) -> Tokenizer:
    """The tokenizer, which from now on lies in the folder: a run that goes on uses the one it trained."""
    path = folder / TOKENIZER
    if not path.is_file():
        if cfg.train_tokenizer is None:
            tokenizer = load_tokenizer(cfg.tokenizer, f"{keys.prefix}tokenizer")
        else:
            texts = (
                _text(document, template, cfg.skip_bad, keys)
                for document in reader.documents("training the tokenizer")
                if not is_held_out(document, cfg.validation_share, cfg.seed)
            )
            tokenizer = train_tokenizer((text for text in texts if text), cfg.train_tokenizer)
        write_durably(path, tokenizer.to_str(pretty=True).encode())
    return load_tokenizer(str(path), None)


def _text(document: Document, template: ChatTemplate | None, skip_bad: bool, keys: Keys) -> str | None:
    """What the tokenizer is trained on; None: nothing of it."""
    if document.messages is None or template is None:
        return document.text
    try:
        return template.render(document).text
    except ConfigError as error:
        if not skip_bad:
            raise keys.bad_document(error) from error
        return None


@dataclass(slots=True)
class _Reader:
    """The documents of all files."""

    files: list[Path]
    skip_bad: bool
    keys: Keys
    progress: Progress
    skipped: int = 0

    def documents(self, what: str) -> Iterator[Document]:
        """Each document, in the same order every time; `skipped` counts those that are left out."""
        self.skipped = 0
        sizes = [path.stat().st_size for path in self.files]
        number = before = 0
        for path, size in zip(self.files, sizes, strict=True):
            inside = 0
            for document in read_file(path):
                if isinstance(document, ConfigError):
                    if not self.skip_bad:
                        raise self.keys.bad_document(document)
                    self.skipped += 1
                    continue
                number += 1
                inside = min(inside + len(document.content), size)
                yield document
                self.progress(what, number, before + inside, sum(sizes))
            before += size
        self.progress(what, number, before, before)


def _count(folder: Path, index: Index, split: str, tokenizer: Tokenizer) -> np.ndarray:
    """How often each id occurs, [vocab]."""
    length = highest_id(tokenizer) + 1
    counts = np.zeros(length, dtype=np.int64)
    for shard in map_shards(folder, index, split):
        for part in np.array_split(shard.tokens, math.ceil(len(shard.tokens) / (1 << 24))):
            counts += np.bincount(part, minlength=length)
    return counts
