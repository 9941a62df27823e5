"""Host memory of importing a Hugging Face folder on four CPU ranks, and of exporting it again; prints two tables.

    python scripts/bench/import_hf.py [--experts 144] [--folder DIR]

The folder, made of random bfloat16 weights, has the shape of Qwen3-30B-A3B with two layers; 144 experts make 4 GB.
Memory is `RssAnon` of /proc/self/status, read every 2 ms: what a process has for itself. Pages of mapped files, which
the kernel drops when it needs them, are not in it. The baseline is taken before the first weight has memory.
Needs about 5 times the folder's size on disk and 3 times in memory.
"""

import argparse
import gc
import json
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DType, Family
from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.keymap import file_shapes
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.fsdp import shard_over_data
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import Precision
from moe_trainer.testing.pool import run_distributed

QWEN3_30B_A3B = ModelConfig(
    family=Family.qwen3_moe,
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=2,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
)
MESHES = {
    "`fsdp=4`": ParallelConfig(fsdp=4, tp=1, ep=1),
    "SP&EP, `fsdp=2 tp=2 ep=4`": ParallelConfig(fsdp=2, tp=2, ep=4, sequence_parallel=True, expert_parallel=True),
}
SHARD_BYTES = 500 * 10**6
TIMEOUT = 900


@dataclass(frozen=True, slots=True)
class Measured:
    share_bytes: int
    peak_bytes: int
    seconds: float


class Watch:
    """Time, and the most anonymous memory above that at its beginning."""

    def __enter__(self) -> "Watch":
        gc.collect()
        self._done = threading.Event()
        self._baseline = self._most = anonymous_bytes()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._sampler.join()
        self.peak_bytes = max(self._most, anonymous_bytes()) - self._baseline

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, anonymous_bytes())


def anonymous_bytes() -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def write_random_folder(folder: Path, cfg: ModelConfig) -> int:
    """Returns the bytes of the largest tensor."""
    family = FAMILIES[cfg.family]
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in family.build(cfg).named_parameters()}
    found = file_shapes(family.key_map(cfg, ()), shapes)
    tensors = [LazyTensor(key, shape, torch.bfloat16, partial(draw, key, shape)) for key, shape in found.items()]
    config = json.dumps(family.config_to_hf(cfg, "bfloat16", None))
    write_hf(folder, tensors, {"config.json": config}, SHARD_BYTES)
    return max(tensor.num_bytes for tensor in tensors)


def draw(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def import_folder(
    folder: Path, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, save_to: Path | None
) -> Measured:
    """On one of the ranks; also saves a checkpoint, where one is asked for."""
    meshes = build_meshes(parallel, "cpu")
    model, _ = build_model(cfg, parallel, meshes, dtype)
    shard_over_data(model, meshes, Precision(dtype, dtype, dtype))
    with Watch() as watch:
        model.to_empty(device="cpu")
        load_hf(folder, tensors_of(model), lambda keys: FAMILIES[cfg.family].key_map(cfg, keys))
    share = sum(local_part(tensor).nbytes for tensor in tensors_of(model).values())
    if save_to is not None:
        documents = {
            "model.json": model_config_to_json(cfg),
            "tokenizer.json": load_tokenizer("byte").to_str(),
            "state.json": "{}",
        }
        named = {f"model.{name}": tensor for name, tensor in tensors_of(model).items()}
        CheckpointManager(save_to, keep_last=None).save(1, named, documents)
    return Measured(share, watch.peak_bytes, watch.seconds)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def export_folder(checkpoint: Path, out: Path, workers: int) -> Measured:
    with Watch() as watch:
        export_checkpoint(checkpoint, out, SHARD_BYTES, DType.bfloat16, workers)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Measured(written, watch.peak_bytes, watch.seconds)


def print_imports(folder: Path, cfg: ModelConfig, largest: int, checkpoints: Path) -> None:
    print("| mesh | weights held in | rank's share, MB | peak over ranks, MB | limit, MB | seconds |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for name, parallel in MESHES.items():
            save_to = checkpoints if dtype is torch.float32 and parallel.tp > 1 else None
            ranks = run_distributed(import_folder, 4, folder, cfg, parallel, dtype, save_to, timeout=TIMEOUT)
            tensor = largest * dtype.itemsize // 2
            worst = max(ranks, key=lambda rank: rank.peak_bytes - 1.5 * rank.share_bytes)
            row = [worst.share_bytes, worst.peak_bytes, 1.5 * worst.share_bytes + tensor]
            cells = [name, str(dtype).removeprefix("torch."), *(f"{value / 1e6:,.0f}" for value in row)]
            print(f"| {' | '.join(cells)} | {max(rank.seconds for rank in ranks):.1f} |", flush=True)


def print_exports(checkpoint: Path, folder: Path) -> None:
    print("\n| workers | written, MB | peak of the process, MB | MB/s |\n|---|---|---|---|")
    for workers in (1, 2):
        out = folder / f"out{workers}"
        (found,) = run_distributed(export_folder, 1, checkpoint, out, workers, timeout=TIMEOUT)
        speed = found.share_bytes / found.seconds / 1e6
        print(
            f"| {workers} | {found.share_bytes / 1e6:,.0f} | {found.peak_bytes / 1e6:,.0f} | {speed:,.0f} |",
            flush=True,
        )
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=144)
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    cfg = replace(QWEN3_30B_A3B, num_experts=arguments.experts)
    with tempfile.TemporaryDirectory(prefix="bench_import_", dir=arguments.folder) as name:
        root = Path(name)
        largest = write_random_folder(root / "hub", cfg)
        total = sum(path.stat().st_size for path in (root / "hub").glob("*.safetensors"))
        files = len(list((root / "hub").glob("*.safetensors")))
        print(
            f"{total / 1e9:.2f} GB in {files} files, largest tensor {largest / 1e6:,.0f} MB, {os.cpu_count()} cores\n"
        )
        print_imports(root / "hub", cfg, largest, root / "checkpoints")
        print_exports(root / "checkpoints" / "step-00000001", root)


if __name__ == "__main__":
    main()
