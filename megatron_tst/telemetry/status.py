"""Reads the status of a run from its directory."""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_tst.config import UserError, load_config
from megatron_tst.telemetry.metrics import read_metrics
from megatron_tst.telemetry.run_directory import RunDirectory
from megatron_tst.telemetry.time_left import seconds_left

RECENT_LINES = 20


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        step: last logged step.
        num_steps: number of steps of the whole run.
        phase: 0-based index of the current phase.
        num_phases: number of phases of the run.
        bag_size: bag size of the current phase.
        loss_kind: kind of the loss, as in the metrics.
        loss: loss of the last logged step.
        valid_loss: loss of the last evaluation, or None.
        step_time_s: median time per step of the last lines of the phase.
        seconds_left: seconds to the end of the run, with each phase at its own pace.
        checkpoint: step of the checkpoint that a resumed run would load, or None.
    """

    step: int
    num_steps: int
    phase: int
    num_phases: int
    bag_size: int
    loss_kind: str
    loss: float
    valid_loss: float | None
    step_time_s: float
    seconds_left: float
    checkpoint: int | None

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.num_steps


def read_status(path: Path) -> RunStatus:
    """Read the status of a run.

    Raises:
        UserError: if the folder holds no run with a logged step.
    """
    directory = RunDirectory(path)
    if not directory.metrics.is_file():
        raise UserError(f"{path}: holds no metrics.jsonl")
    lines = read_metrics(directory.metrics)
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise UserError(f"{path}: has no logged step yet")
    schedule = load_config(directory.config).schedule
    last = steps[-1]
    by_phase: dict[int, list[float]] = {}
    for line in steps:
        by_phase.setdefault(line["phase"], []).append(line["step_time_s"])
    paces = {phase: median(times[-RECENT_LINES:]) for phase, times in by_phase.items()}
    return RunStatus(
        step=last["step"],
        num_steps=schedule.num_steps,
        phase=last["phase"],
        num_phases=len(schedule.phases),
        bag_size=last["bag_size"],
        loss_kind=last["loss_kind"],
        loss=last["loss"],
        valid_loss=next((line["valid_loss"] for line in reversed(lines) if line["kind"] == "valid"), None),
        step_time_s=paces[last["phase"]],
        seconds_left=seconds_left(schedule.ends, last["step"], paces),
        checkpoint=_latest_checkpoint(directory),
    )


def _latest_checkpoint(directory: RunDirectory) -> int | None:
    """Return the step of the newest checkpoint that is not beyond the one that the tracker names."""
    folder = directory.checkpoints
    try:
        named = int((folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no tracker, or no step in it
        named = None
    names = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*") if path.is_dir())
    steps = [int(name[1]) for name in names if name]
    return max((step for step in steps if named is None or step <= named), default=None)
