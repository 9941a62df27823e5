"""What a whole run leaves in its folder."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from moe_trainer.config.choices import DeviceName, WandbMode
from moe_trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
)
from moe_trainer.observe.report import load_run
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import report as module
from moe_trainer.train.loss import Losses
from moe_trainer.train.report import RunReport, StepMetrics
from moe_trainer.train.trainer import Trainer

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "HF_TOKEN": "hf_5ec2e75ec2e75ec2e7",
    "AWS_SECRET_ACCESS_KEY": "5ec2e7/aws/5ec2e7",
}
SHAPE = {"hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}


def config(folder: Path, **changes: object) -> Config:
    cfg = Config(
        run_dir=str(folder),
        steps=3,
        device=DeviceName.cpu,
        model=ModelConfig(**SHAPE),
        parallel=ParallelConfig(fsdp=1, ep=1),
        optim=OptimConfig(aux_coef=0.01, schedule_steps=9),
        data=DataConfig(text="To be seen is to be known, and to be known is to be mended.", seq_len=12),
        logging=LoggingConfig(load_every=1),
    )
    for name, value in changes.items():
        setattr(cfg, name, value)
    return cfg


def fit(cfg: Config, environment: dict[str, str] | None = None) -> None:
    os.environ.update(environment or {})
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    with redirect_stdout(StringIO()):
        trainer.fit()


def fit_with_a_broken_report(cfg: Config) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no report today")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_report", fail)
        fit(cfg)


def test_a_run_leaves_every_figure_and_a_page(tmp_path: Path) -> None:
    run_distributed(fit, 1, config(tmp_path))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" not in line] == [1, 2, 3]
    names = (
        "loss aux_loss grad_norm lr tokens seconds data_seconds skipped_steps tokens_per_second "
        "tokens_per_second_per_gpu tflops_per_gpu memory_gib expert_load_max_over_mean dead_experts "
        "expert_load_entropy router_entropy expert_load"
    )
    assert set(names.split()) <= set(lines[0])
    run = load_run(tmp_path / "run")
    assert run["series"]["loss"]["x"] == [1, 2, 3] and run["load"]["steps"] == [1, 2, 3]
    assert run["config"]["model.hidden_size"] == 16
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()


def test_each_command_says_what_it_ran_on(tmp_path: Path) -> None:
    run_distributed(fit, 1, config(tmp_path))
    resumed = config(tmp_path, steps=5, parallel=ParallelConfig(fsdp=2, ep=1))
    resumed.checkpoint = CheckpointConfig(resume="auto")
    run_distributed(fit, 2, resumed)
    first, second = (json.loads(line) for line in (tmp_path / "run" / "environment.jsonl").read_text().splitlines())
    assert (first["from_step"], first["world_size"]) == (0, 1)
    assert (second["from_step"], second["world_size"]) == (3, 2) and "fsdp=2" in second["mesh"]
    assert first["torch"] == torch.__version__ and "causal and so halved" in first["flop_convention"]


def test_a_page_that_fails_fails_no_run(tmp_path: Path) -> None:
    run_distributed(fit_with_a_broken_report, 1, config(tmp_path))
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 3
    assert (tmp_path / "run" / "checkpoints" / "LATEST").exists() and not (tmp_path / "run" / "report.html").exists()


def test_no_secret_of_the_environment_reaches_a_file(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    cfg = config(tmp_path / "runs", profile=True, profiler=ProfileConfig(steps=[1, 2]))
    cfg.logging.wandb = WandbMode.offline
    homes = ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    run_distributed(fit, 1, cfg, SECRETS | {home: str(tmp_path / "home") for home in homes})
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "environment.jsonl", "report.html", "state.json"} <= names
    assert any(name.endswith(".wandb") for name in names) and any(name.endswith(".trace.json") for name in names)
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_profile_of_chosen_steps_of_a_chosen_rank(tmp_path: Path) -> None:
    cfg = config(tmp_path, parallel=ParallelConfig(fsdp=2, ep=1), profile=True)
    cfg.profiler = ProfileConfig(steps=[2, 3], ranks=[1])
    run_distributed(fit, 2, cfg)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank1-step00000002-00000003.trace.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("grouped" in event.get("name", "") or "aten::mm" == event.get("name") for event in events)


def tell(folder: Path) -> None:
    """Three steps, the second of them skipped, and an evaluation."""
    cfg = config(folder)
    report = RunReport(cfg, torch.device("cpu"), folder / "run", start_step=0, seq_len=12, skipped_steps=4)
    losses = Losses.zeros(2, 4, torch.device("cpu"))
    with redirect_stdout(StringIO()):
        for step in (1, 2, 3):
            norm = torch.tensor(1.0 if step != 2 else torch.inf)
            more = {"skipped": torch.tensor(float(step == 2)), "dropped": torch.tensor(step / 4)}
            report.take(step, 96 * step, StepMetrics(losses, norm, 1e-3, 96, 0.25, more))
            if step == 2:
                report.evaluated(step, {"val_loss": 1.5, "val_perplexity": 4.48})
        report.close()


def test_steps_evaluations_and_what_a_step_adds(tmp_path: Path) -> None:
    run_distributed(tell, 1, tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line.get("val_loss")) for line in lines] == [(1, None), (2, None), (2, 1.5), (3, None)]
    steps = [line for line in lines if "val_loss" not in line]
    assert [line["skipped_steps"] for line in steps] == [4, 5, 5]
    assert [line["dropped"] for line in steps] == [0.25, 0.5, 0.75]
    assert [line["grad_norm"] for line in steps] == [1.0, None, 1.0]
    assert all(line["data_seconds"] == 0.25 and "skipped" not in line for line in steps)
    assert lines[2] == {"step": 2, "val_loss": 1.5, "val_perplexity": 4.48}
