"""The three commands up to where torch starts: exit codes, the one line on stderr, help, and what they cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_trainer.cli import checkpoint, generate, train
from moe_trainer.cli import eval as evaluate
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.schema import Config, ModelConfig
from moe_trainer.models.mixtral.hf import hf_config
from tests.processes import environment

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["+recipe=mixtral_sp_ep", "parallel.ep=3"], "moe-train: parallel.ep=3 must divide fsdp(2) x tp(2)"),
        (["+recipe=mixtral_sp_ep", "parallel.tpp=2"], "moe-train: parallel.tpp is not a key; did you mean parallel"),
        (["+recipe=mixtral_sp_ep", "steps=two"], "moe-train: steps: Value 'two' of type 'str' could not be"),
        (["+recipe=mixtral_sp_ep", "nproc=3"], "moe-train: parallel: dp_replicate(1) x fsdp(2) x tp(2) = 4 ranks"),
        (["+recipe=mixtral_sp_ep", "data.path=no file.txt"], "moe-train: data.path=no file.txt: there is no such"),
        (["+recipe=mixtral_sp_ep", "run_name=a/b"], "moe-train: run_name='a/b' must be a folder name"),
        (["+recipe=mixtral_sp_ep", "model.init_from=x"], "moe-train: model.init_from=x: there is no such folder"),
        (["+recipe=mixtral_8x7b_sp_ep"], "moe-train: model.init_from must be given"),
        (["+recipe=nope"], "moe-train: there is no recipe 'nope'; recipes: deepseek_v3_tiny, gpt_oss_20b, "),
        (["data.path=a b.txt"], "moe-train: data.path=a b.txt: there is no such file"),
    ],
)
def test_train_mistake(argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "moe-checkpoint: the first argument is one of export, inspect, verify, upcycle; none is given"),
        (["delete"], "moe-checkpoint: the first argument is one of export, inspect, verify, upcycle; not 'delete'"),
        (["inspect"], "moe-checkpoint: checkpoint=DIR must be given"),
        (["verify", "checkpoint=a, b"], "moe-checkpoint: checkpoint=a, b: there is no such folder"),
        (["export", "checkpoint=.", "out=."], "moe-checkpoint: out=. exists already; name a folder that does not"),
        (["export", "checkpoint=.", "out=x", "max_shard_size=big"], "moe-checkpoint: max_shard_size=big must be"),
        (["inspect", "out=x"], "moe-checkpoint: out is not a key"),
    ],
)
def test_checkpoint_mistake(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "moe-generate: checkpoint=DIR must be given"),
        (["checkpoint=."], 'moe-generate: prompt="TEXT" must be given'),
        (["checkpoint=.", "prompt=x", "temprature=1"], "moe-generate: temprature is not a key; did you mean temp"),
        (
            ["checkpoint=.", "prompt=x", "device=cuda", "parallel.tp=64"],
            f"moe-generate: device=cuda: {'64 ranks need' if torch.cuda.is_available() else 'PyTorch finds no GPU'}",
        ),
    ],
)
def test_generate_mistake(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_train_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["steps=3"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "moe-train: name a recipe, or give data.path=FILE"
    assert [line.split()[0] for line in lines] == sorted(
        f"+recipe={path.stem}" for path in (ROOT / "recipes").glob("*.yaml")
    )
    assert all(len(line.split()) > 5 for line in lines)


def test_help_names_every_recipe_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["+recipe=nope", "--help"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "+recipe=mixtral_tp_ep",
        "parallel=sp|sp_ep|tp|tp_ep",
        "optim.schedule=cosine  (constant|linear|cosine|wsd)",
        "parallel.fsdp=-1  (int)\n      Data-parallel ranks that shard the parameters; -1 takes what is left",
        "checkpoint.resume=none  (str)",
    ):
        assert expected in text
    assert "optim.groups=[]  (list[GroupConfig])" in text and "moe_trainer." not in text
    assert evaluate.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "data.path=unset" in text and "data.packing=" in text
    assert not any(
        f"  {key}" in text for key in ("data.text", "data.tokenizer", "data.prepare", "data.validation_path")
    )
    assert generate.main(["-h"]) == 0 and "max_new_tokens=256  (int)" in capsys.readouterr().out
    assert checkpoint.main(["export", "--help"]) == 0 and "max_shard_size=5GB" in capsys.readouterr().out


def test_under_torchrun_rank_0_speaks_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train.main(["+recipe=mixtral_sp_ep"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == lines
        assert not lines or "= 4 ranks, but WORLD_SIZE or nproc says 2" in err


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], int]]:
    calls: list[tuple[str, list[str], int]] = []

    def record(module: str, argv: list[str], nproc: int, lets_finish: bool = False) -> int:
        assert lets_finish is (module == "moe_trainer.cli.train")  # only a training run has something to save
        calls.append((module, argv, nproc))
        return 7

    monkeypatch.setattr(train, "launch", record)
    monkeypatch.setattr(generate, "launch", record)
    return calls


def test_several_ranks_are_launched_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = launched(monkeypatch)
    argv = ["+recipe=mixtral_sp_ep", "device=cpu", "data.text=a, b = c"]
    assert train.main(argv) == 7
    asked = ["checkpoint=.", "prompt=a, 'b'", "device=cpu", "parallel.tp=2"]
    assert generate.main(asked) == 7
    assert calls == [("moe_trainer.cli.train", argv, 4), ("moe_trainer.cli.generate", asked, 2)]


def test_mesh_that_takes_what_is_left_is_launched_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch)
    monkeypatch.setattr(train, "count_gpus", lambda device: 8 if device is DeviceName.auto else 0)
    assert train.main(["+recipe=mixtral_sp_ep", "parallel.fsdp=-1", "device=auto"]) == 7
    assert train.main(["+recipe=mixtral_sp_ep", "parallel.fsdp=-1", "nproc=2"]) == 7
    assert [nproc for _, _, nproc in calls] == [8, 2]


def test_shape_comes_from_the_folder_to_start_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    hub = hf_config(ModelConfig(num_heads=6, num_kv_heads=2), "float32", None)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(hub))
    seen: list[Config] = []
    monkeypatch.setattr(train, "validate", lambda cfg, *args, **kwargs: seen.append(cfg) or sys.exit(9))
    with pytest.raises(SystemExit):
        train.main(["+recipe=mixtral_tp", "model.init_from=hub"])
    assert (seen[0].model.num_heads, seen[0].model.num_kv_heads, seen[0].model.init_from) == (6, 2, "hub")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):  # a shell leaves the tilde behind a dotted key to us
        train.main(["+recipe=mixtral_tp", "model.init_from=~/hub"])
    assert seen[1].model.init_from == str(tmp_path / "hub")


def test_mistake_costs_no_import_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from moe_trainer.cli import train, generate, checkpoint\n"
        "codes = [train.main(['+recipe=mixtral_sp_ep', 'parallel.ep=3']), generate.main([]), checkpoint.main([])]\n"
        "assert codes == [2, 2, 2] and train.main(['--help']) == 0\n"
        "sys.exit(sum(name.partition('.')[0] in ('torch', 'numpy', 'transformers') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"\n") == 3


def test_module_is_a_command_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_trainer.cli.train", "+recipe=mixtral_sp_ep", "parallel.ep=3"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe-train: parallel.ep=3 must divide fsdp(2) x tp(2)\n"
