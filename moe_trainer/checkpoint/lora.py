"""The adapters of a checkpoint: what they add to each weight, and the adapter alone as PEFT reads it."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from moe_trainer.checkpoint.blocks import StoredBlocks
from moe_trainer.checkpoint.documents import model_config_from_json
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.checkpoint.manager import TENSORS, read_document
from moe_trainer.checkpoint.sharded import stored_tensors
from moe_trainer.config.choices import DType, Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import LoraConfig
from moe_trainer.models.keymap import Piece
from moe_trainer.models.lora import adapters_of, is_adapter, product_of
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.shards import Box

LORA = "lora.json"
_PREFIX = "model."


def lora_to_json(lora: LoraConfig) -> str:
    """One key for each field."""
    return json.dumps(asdict(lora), indent=1) + "\n"


class StoredAdapters:
    """The adapters that a checkpoint holds beside the weights; none in one of a run without."""

    def __init__(self, checkpoint: Path, names: Iterable[str]) -> None:
        """`names`: of all parameters in the checkpoint.

        Raises:
            ConfigError: it has adapters and no readable `lora.json`, or half an adapter.
        """
        self.names = {name for name in names if is_adapter(name)}
        self.rank, self.scale = _read_lora(checkpoint) if self.names else (0, 1.0)
        halves = {name[:-1] + half for name in self.names for half in "ab"}
        if odd := sorted(halves - self.names):
            raise ConfigError(f"{checkpoint}: half of an adapter is missing: {', '.join(odd)}")
        folder = checkpoint / TENSORS
        stored = stored_tensors(folder)
        self._stored = {name: stored[_PREFIX + name] for name in self.names}
        self._blocks = StoredBlocks(folder, (_PREFIX + name for name in self.names))

    def adapts(self, weight: str) -> bool:
        """Whether the weight of this name has an adapter."""
        return adapters_of(weight)[0] in self.names

    def halves(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a weight, whole; see `models.lora` for their shapes."""
        a, b = (
            self._read(name, tuple(slice(0, size) for size in self._stored[name][0])) for name in adapters_of(weight)
        )
        return a, b

    def added(self, weight: str, box: Box) -> torch.Tensor:
        """`alpha / rank * B A`, for one block of the weight."""
        a, b = adapters_of(weight)
        width = slice(0, self._stored[a][0][-2])
        left, right = (*box[:-1], width), (*box[: -3 if len(box) == 4 else -2], width, box[-1])
        return product_of(self._read(a, right), self._read(b, left)) * self.scale

    def _read(self, name: str, box: Box) -> torch.Tensor:
        values = torch.empty([part.stop - part.start for part in box], dtype=self._stored[name][1])
        self._blocks.read(_PREFIX + name, box, values)
        return values


def _read_lora(checkpoint: Path) -> tuple[int, float]:
    """Rank and scale."""
    try:
        values = json.loads(read_document(checkpoint, LORA))
        rank, alpha = values["rank"], values["alpha"]
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"rank={rank}, alpha={alpha}")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{checkpoint / LORA} cannot be read: {error!r}") from error
    return rank, alpha / rank


def export_adapter(checkpoint: Path, out: Path, dtype: DType) -> None:
    """Write the adapters alone, as a folder that `peft.PeftModel.from_pretrained` reads on top of the base model.

    Adapters of experts are PEFT's `target_parameters`, for the fused weights that transformers 5 holds in memory.

    Args:
        out: must not exist.
        dtype: of the written adapters; `auto` keeps the checkpoint's.

    Raises:
        ConfigError: no adapters, or one of a weight that the hub lays out differently; `out` exists.
    """
    model = model_config_from_json(read_document(checkpoint, "model.json"))
    names = [name.removeprefix(_PREFIX) for name in stored_tensors(checkpoint / TENSORS) if name.startswith(_PREFIX)]
    adapters = StoredAdapters(checkpoint, names)
    adapted = [name for name in names if not is_adapter(name) and adapters.adapts(name)]
    if not adapted:
        raise ConfigError(f"{checkpoint} has no adapters; leave lora=adapter out")
    key_map = FAMILIES[model.family].key_map(model, ())
    modules: list[str] = []
    parameters: list[str] = []
    tensors: list[LazyTensor] = []
    for name in sorted(adapted):
        if name.endswith(".weight"):
            modules.append(_hub_module(name, key_map[name]))
            prefix, halves = modules[-1], adapters.halves(name)
        else:
            parameters.append(name)
            prefix, halves = _expert_prefix(name, model.family), _expert_halves(*adapters.halves(name))
        for half, values in zip("AB", halves, strict=True):
            target = values.dtype if dtype is DType.auto else getattr(torch, dtype.value)
            key = f"base_model.model.{prefix}.lora_{half}.weight"
            tensors.append(LazyTensor(key, tuple(values.shape), target, partial(values.to, target)))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapters.rank,
        "lora_alpha": adapters.scale * adapters.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules or None,
        "target_parameters": parameters or None,
    }
    documents = {"adapter_config.json": json.dumps(settings, indent=2) + "\n"}
    write_hf(out, tensors, documents, sys.maxsize, single="adapter_model.safetensors")


def _hub_module(name: str, pieces: Sequence[Piece]) -> str:
    """The hub's name of a linear layer."""
    (piece,) = pieces
    if piece != Piece(piece.key, twin=piece.twin, keeps_dtype=piece.keeps_dtype):
        raise ConfigError(f"{name} lies differently on the hub: export the weights with their adapters, lora=merged")
    return piece.key.removesuffix(".weight")


def _expert_prefix(name: str, family: Family) -> str:
    """PEFT wraps the experts once for each of their weights, first gate_up_proj, then around it down_proj."""
    if family is Family.gpt_oss:  # gate and up are interleaved there
        raise ConfigError(f"{name} lies differently on the hub: export the weights with their adapters, lora=merged")
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer" if last == "gate_up_proj" else module


def _expert_halves(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As two matrices: [experts * rank, in], and [out, rank * experts] with the expert running fastest."""
    b = b.flatten(1, -2)  # [experts, out, rank]
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()
