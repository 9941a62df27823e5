"""Adapters: the gradients of one process on every plan, nothing else moves, and merged weights do what they did."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.manager import find_latest
from moe_trainer.config.choices import DeviceName, DType, Recompute
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.generate.source import load_weights, open_source
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters, is_adapter
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import PLANS, Case, check, mesh, plain_outcome
from tests.distributed.runs import figures, fit, run_config, train_each
from tests.distributed.test_families import MODELS

ATTENTION, EXPERTS = "model.layers.*.self_attn.*_proj", "model.layers.*.mlp.experts"
DENSE = {
    "qwen3_moe": ["model.layers.*.dense_mlp.*"],
    "deepseek_v3": ["model.layers.*.dense_mlp.*", "model.layers.*.mlp.shared_experts.*"],
}
BOTH = {"sequence_parallel": True, "expert_parallel": True}


def case(parallel: ParallelConfig, family: str, **options: object) -> Case:
    head = [] if MODELS[family].tie_word_embeddings else ["lm_head"]
    lora = LoraConfig(rank=3, alpha=6.0, targets=[ATTENTION, EXPERTS, *DENSE.get(family, []), *head])
    return Case.accumulating(parallel, torch.float64, MODELS[family], steps=2, lora=lora, **options)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("mixtral", "deepseek_v3") else pytest.mark.grid) for name in MODELS],
)
def test_every_plan_gives_the_gradients_of_one_process(family: str) -> None:
    check([case(mesh(plan, tp=2), family) for plan in PLANS], 2)


def test_fsdp_folded_experts_and_key_heads_fewer_than_ranks() -> None:
    cases = [case(mesh("sp_ep", fsdp=2, tp=2, ep=4), "mixtral"), case(mesh("tp", tp=4), "qwen3_moe")]
    few = replace(case(mesh("sp_ep", fsdp=4), "gpt_oss"), model=replace(MODELS["gpt_oss"], num_experts=2, top_k=1))
    check([*cases, few, case(mesh("sp", fsdp=2, tp=2), "olmoe", recompute=Recompute.full)], 4)


def test_only_adapters_have_gradients() -> None:
    outcome = plain_outcome(case(mesh("tp"), "deepseek_v3"))
    assert outcome.gradients and all(is_adapter(name) and value.any() for name, value in outcome.gradients.items())
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in outcome.gradients}
    assert modules >= {"q_a_proj", "kv_b_proj", "o_proj", "experts", "lm_head", "gate_proj"}


def logits(model: CausalLM) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12) % model.lm_head.weight.shape[0]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", MODELS)
def test_fresh_adapters_change_no_bit(family: str, dtype: torch.dtype) -> None:
    cfg = MODELS[family]
    models = [FAMILIES[cfg.family].build(cfg), FAMILIES[cfg.family].build(cfg)]
    add_adapters(models[1], LoraConfig(rank=4, targets=[ATTENTION, EXPERTS]))
    for model in models:
        model.to(dtype)
        initialize(model, 0, 0.2)
    assert torch.equal(*map(logits, models))


@pytest.mark.parametrize(
    ("target", "line"),
    [("model.layers.*.mlp.gate", "lora.targets: model.layers.*.mlp.gate names no linear layer and no experts"),
     ("lm_head", "lora.targets: lm_head is the embedding too")],
)  # fmt: skip
def test_a_target_that_cannot_be(target: str, line: str) -> None:
    cfg = MODELS["mixtral"]
    with pytest.raises(ConfigError) as caught:
        add_adapters(FAMILIES[cfg.family].build(cfg), LoraConfig(rank=2, targets=[target]))
    assert str(caught.value).startswith(line)


MESHES = {
    "one": ParallelConfig(fsdp=1),
    "sp_ep": ParallelConfig(fsdp=1, tp=2, **BOTH),
    "fsdp": ParallelConfig(fsdp=2),
}


def config(folder: Path, parallel: ParallelConfig, steps: int, base: Path, rank: int | None = 4) -> Config:
    source = open_model(base)
    return Config(
        run_name="run",
        run_dir=str(folder),
        steps=steps,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=replace(source, init_from=str(base)),
        parallel=resolve_parallel(parallel, None),
        optim=OptimConfig(lr=3e-2, schedule_steps=10),
        lora=LoraConfig(rank=rank, alpha=8.0),
        data=DataConfig(text="one for the kettle, two for the long road home", seq_len=9, global_batch_size=4),
        checkpoint=CheckpointConfig(resume="auto"),
    )


def open_model(base: Path) -> ModelConfig:
    family = json.loads((base / "config.json").read_text())["model_type"]
    return next(entry for key, entry in FAMILIES.items() if key.value == family).config_from_hf(base)


def train(cfg: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """All tensors after the start and at the end, and the logits then (of the whole vocabulary, on one rank)."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    before = full_tensors(trainer._tensors())
    fit(trainer)
    with torch.no_grad():
        return before, full_tensors(trainer._tensors()), logits(trainer.model)


