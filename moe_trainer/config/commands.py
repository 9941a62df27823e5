"""What the commands beside `moe-train` are told: one dataclass each, as in `schema`."""

from dataclasses import dataclass, field

from moe_trainer.config.choices import (
    DeviceName,
    DType,
    LoraExport,
    Quantization,
)
from moe_trainer.config.schema import (
    DataConfig,
    ParallelConfig,
    PrepareConfig,
)


@dataclass(slots=True)
class EvaluateConfig:
    """One evaluation (`moe-eval`)."""

    checkpoint: str | None = None
    """A checkpoint of ours, a run folder (its newest checkpoint) or a Hugging Face folder. Required."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to evaluate on: `path` (what a prepared folder holds out, or else all of it). Its tokenizer is the
    checkpoint's."""
    batches: int | None = None
    """Global batches to evaluate, always the same ones; unset: each sample once."""
    nproc: int | None = None
    """Processes to start on this machine; default the product of the mesh sizes."""
    device: DeviceName = DeviceName.auto
    """Where to compute."""
    dtype: DType = DType.auto
    """Type of the computation; weights are kept in float32 (float64 for float64)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Mesh sizes and flags."""


@dataclass(slots=True)
class GenerateParallelConfig:
    """Ranks of `moe-generate`."""

    tp: int = 1
    """tp = ep = N ranks with the plan `tp_ep`."""


@dataclass(slots=True)
class GenerateConfig:
    """One generation (`moe-generate`)."""

    checkpoint: str | None = None
    """A checkpoint of ours, a run folder (its newest checkpoint) or a Hugging Face folder. Required."""
    prompt: str | None = None
    """Text to continue. This or `prompts` is required."""
    max_new_tokens: int = 256
    """Tokens to add at most, to each prompt."""
    prompts: str | None = None
    """A file of prompts, one a line; in a .jsonl file each line is an object with the text under `prompt`."""
    batch_size: int = 8
    """Prompts of a file that are continued together."""
    output: str | None = None
    """A new .jsonl file for the results, an object with prompt and continuation a line. Unset: they are printed."""
    temperature: float | None = None
    """0 is greedy; otherwise the logits are divided by it before sampling. Unset: as generation_config.json of a
    Hugging Face folder says, else greedy."""
    top_k: int | None = None
    """Sample among this many likeliest tokens. Unset: as that file says, else among all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability. Unset: as that file says, else 1."""
    seed: int = 0
    """Seed of the sampling; the prompts of a file take this one, the next, and so on."""
    quantization: Quantization = Quantization.none
    """Linear and expert weights in 8 bits: `int8` (weights alone) or `fp8` (activations too)."""
    device: DeviceName = DeviceName.auto
    """Where to compute."""
    dtype: DType = DType.auto
    """Type of the computation."""
    parallel: GenerateParallelConfig = field(default_factory=GenerateParallelConfig)
    """Ranks."""
    cuda_graph: bool = True
    """On a GPU, record the step over one token once and replay it, which spares most of the launches' time."""


@dataclass(slots=True)
class ExportConfig:
    """`moe-checkpoint export`."""

    checkpoint: str | None = None
    """A checkpoint of ours, or a run folder (its newest checkpoint). Required."""
    out: str | None = None
    """Folder to write, which must not exist yet. Required."""
    max_shard_size: str = "5GB"
    """Largest safetensors file (decimal units: KB, MB, GB); one file if all fits."""
    workers: int | None = None
    """Files written at the same time, each a tensor at a time; unset: as many as processors, at most 4."""
    dtype: DType = DType.float32
    """Type of the written weights; float32 keeps the master weights bit for bit."""
    lora: LoraExport = LoraExport.merged
    """Of a run with adapters: the weights with them, or the `adapter` alone, for PEFT."""


@dataclass(slots=True)
class UpcycleConfig:
    """`moe-checkpoint upcycle`: a mixture of experts from a dense Hugging Face model."""

    model: str | None = None
    """Hugging Face folder of a dense model: llama or mistral (they become mixtral) or qwen3 (qwen3_moe). Required."""
    out: str | None = None
    """Folder to write, which must not exist yet. Required."""
    num_experts: int = 8
    """Experts of each layer, each a copy of the layer's MLP."""
    top_k: int = 2
    """Experts that each token goes to."""
    noise: float = 0.0
    """Deviation of the noise added to each expert's weights, as a share of the weights' own; 0: equal copies."""
    drop: float = 0.0
    """Share of the intermediate dims that each expert draws anew."""
    seed: int = 0
    """Of routers, noise and dropped dims."""
    max_shard_size: str = "5GB"
    """Largest safetensors file (decimal units: KB, MB, GB); one file if all fits."""
    workers: int | None = None
    """Files written at the same time, each a tensor at a time; unset: as many as processors, at most 4."""
    dtype: DType = DType.auto
    """Type of the written weights; auto keeps the dense model's."""


@dataclass(slots=True)
class InspectConfig:
    """`moe-checkpoint inspect` and `moe-checkpoint verify`."""

    checkpoint: str | None = None
    """A checkpoint of ours, or a run folder (its newest checkpoint). Required."""


@dataclass(slots=True)
class PrepareCommandConfig(PrepareConfig):
    """`moe-data prepare`."""

    out: str | None = None
    """Folder to write. Required."""


@dataclass(slots=True)
class VerifyDataConfig:
    """`moe-data verify`."""

    path: str | None = None
    """A prepared folder. Required."""
