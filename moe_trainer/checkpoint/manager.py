"""Checkpoints of a run: published whole or not at all, found again only if undamaged.

    checkpoints/step-00000005/tensors/      DCP's files
                              state.json    and other documents
                              COMMIT.json   step, torch version, size and SHA-256 of every other file; written last
    checkpoints/LATEST                      name of the newest one, for people; the loader trusts COMMIT.json only

All is written into `step-00000005.tmp` and synced; one rename publishes it. A crash at any point leaves the older
checkpoints as they were, and a `.tmp` or `.del` folder that the next save removes.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist

from moe_trainer.checkpoint.agreement import (
    agreed,
    describe_error,
    gather,
    is_distributed,
    is_rank_zero,
    on_rank_zero,
)
from moe_trainer.checkpoint.sharded import save_tensors
from moe_trainer.config.errors import ConfigError

FORMAT = 1
COMMIT = "COMMIT.json"
TENSORS = "tensors"
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|del)")
_logger = logging.getLogger(__name__)

FileRecord = dict[str, int | str]
"""`size` in bytes and `sha256` of a file."""


class CheckpointManager:
    """Saves the checkpoints of one run under `root`, and keeps the newest `keep_last` of them (None: all), and of the
    older ones those of steps that `keep_every` divides."""

    def __init__(self, root: Path, keep_last: int | None, keep_every: int | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={keep_last} must be at least 1, or unset to keep all")
        self.root = root
        self.keep_last = keep_last
        self.keep_every = keep_every

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, str]) -> Path:
        """Write and publish one checkpoint. Collective.

        Args:
            tensors: as `save_tensors` takes them.
            documents: file name -> text; rank 0's are written.

        Returns:
            The published folder.

        Raises:
            ConfigError: the step exists already, or the disk refused; the same text on every rank. Nothing is
                published then.
            RuntimeError: anything else that failed on some rank.
        """
        final = self.root / f"step-{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        try:
            with agreed(f"checkpoint of step {step}"):
                if is_rank_zero():
                    self._prepare(final, temporary, tensors)
            save_tensors(temporary / TENSORS, tensors)
            records: dict[str, FileRecord] = {}
            with agreed(f"checkpoint of step {step}"):
                records = _record_files(temporary, _own_files(temporary))
            gathered = {name: record for ranks in gather(records) for name, record in ranks.items()}
            with agreed(f"checkpoint of step {step}"):
                if is_rank_zero():
                    _commit(temporary, final, step, gathered, documents)
        except (ConfigError, RuntimeError):
            if is_rank_zero():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if is_rank_zero():
            self._tidy(final)
        return final

    def _prepare(self, final: Path, temporary: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if final.exists():
            if not (final / COMMIT).is_file():
                raise ConfigError(f"{final} exists and is not a checkpoint of ours; move it away")
            if not _damage(final):
                raise ConfigError(f"{final} is complete already and is not overwritten; use another run_name")
        for leftover in self.root.iterdir():
            if _LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
        need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise ConfigError(f"{self.root}: disk full: the checkpoint needs {need:,} bytes, {free:,} are free")
        temporary.mkdir()

    def _tidy(self, newest: Path) -> None:
        """Point LATEST at the newest and drop the oldest. The checkpoint stands, so trouble here is only logged."""
        try:
            pointer = self.root / "LATEST.tmp"
            _write_synced(pointer, newest.name + "\n")
            pointer.replace(self.root / "LATEST")
            if self.keep_last is None:
                return
            complete = [folder for folder in _published(self.root) if not _damage(folder, hashes=False)]
            for folder in complete[: -self.keep_last]:
                if folder == newest:  # it may be older than others, after a resume from further back
                    continue
                if self.keep_every is not None and _step(folder) % self.keep_every == 0:
                    continue
                doomed = folder.with_name(folder.name + ".del")
                folder.rename(doomed)
                shutil.rmtree(doomed)
        except OSError as error:
            _logger.warning("%s: could not tidy: %s", self.root, error)


def find_latest(root: Path) -> Path | None:
    """The newest complete and undamaged checkpoint under `root`; damaged ones are named in a warning and passed over.

    Collective where a process group is initialised: rank 0 reads and checks, all get its answer.
    """
    return on_rank_zero(f"looking for checkpoints in {root}", lambda: _newest(root))


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant by the path of one, of a `checkpoints` folder or of a run.

    Collective as `find_latest`; every file is compared with its hash.

    Raises:
        ConfigError: nothing there, or nothing undamaged.
    """
    return on_rank_zero("checkpoint", lambda: _resolve(path))


