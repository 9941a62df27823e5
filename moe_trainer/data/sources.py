"""Where the documents come from: a text in the config, or text, JSONL and Parquet files.

A document that cannot be used is handed on as the `ConfigError` that says why, for the caller to raise or to count.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DataConfig

if TYPE_CHECKING:
    import pyarrow


@dataclass(slots=True)
class Document:
    """A text or a conversation."""

    where: str
    """File and line or row, for errors."""
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    """Each with `role` and `content`, as chat templates take them."""
    tools: list[Any] | None = None
    """Functions that the conversation may call, as chat templates take them."""

    @property
    def content(self) -> str:
        """All of it in one text, whose hash tells documents apart."""
        if self.text is not None:
            return self.text
        return json.dumps([self.messages, self.tools], sort_keys=True, default=str)  # Parquet has dates, for one


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
    return read_texts(data.path, "data.path")


def read_texts(path: str, key: str) -> list[str]:
    """The texts of one file that the config names under `key`; see `read_documents`."""
    texts = []
    for document in read_file(Path(path), f"{key}={path}"):
        if isinstance(document, ConfigError):
            raise document
        if document.text is None:
            raise ConfigError(f"{document.where}: `messages` need a chat template; use moe-data prepare")
        texts.append(document.text)
    return texts


def read_file(path: Path, name: str | None = None) -> Iterator[Document | ConfigError]:
    """The documents of a file, by its suffix: `.jsonl`, `.parquet`, or plain text (one).

    Args:
        name: what errors call it; the path unless given.

    Yields:
        Each document, or why it is none; at least one of either.
    """
    name = name or str(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    documents = readers.get(path.suffix.lower(), _read_text)(path, name)
    is_empty = True
    try:
        for document in documents:
            is_empty = False
            yield document
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror or error})") from error
    if is_empty:
        yield ConfigError(f"{name}: is empty; put one JSON object with `text` in each line")


def _read_text(path: Path, name: str) -> Iterator[Document | ConfigError]:
    content = path.read_bytes()
    try:
        yield Document(name, _checked(_decoded(content, name), name))
    except ConfigError as error:
        yield error


def _read_jsonl(path: Path, name: str) -> Iterator[Document | ConfigError]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, f"{name}, line {number}")


def _parsed(line: bytes, where: str) -> Document | ConfigError:
    try:
        record = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        return ConfigError(f"{where}: is not JSON ({error.msg}, column {error.colno})")
    except ConfigError as error:
        return error
    except RecursionError:
        return ConfigError(f"{where}: is nested too deeply")
    except ValueError as error:  # an integer of thousands of digits
        return ConfigError(f"{where}: is not JSON that can be read ({error})")
    return _document(record, where)


def _read_parquet(path: Path, name: str) -> Iterator[Document | ConfigError]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{name}: Parquet needs pyarrow: pip install 'moe-trainer[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column for column in ("text", "messages", "tools") if column in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(columns=columns):
                for record in _records(batch):
                    row += 1
                    yield _document(record, f"{name}, row {row}")
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{name}: is no readable Parquet file ({str(error).splitlines()[0]})") from error


def _records(batch: "pyarrow.RecordBatch") -> Iterator[Any]:
    """The rows; in place of one whose text is not UTF-8, which Parquet does not look for, the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error
            return
        for number in range(batch.num_rows):
            yield from _records(batch.slice(number, 1))


def _document(record: Any, where: str) -> Document | ConfigError:
    if isinstance(record, UnicodeDecodeError):
        return ConfigError(f"{where}: is not UTF-8 (byte {record.start}); convert it")
    if not isinstance(record, dict):
        return ConfigError(f"{where}: needs a JSON object with a string `text`")
    text, messages = record.get("text"), record.get("messages")
    try:
        if isinstance(text, str):
            return Document(where, _checked(text, where))
        if messages is None:
            return ConfigError(f"{where}: needs a JSON object with a string `text`")
        return Document(where, messages=_checked_messages(messages, where), tools=record.get("tools"))
    except ConfigError as error:
        return error


def _checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(f"{where}: message {number} needs a string `role`")
        if isinstance(message.get("content"), str):
            encodable(message["content"], where)
    # Parquet gives every message every key: what is null was not said.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start}); convert it") from error


def _checked(text: str, where: str) -> str:
    if not text:
        raise ConfigError(f"{where}: the text is empty")
    return encodable(text, where)


def encodable(text: str, where: str) -> str:
    """The text.

    Raises:
        ConfigError: it is not valid Unicode.
    """
    try:
        text.encode("utf-8")  # JSON and the command line can smuggle in half of a surrogate pair
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: character {error.start} is not valid Unicode (lone surrogate)") from error
    return text
