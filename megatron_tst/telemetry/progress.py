"""What a run shows on the screen: a live bar on a terminal, plain lines elsewhere."""

import logging
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_tst.telemetry.metrics import StepMetrics, ValidMetrics

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Shows steps, phase, loss and speed of a run of ``num_steps`` steps."""

    def __init__(self, num_steps: int, num_phases: int, visible: bool = True, first_step: int = 0) -> None:
        """Prepare the display; ``with`` starts and ends it.

        Args:
            num_steps: optimizer steps of the run.
            num_phases: phases of the run.
            visible: whether this rank shows anything.
            first_step: steps that are done already.
        """
        self._num_steps, self._num_phases, self._first_step = num_steps, num_phases, first_step
        console = Console(stderr=True)
        self._live = visible and console.is_terminal
        self._bar = Progress(
            TextColumn("phase {task.fields[phase]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> "TrainingProgress":
        """Start the display."""
        self._bar.start()
        self._task = self._bar.add_task("", total=self._num_steps, completed=self._first_step, phase="-", facts="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the display."""
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` steps done."""
        self._bar.update(self._task, completed=step)

    def show_step(self, metrics: StepMetrics) -> None:
        """Show a logged step."""
        phase = f"{metrics.phase + 1}/{self._num_phases}"
        facts = f"{metrics.loss_kind} {metrics.loss:.4f}  {short(metrics.data_tokens_per_s)} data tokens/s"
        if self._live:
            self._bar.update(self._task, completed=metrics.step, phase=f"{phase} s={metrics.bag_size}", facts=facts)
        left = timedelta(seconds=round((self._num_steps - metrics.step) * metrics.step_time_s))
        logger.log(
            logging.DEBUG if self._live else logging.INFO,
            f"step {metrics.step}/{self._num_steps}  phase {phase}  s={metrics.bag_size}  {facts}  "
            f"lr {metrics.lr:.3g}  grad norm {metrics.grad_norm:.3f}  read {short(metrics.data_tokens)} data tokens  "
            f"{left} left",
        )

    def show_valid(self, metrics: ValidMetrics) -> None:
        """Show an evaluation."""
        logger.info(f"step {metrics.step}/{self._num_steps}  validation loss {metrics.valid_loss:.4f} (next token)")


def short(number: float) -> str:
    """Write a count the short way: 950, 12.3k, 4.5M, 2.1B, 1.68T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