def verify(checkpoint: Path) -> None:
    """Compare every file with COMMIT.json.

    Raises:
        ConfigError: names every file that is damaged, missing or extra.
    """
    problems = _damage(checkpoint)
    if not problems:
        known = read_commit(checkpoint)["files"].keys() | {COMMIT}
        problems = [f"extra {name}" for name in _files(checkpoint) if name not in known]
    if problems:
        raise ConfigError(f"{checkpoint} is damaged: {'; '.join(problems)}")


def read_document(checkpoint: Path, name: str) -> str:
    """Text of one document of a checkpoint.

    Raises:
        ConfigError: it is not there, or not text.
    """
    try:
        return (checkpoint / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{checkpoint}: cannot read {name}: {error}") from error


def _newest(root: Path) -> Path | None:
    for folder in reversed(_published(root)):
        problems = _damage(folder)
        if not problems:
            return folder
        _logger.warning("skipping damaged checkpoint %s: %s", folder, "; ".join(problems))
    return None


def _resolve(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    if (path / COMMIT).exists():
        problems = _damage(path)
        if problems:
            raise ConfigError(f"{path} is damaged: {'; '.join(problems)}")
        return path
    for root in (path, path / "checkpoints"):
        if newest := _newest(root):
            return newest
        if damaged := _published(root):
            raise ConfigError(f"{root} holds no undamaged checkpoint ({len(damaged)} damaged)")
    raise ConfigError(f"{path} is neither a checkpoint nor a run with a complete checkpoint")


def _published(root: Path) -> list[Path]:
    """Our folders with a COMMIT.json, oldest step first; whatever else lies there is not ours."""
    if not root.is_dir():
        return []
    found = sorted((folder for folder in root.iterdir() if _STEP.fullmatch(folder.name)), key=_step)
    return [folder for folder in found if not folder.is_symlink() and (folder / COMMIT).is_file()]


def _step(folder: Path) -> int:
    """Of a folder with our kind of name."""
    return int(_STEP.fullmatch(folder.name)[1])


def _damage(checkpoint: Path, hashes: bool = True) -> list[str]:
    """What is wrong with the files that COMMIT.json lists; without `hashes` only sizes are compared."""
    try:
        commit = read_commit(checkpoint)
    except ConfigError as error:
        return [str(error)]
    match = _STEP.fullmatch(checkpoint.name)
    if match and int(match[1]) != commit["step"]:
        return [f"{COMMIT} is of step {commit['step']}"]

    def compare(name: str) -> str | None:
        expected, path = commit["files"][name], checkpoint / name
        if not path.is_file():
            return f"missing {name}"
        if path.stat().st_size != expected["size"]:
            return f"damaged {name}: {path.stat().st_size} bytes, not {expected['size']}"
        return f"damaged {name}: wrong SHA-256" if hashes and _sha256(path) != expected["sha256"] else None

    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return [problem for problem in pool.map(compare, sorted(commit["files"])) if problem]
    except OSError as error:
        return [describe_error(error)]


def read_commit(checkpoint: Path) -> dict[str, Any]:
    """COMMIT.json: `format`, `step`, `torch`, `files` (name -> `size`, `sha256`).

    Raises:
        ConfigError: it is missing or damaged, of another format, or names a file outside the checkpoint.
    """
    try:
        commit = json.loads((checkpoint / COMMIT).read_bytes())
        if commit["format"] != FORMAT:
            raise ConfigError(f"{COMMIT} has format {commit['format']}; this version reads {FORMAT}")
        names = [PurePosixPath(name) for name in commit["files"]]
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise ValueError("a file outside the folder")
        for record in commit["files"].values():
            int(record["size"]), str(record["sha256"])
        int(commit["step"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{COMMIT} cannot be read ({type(error).__name__}: {error})") from error
    return commit


def _own_files(temporary: Path) -> list[Path]:
    rank = dist.get_rank() if is_distributed() else 0
    own = list((temporary / TENSORS).glob(f"__{rank}_*"))
    return [*own, temporary / TENSORS / ".metadata"] if rank == 0 else own


def _record_files(root: Path, files: list[Path]) -> dict[str, FileRecord]:
    records = {}
    for path in files:
        _sync(path)
        records[path.relative_to(root).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return records


def _commit(
    temporary: Path, final: Path, step: int, records: dict[str, FileRecord], documents: Mapping[str, str]
) -> None:
    for name, text in documents.items():
        assert PurePosixPath(name).name == name and name not in (COMMIT, TENSORS), name
        _write_synced(temporary / name, text)
    records = records | _record_files(temporary, [temporary / name for name in documents])
    commit = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": dict(sorted(records.items()))}
    _write_synced(temporary / COMMIT, json.dumps(commit, indent=1) + "\n")
    _sync(temporary / TENSORS)
    _sync(temporary)
    if final.exists():  # _prepare found it damaged
        final.rename(final.with_name(final.name + ".damaged"))
    temporary.rename(final)
    _sync(final.parent)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
