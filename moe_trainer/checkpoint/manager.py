"""Checkpoints of a run: published whole or not at all, found again only if undamaged.

    checkpoints/step-00000005/tensors/      DCP's files
                              state.json    and other documents
                              COMMIT.json   step, torch version, size and SHA-256 of every other file; written last
    checkpoints/LATEST                      name of the newest one, for people; the loader trusts COMMIT.json only

All is written into `step-00000005.tmp` and synced; one rename publishes it. A crash at any point leaves the older
checkpoints as they were, and a `.tmp` or `.del` folder that the next save removes.
"""

import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

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
from moe_trainer.checkpoint.background import Background, HostCopy
from moe_trainer.checkpoint.manifest import (
    COMMIT,
    STEP,
    FileRecord,
    damage,
    read_commit,
    record_files,
    write_commit,
    write_synced,
)
from moe_trainer.checkpoint.sharded import Block, blocks_to_write, save_blocks
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import sync

TENSORS = "tensors"
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|del)")
_SECONDS_TO_SEE = 60.0
"""For a file of another machine; network file systems remember for some seconds that a name was not there."""
_logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves the checkpoints of one run under `root`, and keeps the newest `keep_last` of them (None: all), and of the
    older ones those of steps that `keep_every` divides."""

    def __init__(self, root: Path, keep_last: int | None, keep_every: int | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={keep_last} must be at least 1, or unset to keep all")
        self.root = root
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.newest: int | None = None
        """Step of the last checkpoint that this object published."""
        self._host = HostCopy()
        self._background = Background()
        self._group: dist.ProcessGroup | None = None

    @property
    def failure(self) -> Exception | None:
        """Why the last `start_save` published nothing, once that is known; the same text on every rank."""
        return self._background.failure

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
        self.wait()
        with agreed(f"checkpoint of step {step}"):
            blocks = blocks_to_write(tensors)
        return self._publish(step, blocks, documents, _bytes(tensors), None)

    def start_save(self, step: int, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, str]) -> None:
        """As `save`, but return as soon as the tensors are copied; a thread writes and publishes. Collective.

        It waits for the save before. What fails is logged at once and is `failure` afterwards; it raises only for a
        layout that cannot be saved. The thread has a process group of its own: its collectives never meet those of
        training, whatever order the two come in. Where the memory for the copy is missing this saves as `save` does.
        """
        began = time.perf_counter()
        waited = self.wait()
        with agreed(f"checkpoint of step {step}"):
            blocks = blocks_to_write(tensors)
        if self._group is None and is_distributed():
            self._group = dist.new_group(backend="gloo")
        size, device, copies = _bytes(tensors), _device(blocks), self._copy(blocks)
        pause = time.perf_counter() - began

        def publish() -> None:
            try:
                began = time.perf_counter()
                folder = self._publish(step, blocks if copies is None else copies, documents, size, self._group)
            except Exception as error:
                if is_rank_zero():
                    _logger.error("the checkpoint of step %d was not saved: %s", step, describe_error(error))
                raise
            if is_rank_zero():
                seconds = time.perf_counter() - began
                text = "saved %s: %.1f MB in %.1f s; training paused for %.2f s"
                text += f", {waited:.2f} s of it for the save before" if waited > 0.1 else ""
                _logger.info(text, folder, size / 1e6, seconds, pause + seconds if copies is None else pause)

        self._background.start(publish, device)
        if copies is None:
            _logger.warning("no host memory for a copy of the checkpoint: training waits while it is written")
            self.wait()

    def wait(self) -> float:
        """Return when no save is under way; the seconds that took."""
        return self._background.wait()

    def _copy(self, blocks: Mapping[str, Block]) -> dict[str, Block] | None:
        """The blocks in host memory; None on every rank if one of them has no room for its own. Collective."""
        copies = None
        # All look before any takes: what one has taken is no longer there for another to see.
        if all(gather(self._host.fits(blocks, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))):
            try:
                copies = self._host.take(blocks)
            except RuntimeError as error:  # page-locked memory can be short even where there is other
                _logger.warning("copying the checkpoint: %s", describe_error(error))
        if all(gather(copies is not None)):
            return copies
        self._host.drop()
        return None

    def _publish(
        self,
        step: int,
        blocks: Mapping[str, Block],
        documents: Mapping[str, str],
        size: int,
        group: dist.ProcessGroup | None,
    ) -> Path:
        """Write what all ranks' blocks make, and publish it. Collective over `group`; `size`: bytes of all of it."""
        final = self.root / f"step-{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        action = f"checkpoint of step {step}"
        try:
            with agreed(action, group):
                if is_rank_zero():
                    self._prepare(final, temporary, size)
            save_blocks(temporary / TENSORS, blocks, group)
            records: dict[str, FileRecord] = {}
            with agreed(action, group):
                records = record_files(temporary, _own_files(temporary))
            gathered = {name: record for ranks in gather(records, group) for name, record in ranks.items()}
            with agreed(action, group):
                if is_rank_zero():
                    _wait_to_see(temporary, gathered)
                    _commit(temporary, final, step, gathered, documents)
        except (ConfigError, RuntimeError):
            if is_rank_zero():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if is_rank_zero():
            self._tidy(final)
        self.newest = step
        return final

    def _prepare(self, final: Path, temporary: Path, need: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if final.exists():
            if not (final / COMMIT).is_file():
                raise ConfigError(f"{final} exists and is not a checkpoint of ours; move it away")
            if not damage(final):
                raise ConfigError(f"{final} is complete already and is not overwritten; use another run_name")
        for leftover in self.root.iterdir():
            if _LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)  # one that cannot be removed is no reason not to save
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise ConfigError(f"{self.root}: disk full: the checkpoint needs {need:,} bytes, {free:,} are free")
        temporary.mkdir()

    def _tidy(self, newest: Path) -> None:
        """Point LATEST at the newest and drop the oldest. The checkpoint stands, so trouble here is only logged."""
        try:
            pointer = self.root / "LATEST.tmp"
            write_synced(pointer, newest.name + "\n")
            pointer.replace(self.root / "LATEST")
            if self.keep_last is None:
                return
            complete = [folder for folder in _published(self.root) if not damage(folder, hashes=False)]
            for folder in complete[: -self.keep_last]:
                if folder == newest:  # it may be older than others, after a resume from further back
                    continue
                if self.keep_every is not None and _step(folder) % self.keep_every == 0:
                    continue
                doomed = folder.with_name(folder.name + ".del")
                folder.rename(doomed)
                shutil.rmtree(doomed)
        except Exception as error:  # on rank 0 alone: raised, it would part the ranks
            _logger.warning("%s: could not tidy: %s", self.root, describe_error(error))


