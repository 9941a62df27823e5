"""The texts to continue. Without torch: mistakes in a file cost one line before any rank starts."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.data.sources import encodable


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue."""

    text: str
    line: int | None = None
    """Of the file, where it comes from one."""

    @property
    def name(self) -> str:
        """How an error speaks of it."""
        return "the prompt" if self.line is None else f"the prompt in line {self.line}"


def read_prompts(cfg: GenerateConfig) -> list[Prompt]:
    """`cfg.prompt`, or those of the file `cfg.prompts` in its order.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no prompt.
    """
    if cfg.prompts is None:
        return [Prompt(encodable(cfg.prompt, "prompt"))]
    path = Path(cfg.prompts)
    try:
        # Not splitlines(), which also parts a text at characters that JSON and people leave in it.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={path} cannot be read: {error}") from error
    parse = _from_json if path.suffix == ".jsonl" else str
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"prompts={path}, line {number}"
        try:
            text = parse(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if not text.strip():
            raise ConfigError(f"{where} is empty: each line must be a prompt")
        prompts.append(Prompt(encodable(text, where), number))
    return prompts


def _from_json(line: str) -> str:
    value = json.loads(line) if line.strip() else {"prompt": ""}
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError('not an object with a text under "prompt"')
    return text
