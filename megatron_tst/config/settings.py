"""All settings of a run: one frozen dataclass per group.

A field has the name and the meaning of the Megatron-LM flag of that name; the names of this project's own settings
start with ``tst_``. On the command line the groups are flat (``--num-layers``), in YAML they are sections. The metadata
of a field, or of its section, states what changing the setting means for a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tyro

from megatron_tst.config.effects import (
    COMPUTATION,
    LENGTH,
    METHOD,
    MODEL,
    NOTHING,
    PRECISION,
    ROUTING,
    RUN,
    STATE,
    TEXT,
    TUNING,
    having,
)
from megatron_tst.superposition import Phase, Schedule

Trainer = Literal["own", "megatron-lm"]
TRAINERS: tuple[str, ...] = get_args(Trainer)
BagWeights = Literal["uniform", "power_law", "exponential", "first_token", "mutual_information"]


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the transformer."""

    tst_preset: str | None = field(default=None, metadata=having(NOTHING))
    """A published shape (270m, 600m, 3b or 10b-a1b), which sets the fields below; YAML and flags override it."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the feed-forward network; 4 x hidden size if not given."""
    num_attention_heads: int | None = None
    """Query heads."""
    group_query_attention: bool = False
    """Share keys and values among query heads, in --num-query-groups groups."""
    num_query_groups: int = 1
    """With --group-query-attention: number of key-value heads."""
    kv_channels: int | None = None
    """Width of one head; hidden size / heads if not given."""
    seq_length: int | None = field(default=None, metadata=having(METHOD))
    """Positions per sequence, L, in every phase; a superposed sequence holds L x bag size data tokens."""
    max_position_embeddings: int | None = None
    """Positions the model can embed; --seq-length if not given."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How positions are encoded."""
    rotary_base: int = 10000
    """Base period of rotary embeddings."""
    rotary_percent: float = 1.0
    """Fraction of each head's width that is rotated."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm."""
    norm_epsilon: float = 1e-5
    """Constant added to the variance in a norm."""
    swiglu: bool = False
    """Use gated linear units with SiLU instead of GELU."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight."""
    disable_bias_linear: bool = False
    """Leave out the biases of linear layers."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head."""
    attention_dropout: float = field(default=0.1, metadata=having(TUNING))
    """Dropout of attention probabilities."""
    hidden_dropout: float = field(default=0.1, metadata=having(TUNING))
    """Dropout of embeddings and sublayer outputs."""
    init_method_std: float = field(default=0.02, metadata=having(TUNING))
    """Standard deviation of the initial weights."""
    vocab_size: int | None = field(default=None, metadata=having(TEXT))
    """Vocabulary before padding; the tokenizer's if not given."""
    make_vocab_size_divisible_by: int = field(default=128, metadata=having(NOTHING))
    """Pad the vocabulary to a multiple of this times the tensor-parallel size."""
    num_experts: int | None = None
    """Experts of an MoE layer; the model is dense if not given."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert."""
    moe_router_topk: int = 2
    """Experts that process each position."""
    moe_aux_loss_coeff: float = field(default=0.0, metadata=having(TUNING))
    """Weight of the load-balancing loss."""
    moe_z_loss_coeff: float | None = field(default=None, metadata=having(TUNING))
    """Weight of the router's z-loss."""
    moe_expert_capacity_factor: float | None = field(default=None, metadata=having(ROUTING))
    """Capacity of an expert, as a multiple of an equal split of a rank's micro-batch; unlimited if not given."""
    moe_token_drop_policy: Literal["probs", "position"] = field(default="probs", metadata=having(ROUTING))
    """Which positions a full expert keeps: those with the highest router probability, or the first."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = field(default="allgather", metadata=having(NOTHING))
    """How positions reach their experts."""
    moe_grouped_gemm: bool = field(default=False, metadata=having(NOTHING))
    """Run all local experts in one grouped multiplication (Transformer Engine)."""


@dataclass(frozen=True)
class SuperpositionSettings:
    """Token Superposition Training."""

    tst_bag_size: int = 1
    """Data tokens per position in the superposition phase, s; 1 is ordinary training."""
    tst_step_ratio: float = 0.0
    """Fraction r of the steps that are superposed."""
    tst_steps: int | None = None
    """Superposed steps, instead of --tst-step-ratio."""
    tst_bag_weights: BagWeights = "uniform"
    """Weight of each token of the next bag in the loss."""
    tst_superpose: Literal["both", "input", "output"] = "both"
    """input: read bags, predict the next bag's first token. output: read single tokens, predict the next s tokens."""
    tst_objective: Literal["mce", "mce_alt"] = "mce"
    """mce: mean cross-entropy of the bag's tokens. mce_alt: minus the log of their total probability."""
    tst_reinitialize_at_switch: bool = False
    """Negative control: reinitialize embedding and output layer when bags end, which destroys the gain."""

    @property
    def loss_weights(self) -> str:
        """Name of the bag weights that the loss uses."""
        return "first_token" if self.tst_superpose == "input" else self.tst_bag_weights


