"""Expert load and router entropy in `metrics.jsonl` are what counting token by token gives, on every mesh."""

import math
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.choices import DeviceName, DType, Family
from moe_trainer.config.schema import Config, DataConfig, LoggingConfig, ModelConfig, OptimConfig, ParallelConfig
from moe_trainer.config.validate import world_size_of
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import Router, Routing
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.report import RunReport
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import PLANS, describe, mesh
from tests.distributed.test_parity import legal_meshes

STEPS = 2
MODEL = ModelConfig(
    family=Family.qwen3_moe,
    hidden_size=32,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    num_experts=8,
    dense_layers=[1],
    dense_intermediate_size=16,
    initializer_range=0.3,
)


def all_meshes(world: int) -> list[ParallelConfig]:
    """Every legal one, of every plan."""
    return [parallel for plan in PLANS for parallel in legal_meshes(plan, world)]


def config(folder: Path, parallel: ParallelConfig) -> Config:
    """One sequence a micro-batch, so that every data rank accumulates; the rate is too small to move a route."""
    return Config(
        run_dir=str(folder),
        run_name="run",
        steps=STEPS,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=MODEL,
        parallel=parallel,
        optim=OptimConfig(lr=1e-14, weight_decay=0.0),
        data=DataConfig(
            text="Count what goes where, one by one: nobody is to be left out, and nobody twice. " * 2, seq_len=9
        ),
        logging=LoggingConfig(load_every=1),
    )


def counted(cfg: Config) -> list[tuple[list[list[int]], float, int]]:
    """Of each step: tokens of each expert in each sparse layer, mean entropy, and labels that do not count.

    One plain model, one sequence at a time, one token at a time.
    """
    model = FAMILIES[cfg.model.family].build(cfg.model).double()
    initialize(model, cfg.seed, cfg.model.initializer_range)
    seen: list[Routing] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, routing: seen.append(routing))
    loader = Trainer(cfg, torch.device("cpu")).loader
    found = []
    for step in range(STEPS):
        batch = loader.batch(step * loader.global_batch_size)
        counts: Counter[tuple[int, int]] = Counter()
        entropies = []
        for sample in batch.split(len(batch.input_ids)):
            seen.clear()
            with torch.no_grad():
                model(sample.input_ids, documents=sample.documents)
            for layer, routing in enumerate(seen):
                for token, label in enumerate(sample.labels[0].tolist()):
                    if label == -100:
                        continue
                    counts.update((layer, expert) for expert in routing.top_k_index[token].tolist())
                    shares = routing.probabilities[token].tolist()
                    entropies.append(-sum(p * math.log(p) for p in shares) / math.log(len(shares)))
        table = [[counts[layer, expert] for expert in range(cfg.model.num_experts)] for layer in range(len(seen))]
        found.append((table, sum(entropies) / len(entropies), int((batch.labels == -100).sum())))
    return found


def reported(folder: Path, meshes: list[ParallelConfig]) -> None:
    """Take the steps on each mesh, with their metrics in `folder/<number of the mesh>`."""
    for number, parallel in enumerate(meshes):
        cfg = config(folder / str(number), parallel)
        trainer = Trainer(cfg, torch.device("cpu"))
        trainer.start()
        with redirect_stdout(StringIO()):
            is_first = dist.get_rank() == 0
            report = (
                RunReport(cfg, trainer.device, trainer.run_folder, 0, trainer.loader.seq_len) if is_first else None
            )
            for step in range(1, STEPS + 1):
                metrics = trainer.train_step(trainer.loader.batch(trainer.state.samples))
                if report is not None:
                    report.take(step, trainer.state.tokens, metrics)
            if report is not None:
                report.close()


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[list[int]], float]]:
    (found,) = run_distributed(counted, 1, config(Path("unused"), ParallelConfig(fsdp=1, ep=1)))
    assert sum(ignored for _, _, ignored in found) > 0, "some sample is padded"
    assert found[0][0] != found[1][0] and min(map(min, found[0][0])) < max(map(max, found[0][0])) / 2
    return [(table, entropy) for table, entropy, _ in found]


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(all_meshes(1), id="one rank"),
        pytest.param(all_meshes(2), id="two ranks"),
        pytest.param([mesh("sp_ep", fsdp=2, tp=2, ep=4)], id="folded"),
        pytest.param(all_meshes(4), id="four ranks", marks=pytest.mark.grid),
    ],
)
def test_counted_token_by_token(
    meshes: list[ParallelConfig], expected: list[tuple[list[list[int]], float]], tmp_path: Path
) -> None:
    world = world_size_of(meshes[0])
    run_distributed(reported, world, tmp_path, meshes, timeout=300)
    for number, parallel in enumerate(meshes):
        lines = read_metrics(tmp_path / str(number) / "run" / "metrics.jsonl")
        assert len(lines) == STEPS
        for line, (table, entropy) in zip(lines, expected, strict=True):
            assert line["expert_load"] == table, describe(parallel)
            assert line["router_entropy"] == pytest.approx(entropy, rel=1e-9), describe(parallel)


def test_rows_are_as_rare_as_asked_and_always_include_the_first_and_last_step(tmp_path: Path) -> None:
    run_distributed(fit, 1, tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("expert_load", "router_entropy"):
        assert [line["step"] for line in lines if name in line] == [1, 3, 6, 7]
    assert all("expert_load_max_over_mean" in line for line in lines)


def fit(folder: Path) -> None:
    cfg = replace(config(folder, ParallelConfig(fsdp=1, ep=1)), steps=7, logging=LoggingConfig(load_every=3))
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    with redirect_stdout(StringIO()):
        trainer.fit()
