"""COMMIT.json: what a checkpoint consists of, by size and SHA-256, and whether its files still agree."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from moe_trainer.checkpoint.agreement import describe_error
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import sync

FORMAT = 1
COMMIT = "COMMIT.json"
STEP = re.compile(r"step-(\d{8,})")
"""Name of a published checkpoint."""

_METADATA = "tensors/.metadata"
"""Without it no tensor can be read."""

FileRecord = dict[str, int | str]
"""`size` in bytes and `sha256` of a file."""


def verify(checkpoint: Path) -> None:
    """Compare every file with COMMIT.json.

    Raises:
        ConfigError: names every file that is damaged, missing or extra.
    """
    problems = damage(checkpoint)
    if not problems:
        known = read_commit(checkpoint)["files"].keys() | {COMMIT}
        problems = [f"extra {name}" for name in _files(checkpoint) if name not in known]
    if problems:
        raise ConfigError(f"{checkpoint} is damaged: {'; '.join(problems)}")


def damage(checkpoint: Path, hashes: bool = True) -> list[str]:
    """What is wrong with the files that COMMIT.json lists; without `hashes` only sizes are compared."""
    try:
        commit = read_commit(checkpoint)
    except ConfigError as error:
        return [str(error)]
    match = STEP.fullmatch(checkpoint.name)
    if match and int(match[1]) != commit["step"]:
        return [f"{COMMIT} is of step {commit['step']}"]
    if _METADATA not in commit["files"]:
        return [f"{COMMIT} names no {_METADATA}"]

    root = checkpoint.resolve()

    def compare(name: str) -> str | None:
        expected, path = commit["files"][name], checkpoint / name
        if not path.resolve().is_relative_to(root):
            return f"{name} is a link that leads outside the folder"
        if not path.is_file():
            return f"missing {name}"
        if path.stat().st_size != expected["size"]:
            return f"damaged {name}: {path.stat().st_size} bytes, not {expected['size']}"
        return f"damaged {name}: wrong SHA-256" if hashes and _sha256(path) != expected["sha256"] else None

    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return [problem for problem in pool.map(compare, sorted(commit["files"])) if problem]
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name that no file can have
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
        kinds = [(int, commit["step"]), (str, commit["torch"])]
        for record in commit["files"].values():
            kinds += [(int, record["size"]), (str, record["sha256"])]
        if odd := [value for kind, value in kinds if type(value) is not kind]:
            raise ValueError(f"{str(odd[0])[:40]!r} is of the wrong type")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{COMMIT} cannot be read ({type(error).__name__}: {error})") from error
    return commit


def record_files(root: Path, files: list[Path]) -> dict[str, FileRecord]:
    """See the files on the disk, and what they are by then: path below `root` -> record."""
    records = {}
    for path in files:
        sync(path)
        records[path.relative_to(root).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return records


def write_commit(folder: Path, step: int, records: dict[str, FileRecord]) -> None:
    """Make the folder a checkpoint, and see all of it on the disk."""
    commit = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": dict(sorted(records.items()))}
    write_synced(folder / COMMIT, json.dumps(commit, indent=1) + "\n")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a text in UTF-8 and see it on the disk."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
