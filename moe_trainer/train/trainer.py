"""The trainer: a sharded model, its optimizer, and the step."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.checkpoint.documents import model_config_from_json, model_config_to_json
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.manager import (
    TENSORS,
    CheckpointManager,
    find_latest,
    read_document,
    resolve_checkpoint,
)
from moe_trainer.checkpoint.sharded import load_tensors
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml
from moe_trainer.data.loader import Batch, build_loader
from moe_trainer.kernels.grouped_gemm import grouped_gemm_supported
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import GroupedSigmoidRouter
from moe_trainer.observe.flops import num_parameters
from moe_trainer.observe.log import get_logger
from moe_trainer.optim.adamw import build_adamw, optimizer_step, optimizer_tensors, set_optimizer_step
from moe_trainer.optim.schedule import learning_rate, set_learning_rate
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.clip import clip_factor, grad_norm
from moe_trainer.parallel.fsdp import shard_over_data
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import resolve_precision
from moe_trainer.train.loss import Losses, LossFn
from moe_trainer.train.report import RunReport, StepMetrics
from moe_trainer.train.state import TrainState
from moe_trainer.train.stop import StopRequest

_logger = get_logger(__name__)


class Trainer:
    """One rank of a training run. The config is validated, its mesh and device concrete; a process group is up."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg = cfg
        self.device = device
        self.meshes = build_meshes(cfg.parallel, device.type)
        self.precision = resolve_precision(cfg.dtype, cfg.reduce_dtype, device)
        self.loader, self.tokenizer = build_loader(
            cfg, cfg.model.vocab_size, self.meshes.data_rank, self.meshes.data_size
        )
        self.model, context = build_model(cfg.model, cfg.parallel, self.meshes, self.precision.master)
        shard_over_data(self.model, self.meshes, self.precision)
        self.model.to_empty(device=device)
        self.loss_fn = LossFn(
            cfg.model.num_experts,
            cfg.optim.aux_coef,
            vocab_group=self.meshes.tp.get_group() if self.meshes.tp is not None else None,
            sequence=context.sequence,
            z_coef=cfg.optim.z_coef,
            aux_scope=cfg.optim.aux_scope,
        )
        self.optimizer = build_adamw(self.model.named_parameters(), cfg.optim)
        self.num_sparse_layers = cfg.model.num_layers - len(cfg.model.dense_layers)
        self.biased_routers = [m for m in self.model.modules() if isinstance(m, GroupedSigmoidRouter)]
        keep = cfg.checkpoint.keep_last, cfg.checkpoint.keep_every
        self.checkpoints = CheckpointManager(self.run_folder / "checkpoints", *keep)
        self.state = TrainState(cfg.seed, cfg.optim.schedule_steps or cfg.steps, self.loader.fingerprint())

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.cfg.run_dir) / self.cfg.run_name

    def describe(self) -> str:
        """The run in one line: model, mesh, types, and how the experts are multiplied."""
        model, parallel = self.cfg.model, self.cfg.parallel
        axes = {"dp_replicate": parallel.dp_replicate, "fsdp": parallel.fsdp, "tp": parallel.tp, "ep": parallel.ep}
        mesh = " x ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1 or axis == "fsdp")
        total, active = num_parameters(model)
        width = model.intermediate_size // (1 if parallel.expert_parallel else parallel.tp)
        is_grouped = grouped_gemm_supported(self.precision.compute, model.hidden_size, width)
        return (
            f"{model.family.value}, {total:,} parameters ({active:,} active) on {dist.get_world_size()} "
            f"{self.device.type} rank(s), {mesh}; {self.precision.compute} with {self.precision.master} masters; "
            f"experts by {'grouped GEMM' if is_grouped else 'one product after the other'}"
        ).replace("torch.", "")

    def start(self) -> None:
        """Give the model its values: from a checkpoint, a Hugging Face folder or the seed."""
        resume = self.cfg.checkpoint.resume
        checkpoint = None
        if resume == "auto":
            checkpoint = find_latest(self.checkpoints.root)
        elif resume != "none":
            checkpoint = resolve_checkpoint(Path(resume))
        if checkpoint is not None:
            self.load(checkpoint)
        elif self.cfg.model.init_from is not None:
            family = FAMILIES[self.cfg.model.family]
            parameters = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            load_hf(Path(self.cfg.model.init_from), parameters, lambda keys: family.key_map(self.cfg.model, keys))
        else:
            initialize(self.model, self.cfg.seed, self.cfg.model.initializer_range)

    def fit(self, stop_file: Path | None = None) -> StepMetrics | None:
        """Train until `steps` or until told to stop (`StopRequest`), saving as configured and at the end.

        Returns:
            The last step's metrics, if any.
        """
        report = (
            RunReport(self.cfg, self.device, self.run_folder, self.state.step, self.loader.seq_len)
            if dist.get_rank() == 0
            else None
        )
        metrics, saved = None, self.state.step
        try:
            with StopRequest(stop_file, self.cfg.max_minutes) as stop:
                while self.state.step < self.cfg.steps and not stop.agreed():
                    metrics = self.train_step(self.loader.batch(self.state.samples).to(self.device))
                    if report is not None:
                        report.take(self.state.step, self.state.tokens, metrics)
                    if is_due(self.state.step, self.cfg.checkpoint.every):
                        saved = self._save(report)
            if saved < self.state.step:
                self._save(report)
        finally:
            if report is not None:
                report.close()
        return metrics

    def train_step(self, batch: Batch) -> StepMetrics:
        """One optimizer step on this rank's share [grad_accum_steps * micro_batch, seq] of the global batch."""
        num_tokens = self.loader.num_tokens(self.state.samples)  # labels that count, of the global batch
        self._seed_step()
        shares = Losses.zeros(self.num_sparse_layers, self.cfg.model.num_experts, self.device)
        for micro_batch in batch.split(self.loader.grad_accum_steps):  # [micro_batch, seq]
            output = self.model(micro_batch.input_ids)
            loss, losses = self.loss_fn(output, micro_batch.labels, num_tokens)
            loss.backward()
            shares = shares.add(losses)
        losses = self._sum_over_data(shares)
        norm = grad_norm(self.model.parameters())
        rate = learning_rate(self.state.step, self.cfg.optim, self.state.schedule_steps)
        set_learning_rate(self.optimizer, rate)
        factor = clip_factor(norm, self.cfg.optim.max_grad_norm)
        self.optimizer.step(factor)
        self.optimizer.zero_grad()
        self._balance_experts(losses.expert_counts, factor.isfinite())
        self.state.advance(self.loader.global_batch_size, num_tokens)
        return StepMetrics(losses, norm, rate, num_tokens)

    def save(self) -> Path:
        """Publish a checkpoint of this step. Collective."""
        self.state.skipped_steps = self.state.step - optimizer_step(self.optimizer)
        documents = {
            "state.json": self.state.to_json(
                mesh=asdict(self.cfg.parallel), world_size=dist.get_world_size(), torch=torch.__version__
            ),
            "model.json": model_config_to_json(self.cfg.model),
            "config.yaml": to_yaml(self.cfg),
            "tokenizer.json": self.tokenizer.to_str(pretty=True),
        }
        path = self.checkpoints.save(self.state.step, self._tensors(), documents)
        _logger.info("saved %s", path)
        return path

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of any mesh. Collective.

        The checkpoint's counts, seed and, unless the config names one, schedule horizon are kept; all else is the
        config's.

        Raises:
            ConfigError: another model or other data than the config's, or a damaged file.
        """
        self._compare_model(checkpoint)
        state = TrainState.from_json(read_document(checkpoint, "state.json"))
        if state.data_fingerprint != self.state.data_fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on other samples: give the same data.text or data.path, data.seq_len and "
                "data.tokenizer, or export the weights and start from them with model.init_from"
            )
        load_tensors(checkpoint / TENSORS, self._tensors())
        set_optimizer_step(self.optimizer, state.step - state.skipped_steps)
        if self.cfg.optim.schedule_steps is not None:
            state.schedule_steps = self.cfg.optim.schedule_steps
        if state.seed != self.cfg.seed:
            _logger.info("seed %d of the checkpoint is kept; seed=%d is not used", state.seed, self.cfg.seed)
        self.state = state
        self.loader.seed = state.seed
        _logger.info("resumed from %s", checkpoint)

    def _save(self, report: RunReport | None) -> int:
        if report is not None:
            report.flush()
        self.save()
        if report is not None:
            report.skip_time()
        return self.state.step

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = list(self.model.named_parameters())
        weights = {f"model.{name}": tensor for name, tensor in (*named, *self.model.named_buffers())}
        return weights | {f"optim.{name}": t for name, t in optimizer_tensors(self.optimizer, named).items()}

    def _compare_model(self, checkpoint: Path) -> None:
        theirs = asdict(model_config_from_json(read_document(checkpoint, "model.json")))
        ours = asdict(self.cfg.model)
        differing = [
            f"model.{key}={ours[key]} (there {theirs[key]})"
            for key in ours
            if key not in ("init_from", "initializer_range") and ours[key] != theirs[key]
        ]
        if differing:
            raise ConfigError(f"{checkpoint} holds another model: {', '.join(differing)}")

    @torch.no_grad()
    def _balance_experts(self, counts: torch.Tensor, is_finite: torch.Tensor) -> None:
        """Move each expert's bias a fixed step towards the mean load (Wang et al., 2024), unless the step is skipped.

        `counts` [sparse layers, experts] are the global batch's, equal on every rank: so the biases stay equal.
        """
        for router, load in zip(self.biased_routers, counts, strict=bool(self.biased_routers)):
            move = self.cfg.optim.expert_bias_rate * torch.sign(load.mean() - load)
            router.expert_bias += move.masked_fill(~is_finite, 0)

    def _seed_step(self) -> None:
        """Random numbers are a function of (seed, step, data rank): resuming needs no saved generator."""
        key = f"{self.state.seed}:{self.state.step}:{self.loader.data_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)

    def _sum_over_data(self, shares: Losses) -> Losses:
        """One all-reduce over all ranks; those of a tensor-parallel group hold the same share."""
        flat = shares.flatten()
        dist.all_reduce(flat)
        return shares.unflatten(flat / self.cfg.parallel.tp)


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens each `every` steps happens after this one."""
    return every is not None and step % every == 0
