"""A rank that fails or dies while a checkpoint is saved."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moe_trainer.checkpoint import manager as manager_module
from moe_trainer.checkpoint import sharded as sharded_module
from moe_trainer.checkpoint.manager import CheckpointManager, find_latest, resolve_checkpoint
from moe_trainer.checkpoint.manifest import verify
from moe_trainer.checkpoint.sharded import blocks_to_write, load_tensors, save_tensors
from moe_trainer.config.errors import ConfigError
from moe_trainer.testing.pool import run_distributed


def tensors(value: float) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full((4, 64), float(value))
    return {f"w{i}": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) for i in range(2)}


def save_steps(root: Path, first: int, last: int) -> list[str]:
    manager = CheckpointManager(root, keep_last=2)
    return [manager.save(step, tensors(step), {"state.json": f"{step}"}).name for step in range(first, last + 1)]


def save_behind(root: Path, first: int, last: int) -> list[str]:
    """As `save_steps`, while other collectives run and the tensors change under the writer's hands."""
    manager, names, changed = CheckpointManager(root, keep_last=2), [], threading.Event()
    real = sharded_module.dcp.FileSystemWriter.write_data

    def write_late(*arguments: object) -> object:
        assert changed.wait(20)
        return real(*arguments)

    sharded_module.dcp.FileSystemWriter.write_data = write_late
    for step in range(first, last + 1):
        live = tensors(step)
        changed.clear()
        manager.start_save(step, live, {"state.json": f"{step}"})
        for _ in range(20):
            dist.all_reduce(torch.ones(8))
        for tensor in live.values():
            tensor.to_local().fill_(-1)
        changed.set()
        manager.wait()
        if manager.failure is not None:
            raise manager.failure
        names.append(f"step-{manager.newest:08d}")
    sharded_module.dcp.FileSystemWriter.write_data = real
    return names


