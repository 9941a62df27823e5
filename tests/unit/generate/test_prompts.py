"""Prompts from the command or a file, and the mistakes that cost a line before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_trainer.cli import generate
from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.validate import validate_generate
from moe_trainer.generate.prompts import Prompt, read_prompts


def in_file(path: Path, content: str) -> GenerateConfig:
    path.write_text(content, encoding="utf-8")
    return GenerateConfig(checkpoint=str(path.parent), prompts=str(path))


def test_one_prompt_is_taken_as_it_stands() -> None:
    assert read_prompts(GenerateConfig(prompt=" two\nlines ")) == [Prompt(" two\nlines ")]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_is_a_prompt(tmp_path: Path, end: str) -> None:
    cfg = in_file(tmp_path / "p.txt", f'one\n two \n{{"prompt": "x"}}\na\u2028b{end}')
    assert [prompt.text for prompt in read_prompts(cfg)] == ["one", " two ", '{"prompt": "x"}', "a\u2028b"]
    assert [prompt.line for prompt in read_prompts(cfg)] == [1, 2, 3, 4]


def test_jsonl_holds_any_text(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", "größer\u2028"]
    lines = (json.dumps({"id": 1, "prompt": text}, ensure_ascii=False) for text in texts)
    assert [prompt.text for prompt in read_prompts(in_file(tmp_path / "p.jsonl", "\n".join(lines)))] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\n\nthree\n", "p.txt, line 2 is empty"),
        ("p.txt", "one\n \n", "p.txt, line 2 is empty"),
        ("p.jsonl", '{"prompt": "x"}\n\n', "p.jsonl, line 2 is empty"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', "p.jsonl, line 2 is empty"),
        ("p.jsonl", '{"prompt": "x"}\nwords\n', "p.jsonl, line 2: Expecting value"),
        ("p.jsonl", '{"prompt": "x"}\n{"text": "x"}', 'p.jsonl, line 2: not an object with a text under "prompt"'),
        ("p.jsonl", '["prompt"]', 'p.jsonl, line 1: not an object with a text under "prompt"'),
        ("p.jsonl", "[" * 10**5, "p.jsonl, line 1: maximum recursion depth exceeded"),
        ("p.jsonl", r'{"prompt": "\ud800"}', "p.jsonl, line 1: character 0 is not valid Unicode"),
        ("p.jsonl", '{"prompt": 3}', 'p.jsonl, line 1: not an object with a text under "prompt"'),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = in_file(tmp_path / name, content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(cfg)
    assert message in str(caught.value)
    # By the command too, before it looks for a model in the folder.
    assert generate.main([f"checkpoint={tmp_path}", f"prompts={cfg.prompts}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_byte_of_the_command_line_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="prompt: character 1 is not valid Unicode"):
        read_prompts(GenerateConfig(prompt="a\udce9"))  # as Python has it


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    cfg = in_file(tmp_path / "p.txt", "x")
    Path(cfg.prompts).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="p.txt cannot be read"):
        read_prompts(cfg)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": None}, 'prompt="TEXT" must be given: the text to continue; or prompts=FILE'),
        ({"prompt": "x"}, "prompt and prompts are both given"),
        ({"prompts": "/nowhere"}, "prompts=/nowhere: there is no such file"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"output": "out.txt"}, "output=out.txt must be a .jsonl file"),
        ({"output": "/nowhere/out.jsonl"}, "output=/nowhere/out.jsonl: there is no folder /nowhere"),
    ],
)
def test_mistakes(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    cfg = in_file(tmp_path / "p.txt", "x")
    validate_generate(cfg, None, None)
    for key, value in values.items():
        setattr(cfg, key, value)
    with pytest.raises(ConfigError) as caught:
        validate_generate(cfg, None, None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_results_replace_no_file(tmp_path: Path) -> None:
    cfg = in_file(tmp_path / "p.txt", "x")
    cfg.output = str(tmp_path / "out.jsonl")
    validate_generate(cfg, None, None)
    Path(cfg.output).touch()
    with pytest.raises(ConfigError, match="exists already"):
        validate_generate(cfg, None, None)
