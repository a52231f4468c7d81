"""The training loop: one loop over steps, whatever the phases."""

import time

from megatron_tst.config import DivergedError
from megatron_tst.distributed import any_rank
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.training.evaluation import evaluate
from megatron_tst.training.monitor import Monitor, is_due
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
    monitor = Monitor(run)
    guard = DivergenceGuard(run.config.training.max_nan_steps)
    try:
        with monitor.progress:
            for step in range(run.first_step, run.schedule.num_steps):
                point = run.schedule.phase_at(step)
                if step in run.reinitialized_at:
                    reinitialize(run.stepper.trainables, run.config.training.seed, step)
                started_s = time.perf_counter()
                batches = run.read_step(reader, point.phase)
                data_s = time.perf_counter() - started_s
                report = run.stepper.train(batches)
                monitor.record(step + 1, point, report, data_s)
                guard.check(step + 1, report)
                if is_due(step + 1, run.config.training.eval_interval, run):
                    with monitor.pace.paused():
                        monitor.record_valid(step + 1, evaluate(run))
                if _save_and_ask(run, monitor, conditions, step + 1):
                    return False
        return True
    except DivergedError:
        # Raised on every rank: a checkpoint from before that is still being written is not lost.
        run.saver.finish()
        raise
    finally:
        reader.close()
        monitor.close()
        run.directory.leave()


def _save_and_ask(run: Run, monitor: Monitor, conditions: StopConditions, step: int) -> bool:
    """Save if it is time to, and return whether to stop: a signal may have reached one rank only.

    Collective: every rank of the world calls it.

    Raises:
        UserError: if a checkpoint cannot be written, or metrics cannot and the run is saved.
    """

    def reason() -> str | None:
        """Say why this rank is to stop; metrics that cannot be written are a reason too."""
        return monitor.failure or conditions.reason(step)

    is_asked, is_writing = any_rank(reason() is not None, run.saver.is_writing)
    if run.saver.has_unpublished and not is_writing:
        run.saver.finish()
    is_end = step == run.schedule.num_steps
    interval = run.config.checkpoint.save_interval
    if is_asked or step in run.schedule.ends or (interval is not None and step % interval == 0):
        with monitor.pace.paused():
            monitor.sync()
            run.save(step, monitor.gpu_hours)
        # Asked during the save: it is the one to stop at.
        (is_asked,) = any_rank(reason() is not None)
    if is_asked or is_end:
        run.saver.finish()
    if is_asked:
        monitor.check(step)
    if is_asked and not is_end:
        monitor.note(
            f"stopped after step {step} by {reason() or 'a signal to another rank'}; "
            f"go on with --load {run.saver.folders.path}"
        )
    return is_asked and not is_end
