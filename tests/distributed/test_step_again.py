"""A step taken once more: to compare its bits, and to find where its numbers ceased to be finite."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.kernels.local_part import local_part
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.loss import LossFn
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import fit

LINES = ["one for the kettle", "two for the long road home", "three for the dog", "four for whoever asks last"]


def config(folder: Path, name: str, *overrides: str, steps: int = 4) -> Config:
    """DeepSeek on two data ranks: its expert bias moves by counts."""
    text = folder / "lines.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    run = [f"run_dir={folder}", f"run_name={name}", f"steps={steps}", "device=cpu"]
    run += ["parallel.fsdp=2", "parallel.tp=1"]
    data = [f"data.path={text}", "data.text=null", "data.global_batch_size=4", "data.micro_batch_size=1"]
    small = ["model.num_layers=2", "checkpoint.every=null", "optim.aux_coef=0.01"]
    return validate(compose("train", ["+recipe=deepseek_v3_tiny", *run, *data, *small, *overrides]), 2, 0)


def train(cfg: Config, disturb: Callable[[Trainer], None] | None = None) -> dict[str, torch.Tensor] | str:
    """This rank's parts at the end, or what was raised."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    if disturb is not None:
        disturb(trainer)
    try:
        fit(trainer)
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return {name: local_part(tensor).clone() for name, tensor in trainer._tensors().items()}


def train_all(cfgs: list[Config]) -> list[dict[str, torch.Tensor] | str]:
    return [train(cfg) for cfg in cfgs]


def err_once(trainer: Trainer) -> None:
    """The second layer of rank 1 errs in the last bits of one value, going forward, the second time in step 3."""
    calls = [0]

    def err(module: torch.nn.Module, inputs: object, output: tuple) -> tuple:
        calls[0] += trainer.state.step == 2
        if calls[0] == trainer.loader.grad_accum_steps + 1 and dist.get_rank() == 1:
            wrong = output[0].clone()
            wrong[0, 0, 0] *= 1 + 1e-6
            return wrong, output[1]
        return output

    trainer.model.model.layers[1].register_forward_hook(err)


def err_once_going_back(trainer: Trainer) -> None:
    """Rank 0 errs in the gradient that the first layer is given."""
    calls = [0]

    def err(grad: torch.Tensor) -> torch.Tensor:
        calls[0] += trainer.state.step == 2
        return grad * (1 + 1e-6) if calls[0] == 1 and dist.get_rank() == 0 else grad

    def hook(module: torch.nn.Module, inputs: object, output: tuple) -> None:
        output[0].register_hook(err)

    trainer.model.model.layers[0].register_forward_hook(hook)


def test_a_step_taken_twice_changes_nothing_and_counts_once(tmp_path: Path) -> None:
    checked = config(tmp_path, "twice", "checks.replay_every=2", "deterministic=true")
    for ours, theirs in run_distributed(train_all, 2, [config(tmp_path, "once"), checked]):
        assert any("expert_bias" in name for name in ours)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    timed = ("seconds", "data_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu")
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("once", "twice")]
    for first, second in zip(*lines, strict=True):
        assert all(first[name] == second[name] for name in first if name not in (*timed, "memory_gib"))


@pytest.mark.parametrize(
    ("disturb", "first"),
    [
        (err_once, "first on rank 1 in micro-batch 1: model.layers.1, then on rank 0;"),
        (err_once_going_back, "first on rank 0 in micro-batch 1: model.layers.0, gradient, then on rank 1;"),
    ],
)
def test_a_rank_that_errs_once_is_named(disturb: Callable[[Trainer], None], first: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, "errs", "checks.replay_every=1", "deterministic=true")
    said = run_distributed(train, 2, cfg, disturb)
    assert said[0] == said[1] and isinstance(said[0], str)
    assert f"RuntimeError: step 3, taken twice, gave other bits: {first}" in said[0]
    assert "gradient of model.layers.0" in said[0] and "a fault of that rank's machine" in said[0]


def poison(trainer: Trainer) -> None:
    """From step 3 on, the loss of rank 1's second micro-batch is not a number."""
    real, calls = trainer.loss_fn, [0]

    def poisoned(*arguments: object) -> tuple[torch.Tensor, object]:
        loss, losses = LossFn.__call__(real, *arguments)
        calls[0] += 1
        bad = trainer.state.step >= 2 and dist.get_rank() == 1 and calls[0] % 2 == 0
        return loss * (torch.nan if bad else 1), losses

    poisoned.sequence, poisoned.vocab_group = real.sequence, real.vocab_group
    trainer.loss_fn = poisoned


def test_a_run_that_learns_nothing_more_says_where_its_numbers_ceased_to_be_finite(tmp_path: Path) -> None:
    cfg = config(tmp_path, "stuck", "optim.max_skipped_steps=2", steps=20)
    said = run_distributed(train, 2, cfg, poison)
    folder = tmp_path / "stuck" / "skipped-step-00000004"
    assert said[0] == said[1] and str(said[0]).endswith(f"what each rank saw of step 4: {folder}/rank*.json")
    sound, bad = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [place["name"] for place in bad["taken_again"]["not_finite"]] == [
        "micro-batch 2: logits, gradient",
        "micro-batch 2: model.layers.1, gradient",
        "micro-batch 2: model.layers.0, gradient",
    ]
    assert sound["taken_again"]["not_finite"] == []
    line = read_metrics(tmp_path / "stuck" / "metrics.jsonl")[3]
    for rank, facts in enumerate((sound, bad)):
        assert (facts["rank"], facts["step"], facts["samples_before"], facts["seed"]) == (rank, 4, 12, 0)
        assert (facts["loss"], facts["lr"], facts["grad_norm"]) == (line["loss"], line["lr"], "nan")
        gradients = {part["name"]: part for part in facts["taken_again"]["gradients"]["parts"]}
        norm = gradients["model.norm.weight"]  # a sum over ranks
        assert norm["not_finite"] == norm["of"] > 0
        parts = {part["name"]: part for part in facts["tensors"]["parts"]}
        assert all(part["not_finite"] == 0 for part in parts.values())
        assert parts["model.model.norm.weight"]["norm"] > 0 and "optim.exp_avg.model.norm.weight" in parts
        assert sum(map(sum, facts["expert_load"])) > 0
        assert [sample["position"] for sample in facts["samples"]] == ([12, 14] if rank == 0 else [13, 15])
        assert [sample["micro_batch"] for sample in facts["samples"]] == [1, 2]
    (document, same), tokens = bad["samples"][1]["documents"], bad["samples"][1]["tokens"]
    assert document == same == bad["samples"][1]["sample"]
    assert tokens[1] - tokens[0] == len(LINES[document].encode()) + 1  # and the end of the document


def test_a_rank_that_cannot_write_takes_part_in_the_second_taking(tmp_path: Path) -> None:
    cfg = config(tmp_path, "stuck", "optim.max_skipped_steps=2", steps=20)
    folder = tmp_path / "stuck" / "skipped-step-00000004"
    (folder / "rank1.json").mkdir(parents=True)
    said = run_distributed(train, 2, cfg, poison)
    assert str(said[0]).endswith(f"what each rank saw of step 4: {folder}/rank*.json")
    assert f"{folder / 'rank1.json'} is not complete: " in str(said[1])
    assert json.loads((folder / "rank0.json").read_text())["taken_again"]["gradients"]["parts"]
