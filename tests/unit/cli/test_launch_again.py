"""How a launch goes on after a loss, and which rank is told of; without ranks."""

import json
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.cli import launch as module
from moe_trainer.cli.launch import Outcome, Start, launch_again
from moe_trainer.cli.restart import is_restart, next_start, resume_after_loss
from moe_trainer.cli.whereabouts import describe_ranks
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate


def config(folder: Path, *more: str) -> Config:
    elastic = ["parallel.mesh=auto", "launch.max_restarts=3", "launch.shrink=true", "checkpoint.every=1"]
    overrides = ["+recipe=mixtral_sp_ep", "device=cpu", f"run_dir={folder}", "run_name=run", *elastic, *more]
    return validate(compose("train", overrides), None, 0)


def checkpoint_of(folder: Path) -> None:
    CheckpointManager(folder / "run" / "checkpoints", None).save(1, {"w": torch.ones(2)}, {})


def test_fewer_ranks_after_a_kill_as_many_after_an_error(tmp_path: Path) -> None:
    cfg, first = config(tmp_path), Start(["a=1", "checkpoint.resume=none"], 4)
    assert next_start(cfg, 0, first, []) == Start(["a=1", "checkpoint.resume=auto"], 4)
    assert next_start(cfg, 0, first, [2]) == Start(["a=1", "checkpoint.resume=auto"], 2)
    assert next_start(cfg, 0, first, [0, 1, 2]).nproc == 1
    assert next_start(cfg, 0, first, [0, 1, 2, 3]) == Start(["a=1", "checkpoint.resume=auto"], 4)
    stubborn = replace(cfg, launch=replace(cfg.launch, shrink=False))
    assert next_start(stubborn, 0, first, [2]).nproc == 4


def test_the_gpu_of_a_lost_rank_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cfg = replace(config(tmp_path), device=DeviceName.cuda)
    second = next_start(cfg, 4, Start([], 4), [1])
    assert second.nproc == 2 and second.env == {"CUDA_VISIBLE_DEVICES": "0,2,3"}
    assert next_start(cfg, 4, second, [0]).env == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert next_start(cfg, 4, Start([], 4), [1]).env == {"CUDA_VISIBLE_DEVICES": "4,6,7"}
    last = Start([], 1, {"CUDA_VISIBLE_DEVICES": "5"})
    assert next_start(cfg, 4, last, [0]) == last._replace(argv=["checkpoint.resume=auto"])  # not on the CPU


def test_a_gpu_that_ranks_share_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_TRAINER_RANKS_PER_GPU", "4")
    cfg = replace(config(tmp_path), device=DeviceName.cuda)
    assert next_start(cfg, 4, Start([], 4), [0]).env == {}


def test_profiled_ranks_that_are_left_are_profiled(tmp_path: Path) -> None:
    argv = ["+recipe=mixtral_sp_ep", "profile=true", "profiler.ranks=[0,3]", f"run_dir={tmp_path}"]
    cfg = config(tmp_path, "profile=true", "profiler.ranks=[0,3]")
    second = next_start(cfg, 0, Start(argv, 4), [2])
    assert second.nproc == 2 and compose("train", second.argv).profiler.ranks == [0]
    assert next_start(cfg, 0, Start(argv, 4), []).argv == [*argv, "checkpoint.resume=auto"]
    cfg.profiler.ranks = [3]
    assert not compose("train", next_start(cfg, 0, Start(argv, 4), [2]).argv).profile


def test_own_checkpoints_come_before_the_one_that_was_named(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    cfg = config(tmp_path, f"checkpoint.resume={elsewhere}")
    assert resume_after_loss(cfg) == str(elsewhere)
    checkpoint_of(tmp_path)
    assert resume_after_loss(cfg) == "auto"
    next((tmp_path / "run").rglob("*.distcp")).write_bytes(b"")
    assert resume_after_loss(cfg) == str(elsewhere)
    assert resume_after_loss(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="none"))) == "auto"