def find_latest(root: Path) -> Path | None:
    """The newest complete and undamaged checkpoint under `root`; damaged ones are named in a warning and passed over.

    Collective where a process group is initialised: rank 0 reads and checks, all get its answer.
    """
    return on_rank_zero(f"looking for checkpoints in {root}", lambda: _newest(root))


def checkpoint_to_resume(root: Path) -> Path | None:
    """As `find_latest`; None only where there is no checkpoint at all.

    Raises:
        ConfigError: all of them are damaged: to begin anew is not what was asked for.
    """
    return on_rank_zero(f"looking for checkpoints in {root}", lambda: _newest_if_any(root))


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant by the path of one, of a `checkpoints` folder or of a run.

    Collective as `find_latest`; every file is compared with its hash.

    Raises:
        ConfigError: nothing there, or nothing undamaged.
    """
    return on_rank_zero("checkpoint", lambda: _resolve(path))


def refuse_later_steps(root: Path, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint in a folder that holds later ones: those would be taken for what came of it.

    Collective as `find_latest`.

    Raises:
        ConfigError: names the newest of them.
    """

    def look() -> None:
        step = read_commit(checkpoint)["step"]
        later = (folder for folder in reversed(_published(root)) if _step(folder) > step and not damage(folder))
        if newest := next(later, None):
            raise ConfigError(
                f"{root} holds later steps ({newest.name}) than {checkpoint}, from which checkpoint.resume would "
                "go on; give another run_name, or move those away"
            )

    on_rank_zero("checkpoint.resume", look)


