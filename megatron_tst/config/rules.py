"""Every rule that relates settings to each other, and the values that follow from them."""

from collections.abc import Iterator

from megatron_tst.config.errors import UserError, require
from megatron_tst.config.ranges import range_rules
from megatron_tst.config.settings import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunConfig,
    SuperpositionSettings,
    TrainingSettings,
)

# (whether the rule holds, flag and value, the rule in words)
_Rule = tuple[bool, str, str]


def check_config(config: RunConfig) -> None:
    """Check that settings contradict neither each other nor the method.

    Raises:
        UserError: if a rule is broken; the message names the flag, its value and the rule.
    """
    for rules in (
        range_rules(config),
        _required_rules(config),
        _model_rules(config.model),
        _superposition_rules(config.superposition, config),
        _batch_rules(config.training),
        _data_rules(config.data),
        _checkpoint_rules(config.checkpoint),
        _optimizer_rules(config.optimizer, config.training),
        _parallel_rules(config.parallel, config.model),
        _overlap_rules(config.parallel, config.optimizer),
        _recompute_rules(config.training),
    ):
        _refuse_broken(rules)
    try:
        schedule = config.schedule
    except ValueError as error:
        raise UserError(f"phases: {error}") from error
    if schedule.num_steps != config.training.train_iters:
        raise UserError(
            f"--train-iters {config.training.train_iters}: must be the sum of the phases' steps, {schedule.num_steps}"
        )
    if config.superposition.tst_reinitialize_at_switch and not schedule.recovery_starts:
        raise UserError("--tst-reinitialize-at-switch: needs a phase with bags, followed by one of bag size 1")


def global_batch_size(training: TrainingSettings, parallel: ParallelSettings, dp_size: int) -> int:
    """Return the sequences per optimizer step over all ranks.

    Raises:
        UserError: if the batch does not fill whole micro-batches on ``dp_size`` data-parallel ranks, or if interleaved
            pipeline stages need another number of micro-batches.
    """
    per_pass = require("--micro-batch-size", training.micro_batch_size) * dp_size
    size = training.global_batch_size or per_pass
    if size % per_pass:
        raise UserError(
            f"--global-batch-size {size}: must be a multiple of --micro-batch-size {training.micro_batch_size} x "
            f"{dp_size} data-parallel ranks"
        )
    stages, per_chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None and size // per_pass % stages:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk}: a rank's {size // per_pass} micro-batches per step "
            f"must be a multiple of --pipeline-model-parallel-size {stages}"
        )
    return size


def check_sizes(config: RunConfig) -> None:
    """Check phases, batch and parallel sizes by the rules that do not depend on the number of ranks.

    Raises:
        UserError: if a rule is broken; the message names the flag, its value and the rule.
    """
    _refuse_broken(range_rules(config))
    _refuse_broken(_superposition_rules(config.superposition, config))
    _refuse_broken(_batch_rules(config.training))


def check_layout(config: RunConfig) -> None:
    """Check that a model's shape fits its parallel layout, batch and recomputation; other settings may be missing.

    Raises:
        UserError: if a rule is broken; the message names the flag, its value and the rule.
    """
    _refuse_broken(_model_rules(config.model))
    _refuse_broken(_batch_rules(config.training))
    _refuse_broken(_parallel_rules(config.parallel, config.model))
    _refuse_broken(_recompute_rules(config.training))


def _refuse_broken(rules: Iterator[_Rule]) -> None:
    for holds, flag, rule in rules:
        if not holds:
            raise UserError(f"{flag}: {rule}")


def _required_rules(config: RunConfig) -> Iterator[_Rule]:
    needed = {
        "--num-layers": config.model.num_layers,
        "--hidden-size": config.model.hidden_size,
        "--num-attention-heads": config.model.num_attention_heads,
        "--seq-length": config.model.seq_length,
        "--micro-batch-size": config.training.micro_batch_size,
        "--train-iters": config.training.train_iters,
        "--lr": config.optimizer.lr,
        "--tokenizer-model": config.data.tokenizer_model,
        "--tst-run-dir": config.logging.tst_run_dir,
    }
    for flag, value in needed.items():
        yield value is not None, f"{flag} None", "must be given"


