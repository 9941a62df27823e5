"""Cross-field rules: what each mistake says, and what a correct config becomes."""

from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from moe_trainer.config.choices import DeviceName, DType, Family
from moe_trainer.config.commands import ExportConfig, GenerateConfig, GenerateParallelConfig, InspectConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, GroupConfig, ParallelConfig
from moe_trainer.config.validate import (
    parse_size,
    resolve_device,
    resolve_parallel,
    validate,
    validate_export,
    validate_generate,
    validate_inspect,
    world_size_of,
)


def config(tmp_path: Path, **values: Any) -> Config:
    """A correct run below `tmp_path`; `values` are dotted keys with `__` for the dot."""
    cfg = Config(run_dir=str(tmp_path / "runs"))
    cfg.data.text = "some text"
    for name, value in values.items():
        *nodes, field = name.split("__")
        setattr(reduce(getattr, nodes, cfg), field, value)
    return cfg


def mesh(sp: bool = False, ep_on: bool = False, **sizes: int | None) -> ParallelConfig:
    return ParallelConfig(sequence_parallel=sp, expert_parallel=ep_on, **sizes)


@pytest.mark.parametrize(
    ("parallel", "world_size", "num_gpus", "expected"),
    [
        (mesh(), None, 0, (1, 1, 1, 1)),
        (mesh(), None, 8, (1, 8, 1, 1)),
        (mesh(tp=2), None, 8, (1, 4, 2, 1)),
        (mesh(tp=4), None, 2, (1, 1, 4, 1)),
        (mesh(tp=4), None, 6, (1, 1, 4, 1)),
        (mesh(tp=2), 8, 1, (1, 4, 2, 1)),
        (mesh(tp=2, dp_replicate=2), 8, 0, (2, 2, 2, 1)),
        (mesh(fsdp=2, tp=2), None, 8, (1, 2, 2, 1)),
        (mesh(True, True, fsdp=2, tp=2), 4, 0, (1, 2, 2, 2)),
        (mesh(True, True, fsdp=4, tp=2, ep=4), 8, 0, (1, 4, 2, 4)),
        (mesh(True, True, fsdp=1, tp=4), None, 0, (1, 1, 4, 4)),
        (mesh(True, True, fsdp=4), None, 0, (1, 4, 1, 1)),
        (mesh(True, False, fsdp=4), None, 0, (1, 4, 1, 1)),
        (mesh(True, True, fsdp=4, ep=4), None, 0, (1, 4, 1, 4)),
        (mesh(False, True, fsdp=2, tp=2), None, 0, (1, 2, 2, 2)),
    ],
)
def test_mesh_becomes_concrete(
    parallel: ParallelConfig, world_size: int | None, num_gpus: int, expected: tuple[int, ...]
) -> None:
    before = replace(parallel)
    resolved = resolve_parallel(parallel, world_size, num_gpus)
    assert (resolved.dp_replicate, resolved.fsdp, resolved.tp, resolved.ep) == expected
    assert world_size_of(resolved) == expected[0] * expected[1] * expected[2]
    assert parallel == before


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (mesh(True, True, fsdp=2, tp=2, ep=3), None, "parallel.ep=3 must divide fsdp(2) x tp(2)"),
        (mesh(True, True, fsdp=3, tp=4, ep=6), None, "parallel.ep=6 must be a multiple of tp(4)"),
        (mesh(False, True, fsdp=2, tp=2, ep=4), None, "parallel.ep=4 must equal tp(2) unless parallel.sequence_para"),
        (mesh(True, False, fsdp=2, tp=2, ep=2), None, "parallel.ep=2 needs parallel.expert_parallel=true"),
        (mesh(tp=0), None, "parallel.tp=0 must be at least 1"),
        (mesh(tp=-1), None, "parallel.tp=-1 must be at least 1"),
        (mesh(dp_replicate=0), None, "parallel.dp_replicate=0 must be at least 1"),
        (mesh(True, True, ep=0), None, "parallel.ep=0 must be at least 1"),
        (mesh(fsdp=0), None, "parallel.fsdp=0 must be at least 1, or -1"),
        (mesh(fsdp=-2), None, "parallel.fsdp=-2 must be at least 1, or -1"),
        (mesh(tp=4), 6, "parallel.fsdp=-1: 6 ranks do not divide by dp_replicate(1) x tp(4) = 4"),
        (mesh(tp=4), 2, "parallel.fsdp=-1: 2 ranks do not divide by dp_replicate(1) x tp(4) = 4"),
        (mesh(fsdp=2, tp=2), 3, "dp_replicate(1) x fsdp(2) x tp(2) = 4 ranks, but WORLD_SIZE or nproc says 3"),
    ],
)
def test_illegal_mesh_is_refused_with_its_numbers(
    parallel: ParallelConfig, world_size: int | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_parallel(parallel, world_size)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"nproc": 0}, "nproc=0 must be at least 1"),
        ({"run_name": "a/b"}, "run_name='a/b' must be a folder name"),
        ({"run_name": ".."}, "run_name='..' must be a folder name"),
        ({"run_name": "."}, "run_name='.' must be a folder name"),
        ({"run_name": "a\n"}, "must be a folder name"),
        ({"run_name": ""}, "run_name='' must be a folder name"),
        ({"run_dir": ""}, "run_dir='' must be the path of a folder"),
        ({"run_dir": "a\0b"}, "must be the path of a folder"),
        ({"dtype": DType.float64, "reduce_dtype": DType.float32}, "reduce_dtype=float32 must not be narrower"),
        ({"optim__lr": 0.0}, "optim.lr=0.0 must be above 0"),
        ({"model__vocab_size": 2**62}, "model.vocab_size=4611686018427387904 must be at most 4194304"),
        ({"model__num_layers": 10**6}, "model.num_layers=1000000 must be at most 4096"),
        ({"model__capacity_factor": 1e30}, "model.capacity_factor=1e+30 must be at most 1048576"),
        ({"launch__timeout_seconds": 1e308}, "launch.timeout_seconds=1e+308 must be at most"),
        ({"optim__expert_bias_rate": float("nan")}, "optim.expert_bias_rate=nan must be at least 0"),
        ({"optim__groups": [GroupConfig("a", -1.0)]}, "optim.groups: lr_scale=-1.0 must be at least 0"),
        ({"optim__groups": [GroupConfig("a", 1.0, float("inf"))]}, "optim.groups: weight_decay=inf must be at least"),
        ({"data__global_batch_size": 2**62}, "data.global_batch_size=4611686018427387904 must be at most"),
        ({"optim__lr": float("nan")}, "optim.lr=nan must be above 0"),
        ({"optim__lr": float("inf")}, "optim.lr=inf must be above 0"),
        ({"optim__beta1": 1.0}, "optim.beta1=1.0 must be at least 0 and below 1"),
        ({"optim__beta2": -0.1}, "optim.beta2=-0.1 must be at least 0 and below 1"),
        ({"optim__eps": 0.0}, "optim.eps=0.0 must be above 0"),
        ({"optim__weight_decay": -1.0}, "optim.weight_decay=-1.0 must be at least 0"),
        ({"optim__aux_coef": float("nan")}, "optim.aux_coef=nan must be at least 0"),
        ({"max_minutes": 0.0}, "max_minutes=0.0 must be above 0"),
        ({"optim__z_coef": -1.0}, "optim.z_coef=-1.0 must be at least 0"),
        ({"optim__max_grad_norm": 0.0}, "optim.max_grad_norm=0.0 must be above 0"),
        ({"optim__min_lr_ratio": 1.5}, "optim.min_lr_ratio=1.5 must be between 0 and 1"),
        ({"optim__warmup_steps": -1}, "optim.warmup_steps=-1 must be at least 0"),
        ({"optim__warmup_steps": 11, "steps": 10}, "optim.warmup_steps=11 must be at most steps(10)"),
        ({"optim__warmup_steps": 11, "optim__schedule_steps": 9}, "=11 must be at most schedule_steps(9)"),
        ({"optim__schedule_steps": 0}, "optim.schedule_steps=0 must be at least 1"),
        ({"data__text": None}, "data.text, data.path or data.mixture must be given, exactly one of them; none is"),
        (
            {"data__path": "x"},
            "data.text, data.path or data.mixture must be given, exactly one of them; data.text and data.path are",
        ),
        ({"data__text": ""}, "data.text is empty"),
        ({"data__text": None, "data__path": "/nowhere.txt"}, "data.path=/nowhere.txt: there is no such file"),
        ({"data__text": None, "data__path": "/"}, "data.path=/: is a folder, not a file"),
        ({"data__tokenizer": "bpe"}, "data.tokenizer=bpe: there is no such file; give byte or the path"),
        ({"data__seq_len": 0}, "data.seq_len=0 must be at least 1"),
        ({"data__seq_len": 5000}, "data.seq_len=5000 must be at most model.max_position_embeddings(4096)"),
        ({"data__micro_batch_size": 0}, "data.micro_batch_size=0 must be at least 1"),
        ({"data__global_batch_size": 0}, "data.global_batch_size=0 must be at least 1"),
        (
            {"data__global_batch_size": 7, "data__micro_batch_size": 2, "parallel__fsdp": 2},
            "data.global_batch_size=7 must be a multiple of micro_batch_size(2) x dp_replicate(1) x fsdp(2) = 4; "
            "nearest: 4 or 8",
        ),
        ({"data__global_batch_size": 1, "parallel__fsdp": 2}, "x fsdp(2) = 2; nearest: 2"),
        ({"checkpoint__every": 0}, "checkpoint.every=0 must be at least 1"),
        ({"checkpoint__keep_last": 0}, "checkpoint.keep_last=0 must be at least 1"),
        ({"checkpoint__resume": "/nowhere"}, "checkpoint.resume=/nowhere: no such folder; give none, auto"),
        ({"checkpoint__resume": "/usr"}, "checkpoint.resume=/usr is no complete checkpoint"),
        ({"logging__every": 0}, "logging.every=0 must be at least 1"),
        ({"model__hidden_size": 0}, "model.hidden_size=0 must be at least 1"),
        ({"model__rope__theta": -1.0}, "model.rope.theta=-1.0 must be above 0"),
        ({"model__num_kv_heads": 3}, "model.num_kv_heads=3 must divide num_heads(4)"),
        ({"model__top_k": 5}, "model.top_k=5 must be at most num_experts(4)"),
        ({"model__head_dim": 15}, "model.head_dim=15 must be even"),
        ({"model__init_from": "/nowhere"}, "model.init_from=/nowhere: there is no such folder"),
        ({"model__init_from": "/usr"}, "model.init_from=/usr: no config.json in it"),
        ({"parallel__tp": 3}, "parallel.tp=3 must divide model.num_heads(4)"),
        (
            {"parallel__tp": 4, "model__num_heads": 12, "model__num_kv_heads": 6},
            "parallel.tp=4 must divide model.num_kv_heads(6) or be a multiple of it",
        ),
        (
            {"parallel__tp": 4, "model__num_kv_heads": 2, "model__family": Family.olmoe},
            "parallel.tp=4 must divide model.num_kv_heads(2)",
        ),
        (
            {"parallel__tp": 4, "model__family": Family.qwen3_moe, "model__dense_layers": [0]},
            "model.dense_intermediate_size must be given with model.dense_layers",
        ),
        (
            {
                "parallel__tp": 4,
                "model__family": Family.qwen3_moe,
                "model__dense_layers": [0],
                "model__dense_intermediate_size": 30,
            },
            "parallel.tp=4 must divide model.dense_intermediate_size(30)",
        ),
        (
            {
                "parallel__tp": 4,
                "model__family": Family.deepseek_v3,
                "model__num_shared_experts": 1,
                "model__intermediate_size": 30,
            },
            "parallel.tp=4 must divide model.num_shared_experts x intermediate_size(30)",
        ),
        (
            {"model__family": Family.qwen3_moe, "model__dense_layers": [2]},
            "model.dense_layers=[2] must be different layers from 0 to 1",
        ),
        ({"model__family": Family.qwen3_moe, "model__dense_layers": [1, 1]}, "must be different layers from 0 to 1"),
        ({"model__family": Family.qwen3_moe, "model__dense_layers": [0, 1]}, "leaves no layer with experts"),
        ({"model__dense_layers": [0]}, "dense_layers=[0] is a key of qwen3_moe and deepseek_v3, not of mixtral"),
        ({"model__clip_qkv": 1.0}, "model.clip_qkv=1.0 is a key of olmoe, not of mixtral"),
        ({"model__norm_topk_prob": False}, "model.norm_topk_prob=False is a key of qwen3_moe and olmoe and"),
        ({"model__family": Family.olmoe, "model__clip_qkv": 0.0}, "model.clip_qkv=0.0 must be above 0"),
        ({"model__family": Family.olmoe, "model__head_dim": 8}, "x num_heads(4) must be hidden_size(64) in olmoe"),
        ({"model__sliding_window": 0}, "model.sliding_window=0 must be at least 1"),
        ({"model__family": Family.gpt_oss, "model__sliding_layers": [0]}, "layers needs model.sliding_window"),
        ({"model__rope__factor": 0.5}, "model.rope.factor=0.5 must be at least 1"),
        (
            {"model__family": Family.deepseek_v3, "model__num_expert_groups": 3},
            "model.num_expert_groups=3 must divide num_experts(4)",
        ),
        (
            {"model__family": Family.deepseek_v3, "model__num_expert_groups": 4},
            "model.top_k=2 must be at most the 1 experts of top_k_groups groups",
        ),
        (
            {"model__family": Family.gpt_oss, "model__intermediate_size": 36, "parallel__fsdp": 8},
            "fsdp (8) must divide model.intermediate_size(36)",
        ),
        ({"parallel__tp": 4, "model__vocab_size": 262}, "parallel.tp=4 must divide model.vocab_size(262)"),
        ({"parallel__tp": 4, "model__intermediate_size": 126}, "tp=4 must divide model.intermediate_size(126)"),
        (
            {
                "parallel__tp": 4,
                "model__num_experts": 6,
                "parallel__expert_parallel": True,
                "parallel__sequence_parallel": True,
            },
            "parallel.ep=4 must divide model.num_experts(6)",
        ),
        (
            {"parallel__fsdp": 6, "data__global_batch_size": 6},
            "parallel.fsdp=6: with more shards than experts, fsdp (6) must divide model.hidden_size(64)",
        ),
        (
            {
                "parallel__fsdp": 3,
                "parallel__tp": 2,
                "data__global_batch_size": 6,
                "parallel__expert_parallel": True,
                "parallel__sequence_parallel": True,
            },
            "parallel.fsdp=3: with more shards than experts, fsdp x tp / ep (3) must divide model.hidden_size(64)",
        ),
        ({"nproc": 3, "parallel__fsdp": 2}, "= 2 ranks, but WORLD_SIZE or nproc says 3"),
    ],
)
def test_mistake_is_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(tmp_path, **values), world_size=None, num_gpus=None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_correct_run_is_returned_resolved_and_left_alone(tmp_path: Path) -> None:
    cfg = config(tmp_path, parallel__tp=2, parallel__sequence_parallel=True, parallel__expert_parallel=True)
    resolved = validate(cfg, world_size=8, num_gpus=8)
    assert (resolved.parallel.fsdp, resolved.parallel.ep, resolved.device) == (4, 2, DeviceName.cuda)
    assert (cfg.parallel.fsdp, cfg.parallel.ep, cfg.device) == (-1, None, DeviceName.auto)
    assert replace(resolved, parallel=cfg.parallel, device=cfg.device) == cfg