def loaded_logits(folder: Path, parallel: ParallelConfig) -> torch.Tensor:
    """Of a checkpoint or exported folder, as generation reads it."""
    source = open_source(folder)
    model, _ = build_model(source.model, parallel, build_meshes(parallel, "cpu"), torch.float64)
    model.to_empty(device="cpu").requires_grad_(False)
    load_weights(source, dict(model.named_parameters()) | dict(model.named_buffers()))
    return logits(model)


def test_adapters_stay_wide_where_all_else_is_bfloat16(tmp_path: Path) -> None:
    """Also on one rank, where nothing but they needs a cast."""
    low = OptimConfig(weights_dtype=DType.bfloat16)
    types = {"dtype": DType.bfloat16, "reduce_dtype": DType.bfloat16, "optim": low, "lora": LoraConfig(rank=2)}
    for name, ranks in (("one", 1), ("fsdp2", 2)):
        run_distributed(train_each, ranks, [run_config(tmp_path, name, name, 2, **types)])
    assert figures(tmp_path / "one") == pytest.approx(figures(tmp_path / "fsdp2"), rel=2e-2)


@pytest.fixture(params=["mixtral", "deepseek_v3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Hugging Face folder with random weights."""
    folder = tmp_path / "base"
    shape = replace(MODELS[request.param], vocab_size=264, tie_word_embeddings=False)
    (tmp_path / "first").mkdir()
    cfg = Config(
        run_name="run", run_dir=str(tmp_path / "first"), steps=1, device=DeviceName.cpu, dtype=DType.float64,
        model=shape, parallel=resolve_parallel(MESHES["one"], None), optim=OptimConfig(lr=1e-9),
        data=DataConfig(text="first", seq_len=4, global_batch_size=1),
    )  # fmt: skip
    run_distributed(train, 1, cfg)
    export_checkpoint(find_latest(tmp_path / "first" / "run" / "checkpoints"), folder, 10**9, DType.float64)
    return folder


def test_a_run_moves_the_adapters_alone_resumes_elsewhere_and_merges(base: Path, tmp_path: Path) -> None:
    start, _, _ = run_distributed(train, 1, config(tmp_path, MESHES["one"], 2, base))[0]
    middle, after, _ = run_distributed(train, 2, config(tmp_path, MESHES["sp_ep"], 4, base))[0]
    resumed, end, adapted = run_distributed(train, 1, config(tmp_path, MESHES["one"], 6, base))[0]
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    for name, value in end.items():
        is_moved = name.startswith("optim.") or is_adapter(name)
        assert torch.equal(value, start[name]) != is_moved, name
    assert middle.keys() == start.keys()

    checkpoint = find_latest(tmp_path / "run" / "checkpoints")
    export_checkpoint(checkpoint, tmp_path / "merged", 10**9, DType.float64)
    plain = run_distributed(loaded_logits, 1, base, resolve_parallel(MESHES["one"], None))[0]
    assert (plain - adapted).norm() > 1e-3 * plain.norm()
    sharded = resolve_parallel(ParallelConfig(fsdp=1, tp=2, expert_parallel=True), None)
    for folder in (tmp_path / "merged", checkpoint):
        found = run_distributed(loaded_logits, 1, folder, resolve_parallel(MESHES["one"], None))[0]
        assert (found - adapted).norm() < 1e-12 * adapted.norm()
        halves = run_distributed(loaded_logits, world_size_of(sharded), folder, sharded)
        assert (torch.cat(halves, -1) - adapted).norm() < 1e-12 * adapted.norm()
