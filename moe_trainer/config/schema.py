"""What a training run is made of: one dataclass for each node of a recipe.

Nothing here imports torch, hydra or omegaconf. The text under a field is its documentation: `--help` prints it.
`slots=True` makes a key that no class declares an error instead of a new attribute.
"""

from dataclasses import dataclass, field

from moe_trainer.config.choices import (
    AuxScope,
    Change,
    Compute,
    DeviceName,
    Dispatch,
    DType,
    Family,
    MeshChoice,
    OnFailure,
    OnSpike,
    Packing,
    Recompute,
    RopeType,
    ScheduleName,
    WandbMode,
)


@dataclass(slots=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 1e6
    """Base of the angles."""
    type: RopeType = RopeType.default
    """Stretching: none, `linear`, or `yarn`."""
    factor: float = 1.0
    """By how much `linear` and `yarn` stretch."""
    original_max_position_embeddings: int = 4096
    """yarn: length of pretraining."""
    beta_fast: float = 32.0
    """yarn: rotations over that length above which a frequency is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is fully stretched."""
    mscale: float | None = None
    """yarn: numerator of the scale of cosine and sine."""
    mscale_all_dim: float | None = None
    """yarn: its denominator, and the scale of attention scores in deepseek_v3."""
    attention_factor: float | None = None
    """yarn: scale of cosine and sine, in place of the one computed."""
    truncate: bool = True
    """yarn: round the range of stretched frequencies to whole dims."""


@dataclass(slots=True)
class ModelConfig:
    """Shape of the decoder."""

    family: Family = Family.mixtral
    """Which model family to build."""
    init_from: str | None = None
    """Hugging Face folder to start from; its config.json then replaces the shape given here."""
    vocab_size: int = 264
    """Rows of the embedding and of the head."""
    hidden_size: int = 64
    """Width of the residual stream."""
    intermediate_size: int = 128
    """Width of one expert."""
    num_layers: int = 2
    """Decoder layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads (grouped-query attention)."""
    head_dim: int = 16
    """Width of one head."""
    num_experts: int = 4
    """Experts of each layer, over all ranks."""
    top_k: int = 2
    """Experts that each token goes to."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence the model is meant for; written to config.json on export."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """The head's weight is the embedding's."""
    norm_topk_prob: bool = True
    """Rescale the chosen experts' weights to sum to one."""
    capacity_factor: float | None = None
    """In training an expert takes at most so many times its even share of a micro-batch's choices, early positions
    first, and the others add nothing; unset: all it is given (dropless)."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers with a dense MLP in place of experts."""
    dense_intermediate_size: int | None = None
    """Width of the dense MLPs."""
    sliding_window: int | None = None
    """Positions that a token attends to, itself included; unset: all before it."""
    sliding_layers: list[int] | None = None
    """Layers that use the window; unset: all."""
    clip_qkv: float | None = None
    """olmoe: clamp queries, keys and values to this magnitude."""
    num_shared_experts: int = 0
    """deepseek_v3: experts that every token goes to, run as one MLP of their joint width."""
    num_expert_groups: int = 1
    """deepseek_v3: groups among which the router chooses first."""
    top_k_groups: int = 1
    """deepseek_v3: groups that each token may choose experts from."""
    routed_scaling_factor: float = 1.0
    """deepseek_v3: multiplies the experts' weights."""
    q_lora_rank: int | None = None
    """deepseek_v3: width of the queries' latent; unset: queries are projected directly."""
    kv_lora_rank: int = 512
    """deepseek_v3: width of the latent of keys and values."""
    qk_nope_head_dim: int = 128
    """deepseek_v3: part of a query and key head without position."""
    qk_rope_head_dim: int = 64
    """deepseek_v3: part with rotary position, shared by all key heads."""
    v_head_dim: int = 128
    """deepseek_v3: width of a value head."""
    rope_interleave: bool = True
    """deepseek_v3: rotary pairs lie side by side in the weights."""
    attention_bias: bool = False
    """Biases in the attention projections."""
    swiglu_alpha: float = 1.702
    """gpt_oss: gain of the gate's sigmoid."""
    swiglu_limit: float = 7.0
    """gpt_oss: clamp of gate and up before the product."""


@dataclass(slots=True)
class ParallelConfig:
    """Mesh sizes and the two flags that choose the plan."""

    mesh: MeshChoice = MeshChoice.declared
    """`declared`: the sizes below; `auto`: the largest legal mesh of the ranks there are, with the same global batch,
    where the sizes below are a wish."""
    dp_replicate: int = 1
    """Groups of ranks that each hold the whole sharded model (HSDP)."""
    fsdp: int = -1
    """Data-parallel ranks that shard the parameters; -1 takes what is left of the world."""
    tp: int = 1
    """Tensor-parallel ranks, which split heads, vocabulary and, under SP, the sequence."""
    ep: int | None = None
    """Expert-parallel ranks; unset means `tp` where `expert_parallel` is on, otherwise 1."""
    sequence_parallel: bool = False
    """SP: shard the sequence over `tp` between the blocks."""
    expert_parallel: bool = False
    """EP: whole experts on each rank of `ep`."""
    plan: dict[str, str] | None = None
    """Own plan, pattern -> style, in place of the model's."""
    reshard_after_forward: bool = False
    """Free the dense weights that FSDP gathered after a layer's forward pass and gather them again for its backward
    pass: less memory, more communication. Experts under FSDP are always freed."""
    dispatch: Dispatch = Dispatch.auto
    """`all_to_all`, `all_gather` or, where that moves fewer rows (`ep` <= `model.top_k`), the latter by `auto`."""


@dataclass(slots=True)
class GroupConfig:
    """Parameters with a rate or decay of their own."""

    pattern: str = ""
    """Name of a parameter or of a module that holds some, `*` for any one part of it."""
    lr_scale: float = 1.0
    """Multiplies the learning rate."""
    weight_decay: float | None = None
    """In place of `optim.weight_decay`, also for norms, biases and the router; unset: as without the group."""


@dataclass(slots=True)
class OptimConfig:
    """AdamW, its schedule and the losses' coefficients."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    decay_all: bool = False
    """Also decay norms, biases and the router."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Exceptions by name, such as `{pattern: model.layers.*.mlp.gate, lr_scale: 0.1}`; the last match counts."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of what is not trained, such as `model.layers.*.mlp.gate` or `model.layers.*.mlp.experts`."""
    offload: bool = False
    """Keep AdamW's moments in host memory and bring them to the GPU in turn: less memory, a slower step."""
    weights_dtype: DType = DType.auto
    """Type of the stored weights: `auto` is float32 (float64 for float64); bfloat16, to which each update is rounded
    at random, takes half of it, and so do the gradients. Norms, routers and adapters stay float32."""
    moments_dtype: DType = DType.auto
    """Type of the moments: `auto` is float32 (float64 for float64); bfloat16, rounded at random, takes half of it."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    max_grad_zscore: float | None = None
    """A gradient norm more than so many standard deviations above its running mean is a spike; unset: none is."""
    on_spike: OnSpike = OnSpike.clip
    """`clip` the gradients of a spike to that bound, or `skip` its step."""
    max_skipped_steps: int | None = 25
    """Stop after so many steps in a row that moved nothing, as their gradients were not finite; unset: go on."""
    expert_bias_rate: float = 0.001
    """Step of the loss-free expert bias of deepseek_v3 after each optimizer step; 0 leaves it as it is."""
    aux_coef: float = 0.0
    """Weight of the router's load-balancing loss."""
    aux_scope: AuxScope = AuxScope.micro_batch
    """Tokens that are to be balanced: those of a micro-batch together, or of each sequence alone."""
    z_coef: float = 0.0
    """Weight of the router's z-loss, which keeps its logits small."""
    schedule: ScheduleName = ScheduleName.cosine
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule_steps: int | None = None
    """Step at which the schedule ends; default `steps`, and on resume the checkpoint's."""
    min_lr_ratio: float = 0.1
    """Final rate of all but `constant`, as a share of `lr`."""
    decay_steps: int | None = None
    """Last steps of `wsd` (warm-up, stable, decay), in which the rate falls; unset: a tenth of `schedule_steps`."""


@dataclass(slots=True)
class PrepareConfig:
    """How texts become token shards: `moe-data prepare`, and `data.prepare` of a run."""

    inputs: list[str] = field(default_factory=list)
    """Files or globs (`**` for folders in folders): JSONL or Parquet with `text` or `messages`, else plain text, one
    document a file. `{stdlib}` is the folder of Python's standard library."""
    exclude: list[str] = field(default_factory=list)
    """Globs of files to leave out, matched against whole paths; `*` matches `/` too."""
    tokenizer: str = "byte"
    """`byte` (one token a byte) or the path of a tokenizer.json."""
    train_tokenizer: int | None = None
    """Train a byte-level BPE tokenizer with so many tokens on the training documents, in place of `tokenizer`."""
    chat_template: str | None = None
    """Jinja file for `messages`; unset: chat_template.jinja or tokenizer_config.json beside the tokenizer."""
    validation_share: float = 0.0
    """Share of the documents that are held out, chosen by a hash of their content and `seed`."""
    seed: int = 0
    """Of the choice of held-out documents."""
    shard_tokens: int = 50_000_000
    """Tokens after which a shard is full."""
    skip_bad: bool = False
    """Leave out, and count, documents that are empty, not UTF-8, not JSON or refused by their chat template."""


@dataclass(slots=True)
class DataConfig:
    """What to train on, and the sizes of a step."""

    text: str | None = None
    """Text to train on, given here."""
    path: str | None = None
    """What to train on: a folder of `moe-data prepare`, a plain text file, or JSONL with `text` in each line."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Prepared folders and their shares of the samples, `{FOLDER: SHARE, ...}`, in place of `path`."""
    validation_path: str | None = None
    """What to evaluate on, as `path`; unset: the held-out documents of the prepared folders."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How `path` is made, where `inputs` are given; a folder that is there must be made of the same."""
    tokenizer: str | None = None
    """`byte` (one token a byte) or the path of a tokenizer.json; unset: a prepared folder's own, else `byte`."""
    seq_len: int | None = None
    """Tokens of a sample; unset: the longest document, at most `model.max_position_embeddings`, and each document is
    then a sample, padded. Prepared folders need it."""
    packing: Packing = Packing.documents
    """`documents`: those that share a sample do not see each other, and positions start anew with each;
    `concatenate`: one long text."""
    micro_batch_size: int = 1
    """Sequences of one forward on one data rank."""
    global_batch_size: int = 8
    """Sequences of one optimizer step, over all ranks."""


@dataclass(slots=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights."""

    rank: int | None = None
    """Width of the adapters; unset: there are none, and the weights are trained."""
    alpha: float = 16.0
    """The adapters' product is multiplied by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.experts"]
    )
    """Patterns of the linear layers and experts that are adapted."""


@dataclass(slots=True)
class EvalConfig:
    """Evaluation on held-out data during training."""

    every: int | None = None
    """Evaluate after each so many steps; where there is held-out data, the last step is always evaluated."""
    batches: int | None = None
    """Global batches of held-out data, always the same ones; unset: each of its samples once."""


@dataclass(slots=True)
class CheckpointConfig:
    """When to save, what to keep, where to go on from."""

    every: int | None = None
    """Save after each so many steps; the last step is always saved."""
    keep_last: int | None = None
    """Keep this many of the newest checkpoints; unset keeps all."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept beside the last ones."""
    resume: str = "none"
    """`none`, `auto` (newest complete checkpoint of this run, if any) or the path of a checkpoint or run."""
    allow_changes: list[Change] = field(default_factory=list)
    """What may differ from the checkpoint that a run goes on from: model, tokenizer, data, seed."""
    asynchronous: bool = True
    """Go on training as soon as the tensors are copied to host memory, which holds them a second time; the last
    checkpoint of a run is always waited for."""
    on_failure: OnFailure = OnFailure.report
    """A checkpoint that cannot be written is reported, or stops the run; the last one of a run always fails it."""


@dataclass(slots=True)
class LoggingConfig:
    """Where metrics go."""

    every: int = 1
    """Console line after each so many steps, where there is no terminal; metrics.jsonl always has every step."""
    load_every: int | None = None
    """Steps between two rows of expert load (layers x experts) and router entropy; unset: a hundredth of `steps`, at
    least 10."""
    wandb: WandbMode = WandbMode.disabled
    """Weights & Biases: disabled, offline or online (which needs a login)."""
    wandb_project: str = "moe_trainer"
    """Project that wandb files the run under."""
    tensorboard: bool = False
    """Also write TensorBoard's files, in the run's `tensorboard/` (pip install 'moe-trainer[tensorboard]')."""


@dataclass(slots=True)
class ProfileConfig:
    """What `profile=true` records, into `profile/` in the run's folder."""

    steps: list[int] | None = None
    """Steps to record, by their number; neighbours share a trace. Unset: the fourth to sixth of this command."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that record."""
    memory: bool = True
    """On a GPU, also a snapshot of its memory with the history of these steps (for pytorch.org/memory_viz)."""


@dataclass(slots=True)
class LaunchConfig:
    """The ranks of this machine: how long they wait for each other, and what happens when one is lost."""

    max_restarts: int = 0
    """How often to start the ranks again from the newest checkpoint after one was lost."""
    shrink: bool = False
    """Go on with fewer ranks, after a rank was killed; needs `parallel.mesh=auto`. The next start has all again."""
    timeout_seconds: float = 600.0
    """How long a collective may wait for the other ranks before the run ends with where each of them is."""


@dataclass(slots=True)
class ChecksConfig:
    """Looking for silent corruption."""

    replicas_every: int | None = None
    """Compare, after each so many steps, what several ranks hold of the same weights and moments, bit for bit."""
    replay_every: int | None = None
    """Take a step twice after each so many, and compare losses, layers and gradients bit for bit; needs
    `deterministic`."""


@dataclass(slots=True)
class Config:
    """One training run (`moe-train`)."""

    run_name: str = "run"
    """Name of the run's folder under `run_dir`; recipes set their own."""
    run_dir: str = "runs"
    """Folder that holds the runs."""
    steps: int = 100
    """Step to stop at, counted from the start of training."""
    max_minutes: float | None = None
    """Minutes of training after which to save and stop, for batch queues; the start and the last save come on top."""
    seed: int = 0
    """Seed of the initial weights and of the order of samples."""
    nproc: int | None = None
    """Processes to start on this machine; default the product of the mesh sizes."""
    device: DeviceName = DeviceName.auto
    """Where to compute."""
    dtype: DType = DType.auto
    """Type of the computation; for that of the weights see `optim.weights_dtype`."""
    compute: Compute = Compute.dtype
    """Products of the layers' linears and experts: `dtype` takes them in that type, `fp8` rounds both factors to e4m3
    with a scale for each row (gradients of weights stay in `dtype`); Hopper or later."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU; slower there."""
    reduce_dtype: DType = DType.auto
    """Type in which gradients are summed over data ranks; auto is float32 (float64 for float64)."""
    recompute: Recompute = Recompute.none
    """Activation checkpointing: `full` keeps a layer's input and its router's choice alone; `selective` also what is
    dear to compute again, the outputs of attention and of the experts' first product."""
    print_plan: bool = False
    """Print each parameter's style, placement and local shape, and stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the decoder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Mesh sizes and flags."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, schedule, loss coefficients."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on held-out data."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Starting ranks, and losing them."""
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    """Looking for silent corruption."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, files, wandb."""
    profile: bool = False
    """Write a torch profiler trace of some steps; see `profiler`."""
    profiler: ProfileConfig = field(default_factory=ProfileConfig)
    """Which steps and ranks."""
