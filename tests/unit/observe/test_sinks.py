import io
import json
import logging
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from moe_trainer.config.schema import Config, WandbMode
from moe_trainer.observe.sinks import ConsoleSink, JsonlSink, WandbSink, read_metrics

METRICS = {
    "loss": 2.5,
    "aux_loss": 1.01,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens_per_second": 12345.6,
    "memory_gib": 0.25,
    "expert_load_max_over_mean": 1.5,
}


def write(path, *records):
    sink = JsonlSink(path)
    for step, metrics in records:
        sink.log(step, metrics)
    sink.close()


def wandb_config(mode):
    cfg = Config()
    cfg.logging.wandb = mode
    return cfg


def test_a_plain_console_has_aligned_lines_and_nothing_else(capsys):
    sink = ConsoleSink(total_steps=1000, start_step=0, every=1)
    sink.log(1, METRICS)
    sink.log(1000, METRICS | {"loss": 123.25, "tokens_per_second": 7.0, "grad_norm": float("nan")})
    sink.close()
    out = capsys.readouterr().out
    first, last = out.splitlines()
    assert first == (
        "step    1/1000  loss   2.5000  aux  1.0100  grad_norm    0.500  lr 3.00e-04  "
        "tok/s    12,346  mem   0.25 GiB  load  1.50"
    )
    assert len(first) == len(last) and "nan" in last
    assert "\x1b" not in out


def test_what_is_not_measured_is_not_shown(capsys):
    ConsoleSink(10, 0, 1).log(1, {"loss": 1.0})
    assert capsys.readouterr().out == "step  1/10  loss   1.0000\n"


def test_validation_is_always_printed_and_a_resumed_run_prints_its_first_step(capsys):
    sink = ConsoleSink(total_steps=100, start_step=41, every=50)
    sink.log(42, {"loss": 1.0})
    sink.log(43, {"loss": 1.0})
    sink.log(44, {"val_loss": 1.0})
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["step  42", "step  44"]


def test_a_terminal_gets_a_progress_bar_below_the_lines():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    sink = ConsoleSink(total_steps=10, start_step=4, every=1, console=terminal)
    sink.log(5, METRICS)
    sink.close()
    screen = terminal.file.getvalue()
    assert "loss   2.5000" in screen
    assert "5/10" in screen.rsplit("training", 1)[1]


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
        sink.log(1, METRICS)
        sink.close()
    server.shutdown()
    server.server_close()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert files and {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert all(b"grad_norm" in file.read_bytes() for file in files)
    assert calls == []


@pytest.mark.parametrize("broken", ["import", "init", "log", "finish"])
def test_a_broken_wandb_is_warned_about_once_and_stops_nothing(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise RuntimeError(f"no {broken} today")

    def fine(*args, **kwargs):
        return None

    run = types.SimpleNamespace(
        define_metric=fine, log=fail if broken == "log" else fine, finish=fail if broken == "finish" else fine
    )
    fake = types.SimpleNamespace(
        init=fail if broken == "init" else lambda **kwargs: run, Settings=lambda **kwargs: kwargs
    )
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import" else fake)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("moe_trainer"), "handlers", [handler])
    sink = WandbSink(tmp_path, wandb_config(WandbMode.online))
    for step in (1, 2, 3):
        sink.log(step, METRICS)
    sink.close()
    assert len(records) == 1
    assert ("pip install wandb" if broken == "import" else f"no {broken} today") in records[0].getMessage()
