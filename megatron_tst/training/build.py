"""Builds everything that a run holds from its settings."""

import logging
from pathlib import Path

import torch

from megatron_tst.checkpoint.changes import check_identity
from megatron_tst.checkpoint.content import TrainState
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.load import load_checkpoint
from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import RunConfig, dump_config, global_batch_size, require
from megatron_tst.data.build import SamplePlan, build_run_data
from megatron_tst.data.tokenizer import load_tokenizer
from megatron_tst.distributed import (
    ParallelSizes,
    ParallelState,
    enter_device,
    init_parallel_state,
    run_on_main_rank,
    seed_everything,
)
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_patches import Libraries, find_libraries
from megatron_tst.megatron_patches.versions import check_transformer_engine
from megatron_tst.model import build_model, loss_choice
from megatron_tst.shape import ModelShape, resolve_shape, step_flops, virtual_stages
from megatron_tst.telemetry import RunDirectory, short, start_log_screen
from megatron_tst.telemetry.sinks import check_sinks
from megatron_tst.training.experts import ExpertCounter
from megatron_tst.training.optimizer import build_optimizer, build_scheduler
from megatron_tst.training.place import choose_place
from megatron_tst.training.run import Run
from megatron_tst.training.start import Start, choose_vocab_size, find_start
from megatron_tst.training.step import Stepper

logger = logging.getLogger(__name__)


def start_run(config: RunConfig, signals: StopSignals) -> Run:
    """Join the other ranks, then build everything before the first step.

    Collective: every rank of the world calls it.

    Args:
        config: the settings.
        signals: stop signals of this process, which the run listens to from here on.

    Raises:
        UserError: if a setting or a file cannot be used.
        StoppedInSetUp: if a signal asks to stop.
    """
    # Report missing packages before ranks wait for each other.
    check_transformer_engine(find_libraries().transformer_engine)
    check_sinks(config.logging)
    ranks = init_parallel_state(_parallel_sizes(config), config.parallel.distributed_timeout_minutes)
    # Listening earlier is useless: a rank that waits for others to join reacts to a signal only after they have joined.
    signals.listen()
    return build_run(config, ranks, signals)


def build_run(config: RunConfig, ranks: ParallelState, signals: StopSignals | None = None) -> Run:
    """Build everything before the first step, and load the checkpoint to continue from.

    Collective: every rank of the world calls it.

    Args:
        config: the settings.
        ranks: parallel state of this rank.
        signals: stop signals of this process; None if the run is not to listen to them.

    Raises:
        UserError: if a setting or a file cannot be used.
        StoppedInSetUp: if a signal asks to stop.
    """
    directory = RunDirectory(Path(require("--tst-run-dir", config.logging.tst_run_dir)))
    if ranks.is_main:
        start_log_screen()
    run_on_main_rank(directory.occupy)
    try:
        return _build_in(directory, config, ranks, signals or StopSignals())
    except BaseException:
        directory.leave()
        raise


