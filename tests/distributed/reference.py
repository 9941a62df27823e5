"""Three training steps of a small uneven model of any family: on one plain process, and on any mesh."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from moe_trainer.config.choices import AuxScope, Recompute
from moe_trainer.config.schema import LoraConfig, ModelConfig, ParallelConfig
from moe_trainer.config.validate import resolve_parallel
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import GroupedSigmoidRouter
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.clip import clip_factor, grad_norm
from moe_trainer.parallel.fsdp import end_backward, shard_over_data
from moe_trainer.parallel.initialize import initialize
from moe_trainer.parallel.mesh import Meshes, build_meshes
from moe_trainer.parallel.precision import Precision
from moe_trainer.parallel.sequence import SequenceShards
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.compare import assert_close_by_part, full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.loss import Losses, LossFn
from moe_trainer.train.recompute import recompute_layers

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    num_experts=8,
    top_k=2,
    initializer_range=0.3,
)
SEQ = 9  # over four tensor-parallel ranks: 3, 3, 3 and none
GLOBAL_BATCH = 8
STEPS = 3
LR = 1e-2
EPS = 1e-4
"""Of AdamW: large enough that a step does not blow the rounding of a vanishing gradient up to a whole `LR`, and that
the weights depend on the gradients' scale, which AdamW otherwise divides out."""
AUX_COEF = 0.1
Z_COEF = 0.03
BIAS_RATE = 0.05
MAX_NORM = 0.5
SILENT_EXPERT = 5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
PLANS = {"tp": (False, False), "sp": (True, False), "tp_ep": (False, True), "sp_ep": (True, True)}
"""The flags of each plan: sequence_parallel, expert_parallel."""


def mesh(plan: str, dp_replicate: int = 1, fsdp: int = 1, tp: int = 1, ep: int | None = None) -> ParallelConfig:
    """A plan on a mesh.

    Raises:
        ConfigError: the config does not allow them together.
    """
    sequence_parallel, expert_parallel = PLANS[plan]
    parallel = ParallelConfig(
        dp_replicate=dp_replicate,
        fsdp=fsdp,
        tp=tp,
        ep=ep,
        sequence_parallel=sequence_parallel,
        expert_parallel=expert_parallel,
    )
    return resolve_parallel(parallel, dp_replicate * fsdp * tp)


def describe(parallel: ParallelConfig) -> str:
    """Plan and mesh in one line."""
    flags = (parallel.sequence_parallel, parallel.expert_parallel)
    plan = next(name for name, its in PLANS.items() if its == flags)
    return f"{plan} dp_replicate={parallel.dp_replicate} fsdp={parallel.fsdp} tp={parallel.tp} ep={parallel.ep}"


class Outcome(NamedTuple):
    """What must not depend on the mesh."""

    loss: list[float]
    aux_loss: list[float]
    z_loss: list[float]
    grad_norm: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, torch.Tensor]
    """After the last step, the expert bias with them."""
    expert_counts: torch.Tensor
    """[steps, sparse layers, num_experts]."""


