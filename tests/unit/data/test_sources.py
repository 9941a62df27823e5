import pytest

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DataConfig
from moe_trainer.data.sources import read_documents


def test_a_text_is_one_document():
    assert read_documents(DataConfig(text="a\nb")) == ["a\nb"]


def test_a_text_file_is_one_document_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\nb\n".encode())
    assert read_documents(DataConfig(path=str(path))) == ["é\r\nb\n"]


def test_a_jsonl_file_has_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 3}\n\n{"text": "\u2028three"}', encoding="utf-8")
    assert read_documents(DataConfig(path=str(path))) == ["one\ntwo", "\u2028three"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b'{"txt": "a"}', "string `text`"),
        (b'{"text": 3}', "string `text`"),
        (b'["text"]', "string `text`"),
        (b'{"text": ""}', "is empty"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "is not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=f"a.jsonl, line 2: .*{problem}"):
        read_documents(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("a.txt", b"", "is empty"), ("a.jsonl", b"\n", "is empty"), ("a.txt", b"ab\xff", "is not UTF-8 .byte 2")],
)
def test_a_bad_file_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: .*{problem}"):
        read_documents(DataConfig(path=str(tmp_path / name)))


def test_missing_file_folder_and_wrong_number_of_sources(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_documents(DataConfig(path=str(path)))
    for data in (DataConfig(), DataConfig(text="a", path="b")):
        with pytest.raises(ConfigError, match="either data.text or data.path"):
            read_documents(data)
    with pytest.raises(ConfigError, match="data.text: the text is empty"):
        read_documents(DataConfig(text=""))
