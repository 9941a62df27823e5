"""Speed and memory of a training step: the trainer's own step on random tokens, or transformers' on the same ones.

    python -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench/train.py model=olmoe_1b_7b \
        parallel=sp_ep parallel.fsdp=2 parallel.ep=2 data.micro_batch_size=4 [any key of moe-train] \
        [--steps=12] [--peer | --both] [--profile]

Sequences of data.seq_len (4096 unless given) uniformly random tokens, data.global_batch_size one micro-batch for each
data rank unless given, no auxiliary loss unless given, in the first steps of a warm-up of 2,000 unless given: at the
full rate random tokens teach the router of a new model nothing but a preference for some experts. The row: the median
of the last two thirds of the steps as tokens a second a GPU and TFLOP/s (6 x active parameters without the embedding,
causal attention halved), the peak memory, what of it are weights and moments, and how many pairs the busiest expert
rank has over the mean. `--peer` measures transformers instead, with FSDP2 where it has work, grouped_mm experts and
fused AdamW; `--both` measures both in one process, taking turns step by step, where the machine's own speed moves.
`--profile` adds where one step's GPU time goes, by kernel.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from record import option, record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moe_trainer.cli.command import count_gpus, local_world_size_from_env, world_size_from_env
from moe_trainer.config.choices import Family
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.data.loader import Batch
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.registry import FAMILIES
from moe_trainer.observe.flops import flops_per_token, peak_flops
from moe_trainer.parallel.clock import Mark
from moe_trainer.parallel.precision import resolve_precision
from moe_trainer.parallel.process_group import process_group
from moe_trainer.train.report import StepMetrics
from moe_trainer.train.trainer import Trainer


class RandomTokens:
    """In the loader's place: batches of random tokens, made on the device."""

    def __init__(self, cfg: Config, data_rank: int, data_size: int, device: torch.device) -> None:
        self.global_batch_size = cfg.data.global_batch_size
        self.grad_accum_steps = self.global_batch_size // (cfg.data.micro_batch_size * data_size)
        self.seq_len = cfg.data.seq_len
        self.data_rank = data_rank
        self.data_seconds = 0.0
        self._shape = (self.grad_accum_steps * cfg.data.micro_batch_size, self.seq_len + 1)
        self._vocab = cfg.model.vocab_size
        self._generator = torch.Generator(device).manual_seed(1000 + data_rank)

    def num_tokens(self, position: int) -> int:
        """Every label counts."""
        return self.global_batch_size * self.seq_len

    def batch(self) -> Batch:
        """This rank's next samples."""
        device = self._generator.device
        ids = torch.randint(self._vocab, self._shape, generator=self._generator, device=device)
        return Batch(ids[:, :-1], ids[:, 1:])


class Ours:
    """The trainer and its step."""

    name = "moe_trainer"

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.trainer = Trainer(cfg, device)
        self.tokens = RandomTokens(cfg, self.trainer.meshes.data_rank, self.trainer.meshes.data_size, device)
        self.trainer.loader = self.tokens
        self.trainer.start()
        self._metrics: StepMetrics

    def step(self) -> None:
        """One optimizer step."""
        self._metrics = self.trainer.train_step(self.tokens.batch())

    def state_bytes(self) -> int:
        """Of this rank's weights and moments."""
        return sum(local_part(t).untyped_storage().nbytes() for t in self.trainer._tensors().values())

    def rank_load(self, expert_ranks: int) -> float:
        """Pairs of the busiest expert rank over the mean, the mean of the layers, in the last step."""
        by_rank = self._metrics.losses.expert_counts.unflatten(1, (expert_ranks, -1)).sum(-1)
        return (by_rank.amax(1) / by_rank.mean(1)).mean().item()