def _model_rules(model: ModelSettings) -> Iterator[_Rule]:
    heads, hidden = model.num_attention_heads or 1, model.hidden_size or 1
    yield (
        model.kv_channels is not None or hidden % heads == 0,
        f"--hidden-size {hidden}",
        f"must be a multiple of --num-attention-heads {heads}, unless --kv-channels is given",
    )
    if model.group_query_attention:
        yield (
            model.num_query_groups > 0 and heads % model.num_query_groups == 0,
            f"--num-query-groups {model.num_query_groups}",
            f"must divide --num-attention-heads {heads}",
        )
    embeddable = model.max_position_embeddings
    yield (
        embeddable is None or embeddable >= (model.seq_length or 0),
        f"--max-position-embeddings {embeddable}",
        f"must be at least --seq-length {model.seq_length}",
    )
    if model.num_experts is not None:
        yield (
            1 <= model.moe_router_topk <= model.num_experts,
            f"--moe-router-topk {model.moe_router_topk}",
            f"must lie between 1 and --num-experts {model.num_experts}",
        )
    capacity = model.moe_expert_capacity_factor
    if capacity is not None:
        yield model.num_experts is not None, f"--moe-expert-capacity-factor {capacity}", "needs --num-experts"


def _superposition_rules(settings: SuperpositionSettings, config: RunConfig) -> Iterator[_Rule]:
    steps = config.training.train_iters or 0
    bag, ratio, superposed = settings.tst_bag_size, settings.tst_step_ratio, settings.tst_steps
    yield (
        superposed is None or 0 <= superposed <= steps,
        f"--tst-steps {superposed}",
        f"must lie between 0 and --train-iters {steps}",
    )
    yield superposed is None or ratio == 0.0, f"--tst-steps {superposed}", f"conflicts with --tst-step-ratio {ratio}"
    yield (
        settings.tst_objective == "mce" or (settings.loss_weights == "uniform"),
        f"--tst-objective {settings.tst_objective}",
        f"uses no bag weights, but they are {settings.loss_weights} (--tst-bag-weights, --tst-superpose)",
    )
    if config.phases:
        yield bag == 1 and superposed is None, f"--tst-bag-size {bag}", "conflicts with phases in the YAML file"
    else:
        yield (
            bag == 1 or ratio > 0.0 or bool(superposed),
            f"--tst-bag-size {bag}",
            "needs --tst-step-ratio or --tst-steps above 0, the length of the superposition phase",
        )


def _batch_rules(training: TrainingSettings) -> Iterator[_Rule]:
    size, micro = training.global_batch_size, training.micro_batch_size or 1
    yield (
        size is None or (size > 0 and size % micro == 0),
        f"--global-batch-size {size}",
        f"must be a multiple of --micro-batch-size {micro}",
    )


def _data_rules(data: DataSettings) -> Iterator[_Rule]:
    yield bool(data.data_path or data.train_data_path), "--data-path", "must be given unless --train-data-path is"
    yield (
        not (data.data_path and (data.train_data_path or data.valid_data_path)),
        "--data-path",
        "conflicts with --train-data-path and --valid-data-path",
    )


def _optimizer_rules(optimizer: OptimizerSettings, training: TrainingSettings) -> Iterator[_Rule]:
    end = optimizer.lr_decay_iters or training.train_iters or 1
    yield (
        0.0 <= optimizer.min_lr <= (optimizer.lr or 0.0),
        f"--min-lr {optimizer.min_lr}",
        "must lie between 0 and --lr",
    )
    yield (
        0 <= optimizer.lr_warmup_iters < end,
        f"--lr-warmup-iters {optimizer.lr_warmup_iters}",
        f"must lie before the end of the decay, step {end}",
    )
    if optimizer.lr_decay_style == "WSD":
        decay = optimizer.lr_wsd_decay_iters
        yield (
            decay is not None and 0 < decay <= end - optimizer.lr_warmup_iters,
            f"--lr-wsd-decay-iters {decay}",
            "with --lr-decay-style WSD must lie between 1 and the steps after warm-up",
        )