def test_few_experts_shard_along_hidden_where_that_is_even(tmp_path: Path) -> None:
    cfg = config(tmp_path, parallel__fsdp=8)
    assert validate(cfg, None, None).parallel.fsdp == 8
    uneven = config(tmp_path, parallel__fsdp=3, data__global_batch_size=3)
    assert validate(uneven, None, None).parallel.fsdp == 3  # each shard still gets a whole expert


def test_fewer_key_heads_than_ranks(tmp_path: Path) -> None:
    cfg = config(tmp_path, parallel__tp=4, model__num_kv_heads=2)
    assert validate(cfg, None, None).parallel.tp == 4
    # Its keys come from a latent: `num_kv_heads` says nothing.
    latent = config(tmp_path, parallel__tp=4, model__num_kv_heads=3, model__family=Family.deepseek_v3)
    assert validate(latent, None, None).parallel.tp == 4


def test_torchrun_goes_before_nproc(tmp_path: Path) -> None:
    assert validate(config(tmp_path, nproc=2), world_size=4, num_gpus=0).parallel.fsdp == 4
    assert validate(config(tmp_path, nproc=2), world_size=None, num_gpus=8).parallel.fsdp == 2


def test_cpu_run_does_not_spread_over_gpus(tmp_path: Path) -> None:
    assert validate(config(tmp_path, device=DeviceName.cpu), None, num_gpus=8).parallel.fsdp == 1


