"""Do the kernels change what is learned? One small model, one order of samples, trained three times on one GPU: with
the kernels, with PyTorch's formulas in their place, and by transformers.

    python scripts/bench/loss_curves.py [--steps=200] [any key of moe-train]
    moe-report bench_results/loss_curves/*        # the curves, overlaid

The text is the source of Python's own `argparse`, `ast`, ... modules, a token a byte. All three start from the same
weights. The row: the loss at the end, and the largest distance between curves, smoothed over ten steps.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from record import device, option, record

from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.config.choices import Compute, DType
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.kernels import backend
from moe_trainer.observe.sinks import JsonlSink
from moe_trainer.optim.adamw import build_adamw
from moe_trainer.optim.schedule import learning_rate, set_learning_rate
from moe_trainer.parallel.clip import clip_factor
from moe_trainer.parallel.process_group import process_group
from moe_trainer.train.trainer import Trainer

RESULTS = Path("bench_results/loss_curves")
MODULES = ("argparse", "ast", "configparser", "dataclasses", "inspect", "pathlib", "pickle", "tarfile", "typing")
SMALL = {
    "model": "olmoe_1b_7b",
    "model.vocab_size": 264,
    "model.hidden_size": 512,
    "model.intermediate_size": 256,
    "model.num_layers": 4,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.head_dim": 64,
    "model.num_experts": 16,
    "model.top_k": 4,
    "data.seq_len": 512,
    "data.micro_batch_size": 16,
    "data.global_batch_size": 16,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 20,
    "optim.aux_coef": 0.01,
}


def main() -> None:
    """Train three times, print one row."""
    steps = int(option("steps", "200"))
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as folder, process_group(device()) as here:
        text = Path(folder) / "text.txt"
        library = Path(os.__file__).parent
        text.write_text("".join(_source(library, name) for name in MODULES), encoding="utf-8")
        given = [f"{key}={value}" for key, value in SMALL.items()] + [f"data.path={text}", f"steps={steps}"]
        cfg = validate(compose("train", [*given, f"run_dir={folder}", *overrides]), 1, torch.cuda.device_count())
        shutil.rmtree(RESULTS, ignore_errors=True)
        start = Trainer(cfg, here)
        start.start()
        weights = start.save()  # all begin with these
        cfg.checkpoint.resume = str(weights)
        curves = {"kernels": _ours(cfg, here)}
        backend.uses_reference = True
        curves["reference"] = _ours(cfg, here)
        backend.uses_reference = False
        curves["transformers"] = _transformers(cfg, here, weights)
        cfg.compute = Compute.fp8
        curves["fp8"] = _ours(cfg, here)
    for name, losses in curves.items():
        (RESULTS / name).mkdir(parents=True)
        sink = JsonlSink(RESULTS / name / "metrics.jsonl")
        for step, loss in enumerate(losses, start=1):
            sink.log(step, {"loss": loss})
        sink.close()
    smooth = {name: torch.tensor(losses).unfold(0, 10, 1).mean(1) for name, losses in curves.items()}
    row: dict[str, object] = {"steps": steps, "loss at first": curves["kernels"][0]}
    row |= {f"{name} at the end": curve[-1].item() for name, curve in smooth.items()}
    others = [name for name in smooth if name != "kernels"]
    row |= {f"kernels to {name}": (smooth["kernels"] - smooth[name]).abs().max().item() for name in others}
    record("loss_curves", row)


def _source(library: Path, module: str) -> str:
    """A module's own file, or that of the package it has become in a later Python."""
    file = library / f"{module}.py"
    return (file if file.exists() else library / module / "__init__.py").read_text(encoding="utf-8")


def _ours(cfg: Config, device: torch.device) -> list[float]:
    trainer = Trainer(cfg, device)
    trainer.start()
    losses = []
    for _ in range(cfg.steps):
        losses.append(trainer.train_step(trainer.loader.batch(trainer.state.samples).to(device)).losses.loss)
    return torch.stack(losses).tolist()


def _transformers(cfg: Config, device: torch.device, weights: Path) -> list[float]:
    """The weights come through their export; bf16 by autocast, as its users have it."""
    from transformers import AutoModelForCausalLM

    trainer = Trainer(cfg, device)
    trainer.start()
    exported = Path(cfg.run_dir) / "hf"
    export_checkpoint(weights, exported, 2**40, DType.float32)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, experts_implementation="eager")
    model.to(device).train()
    optimizer = build_adamw(model.named_parameters(), cfg.optim)
    losses = []
    for step in range(cfg.steps):
        batch = trainer.loader.batch(step * trainer.loader.global_batch_size).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(input_ids=batch.input_ids, use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), batch.labels.flatten())
        # Ours sums the balancing loss over micro-batches by their tokens: of one, transformers' own.
        (loss + cfg.optim.aux_coef * out.aux_loss).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        set_learning_rate(optimizer, learning_rate(step, cfg.optim, trainer.state.schedule_steps))
        optimizer.step(clip_factor(norm, cfg.optim.max_grad_norm))
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
