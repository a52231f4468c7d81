"""The training loop: a single loop over the steps of all phases."""

from megatron_tst.config import DivergedError
from megatron_tst.distributed import any_rank
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.training.evaluation import evaluate
from megatron_tst.training.metrics_logger import MetricsLogger, is_due
from megatron_tst.training.reinitialize import reinitialize
from megatron_tst.training.run import Run
from megatron_tst.training.stop import DivergenceGuard, StopConditions


def train(run: Run, signals: StopSignals | None = None) -> bool:
    """Train to the end of the schedule, or until asked to stop; a checkpoint is saved in either case.

    Collective: every rank of the world calls it.

    Args:
        run: the run to train.
        signals: stop signals of this process; None if the run is not to react to them.

    Returns:
        Whether the end of the schedule was reached.

    Raises:
        UserError: if metrics or a checkpoint cannot be written, or the data holds token ids beyond the vocabulary.
        DivergedError: if the loss or the gradient is not finite for too many steps in a row.
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
        # Every rank raises this, so an earlier checkpoint that is still being written can be finished.
        run.saver.finish()
        raise
    finally:
        reader.close()
        metrics.close()
        run.directory.leave()


def _end_step(run: Run, metrics: MetricsLogger, conditions: StopConditions, step: int) -> bool:
    """Save a checkpoint if one is due after a step, and return whether to stop before the end of the schedule.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if a checkpoint cannot be written; or if metrics cannot be written, after a checkpoint was saved.
    """

    def reason() -> str | None:
        """Return why this rank should stop, or None; a failure to write metrics is a reason too."""
        return metrics.failure or conditions.reason(step)

    # One collective answers both questions; a signal may have reached only one rank.
    should_stop, is_writing = any_rank(reason() is not None, run.saver.is_writing)
    _poll_async_save(run, is_writing)
    if should_stop or _is_save_due(run, step):
        with metrics.timer.paused():
            metrics.sync()
            run.save(step, metrics.gpu_hours)
        # A reason may have come up during the save; stopping now avoids a second save one step later.
        (should_stop,) = any_rank(reason() is not None)
    is_end = step == run.schedule.num_steps
    if should_stop or is_end:
        run.saver.finish()
    if should_stop:
        metrics.check(step)
    if should_stop and not is_end:
        metrics.log_line(
            f"stopped after step {step} by {reason() or 'a signal to another rank'}; "
            f"continue with --load {run.saver.folders.path}"
        )
    return should_stop and not is_end


def _poll_async_save(run: Run, is_writing: bool) -> None:
    """Publish a checkpoint that was written in the background as soon as every rank has written its part.

    Collective: every rank of the world calls it.
    """
    if run.saver.has_unpublished and not is_writing:
        run.saver.finish()


def _is_save_due(run: Run, step: int) -> bool:
    """Return whether a phase or a save interval ends after ``step`` steps."""
    interval = run.config.checkpoint.save_interval
    return step in run.schedule.ends or (interval is not None and step % interval == 0)