@pytest.mark.parametrize(
    ("device", "num_ranks", "num_gpus", "expected"),
    [
        (DeviceName.auto, 4, 0, DeviceName.cpu),
        (DeviceName.auto, 4, 1, DeviceName.cpu),
        (DeviceName.auto, 4, 4, DeviceName.cuda),
        (DeviceName.cpu, 4, 8, DeviceName.cpu),
        (DeviceName.cuda, 2, 2, DeviceName.cuda),
    ],
)
def test_device(device: DeviceName, num_ranks: int, num_gpus: int, expected: DeviceName) -> None:
    assert resolve_device(device, num_ranks, num_gpus) is expected


def test_too_few_gpus_are_refused_with_both_numbers(tmp_path: Path) -> None:
    cfg = config(tmp_path, device=DeviceName.cuda, parallel__fsdp=4)
    with pytest.raises(ConfigError, match="device=cuda: 4 ranks need a GPU each, this machine shows 2"):
        validate(cfg, None, num_gpus=2)
    assert validate(cfg, None, num_gpus=None).device is DeviceName.cuda  # not known yet
    assert validate(cfg, 4, num_gpus=2, local_world_size=2).device is DeviceName.cuda  # two machines


@pytest.mark.parametrize("trace", ["metrics", "checkpoint"])
def test_run_folder_with_steps_is_refused_unless_resumed(tmp_path: Path, trace: str) -> None:
    cfg = config(tmp_path, run_name="mine")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "checkpoints").mkdir()
    validate(cfg, None, None)  # a folder without steps is no run
    if trace == "metrics":
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
    else:
        (run / "checkpoints" / "step-00000005").mkdir()
    with pytest.raises(ConfigError, match="already holds steps.*checkpoint.resume=auto.*another run_name"):
        validate(cfg, None, None)
    cfg.print_plan = True  # writes nothing there
    validate(cfg, None, None)
    cfg.print_plan = False
    cfg.checkpoint.resume = "auto"
    validate(cfg, None, None)
    validate(config(tmp_path, run_name="other"), None, None)


