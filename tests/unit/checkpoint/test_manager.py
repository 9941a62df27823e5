"""Publishing, finding and keeping checkpoints, with one process and no group."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from moe_trainer.checkpoint import manager as manager_module
from moe_trainer.checkpoint.background import _available_bytes
from moe_trainer.checkpoint.manager import (
    CheckpointManager,
    checkpoint_to_resume,
    find_latest,
    read_document,
    refuse_later_steps,
    resolve_checkpoint,
)
from moe_trainer.checkpoint.manifest import verify
from moe_trainer.checkpoint.sharded import load_tensors
from moe_trainer.config.errors import ConfigError


def save(root: Path, step: int, keep_last: int | None = None) -> Path:
    tensors = {"w": torch.full((4, 3), float(step))}
    return CheckpointManager(root, keep_last).save(step, tensors, {"state.json": json.dumps({"step": step})})


def value(checkpoint: Path) -> float:
    tensors = {"w": torch.zeros(4, 3)}
    load_tensors(checkpoint / "tensors", tensors)
    assert bool((tensors["w"] == tensors["w"][0, 0]).all())
    return tensors["w"][0, 0].item()


def shard(checkpoint: Path) -> Path:
    return next((checkpoint / "tensors").glob("*.distcp"))


def flip_bit(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


def test_layout_and_round_trip(tmp_path: Path) -> None:
    root = tmp_path / "a run/checkpoints é"
    folder = save(root, 5)
    assert folder == root / "step-00000005"
    assert (root / "LATEST").read_text() == "step-00000005\n"
    commit = json.loads((folder / "COMMIT.json").read_text())
    assert (commit["format"], commit["step"], commit["torch"]) == (1, 5, torch.__version__)
    assert set(commit["files"]) == {"state.json", "tensors/.metadata", "tensors/__0_0.distcp"}
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-00000005"]
    verify(folder)
    assert value(folder) == 5
    assert json.loads(read_document(folder, "state.json")) == {"step": 5}
    with pytest.raises(ConfigError, match=r"cannot read gone\.json"):
        read_document(folder, "gone.json")


@pytest.mark.parametrize("name", ["tensors/.metadata", "tensors/__0_0.distcp", "state.json", "COMMIT.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_damage_is_named_and_the_previous_one_taken(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path = bad / name
    if harm == "flip":
        flip_bit(path, 0 if name == "COMMIT.json" else path.stat().st_size // 2)
    elif harm == "remove":
        path.unlink()
    else:
        os.truncate(path, 0 if harm == "empty" else path.stat().st_size // 2)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        verify(bad)
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == good
    if (name, harm) != ("COMMIT.json", "remove"):  # without it the folder is not a checkpoint at all
        assert str(bad) in caplog.text and name in caplog.text
        with pytest.raises(ConfigError, match="step-00000002"):
            resolve_checkpoint(bad)


def test_every_problem_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    flip_bit(shard(folder), 100)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"missing state\.json; damaged tensors/__0_0\.distcp: wrong SHA-256"):
        verify(folder)


def test_extra_files_are_named_but_do_no_harm(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "tensors" / "notes.txt").write_text("best run")
    with pytest.raises(ConfigError, match=r"extra tensors/notes\.txt"):
        verify(folder)
    assert find_latest(tmp_path) == folder


def test_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 1)
    commit = json.loads((folder / "COMMIT.json").read_text())
    commit["files"]["../../secret"] = {"size": 0, "sha256": ""}
    (folder / "COMMIT.json").write_text(json.dumps(commit))
    with pytest.raises(ConfigError, match="outside the folder"):
        verify(folder)


def test_newer_format_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    commit = json.loads((folder / "COMMIT.json").read_text())
    (folder / "COMMIT.json").write_text(json.dumps(commit | {"format": 2}))
    with pytest.raises(ConfigError, match="format 2; this version reads 1"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("name", ["a\0", "\ud800", "without .metadata"])
def test_manifest_of_impossible_files_is_damage(tmp_path: Path, name: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    commit = json.loads((bad / "COMMIT.json").read_text())
    record = commit["files"].pop("tensors/.metadata")
    if name != "without .metadata":
        commit["files"] |= {"tensors/.metadata": record, name: record}
    (bad / "COMMIT.json").write_text(json.dumps(commit))
    with pytest.raises(ConfigError, match="step-00000002 is damaged: "):
        verify(bad)
    assert find_latest(tmp_path) == good
    assert save(tmp_path, 3, keep_last=1).is_dir() and not good.exists() and bad.exists()


def test_trouble_behind_a_published_checkpoint_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It strikes rank 0 alone: raised there, it would leave the others waiting."""

    def fail(root: Path) -> list[Path]:
        raise ValueError("embedded null byte")

    monkeypatch.setattr(manager_module, "_published", fail)
    with caplog.at_level(logging.WARNING):
        folder = save(tmp_path, 1, keep_last=1)
    verify(folder)
    assert "could not tidy: ValueError: embedded null byte" in caplog.text


def test_a_run_with_damaged_checkpoints_only_does_not_begin_anew(tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path) is None
    good = save(tmp_path, 1)
    shard(save(tmp_path, 2)).unlink()
    assert checkpoint_to_resume(tmp_path) == good
    shard(good).unlink()
    with pytest.raises(ConfigError, match=r"no undamaged checkpoint \(2 damaged\).*checkpoint\.resume=DIR"):
        checkpoint_to_resume(tmp_path)


