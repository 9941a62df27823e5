"""The folder that `moe-data prepare` fills before it has its name: one process works in it, the others wait."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple, TextIO

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import sync
from moe_trainer.data.shards import is_prepared, read_index, write_durably

_REQUEST = "request.json"


class Keys(NamedTuple):
    """What errors call the settings."""

    prefix: str = ""
    out: str = "out"

    def bad_document(self, error: ConfigError) -> ConfigError:
        """What is wrong with a document, and how to go on without it."""
        return ConfigError(f"{error}; {self.prefix}skip_bad=true leaves such documents out")


@contextmanager
def working_folder(out: Path, request: str, keys: Keys) -> Iterator[Path | None]:
    """A folder to fill, which becomes `out` if the body succeeds; None if `out` is there.

    What a killed run with the same request left in it is kept, of another request thrown away.
    """
    final = out.resolve()  # `.` has no name
    while True:
        if _is_done(out, request, keys):
            yield None
            return
        working = final.with_name(f".{final.name}.partial")
        with _lock(working) as lock:
            if not _is_open_as(working / "lock", lock.fileno()):
                continue  # whom we waited for has renamed the folder
            if _is_done(out, request, keys):  # since we looked, before we made the folder anew
                _discard(working)
                yield None
                return
            asked = working / _REQUEST
            if not asked.is_file() or asked.read_text(encoding="utf-8") != request:
                for path in working.iterdir():
                    if path.name != "lock":
                        path.unlink()
            write_durably(asked, request.encode())
            try:
                yield working
            except ConfigError:
                _discard(working)  # who mends the input or a setting asks for something else
                raise
            for path in (*working.glob("shard-*.json"), *working.glob("*.new")):
                path.unlink()
            sync(working)
            working.rename(final)
            for name in ("lock", _REQUEST):  # not before: who found the folder unlocked would empty it
                (final / name).unlink()
            sync(final)
            sync(final.parent)
            return


@contextmanager
def _lock(working: Path) -> Iterator[TextIO]:
    """The folder's lock, held; whoever had it before may have renamed the folder."""
    while True:
        working.mkdir(parents=True, exist_ok=True)
        try:
            lock = (working / "lock").open("w")
        except FileNotFoundError:
            continue  # renamed since
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        return


def _discard(working: Path) -> None:
    """Under another name: it loses its lock on the way, and the next comer must not begin in it."""
    doomed = mkdtemp(prefix=f"{working.name}.", dir=working.parent)
    working.rename(doomed)
    shutil.rmtree(doomed)


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_done(out: Path, request: str, keys: Keys) -> bool:
    if not is_prepared(out):
        # An empty folder gives way to ours, which must not happen to the one that we are in.
        if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(Path.cwd())):
            raise ConfigError(f"{keys.out}={out} exists already and is no prepared folder; name one that does not")
        return False
    if read_index(out).request != request:
        as_it_is = f", or leave {keys.prefix}inputs unset to train on it as it is" if keys.prefix else ""
        raise ConfigError(
            f"{keys.out}={out} was prepared from other files or with other settings; name another folder, or remove "
            f"it{as_it_is}"
        )
    return True
