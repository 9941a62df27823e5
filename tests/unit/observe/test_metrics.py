import math

import pytest
import torch

from moe_trainer.config.schema import Config
from moe_trainer.observe.metrics import MetricsLog, expert_load, memory_gib, throughput
from moe_trainer.observe.sinks import read_metrics


def test_throughput_and_mfu():
    speed = throughput(tokens=8000, seconds=2.0, world_size=4, flops_per_token=3e9, peak=6e12)
    assert speed == pytest.approx(
        {"tokens_per_second": 4000, "tokens_per_second_per_gpu": 1000, "tflops_per_gpu": 3.0, "mfu": 0.5}
    )
    assert "mfu" not in throughput(8000, 2.0, 4, 3e9, None)


def test_an_even_load():
    assert expert_load(torch.full((3, 4), 5)) == pytest.approx(
        {"expert_load_max_over_mean": 1.0, "dead_experts": 0, "expert_load_entropy": 1.0}
    )


def test_an_uneven_load():
    load = expert_load(torch.tensor([[4, 4, 4, 4], [12, 4, 0, 0]]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert load == pytest.approx(
        {"expert_load_max_over_mean": 3.0, "dead_experts": 2, "expert_load_entropy": (1 + entropy) / 2}
    )


def test_layers_without_tokens_and_a_single_expert():
    assert expert_load(torch.tensor([[0, 0], [3, 1]]))["expert_load_max_over_mean"] == pytest.approx(1.5)
    assert expert_load(torch.zeros(2, 2)) == {}
    assert expert_load(torch.tensor([[7]])) == {
        "expert_load_max_over_mean": 1.0,
        "dead_experts": 0.0,
        "expert_load_entropy": 1.0,
    }


def test_memory_of_the_process_grows_with_what_it_holds():
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**27, dtype=torch.uint8)  # 1/8 GiB
    held *= 2
    assert 0.03 < before < 100
    assert memory_gib(torch.device("cpu")) < before + 1
    # The peak may have been higher before, but never below what is held now.
    assert memory_gib(torch.device("cpu")) >= max(before, held.numel() / 2**30)


def test_a_step_goes_to_the_file_and_the_console(tmp_path, capsys):
    cfg = Config()
    cfg.logging.every = 2
    log = MetricsLog(tmp_path, cfg, total_steps=5, start_step=0)
    for step in range(1, 6):
        log.log(step, {"loss": 1.0 / step, "lr": 1e-3})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {n}" for n in (1, 2, 4, 5)
    ]
    assert not (tmp_path / "wandb").exists()
