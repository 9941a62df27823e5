"""Documents to shards: each encoded, put on its side of the split, and written once there are enough."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import read_object
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.data.chat import ChatTemplate, Rendered, encode_conversations
from moe_trainer.data.shards import TRAIN, VALIDATION, Encoded, ShardEntry, write_durably, write_shard
from moe_trainer.data.sources import Document
from moe_trainer.data.tokenizer import encode_texts, highest_id
from moe_trainer.data.working import Keys

_ENCODE_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 1 << 22


@dataclass(slots=True)
class Record:
    """What one shard's part of the input came to."""

    stop: int
    """Documents of the input up to its end."""
    skipped: int
    """Of this part, for what the template or the tokenizer makes of them."""
    train: list[ShardEntry] = field(default_factory=list)
    validation: list[ShardEntry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """
        Raises:
            ConfigError: it is damaged.
        """
        values = read_object(path)
        try:
            splits = {split: [ShardEntry(**entry) for entry in values[split]] for split in (TRAIN, VALIDATION)}
            return cls(values["stop"], values.get("skipped", 0), **splits)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error!r}); prepare the data again") from error


def is_held_out(document: Document, share: float, seed: int) -> bool:
    """Whether the document is for validation: a function of its content, so that copies stay together."""
    hashed = hashlib.blake2b(f"{seed}/{document.content}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") < share * 2**64


class ShardWriter:
    """Encodes documents and writes a shard whenever there are enough."""

    def __init__(
        self,
        cfg: PrepareConfig,
        folder: Path,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        records: list[Record],
        keys: Keys,
    ) -> None:
        """
        Args:
            keys: what errors call those of `cfg`.
        """
        self.records = records
        self.skipped = sum(record.skipped for record in records)
        """Documents that the template refuses or the tokenizer makes no token of, left out with `skip_bad`."""
        self._highest_id = highest_id(tokenizer)
        if self._highest_id >= 1 << 31:
            raise ConfigError(
                f"the tokenizer's highest id, {self._highest_id}, is beyond 31 bits; mend the tokenizer"
            )
        self.dtype = "uint16" if self._highest_id < 1 << 16 else "uint32"
        self._cfg = cfg
        self._keys = keys
        self._folder = folder
        self._tokenizer = tokenizer
        self._template = template

    def write(self, documents: Iterable[Document]) -> None:
        """All documents of the input that no shard has yet."""
        splits: dict[str, list[Encoded]] = {TRAIN: [], VALIDATION: []}
        number, tokens = self.records[-1].stop if self.records else 0, 0
        for document, encoded in self._encoded(documents, number):
            number += 1
            if isinstance(encoded, ConfigError):
                if not self._cfg.skip_bad:
                    raise self._keys.bad_document(encoded)
                self.skipped += 1
                continue
            held_out = is_held_out(document, self._cfg.validation_share, self._cfg.seed)
            splits[VALIDATION if held_out else TRAIN].append(encoded)
            tokens += len(encoded.ids)
            if tokens >= self._cfg.shard_tokens:
                self._finish(splits, number)
                splits, tokens = {TRAIN: [], VALIDATION: []}, 0
        if tokens:
            self._finish(splits, number)

    def _finish(self, splits: dict[str, list[Encoded]], stop: int) -> None:
        number = len(self.records)
        record = Record(stop, self.skipped - sum(record.skipped for record in self.records))
        for split, documents in splits.items():
            if documents:
                entry = write_shard(self._folder, f"{split}-{number:05d}", documents, self.dtype)
                getattr(record, split).append(entry)
        write_durably(self._folder / f"shard-{number:05d}.json", json.dumps(asdict(record)).encode())
        self.records.append(record)

    def _encoded(self, documents: Iterable[Document], skip: int) -> Iterator[tuple[Document, Encoded | ConfigError]]:
        """The documents from number `skip` on with their tokens, or why they have none; the tokenizer takes many at
        once, in threads."""
        batch: list[Document] = []
        characters = 0
        for number, document in enumerate(documents):
            if number < skip:
                continue
            batch.append(document)
            characters += len(document.content)
            if len(batch) == _ENCODE_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
                yield from self._encode(batch)
                batch, characters = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[Document]) -> Iterator[tuple[Document, Encoded | ConfigError]]:
        texts = [document for document in batch if document.text is not None]
        rendered = {id(document): self._render(document) for document in batch if document.text is None}
        chats = {key: result for key, result in rendered.items() if isinstance(result, Rendered)}
        encoded = [Encoded(ids) for ids in encode_texts([document.text for document in texts], self._tokenizer)]
        encoded += encode_conversations(list(chats.values()), self._tokenizer)
        results = rendered | dict(zip((*map(id, texts), *chats), encoded, strict=True))
        for document in batch:
            result = results[id(document)]
            if isinstance(result, Encoded):
                if not len(result.ids):
                    result = ConfigError(f"{document.where}: the tokenizer makes no token of it")
                elif (highest := int(result.ids.max())) > self._highest_id:
                    raise ConfigError(
                        f"{document.where}: the tokenizer makes id {highest} of it, above the highest of its "
                        f"vocabulary, {self._highest_id}; mend the tokenizer"
                    )
            yield document, result

    def _render(self, document: Document) -> Rendered | ConfigError:
        if self._template is None:
            raise ConfigError(
                f"{document.where}: `messages` need a chat template: give {self._keys.prefix}chat_template=FILE, or "
                "a tokenizer with chat_template.jinja beside it"
            )
        try:
            return self._template.render(document)
        except ConfigError as error:
            return error