@pytest.mark.parametrize(("count", "expected"), [(None, False), ("0", False), ("2", True)])
def test_restarts_of_another_torchrun(count: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert is_restart() is expected


@pytest.mark.parametrize(
    ("outcomes", "code", "starts"),
    [
        ([Outcome(1, [1], False), Outcome(0, [], False)], 0, [4, 3]),
        ([Outcome(1, [1], False)] * 3, 1, [4, 3, 2]),
        ([Outcome(2, [], False)], 2, [4]),
        ([Outcome(1, [1], True)], 1, [4]),  # somebody wanted it to end
        ([Outcome(143, [], True)], 143, [4]),
    ],
)
def test_restarts_are_counted_and_only_losses_are_mended(
    outcomes: list[Outcome], code: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, left = [], list(outcomes)

    def run(name: str, start: Start, lets_finish: bool) -> Outcome:
        started.append(start.nproc)
        return left.pop(0)

    monkeypatch.setattr(module, "_launch", run)
    again = lambda last, lost: last._replace(nproc=last.nproc - len(lost))  # noqa: E731
    assert launch_again("m", Start([], 4), 2, again) == code
    assert started == starts


def failure(exitcode: int, message: str, folder: Path, rank: int, timestamp: int = 5) -> SimpleNamespace:
    file = folder / f"error{rank}.json"
    if message:
        file.write_text("{}")
    signal_name = lambda: signal.Signals(-exitcode).name  # noqa: E731
    data = {"message": message}
    return SimpleNamespace(
        exitcode=exitcode, timestamp=timestamp, error_file=str(file), error_file_data=data, signal_name=signal_name
    )


LOST = "Traceback ...\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1234"


@pytest.mark.parametrize(
    ("failures", "said", "lost"),
    [
        ([(1, LOST, 3), (-9, "", 4)], "rank 1 was killed by SIGKILL; the other ranks were ended\n", [1]),
        ([(1, LOST, 3), (1, "Traceback ...\nValueError: boom", 4)], "ValueError: boom\nrank 1 left with code 1", []),
        ([(-15, "", 1), (1, LOST, 4)], "rank 1 left with code 1", []),
        ([(1, "IndexError: late", 9), (1, "KeyError: early", 3)], "KeyError: early\nrank 1 left with code 1", []),
    ],
)
def test_the_rank_that_failed_by_itself_is_told_of(
    failures: list[tuple[int, str, int]],
    said: str,
    lost: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOE_TRAINER_LAUNCH_FOLDER", str(tmp_path))
    made = {rank: failure(code, text, tmp_path, rank, at) for rank, (code, text, at) in enumerate(failures)}
    assert module._tell(made, 2) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("rank 1") == 1
    assert json.loads((tmp_path / "lost.json").read_text()) == lost


@pytest.mark.parametrize("has_dump", [True, False])
def test_nccl_s_time_out_may_end_a_rank_by_a_segmentation_fault(
    has_dump: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen on two H200: then its dump is there, and no GPU is taken for lost."""
    monkeypatch.setenv("MOE_TRAINER_LAUNCH_FOLDER", str(tmp_path))
    if has_dump:
        (tmp_path / "nccl_rank0").write_bytes(pickle.dumps({"entries": []}, 2))
    made = {0: failure(-11, "", tmp_path, 0), 1: failure(-15, "", tmp_path, 1)}
    assert module._tell(made, 2) == 1
    err = capsys.readouterr().err
    assert "rank 0 was killed by SIGSEGV" in err and ("where the ranks were:" in err) == has_dump
    assert json.loads((tmp_path / "lost.json").read_text()) == ([] if has_dump else [0])


def test_ranks_that_left_no_note_are_listed_too(tmp_path: Path) -> None:
    (tmp_path / "rank0.step").write_text("7           ")
    (tmp_path / "rank0.json").write_text(json.dumps({"where": "loss.py:3 f (wait)", "collective": "all_reduce #5"}))
    (tmp_path / "rank1.json").write_text("{")
    assert describe_ranks(tmp_path, 2) == [
        "  rank 0: step 7, at loss.py:3 f (wait), last collective all_reduce #5",
        "  rank 1: step not begun, at an unknown place",
    ]


def test_the_last_collective_of_a_rank_that_nccl_ended_is_in_its_dump(tmp_path: Path) -> None:
    """As its flight recorder writes it: a pickle, of which nothing but plain data is taken."""
    entry = {"process_group": ("0", "default_pg"), "profiling_name": "nccl:all_reduce", "state": "started"}
    entries = [entry | {"collective_seq_id": number, "time_created_ns": 1000 + number} for number in (8, 9, 7)]
    (tmp_path / "nccl_rank0").write_bytes(pickle.dumps({"version": "2.10", "entries": entries}, 2))
    (tmp_path / "nccl_rank1").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    (tmp_path / "nccl_rank2").write_bytes(pickle.dumps({"entries": [{"state": "odd"}]})[:-9])
    assert describe_ranks(tmp_path, 3) == [
        "  rank 0: step not begun, at an unknown place, last collective nccl:all_reduce #9 of default_pg, started",
        "  rank 1: step not begun, at an unknown place",
        "  rank 2: step not begun, at an unknown place",
    ]
    assert not (tmp_path / "owned").exists()