def read_document(checkpoint: Path, name: str) -> str:
    """Text of one document of a checkpoint.

    Raises:
        ConfigError: it is not there, not text, or a link that leads outside the checkpoint.
    """
    try:
        return inside(checkpoint, name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{checkpoint}: cannot read {name}: {error}") from error


def inside(checkpoint: Path, name: str) -> Path:
    """The path of a file of a checkpoint.

    Raises:
        ConfigError: a link leads outside the checkpoint, or to itself.
    """
    try:
        is_inside = (checkpoint / name).resolve().is_relative_to(checkpoint.resolve())
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{checkpoint}: cannot read {name}: {error}") from error
    if not is_inside:
        raise ConfigError(f"{checkpoint}: {name} is a link that leads outside the folder")
    return checkpoint / name


def _newest(root: Path) -> Path | None:
    for folder in reversed(_published(root)):
        problems = damage(folder)
        if not problems:
            return folder
        _logger.warning("skipping damaged checkpoint %s: %s", folder, "; ".join(problems))
    return None


def _newest_if_any(root: Path) -> Path | None:
    newest = _newest(root)
    if newest is None and (damaged := _published(root)):
        raise ConfigError(
            f"{root} holds no undamaged checkpoint ({len(damaged)} damaged); bring one back from a copy, go on from "
            "another with checkpoint.resume=DIR, or move them away to begin from the start"
        )
    return newest


def _resolve(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    if (path / COMMIT).exists():
        problems = damage(path)
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
    found = sorted((folder for folder in root.iterdir() if STEP.fullmatch(folder.name)), key=_step)
    return [folder for folder in found if not folder.is_symlink() and (folder / COMMIT).is_file()]


def _step(folder: Path) -> int:
    """Of a folder with our kind of name."""
    return int(STEP.fullmatch(folder.name)[1])


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of the whole tensors, over all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _device(blocks: Mapping[str, Block]) -> torch.device:
    return next((block.values.device for block in blocks.values() if block.values.is_cuda), torch.device("cpu"))


def _own_files(temporary: Path) -> list[Path]:
    rank = dist.get_rank() if is_distributed() else 0
    own = list((temporary / TENSORS).glob(f"__{rank}_*"))
    return [*own, temporary / TENSORS / ".metadata"] if rank == 0 else own


def _wait_to_see(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Until the files of all ranks are here: between machines that may take a while, or be in vain.

    Raises:
        ConfigError: one is not seen.
    """
    deadline = time.monotonic() + _SECONDS_TO_SEE
    for name, record in records.items():
        while not (folder / name).is_file() or (folder / name).stat().st_size != record["size"]:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{folder}: {name}, which another rank wrote, is not seen by the first; run_dir must lie on a "
                    "file system that all machines of the run share"
                )
            time.sleep(0.1)


def _aside(folder: Path) -> Path:
    """Where a damaged checkpoint goes: `.damaged`, and from the second time on `.damaged2` ..."""
    names = (f"{folder.name}.damaged{number if number > 1 else ''}" for number in itertools.count(1))
    return next(path for path in map(folder.with_name, names) if not os.path.lexists(path))


def _commit(
    temporary: Path, final: Path, step: int, records: dict[str, FileRecord], documents: Mapping[str, str]
) -> None:
    for name, text in documents.items():
        assert PurePosixPath(name).name == name and name not in (COMMIT, TENSORS), name
        write_synced(temporary / name, text)
    records = records | record_files(temporary, [temporary / name for name in documents])
    write_commit(temporary, step, records)
    sync(temporary / TENSORS)
    sync(temporary)
    if final.exists():  # _prepare found it damaged
        final.rename(_aside(final))
    temporary.rename(final)
    sync(final.parent)