@pytest.mark.parametrize("save", [save_steps, save_behind])
def test_save_on_two_ranks(tmp_path: Path, save: Callable[[Path, int, int], list[str]]) -> None:
    names = [f"step-0000000{step}" for step in (1, 2, 3)]
    assert run_distributed(save, 2, tmp_path, 1, 3) == [names] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"LATEST", *names[1:]}
    verify(tmp_path / names[2])
    files = {path.name for path in (tmp_path / names[2] / "tensors").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    loaded = {f"w{i}": torch.zeros(4, 64) for i in range(2)}
    load_tensors(tmp_path / names[2] / "tensors", loaded)
    assert all(bool((value == 3).all()) for value in loaded.values())


def start_twice(root: Path) -> tuple[int | None, list[int], bool, str]:
    """The second save waits for the first; a third one fails in the background."""
    manager = CheckpointManager(root, keep_last=None)
    manager.start_save(1, tensors(1), {})
    buffers = [buffer.data_ptr() for buffer in manager._host._buffers.values()]
    manager.start_save(2, tensors(2), {})
    first = manager.newest
    same_memory = buffers == [buffer.data_ptr() for buffer in manager._host._buffers.values()]
    manager.start_save(2, tensors(2), {})
    manager.wait()
    steps = [int(path.name[-8:]) for path in sorted(root.glob("step-*"))]
    return first, steps, same_memory, str(manager.failure)


def test_one_save_at_a_time_and_what_fails_is_told_to_all(tmp_path: Path) -> None:
    outcomes = run_distributed(start_twice, 2, tmp_path)
    text = f"checkpoint of step 2: {tmp_path / 'step-00000002'} is complete already and is not overwritten"
    for first, steps, same_memory, failure in outcomes:
        assert (first, steps, same_memory) == (1, [1, 2], True)
        assert failure.startswith(text)


def save_without_room(root: Path, where: str) -> tuple[bool, float]:
    """One rank has no memory for a copy: all write what they have, and wait; none keeps or begins a copy."""
    manager, live = CheckpointManager(root, keep_last=None), tensors(1)
    took: list[bool] = []
    real = manager._host.take

    def take(blocks: object) -> object:
        took.append(True)
        if dist.get_rank() == 1:
            raise RuntimeError("no page-locked memory")
        return real(blocks)

    manager._host.take = take
    if dist.get_rank() == 1 and where == "fits":
        manager._host.fits = lambda blocks, processes: False
    manager.start_save(1, live, {})
    done = manager.newest == 1 and not manager._host._buffers and bool(took) is (where == "take")
    for tensor in live.values():
        tensor.to_local().fill_(-1)
    loaded = tensors(0)
    load_tensors(root / "step-00000001" / "tensors", loaded)
    return done, loaded["w0"].to_local().sum().item()


@pytest.mark.parametrize("where", ["fits", "take"])
def test_without_memory_for_a_copy_training_waits(tmp_path: Path, where: str) -> None:
    assert run_distributed(save_without_room, 2, tmp_path, where) == [(True, 128.0)] * 2


def each_value_once(root: Path) -> int:
    """Bytes of tensors that this rank writes: of a tensor on a 2 x 2 mesh, split by one axis and not by the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Replicate(), Shard(0)]
    split = {f"w{i}": distribute_tensor(torch.ones(8, 16), mesh, placements, src_data_rank=None) for i in range(8)}
    plain = {f"p{i}": torch.ones(16) for i in range(8)}
    save_tensors(root, split | plain)
    return sum(block.values.numel() for block in blocks_to_write(split | plain).values())


def test_what_several_ranks_hold_is_written_once_and_by_turns(tmp_path: Path) -> None:
    written = run_distributed(each_value_once, 4, tmp_path / "tensors")
    assert sum(written) == 8 * 128 + 8 * 16 and all(count >= 2 * 64 for count in written)


def fail_on_rank_one(root: Path, where: str) -> str:
    CheckpointManager(root, keep_last=None).save(1, tensors(1), {})

    def fail(*_: object, **__: object) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")

    real = {"hash": manager_module.record_files, "write": sharded_module.dcp.FileSystemWriter.write_data}
    if where == "hash":
        manager_module.record_files = lambda *args: fail() or real["hash"](*args)
    else:
        sharded_module.dcp.FileSystemWriter.write_data = lambda *args: fail() or real["write"](*args)
    try:
        CheckpointManager(root, keep_last=None).save(2, tensors(2), {})
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__} {error}"
    return "no error"


@pytest.mark.parametrize("where", ["hash", "write"])
def test_error_on_one_rank_is_raised_on_all(tmp_path: Path, where: str) -> None:
    messages = set(run_distributed(fail_on_rank_one, 2, tmp_path, where))
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith("ConfigError") and "[Errno 28] No space left on device" in message, message
    assert {path.name for path in tmp_path.iterdir()} == {"LATEST", "step-00000001"}
    assert find_latest(tmp_path) == tmp_path / "step-00000001"


def save_where_nobody_looks(root: Path) -> str:
    """Each rank's folder is its own, as on machines without a shared file system."""
    manager_module._SECONDS_TO_SEE = 0.2
    manager = CheckpointManager(root / str(dist.get_rank()), keep_last=None)
    manager.start_save(1, tensors(1), {})
    manager.wait()
    return str(manager.failure)


def test_a_file_that_only_its_machine_sees_is_in_no_checkpoint(tmp_path: Path) -> None:
    messages = set(run_distributed(save_where_nobody_looks, 2, tmp_path))
    assert len(messages) == 1
    assert (
        "tensors/__1_0.distcp, which another rank wrote, is not seen by the first; run_dir must lie" in messages.pop()
    )
    assert not list((tmp_path / "0").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one, of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_the_disk(root: Path) -> list[str]:
    """The bytes of the tensors have room, what DCP writes around 600 small ones has not."""
    CheckpointManager(root, keep_last=None).save(1, tensors(1), {})
    many = {f"w{number}": torch.ones(4) for number in range(600)}
    said = []
    for start in (False, True):
        manager = CheckpointManager(root, keep_last=None)
        try:
            if start:
                manager.start_save(2, many, {})
                manager.wait()
                raise manager.failure or AssertionError("it fitted")
            manager.save(2, many, {})
        except ConfigError as error:
            said.append(str(error))
    CheckpointManager(root, keep_last=None).save(3, tensors(3), {})
    return said


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk: Path) -> None:
    for said in run_distributed(fill_the_disk, 2, small_disk):
        assert len(said) == 2 and all("disk full" in text or "No space left" in text for text in said), said
    assert {path.name for path in small_disk.iterdir()} == {"LATEST", "step-00000001", "step-00000003"}
    verify(small_disk / "step-00000001")
    assert find_latest(small_disk) == small_disk / "step-00000003"


def look_from_each_rank(root: Path) -> list[str]:
    logging.disable()
    # Only rank 0 looks: the others are pointed at nothing and still get its answer.
    mine = root if dist.get_rank() == 0 else root / "nothing"
    answers = [str(find_latest(mine)), str(resolve_checkpoint(mine))]
    try:
        resolve_checkpoint(root / "gone" if dist.get_rank() == 0 else root)
    except ConfigError as error:
        answers.append(str(error))
    return answers


def test_rank_zero_decides_for_all(tmp_path: Path) -> None:
    run_distributed(save_steps, 2, tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "tensors" / "__1_0.distcp").write_bytes(b"")
    answers = run_distributed(look_from_each_rank, 2, tmp_path)
    expected = str(tmp_path / "step-00000001")
    assert answers[0] == answers[1] == [expected, expected, f"checkpoint: {tmp_path / 'gone'} is not a folder"]


def packed_layout(root: Path) -> list[str]:
    """gate and up rows in one dim, split as the TP plan of others does; DCP would load wrong rows."""
    mesh = init_device_mesh("cpu", (2,))
    packed = DTensor.from_local(
        torch.zeros(3, 4, 5), mesh, [_StridedShard(1, split_factor=2)], run_check=False,
        shape=torch.Size([3, 8, 5]), stride=(40, 5, 1),
    )  # fmt: skip
    twice = distribute_tensor(
        torch.zeros(8), init_device_mesh("cpu", (2, 1)), [Shard(0), Shard(0)], src_data_rank=None
    )
    messages = []
    save_tensors(root / "fine", {"twice": twice})  # an axis of one rank splits nothing
    save_tensors(root / "plain", {"gate_up": torch.zeros(3, 8, 5)})
    for action in (
        lambda: save_tensors(root / "packed", {"gate_up": packed}),
        lambda: load_tensors(root / "plain", {"gate_up": packed}),
    ):
        try:
            action()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_packed_layout_is_refused_in_both_directions(tmp_path: Path) -> None:
    for messages in run_distributed(packed_layout, 2, tmp_path):
        assert len(messages) == 2
        assert all("gate_up: placements" in message and "interleave rows" in message for message in messages)
    assert not (tmp_path / "packed").exists()


def save_and_die(root: Path, victim: int, nth: int, behind: bool = False) -> int:
    """Save steps 1 to 3; rank `victim` is killed at its n-th change of a file below root. Returns the changes."""
    changes = 0

    def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
        inside = bool(arguments) and str(root) in str(arguments[0])
        if event == "open":  # path, mode, flags
            return inside and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in ("os.remove", "os.rmdir"):  # path, descriptor of the folder: rmtree gives names relative to it
            return inside or arguments[1] != -1
        return inside and event in ("os.rename", "os.mkdir")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if is_change(event, arguments):
            changes += 1
            if dist.get_rank() == victim and changes == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in (1, 2, 3):
        (save_behind if behind else save_steps)(root, step, step)
        if dist.get_rank() == 0:
            root.with_name("acknowledged").write_text(str(step))
        dist.barrier()
    return changes


def check_after_crash(root: Path) -> None:
    """The newest checkpoint is whole, no older than the last that was acknowledged, and training can go on."""
    acknowledged = root.with_name("acknowledged")
    at_least = int(acknowledged.read_text()) if acknowledged.exists() else 0
    newest = find_latest(root)
    step = 0 if newest is None else int(newest.name[-8:])
    assert step >= at_least
    if newest is not None:
        loaded = {f"w{i}": torch.zeros(4, 64) for i in range(2)}
        load_tensors(newest / "tensors", loaded)
        assert all(bool((value == step).all()) for value in loaded.values())
        assert (newest / "state.json").read_text() == str(step)
    save_steps(root, step + 1, step + 1)
    assert find_latest(root) == root / f"step-{step + 1:08d}"
    assert not list(root.glob("*.tmp")) and not list(root.glob("*.del"))


@pytest.mark.parametrize(
    ("world", "victim", "every", "at_least", "behind"),
    [
        (1, 0, 1, 30, False),
        (2, 0, 17, 30, False),
        (2, 1, 2, 3, False),
        (2, 0, 13, 30, True),
        (2, 1, 2, 3, True),
        pytest.param(2, 0, 1, 30, True, marks=pytest.mark.grid),
        pytest.param(2, 1, 1, 3, True, marks=pytest.mark.grid),
    ],
    ids=["alone_every", "rank_0_some", "rank_1_some", "rank_0_behind", "rank_1_behind", "rank_0_all", "rank_1_all"],
)
def test_killed_while_saving(
    tmp_path: Path, world: int, victim: int, every: int, at_least: int, behind: bool
) -> None:
    (tmp_path / "whole").mkdir()
    changes = run_distributed(save_and_die, world, tmp_path / "whole" / "root", -1, 0, behind)[victim]
    assert changes >= at_least
    for nth in range(1, changes + 1, every):
        root = tmp_path / f"killed-{nth}" / "root"
        root.parent.mkdir()
        with pytest.raises(RuntimeError, match=f"rank {victim}: died with exit code -9"):
            run_distributed(save_and_die, world, root, victim, nth, behind, timeout=20)
        run_distributed(check_after_crash, 1, root)
