"""Evaluation: one figure on every mesh, that of a plain model, and nothing of the run moves."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.manager import resolve_checkpoint
from moe_trainer.cli.eval import evaluate_checkpoint, main
from moe_trainer.config.choices import DeviceName, DType, Family
from moe_trainer.config.commands import EvaluateConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrepareConfig,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.data.prepare import prepare
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.registry import FAMILIES
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed import runs

BOTH = {"sequence_parallel": True, "expert_parallel": True}
MESHES = [
    ParallelConfig(fsdp=1),
    ParallelConfig(fsdp=2),
    ParallelConfig(fsdp=1, tp=2, **BOTH),
    ParallelConfig(fsdp=2, tp=2, **BOTH),
    ParallelConfig(fsdp=1, tp=2),
]
MODEL = ModelConfig(
    family=Family.deepseek_v3,  # its routers have a bias that training moves
    hidden_size=32,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    num_experts=4,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    initializer_range=0.2,
)
HELD_OUT = [f"sentence number {number} " + "x" * (7 * number % 11) for number in range(11)]
"""Eleven samples of different lengths: batches of four do not come out even."""


def config(folder: Path, parallel: ParallelConfig = MESHES[0], **evaluation: int) -> Config:
    return Config(
        run_name=f"run{len(list(folder.iterdir()))}",
        run_dir=str(folder),
        steps=4,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=MODEL,
        parallel=resolve_parallel(parallel, None),
        optim=OptimConfig(lr=1e-2, expert_bias_rate=0.1),
        data=DataConfig(text="and four for whoever asks last", global_batch_size=4,
                        validation_path=str(folder / "held_out.jsonl")),
        eval=EvalConfig(**evaluation),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in HELD_OUT))
    return tmp_path


def figures(cfgs: list[Config]) -> list[dict[str, float]]:
    """Of untrained models."""
    found = []
    for cfg in cfgs:
        trainer = Trainer(cfg, torch.device("cpu"))
        trainer.start()
        found.append(trainer.evaluate())
    return found


def expected(texts: list[str]) -> tuple[float, int]:
    """Mean loss of the labels, and their number, by a plain model and PyTorch's own cross entropy."""
    model = FAMILIES[MODEL.family].build(MODEL).double()
    initialize(model, 0, MODEL.initializer_range)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*text.encode(), 256]])
        total += F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_figure_is_that_of_a_plain_model_on_every_mesh(world: int, folder: Path) -> None:
    meshes = [mesh for mesh in MESHES if world_size_of(resolve_parallel(mesh, None)) == world]
    cases = [({}, HELD_OUT, mesh) for mesh in meshes]
    cases += [({"batches": 2}, HELD_OUT[:8], meshes[0]), ({"batches": 9}, HELD_OUT, meshes[0])]
    cfgs = [replace(config(folder, mesh, **options), run_name=str(n)) for n, (options, _, mesh) in enumerate(cases)]
    for ranks in run_distributed(figures, world, cfgs):
        for (_, texts, _), found in zip(cases, ranks, strict=True):
            loss, count = expected(texts)
            assert found["val_loss"] == pytest.approx(loss, rel=1e-9)
            assert found["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-9)
            assert found["val_tokens"] == count


def train(cfg: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """This rank's tensors after the run, and a random number drawn then."""
    torch.manual_seed(0)
    trainer = runs.train(cfg)
    tensors = {name: local_part(tensor).clone() for name, tensor in trainer._tensors().items()}
    return tensors, torch.rand(3).tolist()


def train_both(with_evaluation: Config, without: Config) -> list[str]:
    """What differs on this rank."""
    (ours, drawn), (theirs, expected_draw) = train(with_evaluation), train(without)
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    return differing if drawn == expected_draw else [*differing, "random numbers"]


@pytest.mark.parametrize("parallel", [MESHES[1], MESHES[2]], ids=["fsdp", "sp_ep"])
def test_nothing_moves_and_the_lines_are_written(parallel: ParallelConfig, folder: Path) -> None:
    with_evaluation = replace(config(folder, parallel, every=2), run_name="with")
    plain = config(folder, parallel)
    without = replace(plain, run_name="without", data=replace(plain.data, validation_path=None))
    assert run_distributed(train_both, 2, with_evaluation, without) == [[], []]
    lines = read_metrics(folder / "with" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    first, last = (line for line in lines if "val_loss" in line)
    assert first["val_loss"] != last["val_loss"]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    trained = [[line for line in read_metrics(folder / run / "metrics.jsonl") if "loss" in line] for run in
               ("with", "without")]  # fmt: skip
    assert [line["loss"] for line in trained[0]] == [line["loss"] for line in trained[1]]
    assert not any("val_loss" in line for line in read_metrics(folder / "without" / "metrics.jsonl"))


def test_the_last_step_is_evaluated_without_being_asked(folder: Path) -> None:
    run_distributed(train, 1, replace(config(folder), run_name="run"))
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [4]


def build(cfg: Config) -> str:
    try:
        Trainer(cfg, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return f"no error on rank {dist.get_rank()}"


def test_nothing_to_evaluate_on_is_a_mistake(folder: Path) -> None:
    plain = config(folder, every=2)
    cfg = replace(plain, data=replace(plain.data, validation_path=None), run_name="run")
    assert run_distributed(build, 1, cfg)[0].startswith(
        "eval.every=2: there is nothing to evaluate on; give data.val"
    )
    assert not (folder / "run").exists()


def evaluate_all(cfgs: list[EvaluateConfig]) -> list[dict[str, float]]:
    return [evaluate_checkpoint(cfg, torch.device("cpu")) for cfg in cfgs]


def test_moe_eval_gives_the_runs_own_figure_on_every_mesh(folder: Path) -> None:
    cfg = replace(config(folder), run_name="run")
    run_distributed(train, 1, cfg)
    expected = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    data = DataConfig(path=cfg.data.validation_path, global_batch_size=4)
    common = {"checkpoint": str(folder / "run"), "data": data, "device": DeviceName.cpu, "dtype": DType.float64}
    exported = folder / "exported"
    export_checkpoint(resolve_checkpoint(folder / "run"), exported, 10**9, DType.float64)
    for mesh in MESHES[:3]:
        cfgs = [EvaluateConfig(**common, parallel=resolve_parallel(mesh, None))]
        cfgs.append(replace(cfgs[0], checkpoint=str(exported)))
        for ours, theirs in run_distributed(evaluate_all, world_size_of(cfgs[0].parallel), cfgs):
            assert ours["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-9)
            assert theirs["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-9)
            assert ours["val_tokens"] == expected["val_tokens"]


def refusals(cfgs: list[EvaluateConfig]) -> list[str]:
    said = []
    for cfg in cfgs:
        with pytest.raises(ConfigError) as refused:
            evaluate_checkpoint(cfg, torch.device("cpu"))
        said.append(str(refused.value))
    return said


def test_moe_eval_names_the_data_that_it_was_given(folder: Path) -> None:
    cfg = replace(config(folder), run_name="run", steps=1)
    run_distributed(train, 1, cfg)
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    prepare(PrepareConfig([str(folder / "held_out.jsonl")], validation_share=0.0), folder / "whole")
    context = MODEL.max_position_embeddings
    cases = {
        "data.mixture: its folders hold nothing out": DataConfig(mixture={str(folder / "whole"): 1.0}, seq_len=8),
        f"data.seq_len={context + 1} must be at most": DataConfig(path=cfg.data.validation_path, seq_len=context + 1),
        f"data.path={folder / 'bad.txt'}": DataConfig(path=str(folder / "bad.txt")),
    }
    mesh = resolve_parallel(MESHES[0], None)
    common = {"checkpoint": str(folder / "run"), "device": DeviceName.cpu, "parallel": mesh}
    found = run_distributed(refusals, 1, [EvaluateConfig(data=data, **common) for data in cases.values()])[0]
    assert all(text.startswith(start) for text, start in zip(found, cases, strict=True)), found


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "moe-eval: checkpoint=DIR must be given"),
        (["checkpoint=."], "moe-eval: data.path=FILE must be given: a text to evaluate on"),
        (["checkpoint=.", "data.text=abc"], "moe-eval: data.text: put the text to evaluate on into a file"),
        (["checkpoint=.", "data.validation_path=a", "data.path=b"], "moe-eval: data.validation_path=a: give it as"),
        (["checkpoint=.", "data.path=x"], "moe-eval: data.path=x: there is no such file"),
        (["checkpoint=.", "data.path=held_out.jsonl", "batches=0"], "moe-eval: batches=0 must be at least 1"),
        (["checkpoint=.", "data.path=held_out.jsonl", "data.tokenizer=byte"], "moe-eval: data.tokenizer=byte: leave"),
        (["checkpoint=.", "data.path=held_out.jsonl", "device=cpu"], "moe-eval: checkpoint: . is neither a checkp"),
    ],
)
def test_moe_eval_mistakes(
    argv: list[str], line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1
