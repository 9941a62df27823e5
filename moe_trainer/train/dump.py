"""What a rank knew of a step that moved nothing, in a file, when the run stops because too many did."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_trainer.data.loader import Loader
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.observe.sinks import finite_json
from moe_trainer.train.loss import Losses
from moe_trainer.train.report import StepMetrics
from moe_trainer.train.state import TrainState
from moe_trainer.train.watch import watching

_MOST_TENSORS, _MOST_SAMPLES, _MOST_PLACES, _MOST_COUNTS = 1000, 256, 64, 1 << 14
"""In a file, which so stays below two megabytes."""
_CHUNK = 1 << 22
"""Values looked at together."""


def dump_skipped_step(
    folder: Path,
    state: TrainState,
    metrics: StepMetrics,
    loader: Loader,
    model: CausalLM,
    tensors: Mapping[str, torch.Tensor],
    take: Callable[[], Losses],
) -> str:
    """Write `skipped-step-N/rankR.json` in `folder`; on every rank of the step that all of them skipped.

    First what is at hand. Then the step is taken once more, from the same weights and samples, for where numbers
    cease to be finite: the gradients are gone, and those of weights are sums over ranks. That repeats the step's
    collectives; if they hang, the file holds the rest.

    Args:
        state: before the step.
        metrics: of the step.
        tensors: weights and moments by name.
        take: forward and backward passes; this rank's shares of the losses.

    Returns:
        For the message: where the file is, or why there is none.
    """
    rank, step = dist.get_rank(), state.step + 1
    path = folder / f"skipped-step-{step:08d}" / f"rank{rank}.json"
    try:
        facts = _at_hand(rank, state, metrics, loader) | {"tensors": _summaries(tensors.items())}
        with suppress(OSError):  # the second writing says it: this rank is waited for in what comes between
            _write(path, facts)
        facts["taken_again"] = _take_again(model, take)
        _write(path, facts)
    except Exception as error:  # the run ends for another reason
        return f"{path} is not complete: {error}"
    return f"what each rank saw of step {step}: {path.with_name('rank*.json')}"


def _at_hand(rank: int, state: TrainState, metrics: StepMetrics, loader: Loader) -> dict[str, Any]:
    counts, places = metrics.losses.expert_counts, loader.places(state.samples)
    return {
        "step": state.step + 1,
        "rank": rank,
        "world_size": dist.get_world_size(),
        "data_rank": loader.data_rank,
        "data_size": loader.data_size,
        "seed": state.seed,
        "data_fingerprint": state.data_fingerprint,
        "samples_before": state.samples,
        "tokens_before": state.tokens,
        "loss": metrics.losses.loss.item(),
        "aux_loss": metrics.losses.aux_loss.item(),
        "z_loss": metrics.losses.z_loss.item(),
        "grad_norm": metrics.grad_norm.item(),
        "lr": metrics.lr,
        "tokens": metrics.num_tokens,
        "expert_load": counts.round().long().tolist() if counts.numel() <= _MOST_COUNTS else "too many",
        "samples": places[:_MOST_SAMPLES],
        "samples_left_out": max(0, len(places) - _MOST_SAMPLES),
    }


def _take_again(model: CausalLM, take: Callable[[], Losses]) -> dict[str, Any]:
    """Where this rank's numbers were not finite, in the order of the computation, and its parts of the gradients."""
    found: dict[str, torch.Tensor] = {}
    model.zero_grad()
    with watching(model, lambda name, value: found.update({name: _summary(value)})):
        shares = take()
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    not_finite = _entries(found, only_not_finite=True)
    facts = {
        "loss": shares.loss.item(),  # this rank's share
        "not_finite": not_finite[:_MOST_PLACES],
        "not_finite_left_out": max(0, len(not_finite) - _MOST_PLACES),
        "gradients": _summaries(gradients),
    }
    model.zero_grad()
    return facts


def _summaries(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Of this rank's parts; those that are not finite first."""
    entries = _entries({name: _summary(local_part(tensor)) for name, tensor in named})
    entries.sort(key=lambda entry: not entry["not_finite"])
    return {"left_out": max(0, len(entries) - _MOST_TENSORS), "parts": entries[:_MOST_TENSORS]}


def _entries(summaries: Mapping[str, torch.Tensor], only_not_finite: bool = False) -> list[dict[str, Any]]:
    if not summaries:
        return []
    device = next(iter(summaries.values())).device  # moments may lie in host memory
    read = torch.stack([summary.to(device) for summary in summaries.values()]).tolist()
    return [
        {"name": name, "of": int(size), "not_finite": int(bad), "norm": math.sqrt(squares), "largest": largest}
        for name, (size, bad, squares, largest) in zip(summaries, read, strict=True)
        if bad or not only_not_finite
    ]


@torch.no_grad()
def _summary(values: torch.Tensor) -> torch.Tensor:
    """Number of values, of those not finite, and of the others the sum of squares and the largest magnitude [4]."""
    flat = values.detach().flatten()
    total = torch.zeros(4, dtype=torch.float64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].double()
        finite = part.isfinite()
        part = torch.where(finite, part, 0.0)
        total[:3] += torch.stack((torch.ones_like(part).sum(), (~finite).sum().double(), part.square().sum()))
        total[3] = torch.maximum(total[3], part.abs().max())
    return total


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    """The whole file, or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(finite_json(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)
