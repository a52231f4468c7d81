"""Shows the progress of a run: a live display on a terminal, plain lines elsewhere."""

import logging
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_tst.telemetry.metrics import RecoveryMetrics, StepMetrics, SwitchMetrics, ValidMetrics

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Shows the step, phase, loss and speed of a run."""

    def __init__(self, num_steps: int, num_phases: int, visible: bool = True, first_step: int = 0) -> None:
        """Prepare the display, which the ``with`` statement starts and ends.

        Args:
            num_steps: number of optimizer steps of the run.
            num_phases: number of phases of the run.
            visible: whether this rank shows the display.
            first_step: number of steps that are already done.
        """
        self._num_steps, self._num_phases, self._first_step = num_steps, num_phases, first_step
        console = Console(stderr=True)
        self._live = visible and console.is_terminal
        self._bar = Progress(
            TextColumn("phase {task.fields[phase]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            console=console,
            expand=True,
            disable=not self._live,
        )

    def __enter__(self) -> "TrainingProgress":
        """Start the display."""
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=self._num_steps, completed=self._first_step, phase=f"-/{self._num_phases}", facts="", left=""
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display."""
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` completed steps."""
        self._bar.update(self._task, completed=step)

    def show_step(self, metrics: StepMetrics, seconds_left: float) -> None:
        """Show a logged step."""
        phase = f"{metrics.phase + 1}/{self._num_phases}"
        facts = f"{metrics.loss_kind} {metrics.loss:.4f}  {short(metrics.data_tokens_per_s)} data tokens/s"
        left = f"{timedelta(seconds=round(seconds_left))} left"
        if self._live:
            self._bar.update(self._task, phase=f"{phase} s={metrics.bag_size}", facts=facts, left=left)
        # The live display shows the same facts itself; log.txt always receives the line.
        self._log(
            logging.DEBUG if self._live else logging.INFO,
            metrics.step,
            f"phase {phase}  s={metrics.bag_size}  {facts}  lr {metrics.lr:.3g}  grad norm {metrics.grad_norm:.3f}  "
            f"read {short(metrics.data_tokens)} data tokens  {left}",
        )

    def show_valid(self, metrics: ValidMetrics) -> None:
        """Show an evaluation."""
        per_byte = "" if metrics.bits_per_byte is None else f", {metrics.bits_per_byte:.4f} bits per byte"
        self._log(logging.INFO, metrics.step, f"validation loss {metrics.valid_loss:.4f} (next token{per_byte})")

    def show_switch(self, metrics: SwitchMetrics | RecoveryMetrics) -> None:
        """Show a change of the bag size, or the end of the recovery from it."""
        self._log(logging.INFO, metrics.step, _tell(metrics))

    def _log(self, level: int, step: int, line: str) -> None:
        logger.log(level, f"step {step}/{self._num_steps}  {line}")


def _tell(metrics: SwitchMetrics | RecoveryMetrics) -> str:
    if isinstance(metrics, SwitchMetrics):
        sizes = f"{metrics.switched_from_bag_size} to {metrics.switched_to_bag_size}"
        return f"bag size {sizes}: loss {metrics.loss_before_switch:.4f} before, {metrics.loss_after_switch:.4f} after"
    if metrics.spike <= 0:
        return "the loss did not rise at the switch"
    rise = f"the loss rose by {metrics.spike:.4f} at the switch"
    if metrics.recovery_steps is None:
        return f"{rise} and had not recovered by the end of the phase"
    return f"{rise} and recovered after {metrics.recovery_steps} steps"


def short(number: float) -> str:
    """Format a count with three digits and a suffix: 950, 12.3k, 4.5M, 2.1B, 1.68T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
