"""The values that a key may have, where they are a few names; nothing here imports torch."""

from enum import Enum


class Family(Enum):
    """Model families, each a package under `moe_trainer/models/`."""

    mixtral = "mixtral"
    qwen3_moe = "qwen3_moe"
    olmoe = "olmoe"
    deepseek_v3 = "deepseek_v3"
    gpt_oss = "gpt_oss"


class RopeType(Enum):
    """How rotary positions are stretched beyond the length of pretraining."""

    default = "default"
    linear = "linear"
    yarn = "yarn"


class DType(Enum):
    """Floating-point types; `auto` is bfloat16 on CUDA and float32 on CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class DeviceName(Enum):
    """Where a run computes; `auto` is CUDA where there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class AuxScope(Enum):
    """Over which tokens the load-balancing loss asks for an even load."""

    micro_batch = "micro_batch"
    sequence = "sequence"


class LoraExport(Enum):
    """How adapters are exported."""

    merged = "merged"
    adapter = "adapter"


class OnSpike(Enum):
    """What becomes of a step whose gradient norm spikes."""

    clip = "clip"
    skip = "skip"


class Compute(Enum):
    """How the layers' linears and experts are multiplied."""

    dtype = "dtype"
    fp8 = "fp8"


class Recompute(Enum):
    """Which activations a layer computes again in the backward pass instead of keeping them."""

    none = "none"
    selective = "selective"
    full = "full"


class Dispatch(Enum):
    """How tokens reach experts on other ranks under sequence and expert parallelism."""

    auto = "auto"
    all_to_all = "all_to_all"
    all_gather = "all_gather"


class ScheduleName(Enum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Quantization(Enum):
    """Types of the weights in generation."""

    none = "none"
    int8 = "int8"
    fp8 = "fp8"


class Packing(Enum):
    """How documents share the samples of a length."""

    documents = "documents"
    concatenate = "concatenate"


class OnFailure(Enum):
    """What a run does when a checkpoint cannot be written."""

    report = "report"
    stop = "stop"


class Change(Enum):
    """What a run may not change on resume unless it is told to."""

    model = "model"
    tokenizer = "tokenizer"
    data = "data"
    seed = "seed"


class MeshChoice(Enum):
    """Who says the sizes of the mesh."""

    declared = "declared"
    auto = "auto"


class WandbMode(Enum):
    """Whether and how metrics go to Weights & Biases."""

    disabled = "disabled"
    offline = "offline"
    online = "online"