@dataclass(frozen=True)
class DataSettings:
    """The training and validation data."""

    data_path: tuple[str, ...] = field(default=(), metadata=having(TEXT))
    """Prefixes of .bin/.idx files, or alternating weights and prefixes of a blend; --split separates validation."""
    train_data_path: tuple[str, ...] = field(default=(), metadata=having(TEXT))
    """Separate training data, instead of --data-path."""
    valid_data_path: tuple[str, ...] = field(default=(), metadata=having(TEXT))
    """With --train-data-path: validation data."""
    split: str = "969,30,1"
    """Relative sizes of the training, validation and test splits of --data-path's documents, in file order."""
    tokenizer_model: str | None = field(default=None, metadata=having(TEXT))
    """A Hugging Face tokenizer.json, or a directory that holds one."""
    eod_mask_loss: bool = False
    """Exclude the token after each end-of-document token from the loss."""
    num_workers: int = field(default=2, metadata=having(NOTHING))
    """Worker processes that prefetch on each rank that reads data; with 0 the training process reads."""
    data_cache_path: str | None = field(default=None, metadata=having(NOTHING))
    """Directory of the cached document and sample indices; the run directory if not given."""


@dataclass(frozen=True)
class TrainingSettings:
    """Length, batch sizes, precision and evaluation of a run."""

    tst_trainer: Trainer = field(default="own", metadata=having(NOTHING))
    """own: this project's loop. megatron-lm: Megatron-LM's trainer, with every flag it has; Python 3.12."""
    micro_batch_size: int | None = field(default=None, metadata=having(NOTHING))
    """Sequences per rank in one forward pass."""
    global_batch_size: int | None = field(default=None, metadata=having(NOTHING))
    """Sequences per optimizer step over all ranks; one micro-batch per data-parallel rank if not given."""
    train_iters: int | None = field(default=None, metadata=having(NOTHING))
    """Optimizer steps of the run."""
    seed: int = field(default=1234, metadata=having(RUN))
    """Seed of the weights, dropout and data order."""
    bf16: bool = field(default=False, metadata=having(PRECISION))
    """Compute in bfloat16 with float32 main weights."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in float32 with --bf16."""
    attention_softmax_in_fp32: bool = False
    """Compute attention probabilities in float32."""
    recompute_granularity: Literal["selective", "full"] | None = field(default=None, metadata=having(COMPUTATION))
    """Recompute activations in the backward pass: parts of each layer, or whole layers."""
    recompute_method: Literal["uniform", "block"] | None = field(default=None, metadata=having(COMPUTATION))
    """With full recomputation: which layers are recomputed."""
    recompute_num_layers: int | None = field(default=None, metadata=having(COMPUTATION))
    """With full recomputation: layers per recomputed chunk."""
    cross_entropy_loss_fusion: bool = field(default=False, metadata=having(COMPUTATION))
    """Accepted for compatibility with Megatron-LM; the loss is always one fused pass, whatever the bag size."""
    cross_entropy_fusion_impl: Literal["te", "native", "linear"] | None = field(
        default=None, metadata=having(COMPUTATION)
    )
    """Loss kernel: Transformer Engine's, which is the default if it is installed, torch operations, or linear, which
    computes the output layer and the loss together and holds the logits of an eighth of the rows at a time."""
    deterministic_mode: bool = field(default=False, metadata=having(COMPUTATION))
    """Compute in a fixed order, so that a repeated run gives the same bits, also on CUDA; slower."""
    use_cpu_initialization: bool = field(default=False, metadata=having(NOTHING))
    """Initialise weights on the CPU, which gives the same weights for every tensor-parallel size."""
    max_nan_steps: int = field(default=3, metadata=having(NOTHING))
    """Consecutive steps with a loss or gradient that is not finite before the run stops; such steps are not applied."""
    eval_interval: int = field(default=1000, metadata=having(NOTHING))
    """Steps between next-token evaluations; the last step always evaluates."""
    eval_iters: int = field(default=100, metadata=having(NOTHING))
    """Global batches per evaluation; 0 for none."""


