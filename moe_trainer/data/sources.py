"""Where the documents come from: a text in the config, a text file, or a JSONL file."""

import json
from pathlib import Path

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DataConfig


def read_documents(data: DataConfig) -> list[str]:
    """The documents of `data.text` (one), a plain text file (one), or a `.jsonl` file (one a line, in `text`).

    Blank lines of a JSONL file are skipped.

    Raises:
        ConfigError: no source or two; a file that cannot be read, is empty or is not UTF-8; a line that is not a JSON
            object with a non-empty string `text`. The message names the file and the line.
    """
    if (data.text is None) == (data.path is None):
        raise ConfigError("data: give either data.text or data.path")
    if data.text is not None:
        return [_checked(data.text, "data.text")]
    path = Path(data.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.path={path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() != ".jsonl":
        return [_checked(_decoded(content, f"data.path={path}"), f"data.path={path}")]
    lines = enumerate(content.split(b"\n"), start=1)
    documents = [_document(line, f"data.path={path}, line {number}") for number, line in lines if line.strip()]
    if not documents:
        raise ConfigError(f"data.path={path}: is empty; put one JSON object with `text` in each line")
    return documents


def _document(line: bytes, where: str) -> str:
    try:
        record = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ConfigError(f"{where}: needs a JSON object with a string `text`")
    return _checked(record["text"], where)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start}); convert it") from error


def _checked(text: str, where: str) -> str:
    if not text:
        raise ConfigError(f"{where}: the text is empty")
    try:
        text.encode("utf-8")  # JSON and the command line can smuggle in half of a surrogate pair
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: character {error.start} is not valid Unicode (lone surrogate)") from error
    return text
