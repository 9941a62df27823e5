"""One of our checkpoints -> a plain Hugging Face folder. One process, one parameter in memory at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moe_trainer.checkpoint.documents import model_config_from_json
from moe_trainer.checkpoint.hf import LazyTensor, write_hf
from moe_trainer.checkpoint.manager import TENSORS, read_document
from moe_trainer.checkpoint.sharded import load_tensors, stored_tensors
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DType
from moe_trainer.data.tokenizer import end_of_text_id
from moe_trainer.models.keymap import KeyMap, Piece, file_shapes, source_box
from moe_trainer.models.registry import FAMILIES

_PREFIX = "model."


def export_checkpoint(checkpoint: Path, out: Path, max_shard_bytes: int, dtype: DType) -> None:
    """Write the weights, config.json, generation_config.json and the tokenizer for transformers to load.

    Not collective: it may run in one rank while a group lives, or with no group at all. Files are not compared with
    their hashes here; `resolve_checkpoint` does that.

    Args:
        checkpoint: folder of one checkpoint.
        out: must not exist.
        dtype: of the written weights; `auto` keeps the checkpoint's, bit for bit.

    Raises:
        ConfigError: the checkpoint lacks something or holds weights the model has no place for; `out` exists.
    """
    model = model_config_from_json(read_document(checkpoint, "model.json"))
    tokenizer = read_document(checkpoint, "tokenizer.json")
    stored = stored_tensors(checkpoint / TENSORS)
    names = {name.removeprefix(_PREFIX) for name in stored if name.startswith(_PREFIX)}
    family = FAMILIES[model.family]
    key_map = family.key_map(model, ())
    if key_map.keys() != names:
        odd = sorted(key_map.keys() ^ names)
        raise ConfigError(f"{checkpoint}: weights and model.json do not fit: {', '.join(odd)}")
    kept = next(entry[1] for name, entry in stored.items() if name.startswith(_PREFIX))
    target = kept if dtype is DType.auto else getattr(torch, dtype.value)
    eos = _end_of_text(tokenizer)
    eos_token_id = None if eos is None else eos[0]
    documents = {
        "config.json": family.config_to_hf(model, str(target).removeprefix("torch."), eos_token_id),
        "generation_config.json": {"do_sample": False, "eos_token_id": eos_token_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **({} if eos is None else {"eos_token": eos[1]}),
        },
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in documents.items()}
    read = _LastParameter(checkpoint / TENSORS, stored)
    tensors = _hub_tensors(key_map, stored, target, read)
    write_hf(out, tensors, texts | {"tokenizer.json": tokenizer}, max_shard_bytes)


def _end_of_text(tokenizer_json: str) -> tuple[int, str] | None:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
    token_id = end_of_text_id(tokenizer)
    return None if token_id is None else (token_id, tokenizer.id_to_token(token_id))


class _LastParameter:
    """Reads parameters of a checkpoint; keeps the last, since neighbours in the file come from the same one."""

    def __init__(self, folder: Path, stored: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        self._folder = folder
        self._stored = stored
        self._name = ""
        self._value = torch.empty(0)

    def __call__(self, name: str) -> torch.Tensor:
        if name != self._name:
            self._value = torch.empty(0)  # let the old one go before the new one comes
            shape, dtype = self._stored[_PREFIX + name]
            value = torch.empty(shape, dtype=dtype)
            load_tensors(self._folder, {_PREFIX + name: value}, strict=False, alone=True)
            self._name, self._value = name, value
        return self._value


def _hub_tensors(
    key_map: KeyMap,
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
) -> Iterator[LazyTensor]:
    """The file's tensors, those of one parameter next to each other."""
    made_of: dict[str, list[tuple[str, Piece]]] = {}
    for name, pieces in key_map.items():
        for piece in pieces:
            made_of.setdefault(piece.key, []).append((name, piece))
    shapes = {name: stored[_PREFIX + name][0] for name in key_map}
    dtypes = {name: stored[_PREFIX + name][1] for name in key_map}
    for key, shape in file_shapes(key_map, shapes).items():
        keeps = any(piece.keeps_dtype for _, piece in made_of[key])
        own = dtypes[made_of[key][0][0]] if keeps else dtype
        yield LazyTensor(key, shape, own, partial(_assemble, shape, own, made_of[key], read))


def _assemble(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: list[tuple[str, Piece]],
    read: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    value = torch.empty(shape, dtype=dtype)
    for name, piece in parts:
        parameter = read(name)
        place = value.mT if piece.transposed else value
        place[source_box(piece, parameter.shape)] = parameter[piece.target].to(dtype)
    return value
