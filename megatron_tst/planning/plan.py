"""Counts the data tokens, FLOPs and GPU-hours of a run before it starts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_tst.config import RunConfig, UserError, check_sizes
from megatron_tst.planning.memory import sequences_per_step, shape_of
from megatron_tst.planning.published import implied_mfu
from megatron_tst.planning.step_time import run_step_flops
from megatron_tst.shape.hardware import Gpu
from megatron_tst.shape.parameters import count_parameters
from megatron_tst.telemetry import RunDirectory, read_metrics


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run.

    Attributes:
        bag_size: bag size s.
        num_steps: number of optimizer steps.
        positions: number of positions that are computed.
        data_tokens: number of data tokens that are read.
        flops: number of model FLOPs.
    """

    bag_size: int
    num_steps: int
    positions: int
    data_tokens: int
    flops: int


@dataclass(frozen=True)
class Speed:
    """The speed of a GPU.

    Attributes:
        mfu: model FLOPs utilization, a fraction of the GPU's peak.
        source: origin of this number, in words.
    """

    mfu: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The estimate of a run.

    Attributes:
        parameters: number of parameters of the model.
        active_parameters: number of parameters that one position uses.
        phases: estimates of the phases.
        flops_per_step: model FLOPs per step, the same in every phase.
        speed: speed of a GPU.
        gpu_hours: GPU-hours of the run.
        hours: duration of the run in hours.
    """

    parameters: int
    active_parameters: int
    phases: tuple[PhasePlan, ...]
    flops_per_step: int
    speed: Speed
    gpu_hours: float
    hours: float

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def positions(self) -> int:
        """Number of positions that are computed in all phases."""
        return sum(phase.positions for phase in self.phases)

    @property
    def data_tokens(self) -> int:
        """Number of data tokens that are read in all phases."""
        return sum(phase.data_tokens for phase in self.phases)

    @property
    def flops(self) -> int:
        """Number of model FLOPs of all phases."""
        return sum(phase.flops for phase in self.phases)


def complete(config: RunConfig, num_gpus: int) -> RunConfig:
    """Return the settings with their global batch size filled in.

    Raises:
        UserError: if a setting that a plan needs is missing.
    """
    model, training = config.model, config.training
    for flag, value in {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--seq-length": model.seq_length,
        "--vocab-size": model.vocab_size,
        "--micro-batch-size": training.micro_batch_size,
        "--train-iters": training.train_iters,
    }.items():
        if not value or value < 0:
            raise UserError(f"{flag} {value}: a plan needs a number above 0, in the YAML file or as a flag")
    check_sizes(config)
    batch = sequences_per_step(config, num_gpus)
    if batch < 1:
        raise UserError(f"--num-gpus {num_gpus}: is fewer than tp x pp x cp of the configured layout")
    return dataclasses.replace(config, training=dataclasses.replace(training, global_batch_size=batch))


def make_plan(config: RunConfig, gpu: Gpu, num_gpus: int, speed: Speed) -> Plan:
    """Estimate a run.

    Args:
        config: settings from :func:`complete`.
        gpu: kind of GPU.
        num_gpus: number of GPUs.
        speed: speed of a GPU.

    Raises:
        UserError: if the phases do not form a schedule.
    """
    shape = shape_of(config)
    flops_per_step = run_step_flops(config, num_gpus)
    positions_per_step = sequences_per_step(config, num_gpus) * shape.seq_length
    try:
        schedule = config.schedule
    except ValueError as error:
        raise UserError(f"phases: {error}") from error
    phases = tuple(
        PhasePlan(
            bag_size=phase.bag_size,
            num_steps=phase.num_steps,
            positions=phase.num_steps * positions_per_step,
            data_tokens=phase.num_steps * positions_per_step * phase.tokens_per_position,
            flops=phase.num_steps * flops_per_step,
        )
        for phase in schedule.phases
    )
    gpu_hours = schedule.num_steps * flops_per_step / (gpu.peak_tflops * 1e12 * speed.mfu) / 3600
    return Plan(
        parameters=count_parameters(shape),
        active_parameters=count_parameters(shape, active=True),
        phases=phases,
        flops_per_step=flops_per_step,
        speed=speed,
        gpu_hours=gpu_hours,
        hours=gpu_hours / num_gpus,
    )


def find_speed(config: RunConfig, gpu: Gpu, mfu: float | None, measured: Path | None) -> Speed:
    """Return the speed of a GPU: as given, as measured in a run, or as implied by the paper's GPU-hours.

    Raises:
        UserError: if the speed is not between 0 and the GPU's peak, or the run directory has no logged step.
    """
    if mfu is not None:
        if not 0 < mfu <= 1:
            raise UserError(f"--mfu {mfu}: must lie between 0 and 1")
        return Speed(mfu, "given")
    if measured is not None:
        metrics = RunDirectory(measured).metrics
        lines = [line for line in read_metrics(metrics) if line["kind"] == "step"] if metrics.is_file() else []
        if not lines:
            raise UserError(f"--measured {measured}: holds no run with a logged step")
        tflops = median(line["tflops_per_gpu"] for line in lines)
        if not 0 < tflops <= gpu.peak_tflops:
            raise UserError(
                f"--measured {measured}: ran at {tflops:.3g} TFLOP/s; must lie between 0 and the {gpu.peak_tflops:g} "
                f"of {gpu.name}"
            )
        return Speed(tflops / gpu.peak_tflops, f"measured in {measured}")
    share, name = implied_mfu(config.model)
    return Speed(share, f"implied by the paper's hours for {name} on B200")
