"""Conversations to text by the tokenizer's own chat template, with the places that the model is to say itself.

A template is a Jinja file that transformers wrote the conventions of: it knows `messages`, `tools`,
`add_generation_prompt` and the special tokens, and may mark what the assistant says with `{% generation %}`.
"""

import json
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import read_object
from moe_trainer.data.shards import Encoded
from moe_trainer.data.sources import Document, encodable
from moe_trainer.data.tokenizer import encoding_errors

_OPEN, _CLOSE = (f"\x00{secrets.token_hex(8)}{end}" for end in "<>")
"""Stand around what a template marks, until their places are known; nobody else's text has them."""


class Rendered(NamedTuple):
    """A conversation as one text."""

    text: str
    spans: list[tuple[int, int]]
    """First character and end of each part that the model is to say itself."""


class ChatTemplate:
    """A compiled chat template, in a sandbox: it sees what it is given and cannot change it."""

    def __init__(self, source: str, name: str, special_tokens: dict[str, str]) -> None:
        """
        Raises:
            ConfigError: the template cannot be compiled; `name` says which file it is.
        """
        self.source = source
        self.name = name
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # of jinja2, or of what it compiles to
            problem = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{name}: is no chat template ({problem})") from error

    @classmethod
    def load(cls, folder: Path | None, file: str | None) -> "ChatTemplate | None":
        """The template of `file`, else of chat_template.jinja or tokenizer_config.json in the tokenizer's folder.

        Returns:
            None if there is none.

        Raises:
            ConfigError: a file that cannot be read.
        """
        settings = {} if folder is None else _read_settings(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        tokens = {name: _token_text(settings[name]) for name in names if settings.get(name)}
        if file is None and folder is None:
            return None
        path = folder / "chat_template.jinja" if file is None else Path(file)
        if file is not None or path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path), tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: cannot be read ({error})") from error
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        return cls(source, str(folder / "tokenizer_config.json"), tokens) if source else None

    def render(self, document: Document) -> Rendered:
        """The conversation, and where the assistant speaks.

        Where the template marks nothing, a turn of the assistant is what the whole text has beyond the prompt that
        would ask for it. A turn that stands otherwise in the whole text than it would be said (some templates drop
        the thoughts of earlier turns) is left out: nothing would be learned from it that is ever asked for.

        Raises:
            ConfigError: the template refuses the conversation, or the assistant says nothing in it.
        """
        messages = document.messages
        marked = self._text(document, messages)
        text, spans = _without_marks(marked)
        if _OPEN not in marked:
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [span for number in turns if (span := self._turn(document, text, number)) is not None]
        if not any(start < end for start, end in spans):
            raise ConfigError(f"{document.where}: the assistant says nothing in what {self.name} makes of it")
        return Rendered(text, spans)

    def _turn(self, document: Document, text: str, number: int) -> tuple[int, int] | None:
        messages = document.messages
        if number == 0:
            return None  # nobody asked
        prompt = _without_marks(self._text(document, messages[:number], add_generation_prompt=True))[0]
        with_answer = text
        if number + 1 < len(messages):
            with_answer = _without_marks(self._text(document, messages[: number + 1]))[0]
        if text.startswith(with_answer) and with_answer.startswith(prompt):
            return len(prompt), len(with_answer)
        return None

    def _text(self, document: Document, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text = self._template.render(
                messages=messages,
                tools=document.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            problem = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{document.where}: {self.name} cannot be applied ({problem})") from error
        return encodable(text, document.where)


def encode_conversations(conversations: list[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokens of each conversation; a token is learned if it begins where the assistant speaks.

    The template has written the special tokens, so the tokenizer adds none.
    """
    texts = [conversation.text for conversation in conversations]
    encoded = []
    with encoding_errors():
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    for conversation, encoding in zip(conversations, encodings, strict=True):
        spoken = np.zeros(len(conversation.text) + 1, dtype=bool)
        for start, end in conversation.spans:
            spoken[start:end] = True
        # Tokenizers that trim offsets put white space behind itself, where the next part may begin.
        starts = np.array([min(start, max(end - 1, 0)) for start, end in encoding.offsets], dtype=np.int64)
        encoded.append(Encoded(np.array(encoding.ids, dtype=np.int32), spoken[starts]))
    return encoded


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the places that they stood around."""
    before, *marked = text.split(_OPEN)
    length, parts, spans = len(before), [before], []
    for part in marked:
        inside, _, after = part.partition(_CLOSE)
        spans.append((length, length + len(inside)))
        length += len(inside) + len(after)
        parts += [inside, after]
    return "".join(parts), spans


def _read_settings(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes what HTML would take amiss.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
