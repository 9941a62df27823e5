"""Speed and memory of a training step: the trainer's own step on random tokens, without reading or writing files.

    python -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench_train.py model=olmoe_1b_7b \
        parallel=sp_ep model.num_layers=4 data.micro_batch_size=4 [any key of moe-train] [--steps=12] [--profile]

Sequences of data.seq_len (4096 unless given) uniformly random tokens, data.global_batch_size one micro-batch for each
data rank unless given. Prints one row of a table: the median step of the last two thirds, as tokens a second a GPU,
TFLOP/s (6 x active parameters without the embedding, causal attention halved) and peak memory. `--profile` adds where
one step's GPU time goes, by kernel.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist

from moe_trainer.cli.command import count_gpus, local_world_size_from_env, world_size_from_env
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.data.loader import Batch
from moe_trainer.observe.flops import flops_per_token, num_parameters, peak_flops
from moe_trainer.parallel.process_group import process_group
from moe_trainer.parallel.shards import local_part
from moe_trainer.train.trainer import Trainer


class RandomTokens:
    """In the loader's place: batches of random tokens, made on the device."""

    def __init__(self, cfg: Config, data_rank: int, data_size: int, device: torch.device) -> None:
        self.global_batch_size = cfg.data.global_batch_size
        self.grad_accum_steps = self.global_batch_size // (cfg.data.micro_batch_size * data_size)
        self.seq_len = cfg.data.seq_len
        self.data_rank = data_rank
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


def main() -> None:
    """Measure what the command line describes."""
    options = {argument for argument in sys.argv[1:] if argument.startswith("--")}
    overrides = [argument for argument in sys.argv[1:] if argument not in options]
    steps = next((int(option.removeprefix("--steps=")) for option in options if option.startswith("--steps=")), 12)
    cfg = _config(overrides)
    with process_group(cfg.device) as device:
        trainer = Trainer(cfg, device)
        trainer.loader = RandomTokens(cfg, trainer.meshes.data_rank, trainer.meshes.data_size, device)
        trainer.start()
        seconds = [_step(trainer) for _ in range(steps)]
        if dist.get_rank() == 0:
            _print_row(cfg, trainer, seconds[steps // 3 :], overrides)
        if "--profile" in options:
            _profile(trainer)


def _config(overrides: list[str]) -> Config:
    given = {override.partition("=")[0] for override in overrides}
    defaults = {"data.text": "unused", "data.seq_len": "4096", "optim.aux_coef": "0", "run_name": "bench"}
    arguments = [f"{key}={value}" for key, value in defaults.items() if key not in given] + overrides
    cfg = compose("train", arguments)
    if "data.global_batch_size" not in given:
        world = world_size_from_env() or 1
        cfg.data.global_batch_size = cfg.data.micro_batch_size * (world // cfg.parallel.tp)
    return validate(cfg, world_size_from_env() or 1, count_gpus(cfg.device), local_world_size_from_env())


def _step(trainer: Trainer) -> float:
    batch = trainer.loader.batch()
    _synchronize(trainer.device)
    start = time.perf_counter()
    trainer.train_step(batch)
    _synchronize(trainer.device)
    return time.perf_counter() - start


def _print_row(cfg: Config, trainer: Trainer, seconds: list[float], overrides: list[str]) -> None:
    median = statistics.median(seconds)
    tokens = trainer.loader.num_tokens(0) / dist.get_world_size()
    flops = tokens * flops_per_token(cfg.model, trainer.loader.seq_len)
    on_gpu = trainer.device.type == "cuda"
    name = torch.cuda.get_device_name(trainer.device) if on_gpu else "CPU"
    peak = peak_flops(name)
    states = sum(local_part(t).untyped_storage().nbytes() for t in trainer._tensors().values()) / 2**30
    memory = torch.cuda.max_memory_allocated(trainer.device) / 2**30 if on_gpu else float("nan")
    mfu = f"{flops / median / peak:.1%}" if peak else "-"
    print(f"{dist.get_world_size()} x {name}, torch {torch.__version__}, {num_parameters(cfg.model)[0]:,} parameters")
    print("| what | tok/s/GPU | TFLOP/s | MFU | ms/step | fastest | peak GiB | of it states |")
    speed = f"{tokens / median:,.0f} | {flops / median / 1e12:.0f} | {mfu} | {median * 1e3:.1f}"
    print(
        f"| {' '.join(overrides)} | {speed} | {min(seconds) * 1e3:.1f} | {memory:.1f} | {states:.1f} |",
        flush=True,
    )


def _profile(trainer: Trainer) -> None:
    """Collective: all ranks step, rank 0 prints."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        _step(trainer)
        _step(trainer)
    if dist.get_rank() == 0:
        averages = profiler.key_averages()
        print(averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