@dataclass(frozen=True)
class Case:
    """One mesh, one plan, one precision."""

    parallel: ParallelConfig
    dtype: torch.dtype
    model: ModelConfig = field(default_factory=lambda: MODEL)
    seq: int = SEQ
    micro_batch_size: int = 1
    device: str = "cpu"
    compute: torch.dtype | None = None
    """Of activations, where it differs from `dtype`."""
    steps: int = STEPS
    aux_coef: float = AUX_COEF
    z_coef: float = Z_COEF
    aux_scope: AuxScope = AuxScope.micro_batch
    recompute: Recompute = Recompute.none
    lora: LoraConfig = field(default_factory=LoraConfig)
    clear_routing: bool = False
    """Route by a code of the token with wide gaps (`encode`) instead of by `bend`, for narrow types."""

    @classmethod
    def accumulating(cls, parallel: ParallelConfig, dtype: torch.dtype, model: ModelConfig, **options: Any) -> "Case":
        """Two micro-batches a step on every rank, of 1, 2 or 4 sequences as the mesh shares the batch out; one of
        one sequence where there are as many data ranks as sequences."""
        micro_batch_size = max(1, GLOBAL_BATCH // 2 // (parallel.dp_replicate * parallel.fsdp))
        return cls(parallel, dtype, model, micro_batch_size=micro_batch_size, **options)

    def loss_fn(self, vocab_group: ProcessGroup | None = None, sequence: SequenceShards | None = None) -> LossFn:
        """With the case's coefficients."""
        return LossFn(
            self.model.num_experts,
            self.aux_coef,
            vocab_group,
            sequence,
            z_coef=self.z_coef,
            aux_scope=self.aux_scope,
        )


def batches(model: ModelConfig, seq: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels [GLOBAL_BATCH, seq] of each step; half a sequence and a whole one have no labels."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(STEPS):
        # Frequent small ids make the routing uneven.
        ids = torch.rand(GLOBAL_BATCH, seq + 1, generator=generator).square() * model.vocab_size
        ids = ids.long()
        labels = ids[:, 1:].clone()
        labels[2, seq // 2 :] = -100
        labels[5] = -100
        result.append((ids[:, :-1], labels))
    return result


@torch.no_grad()
def bend(model: CausalLM) -> None:
    """Give every embedding a common part that one expert's router rows reject: it gets no token in the first layer.

    The rejection is mild: that row's own gradient, which comes from the softmax alone, stays well above rounding.
    Biases, norms and the expert bias, which start from a constant, become uneven.
    """
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        local = local_part(parameter)
        if name.endswith(("bias", "norm.weight", "lora_b")):
            uneven = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            local += (0.1 * uneven[local_box(parameter)]).to(local)
        if name == "model.embed_tokens.weight":
            local += 0.3
        if name.endswith(".gate.weight"):
            rows, _ = local_box(parameter)
            if rows.start <= SILENT_EXPERT < rows.stop:
                local[SILENT_EXPERT - rows.start] = -0.3


@torch.no_grad()
def encode(model: CausalLM) -> None:
    """Let the first `num_experts` hidden values carry a fixed code of the token, which nothing writes to later and
    which alone the routers read: the choices are apart by far more than bfloat16 rounds, and the same on every mesh.
    """
    num_experts = model.model.layers[0].mlp.experts.num_experts
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter), local_box(parameter)
        if name == "model.embed_tokens.weight":
            tokens = torch.arange(box[0].start, box[0].stop).unsqueeze(1)
            levels = (5 * tokens + 3 * torch.arange(num_experts)) % num_experts  # a permutation for each token
            local[:, :num_experts] = levels.to(local) / num_experts
        elif name.endswith("o_proj.weight"):
            local[: max(0, num_experts - box[0].start)] = 0
        elif name.endswith("down_proj"):
            local[:, : max(0, num_experts - box[1].start)] = 0
        elif name.endswith(".gate.weight"):
            local.zero_()
            for row, expert in enumerate(range(box[0].start, box[0].stop)):
                local[row, expert] = 3.0


def sharded_model(case: Case, keep_copies: bool = False) -> tuple[CausalLM, LossFn, Meshes]:
    """The model on this rank's mesh, with the values that the plain one has; collective."""
    meshes = build_meshes(case.parallel, case.device)
    reduce = torch.promote_types(case.dtype, torch.float32)
    model, context = build_model(case.model, case.parallel, meshes, case.dtype, case.lora)
    recompute_layers(model, case.recompute)
    precision = Precision(case.compute or case.dtype, case.dtype, reduce)
    shard_over_data(model, meshes, precision, case.parallel.reshard_after_forward, keep_copies)
    model.to_empty(device=case.device)
    initialize(model, 0, case.model.initializer_range)
    (encode if case.clear_routing else bend)(model)
    vocab_group = meshes.tp.get_group() if meshes.tp is not None else None
    return model, case.loss_fn(vocab_group, context.sequence), meshes


def plain_model(case: Case) -> CausalLM:
    """The model on one process, whole."""
    model = FAMILIES[case.model.family].build(case.model)
    if case.lora.rank is not None:
        add_adapters(model, case.lora)
    model.to(case.device, case.dtype)  # before it is filled: a GPU draws other values than a CPU
    initialize(model, 0, case.model.initializer_range)
    (encode if case.clear_routing else bend)(model)
    return model


def train_plain(case: Case) -> Outcome:
    """The reference: a plain model, PyTorch's own clipping."""
    return _train(
        case,
        plain_model(case),
        case.loss_fn(),
        clip=torch.nn.utils.clip_grad_norm_,
        whole=lambda tensors: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
    )


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients in place, as the trainer's optimizer does on its way; the norm before."""
    parameters = list(parameters)
    norm = grad_norm(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(clip_factor(norm, max_norm))
    return norm


def train_parallel(case: Case) -> Outcome | None:
    """The same on this rank's mesh; the first rank returns the outcome."""
    model, loss_fn, meshes = sharded_model(case)

    def total(shares: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(shares)
        return shares / case.parallel.tp  # the ranks of a tensor-parallel group hold the same share

    outcome = _train(case, model, loss_fn, clip_grad_norm, full_tensors, total, meshes.data_rank, meshes.data_size)
    return outcome if dist.get_rank() == 0 else None


def step_parts(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], parts: list[nn.Parameter]) -> None:
    """Step this rank's part of each parameter, through `parts`, plain tensors that the optimizer knows.

    AdamW is elementwise, and to work out for every mesh what it does to DTensors is a quarter of a test's time;
    `test_resume` trains with those.
    """
    for parameter, part in zip(parameters, parts, strict=True):
        part.data = local_part(parameter)
        part.grad = None if parameter.grad is None else local_part(parameter.grad)
    optimizer.step()


def _train(
    case: Case,
    model: CausalLM,
    loss_fn: LossFn,
    clip: Callable[[Iterable[nn.Parameter], float], torch.Tensor],
    whole: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda shares: shares,
    data_rank: int = 0,
    data_size: int = 1,
) -> Outcome:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [nn.Parameter(local_part(parameter)) for parameter in trained]
    optimizer = torch.optim.AdamW(parts, lr=LR, eps=EPS, fused=True)
    routers = [module for module in model.modules() if isinstance(module, GroupedSigmoidRouter)]
    num_sparse = case.model.num_layers - len(case.model.dense_layers)
    steps: list[Losses] = []
    norms, gradients = [], {}
    micro = case.micro_batch_size
    for ids, labels in batches(case.model, case.seq)[: case.steps]:
        ids, labels = ids.to(case.device), labels.to(case.device)
        num_tokens = int((labels != -100).sum())
        shares = Losses.zeros(num_sparse, case.model.num_experts, torch.device(case.device))
        for start in range(data_rank * micro, GLOBAL_BATCH, data_size * micro):
            rows = slice(start, start + micro)
            loss, losses = loss_fn(model(ids[rows]), labels[rows], num_tokens)
            loss.backward()
            end_backward(model)
            shares = shares.add(losses)
        steps.append(shares.unflatten(total(shares.flatten()).cpu()))
        if len(steps) == 1:
            named = model.named_parameters()
            gradients = whole({name: parameter.grad for name, parameter in named if parameter.grad is not None})
        norms.append(clip(model.parameters(), MAX_NORM).item())
        step_parts(optimizer, trained, parts)
        model.zero_grad()
        with torch.no_grad():
            for router, load in zip(routers, steps[-1].expert_counts.to(case.device), strict=bool(routers)):
                router.expert_bias += BIAS_RATE * torch.sign(load.mean() - load)
    weights = whole(dict(model.named_parameters()) | dict(model.named_buffers()))
    scalars = {name: [getattr(step, name).item() for step in steps] for name in ("loss", "aux_loss", "z_loss")}
    counts = torch.stack([step.expert_counts for step in steps])
    return Outcome(**scalars, grad_norm=norms, gradients=gradients, weights=weights, expert_counts=counts)


@cache
def _outcome_of_one_process(case: bytes) -> Outcome:
    return train_plain(pickle.loads(case))


def plain_outcome(case: Case) -> Outcome:
    """What `case` must come to on any mesh; computed once."""
    return _outcome_of_one_process(pickle.dumps(replace(case, parallel=mesh("tp"))))


def train_all(cases: list[Case]) -> list[Outcome | None]:
    """Each case on this rank; the first rank returns the outcomes."""
    return [train_parallel(case) for case in cases]


def check(cases: list[Case], world: int, timeout: float = 200) -> None:
    """Each case on `world` ranks gives what one plain process gives.

    One start of the ranks for several meshes: starting them costs as much as a mesh does.
    """
    outcomes = run_distributed(train_all, world, cases, timeout=timeout)[0]
    failures = []
    for case, outcome in zip(cases, outcomes, strict=True):
        try:
            assert_same(outcome, plain_outcome(case), TOLERANCE[case.dtype])
        except AssertionError as error:
            failures.append(f"{describe(case.parallel)} in {case.dtype}: {error}")
    assert not failures, "\n".join(failures)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """Every figure of the outcome within `tolerance`, exactly zero where the reference is zero, and equal counts."""
    assert torch.equal(actual.expert_counts, expected.expert_counts), "expert counts differ"
    for name in ("loss", "aux_loss", "z_loss", "grad_norm"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        errors = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        assert max(errors) <= tolerance, f"{name} differs: {ours} instead of {theirs}"
    assert_close_by_part(actual.gradients, expected.gradients, tolerance)
    assert_close_by_part(actual.weights, expected.weights, tolerance)
