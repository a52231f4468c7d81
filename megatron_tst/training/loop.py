"""The training loop: one loop over steps, whatever the phases."""

from megatron_tst.config import DivergedError
from megatron_tst.distributed import any_rank
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.training.evaluation import evaluate
from megatron_tst.training.metrics_logger import MetricsLogger, is_due
from megatron_tst.training.reinitialize import reinitialize
from megatron_tst.training.run import Run
from megatron_tst.training.stop import DivergenceGuard, StopConditions


def train(run: Run, signals: StopSignals | None = None) -> bool:
    """Train to the end of the schedule, or until asked to stop; what was done is saved either way.

    Collective: every rank of the world calls it.

    Args:
        run: what to train.
        signals: of the process, if they are the run's to take.

    Returns:
        Whether the end was reached.

    Raises:
        UserError: if metrics or a checkpoint cannot be written, or the data names tokens beyond the vocabulary.
        DivergedError: if loss or gradient stays not finite.
    """
    signals = signals or StopSignals()
    signals.hold()
    conditions = StopConditions(run.config.checkpoint, signals)
    reader = run.read(run.data.train, run.schedule, run.config.data.num_workers, run.first_step)
    metrics = MetricsLogger(run)
    guard = DivergenceGuard(run.config.training.max_nan_steps)
    try:
        with metrics.progress:
            for step in range(run.first_step, run.schedule.num_steps):
                point = run.schedule.phase_at(step)
                if step in run.reinitialized_at:
                    reinitialize(run.stepper.train_state, run.config.training.seed, step)
                with metrics.timer.reading():
                    batches = run.read_step(reader, point.phase)
                report = run.stepper.train(batches)
                metrics.record(step + 1, point, report)
                guard.check(step + 1, report)
                if is_due(step + 1, run.config.training.eval_interval, run.schedule.num_steps):
                    with metrics.timer.paused():
                        metrics.record_valid(step + 1, evaluate(run))
                if _end_step(run, metrics, conditions, step + 1):
                    return False
        return True
    except DivergedError:
        # Raised on every rank: a checkpoint from before that is still being written is not lost.
        run.saver.finish()
        raise
    finally:
        reader.close()
        metrics.close()
        run.directory.leave()


def _end_step(run: Run, metrics: MetricsLogger, conditions: StopConditions, step: int) -> bool:
    """Save what is due after a step, and return whether to stop before the end of the schedule.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if a checkpoint cannot be written, or metrics cannot and the run is saved.
    """

    def reason() -> str | None:
        """Say why this rank is to stop; metrics that cannot be written are a reason too."""
        return metrics.failure or conditions.reason(step)

    # One vote for both questions: a signal may have reached one rank only.
    should_stop, is_writing = any_rank(reason() is not None, run.saver.is_writing)
    _poll_async_save(run, is_writing)
    if should_stop or _is_save_due(run, step):
        with metrics.timer.paused():
            metrics.sync()
            run.save(step, metrics.gpu_hours)
        # A reason that came up during the save: it is the one to stop at.
        (should_stop,) = any_rank(reason() is not None)
    is_end = step == run.schedule.num_steps
    if should_stop or is_end:
        run.saver.finish()
    if should_stop:
        metrics.check(step)
    if should_stop and not is_end:
        metrics.log_line(
            f"stopped after step {step} by {reason() or 'a signal to another rank'}; "
            f"go on with --load {run.saver.folders.path}"
        )
    return should_stop and not is_end


def _poll_async_save(run: Run, is_writing: bool) -> None:
    """Publish a checkpoint that was written in the background, once no rank is writing its part any more.

    Collective: every rank of the world calls it.
    """
    if run.saver.has_unpublished and not is_writing:
        run.saver.finish()


def _is_save_due(run: Run, step: int) -> bool:
    """Return whether a phase or an interval between checkpoints ends after ``step`` steps."""
    interval = run.config.checkpoint.save_interval
    return step in run.schedule.ends or (interval is not None and step % interval == 0)
