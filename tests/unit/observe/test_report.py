import json
import math

import numpy as np
import pytest

from moe_trainer.config.errors import ConfigError
from moe_trainer.observe import report
from moe_trainer.observe.report import load_run, thin_out, write_report
from tests.unit.observe.runs import EXPERTS, load_table, write_run


def test_a_short_curve_is_kept_as_it_is():
    steps, values = np.arange(1, 6), np.array([1.0, 2.0, math.nan, 4.0, 5.123456789])
    assert thin_out(steps, values, 10) == {"x": [1, 2, 3, 4, 5], "y": [1.0, 2.0, None, 4.0, 5.1235]}


def test_a_long_curve_keeps_its_means_range_and_spikes():
    values = np.sin(np.arange(100_000) / 5000)
    values[54_321] = 40.0
    values[:200] = math.nan
    line = thin_out(np.arange(1, 100_001), values, 500)
    assert {len(points) for points in line.values()} == {500}
    assert line["x"][0] == 200 and line["x"][-1] == 100_000 and line["x"] == sorted(line["x"])
    assert line["y"][0] is line["low"][0] is line["high"][0] is None
    assert max(value for value in line["high"] if value is not None) == 40.0
    assert line["y"][400] == pytest.approx(values[80_000:80_200].mean(), rel=1e-4)
    assert line["low"][400] == pytest.approx(values[80_000:80_200].min(), rel=1e-4)


def test_what_a_run_says(tmp_path):
    run = load_run(write_run(tmp_path / "a", steps=20, val_every=10, load_every=5))
    assert run["name"] == "a"
    assert run["series"]["loss"]["x"] == list(range(1, 21))
    assert run["series"]["val_loss"]["x"] == run["series"]["val_perplexity"]["x"] == [10, 20]
    assert run["series"]["router_entropy"]["x"] == [5, 10, 15, 20]
    assert run["config"]["model.num_layers"] == 3 and run["environment"][0]["world_size"] == 4
    summary = run["summary"]
    assert (summary["step"], summary["tokens"], summary["seconds"]) == (20, 2000, 10.0)
    assert summary["val_loss"] == summary["best_val_loss"] == pytest.approx(2.1 + 4 * math.exp(-1))
    assert summary["mfu"] == 0.4


def test_expert_load_is_relative_to_the_mean_and_knows_its_layers(tmp_path):
    load = load_run(write_run(tmp_path / "a", steps=10, load_every=2))["load"]
    assert (load["steps"], load["layers"]) == ([2, 4, 6, 8, 10], [0, 2])
    counts = load_table(2, 10)[0]
    mean = sum(counts) / EXPERTS
    assert load["tables"][0][0] == [round(100 * count / mean) for count in counts] and load["tables"][0][0][0] == 0
    assert all(percent > 0 for percent in load["tables"][-1][0])


def test_an_expert_with_one_token_is_not_dead(tmp_path):
    folder = write_run(tmp_path / "a", steps=1)
    line = {"step": 1, "loss": 1.0, "expert_load": [[1, 1_000_000, 0, 1_000_000]]}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert load_run(folder)["load"]["tables"] == [[[1, 200, 0, 200]]]


def test_many_tables_are_thinned_from_the_first_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_TABLES", 7)
    load = load_run(write_run(tmp_path / "a", steps=100))["load"]
    assert len(load["steps"]) == len(load["tables"]) == 7
    assert (load["steps"][0], load["steps"][-1]) == (1, 100)


def test_a_run_without_config_environment_or_load_still_has_curves(tmp_path):
    folder = write_run(tmp_path / "a", steps=3, load_every=10)
    (folder / "config.yaml").unlink()
    (folder / "environment.jsonl").unlink()
    run = load_run(folder)
    assert (run["name"], run["load"], run["config"], run["environment"]) == ("a", None, {}, [])
    assert run["series"]["loss"]["x"] == [1, 2, 3]


def test_values_that_were_not_finite_leave_a_gap_and_valid_json(tmp_path):
    folder = write_run(tmp_path / "a", steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": null, "grad_norm": null}\n{"step": 5, "loss": 2.0, "grad_norm": 1.0}\n')
    assert load_run(folder)["series"]["loss"]["y"][3] is None
    write_report([folder], tmp_path / "out.html")
    data = (tmp_path / "out.html").read_text().split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["runs"][0]["series"]["grad_norm"]["y"][3:] == [None, 1.0]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "metrics.jsonl cannot be read"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "metrics.jsonl cannot be read: 'step'"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl cannot be read"),
        ("metrics.jsonl", "", "holds no steps yet"),
        ("metrics.jsonl", '{"step": 1', "metrics.jsonl cannot be read: no line is complete"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "metrics.jsonl cannot be read"),
        ("metrics.jsonl", '{"step": 1, "loss": 1, "expert_load": [[1], [1, 2]]}\n', "metrics.jsonl cannot be read"),
        ("metrics.jsonl", '{"step": 1, "loss": 1, "expert_load": [1, 2]}\n', "metrics.jsonl cannot be read"),
        ("config.yaml", "[1, 2]", "config.yaml cannot be read"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("environment.jsonl", "?\n", "environment.jsonl cannot be read"),
        ("environment.jsonl", '{"a":' * 900 + "1" + "}" * 900 + "\n", "cannot be read: maximum recursion depth"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, file, content, told):
    folder = write_run(tmp_path / "a", steps=2)
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=told):
        write_report([folder], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_an_older_report_is_replaced_and_nothing_else(tmp_path):
    folder, out = write_run(tmp_path / "a", steps=2), tmp_path / "out.html"
    write_report([folder], out)
    before = out.read_text()
    write_report([write_run(tmp_path / "b", steps=2)], out)
    assert out.read_text() != before
    out.write_text("<html>my notes</html>")
    with pytest.raises(ConfigError, match="is not a report"):
        write_report([folder], out)
    assert out.read_text() == "<html>my notes</html>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out.html"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / place / "run", steps=2) for place in ("x", "y")]
    write_report(folders, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert all(json.dumps(str(folder)) in text for folder in folders)


def test_a_limit_that_is_infinite_is_drawn_in_words(tmp_path):
    write_run(tmp_path / "free", steps=5, optim={"max_grad_norm": math.inf})
    assert load_run(tmp_path / "free")["config"]["optim.max_grad_norm"] == "inf"
    write_report([tmp_path / "free"], tmp_path / "page.html")


def test_a_config_that_would_be_a_billion_leaves_is_refused(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    for text in ("a: &a {b: 1}\nc: *a\n", "a: &a {x: *a}\n", "[" * 2000):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="config.yaml cannot be read: "):
            load_run(run)


def test_a_script_that_mentions_reports_is_not_replaced(tmp_path):
    run, script = write_run(tmp_path / "run", steps=5), tmp_path / "report.sh"
    script.write_text("#!/bin/sh\nmoe-report runs/a\n")
    with pytest.raises(ConfigError, match="is not a report"):
        write_report([run], script)
    assert script.read_text().startswith("#!/bin/sh")


def test_a_name_that_is_not_unicode_costs_one_line(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    (run / "config.yaml").write_text('run_name: "\\ud800"\n')
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([run], tmp_path / "page.html")
    assert not list(tmp_path.glob("page*"))
