"""One of our checkpoints -> a plain Hugging Face folder, by several threads with a tensor of the hub's in each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moe_trainer.checkpoint.blocks import StoredBlocks
from moe_trainer.checkpoint.documents import model_config_from_json
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.checkpoint.lora import StoredAdapters
from moe_trainer.checkpoint.manager import TENSORS, read_document
from moe_trainer.checkpoint.sharded import stored_tensors
from moe_trainer.config.choices import DType
from moe_trainer.config.errors import ConfigError
from moe_trainer.data.tokenizer import end_of_text_id
from moe_trainer.models.keymap import UNREAD, KeyMap, Piece, file_shapes, source_box, target_box
from moe_trainer.models.registry import FAMILIES

_PREFIX = "model."
_NAMES = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    "pad": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
}
"""Usual names of special tokens."""


def export_checkpoint(
    checkpoint: Path, out: Path, max_shard_bytes: int, dtype: DType, workers: int | None = None
) -> None:
    """Write the weights, config.json, generation_config.json and the tokenizer for transformers to load. Adapters are
    added to the weights.

    Not collective: it may run in one rank while a group lives, or with no group at all. Files are not compared with
    their hashes here; `resolve_checkpoint` does that.

    Args:
        checkpoint: folder of one checkpoint.
        out: must not exist.
        dtype: of the written weights; `auto` keeps the checkpoint's, bit for bit.
        workers: files written at the same time; see `write_hf`.

    Raises:
        ConfigError: the checkpoint lacks something or holds weights the model has no place for; `out` exists.
    """
    model = model_config_from_json(read_document(checkpoint, "model.json"))
    tokenizer = read_document(checkpoint, "tokenizer.json")
    stored = stored_tensors(checkpoint / TENSORS)
    names = {name.removeprefix(_PREFIX) for name in stored if name.startswith(_PREFIX)}
    family = FAMILIES[model.family]
    key_map = dict(family.key_map(model, ()))
    unread = key_map.pop(UNREAD, ())
    adapters = StoredAdapters(checkpoint, names)
    names -= adapters.names
    if key_map.keys() != names:
        odd = sorted(key_map.keys() ^ names)
        raise ConfigError(f"{checkpoint}: weights and model.json do not fit: {', '.join(odd)}")
    # The widest: of weights in bfloat16 the norms and routers are float32.
    kept = max((entry[1] for name, entry in stored.items() if name.startswith(_PREFIX)), key=lambda t: t.itemsize)
    target = kept if dtype is DType.auto else getattr(torch, dtype.value)
    tokens = _special_tokens(tokenizer)
    token_ids = {f"{role}_token_id": token_id for role, (token_id, _) in tokens.items()}
    documents = {
        "config.json": family.config_to_hf(model, str(target).removeprefix("torch."), token_ids.get("eos_token_id")),
        "generation_config.json": {"do_sample": False, **token_ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": text for role, (_, text) in tokens.items()},
        },
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in documents.items()}
    blocks = StoredBlocks(checkpoint / TENSORS, (_PREFIX + name for name in names))
    tensors = [*_hub_tensors(key_map, stored, target, blocks, adapters), *_unread(unread, target)]
    write_hf(out, tensors, texts | {"tokenizer.json": tokenizer}, max_shard_bytes, workers)


def _special_tokens(tokenizer_json: str) -> dict[str, tuple[int, str]]:
    """`eos`, `bos` and `pad`, as far as the tokenizer has them under a usual name -> the token's id and text."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
    special = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    found = {role: next((special[name] for name in names if name in special), None) for role, names in _NAMES.items()}
    ids = {"eos": end_of_text_id(tokenizer), **found}
    return {
        role: (token_id, tokenizer.id_to_token(token_id)) for role, token_id in ids.items() if token_id is not None
    }


def _hub_tensors(
    key_map: KeyMap,
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    dtype: torch.dtype,
    blocks: StoredBlocks,
    adapters: StoredAdapters,
) -> Iterator[LazyTensor]:
    """The file's tensors."""
    made_of: dict[str, list[tuple[str, Piece]]] = {}
    for name, pieces in key_map.items():
        for piece in pieces:
            made_of.setdefault(piece.key, []).append((name, piece))
    shapes = {name: stored[_PREFIX + name][0] for name in key_map}
    dtypes = {name: stored[_PREFIX + name][1] for name in key_map}
    for key, shape in file_shapes(key_map, shapes).items():
        keeps = any(piece.keeps_dtype for _, piece in made_of[key])
        own = dtypes[made_of[key][0][0]] if keeps else dtype
        parts = [(name, shapes[name], piece) for name, piece in made_of[key]]
        yield LazyTensor(key, shape, own, partial(_assemble, shape, own, parts, blocks, adapters))


def _assemble(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: list[tuple[str, torch.Size, Piece]],
    blocks: StoredBlocks,
    adapters: StoredAdapters,
) -> torch.Tensor:
    value = torch.empty(shape, dtype=dtype)
    for name, full, piece in parts:
        box, kept = target_box(piece, full)
        place = (value.mT if piece.transposed else value)[source_box(piece, full)]
        for dim in set(range(len(box))) - set(kept):
            place = place.unsqueeze(dim)
        if adapters.adapts(name):
            merged = adapters.added(name, box)
            base = torch.empty_like(merged)
            blocks.read(_PREFIX + name, box, base)
            place.copy_(base.add_(merged))
        else:
            blocks.read(_PREFIX + name, box, place)
    return value


def _unread(pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Tensors that only other programs want."""
    for piece in pieces:
        shape = tuple(part.stop for part in piece.source)
        yield LazyTensor(piece.key, shape, dtype, partial(torch.zeros, shape, dtype=dtype))
