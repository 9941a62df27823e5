"""One rank of `moe-generate`."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.config.shape import check_divisions
from moe_trainer.data.tokenizer import encoding_errors
from moe_trainer.generate.decoding import generate
from moe_trainer.generate.prompts import Prompt, read_prompts
from moe_trainer.generate.quantization import quantize_model
from moe_trainer.generate.sampling import Sampler, Sampling
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
    """What a model made of a prompt."""

    prompt: str
    text: str
    """What follows the prompt."""
    prompt_ids: list[int]
    new_ids: list[int]
    """With the token that ended the text, where it came to that."""
    stopped: bool
    """Whether it came to that."""


@dataclass(slots=True)
class Speed:
    """Of all batches together, without the loading."""

    new_tokens: int = 0
    """Of all sequences, each up to its end."""
    seconds: float = 0.0
    """From the start of the prompts' forward passes to the last tokens."""
    first_tokens: int = 0
    """The first one of each sequence, which the pass over the prompts gives."""
    seconds_to_first: float = 0.0
    """Of these passes."""

    def __str__(self) -> str:
        text = f"{self.new_tokens} tokens in {self.seconds:.2f} s, {self.new_tokens / self.seconds:.1f} tok/s"
        if self.new_tokens == self.first_tokens:
            return text
        after = (self.new_tokens - self.first_tokens) / (self.seconds - self.seconds_to_first)
        return f"{text}, first token after {self.seconds_to_first:.2f} s, then {after:.1f} tok/s"


def run_generation(cfg: GenerateConfig) -> None:
    """Continue the prompts, on stdout or into `cfg.output`; what is used and the speed go to stderr.

    Args:
        cfg: validated, its device concrete.

    Raises:
        ConfigError: something that only shows with the folder in hand; on every rank alike, before weights are read.
    """
    with process_group(cfg.device) as device:
        setup_logging(dist.get_rank())
        is_first, speed = dist.get_rank() == 0, Speed()
        write = _print if is_first and cfg.output is None else _discard
        for done in continue_prompts(cfg, device, write, speed):
            write("\n" if cfg.prompts is None else "\n\n")
            if is_first and cfg.output is not None:
                _append(Path(cfg.output), done)
        _logger.info("%s", speed)


def continue_prompt(cfg: GenerateConfig, device: torch.device, write: Callable[[str], object]) -> Continuation:
    """Continue `cfg.prompt`; see `continue_prompts`."""
    (done,) = continue_prompts(cfg, device, write)
    return done


def continue_prompts(
    cfg: GenerateConfig, device: torch.device, write: Callable[[str], object], speed: Speed | None = None
) -> Iterator[Continuation]:
    """Load the model that `cfg.checkpoint` names and continue the prompts, in their order. Collective over the world.

    Args:
        write: gets each prompt and its continuation, before that is yielded; the first one's of a batch as it comes.
        speed: is filled in.

    Raises:
        ConfigError: as `run_generation`.
    """
    prompts = read_prompts(cfg)
    source = open_source(Path(cfg.checkpoint))
    ranks = cfg.parallel.tp
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True, sequence_parallel=False)
    check_divisions(source.model, parallel)
    encoded = [_encode(prompt, cfg.max_new_tokens, source) for prompt in prompts]
    sampling = _sampling(cfg, source.sampling)
    _logger.info("%s", sampling if sampling.temperature == 0 else f"{sampling} seed={cfg.seed}")
    model, group = _load_model(source, parallel, device, compute_dtype(cfg.dtype, device))
    quantize_model(model, cfg.quantization)

    for start in range(0, len(prompts), cfg.batch_size):
        batch = slice(start, start + cfg.batch_size)
        ids = encoded[batch]
        # Seeded by the prompt's number: how many go together does not matter.
        seeds = [cfg.seed + start + row for row in range(len(ids))]
        sampler = None if sampling.temperature == 0 else Sampler(sampling, seeds, cfg.max_new_tokens, device)
        tokens = generate(model, ids, cfg.max_new_tokens, sampler, source.stop_ids, group, cfg.cuda_graph)
        texts = [prompt.text for prompt in prompts[batch]]
        yield from _follow(tokens, texts, ids, source, write, speed or Speed())


def _follow(
    tokens: Iterator[torch.Tensor],
    prompts: list[str],
    prompt_ids: list[list[int]],
    source: Source,
    write: Callable[[str], object],
    speed: Speed,
) -> Iterator[Continuation]:
    """One batch: each sequence up to its own end, the first as it comes."""
    streams = [TextStream(source.tokenizer, ids) for ids in prompt_ids]
    new_ids: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    stopped = [False] * len(prompts)
    write(prompts[0])
    begun = time.perf_counter()
    for number, step in enumerate(tokens):
        if number == 0:
            speed.seconds_to_first += time.perf_counter() - begun
            speed.first_tokens += len(prompts)
        for row, token_id in enumerate(step.tolist()):
            if stopped[row]:
                continue
            new_ids[row].append(token_id)
            stopped[row] = token_id in source.stop_ids
            piece = streams[row].push(token_id)
            texts[row] += piece
            if row == 0:
                write(piece)
    speed.seconds += time.perf_counter() - begun
    speed.new_tokens += sum(map(len, new_ids))
    for row, stream in enumerate(streams):
        rest = stream.close()
        texts[row] += rest
        write(rest if row == 0 else prompts[row] + texts[row])
        yield Continuation(prompts[row], texts[row], prompt_ids[row], new_ids[row], stopped[row])


def _sampling(cfg: GenerateConfig, wanted: Sampling) -> Sampling:
    """What the command says, and where it says nothing, the folder."""
    named = {key: getattr(cfg, key) for key in Sampling._fields}
    return wanted._replace(**{key: value for key, value in named.items() if value is not None})


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


def _encode(prompt: Prompt, max_new_tokens: int, source: Source) -> list[int]:
    """The prompt's tokens; they and the new ones must have a place in the model."""
    with encoding_errors():
        ids = source.tokenizer.encode(prompt.text).ids
    if len(ids) > 1 and ids[-1] in source.stop_ids:  # some tokenizers end each text themselves
        ids = ids[:-1]
    if not ids:
        raise ConfigError(f"the tokenizer of {source.folder} makes no token of {prompt.name}")
    if max(ids) >= source.model.vocab_size:
        raise ConfigError(
            f"{source.folder}: tokenizer.json gives token id {max(ids)}, but the model has only "
            f"{source.model.vocab_size}: it belongs to another model"
        )
    context = source.model.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        room = context - len(ids)
        way_out = f"give at most {room}" if room > 0 else "give a shorter prompt"
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: with {len(ids)} tokens of {prompt.name} it exceeds the model's "
            f"context of {context}; {way_out}"
        )
    return ids


def _append(path: Path, done: Continuation) -> None:
    result = {"prompt": done.prompt, "continuation": done.text, "tokens": len(done.new_ids), "stopped": done.stopped}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error}") from error


def _print(text: str) -> None:
    print(text, end="", file=sys.stdout, flush=True)


def _discard(text: str) -> None:
    pass