def _parallel_rules(parallel: ParallelSettings, model: ModelSettings) -> Iterator[_Rule]:
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    heads, length, layers = model.num_attention_heads or 0, model.seq_length or 0, model.num_layers or 0
    groups = model.num_query_groups if model.group_query_attention else heads
    yield heads % tp == 0, f"--tensor-model-parallel-size {tp}", f"must divide --num-attention-heads {heads}"
    yield groups % tp == 0, f"--tensor-model-parallel-size {tp}", f"must divide --num-query-groups {groups}"
    if parallel.sequence_parallel:
        contexts = f" x --context-parallel-size {cp}" if cp > 1 else ""
        yield (
            length % (tp * cp) == 0,
            f"--seq-length {length}",
            f"with --sequence-parallel must be a multiple of --tensor-model-parallel-size {tp}{contexts}",
        )
    if cp > 1:
        yield (
            length % (2 * cp) == 0,
            f"--seq-length {length}",
            f"must be a multiple of 2 x --context-parallel-size {cp}",
        )
    yield layers % pp == 0, f"--num-layers {layers}", f"must be a multiple of --pipeline-model-parallel-size {pp}"
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    if virtual is not None:
        yield (
            pp > 1,
            f"--num-layers-per-virtual-pipeline-stage {virtual}",
            "needs --pipeline-model-parallel-size above 1",
        )
        yield (
            virtual > 0 and layers // pp % virtual == 0,
            f"--num-layers-per-virtual-pipeline-stage {virtual}",
            f"must divide the {layers // pp} layers of a pipeline stage",
        )
    experts, ep = model.num_experts or 0, parallel.expert_model_parallel_size
    yield (
        ep == 1 or (experts > 0 and experts % ep == 0),
        f"--expert-model-parallel-size {ep}",
        f"must divide --num-experts {experts}",
    )
    if experts and tp > 1:
        yield (
            parallel.sequence_parallel,
            f"--tensor-model-parallel-size {tp}",
            "with --num-experts needs --sequence-parallel",
        )


def _overlap_rules(parallel: ParallelSettings, optimizer: OptimizerSettings) -> Iterator[_Rule]:
    gathers, reduces, size = parallel.overlap_param_gather, parallel.overlap_grad_reduce, parallel.ddp_bucket_size
    yield (
        not gathers or optimizer.use_distributed_optimizer,
        "--overlap-param-gather",
        "needs --use-distributed-optimizer; without it no parameters are gathered",
    )
    yield not gathers or reduces, "--overlap-param-gather", "needs --overlap-grad-reduce"
    yield size is None or reduces, f"--ddp-bucket-size {size}", "needs --overlap-grad-reduce"


def _checkpoint_rules(settings: CheckpointSettings) -> Iterator[_Rule]:
    for name in (
        "finetune", "no_load_optim", "no_load_rng", "exit_on_missing_checkpoint", "override_run_config",
        "no_verify_checkpoint", "ckpt_step",
    ):  # fmt: skip
        wanted = getattr(settings, name) not in (False, None)
        yield settings.load is not None or not wanted, f"--{name.replace('_', '-')}", "needs --load"


def _recompute_rules(training: TrainingSettings) -> Iterator[_Rule]:
    full = training.recompute_granularity == "full"
    yield (
        not full or (training.recompute_method is not None and training.recompute_num_layers is not None),
        "--recompute-granularity full",
        "needs --recompute-method and --recompute-num-layers",
    )
    yield (
        full or training.recompute_method is None,
        f"--recompute-method {training.recompute_method}",
        "needs --recompute-granularity full",
    )
