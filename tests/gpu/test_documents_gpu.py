"""Packed documents on a GPU: the kernel without a mask against the mask, and every family against documents alone.

Prints what each costs at a length where the mask would not fit beside a model.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.models.attention import attend_documents
from moe_trainer.models.documents import Documents
from moe_trainer.models.gpt_oss.model import SinkAttention
from moe_trainer.models.registry import FAMILIES
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import encode
from tests.distributed.test_families import MODELS

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

LENGTHS = [[100, 1, 155], [256], [7, 249]]
NUMBERS = torch.tensor(
    [[number for number, length in enumerate(row) for _ in range(length)] for row in LENGTHS], dtype=torch.int32
)
SHAPES = {
    "16 heads": (16, 16, 64, 64, None, None),
    "grouped": (16, 2, 128, 128, None, None),
    "window": (8, 2, 128, 128, 50, None),
    "latent": (4, 4, 192, 128, None, 0.05),
}
"""Heads, key heads, their width, the values' width, window, scale."""


def random_inputs(shape: tuple, seq: int = 256, batch: int = 3) -> list[torch.Tensor]:
    heads, kv_heads, width, value, _, _ = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value))
    # As projections give them: [batch, seq, heads, width] in memory.
    made = [torch.randn(batch, seq, *size, generator=generator, device="cuda") for size in sizes]
    return [part.bfloat16().transpose(1, 2).requires_grad_() for part in made]


def with_gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("is_whole", [False, True], ids=["documents", "whole rows"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_mask(name: str, is_whole: bool) -> None:
    """Both in bfloat16, and no further from float64 than the mask is, twice over."""
    *_, window, scale = SHAPES[name]
    documents = None if is_whole else Documents(NUMBERS.cuda(), 4)
    inputs = random_inputs(SHAPES[name])
    ours = with_gradients(attend_documents(*inputs, documents, window, scale), inputs)
    assert is_whole or not documents._masks, "a mask was made"
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = with_gradients(attend_documents(*exact, documents, window, scale), exact)
    for part, right in zip(ours, expected, strict=True):
        assert relative_error(part.double(), right) < 0.01


@pytest.mark.parametrize("is_whole", [False, True], ids=["documents", "whole rows"])
@pytest.mark.parametrize("window", [None, 50])
def test_sinks(window: int | None, is_whole: bool) -> None:
    """gpt-oss's attention, whose sinks the kernels do not know."""
    cfg = compose("train", ["model=gpt_oss_20b", "data.text=x"]).model
    layer = SinkAttention(cfg, 0, window).cuda()
    layer.sinks.weight.data = torch.randn(cfg.num_heads, device="cuda")
    documents = None if is_whole else Documents(NUMBERS.cuda(), 4)
    inputs = random_inputs((cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.head_dim, None, None))
    ours = with_gradients(layer.attend_documents(*inputs, documents), [*inputs, layer.sinks.weight])
    assert is_whole or not documents._masks, "a mask was made"
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = with_gradients(layer.double().attend_documents(*exact, documents), [*exact, layer.sinks.weight])
    for part, right in zip(ours, expected, strict=True):
        assert relative_error(part.double(), right) < 0.01


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_documents_are_as_each_alone(name: str) -> None:
    """In float32, which takes the mask, and in bfloat16, which takes the kernel where the heads' width lets it."""
    cfg = replace(MODELS[name], dense_layers=[])
    ids = torch.randint(cfg.vocab_size, NUMBERS.shape, generator=torch.Generator().manual_seed(0)).cuda()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = FAMILIES[cfg.family].build(cfg)
        initialize(model, 0, cfg.initializer_range)
        encode(model)  # no rounding moves a token to another expert
        model = model.to("cuda", dtype)
        packed = model(ids, documents=Documents(NUMBERS.cuda(), 4)).logits
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                alone = model(ids[row : row + 1, start : start + length]).logits[0]
                assert relative_error(packed[row, start : start + length].double(), alone.double()) < tolerance
                start += length


def test_no_mask_at_any_length() -> None:
    """A mask of 65536 x 65536 alone is 4 GiB; documents of 1000 tokens cost far less than one of 65536."""
    seq = 65536
    shape = (8, 2, 128, 128, None, None)
    numbers = (torch.arange(seq, device="cuda") // 1000).int().unsqueeze(0)
    inputs = random_inputs(shape, seq, 1)
    for what, documents in (("documents of 1000", Documents(numbers, 128)), ("one", Documents(numbers * 0, 1))):
        with_gradients(attend_documents(*inputs, documents, None), inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        with_gradients(attend_documents(*inputs, documents, None), inputs)
        end.record()
        end.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"\n{what}: {begin.elapsed_time(end):.2f} ms forward and backward, {peak:.2f} GiB")
        assert peak < 3


def train_packed(folder: Path) -> list[dict]:
    cfg = compose("train", ["+recipe=qwen3_moe_tiny", "parallel.fsdp=1", "parallel.tp=1", "steps=20", "device=cuda"])
    lines = folder / "lines.jsonl"
    lines.write_text("".join('{"text": "' + "so many words " * n + '"}\n' for n in range(1, 12)))
    cfg.run_dir, cfg.data.text, cfg.data.path, cfg.data.seq_len = str(folder), None, str(lines), 64
    trainer = Trainer(validate(cfg, 1, 1), torch.device("cuda", 0))
    trainer.start()
    trainer.fit()
    return read_metrics(trainer.run_folder / "metrics.jsonl")


def test_a_run_on_packed_documents(tmp_path: Path) -> None:
    lines = run_distributed(train_packed, 1, tmp_path, timeout=120, device="cuda")[0]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
