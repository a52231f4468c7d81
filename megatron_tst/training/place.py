"""Where a run writes, and that it writes into no other run's folders."""

from pathlib import Path

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import RunConfig, UserError
from megatron_tst.telemetry import RunDirectory
from megatron_tst.training.start import Start


def choose_place(directory: RunDirectory, config: RunConfig, start: Start) -> CheckpointFolders:
    """Return where the run's checkpoints go, before anything is written or long work is done.

    Args:
        directory: of the run.
        config: its settings.
        start: where it starts.

    Raises:
        UserError: if the run directory or the folder of ``--save`` is in use by a run that this one does not continue,
            or cannot be written.
    """
    settings = config.checkpoint
    folders = CheckpointFolders(Path(settings.save or directory.checkpoints))
    # First: a run that is still there may save for the first time at any moment.
    directory.occupy_checkpoints(folders.path)
    # Its own checkpoints: the run goes on in its folder, also if it was stopped before the first of them.
    if settings.load is not None and not settings.finetune and _is_same(settings.load, folders.path):
        return folders
    if start.step and start.found is not None and _is_same(start.found.folder.parent, directory.checkpoints):
        raise UserError(
            f"--save {folders.path}: the run's checkpoints lie in {directory.checkpoints}; save there, or move them"
        )
    directory.refuse_used()
    if steps := folders.steps():
        place = f"--save {settings.save}" if settings.save else f"--tst-run-dir {directory.path}"
        raise UserError(
            f"{place}: already holds a run's checkpoints, of the steps {steps}; choose another, or go on with "
            f"--load {folders.path}"
        )
    return folders


def _is_same(path: Path | str, other: Path) -> bool:
    return Path(path).resolve() == other.resolve()
