"""Everything a run holds, built from its settings."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_tst.checkpoint.content import Trainables, list_all
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.load import load_checkpoint
from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import ModelSettings, RunConfig, dump_config, global_batch_size, padded_vocab_size
from megatron_tst.data.batches import Batch, BatchShape, TextReader
from megatron_tst.data.build import RunData, SamplePlan, build_run_data
from megatron_tst.data.samples import RunText
from megatron_tst.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tst.distributed import (
    Device,
    ParallelSizes,
    Ranks,
    enter_device,
    join_ranks,
    main_rank_alone,
    seed_everything,
)
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_patches import Libraries, find_libraries
from megatron_tst.megatron_patches.versions import check_transformer_engine
from megatron_tst.model import build_model, loss_choice
from megatron_tst.shape import step_flops
from megatron_tst.superposition import Phase, Schedule, bag_weights
from megatron_tst.telemetry import RunDirectory, short, start_log_screen, versions
from megatron_tst.telemetry.sinks import check_sinks
from megatron_tst.training.experts import ExpertCounter
from megatron_tst.training.optimizer import build_optimizer, build_scheduler
from megatron_tst.training.place import choose_place
from megatron_tst.training.start import Start, check_identity, choose_vocab_size, find_start
from megatron_tst.training.step import Stepper

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run, ready to train.

    Attributes:
        config: its settings.
        schedule: its phases.
        ranks: this rank's place.
        device: what it computes on.
        tokenizer: vocabulary and end of document.
        vocab_size: tokens of the vocabulary before padding.
        token_bytes: ``[vocabulary]`` int64, bytes of text that each token stands for; None where they are not known.
        global_batch_size: sequences per step.
        flops_per_step: model FLOPs of one step over all ranks.
        data: what it reads.
        stepper: model, optimizer and schedule.
        expert_counter: positions per expert, of a mixture-of-experts model.
        directory: what it leaves behind.
        first_step: optimizer steps done already.
        gpu_hours: that these took, over all ranks.
        saver: of its checkpoints.
    """

    config: RunConfig
    schedule: Schedule
    ranks: Ranks
    device: Device
    tokenizer: Tokenizer
    vocab_size: int
    token_bytes: torch.Tensor | None
    global_batch_size: int
    flops_per_step: int
    data: RunData
    stepper: Stepper
    expert_counter: ExpertCounter | None
    directory: RunDirectory
    first_step: int
    gpu_hours: float
    saver: CheckpointSaver

    def batch_shape(self, phase: Phase) -> BatchShape:
        """Return what text is turned into in a phase."""
        assert self.config.model.seq_length is not None
        settings = self.config.superposition
        weights = bag_weights(settings.loss_weights, phase.bag_size, self.device.torch_device)
        masked_after = self.tokenizer.eod if self.config.data.eod_mask_loss else None
        return BatchShape(
            seq_length=self.config.model.seq_length,
            bag_size=phase.bag_size,
            weights=weights,
            masked_after=masked_after,
            objective=settings.tst_objective,
            reads_bags=phase.reads_bags,
        )

    def read(self, text: RunText, schedule: Schedule, num_workers: int, first_step: int = 0) -> TextReader:
        """Start reading the micro-batches of a schedule, from one step on."""
        assert self.config.training.micro_batch_size is not None
        return TextReader(
            text,
            schedule,
            self.ranks,
            micro_batch_size=self.config.training.micro_batch_size,
            global_batch_size=self.global_batch_size,
            vocab_size=self.vocab_size,
            num_workers=num_workers,
            first_step=first_step,
        )

    def read_step(self, reader: TextReader, phase: Phase) -> list[Batch | None]:
        """Return this rank's micro-batches of one step; None on stages that own no text.

        Collective: every rank of the tensor-parallel group calls it.
        """
        shape, count = self.batch_shape(phase), self.stepper.num_microbatches
        return [reader.read(shape) if self.ranks.owns_text else None for _ in range(count)]

    def save(self, step: int, gpu_hours: float) -> None:
        """Save a checkpoint.

        Collective: every rank of the world calls it.

        Args:
            step: optimizer steps done.
            gpu_hours: that they took; the main rank's count.

        Raises:
            UserError: if it cannot be written.
        """
        state = RunState(
            iteration=step,
            schedule=self.schedule,
            samples_per_phase=self.schedule.samples_per_phase(step, self.global_batch_size),
            global_batch_size=self.global_batch_size,
            vocab_size=self.vocab_size,
            tokenizer=str(self.tokenizer.path.resolve()),
            tokenizer_sha256=self.tokenizer.sha256,
            sources=[asdict(cut) for cut in self.data.cuts],
            layout=self.ranks.layout,
            is_permanent=step in self.schedule.ends,
            versions=versions(),
            gpu_hours=gpu_hours,
        )
        samples = step * self.global_batch_size
        self.saver.save(state, lambda: list_all(self.stepper.trainables, step, self.config.model, samples))

    @property
    def reinitialized_at(self) -> tuple[int, ...]:
        """Steps done when embedding and output layer are drawn anew.

        The checkpoint of a switch is written before, so a run that goes on from it draws them too.
        """
        is_asked = self.config.superposition.tst_reinitialize_at_switch
        return self.schedule.recovery_starts if is_asked else ()

    @property
    def validation(self) -> Schedule | None:
        """The evaluation as a schedule of its own: ordinary batches, or None where nothing is held out."""
        if self.data.valid is None:
            return None
        return Schedule((Phase(1, len(self.data.valid.phases[0]) // self.global_batch_size),))


def build_run(config: RunConfig, signals: StopSignals | None = None) -> Run:
    """Build everything before the first step, and load the checkpoint to go on from.

    Collective: every rank of the world calls it.

    Args:
        config: the settings.
        signals: of the process, if they are the run's to take.

    Raises:
        UserError: if a setting or a file cannot be used.
        StoppedInSetUp: if a signal asks to stop.
    """
    device = enter_device()
    libraries = find_libraries()
    check_transformer_engine(libraries.transformer_engine)
    check_sinks(config.logging)
    ranks = join_ranks(_parallel_sizes(config), config.parallel.distributed_timeout_minutes)
    # Not earlier: a rank that waits for others to join would hear a signal only once they have.
    if signals is not None:
        signals.listen()
    assert config.logging.tst_run_dir
    directory = RunDirectory(Path(config.logging.tst_run_dir))
    if ranks.is_main:
        start_log_screen()
    main_rank_alone(directory.occupy)
    try:
        return _build_in(directory, config, device, ranks, libraries, signals or StopSignals())
    except BaseException:
        directory.leave()
        raise


def _build_in(
    directory: RunDirectory,
    config: RunConfig,
    device: Device,
    ranks: Ranks,
    libraries: Libraries,
    signals: StopSignals,
) -> Run:
    training, model = config.training, config.model
    assert model.seq_length and config.data.tokenizer_model
    start = find_start(config, ranks)
    signals.check()
    folders = main_rank_alone(lambda: choose_place(directory, config, start))
    batch_size = global_batch_size(training, config.parallel, ranks.dp_size)
    tokenizer = load_tokenizer(config.data.tokenizer_model)
    vocab_size = choose_vocab_size(start, config, tokenizer.vocab_size, ranks.tp_size)
    check_identity(start, tokenizer_sha256=tokenizer.sha256, global_batch_size=batch_size)
    cache = Path(config.data.data_cache_path or directory.index_cache)
    plan = SamplePlan(tokenizer, model.seq_length, batch_size, training.seed, cache)
    data = build_run_data(config.data, start.schedule, training.eval_iters, plan, start.cuts)
    signals.check()
    saver = _open_directory(directory, folders, config, start.step, ranks)
    stepper = _build_stepper(config, start, vocab_size, batch_size, ranks, libraries)
    token_bytes = tokenizer.token_bytes()
    padded = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, ranks.tp_size)
    run = Run(
        config=config,
        schedule=start.schedule,
        ranks=ranks,
        device=device,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        token_bytes=None if token_bytes is None else torch.tensor(token_bytes, device=device.torch_device),
        global_batch_size=batch_size,
        flops_per_step=step_flops(model, padded, batch_size),
        data=data,
        stepper=stepper,
        expert_counter=_expert_counter(model, stepper.trainables.chunks, ranks),
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
            stepper.trainables,
            with_optimizer=is_same_run and not settings.no_load_optim,
            with_generators=is_same_run and not settings.no_load_rng,
        )
        logger.info("loaded %s: %d of %d steps are done", start.found.folder, start.step, start.schedule.num_steps)
    signals.check()
    return run


def _open_directory(
    directory: RunDirectory, folders: CheckpointFolders, config: RunConfig, first_step: int, ranks: Ranks
) -> CheckpointSaver:
    """Record the run's settings, begin its log file, and prepare to save its checkpoints."""
    config_yaml = dump_config(config)

    def create() -> None:
        """Write on the main rank alone."""
        directory.create(config_yaml, first_step)
        directory.link_checkpoints(folders.path)

    main_rank_alone(create)
    settings = config.checkpoint
    return CheckpointSaver(folders, ranks, config_yaml, keep_training=settings.async_save, keep_last=settings.keep_last)


def _build_stepper(
    config: RunConfig, start: Start, vocab_size: int, batch_size: int, ranks: Ranks, libraries: Libraries
) -> Stepper:
    """Build model, optimizer and learning-rate schedule, the schedule where the first step will find it."""
    training = config.training
    assert config.model.seq_length and training.micro_batch_size
    seed_everything(training.seed)
    chunks = build_model(config, vocab_size, ranks, libraries)
    optimizer = build_optimizer(config.optimizer, chunks, training.bf16, config.parallel.overlap_param_gather)
    scheduler = build_scheduler(config.optimizer, optimizer, start.schedule.num_steps, batch_size)
    scheduler.step(increment=start.step * batch_size)
    return Stepper(
        Trainables(chunks, optimizer, scheduler, ranks),
        seq_length=config.model.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=batch_size,
    )


def _expert_counter(model: ModelSettings, chunks: list[torch.nn.Module], ranks: Ranks) -> ExpertCounter | None:
    if model.num_experts is None:
        return None
    assert model.num_layers
    return ExpertCounter(chunks, model.num_layers, model.num_experts, ranks)


def _parallel_sizes(config: RunConfig) -> ParallelSizes:
    parallel, layers = config.parallel, config.model.num_layers or 0
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    return ParallelSizes(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=per_stage and layers // parallel.pipeline_model_parallel_size // per_stage,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )


def _announce(run: Run, libraries: Libraries) -> None:
    """Say once what is about to be trained, on what, and how often the text is read."""
    if not run.ranks.is_main:
        return
    implementation = loss_choice(run.config, libraries).implementation
    parts = libraries.describe(cross_entropy=implementation)
    logger.info("using: %s, %d ranks; %s", run.device.name, run.ranks.world_size, parts)
    parameters = sum(parameter.numel() for chunk in run.stepper.trainables.chunks for parameter in chunk.parameters())
    logger.info("model: %s parameters on this rank, vocabulary %d", short(parameters), run.vocab_size)
    assert run.config.model.seq_length
    for index, (phase, text) in enumerate(zip(run.schedule.phases, run.data.train.phases, strict=True)):
        tokens = len(text) * run.config.model.seq_length * phase.tokens_per_position
        logger.info(
            "phase %d: %d steps, bag size %d, %s data tokens, %.2f epochs of its documents",
            index + 1, phase.num_steps, phase.bag_size, short(tokens), text.num_epochs,
        )  # fmt: skip