def test_complete_step_is_never_overwritten(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(ConfigError, match="complete already"):
        save(tmp_path, 1)
    verify(folder)
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_step_is_set_aside_and_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("damaged", "damaged2", "damaged3"):
        flip_bit(shard(tmp_path / "step-00000001"), 100)
        assert value(save(tmp_path, 1)) == 1
        assert (tmp_path / f"step-00000001.{name}" / "COMMIT.json").is_file()


def test_foreign_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a checkpoint of ours"):
        save(tmp_path, 1)
    assert (tmp_path / "step-00000001" / "thesis.txt").exists()


def test_retention_and_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    foreign = ["keep-step-00000001-best", "step-1.tmp", "step-00000002.backup", "notes"]
    for name in foreign:
        (tmp_path / name).mkdir()
    crashed = ["step-00000009.tmp", "step-00000000.del"]
    for name in crashed:
        (tmp_path / name / "tensors").mkdir(parents=True)
    (tmp_path / "step-00000008.tmp").symlink_to(tmp_path / "notes")
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000007")
    shard(tmp_path / "step-00000007").unlink()  # incomplete: neither counted nor deleted
    save(tmp_path, 4, keep_last=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "LATEST", "step-00000003", "step-00000004", "step-00000007", "step-00000008.tmp", *foreign
    }  # fmt: skip
    assert find_latest(tmp_path) == tmp_path / "step-00000004"


def test_a_leftover_that_cannot_be_removed_is_no_reason_not_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, where somebody still reads what was deleted."""
    (tmp_path / "step-00000001.del").mkdir()
    real = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda path, **named: fail() if ".del" in str(path) else real(path, **named))

    def fail() -> None:
        raise OSError(39, "Directory not empty")

    verify(save(tmp_path, 2))
    assert (tmp_path / "step-00000001.del").is_dir()


def test_a_branch_beside_later_steps_is_refused(tmp_path: Path) -> None:
    """A later resume=auto would take the other branch's last step for this one's."""
    first, second = save(tmp_path / "run", 1), save(tmp_path / "run", 2)
    refuse_later_steps(tmp_path / "run", second)
    refuse_later_steps(tmp_path / "other", first)
    with pytest.raises(ConfigError, match="holds later steps .step-00000002. than .*step-00000001.*another run_name"):
        refuse_later_steps(tmp_path / "run", first)
    flip_bit(shard(second), 100)  # what is damaged is set aside when its step comes
    refuse_later_steps(tmp_path / "run", first)


def test_newest_write_survives_retention_behind_older_steps(tmp_path: Path) -> None:
    for step in (8, 9):
        save(tmp_path, step)
    folder = save(tmp_path, 5, keep_last=1)
    assert {path.name for path in tmp_path.glob("step-*")} == {folder.name, "step-00000009"}


def test_every_so_many_steps_one_is_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2, keep_every=4)
    for step in range(1, 11):
        manager.save(step, {"p": torch.ones(2)}, {})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


@pytest.mark.parametrize("keep_last", [0, -1])
def test_keep_last_must_be_positive(tmp_path: Path, keep_last: int) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last"):
        CheckpointManager(tmp_path, keep_last)


def test_resolve(tmp_path: Path) -> None:
    folder = save(tmp_path / "run" / "checkpoints", 3)
    save(tmp_path / "run" / "checkpoints", 2)
    for path in (folder, folder.parent, tmp_path / "run"):
        assert resolve_checkpoint(path) == folder
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert value(resolve_checkpoint(tmp_path / "link")) == 3
    for path, match in ((tmp_path / "gone", "is not a folder"), (tmp_path, "neither a checkpoint nor a run")):
        with pytest.raises(ConfigError, match=match):
            resolve_checkpoint(path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    shard(folder).unlink()
    with pytest.raises(ConfigError, match="no undamaged checkpoint"):
        resolve_checkpoint(tmp_path / "run")


def test_find_latest_of_nothing(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "gone") is None


def test_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="disk full: the checkpoint needs 48 bytes, 10 are free"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_every_byte_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves is what fsync saw: each file must have its final size then."""
    synced: dict[int, int] = {}
    real_sync, real_rename = os.fsync, Path.rename
    at_rename: dict[str, bool] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        for file in path.rglob("*"):
            at_rename[str(file.relative_to(path))] = synced.get(file.stat().st_ino) == file.stat().st_size
        at_rename["."] = path.stat().st_ino in synced
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 1)
    assert set(at_rename) > {"COMMIT.json", "tensors/.metadata", "tensors/__0_0.distcp", "."}
    assert all(at_rename.values()), at_rename
    assert tmp_path.stat().st_ino in synced


def test_memory_of_a_container_is_respected(tmp_path: Path) -> None:
    on_machine = _available_bytes(tmp_path)
    for name, text in {"current": "900\n", "stat": "anon 500\ninactive_file 300\n", "max": "max\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert on_machine > 1000 and _available_bytes(tmp_path) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert _available_bytes(tmp_path) == 400
