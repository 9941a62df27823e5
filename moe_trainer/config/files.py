"""What several parts need of files: a JSON object read, and bytes or names seen on the disk."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from moe_trainer.config.errors import ConfigError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: it is missing or cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return values


def sync(path: Path) -> None:
    """See a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, seconds: float = 5.0) -> BinaryIO:
    """Hold a file that one process at a time may write to: until it is closed, or this process ends.

    Args:
        seconds: to wait for it, since a process that was killed may take a while to be gone.

    Raises:
        ConfigError: another process holds it.
        OSError: it cannot be opened.
    """
    file, deadline = path.open("ab"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise ConfigError(
                    f"{path} is being written by a run that has not ended; wait for it, or give another run_name"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return file
