import io
import json
import logging
import socket
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moe_trainer.config.choices import WandbMode
from moe_trainer.config.schema import Config
from moe_trainer.observe import metrics as metrics_module
from moe_trainer.observe import sinks
from moe_trainer.observe.metrics import MetricsLog
from moe_trainer.observe.sinks import JsonlSink, TensorBoardSink, WandbSink, read_metrics

METRICS = {
    "loss": 2.5,
    "aux_loss": 1.01,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens_per_second": 12345.6,
    "memory_gib": 0.25,
    "expert_load_max_over_mean": 1.5,
}


@pytest.fixture
def warnings(monkeypatch):
    """Texts of the package's messages."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("moe_trainer"), "handlers", [handler])
    return found


def write(path, *records):
    sink = JsonlSink(path)
    for step, metrics in records:
        sink.log(step, metrics)
    sink.close()


def wandb_config(mode):
    cfg = Config()
    cfg.logging.wandb = mode
    return cfg


def test_a_line_is_there_at_once_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(3, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert json.loads(path.read_text()) == {"step": 3, "loss": None, "grad_norm": None, "lr": 0.5}
    sink.close()


def test_of_a_repeated_step_the_later_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"loss": 4.0}), (2, {"loss": 3.0, "aux_loss": 1.0}), (2, {"val_loss": 9.0}), (3, {"loss": 2.0}))
    write(path, (2, {"loss": 2.5}))
    assert read_metrics(path) == [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "val_loss": 9.0},
        {"step": 3, "loss": 2.0},
    ]


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"loss": 4.0}), (2, {"loss": 3.0}))
    path.write_bytes(path.read_bytes()[:-5])
    assert [line["step"] for line in read_metrics(path)] == [1]
    write(path, (2, {"loss": 3.5}))
    assert read_metrics(path) == [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError):
        read_metrics(path)


def test_wandb_offline_writes_a_run_and_calls_nobody(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            calls.append(self.path)
            self.send_error(500)

        do_GET = do_PUT = do_POST

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for home in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(home, str(tmp_path / "home"))
    for _ in range(2):  # the second time as a resumed run
        sink = WandbSink(tmp_path, wandb_config(WandbMode.offline))
        sink.log(1, METRICS | {"expert_load": [[1, 2]]})
        sink.close()
    server.shutdown()
    server.server_close()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert files and {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert all(b"grad_norm" in file.read_bytes() for file in files)
    assert calls == []


def wandb_that_fails_at(broken: str) -> types.SimpleNamespace:
    def fail(*args, **kwargs):
        raise RuntimeError(f"no {broken} today")

    def fine(*args, **kwargs):
        return None

    run = types.SimpleNamespace(
        define_metric=fine, log=fail if broken == "log" else fine, finish=fail if broken == "finish" else fine
    )
    init = fail if broken == "init" else lambda **kwargs: run
    return types.SimpleNamespace(init=init, Settings=lambda **kwargs: types.SimpleNamespace(**kwargs))


@pytest.mark.parametrize("broken", ["import", "init", "log", "finish"])
def test_a_broken_wandb_is_warned_about_once_and_stops_nothing(tmp_path, monkeypatch, warnings, broken):
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import" else wandb_that_fails_at(broken))
    log = MetricsLog(tmp_path, wandb_config(WandbMode.online), total_steps=3, start_step=0)
    for step in (1, 2, 3):
        log.log(step, METRICS)
    log.close()
    assert len(warnings) == 1
    assert ("pip install wandb" if broken == "import" else f"no {broken} today") in warnings[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_is_given_up(tmp_path, monkeypatch, warnings):
    """A closed port stands for a network that is down; the key only looks like one."""
    pytest.importorskip("wandb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for home in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(home, str(tmp_path / "home"))
    monkeypatch.setattr(sinks, "_WANDB_SECONDS", 5)
    log = MetricsLog(tmp_path, wandb_config(WandbMode.online), total_steps=1, start_step=0)
    log.log(1, METRICS)
    log.close()
    assert len(warnings) == 1 and warnings[0].startswith("wandb is off")
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.5]


@pytest.mark.parametrize("name", ["the console", "TensorBoard"])
def test_any_other_sink_may_break_too(tmp_path, monkeypatch, warnings, name):
    class Broken:
        def __init__(self, *args):
            self.calls = 0

        def log(self, step, metrics):
            self.calls += 1
            raise OSError("broken pipe")

        close = log

    monkeypatch.setattr(
        metrics_module, {"the console": "ConsoleSink", "TensorBoard": "TensorBoardSink"}[name], Broken
    )
    cfg = Config()
    cfg.logging.tensorboard = name == "TensorBoard"
    log = MetricsLog(tmp_path, cfg, total_steps=2, start_step=0)
    for step in (1, 2):
        log.log(step, METRICS)
    log.close()
    assert warnings == [f"{name} is off for the rest of this run, training goes on: broken pipe"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


class FullDisk:
    """A file on a disk with so many bytes left, which takes a part of what does not fit, as a disk does."""

    def __init__(self, file: io.FileIO, room: int) -> None:
        self.file, self.room, self.name = file, room, file.name

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_loses_no_line_once_there_is_room(tmp_path, warnings):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink._file = FullDisk(sink._file, room=30)
    for step in range(1, 6):
        sink.log(step, {"loss": 1.0 / step})
    assert path.stat().st_size == 30 and len(warnings) == 1 and "No space left" in warnings[0]
    sink._file.room = 10_000
    sink.log(6, {"loss": 0.0})
    sink.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert len(warnings) == 1


def test_a_disk_that_stays_full_costs_the_oldest_lines_and_little_memory(tmp_path, warnings):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, max_waiting=1000)
    sink._file = FullDisk(sink._file, room=10)
    for step in range(1, 200):
        sink.log(step, {"loss": 0.5})
        assert len(sink._waiting) <= 1000
    sink._file.room = 10_000
    sink.log(200, {"loss": 0.5})
    sink.close()
    steps = [line["step"] for line in read_metrics(path)]
    assert steps[0] == 1 and steps[-1] == 200 and steps[1:] == list(range(steps[1], 201))
    assert len(steps) > 10


def test_a_run_that_ends_on_a_full_disk_says_what_is_missing(tmp_path, warnings):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink._file = FullDisk(sink._file, room=5)
    sink.log(1, METRICS)
    sink.log(2, METRICS)
    sink.close()
    assert "lacks its last 2 line(s)" in warnings[-1]


def test_tensorboard_shows_the_same_names_and_no_step_of_before_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, METRICS | {"expert_load": [[1, 2]]})
    first.close()
    time.sleep(1.1)  # files are named by the second
    resumed = TensorBoardSink(tmp_path, 1)
    resumed.log(2, METRICS | {"loss": 7.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 7.0)]