def _build_in(directory: RunDirectory, config: RunConfig, ranks: ParallelState, signals: StopSignals) -> Run:
    training, device, libraries = config.training, enter_device(), find_libraries()
    start = find_start(config, ranks)
    signals.check()
    folders = run_on_main_rank(lambda: choose_place(directory, config, start))
    batch_size = global_batch_size(training, config.parallel, ranks.dp_size)
    tokenizer = load_tokenizer(require("--tokenizer-model", config.data.tokenizer_model))
    vocab_size = choose_vocab_size(start, config, tokenizer.vocab_size, ranks.tp_size)
    shape = resolve_shape(config.model, vocab_size, config.parallel)
    if start.found and start.found.state and start.splits is not None:
        check_identity(start.found.state, tokenizer_sha256=tokenizer.sha256, global_batch_size=batch_size)
    cache = Path(config.data.data_cache_path or directory.index_cache)
    plan = SamplePlan(tokenizer, shape.seq_length, batch_size, training.seed, cache)
    data = build_run_data(config.data, start.schedule, training.eval_iters, plan, start.splits)
    signals.check()
    saver = _open_directory(directory, folders, config, start.step, ranks)
    run_on_main_rank(lambda: directory.record_text(tokenizer=tokenizer.sha256, corpora=data.fingerprint))
    stepper = _build_stepper(config, start, shape, batch_size, ranks, libraries)
    token_bytes = tokenizer.token_bytes()
    run = Run(
        config=config,
        schedule=start.schedule,
        ranks=ranks,
        device=device,
        tokenizer=tokenizer,
        shape=shape,
        token_bytes=None if token_bytes is None else torch.tensor(token_bytes, device=device.torch_device),
        micro_batch_size=stepper.micro_batch_size,
        global_batch_size=batch_size,
        flops_per_step=step_flops(shape, batch_size),
        data=data,
        stepper=stepper,
        expert_counter=_expert_counter(shape, stepper.train_state.chunks, ranks),
        directory=directory,
        first_step=start.step,
        gpu_hours=start.gpu_hours,
        saver=saver,
    )
    _announce(run, libraries)
    if start.found is not None:
        settings = config.checkpoint
        is_same_run = start.found.state is not None and not settings.finetune
        load_checkpoint(
            start.found,
            stepper.train_state,
            with_optimizer=is_same_run and not settings.no_load_optim,
            with_rng_states=is_same_run and not settings.no_load_rng,
        )
        logger.info("loaded %s: %d of %d steps are done", start.found.folder, start.step, start.schedule.num_steps)
    signals.check()
    return run


def _open_directory(
    directory: RunDirectory, folders: CheckpointFolders, config: RunConfig, first_step: int, ranks: ParallelState
) -> CheckpointSaver:
    """Record the run's settings, start its log file and prepare to save its checkpoints."""
    config_yaml = dump_config(config)

    def create() -> None:
        """Write the files; only the main rank calls it."""
        directory.create(config_yaml, first_step)
        directory.link_checkpoints(folders.path)

    run_on_main_rank(create)
    settings = config.checkpoint
    return CheckpointSaver(folders, ranks, config_yaml, keep_training=settings.async_save, keep_last=settings.keep_last)


def _build_stepper(
    config: RunConfig, start: Start, shape: ModelShape, batch_size: int, ranks: ParallelState, libraries: Libraries
) -> Stepper:
    """Build model, optimizer and learning-rate schedule, and advance the schedule to the first step."""
    training = config.training
    seed_everything(training.seed)
    chunks = build_model(config, shape, ranks, libraries)
    optimizer = build_optimizer(config.optimizer, chunks, training.bf16, config.parallel.overlap_param_gather)
    scheduler = build_scheduler(config.optimizer, optimizer, start.schedule.num_steps, batch_size)
    scheduler.step(increment=start.step * batch_size)
    return Stepper(
        TrainState(chunks, optimizer, scheduler, ranks),
        seq_length=shape.seq_length,
        micro_batch_size=require("--micro-batch-size", training.micro_batch_size),
        global_batch_size=batch_size,
    )


def _expert_counter(shape: ModelShape, chunks: list[torch.nn.Module], ranks: ParallelState) -> ExpertCounter | None:
    return ExpertCounter(chunks, shape.num_layers, shape.num_experts, ranks) if shape.num_experts else None


def _parallel_sizes(config: RunConfig) -> ParallelSizes:
    parallel, layers = config.parallel, require("--num-layers", config.model.num_layers)
    return ParallelSizes(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(layers, parallel),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )


def _announce(run: Run, libraries: Libraries) -> None:
    """Log once, on the main rank, the hardware, the libraries, the model and the data of each phase."""
    if not run.ranks.is_main:
        return
    implementation = loss_choice(run.config, libraries).implementation
    parts = libraries.describe(cross_entropy=implementation)
    logger.info("using: %s, %d ranks; %s", run.device.name, run.ranks.world_size, parts)
    parameters = sum(parameter.numel() for chunk in run.stepper.train_state.chunks for parameter in chunk.parameters())
    logger.info("model: %s parameters on this rank, vocabulary %d", short(parameters), run.shape.vocab_size)
    for line in run.facts.describe_phases():
        logger.info(line)
