"""One rank of `moe-generate`."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import GenerateConfig, ParallelConfig
from moe_trainer.config.shape import check_divisions
from moe_trainer.generate.decoding import generate
from moe_trainer.generate.quantization import quantize_model
from moe_trainer.generate.sampling import Sampler
from moe_trainer.generate.source import Source, load_weights, open_source
from moe_trainer.generate.text import TextStream
from moe_trainer.models.decoder import CausalLM
from moe_trainer.observe.log import get_logger, setup_logging
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import PRECISE
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import compute_dtype
from moe_trainer.parallel.process_group import process_group

_logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model made of a prompt, and how fast."""

    prompt_ids: list[int]
    new_ids: list[int]
    """With the end-of-text token, where it came to that."""
    seconds: float
    """From the start of the prompt's forward pass to the last token."""
    seconds_to_first: float


def run_generation(cfg: GenerateConfig) -> None:
    """Print the prompt and its continuation on stdout, the speed on stderr. `cfg` is validated, its device concrete.

    Raises:
        ConfigError: something that only shows with the folder in hand; on every rank alike, before weights are read.
    """
    with process_group(cfg.device) as device:
        setup_logging(dist.get_rank())
        write = _print if dist.get_rank() == 0 else _discard
        done = continue_prompt(cfg, device, write)
        write("\n")
        count = len(done.new_ids)
        _logger.info(
            "%d tokens in %.2f s, %.1f tok/s, first token after %.2f s",
            *(count, done.seconds, count / done.seconds, done.seconds_to_first),
        )


def continue_prompt(cfg: GenerateConfig, device: torch.device, write: Callable[[str], object]) -> Continuation:
    """Load the model that `cfg.checkpoint` names and continue `cfg.prompt`. Collective over the world.

    Args:
        write: gets the prompt, then the text of each token as it comes.

    Raises:
        ConfigError: as `run_generation`.
    """
    source = open_source(Path(cfg.checkpoint))
    ranks = cfg.parallel.tp
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True, sequence_parallel=False)
    check_divisions(source.model, parallel)
    prompt_ids = _encode(cfg, source)
    model, group = _load_model(source, parallel, device, compute_dtype(cfg.dtype, device))
    quantize_model(model, cfg.quantization)

    sampler = Sampler(cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed)
    stream = TextStream(source.tokenizer, prompt_ids)
    write(cfg.prompt)
    start = time.perf_counter()
    new_ids, times = [], []
    input_ids = torch.tensor([prompt_ids], device=device)
    for (token_id,) in generate(model, input_ids, cfg.max_new_tokens, sampler, source.stop_ids, group):
        times.append(time.perf_counter() - start)
        new_ids.append(int(token_id))
        write(stream.push(new_ids[-1]))
    write(stream.close())
    return Continuation(prompt_ids, new_ids, times[-1], times[0])


def _load_model(
    source: Source, parallel: ParallelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[CausalLM, ProcessGroup | None]:
    """This rank's part of the model in `dtype`, norms and routers in float32 at least; and who splits the logits."""
    meshes = build_meshes(parallel, device.type)
    model, _ = build_model(source.model, parallel, meshes, dtype)
    for module in model.modules():
        if isinstance(module, PRECISE):
            module.to(torch.promote_types(dtype, torch.float32))
    model.to_empty(device=device).requires_grad_(False)
    load_weights(source, dict(model.named_parameters()) | dict(model.named_buffers()))
    return model, None if meshes.tp is None else meshes.tp.get_group()


def _encode(cfg: GenerateConfig, source: Source) -> list[int]:
    """The prompt's tokens; they and the new ones must have a place in the model."""
    ids = source.tokenizer.encode(cfg.prompt).ids
    if len(ids) > 1 and ids[-1] in source.stop_ids:  # some tokenizers end each text themselves
        ids = ids[:-1]
    if not ids:
        raise ConfigError(f"prompt={cfg.prompt!r}: the tokenizer of {source.folder} makes no token of it")
    if max(ids) >= source.model.vocab_size:
        raise ConfigError(
            f"{source.folder}: tokenizer.json gives token id {max(ids)}, but the model has only "
            f"{source.model.vocab_size}: it belongs to another model"
        )
    context = source.model.max_position_embeddings
    if len(ids) + cfg.max_new_tokens > context:
        raise ConfigError(
            f"max_new_tokens={cfg.max_new_tokens}: with {len(ids)} tokens of the prompt it exceeds the model's "
            f"context of {context}; {_room(context - len(ids))}"
        )
    return ids


def _room(tokens: int) -> str:
    return f"give at most {tokens}" if tokens > 0 else "give a shorter prompt"


def _print(text: str) -> None:
    print(text, end="", file=sys.stdout, flush=True)


def _discard(text: str) -> None:
    pass
