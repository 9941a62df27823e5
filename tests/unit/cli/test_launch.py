"""Real launches of two ranks that do nothing: exit codes, who speaks, and that no rank outlives its launcher."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import environment, ranks_of, wait_until_gone

LAUNCH = "import sys; from moe_trainer.cli.launch import launch; sys.exit(launch('dummy_ranks', sys.argv[1:], 2))"


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    given = environment(Path(__file__).parent)
    env = {name: value for name, value in given.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", LAUNCH, str(folder), mode]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("mode", "code", "stderr"),
    [
        ("well", 0, ""),
        ("well_but_for_the_end", 0, ""),
        ("mistake", 2, "moe-dummy: data.path=x: no such file\n"),
        ("killed", 1, "rank 1 was killed by SIGKILL; the other ranks were ended\n"),
    ],
)
def test_exit_code_and_one_line(tmp_path: Path, mode: str, code: int, stderr: str) -> None:
    command = start(tmp_path, mode)
    printed, said = command.communicate(timeout=240)
    assert (command.returncode, said) == (code, stderr)
    assert printed == ("done" if mode == "well_but_for_the_end" else "")
    assert wait_until_gone(ranks_of(tmp_path), 1)


def test_crash_shows_the_ranks_traceback_and_not_the_launchers(tmp_path: Path) -> None:
    command = start(tmp_path, "crash")
    _, said = command.communicate(timeout=240)
    assert command.returncode == 1
    assert said.count("Traceback") == 1 and "RuntimeError: boom" in said
    assert said.endswith("rank 1 left with code 1; the other ranks were ended\n")
    assert "ChildFailedError" not in said and "OMP_NUM_THREADS" not in said


def test_a_rank_that_raises_takes_the_others_down_in_ten_seconds(tmp_path: Path) -> None:
    command = start(tmp_path, "crash_in_a_group")
    _, said = command.communicate(timeout=240)
    assert time.time() - (tmp_path / "boom").stat().st_mtime < 10
    assert command.returncode == 1
    assert said.count("Traceback") == 1 and "RuntimeError: boom" in said and "closed" not in said
    assert said.endswith("rank 1 left with code 1; the other ranks were ended\n")


def test_a_mistake_of_one_rank_in_a_collective_is_one_line_and_ends_all(tmp_path: Path) -> None:
    command = start(tmp_path, "mistake_in_a_group")
    out, said = command.communicate(timeout=240)
    assert time.time() - (tmp_path / "boom").stat().st_mtime < 10
    assert (command.returncode, said) == (2, "moe-dummy: data.path=x: no such file\n")
    assert out == "the last words of stdout"
    assert wait_until_gone(ranks_of(tmp_path), 1)


@pytest.mark.parametrize(
    ("mode", "sent", "code"),
    [
        ("sleep", signal.SIGINT, 130),
        ("sleep", signal.SIGTERM, 143),
        ("stubborn", signal.SIGINT, 130),
        ("sleep", signal.SIGHUP, 129),
    ],
)
def test_signal_ends_every_rank_in_ten_seconds(tmp_path: Path, mode: str, sent: signal.Signals, code: int) -> None:
    command = start(tmp_path, mode)
    ranks = ranks_of(tmp_path)
    began = time.monotonic()
    command.send_signal(sent)
    _, said = command.communicate(timeout=30)
    assert wait_until_gone(ranks, 10 - (time.monotonic() - began))
    assert (command.returncode, said) == (code, "")


def test_ranks_go_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    command = start(tmp_path, "stubborn")
    ranks = ranks_of(tmp_path)
    command.kill()
    command.wait()
    assert wait_until_gone(ranks, 10)


@pytest.mark.slow
def test_the_ranks_of_another_torchrun_meet_again_after_a_loss(tmp_path: Path) -> None:
    """Its store still holds the addresses of the ranks that are gone."""
    env = environment(Path(__file__).parent) | {"OMP_NUM_THREADS": "1"}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, "-m", *torchrun, "-m", "dummy_ranks", str(tmp_path), "killed_once"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and (tmp_path / "boom").exists(), done.stderr
