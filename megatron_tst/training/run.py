"""The objects and sizes that a run holds while it trains."""

from dataclasses import asdict, dataclass

import torch

from megatron_tst.checkpoint.content import list_all
from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.checkpoint.save import CheckpointSaver
from megatron_tst.config import RunConfig
from megatron_tst.data.batches import Batch, BatchLoader, BatchShape
from megatron_tst.data.build import RunData
from megatron_tst.data.samples import RunDataset
from megatron_tst.data.tokenizer import Tokenizer
from megatron_tst.distributed import Device, ParallelState
from megatron_tst.shape import ModelShape
from megatron_tst.superposition import Phase, Schedule
from megatron_tst.telemetry import RunDirectory, versions
from megatron_tst.telemetry.run_metrics import RunFacts
from megatron_tst.training.experts import ExpertCounter
from megatron_tst.training.step import Stepper


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        config: settings of the run.
        schedule: phases of the run.
        ranks: parallel state of this rank.
        device: device of this rank.
        tokenizer: tokenizer of the run, with its vocabulary and end-of-document token.
        shape: resolved sizes of the model.
        token_bytes: ``[vocabulary]`` int64, bytes of text per token; None if they are unknown.
        micro_batch_size: number of sequences per rank in one forward pass.
        global_batch_size: number of sequences per step.
        flops_per_step: model FLOPs of one step over all ranks.
        data: datasets of training and validation.
        stepper: model, optimizer and learning-rate schedule.
        expert_counter: counter of the positions per expert; None unless the model is an MoE.
        directory: run directory.
        first_step: number of optimizer steps that are already done.
        gpu_hours: GPU-hours of the steps that are already done, over all ranks.
        saver: writer of the checkpoints.
    """

    config: RunConfig
    schedule: Schedule
    ranks: ParallelState
    device: Device
    tokenizer: Tokenizer
    shape: ModelShape
    token_bytes: torch.Tensor | None
    micro_batch_size: int
    global_batch_size: int
    flops_per_step: int
    data: RunData
    stepper: Stepper
    expert_counter: ExpertCounter | None
    directory: RunDirectory
    first_step: int
    gpu_hours: float
    saver: CheckpointSaver

    @property
    def facts(self) -> RunFacts:
        """The constants that metrics are computed from."""
        return RunFacts(
            schedule=self.schedule,
            objective=self.config.superposition.tst_objective,
            positions_per_step=self.global_batch_size * self.shape.seq_length,
            flops_per_step=self.flops_per_step,
            epochs=tuple(text.num_epochs for text in self.data.train.phases),
            world_size=self.ranks.world_size,
            device_name=self.device.name,
        )

    def batch_shape(self, phase: Phase) -> BatchShape:
        """Return the shape of the batches of a phase."""
        masked_after = self.tokenizer.eod if self.config.data.eod_mask_loss else None
        settings, device = self.config.superposition, self.device.torch_device
        return BatchShape.of_phase(phase, settings, self.shape.seq_length, masked_after, device)

    def read(self, text: RunDataset, schedule: Schedule, num_workers: int, first_step: int = 0) -> BatchLoader:
        """Start reading the micro-batches of a schedule, beginning at step ``first_step``."""
        return BatchLoader(
            text,
            schedule,
            self.ranks,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            vocab_size=self.shape.vocab_size,
            num_workers=num_workers,
            first_step=first_step,
        )

    def read_step(self, reader: BatchLoader, phase: Phase) -> list[Batch | None]:
        """Return this rank's micro-batches of one step; None on stages that own no text.

        Collective: every rank of the tensor-parallel group calls it.
        """
        shape, count = self.batch_shape(phase), self.stepper.num_microbatches
        return [reader.read(shape) if self.ranks.owns_text else None for _ in range(count)]

    def save(self, step: int, gpu_hours: float) -> None:
        """Save a checkpoint.

        Collective: every rank of the world calls it.

        Args:
            step: number of optimizer steps done.
            gpu_hours: GPU-hours of these steps, as counted by the main rank.

        Raises:
            UserError: if the checkpoint cannot be written.
        """
        state = RunState(
            iteration=step,
            schedule=self.schedule,
            samples_per_phase=self.schedule.samples_per_phase(step, self.global_batch_size),
            global_batch_size=self.global_batch_size,
            vocab_size=self.shape.vocab_size,
            tokenizer=str(self.tokenizer.path.resolve()),
            tokenizer_sha256=self.tokenizer.sha256,
            sources=[asdict(split) for split in self.data.splits],
            layout=self.ranks.layout,
            is_permanent=step in self.schedule.ends,
            versions=versions(),
            gpu_hours=gpu_hours,
        )
        samples = step * self.global_batch_size
        self.saver.save(state, lambda: list_all(self.stepper.train_state, step, self.config.model, samples))

    @property
    def reinitialized_at(self) -> tuple[int, ...]:
        """The numbers of completed steps after which embedding and output layer are re-initialized.

        The checkpoint of a switch is written before that, so a run that continues from it re-initializes them too.
        """
        is_asked = self.config.superposition.tst_reinitialize_at_switch
        return self.schedule.recovery_starts if is_asked else ()

    @property
    def validation(self) -> Schedule | None:
        """The evaluation as a schedule of its own, with bag size 1; None if there is no validation data."""
        if self.data.valid is None:
            return None
        return Schedule((Phase(1, len(self.data.valid.phases[0]) // self.global_batch_size),))
