"""What a run holds while it trains."""

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
from megatron_tst.superposition import Phase, Schedule, bag_weights
from megatron_tst.telemetry import RunDirectory, versions
from megatron_tst.training.experts import ExpertCounter
from megatron_tst.training.step import Stepper


@dataclass(frozen=True)
class Run:
    """A run, ready to train.

    Attributes:
        config: its settings.
        schedule: its phases.
        ranks: this rank's place.
        device: what it computes on.
        tokenizer: vocabulary and end of document.
        shape: the sizes of its model.
        token_bytes: ``[vocabulary]`` int64, bytes of text that each token stands for; None where they are not known.
        micro_batch_size: sequences per rank in one forward pass.
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
    def positions_per_step(self) -> int:
        """Positions of one optimizer step over all ranks."""
        return self.global_batch_size * self.shape.seq_length

    def batch_shape(self, phase: Phase) -> BatchShape:
        """Return what text is turned into in a phase."""
        settings = self.config.superposition
        weights = bag_weights(settings.loss_weights, phase.bag_size, self.device.torch_device)
        masked_after = self.tokenizer.eod if self.config.data.eod_mask_loss else None
        return BatchShape(
            seq_length=self.shape.seq_length,
            bag_size=phase.bag_size,
            weights=weights,
            masked_after=masked_after,
            objective=settings.tst_objective,
            reads_bags=phase.reads_bags,
        )

    def read(self, text: RunDataset, schedule: Schedule, num_workers: int, first_step: int = 0) -> BatchLoader:
        """Start reading the micro-batches of a schedule, from one step on."""
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
