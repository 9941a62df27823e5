import json
import logging

import pytest
import torch

from moe_trainer.config.schema import ProfileConfig
from moe_trainer.observe.profile import StepProfiler

CPU = torch.device("cpu")


def train(profiler, first, last):
    """Steps that each leave their number in the trace, as the length of a vector."""
    with profiler:
        for step in range(first, last + 1):
            profiler.before(step)
            torch.ones(1000 + step).sigmoid()


def steps_in(path):
    events = json.loads(path.read_text())["traceEvents"]
    shapes = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::sigmoid"]
    return sorted(shape[0][0] - 1000 for shape in shapes)


def test_neighbouring_steps_share_a_trace_and_hold_nothing_else(tmp_path):
    train(StepProfiler(ProfileConfig(steps=[2, 3, 6]), tmp_path / "profile", 0, CPU, 0), 1, 7)
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == ["rank0-step00000002-00000003.trace.json", "rank0-step00000006-00000006.trace.json"]
    assert [steps_in(tmp_path / "profile" / name) for name in files] == [[2, 3], [6]]


def test_a_run_that_ends_within_the_steps_leaves_its_trace(tmp_path):
    train(StepProfiler(ProfileConfig(steps=[2, 3, 4], ranks=[1]), tmp_path, 1, CPU, 0), 1, 3)
    assert steps_in(tmp_path / "rank1-step00000002-00000003.trace.json") == [2, 3]


def test_without_steps_it_is_the_fourth_to_sixth_of_the_command(tmp_path):
    train(StepProfiler(ProfileConfig(), tmp_path, 0, CPU, start_step=100), 101, 108)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-step00000104-00000106.trace.json"]


@pytest.mark.parametrize(("cfg", "rank"), [(None, 0), (ProfileConfig(steps=[1]), 1)], ids=["off", "another rank"])
def test_otherwise_nothing_is_recorded_or_written(tmp_path, cfg, rank):
    profiler = StepProfiler(cfg, tmp_path / "profile", rank, CPU, 0)
    train(profiler, 1, 6)
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_reported_once(tmp_path, monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("moe_trainer"), "handlers", [handler])
    (tmp_path / "profile").write_text("a file where the folder should be")
    train(StepProfiler(ProfileConfig(steps=[1, 3]), tmp_path / "profile", 0, CPU, 0), 1, 4)
    assert len(records) == 1 and "training goes on" in records[0]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("is_full", (False, True))
def test_on_a_gpu_memory_is_recorded_for_these_steps_only(tmp_path, monkeypatch, is_full):
    """No GPU needed: what is tested is when the history is switched on and off, and where the snapshot goes."""
    calls = []

    def dump(path):
        calls.append(("dump", path))
        if is_full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    train(StepProfiler(ProfileConfig(steps=[2, 3]), tmp_path, 0, torch.device("cuda"), 0), 1, 5)
    begin, *rest = calls
    assert begin["max_entries"] > 0
    assert rest == [
        "wait",
        ("dump", str(tmp_path / "rank0-step00000002-00000003.memory.pickle")),
        {"enabled": None},
    ]
