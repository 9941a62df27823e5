"""The decode step on GPUs: replayed from a CUDA graph it gives the tokens of the launched one; prints the speeds."""

import time
import zlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.choices import Family, Quantization
from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.generate import decoding
from moe_trainer.generate.decoding import DecodeStep, generate
from moe_trainer.generate.quantization import quantize_model
from moe_trainer.generate.sampling import Sampler, Sampling
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import PRECISE
from moe_trainer.parallel.gpus import count_places
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.pool import run_distributed
from tests.unit.generate.test_batches import MODELS

NUM_GPUS = count_places()
needs_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
WORLDS = [size for size in (1, 2, 4) if size <= NUM_GPUS] or [1]
NEW_TOKENS = 100
PROMPTS = [[5, 1, 4], [3], [2, 7, 1, 8, 2, 8, 1], [6] * 40]
WIDE = {"hidden_size": 256, "intermediate_size": 128, "num_layers": 8, "vocab_size": 512}


class Run(NamedTuple):
    """One generation."""

    tokens: torch.Tensor
    """[batch, new]."""
    captured: bool
    tokens_per_second: float


class WatchedStep(DecodeStep):
    """Keeps the last one made."""

    last: "WatchedStep"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        WatchedStep.last = self


@torch.no_grad()
def fill(model: CausalLM) -> None:
    """The same values on every mesh and device, none at one that hides it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(tensor.shape, generator=generator)
        scaled = 1 + 0.2 * whole if "norm" in name else 2 * whole * tensor.shape[-1] ** -0.5
        local_part(tensor).copy_(scaled[local_box(tensor)])


def build(cfg: ModelConfig, dtype: torch.dtype) -> tuple[CausalLM, dist.ProcessGroup | None]:
    """This rank's part on its GPU, as `moe-generate` has it."""
    ranks = dist.get_world_size()
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True)
    meshes = build_meshes(parallel, "cuda")
    model, _ = build_model(cfg, parallel, meshes, dtype)
    for module in model.modules():
        if isinstance(module, PRECISE):
            module.float()
    model.to_empty(device="cuda").requires_grad_(False)
    fill(model)
    return model, None if meshes.tp is None else meshes.tp.get_group()


def run(model: CausalLM, group: dist.ProcessGroup | None, sampling: Sampling | None, cuda_graph: bool) -> Run:
    decoding.DecodeStep = WatchedStep
    sampler = None
    if sampling is not None:
        sampler = Sampler(sampling, list(range(len(PROMPTS))), NEW_TOKENS, torch.device("cuda"))
    start = time.perf_counter()
    tokens = torch.stack(list(generate(model, PROMPTS, NEW_TOKENS, sampler, (), group, cuda_graph)), dim=1)
    seconds = time.perf_counter() - start
    return Run(tokens, WatchedStep.last.replay is not None, tokens.numel() / seconds)


def launched_and_replayed(cfg: ModelConfig, kind: Quantization, sampling: Sampling | None) -> list[Run]:
    """Each twice: the first time loads kernels."""
    model, group = build(cfg, torch.bfloat16)
    quantize_model(model, kind)
    runs = [run(model, group, sampling, cuda_graph) for cuda_graph in (False, False, True, True)]
    del WatchedStep.last  # a graph with collectives goes before their communicator
    return runs


CASES = [(family, Quantization.none, None) for family in Family] + [
    (Family.mixtral, Quantization.none, Sampling(0.8, 50, 0.9)),
    (Family.mixtral, Quantization.int8, None),
    (Family.mixtral, Quantization.fp8, None),
]


@needs_gpu
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("family", "kind", "sampling"), CASES)
def test_replayed_as_launched(
    family: Family, kind: Quantization, sampling: Sampling | None, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(MODELS[family], **WIDE, num_heads=8, num_kv_heads=8 if family is Family.deepseek_v3 else 4)
    ranks = run_distributed(launched_and_replayed, world, cfg, kind, sampling, timeout=300, device="cuda")
    _, launched, _, replayed = ranks[0]
    with capsys.disabled():
        print(
            f"\n{family.value:12} {kind.value:5} {sampling or 'greedy'} on {world}: launched "
            f"{launched.tokens_per_second:.0f} tok/s, replayed {replayed.tokens_per_second:.0f} tok/s",
            end="",
        )
    assert [one.captured for one in ranks[0]] == [False, False, True, True]
    assert len({tuple(row) for row in launched.tokens.tolist()}) == len(PROMPTS)
    for runs in ranks:
        for one in runs:
            assert torch.equal(one.tokens, launched.tokens)


def on_gpu_in_float32(cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = False
    return follow(*build(cfg, torch.float32))


def follow(model: CausalLM, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, new] and the whole logits that they were chosen from, [batch, new, vocab]."""
    seen = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.float().cpu())  # which no capture allows
        return logits.argmax(-1)

    tokens = torch.stack(list(generate(model, PROMPTS, 12, choose, (), group, cuda_graph=False)), dim=1)
    return tokens, torch.stack(seen[:12], dim=1)


@needs_gpu
@pytest.mark.parametrize("world", WORLDS[:2])
@pytest.mark.parametrize("family", Family)
def test_padding_is_masked_as_on_the_cpu(family: Family, world: int) -> None:
    cfg = MODELS[family]
    model = FAMILIES[family].build(cfg).requires_grad_(False)
    fill(model)
    tokens, logits = follow(model, None)
    for gpu_tokens, gpu_logits in run_distributed(on_gpu_in_float32, world, cfg, timeout=300, device="cuda"):
        assert torch.equal(gpu_tokens, tokens)
        torch.testing.assert_close(gpu_logits, logits, rtol=1e-3, atol=1e-3)
