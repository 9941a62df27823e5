from pathlib import Path

import pytest

from moe_trainer.cli import report
from tests.unit.observe.runs import write_run


def told(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_one_run_gets_its_page_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", steps=3)
    assert report.main([str(folder)]) == 0
    assert told(capsys) == (f"wrote {folder / 'report.html'}\n", "")
    assert '"name":"a"' in (folder / "report.html").read_text()


def test_several_runs_get_one_page_here_or_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(write_run(tmp_path / name, steps=3)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert report.main(folders) == 0
    assert report.main([*folders, "out=compared.html"]) == 0
    for name in ("report.html", "compared.html"):
        text = (tmp_path / name).read_text()
        assert '"name":"a"' in text and '"name":"b"' in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "moe-report: RUN must be given: the folder of a run, or several\n"),
        (["out=x.html"], "moe-report: RUN must be given: the folder of a run, or several\n"),
        (["nowhere"], "moe-report: nowhere: there is no such folder; usage: moe-report RUN... [out=FILE]\n"),
        (["--outt=x"], "moe-report: --outt=x: there is no such folder; usage: moe-report RUN... [out=FILE]\n"),
        (["run", "out="], "moe-report: out=FILE names one file, the page to write\n"),
        (["run", "out=a", "out=b"], "moe-report: out=FILE names one file, the page to write\n"),
        (["empty"], "moe-report: empty: there is no metrics.jsonl; give the folder of a run\n"),
        (["run", "out=notes"], "moe-report: out=notes is not a report; name a file that does not exist, or an older"),
        (["run", "out=no/where.html"], "moe-report: out=no/where.html cannot be written: "),
        (["run", "out=empty"], "moe-report: out=empty is not a file"),
    ],
)
def test_a_mistake_costs_one_line_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), steps=3)
    Path("empty").mkdir()
    Path("notes").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert report.main(arguments) == 2
    out, err = told(capsys)
    assert out == "" and err.startswith(line) and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before and Path("notes").read_text() == "mine"


def test_help_names_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--help"]) == 0
    assert "moe-report RUN... [out=FILE]" in told(capsys)[0]