@dataclass(frozen=True)
class CheckpointSettings:
    """What is saved, where a run starts from, and when it stops."""

    save: str | None = None
    """Directory of the checkpoints; checkpoints/ in the run directory if not given."""
    save_interval: int | None = None
    """Steps between checkpoints; the end of each phase is always saved."""
    async_save: bool = False
    """Write checkpoints in the background while training continues."""
    keep_last: int | None = None
    """Checkpoints to keep besides those at the end of a phase; all if not given."""
    load: str | None = None
    """Directory of checkpoints to resume from; if it has none yet, the run starts from scratch."""
    ckpt_step: int | None = None
    """With --load: load this step instead of the latest."""
    finetune: bool = False
    """With --load: load only the weights and start at step 0."""
    no_load_optim: bool = False
    """With --load: start with fresh optimizer state."""
    no_load_rng: bool = False
    """With --load: start with a fresh RNG state."""
    exit_on_missing_checkpoint: bool = False
    """With --load: fail instead of starting from scratch."""
    override_run_config: bool = False
    """With --load: resume although schedule, seed or data differ from the checkpoint's."""
    no_verify_checkpoint: bool = False
    """With --load: skip the verification of the checkpoint's checksums."""
    exit_interval: int | None = None
    """Save and stop whenever the step is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and stop once the run has lasted this long."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = field(default=None, metadata=having(LENGTH))
    """Step at which the decay ends; --train-iters if not given."""
    lr_warmup_iters: int = field(default=0, metadata=having(LENGTH))
    """Steps of linear warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With --lr-decay-style WSD: shape of the final decay."""
    lr_wsd_decay_iters: int | None = field(default=None, metadata=having(LENGTH))
    """With --lr-decay-style WSD: steps of the final decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Constant added to the root of the second moment."""
    clip_grad: float = 1.0
    """Global norm to which larger gradients are clipped."""
    use_distributed_optimizer: bool = field(default=False, metadata=having(STATE))
    """Shard optimizer state over data-parallel ranks."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the model is split over ranks, and how ranks start and communicate."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each tensor."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Stages of the layer pipeline."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per virtual stage, which enables interleaving."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass."""
    ddp_bucket_size: int | None = None
    """With --overlap-grad-reduce: parameters per bucket; 40 million or more if not given."""
    distributed_timeout_minutes: int = 10
    """Minutes that a collective waits for a missing rank."""
    preflight: bool = False
    """Check every node and the network between them before the first step."""
    preflight_only: bool = False
    """Run the preflight check and exit."""
    preflight_timeout: float = 120.0
    """With --preflight: seconds that a rank waits for another."""
    preflight_min_gb_per_s: float = 0.0
    """With --preflight: lowest bus bandwidth of an all-reduce, in GB/s, with which the run starts."""


@dataclass(frozen=True)
class LoggingSettings:
    """What a run writes, and how often."""

    tst_run_dir: str | None = None
    """The run directory, which holds config.yaml, versions, metrics.jsonl and the log."""
    log_interval: int = 100
    """Steps between two lines of metrics."""
    tensorboard_dir: str | None = None
    """Directory to which metrics are also written for TensorBoard."""
    wandb_project: str | None = None
    """Also send metrics to this Weights & Biases project; without an API key they are stored to be sent later."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases; the run directory's name if not given."""
    wandb_entity: str | None = None
    """User or team in Weights & Biases."""
    wandb_save_dir: str | None = None
    """Directory of Weights & Biases' files; the run directory if not given."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    config: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=(), metadata=having(NOTHING))
    """A YAML file of settings; given several times, the later wins, and flags override all."""
    model: ModelSettings = field(default_factory=ModelSettings, metadata=having(MODEL))
    superposition: SuperpositionSettings = field(default_factory=SuperpositionSettings, metadata=having(METHOD))
    data: DataSettings = field(default_factory=DataSettings, metadata=having(METHOD))
    training: TrainingSettings = field(default_factory=TrainingSettings, metadata=having(TUNING))
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings, metadata=having(NOTHING))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings, metadata=having(TUNING))
    parallel: ParallelSettings = field(default_factory=ParallelSettings, metadata=having(NOTHING))
    logging: LoggingSettings = field(default_factory=LoggingSettings, metadata=having(NOTHING))
    # Resumption and comparison use the saved schedule instead of this setting.
    phases: Annotated[tuple[Phase, ...], tyro.conf.Suppress] = field(default=(), metadata=having(NOTHING))
    """YAML only: a list of {bag_size, steps}, instead of the superposition section's two phases."""
    megatron_lm: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict, metadata=having(TUNING))
    """YAML only: settings that Megatron-LM's trainer alone has, under its own names."""

    @property
    def schedule(self) -> Schedule:
        """The run's phases.

        Raises:
            ValueError: if the settings do not form a valid schedule.
        """
        if self.phases:
            return Schedule(self.phases)
        steps = self.training.train_iters or 0
        settings = self.superposition
        ratio = settings.tst_step_ratio if settings.tst_steps is None else settings.tst_steps / max(steps, 1)
        return Schedule.superposed(settings.tst_bag_size, ratio, steps, settings.tst_superpose != "output")