class Transformers:
    """The same model, batch and optimizer as transformers' users have them: FSDP2 where it has work, eager layers."""

    name = "transformers"

    def __init__(self, cfg: Config, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = FAMILIES[cfg.model.family].config_to_hf(cfg.model, "float32", None)
        config = AutoConfig.for_model(**config)
        experts = "grouped_mm" if device.type == "cuda" else None
        attention = "eager" if cfg.model.family is Family.gpt_oss else "sdpa"  # which its sinks do not go with
        options = {"attn_implementation": attention} | ({"experts_implementation": experts} if experts else {})
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        precision = resolve_precision(cfg.dtype, cfg.reduce_dtype, device)
        if dist.get_world_size() > 1 or {precision.compute, precision.reduce} != {torch.float32}:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            policy = MixedPrecisionPolicy(precision.compute, precision.reduce)
            for module in (*self._model.model.layers, self._model):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        self._model.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                local_part(parameter).fill_(1) if "norm" in name else local_part(parameter).normal_(0, 0.02)
        rotary = self._model.model.rotary_emb
        width = cfg.model.qk_rope_head_dim if cfg.model.family is Family.deepseek_v3 else cfg.model.head_dim
        rotary.inv_freq = cfg.model.rope.theta ** (-torch.arange(0, width, 2, device=device).float() / width)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=cfg.optim.lr, fused=True)
        self._max_norm = cfg.optim.max_grad_norm
        self.tokens = RandomTokens(cfg, dist.get_rank(), dist.get_world_size(), device)

    def step(self) -> None:
        """One optimizer step."""
        for batch in self.tokens.batch().split(self.tokens.grad_accum_steps):
            logits = self._model(input_ids=batch.input_ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Of this rank's weights and moments."""
        return sum(12 * local_part(p).numel() for p in self._model.parameters())

    def rank_load(self, expert_ranks: int) -> float:
        """Every rank has all experts."""
        return 1.0


def main() -> None:
    """Measure what the command line describes."""
    steps = int(option("steps", "12"))
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    cfg = config_of(overrides)
    kinds = [Ours, Transformers] if "--both" in sys.argv else [Transformers if "--peer" in sys.argv else Ours]
    with process_group(cfg.device) as device:
        sides, first_steps = [], []
        for kind in kinds:
            start = time.perf_counter()
            sides.append(kind(cfg, device))
            sides[-1].step()
            synchronize(device)
            first_steps.append(time.perf_counter() - start)
        times = step_times([side.step for side in sides], steps - 1, device)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        for side, seconds, first_step in zip(sides, times, first_steps, strict=True):
            row = _row(cfg, side, seconds[steps // 3 - 1 :], device)
            row |= {"peak GiB": round(peak, 1), "start to first step, s": round(first_step, 1)}
            if dist.get_rank() == 0:
                record("train", {"what": " ".join(overrides), **row}, heading=side is sides[0])
            if "--profile" in sys.argv:
                _profile(side.step, device)


def _row(cfg: Config, side: Ours | Transformers, seconds: list[float], device: torch.device) -> dict[str, object]:
    states, load = side.state_bytes() / 2**30, side.rank_load(cfg.parallel.ep or 1)
    median, world = statistics.median(seconds), dist.get_world_size()
    tokens = side.tokens.num_tokens(0) / world
    flops = tokens * flops_per_token(cfg.model, cfg.data.seq_len)
    limit = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "by": side.name,
        "ranks": world,
        "tok/s/GPU": tokens / median,
        "TFLOP/s": flops / median / 1e12,
        "MFU": "-" if limit is None else f"{flops / median / limit:.1%}",
        "ms/step": median * 1e3,
        "fastest": min(seconds) * 1e3,
        "states GiB": round(states, 1),
        "busiest rank / mean": round(load, 2),
    }


def config_of(overrides: list[str]) -> Config:
    """The run that the overrides describe, validated for the ranks that there are."""
    given = {override.partition("=")[0] for override in overrides}
    defaults = {"data.text": "unused", "data.seq_len": "4096", "optim.aux_coef": "0", "optim.warmup_steps": "2000"}
    defaults |= {"run_name": "bench", "steps": "100000"}
    arguments = [f"{key}={value}" for key, value in defaults.items() if key not in given] + overrides
    cfg = compose("train", arguments)
    if "data.global_batch_size" not in given:
        world = world_size_from_env() or 1
        cfg.data.global_batch_size = cfg.data.micro_batch_size * (world // cfg.parallel.tp)
    return validate(cfg, world_size_from_env() or 1, count_gpus(cfg.device), local_world_size_from_env())


def step_times(turns: Sequence[Callable[[], None]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each step in turn, [turns][rounds]: from the end of the step before to its own, on the device, which
    is not waited for in between: the host queues the next step while one runs, as in training."""
    marks = [Mark(device)]
    for _ in range(rounds):
        for step in turns:
            step()
            marks.append(Mark(device))
    seconds = [end.seconds_since(start) for start, end in pairwise(marks)]
    return [seconds[turn :: len(turns)] for turn in range(len(turns))]


def _profile(step: Callable[[], None], device: torch.device) -> None:
    """Collective: all ranks step, rank 0 prints."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step_times([step], 2, device)
    if dist.get_rank() == 0:
        averages = profiler.key_averages()
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(averages.table(sort_by=by, row_limit=45, max_name_column_width=90))


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
