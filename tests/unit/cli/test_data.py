"""`moe-data` as it is typed, and runs that prepare their data themselves."""

import json
from pathlib import Path

import pytest

from moe_trainer.cli import data, train
from moe_trainer.config.store import compose
from moe_trainer.observe.sinks import read_metrics


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        Path(f"{number}.txt").write_text(f"some words and the number {number}" * 3)


def test_prepare_verify_and_the_second_time(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "1*.txt", "2.txt", "out=made/out", "validation_share=0.3", 'exclude=["13*"]']
    assert data.main(command) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("made/out: training: 7 documents, ") and "; validation: 4 documents, " in out
    entropy = json.loads(Path("made/out/index.json").read_text())["unigram_entropy"]
    assert out.splitlines()[-1] == f"unigram entropy: {entropy:.4f} nats"
    assert data.main(command) == 0
    assert "(prepared before, nothing to do)" in capsys.readouterr().out
    assert data.main(["verify", "path=made/out"]) == 0
    assert "made/out: every file is as it was written; training: 7 documents" in capsys.readouterr().out
    with Path("made/out/train-00000.tokens").open("r+b") as file:
        file.write(b"xx")
    assert data.main(["verify", "path=made/out"]) == 2
    assert capsys.readouterr().err.startswith("moe-data: made/out/train-00000.tokens: its checksum is not the one")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "moe-data: the first argument is one of prepare, verify; none is given"),
        (["show"], "moe-data: the first argument is one of prepare, verify; not 'show'"),
        (["prepare"], "moe-data: out=DIR must be given: the folder to write"),
        (["prepare", "out=x"], "moe-data: name the files to prepare: moe-data prepare FILE... out=DIR"),
        (["prepare", "none.txt", "out=x"], "moe-data: inputs: none.txt names no file"),
        (["prepare", "1.txt", "out=2.txt"], "moe-data: out=2.txt exists already and is no prepared folder"),
        (
            ["prepare", "1.txt", "out=x", "tokeniser=byte"],
            "moe-data: tokeniser is not a key; did you mean tokenizer?",
        ),
        (["prepare", "1.txt", "out=x", "validation_share=2"], "moe-data: validation_share=2.0 must be at least 0"),
        (["prepare", "1.txt", f"out={'x' * 300}"], f"moe-data: out={'x' * 300}: cannot be made ("),
        (["prepare", "1.txt", "out=1.txt/x"], "moe-data: out=1.txt/x: cannot be made ("),
        (
            ["prepare", "1.txt", "out=x", "tokenizer=2.txt"],
            "moe-data: tokenizer=2.txt: not a readable tokenizer.json",
        ),
        (["verify", "path=x"], "moe-data: path=x: there is no such file"),
    ],
)
def test_mistakes(argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert data.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1 and not out
    assert sorted(tmp_path.iterdir()) == before


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["--help"]) == 0
    out = capsys.readouterr().out
    for key in ("inputs", "exclude", "train_tokenizer", "chat_template", "out", "path"):
        assert f"  {key}=" in out
    assert "Files or globs" in out and "Folder to write. Required." in out


RUN = ["+recipe=qwen3_moe_tiny", "parallel.tp=1", "data.micro_batch_size=1", "steps=2", "device=cpu"]


def test_a_run_prepares_what_is_not_there_and_then_leaves_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = [
        "data.path=made",
        "data.seq_len=16",
        "data.prepare.inputs=[1*.txt]",
        "data.prepare.validation_share=0.2",
    ]
    assert train.main([*RUN, *settings, "run_name=one"]) == 0
    assert "unigram entropy: " in capsys.readouterr().err
    index = Path("made/index.json")
    stamp = index.stat().st_mtime_ns
    assert train.main([*RUN, *settings, "run_name=two"]) == 0
    assert index.stat().st_mtime_ns == stamp
    Path("1.txt").unlink()
    assert train.main([*RUN, *settings, "run_name=three"]) == 2
    assert "data.path=made was prepared from other files or with other settings" in capsys.readouterr().err
    assert train.main([*RUN, *settings, "data.prepare.inputs=[none.txt]", "run_name=three"]) == 2
    assert capsys.readouterr().err == "moe-train: data.prepare.inputs: none.txt names no file\n"
    assert index.stat().st_mtime_ns == stamp and not Path("runs/three").exists()
    assert train.main([*RUN, *settings, "data.prepare.inputs=[]", "steps=1", "run_name=as_it_is"]) == 0
    lines = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two")]
    assert [line["loss"] for line in lines[0] if "loss" in line] == [
        line["loss"] for line in lines[1] if "loss" in line
    ]
    assert all("val_loss" in run[-1] for run in lines)
    assert train.main([*RUN, "data.path=made", "data.seq_len=16", "model.vocab_size=200", "run_name=three"]) == 2
    assert "made has token id 256, but model.vocab_size=200" in capsys.readouterr().err


def test_a_mixture_is_given_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for mistake in ("data.mixture.made=1", "data.mixture=made", "data.mixture={_target_: 1}"):
        assert train.main([*RUN, mistake]) == 2
        assert "give it whole, in a recipe or as 'data.mixture={KEY: VALUE, ...}'" in capsys.readouterr().err
    cfg = compose("train", ["data.mixture={made/a.b: 3, /other: 0.5}"])
    assert cfg.data.mixture == {"made/a.b": 3.0, "/other": 0.5}
    assert train.main(["data.mixture={made/a: 3}", "data.seq_len=4"]) == 2
    assert "made/a is no prepared folder" in capsys.readouterr().err


def test_the_recipe_of_the_standard_library() -> None:
    """Its model has a row for each token of its tokenizer; a length that the model is meant for."""
    cfg = compose("train", ["+recipe=stdlib_code"])
    assert cfg.data.prepare.train_tokenizer == cfg.model.vocab_size
    assert cfg.data.seq_len <= cfg.model.max_position_embeddings
    assert all("{stdlib}" in pattern for pattern in cfg.data.prepare.inputs + cfg.data.prepare.exclude)
