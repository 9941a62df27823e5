"""The trainer: a sharded model, its optimizer, and the step."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.lora import LORA, lora_to_json
from moe_trainer.checkpoint.manager import (
    TENSORS,
    CheckpointManager,
    checkpoint_to_resume,
    read_document,
    refuse_later_steps,
    resolve_checkpoint,
)
from moe_trainer.checkpoint.resume import Identity, check_changes
from moe_trainer.checkpoint.sharded import load_tensors, stored_tensors
from moe_trainer.config.choices import Compute, OnFailure
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml
from moe_trainer.data.build import build_loader
from moe_trainer.data.loader import Batch
from moe_trainer.kernels.grouped_gemm import grouped_gemm_supported
from moe_trainer.models.lora import is_adapter
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import GroupedSigmoidRouter
from moe_trainer.observe.flops import num_parameters
from moe_trainer.observe.log import get_logger
from moe_trainer.observe.metrics import RouterEntropy, is_load_due
from moe_trainer.observe.profile import StepProfiler
from moe_trainer.optim.adamw import build_adamw, optimizer_step, optimizer_tensors, set_optimizer_step
from moe_trainer.optim.groups import freeze
from moe_trainer.optim.schedule import learning_rate, set_learning_rate
from moe_trainer.optim.spikes import SkipLimit, SpikeGuard
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.clip import clip_factor, grad_norm
from moe_trainer.parallel.compute_copy import widen_gradients
from moe_trainer.parallel.cross_entropy import IGNORED_LABEL
from moe_trainer.parallel.fsdp import computed_with_copies, end_backward, shard_over_data
from moe_trainer.parallel.heartbeat import Heartbeat
from moe_trainer.parallel.initialize import initialize, initialize_adapters
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.precision import resolve_precision
from moe_trainer.parallel.replicas import check_replicas
from moe_trainer.parallel.shards import local_box
from moe_trainer.train.balance import balance_experts
from moe_trainer.train.dump import dump_skipped_step
from moe_trainer.train.evaluate import build_held_out, evaluate
from moe_trainer.train.fp8 import compute_in_fp8
from moe_trainer.train.loss import Losses, LossFn
from moe_trainer.train.memory import how_to_need_less, keeps_copies, out_of_memory_is, states_of
from moe_trainer.train.recompute import recompute_layers
from moe_trainer.train.replay import take_twice
from moe_trainer.train.report import RunReport, StepMetrics
from moe_trainer.train.state import TrainState
from moe_trainer.train.stop import StopRequest
from moe_trainer.train.stragglers import Stragglers

_logger = get_logger(__name__)


class Trainer:
    """One rank of a training run. The config is validated, its mesh and device concrete; a process group is up."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg = cfg
        self.device = device
        self.meshes = build_meshes(cfg.parallel, device.type)
        self.precision = resolve_precision(cfg.dtype, cfg.reduce_dtype, device, cfg.optim.weights_dtype)
        self.loader, self.tokenizer = build_loader(
            cfg, cfg.model.vocab_size, self.meshes.data_rank, self.meshes.data_size
        )
        self.held_out = build_held_out(cfg, self.meshes.data_rank, self.meshes.data_size)
        self.model, context = build_model(cfg.model, cfg.parallel, self.meshes, self.precision.master, cfg.lora)
        if cfg.compute is Compute.fp8:
            compute_in_fp8(self.model, device)
        recompute_layers(self.model, cfg.recompute)
        keep_copies = keeps_copies(cfg)
        shard_over_data(self.model, self.meshes, self.precision, cfg.parallel.reshard_after_forward, keep_copies)
        self.model.to_empty(device=device)
        copied = computed_with_copies(self.model)
        self.summed_by_fsdp = [parameter for parameter in self.model.parameters() if parameter not in copied]
        freeze(self.model, cfg.optim.freeze)
        self.loss_fn = LossFn(
            cfg.model.num_experts,
            cfg.optim.aux_coef,
            vocab_group=self.meshes.tp.get_group() if self.meshes.tp is not None else None,
            sequence=context.sequence,
            z_coef=cfg.optim.z_coef,
            aux_scope=cfg.optim.aux_scope,
        )
        self.optimizer = build_adamw(self.model.named_parameters(), cfg.optim, local_box)
        self.spikes = SpikeGuard(cfg.optim, device)
        self.stragglers = Stragglers(cfg, device)
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
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        counts = f"{active:,} active" + ("" if trained == total else f", {trained:,} trained")
        width = model.intermediate_size // (1 if parallel.expert_parallel else parallel.tp)
        is_grouped = grouped_gemm_supported(self.precision.compute, model.hidden_size, width)
        return (
            f"{model.family.value}, {total:,} parameters ({counts}) on {dist.get_world_size()} "
            f"{self.device.type} rank(s), {mesh}; {self.precision.compute} with {self.precision.master} weights; "
            f"rank 0 holds {states_of(self.model, self.cfg, self.precision, self.device)}; "
            f"experts by {'grouped GEMM' if is_grouped else 'one product after the other'}"
        ).replace("torch.", "")

    def start(self) -> None:
        """Give the model its values: from a checkpoint, a Hugging Face folder or the seed."""
        resume = self.cfg.checkpoint.resume
        checkpoint = None
        if resume == "auto":
            checkpoint = checkpoint_to_resume(self.checkpoints.root)
        elif resume != "none":
            checkpoint = resolve_checkpoint(Path(resume))
            refuse_later_steps(self.checkpoints.root, checkpoint)
        if checkpoint is not None:
            self.load(checkpoint)
        elif self.cfg.model.init_from is not None:
            family = FAMILIES[self.cfg.model.family]
            named = (*self.model.named_parameters(), *self.model.named_buffers())
            parameters = {name: tensor for name, tensor in named if not is_adapter(name)}
            initialize_adapters(self.model, self.cfg.seed)
            load_hf(Path(self.cfg.model.init_from), parameters, lambda keys: family.key_map(self.cfg.model, keys))
        else:
            initialize(self.model, self.cfg.seed, self.cfg.model.initializer_range)
        # What exists now stays: a garbage collection that looks at all of it on one rank makes the others wait.
        gc.collect()
        gc.freeze()

    def fit(self, stop_file: Path | None = None, heartbeat: Heartbeat | None = None) -> StepMetrics | None:
        """Train until `steps` or until told to stop (`StopRequest`), saving as configured and at the end.

        Returns:
            The last step's metrics, if any.
        """
        report = (
            RunReport(
                self.cfg,
                self.device,
                self.run_folder,
                self.state.step,
                self.loader.seq_len,
                self.state.skipped_steps,
            )
            if dist.get_rank() == 0
            else None
        )
        metrics, first = None, self.state.step
        skips = SkipLimit(self.cfg.optim.max_skipped_steps, self.cfg.logging.every)
        try:
            with StopRequest(stop_file, self.cfg.max_minutes) as stop, self._profiler() as profiler:
                while self.state.step < self.cfg.steps and not stop.agreed():
                    if heartbeat is not None:
                        heartbeat.beat(self.state.step)
                    profiler.before(self.state.step + 1)
                    metrics = self._next_step(metrics)
                    if report is not None:
                        report.take(self.state.step, self.state.tokens, metrics)
                    skips.check(self.state.step, self.spikes.skipped_in_a_row, partial(self._dump, metrics))
                    if is_due(self.state.step, self.cfg.checks.replicas_every):
                        self._flush_and(lambda: check_replicas(self._tensors(), self.state.step), report)
                    if is_due(self.state.step, self.cfg.checkpoint.every) and self.state.step < self.cfg.steps:
                        self._save_on_the_way(report)
                    if is_due(self.state.step, self.cfg.eval.every) and self.state.step < self.cfg.steps:
                        self._evaluate(report)
                    if self._must_stop_for(self.checkpoints.failure):
                        stop.reason = "a checkpoint could not be written"
            self.checkpoints.wait()
            if self._must_stop_for(self.checkpoints.failure):
                raise self.checkpoints.failure
            if self.state.step > first and self.checkpoints.newest != self.state.step:
                self._flush_and(self.save, report)
            if first < self.state.step == self.cfg.steps:
                self._evaluate(report)
        except ConfigError:  # said in one line: a save that is under way may end before
            self.checkpoints.wait()
            raise
        finally:
            if report is not None:
                report.close()
        return metrics

    def _profiler(self) -> StepProfiler:
        chosen = self.cfg.profiler if self.cfg.profile else None
        return StepProfiler(chosen, self.run_folder / "profile", dist.get_rank(), self.device, self.state.step)

    def _next_step(self, last: StepMetrics | None) -> StepMetrics:
        counts = None if last is None else last.losses.expert_counts
        where = dist.get_rank(), self.state.step + 1, self.loader.seq_len
        with (
            out_of_memory_is(lambda: how_to_need_less(self.cfg, *where, counts)),
            self.stragglers.measuring(self.state.step + 1, self.loader),
        ):
            return self.train_step(self.loader.batch(self.state.samples).to(self.device))

    def train_step(self, batch: Batch) -> StepMetrics:
        """One optimizer step on this rank's share [grad_accum_steps * micro_batch, seq] of the global batch."""
        num_tokens = self.loader.num_tokens(self.state.samples)  # labels that count, of the global batch
        entropy = RouterEntropy(self.device) if is_load_due(self.state.step + 1, self.cfg) else None
        if is_due(self.state.step + 1, self.cfg.checks.replay_every):
            shares = take_twice(self.model, partial(self.add_gradients, batch), entropy, self.state.step + 1)
        else:
            shares = self.add_gradients(batch, entropy)
        losses = self._sum_over_data(shares)
        norm = grad_norm(self.model.parameters())
        rate = learning_rate(self.state.step, self.cfg.optim, self.state.schedule_steps)
        set_learning_rate(self.optimizer, rate)
        factor = clip_factor(norm, self.spikes.limit(norm))
        self.optimizer.step(factor)
        self.optimizer.zero_grad()
        bias_rate = self.cfg.optim.expert_bias_rate
        balance_experts(self.biased_routers, losses.expert_counts, factor.isfinite(), bias_rate)
        self.state.advance(self.loader.global_batch_size, num_tokens)
        more = self._counters(factor) | ({} if entropy is None else {"router_entropy": entropy.over_ranks()})
        return StepMetrics(losses, norm, rate, num_tokens, self.loader.data_seconds, more)

    def add_gradients(self, batch: Batch, entropy: RouterEntropy | None = None) -> Losses:
        """Forward and backward passes over the micro-batches of the next step; this rank's shares of the losses."""
        num_tokens = self.loader.num_tokens(self.state.samples)
        shares = Losses.zeros(self.num_sparse_layers, self.cfg.model.num_experts, self.device)
        for micro_batch in batch.split(self.loader.grad_accum_steps):  # [micro_batch, seq]
            output = self.model(micro_batch.input_ids, documents=micro_batch.documents)
            loss, losses = self.loss_fn(output, micro_batch.labels, num_tokens)
            loss.backward()
            end_backward(self.model)
            if self.loader.grad_accum_steps > 1:
                widen_gradients(self.summed_by_fsdp)
            shares = shares.add(losses)
            if entropy is not None:
                entropy.add(output.routings, self._routed(micro_batch.labels))
        return shares

    def evaluate(self) -> dict[str, float]:
        """`val_loss` and what belongs to it, of the held-out data, which there must be. Collective."""
        assert self.held_out is not None, "no held-out data"
        vocab_group = self.loss_fn.vocab_group
        return evaluate(self.model, self.held_out, self.cfg.eval.batches, vocab_group, self.device)

    def _evaluate(self, report: RunReport | None) -> None:
        if self.held_out is not None:
            metrics = self.evaluate()
            if report is not None:
                report.evaluated(self.state.step, metrics)

    def save(self) -> Path:
        """Publish a checkpoint of this step. Collective."""
        path = self.checkpoints.save(self.state.step, self._tensors(), self._documents())
        _logger.info("saved %s", path)
        return path

    def _documents(self) -> dict[str, str]:
        """What lies beside the tensors of a checkpoint: file name -> text."""
        moved = optimizer_step(self.optimizer, self.model.named_parameters(), self.state.moments_since)
        self.state.skipped_steps = self.state.step - moved
        self.state.grad_norms = self.spikes.to_list()
        return {
            "state.json": self.state.to_json(
                mesh=asdict(self.cfg.parallel), world_size=dist.get_world_size(), torch=torch.__version__
            ),
            "model.json": model_config_to_json(self.cfg.model),
            **({} if self.cfg.lora.rank is None else {LORA: lora_to_json(self.cfg.lora)}),
            "config.yaml": to_yaml(self.cfg),
            "tokenizer.json": self.tokenizer.to_str(pretty=True),
        }

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of any mesh. Collective.

        The checkpoint's counts and, unless the config names one, schedule horizon are kept; all else is the config's.

        Raises:
            ConfigError: another model, tokenizer, data or seed than the config's (see `check_changes`); a damaged
                file.
        """
        state = TrainState.from_json(read_document(checkpoint, "state.json"))
        saved = Identity(state.seed, state.data_fingerprint)
        state.seed, state.data_fingerprint = self.state.seed, self.state.data_fingerprint
        ours = Identity(state.seed, state.data_fingerprint)
        changed = check_changes(checkpoint, saved, self.cfg, self.tokenizer.to_str(pretty=True), ours)
        moved = state.step - state.skipped_steps
        state.moments_since |= dict.fromkeys(self._load_tensors(checkpoint / TENSORS), moved)
        set_optimizer_step(self.optimizer, self.model.named_parameters(), state.moments_since, moved)
        self.spikes.load(state.grad_norms)
        if self.cfg.optim.schedule_steps is not None:
            state.schedule_steps = self.cfg.optim.schedule_steps
        self.state = state
        _logger.info("resumed from %s%s", checkpoint, f"; changed since: {changed}" if changed else "")

    def _load_tensors(self, folder: Path) -> set[str]:
        """Weights and moments; what is frozen here or was frozen there has no moments to load. The latter's names."""
        ours, stored = self._tensors(), stored_tensors(folder).keys()
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        ignored = {name for name in stored if name.startswith("optim.") and name.split(".", 2)[2] in frozen}
        new = {name for name in ours if name.startswith("optim.") and name not in stored}
        if new:
            _logger.info("%d parameters were frozen in the checkpoint: their moments start at zero", len(new) // 2)
        wanted = {name: tensor for name, tensor in ours.items() if name not in new}
        load_tensors(folder, wanted, strict=not stored - wanted.keys() <= ignored, casts=True)
        return {name.split(".", 2)[2] for name in new}

    def _save_on_the_way(self, report: RunReport | None) -> None:
        """Save between two steps. What fails is reported, and ends the run if `checkpoint.on_failure` says so."""
        if self.cfg.checkpoint.on_failure is OnFailure.stop:
            self.checkpoints.wait()
            if self.checkpoints.failure is not None:
                return  # the loop ends, and raises it
        if self.cfg.checkpoint.asynchronous:
            start = self.checkpoints.start_save
            self._flush_and(lambda: start(self.state.step, self._tensors(), self._documents()), report)
            return
        try:
            self._flush_and(self.save, report)
        except (ConfigError, RuntimeError) as error:  # agreed among the ranks
            if self._must_stop_for(error):
                raise
            _logger.error("the checkpoint of step %d was not saved, training goes on: %s", self.state.step, error)

    def _dump(self, metrics: StepMetrics) -> str:
        """Of the step just skipped; see `dump_skipped_step`."""
        after, self.state = self.state, self.state.before(self.loader.global_batch_size, metrics.num_tokens)

        def take() -> Losses:
            return self.add_gradients(self.loader.batch(self.state.samples).to(self.device))

        try:
            at_hand = self.run_folder, self.state, metrics, self.loader
            return dump_skipped_step(*at_hand, self.model, self._tensors(), take)
        finally:
            self.state = after

    def _must_stop_for(self, failure: Exception | None) -> bool:
        return failure is not None and self.cfg.checkpoint.on_failure is OnFailure.stop

    def _flush_and(self, save: Callable[[], object], report: RunReport | None) -> None:
        """The metrics of a saved step are on the disk before it is; its time is no step's time."""
        if report is not None:
            report.flush()
        save()
        if report is not None:
            report.skip_time()

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = list(self.model.named_parameters())
        weights = {f"model.{name}": tensor for name, tensor in (*named, *self.model.named_buffers())}
        return weights | {f"optim.{name}": t for name, t in optimizer_tensors(self.optimizer, named).items()}

    def _counters(self, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of steps that were not taken as they came; see `StepMetrics.more`."""
        counters = {"skipped": ~factor.isfinite(), **self.stragglers.metrics(self.state.step)}
        if self.cfg.optim.max_grad_zscore is not None:
            counters["grad_spikes"] = self.spikes.spikes.clone()
        return counters

    def _routed(self, labels: torch.Tensor) -> torch.Tensor:
        """Which of the tokens that this rank routed have a label: [batch, seq] or this rank's part of it."""
        valid = labels != IGNORED_LABEL
        return valid if self.loss_fn.sequence is None else self.loss_fn.sequence.local(valid)

    def _sum_over_data(self, shares: Losses) -> Losses:
        """One all-reduce over all ranks; those of a tensor-parallel group hold the same share."""
        flat = shares.flatten()
        dist.all_reduce(flat)
        return shares.unflatten(flat / self.cfg.parallel.tp)


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens each `every` steps happens after this one."""
    return every is not None and step % every == 0