def test_resume_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "old" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMIT.json").write_text("{}")
    for path in (checkpoint, tmp_path / "old"):
        validate(config(tmp_path, checkpoint__resume=str(path)), None, None)


def test_files_where_folders_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(ConfigError, match="runs is a file, not a folder"):
        validate(config(tmp_path), None, None)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ConfigError, match="empty.txt: the file is empty"):
        validate(config(tmp_path, data__text=None, data__path=str(empty)), None, None)
    empty.write_text("words")
    validate(config(tmp_path, data__text=None, data__path=str(empty)), None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": None}, "checkpoint=DIR must be given"),
        ({"checkpoint": "/nowhere"}, "checkpoint=/nowhere: there is no such folder"),
        ({"prompt": None}, "prompt="),
        ({"prompt": ""}, "prompt="),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"parallel": GenerateParallelConfig(tp=0)}, "parallel.tp=0 must be at least 1"),
        ({"parallel": GenerateParallelConfig(tp=2)}, "parallel.tp=2 must be the number of ranks, WORLD_SIZE is 1"),
        ({"device": DeviceName.cuda}, "device=cuda: PyTorch finds no GPU on this machine; use device=cpu"),
    ],
)
def test_generate_mistakes(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    right = GenerateConfig(checkpoint=str(tmp_path), prompt="words")
    assert validate_generate(right, 1, num_gpus=0).device is DeviceName.cpu
    with pytest.raises(ConfigError) as caught:
        validate_generate(replace(right, **values), 1, num_gpus=0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_export_and_inspect_mistakes(tmp_path: Path) -> None:
    right = ExportConfig(checkpoint=str(tmp_path), out=str(tmp_path / "new"))
    validate_export(right)
    validate_inspect(InspectConfig(checkpoint=str(tmp_path)))
    for values, message in (
        ({"checkpoint": None}, "checkpoint=DIR must be given"),
        ({"out": None}, "out=DIR must be given"),
        ({"out": str(tmp_path)}, "exists already"),
        ({"max_shard_size": "5 parsecs"}, "max_shard_size=5 parsecs must be a size such as 5GB"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate_export(replace(right, **values))
    with pytest.raises(ConfigError, match="there is no such folder"):
        validate_inspect(InspectConfig(checkpoint="/nowhere"))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("300 mb", 3 * 10**8), ("1.5KB", 1500), ("20000", 20000), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "5GiB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)
