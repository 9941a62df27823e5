"""Told to stop, a run saves at the same step on every rank, ends well, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_trainer.checkpoint.manager import find_latest, read_document
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.state import TrainState
from moe_trainer.train.stop import StopRequest
from tests.distributed.runs import wait_for_steps

RECIPE = ["+recipe=mixtral_tiny", "run_name=stopped", "device=cpu"]
LONG = "steps=100000"


def steps_until_agreed(signalled: int, sent: signal.Signals) -> tuple[int, str | None]:
    """One rank gets a signal during its third step."""
    before = signal.getsignal(sent)
    with StopRequest() as stop:
        steps = 0
        while not stop.agreed():
            steps += 1
            if steps == 3 and dist.get_rank() == signalled:
                os.kill(os.getpid(), sent)
            if dist.get_rank() == 1:
                time.sleep(0.05)  # a slow rank
    assert signal.getsignal(sent) is before
    return steps, stop.reason


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_all_ranks_stop_at_the_same_step(sent: signal.Signals) -> None:
    outcomes = run_distributed(steps_until_agreed, 3, 2, sent)
    assert outcomes == [(4, None), (4, None), (4, sent.name)]  # the vote of one call counts at the next


def test_the_clock_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    clock, told = StopRequest(max_minutes=1e-9), StopRequest(file)
    clock._look(), told._look()
    assert clock.reason == "max_minutes=1e-09 are over" and told.reason is None
    file.touch()
    told._look()
    assert told.reason == "asked to stop"


def train(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moe_trainer.cli.train", *RECIPE, f"run_dir={folder}", *overrides]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_printed_command_goes_on(tmp_path: Path, sent: signal.Signals) -> None:
    command = train(tmp_path, LONG)
    wait_for_steps(command, tmp_path / "stopped", 3)
    command.send_signal(sent)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    expected = f"go on with: moe-train {' '.join(RECIPE)} run_dir={tmp_path} {LONG} checkpoint.resume=auto"
    assert expected in out
    losses = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    last = losses[-1]["step"]
    checkpoint = find_latest(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None and TrainState.from_json(read_document(checkpoint, "state.json")).step == last
    if sent is signal.SIGINT:
        return
    resumed = train(tmp_path, f"steps={last + 2}", "checkpoint.resume=auto", "optim.schedule_steps=100")
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    assert [line["step"] for line in read_metrics(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, last + 3))


def has_child(pid: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                return True
    return False


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Here while the ranks still start, and look for no file."""
    command = train(tmp_path, LONG)
    deadline = time.monotonic() + 240
    while not has_child(command.pid):  # the ranks' agent, from which on the launcher listens
        assert command.poll() is None and time.monotonic() < deadline, "nothing was launched"
        time.sleep(0.05)
    time.sleep(0.5)
    command.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    command.send_signal(signal.SIGTERM)
    began = time.monotonic()
    command.communicate(timeout=60)
    assert command.returncode == 143 and time.monotonic() - began < 10
