import io
import re

from rich.console import Console

from moe_trainer.observe.console import ConsoleSink

METRICS = {
    "loss": 2.5,
    "aux_loss": 1.01,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens": 8192,
    "seconds": 1.0,
    "data_seconds": 0.001,
    "skipped_steps": 0,
    "tokens_per_second_per_gpu": 12345.6,
    "tflops_per_gpu": 412.34,
    "mfu": 0.417,
    "memory_gib": 0.25,
    "expert_load_max_over_mean": 1.5,
    "dead_experts": 2.0,
    "expert_load": [[1, 2]],
}


def terminal(width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def shown(console: Console) -> str:
    """What was written to the terminal, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_plain_console_has_aligned_lines_and_nothing_else(capsys):
    sink = ConsoleSink(total_steps=1000, start_step=0, every=1)
    sink.log(1, METRICS)
    sink.log(1000, METRICS | {"loss": 123.25, "tokens_per_second_per_gpu": 7.0, "grad_norm": float("nan")})
    sink.close()
    out = capsys.readouterr().out
    first, last = out.splitlines()
    assert first == (
        "step    1/1000  loss   2.5000  aux  1.0100  grad_norm    0.500  lr 3.00e-04  tok/s/GPU    12,346  "
        "TFLOP/s      412  MFU  41.7%  mem   0.25 GiB  load  1.50  dead   2"
    )
    assert len(first) == len(last) and "nan" in last
    assert "\x1b" not in out


def test_what_is_not_measured_is_not_shown(capsys):
    ConsoleSink(10, 0, 1).log(1, {"loss": 1.0})
    assert capsys.readouterr().out == "step  1/10  loss   1.0000\n"


def test_a_wait_for_data_and_skipped_steps_show_when_there_are_any(capsys):
    sink = ConsoleSink(10, 0, 1)
    sink.log(1, {"loss": 1.0, "seconds": 2.0, "data_seconds": 0.03, "skipped_steps": 0})
    sink.log(2, {"loss": 1.0, "seconds": 2.0, "data_seconds": 0.5, "skipped_steps": 3, "grad_spikes": 2})
    quiet, loud = capsys.readouterr().out.splitlines()
    assert quiet.endswith("loss   1.0000") and loud.endswith("loss   1.0000  data  25%  skipped 3  spikes 2")


def test_a_rank_that_the_others_wait_for_shows(capsys):
    sink = ConsoleSink(10, 0, 1)
    for over, share in ((1.19, 0.9), (1.5, 0.1), (2.0, 0.8)):
        sink.log(1, {"slowest_rank": 3.0, "slowest_over_median": over, "slowest_data_share": share})
    quiet, slow, data = capsys.readouterr().out.splitlines()
    assert "rank" not in quiet and slow.endswith("rank 3 takes 1.5 x")
    assert data.endswith("rank 3 takes 2.0 x, 80% of it for data")


def test_validation_is_always_printed_and_a_resumed_run_prints_its_first_step(capsys):
    sink = ConsoleSink(total_steps=100, start_step=41, every=50)
    sink.log(42, {"loss": 1.0})
    sink.log(43, {"loss": 1.0})
    sink.log(44, {"val_loss": 1.0, "val_perplexity": 2.718})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  42", "step  44"]
    assert "val_loss   1.0000" in lines[1] and "perplexity      2.72" in lines[1]


def test_a_terminal_shows_everything_about_the_last_step_below_a_bar():
    console = terminal()
    sink = ConsoleSink(total_steps=10, start_step=4, every=1, console=console)
    sink.log(5, METRICS)
    sink.log(6, METRICS | {"loss": 2.25})
    sink.close()
    last = shown(console).rsplit("6/10", 1)[1]
    assert " 60% " in last
    for part in ("loss 2.2500", "grad_norm 0.500", "lr 3.00e-04", "tok/s/GPU 12,346", "TFLOP/s 412", "MFU 41.7%"):
        assert part in last
    for part in ("mem 0.25 GiB", "load 1.50", "dead 2"):
        assert part in last


def test_a_terminal_keeps_validation_lines_and_does_not_list_steps():
    console = terminal()
    sink = ConsoleSink(total_steps=10, start_step=0, every=1, console=console)
    sink.log(1, METRICS)
    sink.log(1, {"val_loss": 3.0})
    sink.close()
    assert "step  1/10  val_loss   3.0000" in shown(console)
    assert "step  1/10  loss" not in shown(console)


def test_a_narrow_terminal_breaks_between_metrics_only():
    console = terminal(width=40)
    sink = ConsoleSink(total_steps=10, start_step=0, every=1, console=console)
    sink.log(1, METRICS)
    sink.close()
    lines = [line.rstrip() for line in shown(console).splitlines()]
    assert max(map(len, lines)) <= 40
    parts = [part.strip() for line in lines for part in line.split("  ")]
    for whole in ("loss 2.5000", "tok/s/GPU 12,346", "TFLOP/s 412", "mem 0.25 GiB", "load 1.50", "dead 2"):
        assert whole in parts
