"""Where a model to generate with comes from: one of our checkpoints, a run, or a Hugging Face folder."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moe_trainer.checkpoint.agreement import agreed
from moe_trainer.checkpoint.documents import model_config_from_json
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.lora import StoredAdapters
from moe_trainer.checkpoint.manager import TENSORS, read_document, resolve_checkpoint
from moe_trainer.checkpoint.manifest import COMMIT
from moe_trainer.checkpoint.sharded import load_tensors, stored_tensors
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import read_object
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import end_of_text_id, load_tokenizer
from moe_trainer.generate.sampling import GREEDY, Sampling
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.hub import model_config_from_hf
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.shards import local_box

_PREFIX = "model."


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of weights, and what is known of them before they are read."""

    folder: Path
    is_hf: bool
    model: ModelConfig
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end a text; empty if the folder names none."""
    sampling: Sampling
    """What the folder asks for; greedy if it asks for nothing."""


def open_source(path: Path) -> Source:
    """Read all but the weights. Collective: checkpoints of ours are compared with their hashes on rank 0.

    Raises:
        ConfigError: none of the three kinds of folder, or one with a missing or damaged document.
    """
    if (path / "config.json").is_file() and not (path / COMMIT).is_file():
        tokenizer, wishes = _tokenizer(path), _read_json(path / "generation_config.json")
        stop_ids = _hf_stop_ids(path, wishes, tokenizer)
        return Source(path, True, model_config_from_hf(path), tokenizer, stop_ids, _hf_sampling(path, wishes))
    folder = resolve_checkpoint(path)
    tokenizer = _tokenizer(folder)
    end = end_of_text_id(tokenizer)
    model = model_config_from_json(read_document(folder, "model.json"))
    return Source(folder, False, model, tokenizer, frozenset(() if end is None else (end,)), GREEDY)


def load_weights(source: Source, parameters: Mapping[str, torch.Tensor]) -> None:
    """Fill this rank's part of each parameter, in place, casting to the parameter's dtype. Collective.

    Raises:
        ConfigError: the weights do not fit the model; every misfit is named.
    """
    if source.is_hf:
        family = FAMILIES[source.model.family]
        load_hf(source.folder, parameters, lambda keys: family.key_map(source.model, keys))
    else:
        _load_checkpoint(source.folder, parameters)


def _load_checkpoint(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """A layer at a time in the stored dtype, so that a rank holds its share of the model and of one such layer.
    Adapters are added to the weights."""
    with agreed(f"loading {folder}"):
        stored = stored_tensors(folder / TENSORS)
        names = {name.removeprefix(_PREFIX) for name in stored if name.startswith(_PREFIX)}
        adapters = StoredAdapters(folder, names)
        if odd := sorted((names - adapters.names) ^ parameters.keys()):
            raise ConfigError(f"weights and model.json do not fit: {', '.join(odd)}")
    for _, group in groupby(parameters, key=_layer):
        values = {
            name: torch.empty_like(parameters[name], dtype=stored[_PREFIX + name][1], requires_grad=False)
            for name in group
        }
        load_tensors(folder / TENSORS, {_PREFIX + name: value for name, value in values.items()}, strict=False)
        for name, value in values.items():
            local = local_part(value)
            if adapters.adapts(name):
                local = local + adapters.added(name, local_box(value)).to(local.device)  # in the wider of both types
            local_part(parameters[name]).copy_(local)


def _layer(name: str) -> str:
    match = re.match(r"model\.layers\.\d+\.", name)
    return match[0] if match else name


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"checkpoint={folder}: no tokenizer.json in it; put the model's own there")
    return load_tokenizer(str(path), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file."""
    return read_object(path) if path.is_file() else {}


def _hf_stop_ids(folder: Path, wishes: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """`eos_token_id`, a number or a list, of generation_config.json, else of config.json, else by the usual names."""
    for name, values in (("generation_config.json", wishes), ("config.json", _read_json(folder / "config.json"))):
        ids = values.get("eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if not all(type(token_id) is int for token_id in listed):
                raise ConfigError(f"{folder / name}: eos_token_id={ids} must be a token id or a list of them")
            return frozenset(listed)
    end = end_of_text_id(tokenizer)
    return frozenset(() if end is None else (end,))


def _hf_sampling(folder: Path, wishes: dict[str, Any]) -> Sampling:
    """`temperature`, `top_k` and `top_p` where `do_sample` is true; greedy otherwise."""
    if wishes.get("do_sample") is not True:
        return GREEDY

    def number(key: str, default: float, least: float, most: float) -> float:
        value = wishes.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not least <= value <= most:
            path = folder / "generation_config.json"
            raise ConfigError(f"{path}: {key}={value} must be a number of at least {least} and at most {most}")
        return value

    top_k = number("top_k", 0, 0, math.inf)
    return Sampling(number("temperature", 1.0, 0, math.inf), int(top_k) or None, number("top_p", 1.0, 0, 1) or 1.0)
