"""A mixture of experts from a dense model: its MLP becomes each expert (Komatsuzaki et al., 2022)."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from moe_trainer.checkpoint.hf import HubFiles
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.config.choices import DType
from moe_trainer.config.commands import UpcycleConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.config.shape import check_model
from moe_trainer.models.dense import sparse_config_of
from moe_trainer.models.keymap import UNREAD, KeyMap, file_shapes
from moe_trainer.models.registry import FAMILIES

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
         "chat_template.jinja")  # fmt: skip
"""Documents that go along as they are."""
_ROUTER, _GATE_UP, _DOWN = "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def upcycle(cfg: UpcycleConfig, max_shard_bytes: int) -> ModelConfig:
    """Write a Hugging Face folder with a mixture of experts made of a dense model; its shape.

    All but the MLPs is copied. Routers are drawn anew, normal with the model's `initializer_range`. Experts are equal
    copies unless `noise` or `drop` tell them apart: then the router has something to choose.

    Args:
        cfg: validated.

    Raises:
        ConfigError: a model that cannot be upcycled; a folder with tensors missing, unexpected or of a wrong shape;
            `out` exists, or the disk refused. Nothing is left behind then.
    """
    folder = Path(cfg.model)
    model, eos_token_id = sparse_config_of(folder, cfg.num_experts, cfg.top_k)
    check_model(model)
    family = FAMILIES[model.family]
    key_map = {name: pieces for name, pieces in family.key_map(model, ()).items() if name != UNREAD}
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in family.build(model).named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if name in key_map}  # a tied head is no tensor
    with ExitStack() as stack:
        files = HubFiles(folder, stack)
        dtype = _check(folder, files, _dense_shapes(model, key_map, shapes))
        dtype = dtype if cfg.dtype is DType.auto else getattr(torch, cfg.dtype.value)
        config = family.config_to_hf(model, str(dtype).removeprefix("torch."), eos_token_id)
        documents = {name: _document(folder / name) for name in _KEPT if (folder / name).is_file()}
        documents["config.json"] = json.dumps(config, indent=2) + "\n"
        tensors = list(_tensors(cfg, model, key_map, shapes, files, dtype))
        write_hf(Path(cfg.out), tensors, documents, max_shard_bytes, cfg.workers)
    return model


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _dense_key(name: str, half: int = 0) -> str:
    """The dense model's tensor that a parameter of the sparse one is made of; of gate and up, the `half`."""
    if name.endswith(_GATE_UP):
        return f"{name.removesuffix(_GATE_UP)}mlp.{('gate', 'up')[half]}_proj.weight"
    return f"{name.removesuffix(_DOWN)}mlp.down_proj.weight" if name.endswith(_DOWN) else name


def _dense_shapes(
    model: ModelConfig, key_map: KeyMap, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """What the dense folder must hold."""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    expected: dict[str, tuple[int, ...]] = {}
    for name in key_map:
        if name.endswith(_GATE_UP):
            expected |= {_dense_key(name, half): (intermediate, hidden) for half in range(2)}
        elif name.endswith(_DOWN):
            expected[_dense_key(name)] = (hidden, intermediate)
        elif not name.endswith(_ROUTER):
            expected[name] = shapes[name]
    return expected


def _check(folder: Path, files: HubFiles, expected: dict[str, tuple[int, ...]]) -> torch.dtype:
    """Refuse a folder with other tensors than expected; the type of those it has."""
    twin = {"lm_head.weight"} if "lm_head.weight" not in expected else set()  # tied, but stored all the same
    problems = [f"missing: {key}" for key in expected if key not in files.keys()]
    problems += [f"unexpected: {key}" for key in files.keys() if key not in expected and key not in twin]
    found = {key: files.describe(key) for key in expected if key in files.keys()}
    for key, (shape, dtype) in found.items():
        if shape != expected[key]:
            problems.append(f"{key}: shape {list(shape)} in the file, {list(expected[key])} by config.json")
        if dtype not in _DTYPES:
            problems.append(f"{key}: {dtype} is not one of {', '.join(_DTYPES)}")
    if problems:
        raise ConfigError(f"{folder} does not fit its config.json: {'; '.join(problems)}")
    return _DTYPES[next(iter(found.values()))[1]]


def _tensors(
    cfg: UpcycleConfig,
    model: ModelConfig,
    key_map: KeyMap,
    shapes: dict[str, tuple[int, ...]],
    files: HubFiles,
    dtype: torch.dtype,
) -> Iterator[LazyTensor]:
    """The sparse folder's tensors, each made when it is written."""
    stored = file_shapes(key_map, shapes)
    for name, pieces in key_map.items():
        for piece in pieces:
            load: Callable[[], torch.Tensor] = partial(_read, files, _dense_key(name))
            if name.endswith(_ROUTER):
                std = model.initializer_range
                load = partial(_draw, f"{cfg.seed}:{name}", stored[piece.key], std)
            elif name.endswith((_GATE_UP, _DOWN)):
                expert, half = (*piece.target, 0)[:2]
                load = partial(_expert, cfg, files, name, expert, half)
            yield LazyTensor(piece.key, stored[piece.key], dtype, partial(_cast, load, dtype))


def _expert(cfg: UpcycleConfig, files: HubFiles, name: str, expert: int, half: int) -> torch.Tensor:
    """One matrix of one expert: the dense one, with noise, and with some intermediate dims drawn anew.

    The same dims in gate, up and down (Drop-Upcycling, Nakamura et al., 2025), from a normal distribution with the
    mean and deviation of the matrix.
    """
    key = _dense_key(name, half)
    weight = _read(files, key)
    wide = weight.float() if weight.dtype is not torch.float64 else weight
    mean, std = wide.mean().item(), wide.std().item()
    if cfg.noise:
        wide = wide + _draw(f"{cfg.seed}:noise:{key}:{expert}", weight.shape, cfg.noise * std)
    if cfg.drop:
        intermediate_dim = 1 if name.endswith(_DOWN) else 0
        width = weight.shape[intermediate_dim]
        layer = name.rpartition("mlp.experts")[0]
        dims = _draw(f"{cfg.seed}:drop:{layer}:{expert}", (width,), 1.0).argsort()[: round(cfg.drop * width)]
        fresh = mean + _draw(f"{cfg.seed}:fresh:{key}:{expert}", weight.shape, std)
        wide = wide.index_copy(intermediate_dim, dims, fresh.index_select(intermediate_dim, dims).to(wide))
    return wide


def _read(files: HubFiles, key: str) -> torch.Tensor:
    shape, _ = files.describe(key)
    return files.read(key, tuple(slice(0, size) for size in shape))


def _cast(load: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return load().to(dtype)


def _draw(key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
